"""What some layers do to logits besides scaling them: a soft cap, and learned sinks.

    L[h, i, j] = cap * tanh(q[h, i] . k[h // g, j] * scale / cap)   (Gemma 2, 2408.00118)
    A[h, i, j] = exp(L[h, i, j]) / (exp(sink[h]) + sum_j exp(L[h, i, j]))   (gpt-oss, 2508.10925)

A sink is one more logit in the denominator of each row. It is no token: nothing is kept or evicted
for it, and rows of A add up to less than 1. The dimensions are those of `window_attention`.
"""

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class SoftmaxTerms:
    """A layer's soft cap and sinks, on one rank.

    Attributes
    ----------
    soft_cap : float, default 0
        Bound of the logits; 0: none.
    sinks : torch.Tensor, optional
        [H] logits, any float dtype, as the layer holds them.
    """

    soft_cap: float = 0.0
    sinks: torch.Tensor | None = None

    def cap_(self, logits: torch.Tensor) -> torch.Tensor:
        """Cap scaled logits in place, and return them."""
        if not self.soft_cap:
            return logits
        return logits.div_(self.soft_cap).tanh_().mul_(self.soft_cap)

    def of_heads(self, start: int, end: int) -> "SoftmaxTerms":
        """The terms of query heads [start, end)."""
        return self if self.sinks is None else replace(self, sinks=self.sinks[start:end])

    def strongest(self) -> "SoftmaxTerms":
        """With the highest sink alone: for rows that are the maximum over all heads."""
        return self if self.sinks is None else replace(self, sinks=self.sinks.amax(0, keepdim=True))

    def attention(self, logits: torch.Tensor) -> torch.Tensor:
        """Softmax of capped logits [H, ..., n] over n, sinks in the denominators."""
        if self.sinks is None:
            return logits.softmax(dim=-1)
        sinks = self.sinks.to(logits.dtype).view(-1, *[1] * (logits.dim() - 2))
        total = torch.logaddexp(logits.logsumexp(dim=-1), sinks)
        return (logits - total[..., None]).exp_()


PLAIN = SoftmaxTerms()
"""Of most models: softmax alone."""
