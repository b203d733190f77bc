"""Base class of policies that work on another policy's scores."""

from typing import Any

from pydantic import model_validator

from vllm_kvcompress.config.settings import PolicyConfig
from vllm_kvcompress.policies.base import Policy
from vllm_kvcompress.policies.inputs import ChunkInputs, Queries
from vllm_kvcompress.policies.layer_shape import LayerShape
from vllm_kvcompress.registry import load_policy_class


class ScorerConfig(PolicyConfig):
    """The policy whose scores another policy works on: its name and its own parameters.

    Reading a setting validates every parameter of a policy that is a `PolicyConfig`.
    """

    def build(self) -> Any:
        """Instantiate it."""
        return load_policy_class(self.name)(**self.params)


class WrappingPolicy(Policy):
    """Base class of policies that work on another policy's scores.

    Attributes
    ----------
    scorer : ScorerConfig
        Name and parameters of the policy that scores.
    """

    scorer: ScorerConfig = ScorerConfig(name="snapkv")

    @model_validator(mode="after")
    def _scorer_is_valid(self) -> "WrappingPolicy":
        if issubclass(load_policy_class(self.scorer.name), WrappingPolicy):
            raise ValueError(f"scorer: {self.scorer.name} itself works on another policy's scores")
        inner = self.scorer.build()
        if inner.rerotates_keys:
            raise ValueError(f"scorer: {self.scorer.name} must not re-rotate keys here")
        return self

    @property
    def inner(self) -> Policy:
        """The policy that scores."""
        return self.scorer.build()

    @property
    def queries(self) -> Queries:
        """As the scorer."""
        return self.inner.queries

    @property
    def needs_output_projection(self) -> bool:
        """As the scorer."""
        return self.inner.needs_output_projection

    @property
    def needs_rotary(self) -> bool:
        """As the scorer."""
        return self.inner.needs_rotary

    @property
    def runs_while_decoding(self) -> bool:
        """As the scorer."""
        return self.inner.runs_while_decoding

    @property
    def latent_obstacle(self) -> str | None:
        """As the scorer."""
        return self.inner.latent_obstacle

    def working_bytes(self, layer: LayerShape, num_tokens: int) -> int:
        """What the scorer holds and its scores, or else what ranks them."""
        scores = 8 * layer.num_kv_heads * num_tokens
        return scores + max(
            super().working_bytes(layer, num_tokens), self.inner.working_bytes(layer, num_tokens)
        )

    def accumulate(self, accumulated: Any, chunk: ChunkInputs) -> Any:
        """As the scorer."""
        return self.inner.accumulate(accumulated, chunk)
