"""The field `pressure` of a setting."""

from pydantic import BaseModel, ConfigDict, Field, model_validator


class PressureConfig(BaseModel):
    """When memory is scarce, with the trigger "pressure".

    Shares of the pool's blocks that requests hold. Blocks that are only cached for later hits are
    free, as vLLM counts them.

    Attributes
    ----------
    when : float, default 0.85
        From this share on memory is scarce, and running requests are compressed.
    until : float, default 0.7
        So many are chosen that at most this share will be held; then memory is ample again.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    when: float = Field(default=0.85, gt=0, le=1)
    until: float = Field(default=0.7, gt=0, le=1)

    @model_validator(mode="after")
    def _in_order(self) -> "PressureConfig":
        if self.until > self.when:
            raise ValueError(f"until: must be at most when ({self.when:g})")
        return self
