"""ChunkKV: chunks of tokens live or die together, by another policy's scores."""

import torch
from pydantic import Field
from torch.nn.functional import pad

from vllm_kvcompress.kernels.compaction.tiers import ranks
from vllm_kvcompress.policies.inputs import ScoreInputs
from vllm_kvcompress.policies.wrapping import WrappingPolicy


class ChunkKV(WrappingPolicy):
    """ChunkKV: rank contiguous chunks by the mean of the scorer's scores over heads and tokens.

    All heads of a layer keep the same chunks. A chunk with a token that is kept anyway (a sink,
    the observation window, a pin) comes before all others, so that it stays whole. Where the
    budget ends inside a chunk, its first tokens are kept. The paper's sharing of one layer's choice
    with its neighbours is not done. (arXiv 2502.00299; defaults as in NVIDIA/kvpress)

    Attributes
    ----------
    scorer : ScorerConfig, default snapkv
        The policy that scores tokens.
    chunk_length : int, default 20
        Tokens per chunk, counted from position 0; the last chunk may be shorter.
    """

    chunk_length: int = Field(default=20, ge=1)

    def score(self, inputs: ScoreInputs) -> torch.Tensor:
        """Give every token the rank of its chunk."""
        scores = self.inner.score(inputs)
        tokens = inputs.mean_over_heads(scores)[0]  # [n]; one row, all heads and ranks agree
        chunks = self._split(tokens).sum(dim=1) / self._split(torch.ones_like(tokens)).sum(dim=1)
        stays = self._split(inputs.forced).any(dim=1)
        ranked = ranks(chunks) + stays * chunks.shape[0]
        spread = ranked.repeat_interleave(self.chunk_length)[: tokens.shape[0]]
        return spread.expand_as(scores)

    def _split(self, tokens: torch.Tensor) -> torch.Tensor:
        """[n] -> [number of chunks, chunk_length], the last chunk filled up with zeros."""
        return pad(tokens, (0, -tokens.shape[0] % self.chunk_length)).view(-1, self.chunk_length)
