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
from vllm.v1.worker.gpu.buffer_utils import UvaBackedTensor
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.sample.gumbel import gumbel_sample
from vllm.v1.worker.gpu.spec_decode.speculator import BaseSpeculator

from vllm_kvcompress.kernels.block_tables import BlockTables
from vllm_kvcompress.kernels.dispatch import for_device
from vllm_kvcompress.worker.model_state import CompressedModelState


class ViewSpeculator(BaseSpeculator):
    """Drafts up to k tokens for every request that has a view.

    Parameters
    ----------
    vllm_config : VllmConfig
        The engine's configuration.
    model : torch.nn.Module
        The target model.
    state : CompressedModelState
        Setting, views and lengths.
    device : torch.device
        Where it runs.

    Attributes
    ----------
    draft_logits : torch.Tensor or None
        [S, k, vocabulary] before the temperature, where drafts are drawn at random; None where
        they are the draft's best tokens, whose own probability then counts as 1.
    counts : dict[str, int]
        Drafts of each request after the last step; requests without a view are absent.
    """

    supports_mm_inputs = False

    def __init__(
        self,
        vllm_config: VllmConfig,
        model: torch.nn.Module,
        state: CompressedModelState,
        device: torch.device,
    ) -> None:
        self.vllm_config, self.model, self.state, self.device = vllm_config, model, state, device
        self.num_drafts = vllm_config.num_speculative_tokens
        self.min_confidence = state.config.draft.min_confidence
        self.max_model_len = vllm_config.model_config.max_model_len
        max_num_reqs = vllm_config.scheduler_config.max_num_seqs
        self.drafts = torch.zeros(max_num_reqs, self.num_drafts, dtype=torch.int64, device=device)
        self.counts: dict[str, int] = {}
        self.draft_logits: torch.Tensor | None = None
        if state.config.draft.sample == "probabilistic":
            model_config = vllm_config.model_config
            self.draft_logits = torch.zeros(
                *self.drafts.shape, model_config.get_vocab_size(),
                dtype=model_config.head_dtype, device=device,
            )  # fmt: skip
        self._physical_slots = for_device("step_slots", device).physical_slots

    def bind(
        self,
        kv_cache_config: KVCacheConfig,
        attn_groups: list[list[Any]],
        tables: BlockTables,
    ) -> None:
        """Take what exists only once the KV cache does."""
        self.kv_cache_config, self.attn_groups, self.tables = kv_cache_config, attn_groups, tables
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
        next_prefill_tokens: torch.Tensor,
        temperature: torch.Tensor,
        seeds: torch.Tensor,
        *args: Any,
        dummy_run: bool = False,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Draft for the rows that have a view; the others' entries mean nothing.

        Returns
        -------
        torch.Tensor
            [B, k] int64.
        """
        drafts, views = self.drafts[: input_batch.num_reqs], self.state.views
        self.counts = {}
        if dummy_run or views is None:
            return drafts
        requests_np = input_batch.idx_mapping_np[: input_batch.num_reqs]
        rows_np = np.flatnonzero(views.exists[requests_np])
        if not len(rows_np):
            return drafts
        views.begin()
        rows = torch.from_numpy(rows_np).to(self.device, non_blocking=True)
        requests = input_batch.idx_mapping[rows].long()
        batch = _Rows(
            requests=requests,
            requests_np=requests_np[rows_np],
            tables=[views.table(group, requests) for group in range(self.tables.num_groups)],
            # Rejected tokens are no part of the sequence; the one just sampled comes behind it.
            first=(input_batch.seq_lens[rows] - num_rejected[rows]).long(),
            first_bound=input_batch.seq_lens_cpu_upper_bound[torch.from_numpy(rows_np)],
            starts=torch.arange(len(rows_np) + 1, dtype=torch.int32),
            temperature=temperature,
            seeds=seeds,
        )
        tokens = last_sampled.view(-1)[requests]
        counts = torch.zeros(len(rows_np), dtype=torch.int64, device=self.device)
        goes_on = torch.ones(len(rows_np), dtype=torch.bool, device=self.device)
        num_steps = min(self.state.num_draft_steps, self.num_drafts)
        for step in range(num_steps):
            logits = self._run(step, tokens, batch)
            tokens = self._sample(step, logits, batch)
            drafts[rows, step] = tokens
            if self.min_confidence > 0:
                best = logits.float().softmax(dim=-1).gather(1, tokens[:, None])[:, 0]
                goes_on &= best >= self.min_confidence
                if not goes_on.any():
                    break
            counts += goes_on
        ids = [input_batch.req_ids[row] for row in rows_np]
        if self.min_confidence > 0:
            self.counts = dict(zip(ids, counts.tolist(), strict=True))  # waits: see DraftConfig
        else:
            self.counts = dict.fromkeys(ids, num_steps)
        return drafts

    def _sample(self, step: int, logits: torch.Tensor, batch: "_Rows") -> torch.Tensor:
        """[d] draft tokens from [d, vocabulary] logits."""
        if self.draft_logits is None:
            return logits.argmax(dim=-1)
        return gumbel_sample(
            logits,
            batch.requests,
            batch.temperature,
            batch.seeds,
            batch.first + step,
            apply_temperature=True,
            is_drafting=True,
            logits_cache=self.draft_logits,
            logits_cache_col=torch.tensor(step, device=self.device),
            use_fp64=self.vllm_config.model_config.use_fp64_gumbel,
        )

    def _run(self, step: int, tokens: torch.Tensor, batch: "_Rows") -> torch.Tensor:
        """Logits [d, vocabulary] behind the [d] tokens of a draft step."""
        count, positions = len(tokens), batch.first + step
        # Drafts behind the model's last position are never scheduled; their keys go nowhere.
        inside = positions < self.max_model_len
        positions = positions.clamp(max=self.max_model_len - 1)
        starts = batch.starts.to(self.device, non_blocking=True)
        slots = self.slots[:, :count]
        self._physical_slots(
            positions, starts, batch.requests, self._evicted.gpu, self.tables, self.slots
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
        return self.model.compute_logits(hidden)

    @property
    def _evicted(self) -> UvaBackedTensor:
        assert self.state.lengths is not None
        return self.state.lengths.evicted

    def _metadata(
        self, step: int, positions: torch.Tensor, starts: torch.Tensor, batch: "_Rows"
    ) -> dict[str, Any]:
        """Attention metadata, one KV cache group at a time: each view has its own length."""
        views = self.state.views
        assert views is not None
        count = len(positions)
        found: dict[str, Any] = {}
        evicted, requests, rows = self._evicted, batch.requests, batch.requests_np
        for group, layers in enumerate(self.attn_groups):
            if not layers:
                continue
            lost = evicted.gpu[group][requests] + views.num_dropped(group, requests)
            lost_np = evicted.np[group, rows] + views.num_dropped_np(group, rows)
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
    temperature, seeds : torch.Tensor
        [S], of all request rows.
    """

    requests: torch.Tensor
    requests_np: np.ndarray
    tables: list[torch.Tensor]
    first: torch.Tensor
    first_bound: torch.Tensor
    starts: torch.Tensor
    temperature: torch.Tensor
    seeds: torch.Tensor
