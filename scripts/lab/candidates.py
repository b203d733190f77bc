"""Settings of which one factor at a time differs, as YAML files for `kvcompress eval --policies`.

    python scripts/lab/candidates.py windowkv --out settings
    kvcompress eval --model DIR --policies "$(ls settings/*.yaml | paste -sd,)" --budgets 0.12 \
        --tasks niah,ruler_multikey --lengths 1500 --samples 60 --seed 1000 --out calibration

The tables of docs/reports/README.md that chose the presets are of these.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

UNIFORM = {"shape": "uniform"}
ONE_GROUP = {"count": 1}


def windows(size: int, is_shared: bool = False, score: str = "mean") -> dict[str, Any]:
    """WindowKV; not shared: every layer ranks for itself."""
    return {
        "name": "windowkv", "window_size": size, "window_score": score, "share_indices": is_shared
    }  # fmt: skip


def pyramid(gamma: int) -> dict[str, Any]:
    """WindowKV's budgets as released; the larger gamma, the flatter they start."""
    return {"shape": "windowkv", "form": "released", "beta": 14, "gamma": gamma}


def pooled(width: int, pooling: str = "avg") -> dict[str, Any]:
    """SnapKV."""
    return {"name": "snapkv", "kernel_size": width, "pooling": pooling}


def safeguarded(scorer: dict[str, Any], safeguard: float) -> dict[str, Any]:
    """AdaKV over another policy."""
    return {"name": "adakv", "safeguard": safeguard, "scorer": scorer}


def spindle(pooling: int) -> dict[str, Any]:
    """SpindleKV's accumulated attention."""
    return {"name": "spindlekv", "selection": "kv_head", "kernel_size": pooling}


PER_LAYER = {"size": 1}

Setting = (
    tuple[str, dict[str, Any], int, dict[str, Any], dict[str, Any]]
    | tuple[str, dict[str, Any], int, dict[str, Any], dict[str, Any], dict[str, Any]]
)
"""Name, policy, observation window, layer groups, layer budget; a codebook, if there is one."""


def windowkv_factors() -> Iterator[Setting]:
    """From windows of 32, own rankings, 16 queries and one budget: each factor alone."""
    yield "own", windows(32), 16, ONE_GROUP, UNIFORM
    yield "own_pyramid4", windows(32), 16, {"count": 4}, pyramid(8)
    for count in (4, 6, 10, 15):
        yield f"shared_in_{count}_groups", windows(32, True), 16, {"count": count}, UNIFORM
    for size in (8, 16):
        yield f"own_windows_{size}", windows(size), 16, ONE_GROUP, UNIFORM
    yield "own_better_half", windows(32, score="top_half"), 16, ONE_GROUP, UNIFORM
    for queries in (4, 32, 64):
        yield f"own_queries_{queries}", windows(32), queries, ONE_GROUP, UNIFORM


def windowkv_together() -> Iterator[Setting]:
    """Windows, queries, layers per ranking and the pyramid, together."""
    for layers in (2, 3, 5):
        for size, each in ((8, (4, 8, 16)), (16, (4, 16))):
            for queries in each:
                for mark, shape in (("U", UNIFORM), ("P", pyramid(layers))):
                    name = f"w{size}_o{queries}_size{layers}_{mark}"
                    yield name, windows(size, True), queries, {"size": layers}, shape


def snapkv_factors() -> Iterator[Setting]:
    """Pooling and queries; AdaKV's safeguard and CriticalKV's second stage on top."""
    for width in (5, 7, 13, 21):
        for queries in (16, 32):
            yield f"snap{width}_o{queries}", pooled(width), queries, ONE_GROUP, UNIFORM
    for width in (7, 13):
        yield f"snap{width}max_o16", pooled(width, "max"), 16, ONE_GROUP, UNIFORM
    for queries in (8, 64):
        yield f"snap13_o{queries}", pooled(13), queries, ONE_GROUP, UNIFORM
    for width, queries, safeguard in ((13, 16, 0.2), (13, 16, 0.5), (21, 16, 0.2), (13, 8, 0.2)):
        policy = safeguarded(pooled(width), safeguard)
        yield f"ada{width}_o{queries}_s{safeguard}", policy, queries, ONE_GROUP, UNIFORM
    critical = {"name": "criticalkv", "scorer": pooled(13)}
    yield "critical13_o16", critical, 16, ONE_GROUP, UNIFORM


def wide_pooling() -> Iterator[Setting]:
    """Wide pooling, few queries, and what may go on top."""
    for width in (13, 21, 31):
        for queries in (4, 8, 16):
            yield f"s{width}_o{queries}", pooled(width), queries, ONE_GROUP, UNIFORM
            policy = safeguarded(pooled(width), 0.5)
            yield f"a{width}_o{queries}_s5", policy, queries, ONE_GROUP, UNIFORM
    for queries in (4, 8):
        for size in (8, 16):
            yield f"own{size}_o{queries}", windows(size), queries, ONE_GROUP, UNIFORM
        policy = safeguarded(windows(8), 0.5)
        yield f"aw8_o{queries}", policy, queries, ONE_GROUP, UNIFORM
        critical = {"name": "criticalkv", "scorer": pooled(21)}
        yield f"ck21_o{queries}", critical, queries, ONE_GROUP, UNIFORM


def published_numbers() -> Iterator[Setting]:
    """SnapKV's and PyramidKV's numbers as kvpress, the authors' runner and its fallback have them.

    And PyramidKV's pyramid over them: the larger beta, the steeper. Each factor alone.
    """
    numbers = {"64_5avg": (64, 5, "avg"), "8_7max": (8, 7, "max"), "32_5avg": (32, 5, "avg")}
    for mark, (queries, width, pooling) in numbers.items():
        policy = pooled(width, pooling)
        yield f"snap_{mark}", policy, queries, ONE_GROUP, UNIFORM
        for beta in (20, 2):
            budget: dict[str, Any] = {"shape": "pyramid", "beta": beta}
            yield f"pyramid{beta}_{mark}", policy, queries, PER_LAYER, budget
    for steep in (20, 2, 1.2):
        budget = {"shape": "pyramid", "beta": steep}
        yield f"pyramid{steep}_16_21avg", pooled(21), 16, PER_LAYER, budget


def spindlekv_factors() -> Iterator[Setting]:
    """From the preset `spindlekv-evict`: pooling, queries, budgets; then together."""
    linear = {"shape": "linear", "beta": 0.05}
    for width, queries in ((1, 32), (7, 32), (21, 32), (1, 16), (7, 16), (13, 16), (21, 16)):
        yield f"linear_{width}_o{queries}", spindle(width), queries, PER_LAYER, linear
    for width, queries in ((1, 32), (7, 32), (1, 16), (7, 16), (13, 16), (21, 16)):
        yield f"uniform_{width}_o{queries}", spindle(width), queries, ONE_GROUP, UNIFORM


def books(groups: list[int], entries: float, keys: float, values: float) -> dict[str, Any]:
    """SpindleKV's codebook in some layer groups."""
    thresholds = {"key_threshold": keys, "value_threshold": values}
    return {"groups": groups, "entries": entries, "extend": True, **thresholds}


def spindlekv_books() -> Iterator[Setting]:
    """Books over uniform budgets and pooling: how many layers, how many entries, how alike.

    Of 30 layers, four groups' first has 8, and the first two of five have 12.
    """
    policy = spindle(21)
    for mark, count, coded in (("q", 4, [0]), ("f", 5, [0, 1]), ("all", 1, [0])):
        for entries in (0.15, 0.3, 0.5):
            book = books(coded, entries, 0.98, 0.95)
            yield f"book_{mark}_{entries}", policy, 16, {"count": count}, UNIFORM, book
    for keys, values in ((0.95, 0.9), (0.9, 0.8)):
        book = books([0], 0.3, keys, values)
        yield f"book_q_0.3_{keys}", policy, 16, {"count": 4}, UNIFORM, book


def other_scorers() -> Iterator[Setting]:
    """The policies over a window's attention: published pooling and window, and those of `auto`."""
    cake, chunk = {"name": "cake", "gamma": 200.0}, {"name": "chunkkv"}
    for width, queries in ((5, 32), (5, 16), (21, 16)):
        yield f"cake{width}_o{queries}", {**cake, "kernel_size": width}, queries, ONE_GROUP, UNIFORM
    for width, queries in ((5, 64), (21, 16)):
        critical = {"name": "criticalkv", "scorer": pooled(width)}
        yield f"critical{width}_o{queries}", critical, queries, ONE_GROUP, UNIFORM
    for chunks, width, queries in (
        (20, 5, 64),
        (20, 5, 16),
        (20, 21, 16),
        (10, 5, 16),
        (10, 1, 16),
    ):
        policy = {**chunk, "chunk_length": chunks, "scorer": pooled(width)}
        yield f"chunk{chunks}_{width}_o{queries}", policy, queries, ONE_GROUP, UNIFORM
    for safeguard in (0.2, 0.5):
        policy = safeguarded(pooled(21), safeguard)
        yield f"ada21_o16_s{safeguard}", policy, 16, ONE_GROUP, UNIFORM


def keydiff_factors() -> Iterator[Setting]:
    """The last tokens that KeyDiff keeps whatever their keys are; the paper has no number."""
    for recent in (1, 4, 16, 32, 64):
        yield f"keydiff_o{recent}", {"name": "keydiff"}, recent, ONE_GROUP, UNIFORM


FAMILIES = {
    "published": published_numbers,
    "spindlekv-books": spindlekv_books,
    "spindlekv": spindlekv_factors,
    "keydiff": keydiff_factors,
    "other-scorers": other_scorers,
    "windowkv": windowkv_factors,
    "windowkv-together": windowkv_together,
    "snapkv": snapkv_factors,
    "wide-pooling": wide_pooling,
}


def main() -> int:
    """Write one family's files."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name, policy, queries, groups, budget, *book in FAMILIES[args.family]():
        fields = {
            "version": 1,
            "policy": policy,
            "budget": {"ratio": 0.12, "floor": 64},
            "layer_groups": groups,
            "layer_budget": budget,
            "num_sink_tokens": 4,
            "observation_window": queries,
            "trigger": "end_of_prompt",
            "min_prompt_len": 512,
            **({"codebook": book[0]} if book else {}),
        }
        text = yaml.safe_dump(fields, sort_keys=False)
        (args.out / f"{name}.yaml").write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
