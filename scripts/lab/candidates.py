"""Settings of which one factor at a time differs, as YAML files for `kvcompress eval --policies`.

    python scripts/lab/candidates.py windowkv --out settings
    kvcompress eval --model DIR --policies "$(ls settings/*.yaml | paste -sd,)" --budgets 0.12 \
        --tasks niah,ruler_multikey --lengths 1500 --samples 60 --seed 1000 --out calibration

The tables of docs/reports/README.md that chose the presets `windowkv` and `auto` are of these.
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


Setting = tuple[str, dict[str, Any], int, dict[str, Any], dict[str, Any]]
"""Name, policy, observation window, layer groups, layer budget."""


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


FAMILIES = {
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
    for name, policy, queries, groups, budget in FAMILIES[args.family]():
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
        }
        text = yaml.safe_dump(fields, sort_keys=False)
        (args.out / f"{name}.yaml").write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
