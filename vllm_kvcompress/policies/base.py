"""The interface of an eviction policy.

The life of one compaction is budgets -> score -> select -> copy. Budgets (tokens per layer
group) come from ``lengths.budgets``: the scheduler must know them beforehand. A policy answers
one question: how much is each token worth. Forcing sinks, window and pins, top-k, rounding to
blocks and copying happen once, elsewhere.

A new policy is one file with one class, registered as an entry point of group
``vllm_kvcompress.policies``. The class is a frozen pydantic model: its fields are the parameters a
YAML file may set. The worker calls `score` once per layer and compaction, after the forward pass
of the step that ends the prompt (or an interval of generated tokens). A policy keeps no state
between calls and does not wait for the device (no ``.item()``, ``.tolist()`` or ``.cpu()``).
"""

from abc import ABC, abstractmethod
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from vllm_kvcompress.policies.inputs import ChunkInputs, Queries, ScoreInputs
from vllm_kvcompress.policies.layer_shape import LayerShape


def _odd(value: int) -> int:
    if value % 2 == 0:
        raise ValueError(f"must be odd, or the pooling is not centred, got {value}")
    return value


KernelSize = Annotated[int, Field(ge=1), AfterValidator(_odd)]
"""Width of a centred pooling, in tokens: a parameter that several policies have."""


class Policy(BaseModel, ABC):
    """Base class of all policies. Fields of subclasses are their parameters."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @property
    def queries(self) -> Queries:
        """Which queries `score` and `accumulate` read."""
        return Queries.NONE

    @property
    def needs_output_projection(self) -> bool:
        """Whether `score` wants the layer's output projection."""
        return False

    @property
    def needs_rotary(self) -> bool:
        """Whether `score` and `accumulate` want the layer's rotary embedding."""
        return False

    @property
    def runs_while_decoding(self) -> bool:
        """Whether the policy can also compress every `interval` generated tokens."""
        return self.queries is not Queries.PROMPT

    @property
    def shares_scores(self) -> bool:
        """Whether the first layer of a layer group scores for other layers of it."""
        return False

    @property
    def layers_per_ranking(self) -> int | None:
        """Layers of a group that share scores, the first of them scoring; None: all of it."""
        return None

    @property
    def granularity(self) -> int:
        """Neighbouring tokens that live or die together in all heads of a layer group; else 1.

        Where that is whole blocks, a view to draft over needs no copies.
        """
        return 1

    @property
    def rerotates_keys(self) -> bool:
        """Whether surviving keys are turned to neighbouring positions (needs rotary)."""
        return False

    @property
    def latent_obstacle(self) -> str | None:
        """Why the policy cannot score a cache of latent attention (MLA); None if it can.

        Such a cache has one KV head for all query heads. A key is the token's latent followed by
        its rotated part, `ScoreInputs.queries` are absorbed, so that their products with it are the
        heads' logits, and values are the latent, before any head's projection. The words follow
        the policy's name in a sentence.
        """
        return "does not say that it serves latent attention"

    def working_bytes(self, layer: LayerShape, num_tokens: int) -> int:
        """Most memory that `score` holds at once for so many cached tokens, its result included.

        Of one layer on one rank, in bytes; the tokens may be those of several requests. The server
        keeps it free of cache blocks. As it stands it is for policies that ask `rows` for
        measurements and rank them; one that copies keys or values, or multiplies them, holds more
        (`LayerShape` has the sizes).
        """
        return 32 * layer.num_kv_heads * num_tokens

    def accumulate(self, accumulated: Any, chunk: ChunkInputs) -> Any:
        """Fold one chunk of the prompt into a summary; the first chunk gets None.

        Called once per chunk and layer, in order, before `score`, where `queries` is
        `Queries.PROMPT`.
        """
        raise NotImplementedError(f"{type(self).__name__} does not read all queries")

    @abstractmethod
    def score(self, inputs: ScoreInputs) -> torch.Tensor:
        """Return [num_kv_heads, n] float32 scores, higher = keep."""
