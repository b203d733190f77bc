"""Run by test_latent_ranks.py in a process of its own: prints tokens per policy as JSON.

python latent_ranks_run.py MODEL NUM_RANKS
"""

import json
import sys

from vllm import LLM, SamplingParams

from lab.latent_engine import ENGINE, as_on_a_gpu
from lab.random_models import distinct_tokens

RATIO = 0.25
POLICIES = ("snapkv", "random")
NUM_TOKENS, PROMPTS = 4, (distinct_tokens(600),)


def main() -> None:
    """The prompts under every policy."""
    model, num_ranks = sys.argv[1:]
    with as_on_a_gpu():
        llm = LLM(
            model,
            dtype="float32",
            enforce_eager=True,
            skip_tokenizer_init=True,
            max_model_len=1024,
            kv_cache_memory_bytes=64 << 20,
            max_num_seqs=8,
            seed=0,
            tensor_parallel_size=int(num_ranks),
            additional_config={
                "kv_compression": {"preset": POLICIES[0], "budget": {"ratio": RATIO}}
            },
            **ENGINE,
        )
    tokens = {}
    for policy in POLICIES:
        extra = {"kv_compression": policy, "kv_budget_ratio": RATIO}
        params = SamplingParams(
            temperature=0,
            max_tokens=NUM_TOKENS,
            ignore_eos=True,
            extra_args=extra if policy != POLICIES[0] else None,
        )
        given = [{"prompt_token_ids": list(prompt)} for prompt in PROMPTS]
        tokens[policy] = [list(o.outputs[0].token_ids) for o in llm.generate(given, params)]
    sys.stdout.write(json.dumps({"tokens": tokens}) + "\n")


if __name__ == "__main__":
    main()
