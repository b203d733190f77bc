"""Which tokens of one prompt survive, per layer and KV head: the computation behind the pictures.

The prompt runs through the replay, so the survivors are what the worker's own `Compactor` chooses.
Dimensions: L layers, KV heads, n tokens of the prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from transformers.utils import logging

from vllm_kvcompress.config.settings import CompressionConfig
from vllm_kvcompress.core.classifier import TaskClassifier, head_and_tail
from vllm_kvcompress.errors import ConfigError, UnsupportedModelError
from vllm_kvcompress.evaluation.inspected_prompt import InspectedPrompt
from vllm_kvcompress.evaluation.prompt_files import first_line
from vllm_kvcompress.evaluation.replay import Replay
from vllm_kvcompress.evaluation.replay_checks import check_full_or_windowed
from vllm_kvcompress.evaluation.replay_marks import marks_of
from vllm_kvcompress.evaluation.seeds import prompt_seed
from vllm_kvcompress.host.part_checks import Turning, keys_turn
from vllm_kvcompress.kernels.codebook.format import codes_per_row
from vllm_kvcompress.lengths.budgets import compaction_lengths, layer_groups, score_leaders
from vllm_kvcompress.lengths.codebook import coded_groups
from vllm_kvcompress.plans import RequestOptions
from vllm_kvcompress.request_options import choose_task, resolve_request

Kept = npt.NDArray[np.bool_]

# --- the setting --------------------------------------------------------------------------


@dataclass(frozen=True)
class InspectedSetting:
    """The setting that a request with this prompt runs under.

    Attributes
    ----------
    config : CompressionConfig
        Of the request's task.
    task, decided_by : str or None
        As `choose_task` returns them: both None where the setting does not depend on the task.
    """

    config: CompressionConfig
    task: str | None
    decided_by: str | None


def resolve_setting(
    server: CompressionConfig, budget: float | None, prompt: InspectedPrompt, tokenizer: Any
) -> InspectedSetting:
    """Choose task and budget as the server does for a request; `budget` is its share, or None."""

    def classify() -> str:
        head, tail = head_and_tail(prompt.token_ids)
        return TaskClassifier.load().classify(tokenizer.decode(head), tokenizer.decode(tail))

    options = RequestOptions(budget_ratio=budget)
    task, decided_by = choose_task(server, options, classify)
    config = resolve_request(server, options, task)
    assert config is not None, "the request names no preset of its own"
    return InspectedSetting(config, task, decided_by)


# --- the model ----------------------------------------------------------------------------


def load_replay(
    model: Path, block_size: int, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Replay:
    """Load a model for `eval`, `tune` and `inspect`.

    Raises
    ------
    ConfigError
        If it cannot be loaded.
    UnsupportedModelError
        If it is not built like Llama, windowed layers apart.
    """
    logging.disable_progress_bar()
    try:
        replay = Replay(str(model), block_size, dtype, device)
        parts = [layer.self_attn for layer in replay.layers]
        known = all(hasattr(part, name) for part in parts for name in _PARTS)
    except AttributeError:
        known = False
    except UnsupportedModelError:
        raise
    except Exception as error:  # of files that are not ours
        raise ConfigError(
            f"--model, --device: {model} cannot be run on {device}: {first_line(error)}."
        ) from None
    capped = known and getattr(replay.text_config, "attn_logit_softcapping", None)
    if not known or capped or any(hasattr(part, "sinks") for part in parts):
        raise UnsupportedModelError(
            f"--model: {model} is not built like Llama, and does not run by replay; choose a "
            "Llama-like model (Llama, Mistral, Qwen2, Qwen3, SmolLM)."
        )
    check_full_or_windowed(replay)
    return replay


_PARTS = ("o_proj", "head_dim", "scaling")


def _check_fits_model(config: CompressionConfig, token_ids: list[int], replay: Replay) -> None:
    fields = replay.text_config
    if max(token_ids) >= fields.vocab_size:
        raise ConfigError(
            f"--model: its tokenizer makes token ids up to {max(token_ids)}, and the model takes "
            f"them below {fields.vocab_size}; tokenizer and weights are not of one model."
        )
    policy = config.build_policy()
    turns_alike = policy.rerotates_keys or config.codebook is not None
    turning = keys_turn(SimpleNamespace(hf_text_config=fields))
    if turns_alike and turning is Turning.PARTLY:
        raise ConfigError(
            f"--kv-compression: {config.policy.name} turns keys by whole positions, alike in all "
            "layers, and some layers of the model have no rotary embedding; choose another policy."
        )
    if (turns_alike or policy.needs_rotary) and turning is Turning.UNKNOWN:
        raise ConfigError(
            f"--kv-compression: {config.policy.name} turns keys or queries by whole positions, "
            "and the model scales its rotary embedding, or what it has turned; choose another "
            "policy."
        )


# --- what survives ------------------------------------------------------------------------


def bins_of(length: int, num_bins: int) -> npt.NDArray[np.int64]:
    """Number of the stretch of the prompt that each token is in; no more stretches than tokens."""
    return np.arange(length) * min(num_bins, length) // length


def binned(shares: npt.NDArray[np.float64], num_bins: int) -> list[float]:
    """Mean of each stretch of `bins_of`."""
    numbers = bins_of(len(shares), num_bins)
    return (np.bincount(numbers, weights=shares) / np.bincount(numbers)).tolist()


@dataclass(frozen=True)
class Answers:
    """Greedy answers, without what follows the end of sequence.

    Attributes
    ----------
    whole, compressed : str
        Over the whole cache, and over the survivors.
    num_tokens : int
        Tokens of the first.
    num_equal : int
        Tokens at the beginning that are the same.
    """

    whole: str
    compressed: str
    num_tokens: int
    num_equal: int


class LayerSet(NamedTuple):
    """Some layers that are shown as one row.

    Attributes
    ----------
    group : int
        Their layer group.
    layers : list[int]
        Numbers.
    leader : int or None
        The layer that chooses for all of them; None where each chooses for itself.
    is_coded : bool
        Whether survivors are stored as a codebook.
    """

    group: int
    layers: list[int]
    leader: int | None
    is_coded: bool


@dataclass(frozen=True)
class Inspection:
    """What a setting keeps of a prompt.

    Attributes
    ----------
    prompt, setting
        What was looked at.
    kept : ndarray of bool, [L, KV, n]
        Whether a layer's KV head keeps a token.
    group_of : dict[int, int]
        By number, the layer group of every layer that can be compacted: all but windowed ones.
    layers : list[int]
        Layers that the picture is of.
    notes : list[str]
        Sentences about what the picture does not show, or why everything is kept.
    answers : Answers or None
        None where none were asked for.
    """

    prompt: InspectedPrompt
    setting: InspectedSetting
    kept: Kept
    group_of: dict[int, int]
    layers: list[int]
    notes: list[str]
    answers: Answers | None = None

    @property
    def full(self) -> list[int]:
        """Layers that can be compacted."""
        return list(self.group_of)

    @property
    def all_layers(self) -> str:
        """What these are called."""
        return "all layers" if len(self.full) == len(self.kept) else "all full layers"

    @property
    def kept_share(self) -> float:
        """Share of their tokens that is kept, over all heads."""
        return float(self.kept[self.full].mean())

    @property
    def shares(self) -> npt.NDArray[np.float64]:
        """Per token the share of the shown layers' heads that keep it, [n]."""
        return self.kept[self.layers].mean(axis=(0, 1))

    def piece_shares(self) -> list[float]:
        """The same per piece: the mean of its tokens."""
        shares = self.shares
        return [float(shares[each.start : each.end].mean()) for each in self.prompt.pieces]

    def histogram(self, num_bins: int) -> list[float]:
        """`shares` averaged over stretches of the prompt, see `bins_of`."""
        return binned(self.shares, num_bins)

    def needle_shares(self) -> npt.NDArray[np.float64] | None:
        """Share of the needle's tokens that survives, [L, KV]; None without a needle."""
        needle = self.prompt.needle
        return None if needle is None else self.kept[:, :, needle].mean(axis=2)

    def rows(self, each_layer: bool = False) -> list[LayerSet]:
        """The shown layers by layer group and leader, or one by one."""
        config = self.setting.config
        groups = list(self.group_of.values())
        coded = coded_groups(config.codebook, max(groups) + 1)
        policy = config.build_policy()
        places = score_leaders(groups, policy.layers_per_ranking)
        leaders = {layer: self.full[place] for layer, place in zip(self.full, places, strict=True)}
        found: list[LayerSet] = []
        for layer in self.layers:
            group = self.group_of[layer]
            leader = leaders[layer] if policy.shares_scores else None
            if not each_layer and found and (found[-1].group, found[-1].leader) == (group, leader):
                found[-1].layers.append(layer)
                continue
            found.append(LayerSet(group, [layer], leader, group in coded))
        return found


def inspect_prompt(
    replay: Replay,
    prompt: InspectedPrompt,
    setting: InspectedSetting,
    layers: Sequence[int] = (),
    tokenizer: Any = None,
    max_tokens: int = 0,
) -> Inspection:
    """Run a prompt and look which of its tokens a setting keeps.

    Parameters
    ----------
    replay : Replay
        From `load_replay`.
    prompt, setting
        From `read_prompt` and `resolve_setting`.
    layers : sequence of int
        Layers to show; none shows all.
    tokenizer, max_tokens
        For the answers; 0 makes none.

    Raises
    ------
    ConfigError
        If a layer does not exist, or the setting does not fit the model.
    """
    num_layers, config, ids = len(replay.layers), setting.config, prompt.token_ids
    full = list(replay.full_layers)
    for layer in layers:
        if not 0 <= layer < num_layers:
            raise ConfigError(
                f"--layers: there is no layer {layer}; allowed: 0 to {num_layers - 1}."
            )
        if layer not in full:
            raise ConfigError(
                f"--layers: layer {layer} keeps its window of tokens, whatever the setting; "
                f"allowed: {', '.join(map(str, full))}."
            )
    _check_fits_model(config, ids, replay)
    prefilled, seed = replay.prefill(ids), prompt_seed(ids)
    kept = np.zeros((num_layers, len(prefilled.keys[0]), len(ids)), dtype=np.bool_)
    for layer, positions in enumerate(replay.survivors(prefilled, config, seed)):
        np.put_along_axis(kept[layer], positions.cpu().numpy(), True, axis=1)
    answers = None
    if max_tokens:
        whole = replay.generate(prefilled, None, max_tokens)
        compressed = replay.generate(prefilled, config, max_tokens, seed)
        answers = _answers(replay, tokenizer, whole, compressed)
    return Inspection(
        prompt=prompt,
        setting=setting,
        kept=kept,
        group_of=dict(zip(full, layer_groups(len(full), config.layer_groups), strict=True)),
        layers=sorted(set(layers)) or full,
        notes=list(_notes(config, replay, len(ids))),
        answers=answers,
    )


def _answers(replay: Replay, tokenizer: Any, *tokens: list[int]) -> Answers:
    stops = getattr(replay.model.generation_config, "eos_token_id", None)
    ends = set(stops if isinstance(stops, list) else [stops])
    whole, compressed = (
        each[: next((i for i, token in enumerate(each) if token in ends), len(each))]
        for each in tokens
    )
    pairs = zip(whole, compressed, strict=False)
    equal = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(whole), len(compressed)))
    texts = [tokenizer.decode(each, skip_special_tokens=True) for each in (whole, compressed)]
    return Answers(texts[0], texts[1], len(whole), equal)


def _notes(config: CompressionConfig, replay: Replay, length: int) -> Sequence[str]:
    notes = []
    some = replay.layers[replay.full_layers[0]].self_attn
    codes = codes_per_row(some.head_dim * replay.model.dtype.itemsize)
    groups = max(layer_groups(len(replay.full_layers), config.layer_groups)) + 1
    if num_windowed := len(replay.layers) - len(replay.full_layers):
        notes.append(
            f"{num_windowed} further layers keep the last {replay.text_config.sliding_window} "
            "tokens by themselves, whatever the setting; they are neither shown nor counted."
        )
    if not config.compresses_prompts:
        notes.append(
            f"the trigger {config.trigger} compresses only while decoding, every {config.interval} "
            "generated tokens, so the prompt is whole when it ends."
        )
    elif length < config.min_prompt_len:
        notes.append(
            f"the prompt has {length} tokens, fewer than min_prompt_len ({config.min_prompt_len}), "
            "so the server leaves it whole."
        )
    elif not any(compaction_lengths(length, config, groups, replay.block_size, codes)):
        notes.append("the budget leaves no whole block to free, so the prompt stays whole.")
    elif config.waits_for_pressure:
        notes.append("shown is the end of a prompt that started while memory was scarce.")
    elif config.compresses_while_decoding:
        notes.append("shown is the end of the prompt; decoding compresses further.")
    if len(marks_of(replay, length, config)) > 1:
        notes.append(
            f"shown is the end of the prompt, which is compacted every {config.prompt_interval} "
            "tokens inside, too: answers over the whole cache are those of an uncompressed prompt."
        )
    if config.mode == "draft":
        notes.append(
            "the mode draft evicts nothing: shown is what the view keeps that is drafted over."
        )
    return notes
