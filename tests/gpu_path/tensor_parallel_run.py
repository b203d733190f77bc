"""Run by test_tensor_parallel.py in a process of its own: prints tokens and launches as JSON.

python tensor_parallel_run.py MODEL NUM_RANKS
"""

import json
import sys
from collections import Counter
from typing import Any

from vllm import LLM, SamplingParams

from vllm_kvcompress.evaluation.tasks.needle import make_samples

SETTING = {
    "preset": "windowkv",  # heads agree on windows, so ranks have to
    "budget": {"tokens": 96, "floor": 1},
    "layer_groups": {"count": 2},
    "trigger": "both",
    "interval": 16,
    "min_prompt_len": 64,
}
PROMPT_LENS, NUM_TOKENS = (250, 180), 20

launches: Counter[str] = Counter()


def begin(worker: Any) -> str:
    """In a rank: count launches of our kernels from now on; return how caches are laid out."""
    from triton.runtime.interpreter import InterpretedFunction

    run = InterpretedFunction.run

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.fn.__module__.startswith("vllm_kvcompress.kernels."):
            launches[self.fn.__name__] += 1
        return run(self, *args, **kwargs)

    InterpretedFunction.run = counted
    return type(worker.model_runner.compactor.layers[0].layout).__name__


def end(worker: Any) -> dict[str, int]:
    """In a rank: what was counted."""
    return dict(launches)


def main() -> None:
    """Two prompts of unequal length, compacted at their ends and while they decode."""
    model, num_ranks = sys.argv[1:]
    llm = LLM(
        model,
        dtype="float32",
        enforce_eager=True,
        max_model_len=1024,
        kv_cache_memory_bytes=24 << 20,
        max_num_seqs=2,
        block_size=32,
        seed=0,
        tensor_parallel_size=int(num_ranks),
        additional_config={"kv_compression": SETTING},
    )
    layouts = llm.collective_rpc(begin)
    encode = llm.get_tokenizer().encode
    prompts = [make_samples(1, length, encode, seed=11)[0].prompt for length in PROMPT_LENS]
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    found = {"tokens": tokens, "layouts": layouts, "launches": llm.collective_rpc(end)}
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    from tests.gpu_path import tensor_parallel_run  # by its name, so that ranks can import it

    tensor_parallel_run.main()
