"""A prompt's cache that is compacted again while tokens are decoded over it.

Tokens behind a compaction see its survivors only, so what follows a prompt is computed part by
part, up to each length at which the scheduler would compact: the token that reaches it is the last
to see what is evicted then.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from vllm_kvcompress.config.settings import CompressionConfig
from vllm_kvcompress.errors import ConfigError
from vllm_kvcompress.evaluation.replay_compaction import compact
from vllm_kvcompress.evaluation.replay_marks import Held, positions_of
from vllm_kvcompress.evaluation.replay_rows import KeptRows
from vllm_kvcompress.lengths.budgets import layer_groups
from vllm_kvcompress.lengths.schedule import Compaction, compactions

if TYPE_CHECKING:
    from vllm_kvcompress.evaluation.replay import Prefilled, Replay


def is_compacted_behind(config: CompressionConfig | None, num_tokens: int) -> bool:
    """Whether `num_tokens` tokens behind a prompt reach a compaction of it that others see.

    Raises
    ------
    ConfigError
        If they reach an extension of a codebook, which is not replayed.
    """
    if config is None or num_tokens <= config.interval:
        return False
    if config.extends_codebooks:
        raise ConfigError(
            f"codebook.extend: {num_tokens} tokens follow, an interval has {config.interval}, and "
            "only vLLM codes them: measure it in vLLM, predict fewer tokens, or set "
            "codebook.extend to false."
        )
    return config.compacts_at_intervals


class Decoding:
    """One prompt and what follows it.

    Parameters
    ----------
    replay : Replay
        The model.
    prompt : Prefilled
        Stays as it is.
    config : CompressionConfig
        The request's setting.
    seed : int
        Of policies that draw random numbers.

    Attributes
    ----------
    position : int
        Tokens of prompt and continuation so far.
    kept : list[KeptRows]
        What every layer holds of them.
    """

    def __init__(
        self, replay: "Replay", prompt: "Prefilled", config: CompressionConfig, seed: int = 0
    ) -> None:
        self.replay, self.config, self.seed = replay, config, seed
        self.prompt = replay.under(prompt, config, seed)
        self.kept: Sequence[KeptRows] = replay.kept(self.prompt, config, seed)
        self.position = length = len(prompt.token_ids)
        self._states = self.prompt.states
        self._queries = self._last(self.prompt.queries)
        self._shares: list[float] = []
        groups = max(layer_groups(len(replay.full_layers), config.layer_groups)) + 1
        every = compactions(length, replay.longest, config, groups, replay.block_size)
        self._following = (each for each in every if each.position > length)
        self._due = next(self._following, None)

    @property
    def mean_kept(self) -> float:
        """Share of the tokens so far that was held, a mean over the tokens that followed.

        Where none followed: the prompt's.
        """
        shares = self._shares or [self._share(0)]
        return sum(shares) / len(shares)

    @torch.inference_mode()
    def extend(self, tokens: Sequence[int]) -> torch.Tensor:
        """Logits [n, vocabulary] behind each of the `n` tokens, which are appended."""
        logits, tokens = [], list(tokens)
        while tokens:
            room = len(tokens) if self._due is None else self._due.position - self.position
            logits.append(self._append(tokens[:room]))
            tokens = tokens[room:]
            if self._due is not None and self.position == self._due.position:
                self._compact(self._due)
                self._due = next(self._following, None)
        return torch.cat(logits)

    def greedy(self, first: int, max_tokens: int, stop: frozenset[int] = frozenset()) -> list[int]:
        """`first` and the tokens behind it, up to one in `stop`, which is left out."""
        found: list[int] = []
        token = first
        while token not in stop:
            found.append(token)
            if len(found) >= max_tokens:
                break
            token = int(self.extend([token])[-1].argmax())
        return found

    def _append(self, tokens: list[int]) -> torch.Tensor:
        start, end = self.position, self.position + len(tokens)
        part = self.replay.forward(tokens, self.kept, start, self._states, logits_to_keep=0)
        positions = positions_of(part, self.kept, start, end)
        self.kept = [
            KeptRows(*rows) for rows in zip(part.keys, part.values, positions, strict=True)
        ]
        pairs = zip(self._queries, part.queries, strict=True)
        self._queries = self._last([torch.cat(pair, dim=1) for pair in pairs])
        self._states, self.position = part.states, end
        # While these tokens were decoded one by one the cache grew to what it is now.
        self._shares += map(self._share, range(len(tokens)))
        return part.logits

    def _share(self, num_less: int) -> float:
        """Of all tokens, how many are held in layers that attend to everything; so many ago."""
        rows = [self.kept[layer].keys.shape[1] for layer in self.replay.full_layers]
        return (sum(rows) / len(rows) - num_less) / (self.position - num_less)

    def _last(self, queries: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Those of the observation window, and no view of all."""
        return [each[:, -self.config.observation_window :].clone() for each in queries]

    def _compact(self, due: Compaction) -> None:
        positions = [each.positions for each in self.kept]
        part = replace(
            self.prompt,
            keys=[each.keys for each in self.kept],
            values=[each.values for each in self.kept],
            queries=self._queries,
            states=self._states,
            summaries={},
            held=Held(self.config, self.seed, self.position, tuple(due.before), positions),
        )
        kept = list(self.kept)
        for layer, (layout, region) in compact(self.replay, part, self.config, self.seed).items():
            kept[layer] = layout.kept_rows(kept[layer], region)
        self.kept = kept
