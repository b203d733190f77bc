"""The fields `layer_groups` and `layer_budget` of a setting."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class LayerGroupsConfig(BaseModel):
    """Runs of consecutive layers that share one block table and one budget.

    Attributes
    ----------
    count : int or None
        Number of groups, of sizes that differ by at most one. Exactly one of `count` and `size`.
    size : int or None
        Most layers of a group: as few groups as that allows, of sizes that differ by at most one.
        vLLM gives all block tables equally many layers, so one small group would split the others.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    count: int | None = Field(default=None, ge=1)
    size: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _one_of(self) -> "LayerGroupsConfig":
        if (self.count is None) == (self.size is None):
            raise ValueError("set exactly one of count and size")
        return self


_SHAPE_FIELDS: dict[str, set[str]] = {
    "uniform": set(),
    "pyramid": {"beta"},
    "windowkv": {"beta", "gamma", "form"},
    "linear": {"beta"},
    "preference": {"preferences"},
}


class LayerBudgetConfig(BaseModel):
    """How the budget is spread over the layer groups; formulas are in ``lengths.layer_budgets``.

    Attributes
    ----------
    shape : {"uniform", "pyramid", "windowkv", "linear", "preference"}
        "pyramid" is PyramidKV's (arXiv 2406.02069), "windowkv" WindowKV's (2503.17922), "linear"
        SpindleKV's (2507.06517), "preference" CAKE's with shares given beforehand (2503.12491).
    beta : float or None
        Steepness. pyramid: the last group gets 1/beta of the average (default 20, above 1);
        windowkv: the paper's lambda (default 14, at least 1); linear: share of the prompt that the
        last group gets (default 0.05, below 0.5).
    gamma : int, default 8
        windowkv, released form: layers per group in the formula.
    form : {"released", "printed"}
        windowkv: the authors' code, or the paper's equations 5 to 7.
    preferences : tuple of float or None
        preference: one positive number per layer group; `kvcompress tune --policies
        preferences` measures them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    shape: Literal["uniform", "pyramid", "windowkv", "linear", "preference"] = "uniform"
    beta: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    gamma: int = Field(default=8, ge=1)
    form: Literal["released", "printed"] = "released"
    preferences: tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...] | None = None

    @model_validator(mode="after")
    def _fits_shape(self) -> "LayerBudgetConfig":
        for name in sorted(self.model_fields_set - {"shape"} - _SHAPE_FIELDS[self.shape]):
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} means nothing to the shape {self.shape}")
        if self.shape == "preference" and not self.preferences:
            raise ValueError("the shape preference needs preferences, one per layer group")
        beta = self.beta
        limits = {"pyramid": (1, None), "windowkv": (1, None), "linear": (0, 0.5)}
        if beta is not None and self.shape in limits:
            low, high = limits[self.shape]
            if beta <= low or (high is not None and beta >= high):
                upper = "" if high is None else f" and below {high}"
                raise ValueError(f"beta of the shape {self.shape} must be above {low}{upper}")
        return self
