"""Which layers of a model should get a codebook, by what the model then says: the rule, openly.

For every tried size of the books (entries as a share of the coded tokens) and every tried shallow
part (the first layer groups, up to some one) a continuation of each prompt is read over the books.
A choice *pays* if

* at least `agreement` of the next tokens, over all prompts, are those over the survivors as they
  are: what a reader of the answers would notice;
* whole blocks of entries and codes take at least `min_saving` less than whole blocks of tokens, in
  the groups that are coded.

Of all choices that pay, the one that saves most of the cache is recommended; of equal ones the one
with larger books.

An error of a layer's attention output was the rule before. On SmolLM2-135M it let one layer of 30
pay, while next tokens stayed the same with half of them coded (docs/codebook.md): the tables
still show it, and it decides nothing.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm_kvcompress.config.codebook import CodebookConfig
from vllm_kvcompress.lengths.codebook import coded_groups

PARTS = 12
"""Shallow parts that are tried beside the first group alone, at most."""


@dataclass(frozen=True)
class Limits:
    """What a choice must keep to pay.

    Attributes
    ----------
    agreement : float, default 0.98
        Least share of next tokens that stay the same.
    min_saving : float, default 0.25
        Least share of the coded groups' blocks that must come free.
    """

    agreement: float = 0.98
    min_saving: float = 0.25


@dataclass(frozen=True)
class Tried:
    """The first layer groups with books of one size, over all prompts.

    Attributes
    ----------
    groups : tuple of int
        Coded ones, from 0 on.
    share : float
        Entries, as a share of the coded tokens.
    agreement : float
        Share of the next tokens that are the same.
    divergence : float
        Kullback-Leibler divergence of the next token's distribution, nats, mean.
    slots_before, slots_after : int
        Of the coded tokens in the coded groups, summed over layers and prompts.
    slots_of_all : int
        The same of all groups, before.
    """

    groups: tuple[int, ...]
    share: float
    agreement: float
    divergence: float
    slots_before: int
    slots_after: int
    slots_of_all: int

    @property
    def saving(self) -> float:
        """Share of all groups' slots that come free."""
        return (self.slots_before - self.slots_after) / self.slots_of_all

    def pays(self, limits: Limits) -> bool:
        """Whether all limits are kept."""
        saved = self.slots_before - self.slots_after
        return self.agreement >= limits.agreement and (
            0 < saved >= limits.min_saving * self.slots_before
        )


@dataclass(frozen=True)
class Recommendation:
    """Layer groups to code, and the size of their books.

    Attributes
    ----------
    groups : tuple of int
        From 0 on.
    share : float
        Entries, as a share of the coded tokens.
    saving : float
        Share of all groups' slots that come free, beyond what the eviction frees.
    """

    groups: tuple[int, ...]
    share: float
    saving: float


def shallow_parts(num_groups: int) -> list[tuple[int, ...]]:
    """The first group alone, and `PARTS` evenly spread ends up to all groups."""
    count = min(PARTS, num_groups)
    ends = {1, *(math.ceil(num_groups * part / count) for part in range(1, count + 1))}
    return [tuple(range(end)) for end in sorted(ends)]


def recommend(tried: Sequence[Tried], limits: Limits) -> Recommendation | None:
    """Apply the rule; None if nothing pays."""
    paying = [each for each in tried if each.pays(limits)]
    if not paying:
        return None
    best = max(paying, key=lambda each: (each.saving, each.share))
    return Recommendation(best.groups, best.share, best.saving)


def setting_fields(
    found: Recommendation, num_groups: int, key_threshold: float, value_threshold: float
) -> dict[str, Any]:
    """The fields of a setting that say what is recommended, ready for YAML."""
    which = {"shallow": shallow_share(len(found.groups), num_groups)}
    sizes = {"entries": found.share}
    thresholds = {"key_threshold": key_threshold, "value_threshold": value_threshold}
    return {"layer_groups": {"count": num_groups}, "codebook": {**which, **sizes, **thresholds}}


def shallow_share(num_coded: int, num_groups: int) -> float:
    """A number of at most four decimals that means the first `num_coded` groups as `shallow`."""
    share = math.floor(num_coded / num_groups * 10_000) / 10_000
    while len(coded_groups(CodebookConfig(shallow=share), num_groups)) > num_coded:
        share = round(share - 0.0001, 4)
    return share
