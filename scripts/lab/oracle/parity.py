"""Write what kvpress keeps and then generates, method by method, as data for tests of policies.

Three models (the probe model and the two of `lab.random_models`), two
prompts each, ten methods, two budgets. A prompt is prefilled whole under ``with press(model)``,
then tokens are decoded greedily on the compressed cache at logical positions: Hugging Face
transformers, CPU, float32. Lengths and kept counts are multiples of 32, the block size of the
engine that is tested, so that both sides keep equally many tokens.

What is kept is read off the cache that kvpress leaves behind, not off its scores.

Some methods do not protect the last prompt token, the tested engine always does. For those, its
score is raised here as kvpress itself does it for TOVA, and ``displaced`` tells what that changed.

The JSON file holds

- ``versions``, ``settings``: what was run;
- ``models``: per model the digest of its weights, the prompts' token ids, and the continuations
  over the full cache;
- ``cases``: per model, prompt, method and ratio

  - ``options`` of the press, ``num_kept`` per layer;
  - ``kept[layer][kv_head]``: bitmap of the kept positions (as in needle.py);
  - ``displaced[layer][kv_head]``: where the last token's score was raised, the position that lost
    its place to it, or -1 if the last token would have been kept anyway;
  - ``gaps[layer][kv_head]``: the lowest kept score minus the highest dropped one, relative to the
    larger magnitude of the two (LagKV: the narrowest of all partitions; ChunkKV: of chunks);
  - ``tied``: bitmaps, under "layer.kv_head", of the positions whose scores are within ``tie`` of
    such a narrow cut: which of them are kept is decided by rounding;
  - ``tokens``, and per token the ``margins`` between the two highest logits.
"""

import argparse
import json
import logging
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from kvpress import (
    ChunkKVPress,
    ExpectedAttentionPress,
    KeyDiffPress,
    KnormPress,
    LagKVPress,
    ObservedAttentionPress,
    PyramidKVPress,
    SnapKVPress,
    StreamingLLMPress,
    TOVAPress,
)
from kvpress.presses.base_press import BasePress
from transformers import AutoTokenizer, DynamicCache, PreTrainedModel
from transformers.utils import logging as transformers_logging

from lab.oracle.needle import encode_bitmap, load_model  # first: it finds this package
from lab.places import PROBE_MODEL, ROOT
from lab.random_models import (
    MODELS,
    distinct_tokens,
    weights_digest,
    write_random_model,
)
from vllm_kvcompress.evaluation.provenance import versions
from vllm_kvcompress.evaluation.tasks.needle import make_samples

LENGTHS = (640, 1280)
RATIOS = (0.5, 0.25)  # kept part
NUM_NEW_TOKENS = 12
TIE = 1e-5  # scores whose relative difference is smaller are tied: float32, and other sums
BLOCK_SIZE = 32

SNAPKV = {"window_size": 64, "kernel_size": 5}
METHODS: dict[str, tuple[type[BasePress], dict[str, Any]]] = {
    "snapkv": (SnapKVPress, SNAPKV),
    # Window and beta make every layer's budget a multiple of 32 for both ratios.
    "pyramidkv": (PyramidKVPress, {"window_size": 32, "kernel_size": 5, "beta": 2.5}),
    "streaming_llm": (StreamingLLMPress, {"n_sink": 4}),
    "tova": (TOVAPress, {}),
    "keydiff": (KeyDiffPress, {}),
    "knorm": (KnormPress, {}),
    "lagkv": (LagKVPress, {"n_sink": 4}),
    "expected_attention": (
        ExpectedAttentionPress,
        {
            "n_future_positions": 512,
            "n_sink": 4,
            "use_covariance": True,
            "use_vnorm": True,
            "epsilon": 0.0,
        },
    ),
    "chunkkv": (ChunkKVPress, {"chunk_length": 20}),
    "observed_attention": (ObservedAttentionPress, {}),
}
# Partitions such that each keeps a whole number of tokens: LagKV ranks them separately, and equal
# ranks of different partitions tie.
LAG_SIZES = {640: 64, 1280: 128}
LAST_TOKEN_UNPROTECTED = ("keydiff", "knorm", "expected_attention", "observed_attention")


@dataclass
class Record:
    """What one run of a press did: one entry per layer."""

    scores: list[torch.Tensor] = field(default_factory=list)  # [num_kv_heads, num_tokens]
    kept: list[torch.Tensor] = field(default_factory=list)  # [num_kv_heads, num_tokens], bool
    displaced: list[list[int]] = field(default_factory=list)


def press_options(method: str, num_tokens: int) -> dict[str, Any]:
    """Options of a press besides the ratio."""
    options = dict(METHODS[method][1])
    if method == "lagkv":
        options["lag_size"] = LAG_SIZES[num_tokens]
    return options


def make_press(method: str, num_tokens: int, ratio: float, record: Record) -> BasePress:
    """Make a press that writes its scores and what it really kept into `record`."""
    press_class, options = METHODS[method][0], press_options(method, num_tokens)
    if method == "chunkkv":
        press = press_class(press=SnapKVPress(compression_ratio=1 - ratio, **SNAPKV), **options)
        scorer = press.press
    else:
        press = scorer = press_class(compression_ratio=1 - ratio, **options)
    scorer.score = _recording_score(scorer.score, method, ratio, record)
    plain_compress = press.compress

    def recording_compress(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = args[2:4]
        new_keys, new_values = plain_compress(*args)
        record.kept.append(find_rows(keys[0], new_keys[0]))
        if method == "lagkv":
            record.scores[-1] = _lagkv_scores(scorer, keys, values)
        return new_keys, new_values

    press.compress = recording_compress
    return press


def _recording_score(
    plain_score: Callable[..., torch.Tensor], method: str, ratio: float, record: Record
) -> Callable[..., torch.Tensor]:
    def recording_score(*args: Any) -> torch.Tensor:
        scores = plain_score(*args)  # [1, num_kv_heads, num_tokens]
        if method in LAST_TOKEN_UNPROTECTED:
            num_kept = int(scores.shape[-1] * ratio)
            plain = mark(scores[0].topk(num_kept).indices, scores.shape[-1])
            scores = scores.clone()
            scores[..., -1] = scores.max() + 1
            lost = plain & ~mark(scores[0].topk(num_kept).indices, scores.shape[-1])
            record.displaced.append([int(row.nonzero()[0]) if row.any() else -1 for row in lost])
        record.scores.append(scores[0])
        return scores

    return recording_score


def _lagkv_scores(press: LagKVPress, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Scores before they are ranked inside their partitions."""
    raw = LagKVPress(n_sink=press.n_sink, lag_size=press.lag_size, cross_scoring=True)
    return raw.score(None, None, keys, values, None, None)[0]


def mark(positions: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Turn positions [num_kv_heads, num_kept] into a mask [num_kv_heads, num_tokens]."""
    mask = torch.zeros(positions.shape[0], num_tokens, dtype=torch.bool)
    return mask.scatter(1, positions, True)


def find_rows(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Find which keys [num_kv_heads, num_tokens, head_dim] are left, as a mask."""
    mask = torch.zeros(before.shape[:2], dtype=torch.bool)
    for head in range(before.shape[0]):
        rows = {row.numpy().tobytes(): number for number, row in enumerate(before[head])}
        if len(rows) < before.shape[1]:
            raise RuntimeError("two keys are equal, so what was kept cannot be told")
        mask[head, [rows[row.numpy().tobytes()] for row in after[head]]] = True
    return mask


# --- cuts ---------------------------------------------------------------------------------


def find_cut(scores: torch.Tensor, kept: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Find the relative gap at the cut and the mask of positions tied there, of one KV head."""
    tied = torch.zeros_like(kept)
    if kept.all() or not kept.any():
        return float("inf"), tied
    lowest, highest = scores[kept].min(), scores[~kept].max()
    size = torch.maximum(lowest.abs(), highest.abs()).clamp_min(1e-30)
    gap = float((lowest - highest) / size)
    if gap <= TIE:
        tied = ((scores - lowest).abs() <= TIE * size) | ((scores - highest).abs() <= TIE * size)
    return gap, tied


def find_cuts(
    method: str, options: dict[str, Any], scores: torch.Tensor, kept: torch.Tensor
) -> list[tuple[float, torch.Tensor]]:
    """Find gap and ties of every KV head of a layer, where the method compares its scores."""
    num_tokens = scores.shape[1]
    parts = [slice(0, num_tokens)]
    if method == "chunkkv":
        length = options["chunk_length"]
        chunks = scores.sum(dim=0).view(-1, length).mean(dim=1)
        scores = chunks.repeat_interleave(length).expand_as(scores)
    if method == "lagkv":
        lag, start = options["lag_size"], options["n_sink"]
        end = start + (num_tokens - start) // lag * lag - lag  # the last partition is only a lag
        parts = [slice(first, first + lag) for first in range(start, end, lag)]
        if len({int(kept[:, part].sum()) for part in parts}) > 1:
            raise RuntimeError("LagKV: partitions keep unequally many, so ranks tie")
    cuts = []
    for head in range(scores.shape[0]):
        gap, tied = float("inf"), torch.zeros(num_tokens, dtype=torch.bool)
        for part in parts:
            part_gap, tied[part] = find_cut(scores[head, part], kept[head, part])
            gap = min(gap, part_gap)
        cuts.append((gap, tied))
    return cuts


# --- runs ---------------------------------------------------------------------------------


@torch.inference_mode()
def generate(
    model: PreTrainedModel, prompt: list[int], press: BasePress | None
) -> tuple[list[int], list[float]]:
    """Prefill under the press, then decode greedily: tokens and margins of the highest logits."""
    tokens: list[int] = []
    margins: list[float] = []

    def take(logits: torch.Tensor) -> None:
        first, second = logits[0, -1].topk(2).values.tolist()
        tokens.append(int(logits[0, -1].argmax()))
        margins.append(first - second)

    cache = DynamicCache(config=model.config)
    with press(model) if press is not None else nullcontext():
        take(model(torch.tensor([prompt]), past_key_values=cache, logits_to_keep=1).logits)
    for position in range(len(prompt), len(prompt) + NUM_NEW_TOKENS - 1):
        output = model(
            torch.tensor([tokens[-1:]]),
            past_key_values=cache,
            position_ids=torch.tensor([[position]]),
            cache_position=torch.tensor([position]),
        )
        take(output.logits)
    return tokens, margins


def run_case(
    model: PreTrainedModel, prompt: list[int], method: str, ratio: float
) -> dict[str, Any]:
    """Run one method at one budget on one prompt."""
    num_tokens, record = len(prompt), Record()
    options = press_options(method, num_tokens)
    # Attention weights of all queries exist only in the eager implementation.
    model.set_attn_implementation("eager" if method == "observed_attention" else "sdpa")
    tokens, margins = generate(model, prompt, make_press(method, num_tokens, ratio, record))
    num_kept = [int(kept[0].sum()) for kept in record.kept]
    total = int(num_tokens * ratio) * len(num_kept)
    if sum(num_kept) != total or any(count % BLOCK_SIZE for count in num_kept):
        raise RuntimeError(f"{method} keeps {num_kept} of {num_tokens}: not what was asked for")
    cuts = [
        find_cuts(method, options, scores, kept)
        for scores, kept in zip(record.scores, record.kept, strict=True)
    ]
    case: dict[str, Any] = {
        "method": method,
        "ratio": ratio,
        "options": options,
        "num_kept": num_kept,
        "tokens": tokens,
        "margins": [round(margin, 5) for margin in margins],
        "gaps": [[float(f"{gap:.1e}") for gap, _ in layer] for layer in cuts],
        "kept": [
            [encode_bitmap(head.nonzero()[:, 0], num_tokens) for head in kept]
            for kept in record.kept
        ],
    }
    if record.displaced:
        case["displaced"] = record.displaced
    case["tied"] = {
        f"{layer}.{head}": encode_bitmap(tied.nonzero()[:, 0], num_tokens)
        for layer, heads in enumerate(cuts)
        for head, (_, tied) in enumerate(heads)
        if tied.any()
    }
    return case


def probe_prompts() -> list[list[int]]:
    """Needle prompts of exactly the lengths: the first token, then the end of a longer prompt."""
    tokenizer = AutoTokenizer.from_pretrained(PROBE_MODEL)

    def tokenize(text: str) -> list[int]:
        return tokenizer(text)["input_ids"]

    prompts = []
    for number, length in enumerate(LENGTHS):
        # Samples with odd numbers have English filler; depths 1/3 and 1/5.
        sample = make_samples((4, 6)[number], length + 40, tokenize, seed=number)[1]
        token_ids = tokenize(sample.prompt)
        prompts.append(token_ids[:1] + token_ids[1 - length :])
    return prompts


def run_model(
    name: str, folder: Path, prompts: list[list[int]]
) -> tuple[list[list[int]], list[dict[str, Any]]]:
    """Run every method at every budget on the prompts: continuations of the full cache, cases."""
    model = load_model(folder)
    all_full, cases = [], []
    for number, prompt in enumerate(prompts):
        full, margins = generate(model, prompt, None)
        all_full.append(full)
        print(f"{name} {len(prompt)} full cache: {full}, least margin {min(margins):.1e}")
        for method in METHODS:
            for ratio in RATIOS:
                case = run_case(model, prompt, method, ratio)
                cases.append({"model": name, "prompt": number, **case})
                print(
                    f"{name} {len(prompt)} {method} {ratio}: kept {case['num_kept']}, "
                    f"{len(case['tied'])} tied cuts, least margin {min(case['margins']):.1e}, "
                    f"{sum(a == b for a, b in zip(full, case['tokens'], strict=True))} of "
                    f"{NUM_NEW_TOKENS} tokens as with the full cache",
                    flush=True,
                )
    return all_full, cases


def to_json(report: dict[str, Any]) -> str:
    """JSON text with one line for each model and case."""
    encode = json.JSONEncoder(separators=(",", ":")).encode
    parts = []
    for key, value in report.items():
        if isinstance(value, list):
            rows, brackets = [encode(row) for row in value], "[]"
        else:
            rows, brackets = [f'"{name}": {encode(row)}' for name, row in value.items()], "{}"
        inner = ",\n  ".join(rows)
        parts.append(f' "{key}": {brackets[0]}\n  {inner}\n {brackets[1]}')
    return "{\n" + ",\n".join(parts) + "\n}\n"


def main() -> None:
    """Run everything and write the JSON file."""
    parser = argparse.ArgumentParser(description="Run the methods of kvpress on small models.")
    parser.add_argument("--out", type=Path, default=ROOT / "tests/data/kvpress_parity.json")
    parser.add_argument("--num-threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.num_threads)
    transformers_logging.disable_progress_bar()
    logging.getLogger("kvpress").setLevel(logging.WARNING)
    report: dict[str, Any] = {
        "versions": versions(("kvpress", "transformers", "torch")),
        "settings": {
            "dtype": "float32",
            "lengths": LENGTHS,
            "ratios": RATIOS,
            "num_new_tokens": NUM_NEW_TOKENS,
            "tie": TIE,
            "last_token_unprotected": LAST_TOKEN_UNPROTECTED,
        },
        "models": {},
        "cases": [],
    }
    with tempfile.TemporaryDirectory() as scratch:
        for name in ("probe", *MODELS):
            if name == "probe":
                folder, prompts = PROBE_MODEL, probe_prompts()
                digest = sha256((folder / "model.safetensors").read_bytes()).hexdigest()
            else:
                folder = write_random_model(Path(scratch) / name, name)
                prompts = [distinct_tokens(length, seed) for seed, length in enumerate(LENGTHS)]
                digest = weights_digest(folder)
            full, cases = run_model(name, folder, prompts)
            report["models"][name] = {
                "weights_sha256": digest,
                "prompts": prompts,
                "full_tokens": full,
            }
            report["cases"] += cases
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(to_json(report))


if __name__ == "__main__":
    main()
