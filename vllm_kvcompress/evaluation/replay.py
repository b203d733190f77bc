"""Compaction replayed on Hugging Face transformers: the worker's own `Compactor`, another engine.

vLLM's model runner V2 spends seconds per step in Triton's interpreter on a CPU, which makes large
tables of answers impractical. A replay prefills a prompt once with transformers, hands keys, values
and queries to the `Compactor`, and decodes over what it kept. ``tests/e2e/test_replay.py`` holds
its tokens against the engine's.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AttentionInterface, AutoModelForCausalLM, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from vllm_kvcompress.budgets import (
    compaction_lengths,
    forced_ranges,
    layer_groups,
    permanent_ranges,
)
from vllm_kvcompress.kernels.rotary import Rotary
from vllm_kvcompress.plans import CompactionPlan, GroupCache, GroupPlan
from vllm_kvcompress.policies.base import Policy
from vllm_kvcompress.policies.inputs import ChunkInputs
from vllm_kvcompress.settings import CompressionConfig
from vllm_kvcompress.worker.compactor import Compactor, LayerCache, QuerySources
from vllm_kvcompress.worker.group_batch import CompactionJob
from vllm_kvcompress.worker.layout import CacheLayout

ATTENTION = "kvcompress_replay"
CHUNK = 1024


class _Rows(CacheLayout):
    """One layer's rows of the current prompt, in logical order; blocks do not matter."""

    def __init__(self, prefilled: "Prefilled", layer: int) -> None:
        self.prefilled, self.layer = prefilled, layer
        self.kept: tuple[torch.Tensor, torch.Tensor] | None = None

    def read(self, cache: torch.Tensor, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """All rows."""
        return self.prefilled.keys[self.layer], self.prefilled.values[self.layer]

    def write(
        self, cache: torch.Tensor, blocks: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        """Remember the survivors."""
        self.kept = keys, values


@dataclass
class Prefilled:
    """One prompt after its forward pass.

    Attributes
    ----------
    token_ids : list[int]
        The prompt.
    first_token : int
        What the model says next, from the whole cache.
    keys, values, queries : list[torch.Tensor]
        Per layer [KV, n, D], [KV, n, D] and [H, n, D]; keys and queries after RoPE.
    """

    token_ids: list[int]
    first_token: int = -1
    keys: list[torch.Tensor] = field(default_factory=list)
    values: list[torch.Tensor] = field(default_factory=list)
    queries: list[torch.Tensor] = field(default_factory=list)
    summaries: dict[tuple[str, str], Any] = field(default_factory=dict)


class Replay:
    """A model on transformers, CPU, float32, one prompt at a time.

    Parameters
    ----------
    model_dir : str
        Folder of a Llama-like model.
    block_size : int
        Tokens per block, for the rounding of lengths.
    """

    def __init__(self, model_dir: str, block_size: int = 32) -> None:
        AttentionInterface.register(ATTENTION, self._attend)
        AttentionMaskInterface.register(ATTENTION, sdpa_mask)
        self.model = AutoModelForCausalLM.from_pretrained(
            model_dir, dtype=torch.float32, attn_implementation=ATTENTION
        ).eval()
        self.block_size = block_size
        self.layers = self.model.model.layers
        self.rotary = Rotary(self.model.model.rotary_emb.inv_freq, is_neox=True)
        self._queries: list[torch.Tensor] | None = None

    def _attend(self, module: Any, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if self._queries is not None:
            self._queries.append(query[0])
        return sdpa_attention_forward(module, query, *args, **kwargs)

    @torch.inference_mode()
    def prefill(self, token_ids: Sequence[int]) -> Prefilled:
        """Run a prompt and keep what compactions may need."""
        self._queries = []
        output = self.model(torch.tensor([list(token_ids)]), use_cache=True, logits_to_keep=1)
        queries, self._queries = self._queries, None
        cache = output.past_key_values
        return Prefilled(
            token_ids=list(token_ids),
            first_token=int(output.logits[0, -1].argmax()),
            keys=[layer.keys[0] for layer in cache.layers],
            values=[layer.values[0] for layer in cache.layers],
            queries=queries,
        )

    @torch.inference_mode()
    def generate(
        self, prompt: Prefilled, config: CompressionConfig | None, max_tokens: int, seed: int = 0
    ) -> list[int]:
        """Greedy tokens after compressing the prompt under `config`; None compresses nothing.

        `seed` is what the scheduler
        makes of the prompt, for policies that draw random numbers.
        """
        cache = self.view(prompt, config, seed)
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
        cache = DynamicCache(config=self.model.config)
        for layer, (keys, values) in enumerate(self._compressed(prompt, config, seed)):
            cache.update(keys[None].clone(), values[None].clone(), layer)
        return cache

    @torch.inference_mode()
    def next_token(self, cache: DynamicCache, token: int, position: int) -> int:
        """The greedy token behind `token`, whose keys and values are appended to the cache."""
        output = self.model(
            torch.tensor([[token]]),
            past_key_values=cache,
            position_ids=torch.tensor([[position]]),
            use_cache=True,
        )
        return int(output.logits[0, -1].argmax())

    def _compressed(
        self, prompt: Prefilled, config: CompressionConfig | None, seed: int
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values [KV, kept, D] of every layer."""
        whole = list(zip(prompt.keys, prompt.values, strict=True))
        if config is None:
            return whole
        num_layers, length = len(self.layers), len(prompt.token_ids)
        group_of = layer_groups(num_layers, config.layer_groups)
        by_group = compaction_lengths(length, config, max(group_of) + 1, self.block_size)
        lengths = [by_group[group] for group in group_of]
        layouts = [_Rows(prompt, layer) for layer in range(num_layers)]
        compactor = Compactor(
            layers=[self._layer_cache(index, layouts[index]) for index in range(num_layers)],
            num_layers=num_layers,
            sources=QuerySources(
                window=_Window(prompt, config.observation_window),  # type: ignore[arg-type]
                prompt=_Summaries(prompt, config, self),  # type: ignore[arg-type]
                ring=None,  # type: ignore[arg-type]
            ),
            device=torch.device("cpu"),
            all_reduce=lambda tensor: tensor,
            num_ranks=1,
            first_kv_head=0,
        )
        held = GroupCache(length, permanent_ranges(length, config))
        forced = forced_ranges(held, config.observation_window)
        groups = tuple(GroupPlan(e, held, forced, (), (), ()) if e else None for e in lengths)
        plan = CompactionPlan("replay", length, False, seed, groups)
        compactor.run([CompactionJob(plan, config, 0)])
        return [
            whole[layer]
            if each is None
            else tuple(
                torch.cat([kept, rows[:, each.region_len :]], dim=1)
                for kept, rows in zip(layouts[layer].kept or (), whole[layer], strict=True)
            )
            for layer, each in enumerate(lengths)
        ]  # type: ignore[return-value]

    def _layer_cache(self, index: int, layout: CacheLayout) -> LayerCache:
        attention = self.layers[index].self_attn
        weight = attention.o_proj.weight.detach()
        projection = weight.unflatten(1, (-1, attention.head_dim)).transpose(0, 1)
        return LayerCache(
            name=str(index),
            index=index,
            group=index,
            scale=attention.scaling,
            layout=layout,
            cache=lambda: weight,
            rotary=self.rotary,
            output_projection=lambda: projection,
        )


class _Window:
    """Queries of a prompt that are all at hand."""

    def __init__(self, prompt: Prefilled, size: int) -> None:
        self.prompt, self.size = prompt, size

    def take(self, request_id: str, layer_name: str) -> torch.Tensor:
        """The observation window's queries."""
        return self.prompt.queries[int(layer_name)][:, -self.size :]


class _Summaries:
    """`Policy.accumulate` over a prompt, once per policy."""

    def __init__(self, prompt: Prefilled, config: CompressionConfig, replay: Replay) -> None:
        self.prompt, self.config, self.replay = prompt, config, replay

    def take(self, request_id: str, layer_name: str) -> Any:
        """A layer's summary."""
        policy: Policy = self.config.build_policy()
        place = (repr(policy), layer_name)
        if place not in self.prompt.summaries:
            self.prompt.summaries[place] = self._fold(policy, int(layer_name))
        return self.prompt.summaries[place]

    def _fold(self, policy: Policy, layer: int) -> Any:
        queries, keys = self.prompt.queries[layer], self.prompt.keys[layer]
        summary, length = None, queries.shape[1]
        for start in range(0, length, CHUNK):
            end = min(start + CHUNK, length)
            summary = policy.accumulate(
                summary,
                ChunkInputs(
                    queries=queries[:, start:end],
                    keys=keys[:, :end],
                    start=start,
                    prompt_len=length,
                    scale=self.replay.layers[layer].self_attn.scaling,
                    num_sink_tokens=self.config.num_sink_tokens,
                    rotary=self.replay.rotary if policy.needs_rotary else None,
                ),
            )
        return summary
