"""Several compressed caches of one prompt, decoded together.

A small model's step on a CPU takes as long for twelve caches as for one, because it reads the
weights once. Caches of unequal lengths are padded on the left; a mask per layer leaves the padding
out, so that every cache gives the tokens that it gives alone (tests/evaluation/test_replay_batch.py
holds that).
"""

from collections.abc import Sequence

import torch
from transformers import DynamicCache

from vllm_kvcompress.errors import UnsupportedModelError
from vllm_kvcompress.evaluation.replay import Replay
from vllm_kvcompress.lengths.layer_kinds import layer_types
from vllm_kvcompress.lengths.layer_words import STATE

Rows = Sequence[tuple[torch.Tensor, torch.Tensor]]
"""Of every layer, keys and values [KV, kept, D]."""


class ReplayBatch:
    """Compressed caches of one prompt.

    Parameters
    ----------
    replay : Replay
        The model.
    caches : sequence of Rows
        One entry per setting; layers and settings may keep different numbers of tokens.
    length : int
        Tokens of the prompt that the caches stand for: the position of what comes next.

    Raises
    ------
    UnsupportedModelError
        If a layer has a recurrent state, which rows do not tell.
    """

    def __init__(self, replay: Replay, caches: Sequence[Rows], length: int) -> None:
        self.replay, self.length, self.size = replay, length, len(caches)
        # Without the model's configuration, by which windowed layers would forget tokens: masks say
        # what they see.
        self.cache = DynamicCache()
        if STATE in layer_types(replay.text_config):
            raise UnsupportedModelError(
                f"{replay.text_config.name_or_path} has recurrent layers, over which several "
                "caches are not decoded together: choose a model whose layers all attend."
            )
        window = getattr(replay.text_config, "sliding_window", None)
        full = set(replay.full_layers)
        self.windows = [None if each in full else window for each in range(len(replay.layers))]
        self.masks: list[torch.Tensor] = []
        for layer in range(len(replay.layers)):
            rows = [cache[layer] for cache in caches]
            longest = max(keys.shape[1] for keys, _ in rows)
            keys, values = (
                torch.stack([_pad(pair[which], longest) for pair in rows]) for which in (0, 1)
            )
            self.cache.update(keys, values, layer)
            kept = torch.tensor([pair[0].shape[1] for pair in rows], device=replay.device)
            places = torch.arange(longest, device=replay.device)
            self.masks.append(places >= longest - kept[:, None])  # [size, longest]

    @torch.inference_mode()
    def extend(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits [size, n, vocabulary] behind `tokens` [size, n], which are appended."""
        count = tokens.shape[1]
        causal = torch.ones(count, count, dtype=torch.bool, device=tokens.device).tril()
        masks = []
        for layer, mask in enumerate(self.masks):
            new = causal.expand(self.size, 1, count, count)
            old = mask[:, None, None, :].expand(self.size, 1, count, mask.shape[1])
            seen = torch.cat([old, new], dim=-1)
            if (window := self.windows[layer]) is not None:
                # Rows of a windowed layer are the last ones, without gaps.
                behind = torch.arange(count, device=tokens.device)[:, None] + mask.shape[1]
                places = torch.arange(seen.shape[-1], device=tokens.device)
                seen = seen & (behind - places < window)
            masks.append(seen)
            self.masks[layer] = torch.cat([mask, mask.new_ones(self.size, count)], dim=-1)
        positions = torch.arange(self.length, self.length + count, device=tokens.device)
        with self.replay.masked(masks):
            output = self.replay.model(
                tokens,
                past_key_values=self.cache,
                position_ids=positions.expand(self.size, count),
                use_cache=True,
            )
        self.length += count
        return output.logits

    def decode(
        self, first: torch.Tensor, max_tokens: int, stop: frozenset[int] = frozenset()
    ) -> list[list[int]]:
        """Greedy tokens of every cache, `first` [size] being the first of them.

        Ends at `max_tokens`, and for each cache behind its first token in `stop`, which is left
        out.
        """
        tokens = first
        found: list[list[int]] = [[] for _ in range(self.size)]
        is_done = [False] * self.size
        for number in range(max_tokens):
            for index, token in enumerate(tokens.tolist()):
                is_done[index] |= token in stop
                if not is_done[index]:
                    found[index].append(token)
            if all(is_done) or number == max_tokens - 1:
                break
            tokens = self.extend(tokens[:, None])[:, -1].argmax(-1)
        return found


def _pad(rows: torch.Tensor, length: int) -> torch.Tensor:
    """Rows [KV, n, D] with zeros in front."""
    missing = length - rows.shape[1]
    return torch.nn.functional.pad(rows, (0, 0, missing, 0)) if missing else rows
