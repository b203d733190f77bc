"""The settings that are compared: policies times budgets."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from vllm_kvcompress.config.reading import parse_config
from vllm_kvcompress.config.settings import CompressionConfig
from vllm_kvcompress.errors import ConfigError
from vllm_kvcompress.evaluation.quality.records import BASELINE
from vllm_kvcompress.lengths.budgets import layer_groups
from vllm_kvcompress.lengths.schedule import compactions
from vllm_kvcompress.request_options import parse_request, resolve_request


@dataclass(frozen=True)
class Variant:
    """One policy at one budget.

    Attributes
    ----------
    policy : str
        `BASELINE`, a preset, or the path of a YAML file.
    budget : float
        Share of the prompt to keep, as the request option ``kv_budget_ratio``.
    """

    policy: str
    budget: float = 1.0

    @property
    def is_baseline(self) -> bool:
        """Whether the whole cache is kept, by a server without compression."""
        return self.policy == BASELINE

    @property
    def label(self) -> str:
        """The policy's name in records: of a file, what is in front of ``.yaml``."""
        return Path(self.policy).stem if self.policy.endswith((".yaml", ".yml")) else self.policy

    @cached_property
    def config(self) -> CompressionConfig | None:
        """The setting as a server has it; None for the baseline."""
        return None if self.is_baseline else parse_config(self.policy)

    @property
    def depends_on_task(self) -> bool:
        """Whether somebody has to say what the prompt's task is."""
        return self.config is not None and bool(self.config.tasks) and self.config.task == "auto"

    def setting(self, task: str | None = None) -> CompressionConfig | None:
        """The setting of a request with this budget and task; None keeps everything."""
        if self.config is None:
            return None
        return resolve_request(self.config, parse_request({"kv_budget_ratio": self.budget}), task)


def make_variants(
    policies: Sequence[str], budgets: Sequence[float], is_long: bool = False
) -> list[Variant]:
    """All combinations, the baseline once, whether or not it is named.

    Parameters
    ----------
    is_long : bool
        Whether enough tokens may follow a prompt that compactions while decoding are seen.

    Raises
    ------
    ConfigError
        If there is no such policy, one compresses nothing here, or two have one name.
    """
    variants = [Variant(BASELINE)]
    named: dict[str, str] = {}
    for policy in policies:
        if policy == BASELINE:
            continue
        each = [Variant(policy, budget) for budget in budgets]
        label, config = each[0].label, each[0].config
        if named.setdefault(label, policy) != policy:
            raise ConfigError(f"--policies: {named[label]} and {policy} are both called {label}.")
        if config is not None and config.trigger == "interval" and not is_long:
            raise ConfigError(
                f"--policies: {policy} compresses only while decoding (trigger: interval), and "
                "answers are short: measure it by --runner replay on texts (--tasks text:FILE "
                "--continuation 512), or give a file with another trigger."
            )
        if config is not None and config.waits_for_pressure:
            raise ConfigError(
                f"--policies: {policy} compresses only while memory is scarce (trigger: pressure), "
                "so answers would be those of whole caches; give it the trigger end_of_prompt."
            )
        variants += each
    return list(dict.fromkeys(variants))


def kept_share(
    config: CompressionConfig | None, length: int, num_layers: int, block_size: int, codes: int
) -> float:
    """Share of a prompt's cache bytes that are held after its compaction, whole blocks included.

    Parameters
    ----------
    config : CompressionConfig or None
        None keeps all.
    length : int
        Tokens of the prompt.
    num_layers, block_size : int
        Of the model and of the cache.
    codes : int
        Codes that fit into one slot, for codebooks (`kernels.codebook.format.codes_per_row`).
    """
    if config is None:
        return 1.0
    groups = layer_groups(num_layers, config.layer_groups)
    held, since = [length] * len(groups), 0
    for done in compactions(length, length, config, max(groups) + 1, block_size, codes):
        held = [each.num_tokens for each in done.after]
        since = length - done.position
    return sum(held[group] + since for group in groups) / (num_layers * length)
