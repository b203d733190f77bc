"""One draft step: the model on one token of every row that drafts, over the views.

A CUDA graph replays launches at the addresses it recorded. What a draft step's launches read or
write therefore lies in buffers that are allocated once, for the largest batch: `DraftStep.run`
takes no tensor of the batch, and a step is prepared by writing into the buffers. A batch that
runs in a graph of more rows is padded with rows that own no request, as vLLM pads the draft
steps of its own speculators: no slot, no query, length 0, the null block.

Dimensions: G KV cache groups, S most rows of a batch, d rows that draft, n rows with padding, P
columns of a group's block tables.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.forward_context import BatchDescriptor, set_forward_context
from vllm.v1.attention.backends.utils import NULL_BLOCK_ID, PAD_SLOT_ID
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.gpu.attn_utils import build_attn_metadata, build_slot_mappings_by_layer
from vllm.v1.worker.gpu.cudagraph_utils import AttentionState, BatchExecutionDescriptor
from vllm.v1.worker.gpu.sample.gumbel import gumbel_sample

from vllm_kvcompress.kernels.cache.block_tables import BlockTables
from vllm_kvcompress.kernels.dispatch import backend_of
from vllm_kvcompress.worker.draft.views import DraftViews
from vllm_kvcompress.worker.host_mirror import HostMirror

if TYPE_CHECKING:
    from vllm_kvcompress.worker.draft.feature import DraftFeature


@dataclass(frozen=True)
class DraftRows:
    """The rows that draft, in one step of the engine.

    Attributes
    ----------
    requests, requests_np
        [d] request rows, int64 on the device and on the host.
    first : torch.Tensor
        [d] int64, position of the token that was just sampled.
    first_bound : torch.Tensor
        [d] int32 on the host, at least `first`.
    """

    requests: torch.Tensor
    requests_np: np.ndarray
    first: torch.Tensor
    first_bound: torch.Tensor


class DraftStep:
    """The buffers of draft steps and what is computed from them.

    Parameters
    ----------
    vllm_config : VllmConfig
        The engine's configuration.
    model : torch.nn.Module
        The target model.
    state : DraftFeature
        Setting, views, lengths, query recorders.
    device : torch.device
        Where it runs.
    draft_logits : torch.Tensor or None
        [S, k, vocabulary], where the logits of drafts go that are drawn at random.

    Attributes
    ----------
    input_ids : torch.Tensor
        [S] int32: before a step the tokens it reads, afterwards those it drafted.
    confidence : torch.Tensor
        [S] float32, the draft's own probability of each drafted token, if the setting asks for it.
    has_nan : torch.Tensor
        [S] bool, whether one of the batch's draft steps had a NaN among its logits.
    temperature, seeds : torch.Tensor
        [S] float32 and int64, of all request rows.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        model: torch.nn.Module,
        state: "DraftFeature",
        device: torch.device,
        draft_logits: torch.Tensor | None,
    ) -> None:
        self.vllm_config, self.model, self.state, self.device = vllm_config, model, state, device
        self.max_model_len = vllm_config.model_config.max_model_len
        self.draft_logits = draft_logits
        self._draws = state.config.draft.sample == "probabilistic"
        self._needs_confidence = state.config.draft.min_confidence > 0
        self._physical_slots = backend_of(device).physical_slots
        num_rows = vllm_config.scheduler_config.max_num_seqs

        def zeros(dtype: torch.dtype, *shape: int) -> torch.Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        self.input_ids = zeros(torch.int32, num_rows)
        self.positions = zeros(torch.int64, num_rows)
        self.requests = zeros(torch.int64, num_rows)
        self.query_start_loc = zeros(torch.int32, num_rows + 1)
        self.number = torch.zeros((), dtype=torch.int64, device=device)
        self.confidence = zeros(torch.float32, num_rows)
        self.has_nan = zeros(torch.bool, num_rows)
        self.temperature = zeros(torch.float32, num_rows)
        self.seeds = zeros(torch.int64, num_rows)
        self._counting = torch.arange(num_rows + 1, dtype=torch.int32, device=device)
        self._counting_cpu = torch.arange(num_rows + 1, dtype=torch.int32)

    def bind(
        self,
        kv_cache_config: KVCacheConfig,
        attn_groups: list[list[Any]],
        tables: BlockTables,
    ) -> None:
        """Take what exists only once the KV cache does; graphs captured before are void."""
        self.kv_cache_config, self.attn_groups, self._own_tables = (
            kv_cache_config, attn_groups, tables,
        )  # fmt: skip
        shape = (tables.num_groups, len(self.input_ids))
        self.slots = torch.zeros(shape, dtype=torch.int64, device=self.device)
        self.seq_lens = torch.zeros(shape, dtype=torch.int32, device=self.device)
        self.view_tables = [torch.zeros_like(table) for table in tables.tensors]

    # --- a batch --------------------------------------------------------------------------

    def begin(self, rows: DraftRows, num_padded: int) -> None:
        """Write what stays the same over the draft steps of a batch of d rows, padded to n."""
        self._rows, self._num_padded = rows, num_padded
        count, views = len(rows.requests), self._views
        views.begin()
        self.state.lengths.send()  # the step's own compactions have rewritten rows
        self._pad(count, num_padded)
        self.requests[:count] = rows.requests
        self.has_nan.zero_()
        lost = []
        for group, table in enumerate(self.view_tables):
            table[:count] = views.table(group, rows.requests)
            evicted = self._evicted.gpu[group][rows.requests]
            lost.append(evicted + views.num_dropped(group, rows.requests))
        self._lost = torch.stack(lost)

    def prepare(self, number: int) -> AttentionState:
        """Write the inputs of draft step `number` behind the tokens; say where attention reads.

        Backends keep parts of their metadata in buffers too, which building it anew refreshes:
        so it is built for a graph's replay as well.
        """
        rows, count = self._rows, len(self._rows.requests)
        positions, slots = self.positions[:count], self.slots[:, :count]
        # Drafts behind the model's last position are never scheduled; their keys go nowhere.
        inside = rows.first + number < self.max_model_len
        positions.copy_((rows.first + number).clamp(max=self.max_model_len - 1))
        self.seq_lens[:, :count] = positions + 1 - self._lost
        self._physical_slots(
            positions=positions,
            query_start_loc=self.query_start_loc,
            idx_mapping=self.requests[:count],
            evicted=self._evicted.gpu,
            tables=self._own_tables,
            out=self.slots,
        )
        slots.masked_fill_(~inside, PAD_SLOT_ID)
        self.number.fill_(number)
        bounds = []
        for group in range(len(self.view_tables)):
            lost = self._evicted.np[group, rows.requests_np]
            lost = lost + self._views.num_dropped_np(group, rows.requests_np)
            bound = torch.zeros(self._num_padded, dtype=torch.int32)
            bound[:count] = (rows.first_bound + number + 1).clamp(max=self.max_model_len)
            bound[:count] -= torch.from_numpy(lost)
            bounds.append(bound)
        return self._attention(count, self._num_padded, bounds, rows.requests_np)

    def run(self, num_rows: int, attention: AttentionState) -> None:
        """Run the model on n rows and leave its drafts in `input_ids`.

        Graphs record this: everything that it reads or writes is a buffer.
        """
        with (
            self.state.taps.muted(),
            set_forward_context(
                attention.attn_metadata,
                self.vllm_config,
                num_tokens=num_rows,
                cudagraph_runtime_mode=CUDAGraphMode.NONE,
                slot_mapping=attention.slot_mappings,
                batch_descriptor=BatchDescriptor(num_tokens=num_rows),
            ),
        ):
            hidden = self.model(
                input_ids=self.input_ids[:num_rows], positions=self.positions[:num_rows]
            )
        logits = self.model.compute_logits(hidden)
        tokens, best = self._sample(logits)
        self.has_nan[:num_rows].logical_or_(best.isnan())
        # What padding computes may be no number, and its choice then no token.
        self.input_ids[:num_rows] = tokens.masked_fill(self.requests[:num_rows] < 0, 0)
        if self._needs_confidence:
            probabilities = logits.float().softmax(dim=-1)
            self.confidence[:num_rows] = probabilities.gather(1, tokens[:, None])[:, 0]

    def create_forward_fn(
        self, desc: BatchExecutionDescriptor, warmup: bool
    ) -> Callable[[CUDAGraphMode], None]:
        """Lay out a batch of dummies; return what a graph of `desc` records (vLLM's protocol)."""
        num_rows = desc.num_tokens
        assert desc.num_reqs == num_rows, f"a draft step has one token per row, not {desc}"
        self._pad(0, len(self.input_ids))
        torch.clamp(self._counting, max=num_rows, out=self.query_start_loc)
        for buffer in (self.input_ids, self.positions, self.number):
            buffer.zero_()
        self.seq_lens[:, :num_rows] = 1
        bounds = [torch.ones(num_rows, dtype=torch.int32) for _ in self.view_tables]
        attention = self._attention(num_rows, num_rows, bounds, np.arange(num_rows), True)
        return lambda _: self.run(num_rows, attention)

    # --- parts ----------------------------------------------------------------------------

    @property
    def _evicted(self) -> HostMirror:
        return self.state.lengths.evicted

    @property
    def _views(self) -> DraftViews:
        assert self.state.views is not None
        return self.state.views

    def _pad(self, count: int, num_padded: int) -> None:
        """Make rows [count, num_padded) harmless, and `count` the number of queries."""
        torch.clamp(self._counting, max=count, out=self.query_start_loc)
        if num_padded > count:
            self.requests[count:num_padded] = -1
            self.slots[:, count:num_padded] = PAD_SLOT_ID
            self.seq_lens[:, count:num_padded] = 0
            for table in self.view_tables:
                table[count:num_padded] = NULL_BLOCK_ID

    def _sample(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[n] int64 draft tokens from [n, vocabulary] logits, and [n] the highest or a NaN."""
        if not self._draws:
            # Of NaN: some token, which the target turns down.
            best, tokens = logits.max(dim=-1)
            return tokens, best
        best = logits.amax(dim=-1)
        # Acceptance divides by these probabilities; with a NaN among them it decides anything, and
        # the draw itself may be no token. Whatever stands here, what is drawn from it is exact.
        logits = torch.nan_to_num(logits, nan=0.0, posinf=1e4, neginf=float("-inf"))
        tokens = gumbel_sample(
            logits,
            self.requests[: len(logits)],
            self.temperature,
            self.seeds,
            self.positions[: len(logits)],
            apply_temperature=True,
            is_drafting=True,
            logits_cache=self.draft_logits,
            logits_cache_col=self.number,
            use_fp64=self.vllm_config.model_config.use_fp64_gumbel,
        )
        return tokens, best

    def _attention(
        self,
        count: int,
        num_padded: int,
        bounds: Sequence[torch.Tensor],
        requests_np: np.ndarray,
        for_capture: bool = False,
    ) -> AttentionState:
        """Attention metadata, one KV cache group at a time: each view has its own length.

        `bounds` are G host tensors [n] int32, upper bounds of the lengths.
        """
        metadata: dict[str, Any] = {}
        slots = self.slots[:, :num_padded]
        for group, layers in enumerate(self.attn_groups):
            if not layers:
                continue
            only = [layers if other == group else [] for other in range(len(self.attn_groups))]
            # A graph must hold for the longest request, whatever it was captured with.
            longest = self.max_model_len if for_capture else int(bounds[group].max())
            metadata |= build_attn_metadata(
                attn_groups=only,
                num_reqs=num_padded,
                num_tokens=num_padded,
                query_start_loc_gpu=self.query_start_loc[: num_padded + 1],
                query_start_loc_cpu=self._counting_cpu[: num_padded + 1].clamp(max=count),
                max_query_len=1,
                seq_lens=self.seq_lens[group, :num_padded],
                max_seq_len=longest,
                block_tables=[table[:num_padded] for table in self.view_tables],
                slot_mappings=slots,
                kv_cache_config=self.kv_cache_config,
                seq_lens_cpu_upper_bound=bounds[group],
                positions=self.positions[:num_padded],
                is_prefilling=torch.zeros(num_padded, dtype=torch.bool),
                for_cudagraph_capture=for_capture,
                req_idx=requests_np,
            )
        return AttentionState(metadata, build_slot_mappings_by_layer(slots, self.kv_cache_config))
