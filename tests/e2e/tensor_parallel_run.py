"""Run by test_tensor_parallel.py in a process of its own: prints tokens per policy as JSON.

python tensor_parallel_run.py MODEL NUM_RANKS evict|draft|few|eight [ray]

With `ray`, vLLM's Ray executor has the ranks, on a cluster of this machine alone.
"""

import json
import sys
from datetime import timedelta
from typing import Any

from vllm import LLM, SamplingParams
from vllm.v1.engine.exceptions import EngineDeadError

from vllm_kvcompress.evaluation.tasks.needle import make_samples

BOTH = {"trigger": "both", "interval": 16, "budget": {"tokens": 200}, "layer_groups": {"count": 4}}
DRAFT = {
    "mode": "draft",
    "draft": {"tokens": 4, "refresh_every": 8},
    "budget": {"ratio": 0.12},
    "layer_groups": {"count": 2},
}
# Prompts alone: a replay, which the tokens are held against, compacts nothing else.
EIGHT = {
    "layer_groups": {"count": 4},
    "budget": {"ratio": 0.06, "floor": 1},
    "min_prompt_len": 128,
}

# Per mode: the server's setting beside its preset, policies (the server's own first), tokens of a
# prompt and of an answer under the server's policy and under the others.
MODES: dict[str, tuple[dict[str, Any], tuple[str, ...], int, int, int]] = {
    "evict": (
        BOTH,  # compresses while decoding too, every 16 tokens
        ("windowkv", "snapkv", "keydiff", "random", "tova", "criticalkv", "h2o", "adakv")
        + ("spindlekv",),  # each rank codes its own heads' keys and values
        1500,
        40,
        12,
    ),
    # Views of windowkv_qwen2.5 are blocks of the request's own, snapkv's are copies. The small
    # budget keeps drafts from being right by themselves: what is accepted tells views apart.
    "draft": (DRAFT, ("snapkv", "windowkv_qwen2.5"), 700, 24, 24),
    "few": (BOTH, ("snapkv", "keydiff"), 700, 24, 8),
    "eight": (EIGHT, ("pyramidkv", "keydiff"), 700, 24, 24),
}
COUNTED = (
    "vllm:kv_compression_requests",
    "vllm:kv_compression_views",
    "vllm:kv_compression_failures",
    "vllm:kv_compression_codebook_vectors",
    "vllm:spec_decode_num_draft_tokens",
    "vllm:spec_decode_num_accepted_tokens",
)
LABELS = ("policy", "trigger", "kind", "reason")


def main() -> None:
    """Two prompts under every policy."""
    model, num_ranks, mode, *executor = sys.argv[1:]
    options: dict[str, Any] = {}
    if executor:
        import ray

        ray.init(num_cpus=2, num_gpus=2, include_dashboard=False)
        options["distributed_executor_backend"] = "ray"
    if mode == "eight":
        drafts = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4}
        options |= {"kv_cache_dtype": "fp8", "speculative_config": drafts}
    setting, policies, prompt_len, own_len, other_len = MODES[mode]
    llm = LLM(
        model,
        dtype="float32",
        enforce_eager=True,
        max_model_len=4096,
        kv_cache_memory_bytes=64 << 20,
        max_num_seqs=8,
        seed=0,
        tensor_parallel_size=int(num_ranks),
        additional_config={"kv_compression": {"preset": policies[0], **setting}},
        disable_log_stats=False,  # counts take their way to Prometheus, as in a server
        **options,
    )
    prompts = [s.prompt for s in make_samples(2, prompt_len, llm.get_tokenizer().encode, seed=11)]
    tokens = {}
    for policy in policies:
        extra = {"kv_compression": policy} if policy != policies[0] else {}
        params = SamplingParams(
            temperature=0,
            max_tokens=other_len if extra else own_len,
            ignore_eos=True,
            extra_args=extra or None,
        )
        tokens[policy] = [list(o.outputs[0].token_ids) for o in llm.generate(prompts, params)]
    found: dict[str, Any] = {"tokens": tokens, "counts": counted(llm)}
    if mode == "evict":
        found |= {"turns": two_turns(llm, prompts), "readers": readers(llm, *prompts)}
    if mode == "draft":
        found["failed"] = drafts_fail(llm, prompts)
        found["failures"] = counted(llm)["kv_compression_failures/drafting"]
    sys.stdout.write(json.dumps(found) + "\n")
    if mode == "draft" and int(num_ranks) > 1:
        drafts_fail_on_one(llm, prompts)


def counted(llm: LLM) -> dict[str, Any]:
    """Values of `COUNTED`, by name and labels."""
    counts: dict[str, Any] = {}
    for metric in llm.get_metrics():
        if metric.name in COUNTED:
            labels = {k: v for k, v in metric.labels.items() if k in LABELS}
            counts["/".join([metric.name.split(":")[1], *labels.values()])] = metric.value
    return counts


def let_drafts_fail(worker: Any, rank: int | None) -> None:
    """Once, in the third layer of a second draft step; on all ranks, or on one."""
    from vllm_kvcompress.worker import fault_report

    fault_report.PATIENCE = timedelta(seconds=4)
    speculator = worker.model_runner.speculator

    def raise_once(*_: Any) -> None:
        if speculator.num_steps == 1:  # once they are made it is 4, and before the first 0
            hook.remove()
            raise RuntimeError("Triton Error [CUDA]: out of resources")

    if rank in (None, worker.rank):
        hook = speculator.model.model.layers[2].mlp.register_forward_pre_hook(raise_once)


def drafts_fail(llm: LLM, prompts: list[str]) -> list[list[int]]:
    """Answers while drafting fails on all ranks alike, then those that draft again."""
    llm.collective_rpc(let_drafts_fail, args=(None,))
    params = SamplingParams(
        temperature=0, max_tokens=24, ignore_eos=True, extra_args={"kv_compression": "keydiff"}
    )
    return [list(o.outputs[0].token_ids) for o in llm.generate([*prompts, *prompts], params)]


def drafts_fail_on_one(llm: LLM, prompts: list[str]) -> None:
    """The other waits for its sums: the engine must end, and say why."""
    llm.collective_rpc(let_drafts_fail, args=(1,))
    try:
        llm.generate(prompts[:1], SamplingParams(temperature=0, max_tokens=24, ignore_eos=True))
    except EngineDeadError:
        sys.stdout.write("the engine has ended\n")


def two_turns(llm: LLM, prompts: list[str]) -> dict[str, list]:
    """By policy: of every chat's second turn, tokens that it took over, and what it says."""
    tokenize, found = llm.get_tokenizer().encode, {}
    for policy in ("windowkv", "snapkv"):
        texts = [tokenize(prompt) for prompt in prompts]
        for turn in range(2):
            params = [
                SamplingParams(
                    temperature=0,
                    max_tokens=12,
                    ignore_eos=True,
                    extra_args={"kv_compression": policy, "kv_session": f"{policy} {chat}"},
                )
                for chat in range(len(texts))
            ]
            outputs = llm.generate([{"prompt_token_ids": text} for text in texts], params)
            answers = [list(each.outputs[0].token_ids) for each in outputs]
            more = tokenize(f"And then, in turn {turn}, the grass is green, and the sky is")
            texts = [[*text, *said, *more] for text, said in zip(texts, answers, strict=True)]
        found[policy] = [[o.num_cached_tokens, list(o.outputs[0].token_ids)] for o in outputs]
    return found


def readers(llm: LLM, text: str, prompt: str) -> dict[str, list]:
    """Questions over one text, and samples of one prompt: tokens that were cached, and answers."""
    tokenize = llm.get_tokenizer().encode
    shared, same = tokenize(text), tokenize(prompt)
    cases: dict[str, tuple[list[list[int]], dict[str, Any]]] = {
        "shared prefix": (
            [[*shared, *tokenize(f"Question {n}: what is the number?")] for n in range(3)],
            {"kv_compression": "shared_prefix", "kv_shared_prefix": len(shared)},
        ),
        "samples": ([same] * 3, {"kv_compression": "snapkv"}),
    }
    found = {}
    for name, (prompts, extra) in cases.items():
        params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, extra_args=extra)
        outputs = llm.generate([{"prompt_token_ids": each} for each in prompts], params)
        found[name] = [[o.num_cached_tokens, list(o.outputs[0].token_ids)] for o in outputs]
    name = "vllm:kv_compression_shared_prefix_requests"
    counted = [each for each in llm.get_metrics() if each.name == name]
    found["outcomes"] = [[each.labels["outcome"], each.value] for each in counted if each.value]
    return found


if __name__ == "__main__":
    main()
