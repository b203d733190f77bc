"""Write what kvpress answers on the needle task, as data that other engines are tested against.

Every prompt is prefilled whole (the question included) under ``with press(model)``, then 8 tokens
are decoded greedily on the compressed cache: Hugging Face transformers, CPU, float32. Positions
stay logical: the first decoded token has the position after the prompt's last, however few entries
the cache still holds. The first answer token is chosen by the prefill, which sees the full cache.

The JSON file holds

- ``versions``, ``settings``: what was run;
- ``samples``: per length and sample the prompt's SHA-256, depth, style, answer and token count
  (`make_samples` with the same settings gives the prompts themselves);
- ``results``: per length, policy and kept ratio the number right and all generated answers;
- ``kept_indices``: for the first samples at the smallest ratio, ``bitmaps[layer][kv_head]``: base64
  of one bit for each prompt position, lowest bit first (position p is bit ``p % 8`` of byte
  ``p // 8``), 1 = kept. To decode::

      bits = np.unpackbits(np.frombuffer(base64.b64decode(text), np.uint8), bitorder="little")
      positions = np.flatnonzero(bits)
"""

import argparse
import base64
import hashlib
import json
import logging
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from kvpress import KeyDiffPress, SnapKVPress, StreamingLLMPress
from kvpress.presses.scorer_press import ScorerPress
from kvpress.utils import compute_n_kept
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel
from transformers.utils import logging as transformers_logging

from lab.places import PROBE_MODEL, ROOT

sys.path.append(str(ROOT))  # kvpress's environment does not have this package

from vllm_kvcompress.evaluation.provenance import versions  # noqa: E402
from vllm_kvcompress.evaluation.tasks.needle import (  # noqa: E402
    NeedleSample,
    is_right,
    make_samples,
)

NUM_NEW_TOKENS = 8  # a space and seven digits
NUM_SAMPLES_WITH_INDICES = 4
POLICIES: dict[str, tuple[type[ScorerPress], dict[str, int]]] = {
    "snapkv": (SnapKVPress, {"window_size": 64, "kernel_size": 5}),
    "keydiff": (KeyDiffPress, {}),
    "streaming_llm": (StreamingLLMPress, {"n_sink": 4}),
}
Kept = dict[int, torch.Tensor]  # layer -> kept positions [num_kv_heads, num_kept], ascending


def make_press(policy: str, ratio: float, kept: Kept) -> ScorerPress | None:
    """Make the press of a policy, with every selection it makes written into `kept`."""
    if policy == "none":
        return None
    press_class, options = POLICIES[policy]
    press = press_class(compression_ratio=1 - ratio, **options)
    plain_score = press.score

    def recording_score(module: torch.nn.Module, *args: Any) -> torch.Tensor:
        scores = plain_score(module, *args)  # [1, num_kv_heads, num_tokens]
        # The same call on the same scores as in ScorerPress.compress, which comes right after.
        num_kept = compute_n_kept(scores.shape[-1], press.compression_ratio)
        kept[module.layer_idx] = scores.topk(num_kept, dim=-1).indices[0].sort(dim=-1).values
        return scores

    press.score = recording_score
    return press


@torch.inference_mode()
def generate(model: PreTrainedModel, prompt_ids: list[int], press: ScorerPress | None) -> list[int]:
    """Prefill under the press, then decode greedily at logical positions."""
    cache = DynamicCache(config=model.config)
    with press(model) if press is not None else nullcontext():
        logits = model(torch.tensor([prompt_ids]), past_key_values=cache, logits_to_keep=1).logits
    new_ids = [int(logits[0, -1].argmax())]
    for position in range(len(prompt_ids), len(prompt_ids) + NUM_NEW_TOKENS - 1):
        logits = model(
            torch.tensor([new_ids[-1:]]),
            past_key_values=cache,
            position_ids=torch.tensor([[position]]),
            cache_position=torch.tensor([position]),
        ).logits
        new_ids.append(int(logits[0, -1].argmax()))
    return new_ids


def encode_bitmap(positions: torch.Tensor, num_tokens: int) -> str:
    """Write a set of positions as the base64 bitmap of the module docstring."""
    bitmap = bytearray((num_tokens + 7) // 8)
    for position in positions.tolist():
        bitmap[position // 8] |= 1 << position % 8
    return base64.b64encode(bitmap).decode("ascii")


def describe_sample(sample: NeedleSample) -> dict[str, Any]:
    """Write down a sample without its prompt."""
    return {
        "sha256": hashlib.sha256(sample.prompt.encode()).hexdigest(),
        "depth": round(sample.depth, 6),
        "style": sample.style,
        "answer": sample.answer,
        "num_tokens": sample.num_tokens,
    }


def load_model(model_dir: Path) -> PreTrainedModel:
    """Load the model in float32 and make sure that its RoPE base was understood."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    config = json.loads((model_dir / "config.json").read_text())
    rope = config.get("rope_parameters") or config
    exponents = torch.arange(0, model.config.head_dim, 2) / model.config.head_dim
    expected = 1 / rope["rope_theta"] ** exponents
    # The older names of this setting differ, and a silent 10,000 would ruin every answer.
    if not torch.allclose(model.model.rotary_emb.inv_freq, expected):
        raise RuntimeError(f"this transformers does not read the RoPE base {rope['rope_theta']}")
    return model


def run_length(
    model: PreTrainedModel, tokenizer: Any, num_tokens: int, args: argparse.Namespace
) -> tuple[list[NeedleSample], list[dict[str, Any]], list[dict[str, Any]]]:
    """Run every policy on the samples of one length: samples, results, kept indices."""

    def tokenize(text: str) -> list[int]:
        return tokenizer(text)["input_ids"]

    samples = make_samples(args.num_samples, num_tokens, tokenize, args.seed)
    runs = [("none", 1.0), *((policy, ratio) for policy in POLICIES for ratio in args.ratios)]
    results, indices = [], []
    for policy, ratio in runs:
        row = {"length": num_tokens, "policy": policy, "ratio": ratio}
        answers, num_right = [], 0
        for number, sample in enumerate(samples):
            kept: Kept = {}
            press = make_press(policy, ratio, kept)
            new_ids = generate(model, tokenize(sample.prompt), press)
            answers.append(tokenizer.decode(new_ids, skip_special_tokens=True))
            num_right += is_right(answers[-1], sample.answer)
            if kept and ratio == min(args.ratios) and number < NUM_SAMPLES_WITH_INDICES:
                bitmaps = [
                    [encode_bitmap(head, sample.num_tokens) for head in kept[layer]]
                    for layer in sorted(kept)
                ]
                num_kept = kept[0].shape[-1]
                indices.append({**row, "sample": number, "num_kept": num_kept, "bitmaps": bitmaps})
        results.append({**row, "num_right": num_right, "answers": answers})
        print(f"{num_tokens} {policy} {ratio}: {num_right}/{len(samples)} right", flush=True)
    return samples, results, indices


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Run kvpress on the needle task.")
    parser.add_argument("--model", type=Path, default=PROBE_MODEL)
    parser.add_argument("--out", type=Path, default=ROOT / "tests/data/kvpress_needle.json")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2000, 4000], help="in tokens")
    parser.add_argument("--num-samples", type=int, default=40, help="per length")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.5, 0.12], help="kept part")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-threads", type=int, default=1)
    return parser.parse_args()


def main() -> None:
    """Run all lengths and write the JSON file."""
    args = parse_args()
    torch.set_num_threads(args.num_threads)
    transformers_logging.disable_progress_bar()
    logging.getLogger("kvpress").setLevel(logging.WARNING)
    model = load_model(args.model)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    weights = (args.model / "model.safetensors").read_bytes()
    report: dict[str, Any] = {
        "versions": versions(("kvpress", "transformers", "torch")),
        "settings": {
            "model_sha256": hashlib.sha256(weights).hexdigest(),
            "dtype": str(model.dtype),
            "attention": model.config._attn_implementation,
            "lengths": args.lengths,
            "num_samples": args.num_samples,
            "ratios": args.ratios,
            "seed": args.seed,
            "num_new_tokens": NUM_NEW_TOKENS,
            "policies": {policy: options for policy, (_, options) in POLICIES.items()},
        },
        "samples": {},
        "results": [],
        "kept_indices": [],
    }
    for num_tokens in args.lengths:
        samples, results, indices = run_length(model, tokenizer, num_tokens, args)
        report["samples"][str(num_tokens)] = [describe_sample(sample) for sample in samples]
        report["results"] += results
        report["kept_indices"] += indices
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
