"""Arithmetic of ``scripts/bench_serving.py``: sizes, order, counters, ratios, verdicts.

Nothing here talks to a server, so all of it is tested with exact numbers.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from vllm_kvcompress.errors import ConfigError

STOCK = "stock"
NONE = "none"
POOLS = ("ample", "tight")
TOLERANCE = 0.01
"""How far `none` may be from stock vLLM, as a share."""

SPARE_BLOCKS = 3
"""Blocks on top: vLLM keeps one back, and a copy's last blocks are not full."""

# --- pools --------------------------------------------------------------------------------


def request_blocks(prompt_len: int, output_len: int, block_size: int) -> int:
    """Blocks of stock vLLM that one request holds at its end."""
    return math.ceil((prompt_len + output_len) / block_size)


def kv_memory_default(total: int, weights: int, num_servers: int) -> int:
    """Bytes for one server's KV cache on a GPU of `total` bytes that `num_servers` share.

    7 % of the GPU stay free, and 5 GiB per server for activations and CUDA graphs.
    """
    return max(int(0.93 * total) // num_servers - weights - 5 * 2**30, 0)


def batch_size(memory: int, request_bytes: int, copy: float) -> int:
    """Requests that fit into `memory` uncompressed, beside one compaction's copy.

    Parameters
    ----------
    memory, request_bytes : int
        Bytes for the KV cache, and bytes of one request at its end.
    copy : float
        Share of a request that a compaction copies: the largest budget's ratio.

    Raises
    ------
    ConfigError
        If not even one request fits.
    """
    number = math.floor(memory / request_bytes - copy)
    if number < 1:
        needed = math.ceil((1 + copy) * request_bytes)
        raise ConfigError(
            f"--kv-memory: {memory} bytes do not hold one request and its copy; at least {needed} "
            "bytes are needed: raise it, take shorter --prompt-lens or use --one-at-a-time."
        )
    return number


def pool_blocks(num_requests: int, pool: str, fraction: float, blocks: int, copy: float) -> int:
    """Blocks of stock vLLM in a pool.

    Parameters
    ----------
    num_requests : int
        The batch.
    pool : {"ample", "tight"}
        "ample": room for the whole batch. "tight": for `fraction` of it, one request at least.
    fraction : float
        In (0, 1).
    blocks : int
        What one request holds at its end.
    copy : float
        Share of a request that a compaction copies. There is room for one copy in both pools:
        where a single request fills the pool, nothing could ever be compacted.
    """
    at_once = num_requests if pool == "ample" else max(num_requests * fraction, 1.0)
    return math.ceil((at_once + copy) * blocks) + SPARE_BLOCKS


@dataclass(frozen=True)
class Scenario:
    """One pair of servers and the batch sent to them.

    Attributes
    ----------
    model, pool : str
        Name in `MODELS`, and "ample" or "tight".
    prompt_len, output_len, num_requests, block_size : int
        Tokens, tokens, requests, tokens.
    pool_bytes : int
        Bytes of either server's KV cache.
    """

    model: str
    pool: str
    prompt_len: int
    output_len: int
    num_requests: int
    block_size: int
    pool_bytes: int

    @property
    def title(self) -> str:
        """For tables and plots."""
        return f"{self.model}, {self.prompt_len:,} tokens, {self.pool} pool"


# --- variants and their order -------------------------------------------------------------


def parse_variant(text: str) -> str:
    """Check a variant: "none" or a budget's ratio in (0, 1), such as "0.12"."""
    if text == NONE:
        return text
    try:
        ratio = float(text)
    except ValueError:
        ratio = math.nan
    if not 0 < ratio < 1:
        raise ConfigError(f"--variants: {text!r} is neither none nor a ratio above 0 and below 1.")
    return text


def largest_ratio(variants: Sequence[str]) -> float:
    """Largest budget among the variants; 0 if all keep everything."""
    return max((float(v) for v in variants if v not in (STOCK, NONE)), default=0.0)


def request_extras(variant: str) -> dict[str, Any]:
    """Fields a variant adds to every request's JSON."""
    if variant == STOCK:
        return {}
    asked: dict[str, Any] = (
        {"kv_compression": NONE} if variant == NONE else {"kv_budget_ratio": float(variant)}
    )
    return {"vllm_xargs": asked}


def side_of(variant: str) -> str:
    """The server that serves a variant: "stock" or "plugin"."""
    return STOCK if variant == STOCK else "plugin"


def order(variants: Sequence[str], number: int) -> list[str]:
    """Order of variants in a round: rotated by the round's number, odd rounds backwards.

    So no variant always comes first, nor always after the same other one.
    """
    shift = number % len(variants)
    rotated = [*variants[shift:], *variants[:shift]]
    return rotated[::-1] if number % 2 else rotated


@dataclass(frozen=True)
class Batch:
    """Servers that run at the same time, and what is measured while they do.

    Attributes
    ----------
    sides : tuple[str, ...]
        "stock", "plugin" or both.
    work : tuple[tuple[int, str], ...]
        (round, variant) in order; rounds up to 0 only warm up.
    """

    sides: tuple[str, ...]
    work: tuple[tuple[int, str], ...]


def plan(variants: Sequence[str], rounds: int, warmups: int, one_at_a_time: bool) -> list[Batch]:
    """Everything one scenario measures; see `Batch`."""
    numbers = range(1 - warmups, rounds + 1)
    if not one_at_a_time:
        work = tuple((n, variant) for n in numbers for variant in order(variants, n))
        return [Batch((STOCK, "plugin"), work)]
    batches = []
    for n in range(1, rounds + 1):
        # A fresh server needs its warm-up every time.
        for side in (STOCK, "plugin") if n % 2 else ("plugin", STOCK):
            own = [v for v in variants if side_of(v) == side]
            warm = [(0, v) for _ in range(warmups) for v in own]
            batches.append(Batch((side,), (*warm, *((n, v) for v in order(own, n)))))
    return batches


# --- a server's metrics -------------------------------------------------------------------

_SAMPLE = re.compile(r"^(vllm:\w+)(?:\{.*\})? (\S+)$")
_LABEL = re.compile(r'(\w+)="([^"]*)"')


def parse_metrics(text: str) -> dict[str, float]:
    """Sums over all labels of a Prometheus text's samples; buckets are left out."""
    sums: dict[str, float] = {}
    for line in text.splitlines():
        found = _SAMPLE.match(line)
        if found and not found[1].endswith("_bucket"):
            sums[found[1]] = sums.get(found[1], 0.0) + float(found[2])
    return sums


def parse_cache_config(text: str) -> dict[str, str]:
    """Labels of ``vllm:cache_config_info``; empty if it is missing."""
    line = next((x for x in text.splitlines() if x.startswith("vllm:cache_config_info{")), "")
    return dict(_LABEL.findall(line))


def difference(before: Mapping[str, float], after: Mapping[str, float], name: str) -> float:
    """How much a counter grew; a counter that has not been used yet is missing and counts as 0."""
    return after.get(name, 0.0) - before.get(name, 0.0)


@dataclass(frozen=True)
class Reading:
    """Gauges of one server.

    Attributes
    ----------
    start, end : float
        Seconds of the client's clock before asking for /metrics and after the answer.
    running : float
        Requests in the running batch.
    usage : float
        Share of the pool's usable blocks in use.
    """

    start: float
    end: float
    running: float
    usage: float


def blocks_held(readings: Sequence[Reading], start: float, end: float, num_blocks: int) -> int:
    """Blocks a lone request holds when its last token is due: the last reading before it.

    Taken there because its last block is held for many tokens: which of them a reading meets does
    not matter. Right after the prompt one step more or less would.

    Parameters
    ----------
    readings : sequence of Reading
        Taken while one request was the only one.
    start, end : float
        When its first and its last token arrived.
    num_blocks : int
        Of the pool; one of them is never handed out.

    Raises
    ------
    ConfigError
        If fewer than three readings lie between the two.
    """
    inside = [r for r in readings if start <= r.start and r.end <= end and r.usage > 0]
    if len(inside) < 3:
        raise ConfigError(
            f"--output-len: /metrics could be read {len(inside)} times while one request was "
            "decoded, 3 are needed; take more output tokens."
        )
    return round(inside[-1].usage * (num_blocks - 1))


# --- ratios -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spread:
    """Middle and ends of some values."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Median, lowest and highest."""
    return Spread(median(values), min(values), max(values))


def ratios(values: Mapping[int, float], stock: Mapping[int, float]) -> list[float]:
    """Value over stock's value of the same round, for rounds that have both and stock is not 0."""
    return [values[n] / stock[n] for n in sorted(values) if stock.get(n)]


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """Interval that holds the true median with 95 %, by order statistics; all values below six.

    With fewer than six values no pair of them reaches 95 %: lowest and highest are what there is.
    """
    ranked, n = sorted(values), len(values)
    below, skip = 0.5**n, 0  # chance that at most `skip` of n fair coins show heads
    while 2 * (below + math.comb(n, skip + 1) * 0.5**n) <= 0.05:
        skip += 1
        below += math.comb(n, skip) * 0.5**n
    return ranked[skip], ranked[n - 1 - skip]


def verdict(values: Sequence[float], tolerance: float = TOLERANCE) -> str:
    """Whether ratios say that two things are equal within a tolerance.

    Returns
    -------
    str
        "within 1 %", "differs by more than 1 %" or "not decidable with this spread".
    """
    if len(values) < 2:
        return "not decidable with fewer than two rounds"
    low, high = median_interval(values)
    share = f"{tolerance:.0%}".replace("%", " %")
    if 1 - tolerance <= low and high <= 1 + tolerance:
        return f"within {share}"
    if high < 1 - tolerance or low > 1 + tolerance:
        return f"differs by more than {share}"
    return "not decidable with this spread"
