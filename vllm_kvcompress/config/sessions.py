"""The field `sessions` of a setting."""

from pydantic import BaseModel, ConfigDict, Field


class SessionsConfig(BaseModel):
    """Compressed caches that wait for the next turn of their conversation.

    Attributes
    ----------
    max_blocks_ratio : float, default 0.5
        Share of the block pool that they may hold, in [0, 1]; 0 keeps none. They give way before
        any request has to wait for their blocks.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_blocks_ratio: float = Field(default=0.5, ge=0, le=1)
