"""Where a replay's compactor finds queries: all of them are at hand."""

from typing import Any

import torch

from vllm_kvcompress.config.settings import CompressionConfig
from vllm_kvcompress.evaluation.replay_attention import softmax_terms
from vllm_kvcompress.evaluation.replay_states import attention_of
from vllm_kvcompress.kernels.cache.rows import DenseRows
from vllm_kvcompress.policies.base import Policy
from vllm_kvcompress.policies.inputs import ChunkInputs

CHUNK = 1024


class WindowQueries:
    """Queries of a prompt, or of its last part: the last ones at hand are those of the window."""

    def __init__(self, prompt: Any, size: int) -> None:
        self.prompt, self.size = prompt, size

    def take(self, request_id: str, layer_name: str, end: int) -> torch.Tensor:
        """Queries of the observation window that ends at a position."""
        return self.prompt.queries[int(layer_name)][:, -self.size :]


class PromptSummaries:
    """`Policy.accumulate` over a prompt, once per policy."""

    def __init__(self, prompt: Any, config: CompressionConfig, replay: Any) -> None:
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
        values, attention = self.prompt.values[layer], attention_of(self.replay.layers[layer])
        scale, terms = attention.scaling, softmax_terms(attention)
        summary, length = None, queries.shape[1]
        for start in range(0, length, CHUNK):
            end = min(start + CHUNK, length)
            summary = policy.accumulate(
                summary,
                ChunkInputs(
                    rows=DenseRows(
                        keys[:, :end], values[:, :end], queries[:, start:end], scale, terms
                    ),
                    start=start,
                    prompt_len=length,
                    num_sink_tokens=self.config.num_sink_tokens,
                    rotary=self.replay.rotaries[layer] if policy.needs_rotary else None,
                ),
            )
        return summary
