"""Compaction replayed on Hugging Face transformers: the worker's own `Compactor`, another engine.

vLLM's model runner V2 spends seconds per step in Triton's interpreter on a CPU, which makes large
tables of answers impractical. A replay prefills a prompt once with transformers, hands keys, values
and queries to the `Compactor`, and decodes over what it kept. ``tests/e2e/test_replay.py`` holds
its tokens against the engine's.
"""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import AttentionInterface, AutoModelForCausalLM, DynamicCache
from transformers.masking_utils import AttentionMaskInterface

from vllm_kvcompress.config.settings import CompressionConfig
from vllm_kvcompress.errors import UnsupportedModelError
from vllm_kvcompress.evaluation.replay_attention import (
    attention_and_mask,
    find_rotary,
    softmax_terms,
)
from vllm_kvcompress.evaluation.replay_compaction import compact
from vllm_kvcompress.evaluation.replay_decoding import Decoding, is_compacted_behind
from vllm_kvcompress.evaluation.replay_marks import Held, computed_under
from vllm_kvcompress.evaluation.replay_rows import KeptRows
from vllm_kvcompress.evaluation.replay_states import (
    attention_of,
    output_weight,
    rows_of,
    states_of,
    with_states,
)
from vllm_kvcompress.host.attention_probe import ProbedLayer, probe
from vllm_kvcompress.kernels.formulas.rotary import Rotary
from vllm_kvcompress.lengths.layer_kinds import full_layers
from vllm_kvcompress.worker.layout.base import CacheLayout
from vllm_kvcompress.worker.layout.layer_cache import LayerCache

ATTENTION = "kvcompress_replay"
_numbers = itertools.count()


@dataclass
class Prefilled:
    """One prompt after its forward pass.

    Attributes
    ----------
    token_ids : list[int]
        The prompt.
    rotary : Rotary or None
        The model's rotary embedding.
    first_token : int
        What the model says next, from the whole cache.
    logits : torch.Tensor
        [n, vocabulary] float, of the last tokens.
    keys, values, queries : list[torch.Tensor]
        Per layer [KV, n, D], [KV, n, D] and [H, n, D]; keys and queries after RoPE. Of a windowed
        layer the cache holds the last tokens only, of a recurrent one none.
    states : dict
        Of recurrent layers, by number, what transformers' cache holds.
    held : Held or None
        Where it was computed under a setting that compacts inside it, what is there of it.
    """

    token_ids: list[int]
    rotary: Rotary | None
    first_token: int = -1
    logits: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    keys: list[torch.Tensor] = field(default_factory=list)
    values: list[torch.Tensor] = field(default_factory=list)
    queries: list[torch.Tensor] = field(default_factory=list)
    states: dict[int, Any] = field(default_factory=dict)
    summaries: dict[tuple[str, str], Any] = field(default_factory=dict)
    held: Held | None = None


@dataclass(frozen=True)
class Compressed:
    """What a setting makes of a prompt.

    Attributes
    ----------
    cache : DynamicCache
        Per layer [1, KV, kept, D]; layers may keep different numbers of tokens.
    num_entries : list[torch.Tensor | None]
        Per layer [2, KV] int64: entries of the keys' and of the values' book; None without a book.
    """

    cache: DynamicCache
    num_entries: list[torch.Tensor | None]


class Replay:
    """A model on transformers, one prompt at a time.

    Parameters
    ----------
    model_dir : str
        Folder of a Llama-like model.
    block_size : int
        Tokens per block, for the rounding of lengths.
    dtype : torch.dtype, default float32
        Of weights and caches.
    device : str, default "cpu"
        Where everything happens. Only "cpu" is held against the engine by a test.
    """

    def __init__(
        self,
        model_dir: str,
        block_size: int = 32,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
    ) -> None:
        attention = f"{ATTENTION}_{next(_numbers)}"  # one each: several may live in a process
        AttentionInterface.register(attention, self._attend)
        self.device = torch.device(device)
        model = self._load(model_dir, dtype, attention)
        self.model = model.to(self.device).eval()
        self.block_size = block_size
        decoder = self.model.get_decoder()
        self.layers, self.text_config = decoder.layers, decoder.config
        self.longest = int(self.text_config.max_position_embeddings)
        self.full_layers = full_layers(self.text_config, self.longest)
        if not self.full_layers:
            raise UnsupportedModelError(
                "--model: no layer of it attends to everything, so there is nothing to compress: "
                "choose a model with such layers."
            )
        some = attention_of(self.layers[self.full_layers[0]])
        self._attention, mask = attention_and_mask(some)
        AttentionMaskInterface.register(attention, mask)
        self.rotary = find_rotary(decoder)
        probed = probe(self.text_config)
        self.rotaries = [
            self.rotary if found is None else Rotary(found.inv_freq.to(self.device), found.is_neox)
            for found in (
                probed.get(number, ProbedLayer()).rotary for number in range(len(self.layers))
            )
        ]
        self._queries: dict[int, torch.Tensor] | None = None
        self._masks: Sequence[torch.Tensor] | None = None

    def _load(self, model_dir: str, dtype: torch.dtype, attention: str) -> Any:
        """The model, whose language model attends by what is registered as `attention`."""
        return AutoModelForCausalLM.from_pretrained(
            model_dir, dtype=dtype, attn_implementation=attention
        )

    def _attend(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> Any:
        if self._queries is not None:
            self._queries[module.layer_idx] = query[0]
        if self._masks is not None:
            attention_mask = self._masks[module.layer_idx]
        return self._attention(module, query, key, value, attention_mask, **kwargs)

    @contextmanager
    def masked(self, masks: Sequence[torch.Tensor] | None) -> Iterator[None]:
        """Attend under these masks, bool [batch, 1, n, cache length] per layer, True is seen.

        Transformers make one mask for all layers, which may hold different numbers of tokens here.
        """
        self._masks = masks
        try:
            yield
        finally:
            self._masks = None

    def prefill(self, token_ids: Sequence[int]) -> Prefilled:
        """Run a prompt and keep what compactions may need."""
        return self.forward(list(token_ids))

    @torch.inference_mode()
    def forward(
        self,
        token_ids: list[int],
        kept: Sequence[KeptRows] = (),
        start: int = 0,
        states: dict[int, Any] | None = None,
        logits_to_keep: int = 1,
    ) -> Prefilled:
        """Run tokens from position `start` on over what is kept of those before them.

        Keys and values are then those that are kept, and the new ones; queries are the new ones,
        and logits those of every step's last `logits_to_keep` tokens, 0 for all.
        """
        cache, steps = None, [token_ids]
        if kept:
            rows = [self._as_cached(each.keys, each.values) for each in kept]
            cache = with_states(DynamicCache(config=self.text_config), states or {}, rows)
            if states:  # from which transformers go on by single tokens only
                steps = [[token] for token in token_ids]
        collected: list[dict[int, torch.Tensor]] = []
        logits: list[torch.Tensor] = []
        for step in steps:
            masks = None
            if kept and len(step) > 1:
                held = [each.keys.shape[1] for each in kept]
                masks = [self._part_mask(layer, len(step), n) for layer, n in enumerate(held)]
            self._queries = {}
            with self.masked(masks):
                output = self.model(
                    torch.tensor([step], device=self.device),
                    past_key_values=cache,
                    position_ids=torch.arange(start, start + len(step), device=self.device)[None],
                    use_cache=True,
                    logits_to_keep=logits_to_keep,
                )
            collected.append(self._queries)
            logits.append(output.logits[0])
            cache, self._queries, start = output.past_key_values, None, start + len(step)
        keys, values = zip(*rows_of(cache), strict=True)
        queries = {
            layer: torch.cat([each[layer] for each in collected], dim=1) for layer in collected[0]
        }
        none = next(iter(queries.values()))[:, :0]
        return Prefilled(
            token_ids=token_ids,
            rotary=self.rotary,
            first_token=int(logits[-1][-1].argmax()),
            logits=torch.cat(logits),
            keys=list(keys),
            values=list(values),
            queries=[queries.get(number, none) for number in range(len(keys))],
            states=states_of(cache),
        )

    def _part_mask(self, layer: int, count: int, held: int) -> torch.Tensor:
        """What `count` tokens see of `held` cached ones and of each other, [1, 1, count, n]."""
        behind = torch.arange(held, held + count, device=self.device)[:, None]
        distance = behind - torch.arange(held + count, device=self.device)
        seen = distance >= 0
        if layer not in self.full_layers:  # its rows are the last ones, without gaps
            seen &= distance < self.text_config.sliding_window
        return seen[None, None]

    @torch.inference_mode()
    def generate(
        self, prompt: Prefilled, config: CompressionConfig | None, max_tokens: int, seed: int = 0
    ) -> list[int]:
        """Greedy tokens after compressing the prompt under `config`; None compresses nothing.

        `seed` is what the scheduler makes of the prompt, for policies that draw random numbers.
        """
        prompt = self.under(prompt, config, seed)
        if config is not None and is_compacted_behind(config, max_tokens - 1):
            return Decoding(self, prompt, config, seed).greedy(prompt.first_token, max_tokens)
        return self.decode(prompt, self.view(prompt, config, seed), max_tokens)

    @torch.inference_mode()
    def under(
        self, prompt: Prefilled, config: CompressionConfig | None, seed: int = 0
    ) -> Prefilled:
        """The prompt as `config` has it computed, with the first token that is said then.

        Where `config` compacts inside prompts, that is another computation: see replay_marks.py.
        """
        return computed_under(self, prompt, config, seed)

    @torch.inference_mode()
    def decode(self, prompt: Prefilled, cache: DynamicCache, max_tokens: int) -> list[int]:
        """Greedy tokens over a view of the prompt, to which theirs are appended."""
        tokens = [prompt.first_token]
        while len(tokens) < max_tokens:
            position = len(prompt.token_ids) + len(tokens) - 1
            tokens.append(self.next_token(cache, tokens[-1], position))
        return tokens

    @torch.inference_mode()
    def view(
        self, prompt: Prefilled, config: CompressionConfig | None, seed: int = 0
    ) -> DynamicCache:
        """A cache of what `config` keeps of the prompt; None keeps all. The prompt stays as it is.

        Per layer [1, KV, kept, D]; layers may keep different numbers of tokens.
        """
        return self.compress(prompt, config, seed).cache

    @torch.inference_mode()
    def compress(
        self, prompt: Prefilled, config: CompressionConfig | None, seed: int = 0
    ) -> Compressed:
        """The `view`, and what its codebooks hold."""
        rows, num_entries = self.rows(prompt, config, seed)
        empty = DynamicCache(config=self.text_config)
        rows = [self._as_cached(keys, values) for keys, values in rows]
        return Compressed(with_states(empty, prompt.states, rows), num_entries)

    def _as_cached(
        self, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the model's cache has in the place of keys and values of survivors."""
        return keys, values

    @torch.inference_mode()
    def next_token(self, cache: DynamicCache, token: int, position: int) -> int:
        """The greedy token behind `token`, whose keys and values are appended to the cache."""
        output = self.model(
            torch.tensor([[token]], device=self.device),
            past_key_values=cache,
            position_ids=torch.tensor([[position]], device=self.device),
            use_cache=True,
        )
        return int(output.logits[0, -1].argmax())

    @torch.inference_mode()
    def rows(
        self, prompt: Prefilled, config: CompressionConfig | None, seed: int = 0
    ) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], list[torch.Tensor | None]]:
        """Keys and values [KV, kept, D] of every layer, and the entries of its books.

        Where nothing is evicted they are the prompt's own.
        """
        found = self.kept(prompt, config, seed)
        return [(each.keys, each.values) for each in found], [each.num_entries for each in found]

    @torch.inference_mode()
    def survivors(
        self, prompt: Prefilled, config: CompressionConfig | None, seed: int = 0
    ) -> list[torch.Tensor]:
        """Positions that `config` keeps of the prompt, per layer [KV, kept] int64; None keeps all.

        Those of the region, in the order in which they are written, then what lies behind it.
        """
        return [each.positions for each in self.kept(prompt, config, seed)]

    @torch.inference_mode()
    def kept(
        self, prompt: Prefilled, config: CompressionConfig | None, seed: int = 0
    ) -> list[KeptRows]:
        """What every layer keeps of the prompt; windowed and recurrent layers what they have."""
        prompt = self.under(prompt, config, seed)
        everything = torch.arange(len(prompt.token_ids), device=self.device)
        found = [
            KeptRows(
                keys, values, everything[len(everything) - keys.shape[1] :].expand(len(keys), -1)
            )
            for keys, values in zip(prompt.keys, prompt.values, strict=True)
        ]
        if config is None:
            return found
        if prompt.held is not None:
            places = prompt.held.positions
            found = [replace(each, positions=p) for each, p in zip(found, places, strict=True)]
        for layer, (layout, region) in compact(self, prompt, config, seed).items():
            found[layer] = layout.kept_rows(found[layer], region)
        return found

    def layer_cache(self, place: int, layout: CacheLayout) -> LayerCache:
        """The layer at `place` among those that can be compacted."""
        number = self.full_layers[place]
        attention = attention_of(self.layers[number])
        weight = output_weight(attention)
        # Of this layer: those of Gemma 4 have heads of their own, in number and in size.
        heads = weight.shape[1] // attention.head_dim // attention.num_key_value_groups
        shape, dtype = (0, heads, self.block_size, 2 * attention.head_dim), self.model.dtype
        no_blocks = torch.empty(shape, dtype=dtype, device=self.device)
        projection = weight.unflatten(1, (-1, attention.head_dim)).transpose(0, 1)
        return LayerCache(
            name=str(number),
            index=place,
            group=place,
            scale=attention.scaling,
            layout=layout,
            cache=lambda: no_blocks,
            rotary=self.rotaries[number],
            output_projection=lambda: projection,
            terms=softmax_terms(attention),
        )
