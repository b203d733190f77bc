"""The field `codebook` of a setting."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

Share = Annotated[float, Field(gt=0, le=1)]


class CodebookConfig(BaseModel):
    """Which layer groups store survivors as entries of a codebook, and how large it is.

    Keys (before RoPE) and values become the number of a similar unit vector and a length
    (SpindleKV, arXiv 2507.06517, shallow layers).

    Attributes
    ----------
    shallow : float or None
        Share of the layer groups that are coded, from the first on, rounded up. Exactly one of
        `shallow` and `groups`.
    groups : tuple of int or None
        Numbers of the layer groups that are coded.
    entries : float or tuple of float, default 0.5
        Slots for entries, as a share of the coded tokens; one number, or one per coded group. The
        book of a KV head holds no more entries than that: what needs more takes the nearest one.
    key_threshold, value_threshold : float, default 0.98 and 0.95
        Cosine above which an entry stands for a vector; at 1, equal vectors alone share one.
    extend : bool, default True
        Code what was generated, every `interval` tokens. If False it stays as it is.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    shallow: Share | None = None
    groups: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    entries: Share | tuple[Share, ...] = 0.5
    key_threshold: float = Field(default=0.98, gt=0, le=1)
    value_threshold: float = Field(default=0.95, gt=0, le=1)
    extend: bool = True

    @model_validator(mode="after")
    def _one_of(self) -> "CodebookConfig":
        if (self.shallow is None) == (self.groups is None):
            raise ValueError("set exactly one of shallow and groups")
        if self.groups is not None and (
            not self.groups or len(set(self.groups)) < len(self.groups)
        ):
            raise ValueError("groups: name at least one layer group, each of them once")
        return self
