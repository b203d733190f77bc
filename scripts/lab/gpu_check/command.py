"""The first hour on a GPU: one command, stages in order of worth, one table.

    python scripts/gpu_check.py                       # on the GPU; writes docs/benchmarks/gpu
    python scripts/gpu_check.py --minutes 14 --stages machine,kernels,equality
    python scripts/gpu_check.py --resume              # only what has not passed yet
    python scripts/gpu_check.py --rehearse            # small, on a CPU, into a temporary folder

Every stage is a process with a time limit and writes its result the moment it ends; none hides the
next. docs/gpu.md says what each shows. The exit code is 0 if all stages passed.
"""

import argparse
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

from lab.gpu_check.report import REHEARSAL, table, write_page
from lab.gpu_check.runner import PASSED, run_stages, write_json
from lab.gpu_check.stages import Options, make_stages
from lab.places import ROOT
from vllm_kvcompress.evaluation.provenance import provenance, public_words


def main(argv: list[str] | None = None) -> int:
    """Run, print, write."""
    argv = sys.argv[1:] if argv is None else argv
    for number in (signal.SIGINT, signal.SIGTERM):  # both leave no stage behind
        signal.signal(number, signal.default_int_handler)
    args = parse_args(argv)
    out = args.out or default_folder(args.rehearse)
    if out.exists() and any(out.iterdir()) and not args.resume:
        print(f"error: {out} has results; give --resume or another --out", file=sys.stderr)
        return 1
    out.mkdir(parents=True, exist_ok=True)
    command = " ".join(["python scripts/gpu_check.py", *public_words(argv, ROOT)])
    with tempfile.TemporaryDirectory() as folder:
        environment = rehearsal_environment(Path(folder)) if args.rehearse else {}
        about = about_run(args, command)
        options = Options(ROOT, args.rehearse, args.no_compile, about["commit"], environment)
        stages = {stage.name: stage for stage in make_stages(options)}
        names = args.stages.split(",") if args.stages else list(stages)
        unknown = [name for name in names if name not in stages]
        if unknown:
            print(
                f"error: --stages: there is no {unknown[0]!r}; allowed are {', '.join(stages)}",
                file=sys.stderr,
            )
            return 1
        outcomes = run_stages(
            [stages[name] for name in stages if name in names],
            out,
            about,
            args.minutes * 60,
            args.resume,
            lambda line: print(line, flush=True),
        )
    write_page(outcomes, about, out / "README.md", command)
    write_json(out / "summary.json", {**about, "status": {o.stage: o.status for o in outcomes}})
    print(f"\n{table(outcomes, about)}\n\nResults are in {out}.")
    return 0 if all(outcome.status == PASSED for outcome in outcomes) else 1


def parse_args(argv: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--rehearse", action="store_true", help="small sizes on a CPU, no GPU result")
    add("--out", type=Path, help="default: docs/benchmarks/gpu, or a temporary folder")
    add("--stages", help="comma-separated; default: all, in order")
    add("--resume", action="store_true", help="keep what has passed in --out")
    add("--minutes", type=float, default=60, help="for all stages together")
    add("--no-compile", action="store_true", help="engines without torch.compile")
    add("--commit", help="where the checkout has no git")
    args = parser.parse_args(argv)
    if not args.rehearse and not has_gpu():
        parser.error("no NVIDIA GPU is visible to torch: give --rehearse to run small on the CPU")
    return args


def has_gpu() -> bool:
    """Whether torch sees an NVIDIA GPU."""
    import torch

    return torch.cuda.is_available()


def default_folder(rehearse: bool) -> Path:
    """Where results go: a rehearsal's never among those of a GPU."""
    if rehearse:
        return Path(tempfile.mkdtemp(prefix="gpu-check-rehearsal-"))
    return ROOT / "docs" / "benchmarks" / "gpu"


def rehearsal_environment(folder: Path) -> dict[str, str]:
    """Engines take the GPU's path on the CPU; see lab/gpu_path."""
    from lab.gpu_path.plugin import environment

    changes = dict(environment(folder))
    added = {key: value for key, value in changes.items() if os.environ.get(key) != value}
    # One thread that the system may move: cores that are busy already are no good to be bound to.
    return {**added, "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


def about_run(args: argparse.Namespace, command: str) -> dict[str, Any]:
    """Where the numbers come from."""
    import torch

    about = provenance(command, ROOT)
    return {
        "kind": REHEARSAL if args.rehearse else "GPU",
        "rehearsal": args.rehearse,
        "device": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu",
        "commit": args.commit or about["commit"],
        "versions": about["versions"],
    }
