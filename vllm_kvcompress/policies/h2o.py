"""H2O: what the whole prompt has attended to."""

import torch

from vllm_kvcompress.policies.base import Policy
from vllm_kvcompress.policies.inputs import ChunkInputs, Queries, ScoreInputs


class H2O(Policy):
    """H2O: attention that all prompt queries pay to a key, per KV head ("heavy hitters").

    The paper adds attention up, which favours early keys: more queries see them. Its recent tokens
    are `observation_window` of the configuration. It evicts one token per generated token; here,
    as in NVIDIA/kvpress and KVCache-Factory, the prompt is compressed once. Scores of a group of
    query heads are averaged, so that a KV head keeps one set of tokens. All queries times all keys:
    as many operations again as the attention of the prompt. (arXiv 2306.14048)

    Attributes
    ----------
    average : bool, default False
        Divide by the number of queries that see the key, as kvpress's ObservedAttentionPress does.
    """

    average: bool = False

    @property
    def queries(self) -> Queries:
        """All prompt queries."""
        return Queries.PROMPT

    def accumulate(self, accumulated: torch.Tensor | None, chunk: ChunkInputs) -> torch.Tensor:
        """Add a chunk's attention to [num_kv_heads, prompt_len] float32 sums."""
        if accumulated is None:
            accumulated = torch.zeros(
                (chunk.rows.num_kv_heads, chunk.prompt_len),
                dtype=torch.float32,
                device=chunk.rows.device,
            )
        sums = chunk.rows.attention_sums()
        accumulated[:, : sums.shape[1]] += sums
        return accumulated

    @property
    def latent_obstacle(self) -> str | None:
        """A chunk's queries would have to be absorbed, which no memory is kept free for."""
        return "reads the queries of the whole prompt"

    def score(self, inputs: ScoreInputs) -> torch.Tensor:
        """Return the attention each key has received."""
        sums: torch.Tensor | None = inputs.accumulated
        assert sums is not None
        if not self.average:
            return sums
        num_tokens = sums.shape[1]
        return sums / torch.arange(num_tokens, 0, -1, dtype=torch.float32, device=sums.device)
