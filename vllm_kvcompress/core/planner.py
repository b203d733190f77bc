"""Which requests are compressed, when, and how far. Knows lengths and settings, no vLLM classes.

A request passes through these phases:

    ARMED --(`next_at` tokens)--> DUE --(destination blocks found)--> PLANNED --(next step)--> DONE
      ^ ^                                                               |  |
      | '---------------- if generated tokens trigger more -------------'  |
      '------------------------ preemption: starts again ------------------'

or it is SKIPPED from the start, for a reason that is counted. `next_at` is the end of the prompt,
or so many generated tokens after the last compaction: never an absolute length, so a long prompt
alone triggers nothing while decoding. Where a setting waits for memory to be scarce, a request is
RESTING before it is ARMED, and again afterwards: resting.py. Nobody else moves a request on.

A request that is DUE and whose blocks others hold, too, is tried again whenever some of these are
gone, unless the setting's `shared_blocks` is "always"; any other is compacted at once, however full
the pool. What the end of its prompt will compact
does not change meanwhile; a compaction while decoding takes in the tokens that came since, because
the queries that the policy reads are the most recent ones.

What is planned is an eviction, a view (draft/views.py), or both from one region. Where views are
all there is, a request that is DONE goes back to PLANNED whenever a new one is due.
"""

from collections.abc import Iterable, Iterator
from copy import copy
from dataclasses import dataclass, field

from vllm_kvcompress.config.settings import CompressionConfig
from vllm_kvcompress.core.draft.views import ViewSchedule
from vllm_kvcompress.core.tracked_request import (
    CompactionSchedule,
    Phase,
    SkipReason,
    TrackedRequest,
)
from vllm_kvcompress.core.turns import window_read
from vllm_kvcompress.lengths.budgets import (
    compacts_again,
    evicting_marks,
    next_lengths,
    permanent_ranges,
)
from vllm_kvcompress.lengths.decode_queries import decode_gap, decode_window
from vllm_kvcompress.lengths.peak import peak_tokens
from vllm_kvcompress.messages import RequestSetup
from vllm_kvcompress.plans import GroupCache, GroupLengths, RequestOptions
from vllm_kvcompress.request_options import resolve_request


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
        Tokens whose codes one slot takes; needed where a setting codes tokens.
    rations_queries : bool
        Whether queries of generated tokens are recorded for requests alone that are told to
        (`note_recording`); else for all.
    num_lookahead : int
        Slots behind a request's tokens that vLLM hands out with them, for drafts.
    """

    config: CompressionConfig
    num_layer_groups: int
    block_size: int
    codes_per_row: int | None = None
    rations_queries: bool = False
    num_lookahead: int = 0
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
        """Register a request; its phase is ARMED or SKIPPED afterwards.

        One that generates a single token at most (`max_output`; beam search sends such requests,
        one a step) never reads what the end of its prompt would compact. What is compacted inside
        its prompt it does read, and may not fit without; and a shared prefix is for others, too.
        """
        config = resolve_request(self.config, options, task)
        shared_len = options.shared_len(self.block_size)
        if shared_len is not None:
            prompt_len = shared_len
        tracked = TrackedRequest(
            prompt_len, config, task, session=options.session, shared_len=shared_len
        )
        if config is None:
            tracked.skip_reason = SkipReason.OPTED_OUT
        elif streaming:
            tracked.skip_reason = SkipReason.STREAMING_INPUT
        else:
            self._begin(tracked, config)
            is_short = max_output is not None and max_output <= 1 and shared_len is None
            if tracked.skip_reason is None and is_short and len(tracked.marks) < 2:
                tracked.skip_reason = SkipReason.SHORT_OUTPUT
        if tracked.skip_reason is not None:
            tracked.phase = Phase.SKIPPED
        self.requests[request_id] = tracked
        return tracked

    def add_invalid(self, request_id: str, prompt_len: int) -> TrackedRequest:
        """Register a request whose options make no sense: it is served uncompressed."""
        tracked = TrackedRequest(prompt_len, None, phase=Phase.SKIPPED)
        tracked.skip_reason = SkipReason.INVALID_OPTIONS
        self.requests[request_id] = tracked
        return tracked

    def setups_of(self, request_ids: Iterable[str]) -> dict[str, RequestSetup]:
        """What the workers must know of requests that start; without those that are skipped."""
        setups = {}
        for request_id in request_ids:
            tracked = self.requests.get(request_id)
            if tracked and tracked.config and tracked.phase is not Phase.SKIPPED:
                evicted = tracked.compaction.evicted if tracked.start else ()
                setups[request_id] = RequestSetup(tracked.config, tracked.marks, evicted)
        return setups

    def _begin(self, tracked: TrackedRequest, config: CompressionConfig) -> None:
        """Set up a request that holds nothing yet."""
        prompt_len = tracked.prompt_len
        cache = GroupCache(0, permanent_ranges(prompt_len, config))
        tracked.compaction = CompactionSchedule([cache] * self.num_layer_groups)
        tracked.view = ViewSchedule.of(config, self.config, self.block_size)
        tracked.is_shared, tracked.start, tracked.peaks = False, None, {}
        tracked.queries_since, tracked.lacks_queries = None, False
        if self.rations_queries and (window := decode_window(config)):
            tracked.query_window, tracked.query_gap = window, decode_gap(config)
        self.arm(tracked, config, is_memory_scarce=False)

    def arm(
        self, tracked: TrackedRequest, config: CompressionConfig, is_memory_scarce: bool
    ) -> None:
        """Set the first trigger, or the reason for none."""
        prompt_len, tracked.marks = tracked.prompt_len, ()
        tracked.phase = Phase.ARMED
        if is_memory_scarce or not config.waits_for_pressure:
            tracked.marks = evicting_marks(
                prompt_len, config, self.num_layer_groups, self.block_size, self.codes_per_row
            )
        if tracked.marks:
            tracked.next_at = tracked.marks[0]
        elif config.waits_for_pressure:
            is_short = prompt_len < config.min_prompt_len
            tracked.next_at = prompt_len + (config.interval if is_short else 0)
            tracked.phase = Phase.RESTING
        elif config.compresses_while_decoding:
            tracked.next_at = prompt_len + config.interval
        elif prompt_len < config.min_prompt_len:
            tracked.skip_reason = SkipReason.SHORT_PROMPT
        else:
            tracked.skip_reason = SkipReason.UNDER_BUDGET

    def remove(self, request_id: str, num_computed: int = 0) -> TrackedRequest | None:
        """Forget a finished or aborted request, of which so many tokens were computed.

        Its `skip_reason` is set if it ended uncompressed although it was not skipped, unless it
        did not get as far as its first trigger's prompt.
        """
        tracked = self.requests.pop(request_id, None)
        if tracked is None or tracked.counted or tracked.skip_reason is not None:
            return None
        if tracked.start is not None:
            return None  # compressed, by an earlier turn
        if tracked.phase is Phase.DUE:
            tracked.skip_reason = (
                SkipReason.SHARED_PROMPT if tracked.is_shared else SkipReason.NO_ROOM
            )
        elif tracked.phase is Phase.PLANNED:
            tracked.skip_reason = SkipReason.SHORT_OUTPUT  # no step read what was compacted
        elif tracked.phase is Phase.RESTING and tracked.is_shared:
            tracked.skip_reason = SkipReason.SHARED_PROMPT
        elif tracked.was_under_budget:
            tracked.skip_reason = SkipReason.UNDER_BUDGET
        elif tracked.lacks_queries:
            tracked.skip_reason = SkipReason.NO_ROOM
        elif tracked.phase is Phase.ARMED and tracked.while_decoding:
            tracked.skip_reason = SkipReason.SHORT_OUTPUT
        elif tracked.phase is Phase.RESTING and num_computed >= tracked.prompt_len:
            tracked.skip_reason = SkipReason.AMPLE_MEMORY
        return tracked

    def restart(self, request_id: str) -> None:
        """A preempted request starts again from nothing."""
        tracked = self.requests.get(request_id)
        if tracked is not None and tracked.phase is not Phase.SKIPPED:
            assert tracked.config is not None
            self._begin(tracked, tracked.config)

    def give_up(self, request_id: str) -> None:
        """A request starts again from nothing, and is compressed no more: it went wrong."""
        self.restart(request_id)
        tracked = self.requests[request_id]
        tracked.marks, tracked.phase, tracked.skip_reason = (), Phase.SKIPPED, SkipReason.FAILED

    def set_aside(self, request_id: str) -> TrackedRequest:
        """A request's state as it is, to be put back if need be; a copy takes its place."""
        before = self.requests[request_id]
        self.requests[request_id] = copy(before)
        return before

    def upcoming(self, request_id: str) -> TrackedRequest | None:
        """The request, if a compaction or the first view is still to come for it."""
        tracked = self.requests.get(request_id)
        is_upcoming = tracked is not None and tracked.phase in (Phase.ARMED, Phase.DUE)
        return tracked if is_upcoming else None

    def clip_chunk(
        self, request_id: str, num_computed: int, num_new: int, num_known: int, unverified: int = 0
    ) -> int:
        """End a step's tokens where a compaction falls due.

        A resumed request prefills its prompt and its earlier output in one go; it must stop at
        the prompt's end, and after every interval, to be compacted there as it was the first
        time. Speculated tokens (beyond the `num_known` ones) stop one token earlier: the step that
        reaches the mark must not hinge on what is accepted. Where `unverified` ones of an earlier
        step are counted as computed (asynchronous scheduling), it waits for their verdict: 0.
        """
        tracked = self.upcoming(request_id)
        stop = None if tracked is None else tracked.stop_behind(num_computed - unverified)
        if stop is None:
            return num_new
        is_ahead = num_computed + num_new > num_known
        room = stop - num_computed - (1 if is_ahead or unverified else 0)
        return min(num_new, max(room, 0 if unverified else 1))

    def max_cached_tokens(self, request_id: str) -> int | None:
        """Longest prefix-cache hit the request may take; None if any.

        At least one token, and all tokens whose queries the policy needs, must be computed.
        """
        tracked = self.upcoming(request_id)
        if tracked is None:
            return None
        assert tracked.config is not None
        queries = tracked.config.build_policy().queries.value
        if queries == "prompt" and not tracked.while_decoding:
            return 0
        return tracked.next_at - window_read(tracked.config)

    def most_held(self, group: int, request_id: str, num_tokens: int) -> int:
        """Most slots of a layer group that a request of so many tokens has ever needed."""
        tracked = self.requests.get(request_id)
        config = None if tracked is None else tracked.config
        if tracked is None or config is None or not config.compresses_in_prompts:
            return num_tokens
        if tracked.phase is Phase.SKIPPED:
            return num_tokens
        # Every KV cache group asks, in every step in which the request waits to be admitted.
        if num_tokens not in tracked.peaks:
            shape = self.num_layer_groups, self.block_size
            tracked.peaks[num_tokens] = peak_tokens(
                tracked.prompt_len, num_tokens, config, *shape, start=tracked.start
            )
        return min(tracked.peaks[num_tokens][group] + self.num_lookahead, num_tokens)

    def note_progress(self, request_id: str, num_certain: int) -> bool:
        """Record how many tokens' keys are certain after this step; True if work is due."""
        tracked = self.requests.get(request_id)
        if tracked is not None and tracked.phase is Phase.DONE:
            return self._note_another_view(tracked, num_certain)
        tracked = self.upcoming(request_id)
        if tracked is None or num_certain < tracked.next_at:
            return False
        tracked.lacks_queries = tracked.while_decoding and not tracked.has_queries(num_certain)
        if tracked.lacks_queries:
            return False
        position = num_certain
        if not tracked.while_decoding:
            # Of marks inside the prompt that have waited, the last one alone is made up for.
            position = max(mark for mark in tracked.marks if mark <= num_certain)
            tracked.next_at = position
        if tracked.phase is Phase.ARMED or position != tracked.position:
            self.fit(tracked, position)
            tracked.phase = Phase.DUE
        if not tracked.work:
            tracked.was_under_budget = position >= tracked.prompt_len
            self.rearm(tracked)
            return False
        return True

    def _note_another_view(self, tracked: TrackedRequest, num_certain: int) -> bool:
        if not tracked.view.is_due_again(num_certain) or not tracked.has_queries(num_certain):
            return False
        self.fit(tracked, num_certain)
        return bool(tracked.work)

    def fit(self, tracked: TrackedRequest, position: int) -> None:
        """Size what is due at a sequence of `position` tokens."""
        assert tracked.config is not None
        tracked.position = position
        caches = tracked.compaction.caches_at(position)

        def lengths_of(config: CompressionConfig) -> list[GroupLengths | None]:
            return next_lengths(
                tracked.prompt_len, position, caches, config, self.block_size, self.codes_per_row
            )

        evicted = [] if tracked.view.is_alone else lengths_of(tracked.config)
        tracked.compaction.lengths = evicted
        if position >= tracked.prompt_len:
            tracked.view.fit(lengths_of, caches, evicted, self.block_size)

    # --- what becomes of work that is due -------------------------------------------------

    def decline(self, tracked: TrackedRequest) -> None:
        """It would free no more than it takes, because others hold its blocks; due again later."""
        tracked.is_shared = True
        if tracked.waits_for_pressure:
            self.rearm(tracked)  # others are chosen in its place

    def put_off(self, tracked: TrackedRequest) -> None:
        """There are no blocks for it; it is due again with the next step."""
        tracked.is_shared = False

    def drop_view(self, tracked: TrackedRequest) -> None:
        """Do the rest of its work without the view that it does not need."""
        tracked.view.drop()

    def note_planned(self, tracked: TrackedRequest) -> None:
        """The current step does it."""
        tracked.phase, tracked.is_shared = Phase.PLANNED, False
        if any(tracked.view.lengths):
            tracked.view.start(tracked.position)

    def planned(self, request_id: str) -> TrackedRequest | None:
        """The request, if the last step did its work; not if it is gone or has started again."""
        tracked = self.requests.get(request_id)
        return tracked if tracked is not None and tracked.phase is Phase.PLANNED else None

    def commit(self, tracked: TrackedRequest) -> None:
        """Note that the planned work has been done."""
        tracked.counted = True
        if any(tracked.compaction.lengths):
            tracked.compaction.commit(tracked.position)
        self.rearm(tracked)

    def rearm(self, tracked: TrackedRequest) -> None:
        """Set the next trigger of a request with which something was done, if there is one."""
        assert tracked.config is not None
        ahead = [mark for mark in tracked.marks if mark > tracked.position]
        if ahead:
            tracked.next_at, tracked.phase = ahead[0], Phase.ARMED
        elif compacts_again(tracked.config, tracked.compaction.caches):
            tracked.next_at = tracked.position + tracked.config.interval
            tracked.phase = Phase.ARMED
        elif tracked.waits_for_pressure:
            tracked.next_at = tracked.position + tracked.config.interval
            tracked.phase = Phase.RESTING
        else:
            tracked.phase = Phase.DONE

    # --- views ----------------------------------------------------------------------------

    def view_of(self, request_id: str) -> ViewSchedule | None:
        """A request's views; None if nobody knows it."""
        tracked = self.requests.get(request_id)
        return None if tracked is None else tracked.view

    def give_up_view(self, request_id: str) -> None:
        """Its blocks are needed elsewhere."""
        self.requests[request_id].view.give_up()

    def idle_views(self) -> Iterator[tuple[str, TrackedRequest]]:
        """Requests with a view that the current step neither takes nor replaces, newest first."""
        for request_id, tracked in reversed(self.requests.items()):
            if tracked.phase is not Phase.PLANNED and tracked.view.drafts is not None:
                yield request_id, tracked

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

    def must_record(self, request_id: str) -> bool:
        """Whether a request's tokens depend on queries that are recorded while it decodes."""
        tracked = self.requests.get(request_id)
        return tracked is not None and not tracked.view.is_alone
