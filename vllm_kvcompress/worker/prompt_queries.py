"""Folds the queries of whole prompts into summaries, chunk by chunk.

For policies that read all queries (H2O's accumulated attention, Expected Attention's statistics).
The queries of one step are held until its forward pass is done, then folded and dropped.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.v1.worker.gpu.input_batch import InputBatch

from vllm_kvcompress.policies.base import Policy
from vllm_kvcompress.policies.inputs import ChunkInputs


@dataclass
class _Summary:
    """One request: its policy, how far it got, and what `accumulate` made so far, per layer."""

    policy: Policy
    prompt_len: int
    num_sink_tokens: int
    num_folded: int = 0
    layers: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Chunk:
    """Tokens [start, end) of this step belong to `request_id`, from position `position` on."""

    request_id: str
    req_index: int
    start: int
    end: int
    position: int
    queries: dict[str, torch.Tensor] = field(default_factory=dict)


class PromptQueries:
    """Summaries of the prompts that are being prefilled."""

    def __init__(self) -> None:
        self._summaries: dict[str, _Summary] = {}
        self._chunks: list[_Chunk] = []

    def add_request(
        self, request_id: str, policy: Policy, prompt_len: int, num_sink_tokens: int
    ) -> None:
        """Expect a prompt from its first token on."""
        self._summaries[request_id] = _Summary(policy, prompt_len, num_sink_tokens)

    def remove_request(self, request_id: str) -> None:
        """Drop what was collected; unknown ids are fine."""
        self._summaries.pop(request_id, None)

    @property
    def awaits_requests(self) -> bool:
        """Whether queries of any request are expected."""
        return bool(self._summaries)

    def wants(self, request_id: str, num_computed: int) -> bool:
        """Whether tokens from `num_computed` on are still to be folded."""
        summary = self._summaries.get(request_id)
        return summary is not None and num_computed < summary.prompt_len

    def begin_batch(self, input_batch: InputBatch) -> None:
        """Find out which of the batch's tokens to keep the queries of."""
        self._chunks = []
        starts = input_batch.query_start_loc_np
        for row, request_id in enumerate(input_batch.req_ids if self._summaries else ()):
            computed = int(input_batch.num_computed_tokens_np[row])
            if not self.wants(request_id, computed):
                continue
            prompt_len = self._summaries[request_id].prompt_len
            count = min(int(input_batch.num_scheduled_tokens[row]), prompt_len - computed)
            start = int(starts[row])
            req_index = int(input_batch.idx_mapping_np[row])
            self._chunks.append(_Chunk(request_id, req_index, start, start + count, computed))

    @property
    def is_active(self) -> bool:
        """Whether the current batch has tokens of such prompts."""
        return bool(self._chunks)

    def record(self, layer_name: str, query: torch.Tensor) -> None:
        """Copy what `begin_batch` asked for."""
        for chunk in self._chunks:
            chunk.queries[layer_name] = query[chunk.start : chunk.end].clone()

    def end_batch(self, layers: list[Any], read_keys: Callable[[Any, int, int], Any]) -> None:
        """Fold the step's queries.

        Parameters
        ----------
        layers : list[LayerCache]
            This rank's attention layers.
        read_keys : callable
            Takes a layer, a request row and a number of tokens; returns their keys
            [num_kv_heads, num_tokens, head_dim].

        Raises
        ------
        RuntimeError
            If tokens were never seen: a prefix-cache hit, or a graph that ran without Python.
        """
        chunks, self._chunks = self._chunks, []
        for chunk in chunks:
            summary = self._summaries[chunk.request_id]
            if chunk.position != summary.num_folded or len(chunk.queries) < len(layers):
                raise RuntimeError(
                    f"KV compression: {summary.num_folded} tokens of request {chunk.request_id} "
                    f"were folded when those from {chunk.position} on came, in "
                    f"{len(chunk.queries)} of {len(layers)} layers; please report this. "
                    "--enforce-eager avoids it."
                )
            summary.num_folded += chunk.end - chunk.start
            for layer in layers:
                summary.layers[layer.name] = summary.policy.accumulate(
                    summary.layers.get(layer.name),
                    ChunkInputs(
                        queries=chunk.queries.pop(layer.name).transpose(0, 1),
                        keys=read_keys(layer, chunk.req_index, summary.num_folded),
                        start=chunk.position,
                        prompt_len=summary.prompt_len,
                        scale=layer.scale,
                        num_sink_tokens=summary.num_sink_tokens,
                        rotary=layer.rotary if summary.policy.needs_rotary else None,
                    ),
                )

    def take(self, request_id: str, layer_name: str) -> Any:
        """A layer's summary of the whole prompt."""
        summary = self._summaries[request_id]
        assert summary.num_folded == summary.prompt_len, (summary.num_folded, summary.prompt_len)
        return summary.layers[layer_name]
