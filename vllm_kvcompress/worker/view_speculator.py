"""The model drafts for itself over a compressed view of its own cache.

After a step, the request's cache is exact up to the token before the one just sampled. A draft
step runs the model on that token (then on its own drafts), attending to the view and the tail. The
keys it writes go to the slots where the verification will write the exact ones: nothing needs to
be undone. What is accepted is decided by vLLM's own rejection sampler from a pass over the whole
cache, so the output does not depend on the view. (arXiv 2404.14897, self-drafting with exact
verification; MagicDec, 2408.11049, drafts over a compressed cache likewise.)

Dimensions: G KV cache groups, B batch rows, d rows that draft, k draft tokens, T tokens.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.forward_context import BatchDescriptor, set_forward_context
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.gpu.attn_utils import build_attn_metadata, build_slot_mappings_by_layer
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.spec_decode.speculator import BaseSpeculator

from vllm_kvcompress.kernels.block_tables import BlockTables
from vllm_kvcompress.kernels.dispatch import for_device
from vllm_kvcompress.worker.draft_views import DraftViews
from vllm_kvcompress.worker.state import CompressionState


class ViewSpeculator(BaseSpeculator):
    """Drafts greedily, k tokens for every request that has a view.

    Parameters
    ----------
    vllm_config : VllmConfig
        The engine's configuration.
    model : torch.nn.Module
        The target model.
    device : torch.device
        Where it runs.
    """

    supports_mm_inputs = False
    # Greedy drafts: the rejection sampler takes a draft's own probability as 1.
    draft_logits = None

    def __init__(self, vllm_config: VllmConfig, model: torch.nn.Module, device: torch.device):
        self.vllm_config, self.model, self.device = vllm_config, model, device
        self.num_drafts = vllm_config.num_speculative_tokens
        self.max_model_len = vllm_config.model_config.max_model_len
        max_num_reqs = vllm_config.scheduler_config.max_num_seqs
        self.drafts = torch.zeros(max_num_reqs, self.num_drafts, dtype=torch.int64, device=device)
        self.views: DraftViews | None = None
        self._physical_slots = for_device("step_slots", device).physical_slots

    def bind(
        self,
        kv_cache_config: KVCacheConfig,
        attn_groups: list[list[Any]],
        tables: BlockTables,
        views: DraftViews,
        lengths: CompressionState,
    ) -> None:
        """Take what exists only once the KV cache does."""
        self.kv_cache_config, self.attn_groups = kv_cache_config, attn_groups
        self.tables, self.views, self.lengths = tables, views, lengths
        self.slots = torch.zeros(
            tables.num_groups, self.drafts.shape[0], dtype=torch.int64, device=self.device
        )

    def init_cudagraph_manager(self, cudagraph_mode: CUDAGraphMode) -> None:
        """Draft steps run eagerly."""

    def capture(self) -> None:
        """Draft steps run eagerly."""

    @torch.inference_mode()
    def propose(
        self,
        input_batch: InputBatch,
        attn_metadata: dict[str, Any],
        slot_mappings: dict[str, torch.Tensor],
        last_hidden_states: torch.Tensor,
        aux_hidden_states: list[torch.Tensor] | None,
        num_sampled: torch.Tensor,
        num_rejected: torch.Tensor,
        last_sampled: torch.Tensor,
        *args: Any,
        dummy_run: bool = False,
        num_speculative_tokens: int | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Draft for the rows that have a view; the others' entries mean nothing.

        Returns
        -------
        torch.Tensor
            [B, k] int64.
        """
        drafts = self.drafts[: input_batch.num_reqs]
        if dummy_run or self.views is None:
            return drafts
        requests_np = input_batch.idx_mapping_np[: input_batch.num_reqs]
        rows_np = np.flatnonzero(self.views.exists[requests_np])
        if not len(rows_np):
            return drafts
        self.views.begin()
        rows = torch.from_numpy(rows_np).to(self.device, non_blocking=True)
        requests = input_batch.idx_mapping[rows].long()
        batch = _Rows(
            requests=requests,
            requests_np=requests_np[rows_np],
            tables=[self.views.table(g, requests) for g in range(self.tables.num_groups)],
            # Rejected tokens are no part of the sequence; the one just sampled comes behind it.
            first=(input_batch.seq_lens[rows] - num_rejected[rows]).long(),
            first_bound=input_batch.seq_lens_cpu_upper_bound[torch.from_numpy(rows_np)],
            starts=torch.arange(len(rows_np) + 1, dtype=torch.int32),
        )
        tokens = last_sampled.view(-1)[requests]
        for step in range(num_speculative_tokens or self.num_drafts):
            tokens = self._draft(step, tokens, batch)
            drafts[rows, step] = tokens
        return drafts

    def _draft(self, step: int, tokens: torch.Tensor, batch: "_Rows") -> torch.Tensor:
        """Next tokens [d] behind the [d] tokens of a draft step."""
        count, positions = len(tokens), batch.first + step
        # Drafts behind the model's last position are never scheduled; their keys go nowhere.
        inside = positions < self.max_model_len
        positions = positions.clamp(max=self.max_model_len - 1)
        starts = batch.starts.to(self.device, non_blocking=True)
        slots = self.slots[:, :count]
        self._physical_slots(
            positions, starts, batch.requests, self.lengths.evicted.gpu, self.tables, self.slots
        )
        slots.masked_fill_(~inside, -1)
        with set_forward_context(
            self._metadata(step, positions, starts, batch),
            self.vllm_config,
            num_tokens=count,
            cudagraph_runtime_mode=CUDAGraphMode.NONE,
            slot_mapping=build_slot_mappings_by_layer(slots, self.kv_cache_config),
            batch_descriptor=BatchDescriptor(num_tokens=count),
        ):
            hidden = self.model(input_ids=tokens.to(torch.int32), positions=positions)
        return self.model.compute_logits(hidden).argmax(dim=-1)

    def _metadata(
        self, step: int, positions: torch.Tensor, starts: torch.Tensor, batch: "_Rows"
    ) -> dict[str, Any]:
        """Attention metadata, one KV cache group at a time: each view has its own length."""
        assert self.views is not None
        count = len(positions)
        found: dict[str, Any] = {}
        evicted, requests, rows = self.lengths.evicted, batch.requests, batch.requests_np
        for group, layers in enumerate(self.attn_groups):
            if not layers:
                continue
            lost = evicted.gpu[group][requests] + self.views.num_dropped(group, requests)
            lost_np = evicted.np[group, rows] + self.views.num_dropped_np(group, rows)
            bound = (batch.first_bound + step + 1).clamp(max=self.max_model_len)
            bound = (bound - torch.from_numpy(lost_np)).to(torch.int32)
            only = [layers if other == group else [] for other in range(len(self.attn_groups))]
            found |= build_attn_metadata(
                attn_groups=only,
                num_reqs=count,
                num_tokens=count,
                query_start_loc_gpu=starts,
                query_start_loc_cpu=batch.starts,
                max_query_len=1,
                seq_lens=(positions + 1 - lost).to(torch.int32),
                max_seq_len=int(bound.max()),
                block_tables=batch.tables,
                slot_mappings=self.slots[:, :count],
                kv_cache_config=self.kv_cache_config,
                seq_lens_cpu_upper_bound=bound,
                positions=positions,
                is_prefilling=torch.zeros(count, dtype=torch.bool),
                req_idx=rows,
            )
        return found


@dataclass(frozen=True)
class _Rows:
    """The rows that draft, in one step of the engine.

    Attributes
    ----------
    requests, requests_np
        [d] request rows, on the device and on the host.
    tables : list[torch.Tensor]
        G block tables [d, P] of the views.
    first : torch.Tensor
        [d] int64, position of the token that was just sampled.
    first_bound : torch.Tensor
        [d] int32 on the host, at least `first`.
    starts : torch.Tensor
        [d + 1] int32 on the host: 0, 1, ..., d.
    """

    requests: torch.Tensor
    requests_np: np.ndarray
    tables: list[torch.Tensor]
    first: torch.Tensor
    first_bound: torch.Tensor
    starts: torch.Tensor
