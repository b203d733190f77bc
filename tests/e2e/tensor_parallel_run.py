"""Run by test_tensor_parallel.py in a process of its own: prints tokens per policy as JSON.

python tensor_parallel_run.py MODEL NUM_RANKS
"""

import json
import sys

from vllm import LLM, SamplingParams

from vllm_kvcompress.evaluation.tasks.needle import make_samples

POLICIES = ("windowkv", "snapkv", "keydiff", "random", "tova", "criticalkv", "h2o", "adakv")
BOTH = {"trigger": "both", "interval": 16, "budget": {"tokens": 200}, "layer_groups": {"count": 4}}


def main() -> None:
    """Two prompts under every policy."""
    llm = LLM(
        sys.argv[1],
        dtype="float32",
        enforce_eager=True,
        max_model_len=4096,
        kv_cache_memory_bytes=64 << 20,
        max_num_seqs=8,
        seed=0,
        tensor_parallel_size=int(sys.argv[2]),
        additional_config={"kv_compression": {"preset": "windowkv", **BOTH}},
        disable_log_stats=False,  # counts take their way to Prometheus, as in a server
    )
    prompts = [s.prompt for s in make_samples(2, 1500, llm.get_tokenizer().encode, seed=11)]
    tokens = {}
    for policy in POLICIES:
        # The server's own setting also compresses while decoding: every 16 tokens.
        extra = {"kv_compression": policy} if policy != POLICIES[0] else {}
        params = SamplingParams(
            temperature=0,
            max_tokens=12 if extra else 40,
            ignore_eos=True,
            extra_args=extra or None,
        )
        tokens[policy] = [list(o.outputs[0].token_ids) for o in llm.generate(prompts, params)]
    compressed = {
        metric.labels["policy"]: metric.value
        for metric in llm.get_metrics()
        if metric.name == "vllm:kv_compression_requests"
    }
    sys.stdout.write(json.dumps({"tokens": tokens, "compressed": compressed}) + "\n")


if __name__ == "__main__":
    main()
