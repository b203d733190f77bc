"""Mean and covariance of query vectors that arrive in chunks.

Chunks are merged by the parallel update of Chan, Golub and LeVeque (1979): with a before and b new
vectors, d the difference of their means,

    mean = mean_a + d b / (a + b),   scatter = scatter_a + scatter_b + d d^T a b / (a + b)

where scatter is the sum of (q - mean)(q - mean)^T. E[q q^T] - mean mean^T would subtract numbers
that are nearly equal wherever the mean is large against the spread, as it is for queries.
Dimensions: H query heads, m vectors of a chunk, D head_dim.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class QueryStatistics:
    """Statistics of the vectors seen so far, per query head.

    Attributes
    ----------
    count : int
        Number of vectors; with 0, `mean` and `scatter` are zero.
    mean : torch.Tensor
        [H, D] float32.
    scatter : torch.Tensor
        [H, D, D] float32, sum of the outer products of deviations from the mean.
    """

    count: int
    mean: torch.Tensor
    scatter: torch.Tensor

    @classmethod
    def of(cls, vectors: torch.Tensor) -> "QueryStatistics":
        """Statistics of [H, m, D] vectors of any float dtype; m may be 0."""
        vectors = vectors.float()
        count = vectors.shape[1]
        mean = vectors.sum(dim=1) / max(count, 1)
        centred = vectors - mean[:, None]
        return cls(count, mean, centred.transpose(1, 2) @ centred)

    def merge(self, other: "QueryStatistics") -> "QueryStatistics":
        """Statistics of both sets of vectors together."""
        count = self.count + other.count
        weight = other.count / max(count, 1)
        difference = other.mean - self.mean
        outer = difference[:, :, None] * difference[:, None, :]
        return QueryStatistics(
            count,
            self.mean + difference * weight,
            self.scatter + other.scatter + outer * (self.count * weight),
        )

    @property
    def covariance(self) -> torch.Tensor:
        """[H, D, D] float32: mean, not sum / (count - 1), of the outer products."""
        return self.scatter / max(self.count, 1)
