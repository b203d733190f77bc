"""Engines held against each other, or run under vLLM's check for hidden waits.

    python -m lab.gpu_check.engines equality OUT --model FOLDER
    python -m lab.gpu_check.engines models OUT
    python -m lab.gpu_check.engines sync OUT --model FOLDER

Each engine is a process of its own, with a time limit; one that fails does not hide the others.
"""

import argparse
import json
import signal
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab.gpu_check.engine_case import CASES, MODEL_CASES, MODELS, PROBE
from lab.gpu_check.runner import PASSED, TIMED_OUT, run_limited, write_json

LIMIT = 300.0
"""Seconds for one engine."""

FIRST = 8
"""Tokens that carry the answer of a prompt of the probe model."""

SHARE = 0.9
"""Of the first tokens that must agree where numbers are rounded to 16 bits."""

UNCHANGED = ("none", "ratio 1.0")
SYNC_CASES = (
    "evict-graphs-async",
    "draft-graphs-async",
    "codes-graphs-async",
    "stock-graphs-async",
)

Tokens = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class Comparison:
    """Requests of two engines that should say the same."""

    title: str
    case: str
    other: str
    labels: tuple[str, ...] | None = None

    def judge(
        self, found: Mapping[str, dict[str, Any]], failed: Collection[str], exact: bool
    ) -> dict[str, Any]:
        """Agreement of the two, as plain values; ``ok`` is None where one has not run yet."""
        about = {"comparison": self.title, "case": self.case, "other": self.other}
        pair = {self.case, self.other}
        if not pair <= found.keys():
            has_failed = not pair.isdisjoint(failed)
            why = "an engine has failed" if has_failed else "not run"
            return {**about, "ok": False if has_failed else None, "why": why}
        one, other = found[self.case]["tokens"], found[self.other]["tokens"]
        wanted = [
            label
            for label in one
            if self.labels is None or label.removesuffix(" together") in self.labels
        ]
        return {**about, **agreement([(one[label], other[label]) for label in wanted], exact)}


def agreement(pairs: Sequence[tuple[Sequence[int], Sequence[int]]], exact: bool) -> dict[str, Any]:
    """How many tokens of pairs of answers agree; ok if all, or enough of the first ones."""
    same = [[a == b for a, b in zip(one, other, strict=True)] for one, other in pairs]
    total, equal = sum(map(len, same)), sum(map(sum, same))
    first = [each for row in same for each in row[:FIRST]]
    share = sum(first) / len(first)
    ok = equal == total if exact else share >= SHARE
    return {"ok": ok, "tokens": total, "equal": equal, "first_tokens_share": round(share, 4)}


def comparisons(rehearse: bool) -> list[Comparison]:
    """All that a run should hold; a rehearsal has neither graphs nor asynchronous steps."""
    found = [
        Comparison("nothing evicted is stock", "evict", "stock", UNCHANGED),
        Comparison("drafts say what stock says", "draft", "stock"),
        Comparison("nothing coded is stock", "codes", "stock", UNCHANGED),
    ]
    if rehearse:
        return found
    for case in CASES:
        kind = case.split("-")[0]
        if case != kind:
            found.append(Comparison(f"{case} is {kind}, eager", case, kind))
    return found


def run_case(
    name: str, args: argparse.Namespace, environment: Mapping[str, str]
) -> dict[str, Any] | str:
    """What an engine found, or why it did not."""
    out, log = args.out / f"{name}.json", args.out / f"{name}.txt"
    module = "lab.gpu_check.engine_case"
    model = (CASES | MODEL_CASES)[name].model
    folder = args.model if model == PROBE else str(args.out / "models" / model)
    command = [sys.executable, "-m", module, name, str(out), "--model", folder]
    command += ["--dtype", args.dtype, "--engine-args", json.dumps(args.engine_args)]
    command += ["--rehearse"] * args.rehearse
    status, words = run_limited(command, log, LIMIT, environment)
    if status == TIMED_OUT:
        return words
    if status != PASSED:
        return reason(log.read_text(encoding="utf-8", errors="replace"))
    return json.loads(out.read_text(encoding="utf-8"))


def reason(log: str) -> str:
    """The line of a log that says why an engine died, with our file where one is named."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line or "sync detected" in line]
    ours = [line for line in lines if "vllm_kvcompress/" in line and 'File "' in line]
    place = ours[-1].split("vllm_kvcompress/")[-1] if ours else ""
    said = (errors or lines or ["no output"])[0][-240:]
    return f"{said} (at {place})" if place else said


def equality(args: argparse.Namespace) -> bool:
    """Engines over the probe model."""
    return compare(args, comparisons(args.rehearse))


def model_comparisons(model: str, rehearse: bool) -> list[Comparison]:
    """What should hold of one kind of cache."""
    evict, title = f"{model}-evict", f"{model}: nothing evicted is stock"
    found = [Comparison(title, evict, f"{model}-stock", UNCHANGED)]
    if not rehearse:
        title = f"{model}: with graphs, asynchronous, is eager"
        found.append(Comparison(title, f"{evict}-graphs-async", evict))
    return found


def cannot_run(model: str) -> str | None:
    """Why this machine runs no engine over such a cache, of vLLM's own either."""
    import torch

    if model != "fp8":
        return None
    if not torch.cuda.is_available():
        if torch.cpu._is_avx512_supported():
            return None
        return "vLLM's attention on a CPU reads 8 bits with AVX-512, which this one has not"
    if torch.cuda.get_device_capability() >= (8, 9):
        return None
    return "vLLM's attention reads 8 bits on GPUs of capability 8.9 and later"


def models(args: argparse.Namespace) -> bool:
    """Engines over caches of other kinds, each over a random model that is written first."""
    from lab.random_hybrids import write_random_hybrid
    from lab.random_models import MODELS as PLAIN
    from lab.random_models import write_random_model

    skipped: dict[str, str] = {}
    wanted: list[Comparison] = []
    for model, name in list(MODELS.items())[1:]:
        if args.rehearse and name == "granite4":
            name = "lfm2"  # vLLM's code for Mamba 2 fails on a CPU: tests/e2e/test_linear_layers.py
        why = cannot_run(model)
        if why is not None:
            skipped[model] = why
            continue
        write = write_random_model if name in PLAIN else write_random_hybrid
        write(args.out / "models" / model, name)
        wanted += model_comparisons(model, args.rehearse)
    return compare(args, wanted, skipped)


def compare(
    args: argparse.Namespace, wanted: Sequence[Comparison], skipped: Mapping[str, str] | None = None
) -> bool:
    """Run all engines, compare, write after each."""
    exact = args.dtype == "float32"
    known = CASES | MODEL_CASES
    cases = [case for case in known if any(case in (c.case, c.other) for c in wanted)]
    found: dict[str, dict[str, Any]] = {}
    failed: dict[str, str] = {}
    judged: list[dict[str, Any]] = []
    for name in cases:
        result = run_case(name, args, {})
        if isinstance(result, str):
            failed[name] = result
            print(f"{name}: {result}", flush=True)
        else:
            found[name] = result
            print(f"{name}: ran; {result['counts']}", flush=True)
        judged = [each.judge(found, failed, exact) for each in wanted]
        idle = [n for n in found if found[n]["kind"] != "stock" and not compressed(found[n])]
        write_json(
            args.out / "equality.json",
            {
                "dtype": args.dtype,
                "comparisons": judged,
                "failed": failed,
                "idle": idle,
                "skipped": dict(skipped or {}),
            },
        )
    for each in judged:
        print(each, flush=True)
    return not failed and not idle and all(each["ok"] for each in judged)


def compressed(result: Mapping[str, Any]) -> bool:
    """Whether an engine compressed anything: one that did nothing would be equal too."""
    wanted = {"draft": "kv_compression_views", "codes": "kv_compression_codebook_vectors"}
    name = wanted.get(result["kind"], "kv_compression_requests")
    return any(key.startswith(name) for key in result["counts"])


def sync(args: argparse.Namespace) -> bool:
    """Run graphs and asynchronous steps with VLLM_GPU_SYNC_CHECK=error."""
    found: dict[str, str] = {}
    for name in SYNC_CASES[:1] if args.rehearse else SYNC_CASES:
        result = run_case(name, args, {"VLLM_GPU_SYNC_CHECK": "error"})
        found[name] = result if isinstance(result, str) else "ok"
        print(f"{name}: {found[name]}", flush=True)
        write_json(args.out / "sync.json", {"dtype": args.dtype, "cases": found})
    return all(each == "ok" for each in found.values())


def main() -> int:
    """1 if anything differs or has failed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("what", choices=["equality", "models", "sync"])
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", help="folder of the probe model; models makes its own")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--engine-args", type=json.loads, default={})
    parser.add_argument("--rehearse", action="store_true")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the engine of the moment ends too
    if args.what != "models" and args.model is None:
        parser.error("--model is missing")
    return 0 if {"equality": equality, "models": models, "sync": sync}[args.what](args) else 1


if __name__ == "__main__":
    sys.exit(main())
