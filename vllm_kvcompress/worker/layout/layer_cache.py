"""One attention layer, as far as compaction is concerned."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from vllm_kvcompress.errors import UnsupportedModelError
from vllm_kvcompress.kernels.formulas.rotary import Rotary
from vllm_kvcompress.kernels.formulas.softmax_terms import PLAIN, SoftmaxTerms
from vllm_kvcompress.policies.base import Policy
from vllm_kvcompress.worker.layout.base import CacheLayout


@dataclass(frozen=True)
class LayerCache:
    """One attention layer and where its cache lies.

    Attributes
    ----------
    name : str
        vLLM's name of the layer.
    index : int
        Number of the layer in the model, from 0.
    group : int
        KV cache group.
    scale : float
        Softmax scale.
    layout : CacheLayout
        How its blocks are laid out.
    cache : callable
        Returns the layer's cache tensor (it is bound late and may be rebound).
    rotary : Rotary or None
        Its rotary embedding.
    output_projection : callable or None
        Returns [num_heads, hidden_size, head_dim].
    terms : SoftmaxTerms
        Its soft cap and learned sinks, those of this rank's heads.
    """

    name: str
    index: int
    group: int
    scale: float
    layout: CacheLayout
    cache: Callable[[], torch.Tensor]
    rotary: Rotary | None = None
    output_projection: Callable[[], torch.Tensor] | None = None
    terms: SoftmaxTerms = PLAIN

    def require(self, policy: Policy) -> None:
        """Refuse a policy that needs a part that the layer does not have.

        Raises
        ------
        UnsupportedModelError
            Naming the layer and the part.
        """
        name = type(policy).__name__
        if (policy.needs_rotary or policy.rerotates_keys) and self.rotary is None:
            raise UnsupportedModelError(
                f"--kv-compression: {name} needs a plain rotary embedding beside {self.name}, and "
                "there is none: choose a policy that does not, or drop --kv-compression."
            )
        if policy.needs_output_projection and self.output_projection is None:
            raise UnsupportedModelError(
                f"--kv-compression: {name} needs the output projection beside {self.name}, and "
                "there is none: choose a policy that does not, or drop --kv-compression."
            )
