"""The model drafts for itself over a compressed view of its own cache.

After a step, the request's cache is exact up to the token before the one just sampled. A draft
step runs the model on that token (then on its own drafts), attending to the view and the tail. The
keys it writes go to the slots where the verification will write the exact ones: nothing needs to
be undone. What is accepted is decided by vLLM's own rejection sampler from a pass over the whole
cache, so the output does not depend on the view (typical_acceptance.py, an opt-in, is lossy).
(arXiv 2404.14897, self-drafting with exact verification; MagicDec, 2408.11049, drafts over a
compressed cache likewise.)

Dimensions: G KV cache groups, B batch rows, d rows that draft, k draft tokens, T tokens.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.logger import init_logger
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor, CudaGraphManager
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.spec_decode.speculator import BaseSpeculator

from vllm_kvcompress.kernels.cache.block_tables import BlockTables
from vllm_kvcompress.kernels.host_copy import to_device
from vllm_kvcompress.worker.draft.faults import RAISED, PendingNans, describe, failed_alike
from vllm_kvcompress.worker.draft.step import DraftRows, DraftStep
from vllm_kvcompress.worker.fault_report import leave

if TYPE_CHECKING:
    from vllm_kvcompress.worker.draft.feature import DraftFeature

logger = init_logger(f"vllm.{__name__}")


class ViewSpeculator(BaseSpeculator):
    """Drafts up to k tokens for every request that has a view.

    Parameters
    ----------
    vllm_config : VllmConfig
        The engine's configuration.
    model : torch.nn.Module
        The target model.
    state : DraftFeature
        Setting, views and lengths.
    device : torch.device
        Where it runs.

    Attributes
    ----------
    draft_logits : torch.Tensor or None
        [S, k, vocabulary] before the temperature, where drafts are drawn at random and their
        probabilities decide about them; None where drafts are the draft's best tokens, whose own
        probability then counts as 1, and where acceptance is typical, which does not ask for it.
    counts : dict[str, int]
        Drafts of each request after the last step; requests without a view are absent.
    num_steps : int
        Draft steps that the last `propose` made.
    cudagraph_manager : CudaGraphManager or None
        Graphs of draft steps; an attribute of the speculator because vLLM's profiling run drops
        its managers there, with the graphs of the small cache it profiles.
    """

    supports_mm_inputs = False

    def __init__(
        self,
        vllm_config: VllmConfig,
        model: torch.nn.Module,
        state: "DraftFeature",
        device: torch.device,
    ) -> None:
        self.vllm_config, self.model, self.state, self.device = vllm_config, model, state, device
        self.num_drafts = vllm_config.num_speculative_tokens
        self.min_confidence = state.config.draft.min_confidence
        max_num_reqs = vllm_config.scheduler_config.max_num_seqs
        self.drafts = torch.zeros(max_num_reqs, self.num_drafts, dtype=torch.int64, device=device)
        self.counts: dict[str, int] = {}
        self.num_steps = 0
        self.draft_logits: torch.Tensor | None = None
        self.draws = state.config.draft.sample == "probabilistic"
        if self.draws and state.config.draft.acceptance == "rejection":
            model_config = vllm_config.model_config
            self.draft_logits = torch.zeros(
                *self.drafts.shape, model_config.get_vocab_size(),
                dtype=model_config.head_dtype, device=device,
            )  # fmt: skip
        self.step = DraftStep(vllm_config, model, state, device, self.draft_logits)
        self._broken = np.zeros(max_num_reqs, dtype=bool)  # request rows that draft no more
        self._failed: dict[str, str] = {}
        self._nans: PendingNans | None = None
        self._num_calls = 0
        self.cudagraph_manager: CudaGraphManager | None = None

    def bind(
        self,
        kv_cache_config: KVCacheConfig,
        attn_groups: list[list[Any]],
        tables: BlockTables,
    ) -> None:
        """Take what exists only once the KV cache does."""
        self.step.bind(kv_cache_config, attn_groups, tables)

    def init_cudagraph_manager(self, cudagraph_mode: CUDAGraphMode) -> None:
        """Choose what to capture.

        `cudagraph_mode` is what vLLM has left of ``-cc.cudagraph_mode`` once it has asked the
        attention backends. As with vLLM's own speculators, decode steps run in full graphs or
        eagerly, never in piecewise graphs. With LoRA they run eagerly: a graph holds the adapters
        of its capture, a step those of its batch.
        """
        mode = CUDAGraphMode.NONE
        if (
            cudagraph_mode.decode_mode() == CUDAGraphMode.FULL
            and self.vllm_config.lora_config is None
        ):
            mode = CUDAGraphMode.FULL_DECODE_ONLY
        self.cudagraph_manager = CudaGraphManager(
            self.vllm_config, self.device, mode, decode_query_len=1
        )

    def capture(self) -> None:
        """Capture one draft step for every batch size that vLLM captures."""
        assert self.cudagraph_manager is not None
        if self.cudagraph_manager.needs_capture():
            logger.info("Capturing draft steps over compressed views...")
            self.cudagraph_manager.capture(
                self.step.create_forward_fn, progress_bar_desc="Capturing draft CUDA graphs"
            )

    def _dispatch(self, num_rows: int) -> BatchExecutionDescriptor:
        """The graph for a batch of this size, or the mode NONE."""
        assert self.cudagraph_manager is not None
        return self.cudagraph_manager.dispatch(
            num_rows, num_rows, uniform_token_count=1, num_active_loras=0
        )

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
        self.counts, self.num_steps = {}, 0
        if dummy_run or views is None:
            return drafts
        requests_np = input_batch.idx_mapping_np[: input_batch.num_reqs]
        self._write_certain(np.flatnonzero(self._broken[requests_np]), requests_np, drafts)
        rows_np = np.flatnonzero(views.exists[requests_np])
        if not len(rows_np):
            return drafts
        self._num_calls += 1
        try:
            self._propose(
                input_batch, rows_np, drafts, num_rejected, last_sampled, temperature, seeds
            )
        except Exception as error:  # a kernel's, no memory: any of them
            self._note_failed([input_batch.req_ids[row] for row in rows_np], error)
            views.exists[requests_np[rows_np]] = False
            self._broken[requests_np[rows_np]] = True
            self._write_certain(rows_np, requests_np, drafts)
            self.counts = {}
        return drafts

    def _propose(
        self,
        input_batch: InputBatch,
        rows_np: np.ndarray,
        drafts: torch.Tensor,
        num_rejected: torch.Tensor,
        last_sampled: torch.Tensor,
        temperature: torch.Tensor,
        seeds: torch.Tensor,
    ) -> None:
        """Draft for these [d] rows of the batch into [B, k]."""
        requests_np = input_batch.idx_mapping_np[: input_batch.num_reqs]
        rows = to_device(rows_np, torch.int64, self.device)
        requests = input_batch.idx_mapping[rows].long()
        batch = DraftRows(
            requests=requests,
            requests_np=requests_np[rows_np],
            # Rejected tokens are no part of the sequence; the one just sampled comes behind it.
            first=(input_batch.seq_lens[rows] - num_rejected[rows]).long(),
            first_bound=input_batch.seq_lens_cpu_upper_bound[torch.from_numpy(rows_np)],
        )
        self.step.input_ids[: len(rows_np)] = last_sampled.view(-1)[requests]
        if self.draws:
            self.step.temperature.copy_(temperature)
            self.step.seeds.copy_(seeds)
        counts = self._draft(rows, batch, drafts)
        ids = [input_batch.req_ids[row] for row in rows_np]
        self._nans = PendingNans(ids, self.step.has_nan[: len(ids)])
        if self.min_confidence > 0:
            self.counts = dict(zip(ids, counts.tolist(), strict=True))  # waits: see DraftConfig
        else:
            self.counts = dict.fromkeys(ids, self.num_steps)

    # --- when drafting fails --------------------------------------------------------------

    def _note_failed(self, request_ids: list[str], error: Exception) -> None:
        logger.error(
            "KV compression: drafting for requests %s failed (%s: %.300s); they go on without "
            "drafts.\n%s",
            ", ".join(request_ids), type(error).__name__, error, describe(error),
        )  # fmt: skip
        if not failed_alike(error, self.model, self._num_calls, self.num_steps):
            leave("drafting for", request_ids)
        self._failed.update(dict.fromkeys(request_ids, RAISED))

    def _write_certain(
        self, rows_np: np.ndarray, requests_np: np.ndarray, drafts: torch.Tensor
    ) -> None:
        """Drafts that are exact to verify, and worth nothing: always the token 0.

        With asynchronous scheduling drafts are verified before the scheduler knows that they
        failed. What lies in the buffers may be another step's choice, or half written: it was not
        drawn from the probabilities beside it, and what is sampled would be biased.
        """
        if not len(rows_np):
            return
        drafts[to_device(rows_np, torch.int64, self.device)] = 0
        if self.draft_logits is not None:
            requests = to_device(requests_np[rows_np], torch.int64, self.device)
            self.draft_logits[requests] = float("-inf")
            self.draft_logits[requests, :, 0] = 0.0

    def reset_row(self, req_index: int) -> None:
        """A row starts over, or the scheduler expects no drafts of it any more."""
        self._broken[req_index] = False

    def take_failed(self) -> dict[str, str]:
        """Requests that draft no more since the last call, and why."""
        failed, self._failed = self._failed, {}
        return failed

    def take_nans(self) -> PendingNans | None:
        """Of the last step that drafted."""
        found, self._nans = self._nans, None
        return found

    def _draft(self, rows: torch.Tensor, batch: DraftRows, drafts: torch.Tensor) -> torch.Tensor:
        """Write drafts of [d] batch rows into [B, k]; return how many count, [d] int64."""
        count = len(rows)
        counts = torch.zeros(count, dtype=torch.int64, device=self.device)
        goes_on = torch.ones(count, dtype=torch.bool, device=self.device)
        desc = self._dispatch(count)
        self.step.begin(batch, desc.num_tokens)
        for number in range(min(self.state.num_draft_steps, self.num_drafts)):
            attention = self.step.prepare(number)
            if desc.cg_mode == CUDAGraphMode.FULL:
                assert self.cudagraph_manager is not None
                self.cudagraph_manager.run_fullgraph(desc)
            else:
                self.step.run(count, attention)
            self.num_steps += 1
            drafts[rows, number] = self.step.input_ids[:count].long()
            if self.min_confidence > 0:
                goes_on &= self.step.confidence[:count] >= self.min_confidence
                if not goes_on.any():  # waits: see DraftConfig
                    break
            counts += goes_on
        return counts
