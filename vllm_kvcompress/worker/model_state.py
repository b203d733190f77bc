"""Model state that gives every KV cache group its own sequence lengths.

vLLM's runner calls these methods at the right moments of a request's and a batch's life, during
CUDA graph capture too, so the model state is where compression lives on the worker.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from vllm_kvcompress.config.settings import CompressionConfig
from vllm_kvcompress.errors import UnsupportedModelError
from vllm_kvcompress.lengths.decode_queries import ring_shape
from vllm_kvcompress.messages import RequestSetup
from vllm_kvcompress.policies.inputs import Queries
from vllm_kvcompress.spec import GroupMap
from vllm_kvcompress.worker.features import Feature
from vllm_kvcompress.worker.group_metadata import Chosen, Families, derives
from vllm_kvcompress.worker.lengths import EvictedLengths
from vllm_kvcompress.worker.queries.prompt import PromptQueries
from vllm_kvcompress.worker.queries.ring import QueryRing
from vllm_kvcompress.worker.queries.taps import QueryTaps
from vllm_kvcompress.worker.queries.window import QueryWindow

Build = Callable[[Chosen, InputBatch], dict[str, Any]]
"""Builds the metadata of some KV cache groups as the host does, for a batch."""


class CompressionStateMixin(DefaultModelState):
    """What compression must remember per request, on top of a model's own state.

    Comes first in the bases; `compressed` puts it over the state that vLLM has made.

    Parameters
    ----------
    config : CompressionConfig
        The server's setting.
    features : sequence of Feature
        Modes that it needs.

    Attributes
    ----------
    config : CompressionConfig
        The server's setting.
    window : QueryWindow
        Last queries of prompts that are about to be compressed.
    prompt_queries : PromptQueries
        Summaries of all queries of prompts, for policies that read them.
    ring : QueryRing
        Last queries of rows that are about to be compacted while decoding.
    taps : QueryTaps
        What shows these three the queries.
    setups : dict[str, RequestSetup]
        Of requests that start in the current step, as the scheduler decided them.
    query_slots : dict[str, int]
        Slots of the ring that the scheduler has handed out or taken back, not assigned yet.
    lengths : EvictedLengths or None
        Evicted slots per row; None until the KV cache exists.
    request_configs : dict[str, CompressionConfig]
        The setting each request that will be compressed runs under.
    """

    def __init__(
        self, config: CompressionConfig, features: Sequence[Feature], *args: Any, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.config, self.features = config, features
        self.window = QueryWindow(self.device)
        self.prompt_queries = PromptQueries()
        self.ring = QueryRing(
            ring_shape(self.vllm_config, config),
            self.max_num_reqs,
            self.max_num_tokens,
            self.device,
        )
        self.taps = QueryTaps(
            [self.window, self.prompt_queries, self.ring], self.vllm_config.model_config.dtype
        )
        self.setups: dict[str, RequestSetup] = {}
        self.query_slots: dict[str, int] = {}
        self.lengths: EvictedLengths | None = None
        self.request_configs: dict[str, CompressionConfig] = {}
        self._rows: dict[str, int] = {}
        self._groups: GroupMap
        self._families: tuple[list[list[Any]], Families] | None = None

    # --- requests -------------------------------------------------------------------------

    def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
        """Reset the row; expect queries if the scheduler says that the request's policy reads them.

        A preempted request comes back through here and starts again from nothing; one that
        continues an earlier turn has a shorter row from the first step on.
        """
        super().add_request(req_index, new_req_data)
        assert self.lengths is not None
        self._reset_row(req_index)
        self._rows[new_req_data.req_id] = req_index
        request_id, prompt_len = new_req_data.req_id, new_req_data.prompt_len
        setup = self.setups.pop(request_id, None)
        if setup is None:
            return
        self.request_configs[request_id] = setup.config
        if setup.evicted:  # it continues a cache that an earlier turn has compacted
            for group, number in enumerate(self._groups.layer_groups):
                if number is not None:
                    self.lengths.add_evicted(group, req_index, setup.evicted[number])
        policy = setup.config.build_policy()
        if setup.marks and policy.queries is Queries.WINDOW:
            self.window.add_request(request_id, setup.marks, setup.config.observation_window)
        elif setup.marks and policy.queries is Queries.PROMPT:
            sinks = setup.config.num_sink_tokens
            self.prompt_queries.add_request(request_id, policy, prompt_len, sinks)

    def remove_request(self, req_id: str) -> None:
        """Forget a request that finished, was aborted or was preempted."""
        super().remove_request(req_id)
        self.forget_queries(req_id)
        self.request_configs.pop(req_id, None)
        row = self._rows.pop(req_id, None)
        if row is not None:
            self._reset_row(row)

    def _reset_row(self, req_index: int) -> None:
        self.ring.assign(req_index, -1)
        if self.lengths is not None:
            self.lengths.reset_row(req_index)
        for feature in self.features:
            feature.reset_row(req_index)

    def row_of(self, req_id: str) -> int | None:
        """The request's row; None if it has none any more."""
        return self._rows.get(req_id)

    def forget_queries(self, req_id: str, end: int | None = None) -> None:
        """Drop what was collected of a request's prompt, up to a compaction at `end` if given."""
        self.window.remove_request(req_id, end)
        self.prompt_queries.remove_request(req_id)

    # --- batches --------------------------------------------------------------------------

    def initialize_kv_cache(self, kv_cache_config: Any, block_tables: Any) -> None:
        """Size the per-group state. Called again when the cache is rebuilt (graph profiling)."""
        super().initialize_kv_cache(kv_cache_config, block_tables)
        specs = [group.kv_cache_spec for group in kv_cache_config.kv_cache_groups]
        self._groups = GroupMap.of(specs)
        self.lengths = EvictedLengths(len(specs), self.max_num_reqs, self.device)

    def begin_batch(self, input_batch: InputBatch) -> bool:
        """Prepare lengths and query capture of a real batch; True if a request is compacted."""
        assert self.lengths is not None
        if self.awaits_queries:
            self.window.begin_batch(input_batch)
            self.prompt_queries.begin_batch(input_batch)
        while self.query_slots:
            request_id, slot = self.query_slots.popitem()
            if request_id in self._rows:  # else it is gone since
                self.ring.assign(self._rows[request_id], slot)
        self.ring.begin_batch(input_batch)
        return self.lengths.begin_batch(input_batch)

    @property
    def awaits_queries(self) -> bool:
        """Whether some request's prompt has queries that Python must see, in this batch or not."""
        return self.window.awaits_requests or self.prompt_queries.awaits_requests

    def captures_queries(self, request_id: str, num_computed: int, num_new: int) -> bool:
        """Whether Python must see these tokens' queries (the ring does without)."""
        return self.window.wants(request_id, num_computed, num_new) or self.prompt_queries.wants(
            request_id, num_computed
        )

    def prepare_attn(
        self,
        input_batch: InputBatch,
        cudagraph_mode: CUDAGraphMode,
        block_tables: tuple[torch.Tensor, ...],
        slot_mappings: torch.Tensor,
        attn_groups: list[list[Any]],
        kv_cache_config: KVCacheConfig,
        for_capture: bool = False,
        *args: Any,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Build attention metadata of every KV cache group with the group's own lengths."""
        groups = self._families_of(attn_groups)
        if groups.is_one:
            seen = self._seen_by_one(groups, input_batch, cudagraph_mode)
            return super().prepare_attn(
                seen, cudagraph_mode, block_tables, slot_mappings, attn_groups, kv_cache_config,
                for_capture, *args, **kwargs,
            )  # fmt: skip

        def build(chosen: Chosen, batch: InputBatch) -> dict[str, Any]:
            only = groups.part(attn_groups, chosen)
            return super(CompressionStateMixin, self).prepare_attn(
                batch, cudagraph_mode, block_tables, slot_mappings, only, kv_cache_config,
                for_capture, *args, **kwargs,
            )  # fmt: skip

        tables = None if for_capture else (block_tables, slot_mappings)
        metadata = {} if groups.first is None else self._of_own(groups, input_batch, build, tables)
        # As in stock vLLM, all at once: what a host's state prepares for its recurrent layers is
        # prepared here, once a step.
        if groups.whole:
            metadata |= build(groups.whole, input_batch)
        return metadata

    def _seen_by_one(
        self, groups: Families, batch: InputBatch, cudagraph_mode: CUDAGraphMode
    ) -> InputBatch:
        """The batch itself where nothing is evicted and no full graph replays our addresses."""
        assert self.lengths is not None and groups.first is not None
        if cudagraph_mode != CUDAGraphMode.FULL and self.lengths.is_whole(batch):
            return batch
        seq_lens = self.lengths.group_seq_lens(batch)
        return self._seen_by(groups.first, batch, seq_lens, self._still_at_images(batch))

    def _of_own(
        self, groups: Families, input_batch: InputBatch, build: Build, tables: tuple | None
    ) -> dict[str, Any]:
        """Metadata of the groups that are compacted.

        One build for all that are alike, where the backend's metadata allows it; one each for
        others and for captures (no `tables`), in which a builder may write to what it is given.
        """
        assert self.lengths is not None and groups.first is not None
        seq_lens = self.lengths.group_seq_lens(input_batch)
        req_ids = self._still_at_images(input_batch)

        def build_one(group: int) -> dict[str, Any]:
            return build((group,), self._seen_by(group, input_batch, seq_lens, req_ids))

        metadata = build_one(groups.first)
        built = groups.alike + groups.rest
        first = next(iter(metadata.values()))
        if groups.alike and tables is not None and derives(first):
            built = groups.rest
            longest = self.lengths.max_seq_lens(input_batch, len(first.seq_lens))
            metadata |= groups.derive(first, seq_lens, longest, *tables)
        for each in built:
            metadata |= build_one(each)
        return metadata

    def _still_at_images(self, batch: InputBatch) -> list[str]:
        """The batch's requests, those that have lost tokens without name.

        By name the host finds the places of images, whose tokens see each other both ways in some
        models. A compacted request is behind all of its images, and its keys are elsewhere.
        """
        if not self.model_config.is_mm_prefix_lm:
            return batch.req_ids
        assert self.lengths is not None
        lost = self.lengths.have_lost(batch)
        return ["" if gone else name for name, gone in zip(batch.req_ids, lost, strict=True)]

    def _seen_by(
        self, group: int, batch: InputBatch, seq_lens: torch.Tensor, req_ids: list[str]
    ) -> InputBatch:
        """A batch whose requests are as long as `group` has them, by `group_seq_lens`."""
        assert self.lengths is not None
        seen = object.__new__(type(batch))  # copy.copy takes as long as a build
        seen.__dict__ = batch.__dict__.copy()
        seen.req_ids = req_ids
        seen.seq_lens = seq_lens[group, : batch.seq_lens.shape[0]]
        seen.seq_lens_cpu_upper_bound = self.lengths.group_upper_bound(batch, group)
        return seen

    def _families_of(self, attn_groups: list[list[Any]]) -> Families:
        # Groups and their builders are made anew when the cache is; the list is held, so that no
        # other one can be at its address.
        if self._families is None or self._families[0] is not attn_groups:
            numbers = enumerate(self._groups.layer_groups)
            whole = frozenset(group for group, number in numbers if number is None)
            self._families = (attn_groups, Families.of(attn_groups, whole))
        return self._families[1]


TRIED = frozenset(
    {
        "vllm.v1.worker.gpu.model_states.default:DefaultModelState",
        "vllm.v1.worker.gpu.model_states.mamba_hybrid:MambaHybridModelState",
    }
)
"""Model states of vLLM's that compression has been tried with."""


def compressed(host: type[DefaultModelState]) -> type[CompressionStateMixin]:
    """The class of model state that has compression over vLLM's `host`.

    Raises
    ------
    UnsupportedModelError
        If it has not been tried with that state: a state decides what a step reads and writes.
    """
    if f"{host.__module__}:{host.__qualname__}" not in TRIED:
        raise UnsupportedModelError(
            f"--kv-compression: the model has a state of its own ({host.__name__}), with which "
            "compression has not been tried: choose another model, or drop --kv-compression."
        )
    if host not in _made:
        _made[host] = type(f"Compressed{host.__name__}", (CompressionStateMixin, host), {})
    return _made[host]


_made: dict[type[Any], type[CompressionStateMixin]] = {}
