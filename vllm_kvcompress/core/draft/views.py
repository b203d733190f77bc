"""When a request's view is taken, how large it is, and how many drafts it is worth.

A view is what drafts read in the place of a request's cache. There are two kinds of views:

* Alone, in the mode "draft": nothing is evicted. The first view is taken when the prompt ends, and
  later ones, of the whole cache again, when the last is old or its drafts fare badly.
* Beside an eviction, where the setting has a `draft.budget`: a smaller choice from the same region,
  taken in the same step. What is evicted then is in no later view, so none is taken again.

A view that is given up, because its blocks were needed, ends the drafting of its request.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from vllm_kvcompress.config.settings import CompressionConfig
from vllm_kvcompress.core.draft.history import DraftHistory
from vllm_kvcompress.lengths.budgets import forced_ranges, linked_lengths
from vllm_kvcompress.plans import GroupCache, GroupLengths, Purpose

Lengths = list[GroupLengths | None]

MIN_STEPS = 4
"""Verifications before a view's share of accepted drafts counts."""


def links_blocks(config: CompressionConfig, server: CompressionConfig, block_size: int) -> bool:
    """Whether a request's views are made of its own blocks, chosen whole.

    The policy must choose alike for all heads of a block table, and in whole blocks.
    """
    return (
        config.mode == "draft"
        and config.layer_groups == server.layer_groups
        and config.build_policy().granularity % block_size == 0
    )


@dataclass
class ViewSchedule:
    """One request's views; idle where its setting has none.

    Attributes
    ----------
    config : CompressionConfig or None
        The request's setting; None if it has no views.
    purpose : Purpose
        Whether its views are copied or linked.
    lengths : list[GroupLengths or None]
        Of the view that is due, planned or was taken last, one entry per layer group; empty if
        there is none.
    taken_at : int
        Sequence length at which the last one was taken.
    drafts : DraftHistory or None
        How drafts over it fare; None without one.
    """

    config: CompressionConfig | None = None
    purpose: Purpose = Purpose.COPIED_VIEW
    lengths: Lengths = field(default_factory=list)
    taken_at: int = 0
    drafts: DraftHistory | None = None

    @classmethod
    def of(
        cls, config: CompressionConfig, server: CompressionConfig, block_size: int
    ) -> "ViewSchedule":
        """The views of a request that holds nothing yet."""
        if not config.num_draft_tokens:
            return cls()
        is_linked = links_blocks(config, server, block_size)
        return cls(config, Purpose.LINKED_VIEW if is_linked else Purpose.COPIED_VIEW)

    @property
    def is_alone(self) -> bool:
        """Whether views are all there is: the request keeps what it holds."""
        return self.config is not None and self.config.mode == "draft"

    @property
    def may_be_taken_again(self) -> bool:
        """Whether there is a view that a later one may follow."""
        return self.is_alone and self.drafts is not None

    def is_due_again(self, num_certain: int) -> bool:
        """Whether a new view should follow, at a sequence of `num_certain` tokens.

        It may be taken at any length, of the whole cache.
        """
        if self.config is None or self.drafts is None or not self.is_alone:
            return False
        draft, age = self.config.draft, num_certain - self.taken_at
        is_old = draft.refresh_every is not None and age >= draft.refresh_every
        is_poor = (
            draft.refresh_below is not None
            and self.drafts.num_steps >= MIN_STEPS
            and self.drafts.rate < draft.refresh_below
        )
        return is_old or is_poor

    def fit(
        self,
        lengths_of: Callable[[CompressionConfig], Lengths],
        caches: Sequence[GroupCache],
        evicted: Sequence[GroupLengths | None],
        block_size: int,
    ) -> None:
        """Size the view that is due.

        Parameters
        ----------
        lengths_of : callable
            Lengths of a compaction under a setting.
        caches : sequence of GroupCache
            What each layer group holds.
        evicted : sequence of (GroupLengths or None)
            Lengths of the eviction that the view is taken with; empty if it is alone.
        block_size : int
            Tokens per block.
        """
        if self.config is None:
            return
        if not self.is_alone:
            self.lengths = self._beside(lengths_of, evicted)
            return
        self.lengths = lengths_of(self.config)
        if self.purpose is Purpose.LINKED_VIEW:
            # Whole blocks are chosen: room for every block with a token that must stay.
            window = self.config.observation_window
            self.lengths = [
                linked_lengths(each, forced_ranges(cache, window), block_size)
                for each, cache in zip(self.lengths, caches, strict=True)
            ]

    def _beside(
        self,
        lengths_of: Callable[[CompressionConfig], Lengths],
        evicted: Sequence[GroupLengths | None],
    ) -> Lengths:
        """A smaller budget over the same region; None where it would not be smaller."""
        assert self.config is not None
        if not any(evicted):
            return []
        smaller = lengths_of(self.config.model_copy(update={"budget": self.config.draft.budget}))
        return [
            view if view and view.kept_len < (kept.kept_len if kept else view.region_len) else None
            for view, kept in zip(smaller, evicted, strict=True)
        ]

    def start(self, position: int) -> None:
        """Note that the current step takes the view, which the drafts behind it will read."""
        assert self.config is not None
        self.taken_at = position
        length = self.drafts.length if self.drafts is not None else 0
        self.drafts = DraftHistory(self.config.num_draft_tokens, length)

    def drop(self) -> None:
        """The view that is due will not be taken: there is no room for it."""
        self.lengths = []

    def give_up(self) -> None:
        """The view's blocks are needed elsewhere: no more drafts, until a preemption at least."""
        self.drafts = None

    @property
    def num_drafts(self) -> int:
        """Tokens the request may draft after the current step; 0 without a view."""
        if self.config is None or self.drafts is None:
            return 0
        return self.drafts.length if self.config.draft.adaptive else self.drafts.limit

    @property
    def num_draft_steps(self) -> int:
        """Drafts worth making in this step, whose own verification may lengthen them by one."""
        if self.config is None or self.drafts is None:
            return 0
        drafts = self.drafts
        return min(drafts.length + 1, drafts.limit) if self.config.draft.adaptive else drafts.limit

    def observe(self, num_drafts: int, num_accepted: int) -> None:
        """Count one verification of the request's drafts."""
        if self.drafts is not None:
            self.drafts.observe(num_drafts, num_accepted)
