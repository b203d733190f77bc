"""Long prompts through one engine in this process, their KV cache compressed.

    python examples/offline.py            # the small model beside this file
    python examples/offline.py MODEL      # any model that vLLM finds

The plugin needs no import: vLLM finds what is installed by its entry points.
"""

import sys
from pathlib import Path

from vllm import LLM, SamplingParams

HINT = (
    "Some special magic numbers are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the numbers afterwards."
)
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
QUESTION = (
    "What is the special magic number for {key} mentioned in the provided text? "
    "The special magic number for {key} mentioned in the provided text is"
)


def make_prompt(key: str, number: int) -> str:
    """A text of about 1,300 tokens with one number in it, and a question about the number."""
    lines = [f"Notes about {key}.", *[FILLER] * 48]
    lines.insert(20, f"One of the special magic numbers for {key} is: {number}.")
    return "\n".join([HINT, *lines, QUESTION.format(key=key)])


def main(model: str) -> None:
    """Ask three questions and print what the engine counted."""
    llm = LLM(
        model,
        max_model_len=2048,
        kv_cache_memory_bytes=2**28,
        enforce_eager=True,  # starts sooner; leave it out where speed matters
        disable_log_stats=False,  # for get_metrics below
        # The engine's setting: a preset, and fields laid over it.
        additional_config={"kv_compression": {"preset": "auto", "budget": {"ratio": 0.25}}},
    )
    # What one request wants for itself stands in its extra_args.
    requests = {
        "a quarter kept": (make_prompt("brave-otter", 4182907), {}),
        "12 % kept": (make_prompt("calm-heron", 7305514), {"kv_budget_ratio": 0.12}),
        "all kept": (make_prompt("quick-badger", 2960183), {"kv_compression": "none"}),
    }
    prompts = [prompt for prompt, _ in requests.values()]
    params = [
        SamplingParams(temperature=0, max_tokens=10, extra_args=extra)
        for _, extra in requests.values()
    ]
    for name, output in zip(requests, llm.generate(prompts, params), strict=True):
        print(f"{name}: {output.outputs[0].text.strip()}")

    counted = {"compressed": 0, "served uncompressed": 0, "tokens evicted": 0}
    families = {
        "vllm:kv_compression_requests": "compressed",
        "vllm:kv_compression_uncompressed_requests": "served uncompressed",
        "vllm:kv_compression_tokens_evicted": "tokens evicted",
    }
    for metric in llm.get_metrics():
        if metric.name in families:
            counted[families[metric.name]] += metric.value
    print(", ".join(f"{name}: {value}" for name, value in counted.items()))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else str(Path(__file__).parent / "probe-model"))
