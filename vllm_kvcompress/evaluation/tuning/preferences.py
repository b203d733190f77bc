"""Layer budgets as CAKE has them (arXiv 2503.12491), measured on some of the user's own prompts.

The paper measures every prompt while it is prefilled. A server must know lengths beforehand, so
what layers prefer is measured here once and averaged. The prompts that it is measured on are set
aside: they are in no split, or a promise would rest on prompts that shaped the setting.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vllm_kvcompress.config.reading import parse_config
from vllm_kvcompress.config.settings import CompressionConfig, LayerGroupsConfig
from vllm_kvcompress.errors import ConfigError
from vllm_kvcompress.evaluation.tuning.prompts_file import OwnPrompt
from vllm_kvcompress.evaluation.whole_files import write_whole
from vllm_kvcompress.lengths.budgets import layer_groups

PREFERENCES = "preferences"
"""Name of the measured chains, in lists of policies."""
FILE = "preferences.json"
NUM_PROMPTS = 8
_QUERIES = 32  # the paper's
_GROUP_COUNTS = (2, 4, 8)


def set_aside(prompts: Sequence[OwnPrompt]) -> tuple[list[OwnPrompt], list[OwnPrompt]]:
    """The prompts to measure on, and the others; who belongs where depends on the texts alone."""
    few = sorted({prompt.digest for prompt in prompts})[:NUM_PROMPTS]
    aside = {prompt.digest: prompt for prompt in prompts if prompt.digest in few}
    return [aside[each] for each in few], [p for p in prompts if p.digest not in aside]


def layer_shares(replay: Any, prompts: Sequence[Sequence[int]]) -> list[float]:
    """Preference of every layer that can be compacted as a share of all, mean over prompts.

    Parameters
    ----------
    replay : Replay
        The model.
    prompts : sequence of sequence of int
        Token ids.
    """
    from vllm_kvcompress.evaluation.replay_attention import softmax_terms
    from vllm_kvcompress.kernels.formulas.layer_preference import layer_preference

    numbers = replay.full_layers
    totals = [0.0] * len(numbers)
    for token_ids in prompts:
        found = replay.prefill(token_ids)
        each = [
            float(
                layer_preference(
                    found.queries[number][:, -_QUERIES:],
                    found.keys[number],
                    replay.layers[number].self_attn.scaling,
                    terms=softmax_terms(replay.layers[number].self_attn),
                )
            )
            for number in numbers
        ]
        totals = [
            total + one / sum(each) / len(prompts) for total, one in zip(totals, each, strict=True)
        ]
    return totals


def known_or_measured(
    folder: Path, prompts: Sequence[OwnPrompt], measure: Callable[[], list[float]]
) -> list[float]:
    """Shares of the layers: those in the folder, if they are of these prompts, else measured.

    Raises
    ------
    ConfigError
        If the folder's file is none of ours.
    """
    path, digests = folder / FILE, [prompt.digest for prompt in prompts]
    if path.is_file():
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
            if known["prompts"] == digests:
                return [float(share) for share in known["layers"]]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ConfigError(f"--out: {path} is no file of kvcompress tune.") from None
    shares = [float(f"{share:.6g}") for share in measure()]
    text = json.dumps({"prompts": digests, "layers": shares}, indent=1)
    write_whole(path, text + "\n")
    return shares


def chains(shares: Sequence[float], fields: dict[str, Any]) -> dict[str, CompressionConfig]:
    """Settings with these layer budgets, by name, a few numbers of layer groups each.

    Parameters
    ----------
    shares : sequence of float
        Of the layers, from `layer_shares`.
    fields : dict
        The rest of the setting.
    """
    found = {}
    for count in _GROUP_COUNTS:
        if count > len(shares):
            continue
        groups = layer_groups(len(shares), LayerGroupsConfig(count=count))
        members: list[list[float]] = [[] for _ in range(count)]
        for group, share in zip(groups, shares, strict=True):
            members[group].append(share)
        preferences = [float(f"{sum(each) / len(each):.4g}") for each in members]
        config = parse_config(
            {
                **fields,
                "layer_groups": {"count": count},
                "layer_budget": {"shape": "preference", "preferences": preferences},
            }
        )
        assert config is not None
        found[f"{PREFERENCES}-g{count}"] = config
    return found
