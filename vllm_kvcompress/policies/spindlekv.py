"""SpindleKV, its eviction: what the end of the prompt attends to, weighed by how long it could."""

from typing import Literal

import torch

from vllm_kvcompress.kernels.compaction.tiers import ranks
from vllm_kvcompress.policies.base import KernelSize, Policy
from vllm_kvcompress.policies.inputs import Queries, ScoreInputs
from vllm_kvcompress.policies.layer_shape import LayerShape
from vllm_kvcompress.policies.pooling import pool_before_window


class SpindleKV(Policy):
    """SpindleKV: attention of the observation window over the number of tokens since.

    A token a of l scores, for one query head, the attention that the window's queries pay it, added
    up and divided by l - a: recent tokens count more. Where several query heads share a KV head the
    paper repeats the keys and values and lets every query head keep its own best tokens. That takes
    up to H / KV times the memory at the same ratio, and how much is known only afterwards; here the
    scheduler fixes the number of tokens beforehand. "union" is the form of that idea which spends
    what "kv_head" spends: a KV head keeps every token that one of its query heads has among its
    best k', with the largest k' that fits, and all its query heads attend to all of them. The
    paper's membership per query head is not kept.

    Only prompts are compressed, as in the paper: while decoding, a place in the cache is no longer
    a position. The paper names neither the window (the preset's 32 is ours) nor a pooling.
    (arXiv 2507.06517, section on deep layers; no code was published)

    Attributes
    ----------
    selection : {"kv_head", "union"}, default "kv_head"
        How the query heads of a KV head agree: by their mean score (the paper's "w/o repeat"), or
        every one of them has its best tokens kept.
    kernel_size : int, default 1
        Width of an average pooling over neighbours, in tokens; odd. 1 is the paper's: none.
    """

    selection: Literal["kv_head", "union"] = "kv_head"
    kernel_size: KernelSize = 1

    @property
    def queries(self) -> Queries:
        """Those of the observation window."""
        return Queries.WINDOW

    @property
    def runs_while_decoding(self) -> bool:
        """No: see the class."""
        return False

    @property
    def latent_obstacle(self) -> str | None:
        """None: absorbed queries pay the attention of all heads."""
        return None

    def working_bytes(self, layer: LayerShape, num_tokens: int) -> int:
        """Ranks of every query head, where these choose together."""
        kept = super().working_bytes(layer, num_tokens)
        return kept if self.selection == "kv_head" else kept + 32 * layer.num_heads * num_tokens

    def score(self, inputs: ScoreInputs) -> torch.Tensor:
        """Return accumulated scores, or for "union" the ranks that they give."""
        assert inputs.queries is not None
        rows, window = inputs.rows, inputs.queries.shape[1]
        if self.selection == "kv_head":
            return self._accumulated(rows.attention(window), window)
        heads = self._accumulated(rows.head_attention(window), window)
        return best_ranks(heads.unflatten(0, (rows.num_kv_heads, -1)), inputs.forced)

    def _accumulated(self, attention: torch.Tensor, window: int) -> torch.Tensor:
        """The paper's ac [heads, n] from mean attention, pooled up to the window."""
        num_tokens = attention.shape[1]
        since = torch.arange(num_tokens, 0, -1, device=attention.device)
        scores = attention * window / since
        return pool_before_window(scores, window, self.kernel_size, "avg")


def best_ranks(scores: torch.Tensor, forced: torch.Tensor) -> torch.Tensor:
    """Order the tokens of each KV head by the best rank one of its query heads gives them.

    Tokens that have that rank in common, one per query head, are ordered by the score they have it
    for, then by position.

    Parameters
    ----------
    scores : torch.Tensor
        [KV, g, n] float, finite, of the g query heads of each KV head.
    forced : torch.Tensor
        [n] bool: tokens that remain anyway and take no rank from others.

    Returns
    -------
    torch.Tensor
        [KV, n] float32, n - 1 for the first and 0 for the last; forced tokens come first.
    """
    scores = scores.masked_fill(forced, float("inf"))
    given = ranks(scores)
    best = given.amax(dim=1, keepdim=True)  # [KV, 1, n]
    leading = scores.masked_fill(given < best, float("-inf")).amax(dim=1)
    # Two ranks below n in one number: exact in 64 bits.
    return ranks(best[:, 0].long() * scores.shape[-1] + ranks(leading).long())
