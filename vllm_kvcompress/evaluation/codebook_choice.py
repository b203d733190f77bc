"""Which layers of a model should get a codebook, by what was measured on it: the rule, in the open.

For every tried size of the books (entries as a share of the coded tokens), a layer group *pays* if

* its error is at most the limit: the relative error of a layer's attention output, mean over a
  prompt's last queries, of the prompt and of the group's layer where it is largest;
* at most `forced` of the keys, or of the values, of any of these take an entry that they are not
  similar to, because the book is full. The last queries look at few tokens, later ones at others;
  and what is left when a book is full are the tokens that are like no other;
* whole blocks of entries and codes take at least `min_saving` less than whole blocks of tokens.

The shallow part is the longest run of paying groups from the first on. Of all sizes, the one whose
shallow part saves most of the cache is recommended; of equal ones the larger. No run at any size:
nothing is recommended.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_kvcompress.codebook_lengths import coded_groups
from vllm_kvcompress.codebook_settings import CodebookConfig
from vllm_kvcompress.evaluation.codebook_profile import LayerProfile


@dataclass(frozen=True)
class Limits:
    """What a layer group must keep to pay.

    Attributes
    ----------
    error : float, default 0.25
        Largest relative error of a layer's attention output.
    forced : float, default 0.01
        Largest share of the vectors that take an entry unlike them.
    min_saving : float, default 0.25
        Least share of the group's blocks that must come free.
    """

    error: float = 0.25
    forced: float = 0.01
    min_saving: float = 0.25


@dataclass(frozen=True)
class GroupCost:
    """One layer group with books of one size, over all prompts.

    Attributes
    ----------
    error, forced : float
        Of the prompt and the layer where it is largest.
    slots_before, slots_after : int
        Of the coded tokens, summed over layers and prompts.
    """

    error: float
    forced: float
    slots_before: int
    slots_after: int

    def pays(self, limits: Limits) -> bool:
        """Whether all limits are kept."""
        saved = self.slots_before - self.slots_after
        is_close = self.error <= limits.error and self.forced <= limits.forced
        return is_close and 0 < saved >= limits.min_saving * self.slots_before


@dataclass(frozen=True)
class Recommendation:
    """Layer groups to code, and the size of their books.

    Attributes
    ----------
    groups : tuple of int
        Ascending.
    share : float
        Entries, as a share of the coded tokens.
    saving : float
        Share of all groups' slots that come free, beyond what the eviction frees.
    """

    groups: tuple[int, ...]
    share: float
    saving: float


def group_costs(
    profiles: Sequence[LayerProfile], group_of: Sequence[int]
) -> dict[float, list[GroupCost]]:
    """Costs of every group, by size of the books.

    Parameters
    ----------
    profiles : sequence of LayerProfile
        Of all layers and prompts, at one budget.
    group_of : sequence of int
        Layer group of every layer.
    """
    costs: dict[float, list[GroupCost]] = {}
    for index, fit in enumerate(profiles[0].fits):
        if fit.share is None:
            continue
        for group in range(max(group_of) + 1):
            members = [each for each in profiles if group_of[each.layer] == group]
            fits = [each.fits[index] for each in members]
            cost = GroupCost(
                error=max(sum(fit.errors) / len(fit.errors) for fit in fits),
                forced=max(max(fit.forced) for fit in fits),
                slots_before=sum(each.num_coded for each in members),
                slots_after=sum(fit.num_slots for fit in fits),
            )
            costs.setdefault(fit.share, []).append(cost)
    return costs


def recommend(
    costs: Mapping[float, Sequence[GroupCost]], limits: Limits, shallow_only: bool = True
) -> Recommendation | None:
    """Apply the rule; None if no layer group pays.

    Parameters
    ----------
    costs : mapping
        Share of entries to costs of all groups, first group first.
    limits : Limits
        What a group must keep.
    shallow_only : bool, default True
        Take paying groups from the first on only. False takes every group that pays.
    """
    best: Recommendation | None = None
    for share, groups in sorted(costs.items(), reverse=True):
        paying = [number for number, cost in enumerate(groups) if cost.pays(limits)]
        if shallow_only:
            paying = [number for place, number in enumerate(paying) if place == number]
        if not paying:
            continue
        saved = sum(groups[number].slots_before - groups[number].slots_after for number in paying)
        saving = saved / sum(cost.slots_before for cost in groups)
        if best is None or saving > best.saving:
            best = Recommendation(tuple(paying), share, saving)
    return best


def setting_fields(
    found: Recommendation, num_groups: int, key_threshold: float, value_threshold: float
) -> dict[str, Any]:
    """The fields of a setting that say what is recommended, ready for YAML."""
    shallow = found.groups == tuple(range(len(found.groups)))
    which: dict[str, Any] = {"groups": list(found.groups)}
    if shallow:
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
