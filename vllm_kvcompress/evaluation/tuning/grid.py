"""The settings that are tried: chains of one policy's settings with falling budgets.

The grid is a selection, not a product: the preset `auto`, each family's middle setting, and one
number changed at a time. Widths and windows are those that papers and released code use.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from vllm_kvcompress.config.reading import parse_config, preset_names
from vllm_kvcompress.config.settings import CompressionConfig
from vllm_kvcompress.errors import ConfigError, did_you_mean

GRID, BOOKS, BEST = "grid", "books", "auto"
"""Names of all chains of the grid, of those with codebooks, and of our best preset, which the grid
holds too; in lists of policies."""
BUDGETS = (0.5, 0.35, 0.25, 0.18, 0.12, 0.08, 0.06, 0.04)
_FLOOR = 32  # tokens; presets keep 64 or 128, which would end a chain early on short prompts


@dataclass(frozen=True)
class Candidate:
    """One complete setting.

    Attributes
    ----------
    chain : str
        Names all settings that differ from it in the budget alone.
    budget : float
        Share of the prompt to keep.
    config : CompressionConfig
        With this budget, for every task where tasks matter.
    """

    chain: str
    budget: float
    config: CompressionConfig

    @property
    def name(self) -> str:
        """Such as "snapkv-w7-o16@0.25"."""
        return f"{self.chain}@{self.budget:g}"

    @cached_property
    def digest(self) -> str:
        """Of all fields: a file that was edited makes other settings, whatever its name."""
        text = json.dumps(self.config.to_dict(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def depends_on_task(self) -> bool:
        """Whether somebody has to say what the prompt's task is."""
        return bool(self.config.tasks) and self.config.task == "auto"

    def setting(self, task: str | None) -> CompressionConfig:
        """The setting of a prompt; `task` matters where `depends_on_task`."""
        if not self.config.tasks:
            return self.config
        chosen = task if self.depends_on_task else self.config.task
        assert chosen is not None, "the setting depends on the task, and none was chosen"
        return self.config.by_task[chosen]


# --- the grid -----------------------------------------------------------------------------


def _snapkv(width: int) -> dict[str, Any]:
    return {"name": "snapkv", "kernel_size": width, "pooling": "max"}


_POLICIES: dict[str, Callable[[int], dict[str, Any]]] = {
    "windowkv": lambda width: {"name": "windowkv", "window_size": width, "share_indices": False},
    "windowkv-shared": lambda width: {"name": "windowkv", "window_size": width},
    "snapkv": _snapkv,
    "adakv": lambda width: {"name": "adakv", "scorer": _snapkv(width)},
    "criticalkv": lambda width: {"name": "criticalkv", "scorer": _snapkv(width)},
    "chunkkv": lambda width: {"name": "chunkkv", "chunk_length": width, "scorer": _snapkv(7)},
    "tova": lambda _: {"name": "tova"},
    "keydiff": lambda _: {"name": "keydiff"},
}
_GROUPS: dict[str, dict[str, int]] = {"windowkv-shared": {"size": 5}}  # others: one group

# Family, width of its windows, chunks or pooling (0: it has none; pooling takes odd ones), and
# tokens of the observation window.
_ROWS = (
    ("windowkv", 7, 16), ("windowkv", 13, 16), ("windowkv", 21, 16), ("windowkv", 32, 16),
    ("windowkv", 13, 4), ("windowkv", 13, 8), ("windowkv", 13, 32),
    ("windowkv-shared", 13, 16), ("windowkv-shared", 21, 16),
    ("snapkv", 7, 16), ("snapkv", 13, 16), ("snapkv", 21, 16), ("snapkv", 31, 16),
    ("snapkv", 13, 4), ("snapkv", 13, 8), ("snapkv", 13, 32),
    ("adakv", 7, 16), ("adakv", 13, 16), ("adakv", 21, 16), ("adakv", 13, 8), ("adakv", 13, 32),
    ("criticalkv", 7, 16), ("criticalkv", 13, 16), ("criticalkv", 13, 8), ("criticalkv", 13, 32),
    ("chunkkv", 7, 16), ("chunkkv", 13, 16), ("chunkkv", 21, 16),
    ("tova", 0, 16), ("keydiff", 0, 16),
)  # fmt: skip


def _label(family: str, width: int, window: int) -> str:
    return f"{family}-w{width}-o{window}" if width else f"{family}-o{window}"


def _fields(family: str, width: int, window: int) -> dict[str, Any]:
    return {
        "policy": _POLICIES[family](width),
        "budget": {"ratio": BUDGETS[0], "floor": _FLOOR},
        "layer_groups": _GROUPS.get(family, {"count": 1}),
        "observation_window": window,
    }


AUTO: dict[str, Any] = {"preset": BEST, "budget": {"ratio": BUDGETS[0], "floor": _FLOOR}}
"""The preset `auto`, for what is laid over it."""

# SpindleKV's codebook (arXiv 2507.06517): layer groups, coded ones, entries per token.
_BOOK_ROWS = (
    ("first-8th", 8, 0.125), ("first-4th", 4, 0.25), ("first-3rd", 3, 0.33), ("all", 1, 1.0)
)  # fmt: skip
_ENTRIES = (0.15, 0.3, 0.5)


def _book(count: int, shallow: float, entries: float) -> dict[str, Any]:
    return {
        **AUTO,
        "layer_groups": {"count": count},
        "codebook": {"shallow": shallow, "entries": entries},
    }


GRID_CHAINS: dict[str, dict[str, Any]] = {_label(*row): _fields(*row) for row in _ROWS}
"""By name, the fields of a setting, whose budget does not count."""

BOOK_CHAINS: dict[str, dict[str, Any]] = {
    f"{BOOKS}-{mark}-e{entries:g}": _book(count, shallow, entries)
    for mark, count, shallow in _BOOK_ROWS
    for entries in _ENTRIES
}
"""The same with codebooks. Not in the grid: a coded layer costs time in every step."""

_ALL_CHAINS = {GRID: GRID_CHAINS, BOOKS: BOOK_CHAINS}
_CHAINS = {**GRID_CHAINS, **BOOK_CHAINS}


# --- what was asked for -------------------------------------------------------------------


def make_candidates(
    policies: Sequence[str],
    budgets: Sequence[float],
    measured: Mapping[str, CompressionConfig] | None = None,
) -> list[Candidate]:
    """All settings, chain by chain, budgets falling.

    Parameters
    ----------
    policies : sequence of str
        `GRID`, `BOOKS`, names of their chains, presets, paths of YAML files.
    budgets : sequence of float
        Shares of the prompt, in (0, 1].
    measured : mapping or None
        Further chains by name, whose settings were measured.

    Raises
    ------
    ConfigError
        If there is no such policy, two chains have one name, or a setting's losses cannot be
        measured on prompts alone.
    """
    chains: dict[str, CompressionConfig] = {}
    sources: dict[str, str] = {}
    for policy in policies:
        for label, config in _chains_of(policy):
            if sources.setdefault(label, policy) != policy and chains[label] != config:
                raise ConfigError(
                    f"--policies: {sources[label]} and {policy} are both called {label}."
                )
            chains[label] = config
    chains.update(measured or {})
    falling = sorted(set(budgets), reverse=True)
    return [
        Candidate(label, budget, _at(config, budget))
        for label, config in chains.items()
        for budget in falling
    ]


def _chains_of(policy: str) -> list[tuple[str, CompressionConfig]]:
    if policy in _ALL_CHAINS:
        found = [(label, _parsed(label)) for label in _ALL_CHAINS[policy]]
        return [*_chains_of(BEST), *found] if policy == GRID else found
    if policy in _CHAINS:
        return [(policy, _parsed(policy))]
    is_file = policy.endswith((".yaml", ".yml")) or "/" in policy
    known = [*_ALL_CHAINS, *preset_names(), *_CHAINS]
    if not is_file and policy not in known:
        raise ConfigError(
            f"--policies: there is no {policy!r}{did_you_mean(policy, known)}; allowed are {GRID}, "
            f"{BOOKS}, their chains, preferences, presets (kvcompress policies lists them) and "
            "YAML files."
        )
    config = parse_config(policy)
    assert config is not None
    if config.trigger != "end_of_prompt" or config.mode != "evict":
        raise ConfigError(
            f"--policies: {policy} has the trigger {config.trigger} and the mode {config.mode}; "
            "tuned are settings that compress at the end of the prompt and evict."
        )
    return [(Path(policy).stem if is_file else policy, config)]


def _parsed(label: str) -> CompressionConfig:
    config = parse_config(_CHAINS[label])
    assert config is not None
    return config


def _at(config: CompressionConfig, budget: float) -> CompressionConfig:
    """The same setting with another budget, which its tasks no longer change."""
    fields = config.to_dict()
    fields["budget"] = {"ratio": budget, "floor": config.budget.floor}
    fields["tasks"] = {
        task: {key: value for key, value in changes.items() if key != "budget"}
        for task, changes in config.tasks.items()
    }
    found = parse_config(fields)
    assert found is not None
    return found
