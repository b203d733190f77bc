"""Conversations that go on over what was kept, on transformers: a reference for `kv_session`.

A later turn's tokens are computed one by one over the survivors of the turns before, at their own
positions; then what is there is compacted again. Only scoring and selection are the worker's own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from vllm_kvcompress.config.settings import CompressionConfig
from vllm_kvcompress.core.turns import window_read
from vllm_kvcompress.evaluation.replay import Prefilled, Replay
from vllm_kvcompress.evaluation.replay_marks import computed_under
from vllm_kvcompress.evaluation.replay_rows import RowsOfPrompt
from vllm_kvcompress.lengths.budgets import (
    after_compaction,
    forced_ranges,
    layer_groups,
    next_lengths,
    permanent_ranges,
)
from vllm_kvcompress.plans import CompactionPlan, GroupCache, GroupPlan
from vllm_kvcompress.worker.batch import CompactionJob
from vllm_kvcompress.worker.compaction.compactor import Compactor, QuerySources

Rows = list[tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Given:
    """Queries [H, window, D] of every layer, as the compactor asks for them."""

    queries: list[torch.Tensor]

    def take(self, request_id: str, layer_name: str, end: int) -> torch.Tensor:
        return self.queries[int(layer_name)]


class Conversation:
    """One conversation, turn by turn.

    Attributes
    ----------
    num_reused : list[int]
        Tokens of each turn's prompt that were not computed again.
    """

    def __init__(self, replay: Replay, config: CompressionConfig) -> None:
        self.replay, self.config = replay, config
        self.num_reused: list[int] = []
        self._groups = layer_groups(len(replay.layers), config.layer_groups)
        self._caches: list[GroupCache] = []
        self._rows: Rows = []
        self._text: list[int] = []
        self._compacted_at = 0

    @torch.inference_mode()
    def say(self, prompt: Sequence[int], num_tokens: int) -> list[int]:
        """Greedy tokens behind a prompt that goes on from the last one and its answer."""
        window = window_read(self.config)
        known = len(self._text)
        assert list(prompt[:known]) == self._text
        start = min(known, len(prompt) - window)
        self.num_reused.append(start)
        if start == 0:
            prefilled = self.replay.prefill(prompt)
            # Anew and part by part, where the setting compacts inside the prompt.
            prefilled = computed_under(self.replay, prefilled, self.config, seed=0)
            rows = list(zip(prefilled.keys, prefilled.values, strict=True))
            queries = [each[:, -window:] for each in prefilled.queries]
            first, held = prefilled.first_token, GroupCache(0, self._permanent(prompt))
            self._caches = [held] * (max(self._groups) + 1)
            if prefilled.held is not None:
                self._caches = list(prefilled.held.caches)
                self._compacted_at = prefilled.held.position
        else:
            assert start >= self._compacted_at, "the reference goes back behind a compaction"
            cache = self._as_cache(start)
            first, queries = self._read(cache, prompt, start)
            rows = self._of(cache)
        self._compact(rows, [each[:, -window:] for each in queries], len(prompt))
        cache = self._as_cache(len(prompt))
        answer = self._answer(cache, first, len(prompt), num_tokens)
        self._rows = self._of(cache)
        self._text = [*prompt, *answer[:-1]]
        return answer

    @torch.inference_mode()
    def go_on(self, prompt: Sequence[int], num_tokens: int) -> list[int]:
        """Greedy tokens behind a prompt that goes on from the last one; nothing is compacted.

        What was said last stays as it is, for others to go on from.
        """
        known = len(self._text)
        assert list(prompt[:known]) == self._text and len(prompt) > known
        cache = self._as_cache(known)
        first, _ = self._read(cache, prompt, known)
        return self._answer(cache, first, len(prompt), num_tokens)

    def _answer(
        self, cache: DynamicCache, first: int, prompt_len: int, num_tokens: int
    ) -> list[int]:
        answer = [first]
        while len(answer) < num_tokens:
            place = prompt_len + len(answer) - 1
            answer.append(self.replay.next_token(cache, answer[-1], place))
        return answer

    def _permanent(self, prompt: Sequence[int]) -> Any:
        return permanent_ranges(len(prompt), self.config)

    def _held_at(self, position: int) -> list[GroupCache]:
        grown = position - self._compacted_at
        return [GroupCache(each.num_tokens + grown, each.permanent) for each in self._caches]

    def _as_cache(self, position: int) -> DynamicCache:
        """What the layers hold of the first `position` tokens."""
        held, cache = self._held_at(position), DynamicCache(config=self.replay.text_config)
        for layer, (keys, values) in enumerate(self._rows):
            count = held[self._groups[layer]].num_tokens
            cache.update(keys[None, :, :count], values[None, :, :count], layer)
        return cache

    def _of(self, cache: DynamicCache) -> Rows:
        return [(layer.keys[0], layer.values[0]) for layer in cache.layers]

    def _read(
        self, cache: DynamicCache, prompt: Sequence[int], start: int
    ) -> tuple[int, list[torch.Tensor]]:
        """Compute the rest of a prompt token by token: what follows, and all its queries."""
        found: list[dict[int, torch.Tensor]] = []
        token = -1
        for position in range(start, len(prompt)):
            self.replay._queries = queries = {}
            token = self.replay.next_token(cache, prompt[position], position)
            found.append(queries)
        self.replay._queries = None
        layers = range(len(self.replay.layers))
        return token, [torch.cat([each[layer] for each in found], dim=1) for layer in layers]

    def _compact(self, rows: Rows, queries: list[torch.Tensor], position: int) -> None:
        """As the scheduler plans and the worker does it, at the end of a prompt."""
        held, config = self._held_at(position), self.config
        lengths = next_lengths(position, position, held, config, self.replay.block_size)
        prompt = Prefilled([0] * position, self.replay.rotary)
        prompt.keys, prompt.values = ([row[n] for row in rows] for n in (0, 1))
        layouts = [RowsOfPrompt(prompt, layer) for layer in range(len(rows))]
        compactor = Compactor(
            layers=[self.replay.layer_cache(n, layout) for n, layout in enumerate(layouts)],
            num_layers=len(layouts),
            sources=QuerySources(Given(queries), None, None),  # type: ignore[arg-type]
            device=self.replay.device,
            all_reduce=lambda tensor: tensor,
            num_ranks=1,
            first_kv_head=0,
        )
        window, groups = config.observation_window, []
        for group in self._groups:
            each, cache = lengths[group], held[group]
            forced = forced_ranges(cache, window)
            groups.append(GroupPlan(each, cache, forced, (), (), ()) if each else None)
        plan = CompactionPlan("reference", position, False, 0, tuple(groups))
        compactor.run([CompactionJob(plan, config, 0)])
        self._rows = []
        for (keys, values), layout, group in zip(rows, layouts, self._groups, strict=True):
            if lengths[group] is not None:
                assert layout.kept is not None
                region = lengths[group].region_len
                both = zip(layout.kept, (keys, values), strict=True)
                keys, values = (torch.cat([kept, row[:, region:]], dim=1) for kept, row in both)
            self._rows.append((keys, values))
        self._caches = [
            after_compaction(cache, each) if each else cache
            for cache, each in zip(held, lengths, strict=True)
        ]
        self._compacted_at = position
