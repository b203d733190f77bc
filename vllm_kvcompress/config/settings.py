"""The fields of a setting as pydantic models; ``reading.py`` reads files into them.

Everything here is frozen and valid once built.
"""

import math
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from vllm_kvcompress.config.codebook import CodebookConfig
from vllm_kvcompress.config.merging import merge_fields
from vllm_kvcompress.config.mode_checks import check_codebook, check_drafts, check_shared_blocks
from vllm_kvcompress.config.plain_values import build
from vllm_kvcompress.config.pressure import PressureConfig
from vllm_kvcompress.config.sessions import SessionsConfig
from vllm_kvcompress.registry import load_policy_class

Range = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=2, max_length=2)]
Task = Literal["localization", "aggregation"]
Trigger = Literal["end_of_prompt", "interval", "both", "prompt", "all", "pressure"]
SharedBlocks = Literal["when_it_pays", "always"]


def _whole(value: Any) -> Any:
    if type(value) is not int:  # to a Literal, true and 1.0 are 1
        raise PydanticCustomError("version", "input should be 1")
    return value


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class BudgetConfig(_Model):
    """How many tokens of a prompt survive, averaged over the layers.

    Attributes
    ----------
    ratio : float or None
        Share of the prompt to keep, in (0, 1]. Exactly one of `ratio` and `tokens` is set.
    tokens : int or None
        Tokens to keep, whatever the prompt's length.
    floor : int, default 64
        Never aim at fewer tokens than this.
    """

    ratio: float | None = Field(default=None, gt=0, le=1)
    tokens: int | None = Field(default=None, ge=1)
    floor: int = Field(default=64, ge=1)

    @model_validator(mode="after")
    def _one_of(self) -> "BudgetConfig":
        if (self.ratio is None) == (self.tokens is None):
            raise ValueError("set exactly one of ratio and tokens")
        return self


class LayerGroupsConfig(_Model):
    """Runs of consecutive layers that share one block table and one budget.

    Attributes
    ----------
    count : int or None
        Number of groups, of sizes that differ by at most one. Exactly one of `count` and `size`.
    size : int or None
        Most layers of a group: as few groups as that allows, of sizes that differ by at most one.
        vLLM gives all block tables equally many layers, so one small group would split the others.
    """

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


class LayerBudgetConfig(_Model):
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


class DraftConfig(_Model):
    """How the model drafts for itself over a compressed view of its cache, in the mode "draft".

    Attributes
    ----------
    tokens : int, default 4
        Most tokens drafted per step; 0 drafts none.
    adaptive : bool, default False
        Let every request draft as many tokens as its last steps had accepted, and one more.
    min_confidence : float, default 0
        Stop a step's drafts at the first one to which the draft gives a lower probability. Costs
        one wait for the device per draft step, if above 0.
    sample : {"greedy", "probabilistic"}
        Whether drafts of requests with a temperature are drawn from the draft's distribution, which
        the verification then knows, or are its best tokens. Either is exact.
    budget : BudgetConfig or None
        In the mode "evict": draft over a view of this many tokens, fewer than the cache keeps, and
        verify over what it keeps. None drafts nothing there. In the mode "draft" the setting's own
        budget is the view's.
    refresh_every : int or None
        Take a new view after so many tokens; None never.
    refresh_below : float or None
        Take a new view when the running share of accepted drafts falls below this; None never.
    acceptance : {"rejection", "typical"}
        Which drafts stand in requests with a temperature. "rejection" keeps the target's
        distribution. "typical" is lossy: a draft stands if the target finds it likely enough
        (arXiv 2401.10774, section 2.3.1), so the output depends on the view. Requests with the
        temperature 0 are verified exactly with either.
    typical_epsilon : float or None
        typical: a draft of a probability above this always stands; 0.09 if not given.
    typical_delta : float or None
        typical: a draft also stands above this times exp(-entropy of the target's distribution);
        the square root of epsilon if not given.
    """

    tokens: int = Field(default=4, ge=0, le=16)
    adaptive: bool = False
    min_confidence: float = Field(default=0.0, ge=0, lt=1)
    sample: Literal["greedy", "probabilistic"] = "greedy"
    budget: BudgetConfig | None = None
    refresh_every: int | None = Field(default=None, ge=1)
    refresh_below: float | None = Field(default=None, gt=0, lt=1)
    acceptance: Literal["rejection", "typical"] = "rejection"
    # Below 1: the target's most probable token has at least exp(-entropy), so it always stands.
    typical_epsilon: float | None = Field(default=None, gt=0, lt=1)
    typical_delta: float | None = Field(default=None, gt=0, lt=1)

    @model_validator(mode="after")
    def _thresholds_matter(self) -> "DraftConfig":
        for name in ("typical_epsilon", "typical_delta"):
            if self.acceptance != "typical" and getattr(self, name) is not None:
                raise ValueError(f'{name}: goes with the acceptance "typical" only')
        return self

    @model_validator(mode="after")
    def _stays_exact(self) -> "DraftConfig":
        # Asynchronous scheduling verifies all k drafts, those that were left out too. An old token
        # there is as good as any where it counts as certain, but not as a draw from a distribution.
        if self.min_confidence > 0 and self.sample == "probabilistic":
            raise ValueError('min_confidence: goes with the sample "greedy" only')
        return self

    @property
    def refreshes(self) -> bool:
        """Whether views are ever taken again."""
        return self.refresh_every is not None or self.refresh_below is not None

    @property
    def typical_thresholds(self) -> tuple[float, float] | None:
        """Epsilon and delta of typical acceptance; None where it is not in use."""
        if self.acceptance != "typical":
            return None
        epsilon = 0.09 if self.typical_epsilon is None else self.typical_epsilon
        delta = math.sqrt(epsilon) if self.typical_delta is None else self.typical_delta
        return epsilon, delta


class PolicyConfig(BaseModel):
    """Name of a policy; every other key is one of the policy's own parameters."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str

    @property
    def params(self) -> dict[str, Any]:
        """The policy's own parameters."""
        return dict(self.model_extra or {})


class CompressionConfig(_Model):
    """One complete setting, as a preset file holds it.

    Attributes
    ----------
    version : 1
        Format of this file.
    policy : PolicyConfig
        Which tokens survive.
    budget, layer_groups, layer_budget
        How many, and how they are spread over the layers.
    codebook : CodebookConfig or None
        Layer groups whose survivors are stored as entries of a codebook; None codes nothing.
    num_sink_tokens : int, default 4
        First tokens of the prompt, never evicted.
    observation_window : int, default 16
        Last tokens before a compaction, which always survive it; policies read their queries.
    trigger : {"end_of_prompt", "interval", "both", "prompt", "all", "pressure"}
        When a request is compressed: once its prompt is done, every `interval` generated tokens,
        or both; at its prompt's end and every `prompt_interval` tokens back from there, or then and
        every `interval` generated tokens; only while memory is scarce.
    pressure : PressureConfig
        When memory is scarce, with the trigger "pressure".
    prompt_interval : int, default 2048
        Prompt tokens between compactions, counted back from the prompt's end, with the triggers
        "prompt" and "all".
    interval : int, default 128
        Generated tokens between compactions, at least so many with the trigger "pressure"; with
        the trigger "end_of_prompt", between extensions of a codebook.
    min_prompt_len : int, default 512
        Shorter prompts are left alone when they end; while decoding, only the budget counts.
    shared_blocks : {"when_it_pays", "always"}
        Whether requests that hold blocks in common (one prefix, found in the prefix cache) are
        compacted only where that gives back more blocks than it takes, or always: then tokens do
        not depend on who else runs. The server's own setting alone counts.
    pinned : list of [start, end)
        Prompt positions that are never evicted in any request (a system prompt, say).
    mode : {"evict", "draft"}
        What becomes of tokens that do not survive: "evict" gives their memory back; "draft" keeps
        them, and lets the model draft tokens over the survivors alone, which the whole cache then
        verifies: the output is that of the uncompressed model (with the `draft.acceptance`
        "typical": only at the temperature 0).
    draft : DraftConfig
        Of the mode "draft".
    sessions : SessionsConfig
        Caches that wait for a conversation's next turn; the server's own setting alone counts.
    task : {"auto", "localization", "aggregation"}
        Which of `tasks` to apply; "auto" asks the classifier, once per request.
    tasks : dict
        Fields laid over this setting for requests of a task; empty means tasks do not matter.
    """

    version: Annotated[Literal[1], BeforeValidator(_whole)] = 1
    policy: PolicyConfig
    budget: BudgetConfig
    layer_groups: LayerGroupsConfig = LayerGroupsConfig(count=1)
    layer_budget: LayerBudgetConfig = LayerBudgetConfig()
    codebook: CodebookConfig | None = None
    num_sink_tokens: int = Field(default=4, ge=0)
    observation_window: int = Field(default=16, ge=1)
    trigger: Trigger = "end_of_prompt"
    pressure: PressureConfig = PressureConfig()
    prompt_interval: int = Field(default=2048, ge=1)
    interval: int = Field(default=128, ge=1)
    min_prompt_len: int = Field(default=512, ge=0)
    shared_blocks: SharedBlocks = "when_it_pays"
    pinned: tuple[Range, ...] = ()
    mode: Literal["evict", "draft"] = "evict"
    draft: DraftConfig = DraftConfig()
    sessions: SessionsConfig = SessionsConfig()
    task: Literal["auto", "localization", "aggregation"] = "auto"
    tasks: dict[Task, dict[str, Any]] = {}

    @model_validator(mode="after")
    def _check_ranges(self) -> "CompressionConfig":
        for start, end in self.pinned:
            if start >= end:
                raise ValueError(f"pinned: [{start}, {end}] is empty; a range is [start, end)")
        check_drafts(self)
        check_codebook(self)
        check_shared_blocks(self)
        if self.compresses_in_prompts and self.prompt_interval < self.observation_window:
            window = self.observation_window
            raise ValueError(f"prompt_interval: must be at least observation_window ({window})")
        if self.tasks and len(self.tasks) != 2:
            raise ValueError("tasks: give both localization and aggregation, or neither")
        for name, fields in self.tasks.items():
            common = ("task", "tasks", "layer_groups", "version", "mode", "draft")
            for key in (*common, "pressure", "sessions", "shared_blocks"):
                if key in fields:
                    raise ValueError(f"tasks.{name}.{key}: this field cannot depend on the task")
        return self

    @property
    def drafts(self) -> bool:
        """Whether the model drafts over compressed views."""
        return self.mode == "draft" or self.draft.budget is not None

    @property
    def num_draft_tokens(self) -> int:
        """Most tokens to draft per step over a compressed view; 0 if none."""
        return self.draft.tokens if self.drafts else 0

    @property
    def refreshes_views(self) -> bool:
        """Whether views are taken again while decoding."""
        return self.mode == "draft" and self.draft.refreshes

    @property
    def compresses_prompts(self) -> bool:
        """Whether the end of the prompt triggers a compaction, if only while memory is scarce."""
        return self.trigger != "interval"

    @property
    def waits_for_pressure(self) -> bool:
        """Whether requests stay whole while memory is ample."""
        return self.trigger == "pressure"

    @property
    def compresses_in_prompts(self) -> bool:
        """Whether tokens of the prompt trigger compactions before its end."""
        return self.trigger in ("prompt", "all")

    @property
    def compresses_while_decoding(self) -> bool:
        """Whether requests are compacted behind their prompts, too."""
        return self.trigger in ("interval", "both", "all", "pressure")

    @property
    def compacts_at_intervals(self) -> bool:
        """Whether generated tokens alone trigger compactions."""
        return self.compresses_while_decoding and not self.waits_for_pressure

    @property
    def extends_codebooks(self) -> bool:
        """Whether generated tokens are coded too."""
        return self.codebook is not None and self.codebook.extend

    @cached_property
    def by_task(self) -> dict[str, "CompressionConfig"]:
        """The settings of each task; empty if tasks do not matter.

        Raises
        ------
        ValidationError
            If what a task lays over the setting is wrong.
        """
        return {task: build(CompressionConfig, self.task_fields(task)) for task in self.tasks}

    def task_fields(self, task: str) -> dict[str, Any]:
        """Plain fields of one entry of `by_task`, which may be wrong."""
        base = {k: v for k, v in self.to_dict().items() if k != "tasks"}
        return {**merge_fields(base, self.tasks[task]), "task": task}  # type: ignore[index]

    def build_policy(self) -> Any:
        """Instantiate the policy with its own parameters (validated by `parse_config`)."""
        return load_policy_class(self.policy.name)(**self.policy.params)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form that `parse_config` reads back to an equal object.

        Where nothing is drafted it has no `draft`, and where nothing waits for pressure none of
        that: defaults would be refused as fields that do nothing. Nor has it `sessions` and
        `shared_blocks` as they are by default: the server's alone count.
        """
        unused = set() if self.drafts else {"draft"}
        unused |= set() if self.sessions != SessionsConfig() else {"sessions"}
        unused |= set() if self.shared_blocks != "when_it_pays" else {"shared_blocks"}
        triggers = [self.trigger, *(fields.get("trigger") for fields in self.tasks.values())]
        if not any(each == "pressure" for each in triggers):  # a task's may be anything yet
            unused.add("pressure")
        return self.model_dump(mode="json", exclude_none=True, exclude=unused)
