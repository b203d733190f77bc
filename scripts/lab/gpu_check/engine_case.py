"""One engine in a process of its own: a few requests, their tokens, what was counted.

python -m lab.gpu_check.engine_case CASE OUT.json --model FOLDER
"""

import argparse
import json
import os
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab.latent_engine import ENGINE as LATENT_ON_CPU
from lab.random_models import distinct_tokens
from lab.torch_rotary import rotary_in_torch

BLOCK = 32
COUNTED = "vllm:kv_compression_"
ACCEPTED = "vllm:spec_decode_num_accepted_tokens"


PROBE = "probe"
MODELS = {PROBE: "", "windowed": "gemma3", "latent": "deepseek_v3", "fp8": "llama",
          "recurrent": "granite4"}  # fmt: skip
"""By the kind of cache: the random model that has it (`lab.random_models`, `lab.random_hybrids`).
They have no tokenizer."""


@dataclass(frozen=True)
class Case:
    """An engine's setting, how it runs its steps, and whose cache it has: one of `MODELS`."""

    kind: str
    eager: bool = True
    asynchronous: bool = False
    model: str = PROBE


CASES = {
    "stock": Case("stock"),
    "evict": Case("evict"),
    "draft": Case("draft"),
    "codes": Case("codes"),
    "evict-graphs-async": Case("evict", eager=False, asynchronous=True),
    "draft-graphs-async": Case("draft", eager=False, asynchronous=True),
    "codes-graphs-async": Case("codes", eager=False, asynchronous=True),
    "stock-graphs-async": Case("stock", eager=False, asynchronous=True),
    "evict-async": Case("evict", asynchronous=True),
    "evict-graphs": Case("evict", eager=False),
    "draft-graphs": Case("draft", eager=False),
    "codes-graphs": Case("codes", eager=False),
}
"""In order of worth. The plain ones are eager and synchronous: what others are held against."""


MODEL_CASES = {
    f"{model}-{name}": Case(kind, name != "evict-graphs-async", name == "evict-graphs-async", model)
    for model in list(MODELS)[1:]
    for name, kind in (("stock", "stock"), ("evict", "evict"), ("evict-graphs-async", "evict"))
}
"""Models whose caches are not all keys and values in the model's own type."""


@dataclass(frozen=True)
class Sizes:
    """Tokens of prompts, of what survives, of an interval and of answers; `pool` in bytes."""

    prompt: int
    budget: int
    interval: int
    answer: int
    pool: int


SMALL = Sizes(prompt=170, budget=64, interval=16, answer=20, pool=16 << 20)
FULL = Sizes(prompt=1500, budget=256, interval=32, answer=80, pool=1 << 30)


def cache_options(model: str, rehearse: bool) -> dict[str, Any]:
    """Arguments of an engine over such a cache."""
    found: dict[str, Any] = {} if model == PROBE else {"skip_tokenizer_init": True}
    if model == "fp8":
        found["kv_cache_dtype"] = "fp8"
    if model == "latent" and rehearse:  # computes in float32 on any CPU, in blocks of 16 alone
        found |= LATENT_ON_CPU
    return found


def prompts_of(model: str, llm: Any, length: int) -> list[list[int]]:
    """Four prompts of about that many tokens."""
    from vllm_kvcompress.evaluation.tasks.needle import make_samples

    if model != PROBE:
        return [distinct_tokens(length, seed) for seed in range(4)]
    encode = llm.get_tokenizer().encode
    return [encode(each.prompt) for each in make_samples(4, length, encode, seed=11)]


def setting_of(kind: str, sizes: Sizes) -> dict[str, Any] | None:
    """``additional_config["kv_compression"]`` of a kind of engine; None is stock vLLM."""
    common: dict[str, Any] = {
        "budget": {"tokens": sizes.budget, "floor": 1},
        "layer_groups": {"count": 2},
        "min_prompt_len": 64,
    }
    if kind == "stock":
        return None
    if kind == "evict":
        decoding = {"observation_window": 16, "trigger": "both", "interval": sizes.interval}
        return {"preset": "snapkv", **common, **decoding}
    if kind == "draft":
        drafts = {"tokens": 4, "refresh_every": sizes.interval}
        return {"preset": "snapkv", **common, "mode": "draft", "draft": drafts}
    assert kind == "codes", kind
    return {
        "preset": "spindlekv",
        **common,
        "budget": {"ratio": 0.6, "floor": 1},
        "layer_budget": {"shape": "uniform"},
        "codebook": {"shallow": 0.5, "entries": 0.3},
        "interval": sizes.interval,
    }


def requests_of(kind: str, sizes: Sizes) -> dict[str, tuple[int, dict[str, Any] | None]]:
    """Number of a prompt, and ``vllm_xargs``, by label. Stock vLLM gets no xargs."""
    asked: dict[str, tuple[int, dict[str, Any] | None]] = {
        "none": (0, {"kv_compression": "none"}),
        "ratio 1.0": (1, {"kv_compression": "snapkv", "kv_budget_ratio": 1.0}),
        "server": (2, None),
        "tighter": (3, {"kv_budget_tokens": sizes.budget // 2}),
    }
    return {label: (n, None if kind == "stock" else xargs) for label, (n, xargs) in asked.items()}


def run(args: argparse.Namespace, stack: ExitStack) -> dict[str, Any]:
    """Open the engine, run every request alone and then all together; a rehearsal not alone."""
    from vllm import LLM, SamplingParams

    case = (CASES | MODEL_CASES)[args.case]
    sizes = SMALL if args.rehearse else FULL
    if case.model == "recurrent" and args.rehearse:  # LFM2
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # where the patch is
        stack.enter_context(rotary_in_torch())
    setting = setting_of(case.kind, sizes)
    options: dict[str, Any] = {
        "dtype": args.dtype,
        "enforce_eager": case.eager or args.rehearse,
        "async_scheduling": case.asynchronous and not args.rehearse,
        "max_model_len": 4096 if not args.rehearse else 1024,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 512 if not args.rehearse else 256,
        "block_size": BLOCK,
        "kv_cache_memory_bytes": sizes.pool,
        "gpu_memory_utilization": 0.2,
        "seed": 0,
        "disable_log_stats": False,  # counts go to the metrics
        **cache_options(case.model, args.rehearse),
        **args.engine_args,
    }
    if case.asynchronous and case.kind == "draft" and not args.rehearse:
        options.pop("async_scheduling")  # with drafts it is for vLLM to say
    if setting is not None:
        options["additional_config"] = {"kv_compression": setting}
    llm = LLM(args.model, **options)
    prompts = prompts_of(case.model, llm, sizes.prompt)
    asked = requests_of(case.kind, sizes)
    tokens: dict[str, list[int]] = {}
    alone = [] if args.rehearse else [[label] for label in asked]
    for suffix, batches in [("", alone), (" together", [list(asked)])]:
        for some in batches:
            batch = [{"prompt_token_ids": prompts[asked[label][0]]} for label in some]
            params = [
                SamplingParams(
                    temperature=0, max_tokens=sizes.answer, ignore_eos=True,
                    detokenize=case.model == PROBE, extra_args=asked[label][1],
                )
                for label in some
            ]  # fmt: skip
            outputs = llm.generate(batch, params, use_tqdm=False)
            for label, output in zip(some, outputs, strict=True):
                tokens[label + suffix] = list(output.outputs[0].token_ids)
    counts: dict[str, float] = {}
    for metric in llm.get_metrics():
        value = getattr(metric, "value", None)
        if value and metric.name.startswith((COUNTED, ACCEPTED)):
            labels_of = {
                k: v for k, v in metric.labels.items() if k in ("policy", "trigger", "kind")
            }
            counts["/".join([metric.name.split(":")[1], *labels_of.values()])] = value
    config = llm.llm_engine.vllm_config
    return {
        "case": args.case,
        "kind": case.kind,
        "tokens": tokens,
        "counts": counts,
        "asynchronous": bool(config.scheduler_config.async_scheduling),
        "cudagraphs": str(config.compilation_config.cudagraph_mode),
        "backend": str(config.attention_config.backend),
    }


def main() -> int:
    """Run and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("case", choices=list(CASES | MODEL_CASES))
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--engine-args", type=json.loads, default={})
    parser.add_argument("--rehearse", action="store_true")
    args = parser.parse_args()
    with ExitStack() as stack:
        found = run(args, stack)
    args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
