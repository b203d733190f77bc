"""Folds the queries of whole prompts into summaries, chunk by chunk.

For policies that read all queries (H2O's accumulated attention, Expected Attention's statistics).
A layer's queries are folded as soon as its attention has run, so that those of one layer at most
exist at a time and none is copied. That is in the middle of the forward pass, which goes on for all
whatever a policy does there: what it raises ends the folding of this one prompt, and is raised
where the summary is asked for.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from vllm_kvcompress.kernels.cache.rows import CacheRows
from vllm_kvcompress.policies.base import Policy
from vllm_kvcompress.policies.inputs import ChunkInputs
from vllm_kvcompress.worker.layout.layer_cache import LayerCache

if TYPE_CHECKING:
    from vllm.v1.worker.gpu.input_batch import InputBatch

ReadRows = Callable[[LayerCache, int, int, torch.Tensor], CacheRows]
"""Takes a layer, a request row, a number of tokens and the queries [H, w, D] of the last of them;
returns those tokens' rows."""


@dataclass
class _Summary:
    """One request: its policy, how far it got, and what `accumulate` made so far, per layer.

    `error` is why there is no summary.
    """

    policy: Policy
    prompt_len: int
    num_sink_tokens: int
    num_folded: int = 0
    layers: dict[str, Any] = field(default_factory=dict)
    error: Exception | None = None


@dataclass(frozen=True)
class _Chunk:
    """Tokens [start, end) of this step belong to `request_id`, from position `position` on."""

    request_id: str
    req_index: int
    start: int
    end: int
    position: int


class PromptQueries:
    """Summaries of the prompts that are being prefilled."""

    def __init__(self) -> None:
        self._summaries: dict[str, _Summary] = {}
        self._chunks: list[_Chunk] = []
        self._folded: set[str] = set()  # layers of the current step
        self._layers: dict[str, LayerCache] = {}
        self._read_rows: ReadRows

    def bind(self, layers: Sequence[LayerCache], read_rows: ReadRows) -> None:
        """Tell this rank's attention layers and how to read their caches, once those exist."""
        self._layers = {layer.name: layer for layer in layers}
        self._read_rows = read_rows

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
        if summary is None or summary.error is not None:
            return False
        return num_computed < summary.prompt_len

    def begin_batch(self, input_batch: "InputBatch") -> None:
        """Find out which of the batch's tokens to fold the queries of.

        There is no summary if tokens before them were never seen, as after a prefix-cache hit.
        """
        self._chunks, self._folded = [], set()
        starts = input_batch.query_start_loc_np
        for row, request_id in enumerate(input_batch.req_ids if self._summaries else ()):
            computed = int(input_batch.num_computed_tokens_np[row])
            if not self.wants(request_id, computed):
                continue
            summary = self._summaries[request_id]
            if computed != summary.num_folded:
                summary.error = RuntimeError(
                    f"{summary.num_folded} tokens of request {request_id} were folded when those "
                    f"from {computed} on came; please report this. --enforce-eager avoids it."
                )
                continue
            count = min(int(input_batch.num_scheduled_tokens[row]), summary.prompt_len - computed)
            start = int(starts[row])
            req_index = int(input_batch.idx_mapping_np[row])
            self._chunks.append(_Chunk(request_id, req_index, start, start + count, computed))

    @property
    def is_active(self) -> bool:
        """Whether the current batch has tokens of such prompts."""
        return bool(self._chunks)

    def record(self, layer_name: str, query: torch.Tensor) -> None:
        """Fold what `begin_batch` asked for; nothing of `query` is kept."""
        layer = self._layers[layer_name]
        self._folded.add(layer_name)
        for chunk in self._chunks:
            summary = self._summaries[chunk.request_id]
            if summary.error is None:
                try:
                    self._fold(summary, chunk, layer, query[chunk.start : chunk.end])
                except Exception as error:  # a policy's, or no memory: any of them
                    summary.error = error

    def _fold(
        self, summary: _Summary, chunk: _Chunk, layer: LayerCache, query: torch.Tensor
    ) -> None:
        """Fold a chunk's queries [tokens, num_heads, head_dim] of one layer."""
        num_tokens = chunk.position + chunk.end - chunk.start
        rows = self._read_rows(layer, chunk.req_index, num_tokens, query.transpose(0, 1))
        inputs = ChunkInputs(
            rows=rows,
            start=chunk.position,
            prompt_len=summary.prompt_len,
            num_sink_tokens=summary.num_sink_tokens,
            rotary=layer.rotary if summary.policy.needs_rotary else None,
        )
        before = summary.layers.get(layer.name)
        summary.layers[layer.name] = summary.policy.accumulate(before, inputs)

    def end_batch(self) -> None:
        """Count the step's tokens.

        There is no summary if a layer's queries were never seen: a graph ran without Python.
        """
        chunks, self._chunks = self._chunks, []
        for chunk in chunks:
            summary = self._summaries[chunk.request_id]
            if summary.error is None and self._folded != self._layers.keys():
                summary.error = RuntimeError(
                    f"tokens from {chunk.position} on of request {chunk.request_id} were folded in "
                    f"{len(self._folded)} of {len(self._layers)} layers; please report this. "
                    "--enforce-eager avoids it."
                )
            summary.num_folded += chunk.end - chunk.start

    def take(self, request_id: str, layer_name: str) -> Any:
        """A layer's summary of the whole prompt; raises what there is none for."""
        summary = self._summaries[request_id]
        if summary.error is not None:
            raise summary.error
        assert summary.num_folded == summary.prompt_len, (summary.num_folded, summary.prompt_len)
        return summary.layers[layer_name]
