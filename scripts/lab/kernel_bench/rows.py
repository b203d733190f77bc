"""Rows of the kernel benchmark: what is launched, how many bytes it has to move, what is right.

`Row.num_bytes` counts inputs as often as the kernel's docstring says they are read, and outputs
once, both in full. What stays between a row's own launches, block tables of caches and lengths are
left out, so the true traffic is a little more. Where a second reading finds its data in the L2
cache, the share of a copy's bandwidth can exceed 1.

Symbols of the formulas: R requests, L layers, n tokens, K kept tokens, H query heads, KV key-value
heads, D head_dim, e bytes per number of the cache, w queries, N tokens per block, G = 4 groups.

Importing this needs torch and triton alone.
"""

import importlib.util
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from lab.kernel_bench import inputs
from lab.kernel_bench.inputs import ENTRIES, GROUPS, RING, WINDOW, Case, Shape
from lab.kernel_bench.prompt import paged_attention, whole_prompt
from vllm_kvcompress.speed import kernel_bytes
from vllm_kvcompress.speed.kernel_bytes import Heads

MODELS = {"llama-3-8b": 32, "qwen3-8b": 36}
"""Layers. Both have 32 query heads, 8 KV heads and head_dim 128."""

STEP_TOKENS = 131072
TARGET_TOKENS = 32768
PROMPT_SHARE = 0.01
"""Of a prefill's time that all compression work for one prompt may take."""

BOTH = "both"
"""In place of a model: one layer of either."""

NOT_MEASURED = "not measured"
Times = tuple[float, float, float]
"""Milliseconds: median, 20th and 80th percentile."""


@dataclass(frozen=True)
class Row:
    """One line of the benchmark.

    Attributes
    ----------
    name, launched : str
        Its name, and the function under test.
    make : callable
        (shape, generator) -> Case.
    num_bytes, formula
        Bytes as a function of a shape, and in words.
    memory : callable
        Bytes of device memory that a case and both its versions need, roughly.
    tolerance : float
        Largest `difference` that passes; 0 for what copies or counts.
    all_layers : bool
        One launch works on all layers, so models differ; else on one layer.
    by_tokens : bool
        Whether n matters to it.
    target : float or None
        Share of a copy's bandwidth that is asked for at 32k tokens.
    most : callable
        Shape -> why it is not measured at that size, or None.
    provider, needs
        Who made what is measured, and a module that it needs.
    small, cpu_tokens : int
        Tokens of the small check, and the most for which a CPU times the torch version.
    """

    name: str
    launched: str
    make: Callable[[Shape, torch.Generator], Case]
    num_bytes: Callable[[Shape], int]
    formula: str
    memory: Callable[[Shape], int]
    tolerance: float = 0.0
    all_layers: bool = False
    by_tokens: bool = True
    target: float | None = None
    most: Callable[[Shape], str | None] = lambda shape: None
    provider: str = "triton"
    needs: str = "triton"
    small: int = 200
    cpu_tokens: int = 4096

    @property
    def missing(self) -> str | None:
        """Why it cannot run here at all."""
        if importlib.util.find_spec(self.needs) is None:
            return f"{self.needs} is not installed"
        return None


def difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """How far an answer is off: 0 is the same, infinity is no answer.

    Floats: the largest |found - wanted| / (|wanted| + root mean square of wanted). Bool: the share
    of elements that are true in one alone, of those that are true in `wanted`. Integers: 0 or
    infinity.
    """
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return float("inf")
    if torch.equal(found, wanted):
        return 0.0
    if wanted.dtype == torch.bool:
        return float((found != wanted).sum() / wanted.sum())
    if not wanted.is_floating_point():
        return float("inf")
    exact = wanted.float()
    size = exact.abs() + exact.square().mean().sqrt()
    off = float(((found.float() - exact).abs() / size.clamp(min=1e-30)).max())
    return off if off == off else float("inf")


# --- bytes and memory ---------------------------------------------------------------------


def _queries(s: Shape, count: int) -> int:
    return s.batch * count * s.heads * s.head_dim * s.dtype.itemsize


def _heads(s: Shape) -> Heads:
    return Heads(s.heads, s.kv_heads, s.head_dim, s.dtype.itemsize)


def _token_bytes(s: Shape, window: int) -> int:
    return int(s.batch * kernel_bytes.token_scores(_heads(s), s.tokens, window).num_bytes)


def _window_bytes(s: Shape, window: int) -> int:
    launch = kernel_bytes.window_scores(_heads(s), s.tokens, window, WINDOW)
    return int(s.batch * launch.num_bytes)


def _select_bytes(s: Shape) -> int:
    launch = kernel_bytes.select_tokens(_heads(s), s.layers, s.tokens, s.kept)
    return int(s.batch * launch.num_bytes)


def _compact_bytes(s: Shape) -> int:
    return int(s.batch * kernel_bytes.compact_pages(_heads(s), s.layers, s.kept).num_bytes)


def _slot_bytes(s: Shape, decodes: bool) -> int:
    tokens, blocks = (1, 1) if decodes else (s.tokens, -(-s.tokens // s.block))
    return s.batch * (8 * tokens + GROUPS * (8 * tokens + 4 * blocks))


def _store_bytes(s: Shape, decodes: bool) -> int:
    tokens, stored = (1, 1) if decodes else (s.tokens, min(s.tokens, RING))
    return int(s.batch * kernel_bytes.store_rows(_heads(s), tokens, stored).num_bytes)


def _build_bytes(s: Shape) -> int:
    return int(s.batch * kernel_bytes.build_codebook(_heads(s), s.tokens).num_bytes)


def _codebook_bytes(s: Shape) -> int:
    books = s.batch * 2 * ENTRIES * s.row
    return 12 * s.batch * s.kv_heads * s.tokens + books + 2 * _queries(s, 1) + 4 * s.batch * s.heads


def _paged_bytes(s: Shape) -> int:
    kept = replace(s, block=64).kept
    return 2 * s.batch * kept * s.row + 2 * _queries(s, 1)


# Bytes of scoring a whole prompt: layers that are scored, and queries they are scored with.
PRESETS: dict[str, Callable[[Shape], int]] = {
    "windowkv": lambda s: GROUPS * _window_bytes(s, 16),
    "snapkv": lambda s: s.layers * _token_bytes(s, 64),
    "keydiff": lambda s: s.layers * _token_bytes(s, 0),
}


def _prompt_bytes(s: Shape, preset: str) -> int:
    return PRESETS[preset](s) + _select_bytes(s) + _compact_bytes(s)


def _cache_memory(s: Shape) -> int:
    """Cache with room for survivors, scores of it, and float copies of one request."""
    cache = 2 * s.layers * s.batch * (s.tokens + s.kept) * s.row
    scores = 4 * s.batch * s.kv_heads * s.tokens
    return cache + 4 * scores + 16 * s.kv_heads * s.tokens * s.head_dim


def _select_memory(s: Shape) -> int:
    each = s.layers * s.kv_heads
    return each * (s.batch * (4 * s.tokens + 16 * s.kept) + 64 * s.tokens)


def _compact_memory(s: Shape) -> int:
    return _cache_memory(s) + s.layers * s.batch * s.kept * (6 * s.row + 8 * s.kv_heads)


def _step_memory(s: Shape) -> int:
    tokens = s.batch * s.tokens
    fused = (s.heads + 2 * s.kv_heads) * s.head_dim * s.dtype.itemsize
    return tokens * (fused + 32 * GROUPS) + 4 * _queries(s, RING)


def _build_memory(s: Shape) -> int:
    n, problems = s.tokens, 2 * s.batch * s.kv_heads
    return problems * n * (16 * s.head_dim + n // 8 + 64) + 16 * n * n


def _prompt_memory(s: Shape) -> int:
    return _cache_memory(s) * 2 + _select_memory(s)


def _one_step(s: Shape) -> str | None:
    total = s.batch * s.tokens
    return f"{total:,} tokens are more than a step's" if total > STEP_TOKENS else None


def _small_books(s: Shape) -> str | None:
    too_large = s.tokens > 4096 or s.batch > 8
    return "a book is made of at most 4,096 vectors, here of 8 requests" if too_large else None


def _one_prompt(s: Shape) -> str | None:
    if s.tokens < 512:
        return "the presets leave shorter prompts alone"
    return "one prompt alone" if s.batch > 1 else None


# --- rows ---------------------------------------------------------------------------------


def _rows() -> list[Row]:
    """All rows, those with targets first."""
    rows = [
        Row(
            f"compact_pages{name}", "compact_pages.compact_pages",
            partial(inputs.compact_pages, rotates=rotates), _compact_bytes,
            "L R K (2 * 2 KV D e + 8 KV)", _compact_memory, tolerance,
            all_layers=True, target=0.8,
        )
        for name, rotates, tolerance in (("", False, 0.0), ("_rotating", True, 0.01))
    ]  # fmt: skip
    rows += [
        Row(
            f"token_scores_w{w}", "window_scores.token_scores",
            partial(inputs.token_scores, window=w), partial(_token_bytes, window=w),
            "R (2 n KV D e + 2 w H D e + 4 KV n)", _cache_memory, 1e-3, target=0.7,
        )
        for w in (16, 32)
    ]  # fmt: skip
    scores = "R (2 n KV D e + 4 KV n)"
    rows += [
        Row(
            "window_scores_w16", "window_scores.window_scores",
            partial(inputs.window_scores, window=16), partial(_window_bytes, window=16),
            "R (n KV D e + w H D e + 4 KV n / 32)", _cache_memory, 1e-3, target=0.7,
        ),
        Row("key_similarity", "key_scores.key_similarity", inputs.key_similarity,
            partial(_token_bytes, window=0), scores, _cache_memory, 1e-3, target=0.7),
        Row("lag_scores", "key_scores.lag_scores", inputs.lag_scores,
            partial(_token_bytes, window=0), scores, _cache_memory, 1e-3, target=0.7),
        Row("key_redundancy", "key_redundancy.key_redundancy", inputs.key_redundancy,
            partial(_token_bytes, window=0), f"{scores}; up to 2 R KV D n n operations",
            _cache_memory, 1e-3, cpu_tokens=1024),
        Row("prompt_attention", "prompt_attention.prompt_attention_sums", inputs.prompt_attention,
            lambda s: _token_bytes(s, min(s.tokens, inputs.CHUNK)),
            "R (2 n KV D e + 2 m H D e + 4 KV n); 4 R H D m n operations at most",
            _cache_memory, 1e-3, cpu_tokens=1024),
        Row("select_tokens", "select_tokens.select_tokens", inputs.select_tokens, _select_bytes,
            "L R KV (5 * 4 n + 8 K) + R n", _select_memory, all_layers=True),
    ]  # fmt: skip
    for name, decodes in (("prefill", False), ("decode", True)):
        rows += [
            Row(
                f"physical_slots_{name}", "step_slots.physical_slots",
                partial(inputs.physical_slots, decodes=decodes),
                partial(_slot_bytes, decodes=decodes),
                "R (8 + G (8 + 4))" if decodes else "R (8 n + G (8 n + 4 n / N))",
                _step_memory, by_tokens=not decodes, most=_one_step,
            ),
            Row(
                f"store_rows_{name}", "store_rows.store_rows",
                partial(inputs.store_rows, decodes=decodes), partial(_store_bytes, decodes=decodes),
                "R (8 + 2 H D e)" if decodes else "R (8 n + 2 * 64 H D e)",
                _step_memory, by_tokens=not decodes, most=_one_step,
            ),
        ]  # fmt: skip
    rows += [
        Row("build_codebook", "codebook_build.build_codebook", inputs.build_codebook, _build_bytes,
            "2 R KV (3 n D e + 3 n n / 16 + 16 n)", _build_memory, 1e-3, most=_small_books,
            cpu_tokens=1024),
        Row("codebook_attention", "codebook_attention.codebook_attention",
            inputs.codebook_attention, _codebook_bytes,
            "R (12 KV n + 512 * 2 KV D e + 2 H D e + 4 H)", _cache_memory, 0.05),
        Row("paged_attention", "xformers paged attention", paged_attention, _paged_bytes,
            "R (2 K KV D e + 2 H D e), pages of 64", _compact_memory, 0.05,
            provider="xformers", needs="xformers"),
    ]  # fmt: skip
    rows += [
        Row(
            f"prompt_{preset}", "Compactor.run",
            partial(whole_prompt, preset=preset), partial(_prompt_bytes, preset=preset),
            "scores of the scored layers + select_tokens + compact_pages, K the same in all layers",
            _prompt_memory, 0.01, all_layers=True, most=_one_prompt, needs="vllm", small=600,
        )
        for preset in PRESETS
    ]  # fmt: skip
    return rows


ROWS = {row.name: row for row in _rows()}


# --- results ----------------------------------------------------------------------------


@dataclass
class Result:
    """One row at one size; times in milliseconds, or why there are none."""

    row: Row
    model: str
    shape: Shape
    error_small: float = math.nan
    error: float = math.nan
    times: dict[str, Times] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

    def gbps(self, provider: str) -> float:
        """Achieved GB/s, NaN without a time."""
        time_ms = self.times.get(provider, (math.nan,))[0]
        return self.row.num_bytes(self.shape) / time_ms / 1e6

    @property
    def is_red(self) -> bool:
        """Whether its answer was wrong, or none."""
        return self.notes.get(self.row.provider, "").startswith(("WRONG", "FAILED"))

    def columns(self, copy_gbps: float) -> Iterator[list[Any]]:
        """Lines of the long CSV."""
        for provider in (self.row.provider, "torch"):
            who = [self.row.name, provider, self.model, self.shape.tokens, self.shape.batch]
            note = self.notes.get(provider, "")
            if provider != "torch":
                yield [*who, "bytes moved", "B", self.row.num_bytes(self.shape), "", "", ""]
                for name, error in (("small", self.error_small), ("this", self.error)):
                    yield [*who, f"error at {name} size", "1", number(error), "", "", ""]
            times = self.times.get(provider)
            yield [*who, "time", "ms", *map(number, times or (math.nan,) * 3), note]
            rate = self.gbps(provider)
            yield [*who, "achieved", "GB/s", number(rate), "", "", note]
            yield [*who, "share of copy", "1", number(rate / copy_gbps), "", "", note]


def number(value: float) -> str:
    """Four digits; empty for what was not measured."""
    return "" if math.isnan(value) else f"{value:.4g}"


def verdicts(
    results: list[Result], copy_gbps: float, device: str, prefill: float | None
) -> list[list[str]]:
    """What was asked for, what was measured, and whether that is met."""
    lines = []
    for row in ROWS.values():
        is_prompt = row.name.startswith("prompt_")
        if row.target is None and not is_prompt:
            continue
        at = [r for r in results if r.row is row and r.shape.tokens == TARGET_TOKENS]
        if is_prompt:
            asked = f"<= {PROMPT_SHARE:.0%} of the prefill"
        else:
            asked = f">= {row.target:.0%} of a copy"
        timed = [r for r in at if row.provider in r.times and "H200" in device]
        for result in timed or [None]:  # type: ignore[list-item]
            where, found, verdict = "32k tokens", "", NOT_MEASURED
            if result is not None:
                where = f"{result.model}, 32k tokens, batch {result.shape.batch}"
                milliseconds = result.times[row.provider][0]
                if not is_prompt:
                    share = result.gbps(row.provider) / copy_gbps
                    found, verdict = f"{share:.0%}", word(share >= (row.target or 0))
                elif prefill is None:
                    found = f"{milliseconds:.2f} ms"
                    verdict = "prefill not measured in this run"
                else:
                    share = milliseconds / 1e3 / prefill
                    found = f"{milliseconds:.2f} ms, {share:.2%}"
                    verdict = word(share <= PROMPT_SHARE)
            lines.append([row.name, where, asked, found, verdict])
    return lines


def word(is_met: bool) -> str:
    """Of a verdict."""
    return "met" if is_met else "missed"
