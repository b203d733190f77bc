"""R-KV: keep what is looked at and not said twice."""

import torch
from pydantic import Field
from torch.nn.functional import pad

from vllm_kvcompress.kernels.formulas.window_attention import window_logits
from vllm_kvcompress.policies.base import KernelSize, Policy
from vllm_kvcompress.policies.inputs import Queries, ScoreInputs
from vllm_kvcompress.policies.layer_shape import LayerShape
from vllm_kvcompress.policies.pooling import pool


class RKV(Policy):
    """R-KV: score = lambda * importance - (1 - lambda) * redundancy, per KV head.

    Made for reasoning models, whose long answers repeat themselves, and for compactions during
    decoding. Importance is the attention of the last queries: the highest logit of the query heads
    of a KV head, a softmax over the tokens before the window (and the strongest
    learned sink of those heads, where a layer has sinks), the mean over the window's queries,
    the maximum over neighbours. Redundancy is a softmax over all tokens of a key's mean cosine
    similarity to the other keys. For every key, the pair with its latest similar key is left out,
    so of a run of repetitions the latest stays. A key without a similar one leaves out its pair
    with the first token, as in the authors' code, which favours the attention sink. Scoring is
    quadratic in the number of cached tokens, so use it with a budget in tokens.
    (arXiv 2505.24133, Zefan-Cai/R-KV)

    Attributes
    ----------
    importance_weight : float, default 0.07
        The paper's lambda, in [0, 1]. The code's default; the paper's text says 0.1.
    kernel_size : int, default 7
        Width of the pooling of importance, in tokens; odd.
    similarity_threshold : float, default 0.5
        Cosine above which two keys are similar, in [0, 1].
    """

    importance_weight: float = Field(default=0.07, ge=0, le=1)
    kernel_size: KernelSize = 7
    similarity_threshold: float = Field(default=0.5, ge=0, le=1)

    @property
    def queries(self) -> Queries:
        """Those of the observation window."""
        return Queries.WINDOW

    @property
    def latent_obstacle(self) -> str | None:
        """None: absorbed queries pay the attention of all heads, and a row is a key."""
        return None

    def working_bytes(self, layer: LayerShape, num_tokens: int) -> int:
        """A copy of the keys; of one head at a time keys in float32 and logits."""
        one_head = 3 * layer.float_bytes + 2 * layer.logit_bytes
        per_token = layer.copy_bytes + one_head
        return super().working_bytes(layer, num_tokens) + per_token * num_tokens

    def score(self, inputs: ScoreInputs) -> torch.Tensor:
        """Return importance against redundancy; tokens of the window have no importance."""
        assert inputs.queries is not None
        window = inputs.queries.shape[1]
        past = inputs.keys.shape[1] - window
        rows = []
        terms, group = inputs.rows.terms, inputs.queries.shape[0] // inputs.keys.shape[0]
        each_head = window_logits(inputs.queries, inputs.keys, inputs.scale, terms)
        for head, logits in enumerate(each_head):
            strongest = logits[:, :, :past].amax(dim=0)  # [w, n - w]
            own = terms.of_heads(head * group, (head + 1) * group).strongest()
            rows.append(own.attention(strongest[None])[0].mean(dim=0))
        importance = pad(pool(torch.stack(rows), self.kernel_size, "max"), (0, window))
        redundancy = inputs.rows.key_redundancy(self.similarity_threshold).softmax(dim=-1)
        weight = self.importance_weight
        return weight * importance - (1 - weight) * redundancy
