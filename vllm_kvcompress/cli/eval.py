"""``kvcompress eval``: answers under compressed caches beside answers from the whole cache.

torch, transformers and vLLM are imported when the command runs, not with this file.
"""

import argparse
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

from vllm_kvcompress.cli.common import at_least, complain, make_console, say, share
from vllm_kvcompress.cli.measuring import list_of, names, prompter_of
from vllm_kvcompress.errors import ConfigError
from vllm_kvcompress.evaluation.provenance import command_line, versions
from vllm_kvcompress.lengths.sizing import parse_size

PROTOCOLS = ("visible", "hidden")
RUNNERS = ("replay", "engine")


def add_eval_options(option: Callable[..., Any]) -> None:
    """Options of the command."""
    folder = "local folder of a Hugging Face model; behind --url its tokenizer is enough"
    option("--model", required=True, metavar="DIR", type=Path, help=folder)
    known = "presets or YAML files, with commas; the whole cache (none) is always measured"
    option("--policies", default=["windowkv"], metavar="LIST", type=names, help=known)
    ratios = "shares of the prompt to keep (default 0.5,0.25,0.12,0.06)"
    option(
        "--budgets", default=[0.5, 0.25, 0.12, 0.06], metavar="LIST", type=list_of(share),
        help=ratios,
    )  # fmt: skip
    tasks = (
        "niah (one needle), ruler (all families of RULER, or one of them by its name such as "
        "ruler_vt), longbench:DIR, text:FILE[:FILE...] (default niah)"
    )
    option("--tasks", default=["niah"], metavar="LIST", type=names, help=tasks)
    lengths = "tokens of generated prompts (default 1500)"
    option("--lengths", default=[1500], metavar="LIST", type=list_of(at_least(64)), help=lengths)
    number: dict[str, Any] = {"metavar": "N", "type": at_least(1)}
    option("--samples", default=20, **number, help="per task and length (default %(default)s)")
    option("--depths", default=5, **number, help="places of a needle (default %(default)s)")
    predicted = "tokens of own texts that are predicted (default %(default)s; rkv needs 130)"
    option("--continuation", default=128, metavar="N", type=at_least(2), help=predicted)
    option("--seed", default=0, metavar="N", type=at_least(0), help="of the samples (default 0)")
    hidden = "is the question compressed with the text (visible), or asked later (hidden)?"
    option("--protocol", default="visible", choices=[*PROTOCOLS, "both"], help=hidden)
    runner = "transformers and our compactor (replay), or vLLM in this process (engine)"
    option("--runner", default="replay", choices=RUNNERS, help=runner)
    option("--url", metavar="URL", help="ask a running server with OpenAI's API instead")
    option("--parallel", default=4, **number, help="requests at once of --url (default 4)")
    option("--device", default="cpu", help="of --runner replay (default %(default)s)")
    memory = "of --runner engine for its cache (default %(default)s)"
    option("--kv-cache-memory", default="2GiB", metavar="SIZE", help=memory)
    option("--block-size", default=32, **number, help="as the server's (default %(default)s)")
    option("--no-chat", action="store_true", help="leave the model's chat template out")
    out = "folder of the results; what it holds of the same run is not measured again"
    option("--out", required=True, metavar="DIR", type=Path, help=out)


def run_eval(args: argparse.Namespace) -> int:
    """Measure, and write the report of all that is in the folder."""
    from vllm_kvcompress.evaluation.quality.plan import make_plan
    from vllm_kvcompress.evaluation.quality.records import RecordFolder
    from vllm_kvcompress.evaluation.quality.report import write_report
    from vllm_kvcompress.evaluation.quality.run import Stopped
    from vllm_kvcompress.evaluation.quality.variants import make_variants

    if args.url:
        variants = _server_variants(args)
    else:
        is_long = any(task.startswith(("text:", "longbench:")) for task in args.tasks)
        is_long &= args.runner == "replay"
        variants = make_variants(args.policies, args.budgets, is_long)
    protocols = PROTOCOLS if args.protocol == "both" else (args.protocol,)
    if "hidden" in protocols and (args.url or args.runner == "engine"):
        raise ConfigError(
            "--protocol: a server compresses whole prompts; allowed is visible, or --runner replay."
        )
    prompter = prompter_of(args.model, not args.no_chat)
    planned = make_plan(args.tasks, _task_options(args), prompter)
    folder = RecordFolder(args.out)
    known = folder.start(_asked(args), {"command": command_line(), **versions()})
    status = 0
    with _runner(args, prompter) as runner:
        try:
            num_failures = _measure(args, runner, planned, variants, protocols, folder, known)
        except (Stopped, KeyboardInterrupt) as stop:
            why = str(stop) or "interrupted."
            complain("error", f"{why} What was measured is kept: the same command goes on.")
            num_failures, status = 0, 1
        served_whole = runner.uncompressed()
    for reason, count in sorted(served_whole.items()):
        complain(
            "warning",
            f"{count} requests were served uncompressed ({reason}); their answers say nothing "
            "about a policy.",
        )
    if num_failures:
        where = args.out / "failures.jsonl"
        samples = "1 sample" if num_failures == 1 else f"{num_failures} samples"
        complain("warning", f"{samples} could not be measured: see {where}.")
    if not any(args.out.glob("records.jsonl")):
        return 1
    say(f"{write_report(args.out)}")
    return status


def _measure(
    args: argparse.Namespace,
    runner: Any,
    planned: Sequence[Any],
    variants: Sequence[Any],
    protocols: Sequence[str],
    folder: Any,
    known: Sequence[Any],
) -> int:
    from vllm_kvcompress.evaluation.quality.run import run

    groups = [list(variants)]
    if args.runner == "engine" and not args.url:
        # One engine after the other: a policy's samples are all asked before the next starts.
        policies = dict.fromkeys(each.policy for each in variants)
        groups = [[v for v in variants if v.policy == policy] for policy in policies]
    num_failures = 0
    for group in groups:
        title = "samples" if len(groups) == 1 else group[0].label

        def track(todo: Sequence[Any], title: str = title) -> Iterable[Any]:
            return _track(todo, title)

        found = run(runner, planned, group, protocols, folder, known, track)
        num_failures += found.num_failures
    return num_failures


def _track(todo: Sequence[Any], title: str) -> Iterable[Any]:
    from rich.progress import track

    return track(todo, title, console=make_console(stderr=True))


def _server_variants(args: argparse.Namespace) -> list[Any]:
    from vllm_kvcompress.config.reading import preset_names
    from vllm_kvcompress.evaluation.quality.url_runner import SERVER
    from vllm_kvcompress.evaluation.quality.variants import Variant, make_variants

    named = [name for name in args.policies if name != SERVER]
    unknown = set(named) - {"none", *preset_names()}
    if unknown:
        raise ConfigError(
            f"--policies: behind --url allowed are none, {SERVER} (as it was started) and presets, "
            f"not {sorted(unknown)[0]}."
        )
    if named == [] and args.policies:
        return [Variant(SERVER)]  # any server, without options of ours
    found = make_variants(named, args.budgets)
    return [*found, Variant(SERVER)] if SERVER in args.policies else found


def _runner(args: argparse.Namespace, prompter: Any) -> Any:
    """A context manager around the runner."""
    if args.url:
        from vllm_kvcompress.evaluation.quality.url_runner import UrlRunner

        return nullcontext(UrlRunner(args.url, prompter, args.parallel))
    if args.runner == "engine":
        from vllm_kvcompress.evaluation.quality.engine_runner import EngineRunner

        options = {
            "max_model_len": None,  # the model's, in the model's dtype, as `vllm serve` has it
            "dtype": "auto",
            "block_size": args.block_size,
            "kv_cache_memory_bytes": parse_size(args.kv_cache_memory),
        }
        return closing(EngineRunner(args.model, prompter, **options))
    import torch

    from vllm_kvcompress.evaluation.quality.replay_runner import ReplayRunner

    if "OMP_NUM_THREADS" not in os.environ and args.device == "cpu":
        torch.set_num_threads(1)  # small steps: threads wait longer than they compute
    return nullcontext(ReplayRunner(args.model, prompter, args.block_size, args.device))


def _task_options(args: argparse.Namespace) -> Any:
    from vllm_kvcompress.evaluation.quality.plan import TaskOptions

    return TaskOptions(tuple(args.lengths), args.samples, args.depths, args.continuation, args.seed)


def _asked(args: argparse.Namespace) -> dict[str, Any]:
    """What a record's value depends on. More samples, policies, tasks or lengths may be added."""
    return {
        "model": args.model.name,
        "runner": "url" if args.url else args.runner,
        "depths": args.depths,
        "continuation": args.continuation,
        "seed": args.seed,
        "block_size": args.block_size,
        "chat": not args.no_chat,
    }
