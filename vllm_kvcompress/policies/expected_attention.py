"""Expected Attention: what queries to come will probably attend to."""

import torch
from pydantic import Field
from torch.nn.functional import pad

from vllm_kvcompress.kernels.formulas.expected_attention import expected_attention_scores
from vllm_kvcompress.kernels.formulas.query_statistics import QueryStatistics
from vllm_kvcompress.kernels.formulas.rotary import Rotary
from vllm_kvcompress.policies.base import Policy
from vllm_kvcompress.policies.inputs import ChunkInputs, Queries, ScoreInputs
from vllm_kvcompress.policies.layer_shape import LayerShape


class ExpectedAttention(Policy):
    """Expected Attention: attention expected of future queries, times the length of the value.

    Queries before RoPE are taken as normally distributed, with mean and covariance of the prompt's
    own; RoPE, averaged over the next positions, turns the two to where queries will be. Scores of a
    group of query heads are averaged. During decoding the statistics are those of the last
    `observation_window` queries, far fewer than a prompt's. (arXiv 2510.00636; defaults as in
    NVIDIA/kvpress, whose leaderboard entry has epsilon 0.01.)

    Attributes
    ----------
    n_future_positions : int, default 512
        Positions to come that RoPE is averaged over.
    n_sink : int, default 4
        First tokens: their queries are left out, being outliers, and they score highest.
    use_covariance : bool, default True
        Whether the spread of the queries counts, not only their mean.
    use_vnorm : bool, default True
        Whether scores are multiplied by the Euclidean length of the value.
    epsilon : float, default 0.0
        Added to the expected attention before that multiplication.
    """

    n_future_positions: int = Field(default=512, ge=1)
    n_sink: int = Field(default=4, ge=0)
    use_covariance: bool = True
    use_vnorm: bool = True
    epsilon: float = Field(default=0.0, ge=0)

    @property
    def needs_rotary(self) -> bool:
        """To undo and redo the queries' rotation."""
        return True

    @property
    def queries(self) -> Queries:
        """All prompt queries; during decoding those of the window."""
        return Queries.PROMPT

    @property
    def runs_while_decoding(self) -> bool:
        """The window's queries serve then."""
        return True

    def accumulate(
        self, accumulated: QueryStatistics | None, chunk: ChunkInputs
    ) -> QueryStatistics:
        """Merge the statistics of a chunk's queries before RoPE, sinks left out."""
        assert chunk.rotary is not None
        skipped = min(max(self.n_sink - chunk.start, 0), chunk.queries.shape[1])
        statistics = _statistics(chunk.queries[:, skipped:], chunk.start + skipped, chunk.rotary)
        return statistics if accumulated is None else accumulated.merge(statistics)

    @property
    def latent_obstacle(self) -> str | None:
        """Absorbed queries are not turned by a rotary embedding."""
        return "turns whole queries back to before their rotary embedding"

    def working_bytes(self, layer: LayerShape, num_tokens: int) -> int:
        """Copies of keys and values; of one head keys in float32 and two products of them.

        Two covariances besides, of every query head.
        """
        per_token = 2 * layer.copy_bytes + 3 * layer.float_bytes
        covariances = 2 * layer.num_heads * layer.head_dim * layer.float_bytes
        return super().working_bytes(layer, num_tokens) + per_token * num_tokens + covariances

    def score(self, inputs: ScoreInputs) -> torch.Tensor:
        """Return expected attention times value length; sinks get the head's maximum plus 1."""
        assert inputs.rotary is not None
        statistics: QueryStatistics | None = inputs.accumulated
        if statistics is None:
            assert inputs.queries is not None
            start = inputs.position - inputs.queries.shape[1]
            statistics = _statistics(inputs.queries, start, inputs.rotary)
        mean, covariance = self._future(statistics, inputs.position, inputs.rotary)
        keys, values = inputs.keys[:, self.n_sink :], inputs.values[:, self.n_sink :]
        scores = expected_attention_scores(mean, covariance, keys, inputs.scale, inputs.rows.terms)
        if self.use_vnorm:
            scores = (scores + self.epsilon) * values.norm(dim=-1, dtype=torch.float32)
        num_sinks = inputs.keys.shape[1] - keys.shape[1]
        highest = pad(scores, (1, 0)).amax(dim=1, keepdim=True) + 1  # padded: all may be sinks
        return torch.cat([highest.expand(-1, num_sinks), scores], dim=1)

    def _future(
        self, statistics: QueryStatistics, position: int, rotary: Rotary
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Mean [H, D] and covariance [H, D, D] of queries from `position` on, after RoPE."""
        device = statistics.mean.device
        positions = torch.arange(position, position + self.n_future_positions, device=device)
        mean = rotary.rotate_on_average(statistics.mean, positions)
        if not self.use_covariance:
            return mean, None
        half = rotary.rotate_on_average(statistics.covariance, positions)
        return mean, rotary.rotate_on_average(half.transpose(1, 2), positions)


def _statistics(queries: torch.Tensor, start: int, rotary: Rotary) -> QueryStatistics:
    """Statistics of [H, m, D] queries of positions from `start` on, with RoPE undone."""
    positions = torch.arange(start, start + queries.shape[1], device=queries.device)
    return QueryStatistics.of(rotary.rotate(queries.float(), -positions))
