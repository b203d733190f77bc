"""Which requests are compressed, when, and how far. Knows lengths and settings, no vLLM classes.

A request passes through these states:

    ARMED --(`next_at` tokens)--> DUE --(destination blocks found)--> PLANNED --(next step)--> DONE
      ^ ^                                                               |  |
      | '---------------- if generated tokens trigger more -------------'  |
      '------------------------ preemption: starts again ------------------'

or it is SKIPPED from the start, for a reason that is counted. `next_at` is the end of the prompt,
or so many generated tokens after the last compaction: never an absolute length, so a long prompt
alone triggers nothing while decoding.

A request that is DUE while the pool has no room for its survivors is tried again every step, and
one whose blocks others hold, too, whenever some of these are gone. What the end of its prompt will
compact does not change meanwhile; a compaction while decoding takes in the tokens that came since,
because the queries that the policy reads are the most recent ones.

In the mode "draft" a compaction takes a view and the request keeps what it holds: from PLANNED it
goes to VIEWED, and back to PLANNED whenever a new view is due. A view that is given up, because its
blocks were needed, leaves it DONE.
"""

from dataclasses import dataclass, field, replace

from vllm_kvcompress.config.settings import CompressionConfig
from vllm_kvcompress.core.draft_history import DraftHistory
from vllm_kvcompress.core.tracked_request import SkipReason, State, TrackedRequest
from vllm_kvcompress.lengths.budgets import (
    after_compaction,
    compaction_lengths,
    forced_ranges,
    linked_lengths,
    next_lengths,
    permanent_ranges,
)
from vllm_kvcompress.lengths.decode_queries import decode_gap, decode_window
from vllm_kvcompress.messages import RequestSetup
from vllm_kvcompress.plans import GroupCache, GroupLengths, RequestOptions
from vllm_kvcompress.request_options import resolve_request

MIN_STEPS = 4
"""Verifications before a view's share of accepted drafts counts."""


@dataclass
class Planner:
    """Tracks every request of the engine.

    Attributes
    ----------
    config : CompressionConfig
        The server's setting.
    num_layer_groups : int
        Layer groups of the engine.
    block_size : int
        Tokens per block.
    codes_per_row : int or None
        Tokens whose codes one slot takes; needed where a setting has a codebook.
    rations_queries : bool
        Whether queries of generated tokens are recorded for requests alone that are told to
        (`note_recording`); else for all.
    """

    config: CompressionConfig
    num_layer_groups: int
    block_size: int
    codes_per_row: int | None = None
    rations_queries: bool = False
    requests: dict[str, TrackedRequest] = field(default_factory=dict)

    def add(
        self,
        request_id: str,
        prompt_len: int,
        options: RequestOptions,
        streaming: bool = False,
        task: str | None = None,
        max_output: int | None = None,
    ) -> TrackedRequest:
        """Register a request; its state is ARMED or SKIPPED afterwards.

        One that generates a single token at most (`max_output`; beam search sends such requests,
        one a step) never reads what the end of its prompt would compact.
        """
        config = resolve_request(self.config, options, task)
        tracked = TrackedRequest(prompt_len, config, task)
        if config is None:
            tracked.skip_reason = SkipReason.OPTED_OUT
        elif streaming:
            tracked.skip_reason = SkipReason.STREAMING_INPUT
        else:
            self._arm(tracked, config)
            if tracked.skip_reason is None and max_output is not None and max_output <= 1:
                tracked.skip_reason = SkipReason.SHORT_OUTPUT
        if tracked.skip_reason is not None:
            tracked.state = State.SKIPPED
        self.requests[request_id] = tracked
        return tracked

    def add_invalid(self, request_id: str, prompt_len: int) -> TrackedRequest:
        """Register a request whose options make no sense: it is served uncompressed."""
        tracked = TrackedRequest(prompt_len, None, state=State.SKIPPED)
        tracked.skip_reason = SkipReason.INVALID_OPTIONS
        self.requests[request_id] = tracked
        return tracked

    def setup_of(self, request_id: str) -> RequestSetup | None:
        """What the workers must know of a request that starts; None if it stays as it is."""
        tracked = self.requests.get(request_id)
        if tracked is None or tracked.config is None or tracked.state is State.SKIPPED:
            return None
        return RequestSetup(tracked.config, awaits_prompt=not tracked.while_decoding)

    def _arm(self, tracked: TrackedRequest, config: CompressionConfig) -> None:
        """Set the first trigger of a request that holds nothing yet, or the reason for none."""
        prompt_len = tracked.prompt_len
        cache = GroupCache(0, permanent_ranges(prompt_len, config))
        tracked.caches, tracked.compacted_at = [cache] * self.num_layer_groups, 0
        tracked.drafts, tracked.num_waited, tracked.is_shared = None, 0, False
        tracked.queries_since, tracked.lacks_queries = None, False
        if self.rations_queries and (window := decode_window(config)):
            tracked.query_window, tracked.query_gap = window, decode_gap(config)
        tracked.state = State.ARMED
        lengths = compaction_lengths(
            prompt_len, config, self.num_layer_groups, self.block_size, self.codes_per_row
        )
        if any(lengths):
            tracked.next_at = prompt_len
        elif config.compresses_while_decoding:
            tracked.next_at = prompt_len + config.interval
        elif prompt_len < config.min_prompt_len:
            tracked.skip_reason = SkipReason.SHORT_PROMPT
        else:
            tracked.skip_reason = SkipReason.UNDER_BUDGET

    def remove(self, request_id: str) -> TrackedRequest | None:
        """Forget a finished or aborted request.

        Its `skip_reason` is set if it ended uncompressed although it was not skipped, unless it
        did not get as far as its first trigger's prompt.
        """
        tracked = self.requests.pop(request_id, None)
        if tracked is None or tracked.counted or tracked.skip_reason is not None:
            return None
        if tracked.state is State.DUE:
            tracked.skip_reason = (
                SkipReason.SHARED_PROMPT if tracked.is_shared else SkipReason.NO_ROOM
            )
        elif tracked.state is State.PLANNED:
            tracked.skip_reason = SkipReason.SHORT_OUTPUT  # no step read what was compacted
        elif tracked.was_under_budget:
            tracked.skip_reason = SkipReason.UNDER_BUDGET
        elif tracked.lacks_queries:
            tracked.skip_reason = SkipReason.NO_ROOM
        elif tracked.state is State.ARMED and tracked.while_decoding:
            tracked.skip_reason = SkipReason.SHORT_OUTPUT
        return tracked

    def restart(self, request_id: str) -> None:
        """A preempted request starts again from nothing."""
        tracked = self.requests.get(request_id)
        if tracked is not None and tracked.state is not State.SKIPPED:
            assert tracked.config is not None
            self._arm(tracked, tracked.config)

    def waiting(self, request_id: str) -> TrackedRequest | None:
        """The request, if a compaction is still to come for it."""
        tracked = self.requests.get(request_id)
        waits = tracked is not None and tracked.state in (State.ARMED, State.DUE)
        return tracked if waits else None

    def clip_chunk(
        self, request_id: str, num_computed: int, num_new: int, num_known: int, unverified: int = 0
    ) -> int:
        """End a step's tokens where a compaction falls due.

        A resumed request prefills its prompt and its earlier output in one go; it must stop at
        the prompt's end, and after every interval, to be compacted there as it was the first
        time. Draft tokens (beyond the `num_known` ones) stop one token earlier: the step that
        reaches the mark must not hinge on what is accepted. Where `unverified` ones of an earlier
        step are counted as computed (asynchronous scheduling), it waits for their verdict: 0.
        """
        tracked = self.waiting(request_id)
        if tracked is None or num_computed - unverified >= tracked.next_at:
            return num_new
        has_drafts = num_computed + num_new > num_known
        room = tracked.next_at - num_computed - (1 if has_drafts or unverified else 0)
        return min(num_new, max(room, 0 if unverified else 1))

    def max_cached_tokens(self, request_id: str) -> int | None:
        """Longest prefix-cache hit the request may take; None if any.

        At least one token, and all tokens whose queries the policy needs, must be computed.
        """
        tracked = self.waiting(request_id)
        if tracked is None:
            return None
        assert tracked.config is not None
        queries = tracked.config.build_policy().queries.value
        if queries == "prompt" and not tracked.while_decoding:
            return 0
        window = tracked.config.observation_window if queries != "none" else 1
        return tracked.next_at - window

    def note_progress(self, request_id: str, num_certain: int) -> bool:
        """Record how many tokens' keys are certain after this step; True if a compaction is due."""
        tracked = self.requests.get(request_id)
        if tracked is not None and tracked.state is State.VIEWED:
            return self._note_view(tracked, num_certain)
        tracked = self.waiting(request_id)
        if tracked is None or num_certain < tracked.next_at:
            return False
        assert tracked.config is not None
        tracked.lacks_queries = tracked.while_decoding and not tracked.has_queries(num_certain)
        if tracked.lacks_queries:
            return False
        if tracked.state is State.ARMED or tracked.while_decoding:
            tracked.position = num_certain if tracked.while_decoding else tracked.prompt_len
            tracked.lengths = self._lengths(tracked, tracked.config)
            tracked.view_lengths = self._view_lengths(tracked, tracked.config)
            tracked.state = State.DUE
        if not any(tracked.lengths):
            tracked.was_under_budget = True
            self._rearm(tracked)
            return False
        return True

    def _lengths(
        self, tracked: TrackedRequest, config: CompressionConfig
    ) -> list[GroupLengths | None]:
        caches = self.current_caches(tracked)
        lengths = next_lengths(
            tracked.prompt_len, tracked.position, caches, config,
            self.block_size, self.codes_per_row,
        )  # fmt: skip
        if self.links_blocks(tracked):
            # Whole blocks are chosen: room for every block with a token that must stay.
            lengths = [
                linked_lengths(
                    each, forced_ranges(cache, config.observation_window), self.block_size
                )
                for each, cache in zip(lengths, caches, strict=True)
            ]
        return lengths

    def _view_lengths(
        self, tracked: TrackedRequest, config: CompressionConfig
    ) -> list[GroupLengths | None]:
        """A smaller budget over the same region; None where it would not be smaller."""
        if config.mode == "draft" or not config.num_draft_tokens:
            return [None] * len(tracked.lengths)
        smaller = self._lengths(tracked, config.model_copy(update={"budget": config.draft.budget}))
        return [
            view if view and view.kept_len < (kept.kept_len if kept else view.region_len) else None
            for view, kept in zip(smaller, tracked.lengths, strict=True)
        ]

    def current_caches(self, tracked: TrackedRequest) -> list[GroupCache]:
        """What the groups hold at `tracked.position`, before its compaction."""
        grown = tracked.position - tracked.compacted_at
        return [replace(c, num_tokens=c.num_tokens + grown) for c in tracked.caches]

    def commit(self, tracked: TrackedRequest) -> None:
        """Note that the planned compaction has been done."""
        tracked.num_waited, tracked.is_shared = 0, False
        tracked.caches = [
            after_compaction(cache, lengths) if lengths else cache
            for cache, lengths in zip(self.current_caches(tracked), tracked.lengths, strict=True)
        ]
        tracked.compacted_at = tracked.position
        self._rearm(tracked)

    # --- queries of generated tokens ------------------------------------------------------

    def queries_from(self, request_id: str) -> int | None:
        """Position from which a request's queries must be recorded; None if none are read."""
        tracked = self.requests.get(request_id)
        return None if tracked is None else tracked.queries_from

    def note_recording(self, request_id: str, start: int | None) -> None:
        """A request's queries are recorded from position `start` on, or no longer (None)."""
        tracked = self.requests.get(request_id)
        if tracked is not None:
            tracked.queries_since = start

    def is_overdue(self, request_id: str, num_tokens: int) -> bool:
        """Whether `num_tokens` of a request were enough for its next compaction while decoding."""
        tracked = self.waiting(request_id)
        return tracked is not None and tracked.while_decoding and num_tokens >= tracked.next_at

    # --- views ----------------------------------------------------------------------------

    def _note_view(self, tracked: TrackedRequest, num_certain: int) -> bool:
        """Whether a new view is due. It may be taken at any length, of the whole cache."""
        assert tracked.config is not None and tracked.drafts is not None
        draft, age = tracked.config.draft, num_certain - tracked.viewed_at
        is_old = draft.refresh_every is not None and age >= draft.refresh_every
        is_poor = (
            draft.refresh_below is not None
            and tracked.drafts.num_steps >= MIN_STEPS
            and tracked.drafts.rate < draft.refresh_below
        )
        if not (is_old or is_poor) or not tracked.has_queries(num_certain):
            return False
        tracked.position = num_certain
        tracked.lengths = self._lengths(tracked, tracked.config)
        return any(tracked.lengths)

    def links_blocks(self, tracked: TrackedRequest) -> bool:
        """Whether the request's view is made of its own blocks, chosen whole.

        The policy must choose alike for all heads of a block table, and in whole blocks.
        """
        config = tracked.config
        assert config is not None
        return (
            config.mode == "draft"
            and config.layer_groups == self.config.layer_groups
            and config.build_policy().granularity % self.block_size == 0
        )

    def start_view(self, tracked: TrackedRequest) -> None:
        """Note that the current step takes a view, which the drafts behind it will read."""
        assert tracked.config is not None
        tracked.viewed_at = tracked.position
        length = tracked.drafts.length if tracked.drafts is not None else 0
        tracked.drafts = DraftHistory(tracked.config.num_draft_tokens, length)

    def commit_view(self, tracked: TrackedRequest) -> None:
        """Note that a view was taken; the request itself holds what it held."""
        tracked.counted = True
        tracked.state = State.VIEWED

    def give_up_view(self, request_id: str) -> None:
        """The view's blocks are needed elsewhere: no more drafts, until a preemption at least."""
        tracked = self.requests[request_id]
        tracked.drafts = None
        if tracked.state is State.VIEWED:
            tracked.state = State.DONE

    def num_draft_tokens(self, request_id: str) -> int:
        """Tokens the request may draft after the current step; 0 without a view."""
        tracked = self.requests.get(request_id)
        if tracked is None or tracked.config is None or tracked.drafts is None:
            return 0
        return tracked.drafts.length if tracked.config.draft.adaptive else tracked.drafts.limit

    def num_draft_steps(self, request_id: str) -> int:
        """Drafts worth making in this step, whose own verification may lengthen them by one."""
        tracked = self.requests.get(request_id)
        if tracked is None or tracked.config is None or tracked.drafts is None:
            return 0
        drafts = tracked.drafts
        adaptive = tracked.config.draft.adaptive
        return min(drafts.length + 1, drafts.limit) if adaptive else drafts.limit

    def observe_drafts(self, request_id: str, num_drafts: int, num_accepted: int) -> None:
        """Count one verification of a request's drafts."""
        tracked = self.requests.get(request_id)
        if tracked is not None and tracked.drafts is not None:
            tracked.drafts.observe(num_drafts, num_accepted)

    # --- after a compaction ---------------------------------------------------------------

    def _rearm(self, tracked: TrackedRequest) -> None:
        assert tracked.config is not None
        extends = tracked.config.extends_codebooks and any(each.book for each in tracked.caches)
        if tracked.config.compresses_while_decoding or extends:
            tracked.next_at = tracked.position + tracked.config.interval
            tracked.state = State.ARMED
        else:
            tracked.state = State.DONE
