"""Model state that gives every KV cache group its own sequence lengths.

vLLM's runner calls these methods at the right moments of a request's and a batch's life, during
CUDA graph capture too, so the model state is where compression lives on the worker.
"""

import copy
from typing import Any

import torch
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from vllm_kvcompress.budgets import compaction_lengths
from vllm_kvcompress.config import CONFIG_KEY, CompressionConfig, parse_config
from vllm_kvcompress.request_options import parse_request, resolve_request
from vllm_kvcompress.worker.query_window import QueryWindow
from vllm_kvcompress.worker.state import CompressionState


class CompressedModelState(DefaultModelState):
    """Default model state plus what compression must remember per request.

    Attributes
    ----------
    config : CompressionConfig
        The server's setting.
    window : QueryWindow
        Queries of prompts that are about to be compressed.
    lengths : CompressionState or None
        Evicted tokens per row; None until the KV cache exists.
    request_configs : dict[str, CompressionConfig]
        The setting each request that will be compressed runs under.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = parse_config(self.vllm_config.additional_config[CONFIG_KEY])
        assert config is not None, "this model state is installed only when compression is on"
        self.config: CompressionConfig = config
        self.window = QueryWindow()
        self.lengths: CompressionState | None = None
        self.request_configs: dict[str, CompressionConfig] = {}
        self._rows: dict[str, int] = {}
        self._num_layer_groups = 0
        self._block_size = 0

    # --- requests -------------------------------------------------------------------------

    def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
        """Reset the row; expect queries if the request will be compressed by a policy of that kind.

        A preempted request comes back through here and starts again from nothing.
        """
        super().add_request(req_index, new_req_data)
        assert self.lengths is not None
        self.lengths.reset_row(req_index)
        self._rows[new_req_data.req_id] = req_index
        params = new_req_data.sampling_params
        options = parse_request(params.extra_args if params else None)
        config = resolve_request(self.config, options)
        prompt_len = new_req_data.prompt_len
        if config is None or not any(
            compaction_lengths(prompt_len, config, self._num_layer_groups, self._block_size)
        ):
            return
        self.request_configs[new_req_data.req_id] = config
        if config.build_policy().needs_queries:
            self.window.add_request(new_req_data.req_id, prompt_len, config.observation_window)

    def remove_request(self, req_id: str) -> None:
        """Forget a request that finished, was aborted or was preempted."""
        super().remove_request(req_id)
        self.window.remove_request(req_id)
        self.request_configs.pop(req_id, None)
        row = self._rows.pop(req_id, None)
        if row is not None and self.lengths is not None:
            self.lengths.reset_row(row)

    # --- batches --------------------------------------------------------------------------

    def initialize_kv_cache(self, kv_cache_config: Any, block_tables: Any) -> None:
        """Size the per-group state. Called again when the cache is rebuilt (graph profiling)."""
        super().initialize_kv_cache(kv_cache_config, block_tables)
        specs = [group.kv_cache_spec for group in kv_cache_config.kv_cache_groups]
        self._num_layer_groups = max(spec.layer_group for spec in specs) + 1
        self._block_size = specs[0].block_size
        self.lengths = CompressionState(len(specs), self.max_num_reqs, self.device)

    def begin_batch(self, input_batch: InputBatch) -> bool:
        """Prepare lengths and query capture of a real batch; True if a request is compacted."""
        assert self.lengths is not None
        self.window.begin_batch(input_batch)
        return self.lengths.begin_batch(input_batch)

    def prepare_attn(
        self,
        input_batch: InputBatch,
        cudagraph_mode: CUDAGraphMode,
        block_tables: tuple[torch.Tensor, ...],
        slot_mappings: torch.Tensor,
        attn_groups: list[list[Any]],
        *args: Any,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Build attention metadata, one KV cache group at a time with the group's own lengths."""
        assert self.lengths is not None
        is_real = self.lengths.is_current(input_batch)
        seq_lens = self.lengths.group_seq_lens(input_batch)
        metadata: dict[str, Any] = {}
        for group, layers in enumerate(attn_groups):
            if not layers:
                continue
            only = [layers if other == group else [] for other in range(len(attn_groups))]
            view = copy.copy(input_batch)
            view.seq_lens = seq_lens[group, : input_batch.seq_lens.shape[0]]
            if is_real:
                view.seq_lens_cpu_upper_bound = self.lengths.group_upper_bound(input_batch, group)
            metadata |= super().prepare_attn(
                view, cudagraph_mode, block_tables, slot_mappings, only, *args, **kwargs
            )
        return metadata
