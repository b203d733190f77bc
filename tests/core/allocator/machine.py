"""Everything that can happen to the allocator, as rules of a state machine for Hypothesis."""

from collections import Counter
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.request import Request

from tests.core.allocator.loop import AllocatorLoop
from tests.core.allocator.worlds import MAX_LEN, World, worlds

OPTIONS: list[dict[str, Any] | None] = [
    None, None, None, {"kv_compression": "none"}, {"kv_budget_tokens": 4}, {"kv_budget_ratio": 0.75}
]  # fmt: skip
OUTPUTS = [1, 2, 6, 20, 40]
LONGEST = MAX_LEN - 8
MOST = 8
"""Requests at once: twice as many as run."""


def document(which: int, length: int, first: int = 0) -> list[int]:
    """Tokens of a text; those of other texts are others at every place."""
    return [20 + 97 * which + (first + n) % 97 for n in range(length)]


class Allocator(RuleBasedStateMachine):
    """Requests come and go, in any order; `AllocatorLoop` checks every step.

    Attributes
    ----------
    counts : Counter[str]
        Of all runs since it was emptied.
    """

    counts: Counter[str] = Counter()
    worlds: st.SearchStrategy[World] = worlds

    def __init__(self) -> None:
        super().__init__()
        self.loop: AllocatorLoop | None = None
        self.count = 0
        self.turns: dict[int, Request] = {}

    @initialize(data=st.data(), seed=st.integers(0, 99))
    def open(self, data: Any, seed: int) -> None:
        self.seed = seed
        self.loop = AllocatorLoop(data.draw(self.worlds, label="world"), seed)

    def _add(self, prompt: list[int], output: int, xargs: Any, salt: Any, **more: Any) -> Request:
        assert self.loop is not None
        self.count += 1
        name = f"r{self.count}"
        return self.loop.add(name, prompt, output, xargs, cache_salt=salt, **more)

    @property
    def _requests(self) -> dict[str, Request]:
        return self.loop.scheduler.requests if self.loop else {}

    # --- requests -------------------------------------------------------------------------

    @precondition(lambda self: len(self._requests) < MOST)
    @rule(
        which=st.integers(0, 2), common=st.integers(0, LONGEST), own=st.integers(1, 40),
        output=st.sampled_from(OUTPUTS), options=st.sampled_from(OPTIONS),
        salt=st.sampled_from([None, None, "salt"]), copies=st.integers(1, 3),
        priority=st.integers(0, 2),
    )  # fmt: skip
    def admit(
        self, which: int, common: int, own: int, output: int, options: Any, salt: Any, copies: int,
        priority: int,
    ) -> None:  # fmt: skip
        """One prompt, perhaps for several answers; it may begin as others do."""
        prompt = [*document(which, common), *document(3, own, self.count)][:LONGEST]
        for _ in range(copies):
            self._add(prompt, output, options, salt, priority=priority)

    @precondition(lambda self: 0 < len(self._requests) < MOST)
    @rule(
        which=st.integers(0, MOST), common=st.integers(8, LONGEST), own=st.integers(1, 40),
        output=st.sampled_from(OUTPUTS), options=st.sampled_from(OPTIONS),
    )  # fmt: skip
    def join(self, which: int, common: int, own: int, output: int, options: Any) -> None:
        """A prompt that begins as that of a request that is here, and may still hold its blocks."""
        others = list(self._requests.values())
        other = others[which % len(others)]
        assert other.prompt_token_ids is not None
        prompt = [*other.prompt_token_ids[:common], *document(3, own, self.count)][:LONGEST]
        self._add(prompt, output, options, other.cache_salt)

    @precondition(lambda self: len(self._requests) < MOST)
    @rule(
        which=st.integers(0, 2), common=st.integers(8, 70), own=st.integers(0, 20),
        output=st.sampled_from(OUTPUTS), salt=st.sampled_from([None, None, "salt"]),
        count=st.integers(1, 3),
    )  # fmt: skip
    def ask_about_a_text(
        self, which: int, common: int, own: int, output: int, salt: Any, count: int
    ) -> None:
        """Questions that say what they have in common."""
        xargs = {"kv_shared_prefix": common}
        for number in range(count):
            prompt = [*document(which, common), *document(4, own, 7 * number)]
            self._add(prompt, output, xargs, salt)

    @precondition(lambda self: len(self._requests) < MOST)
    @rule(
        chat=st.integers(0, 1), new=st.integers(1, 40), cut=st.sampled_from([0, 0, 0, 3, 30]),
        output=st.sampled_from(OUTPUTS),
    )  # fmt: skip
    def say(self, chat: int, new: int, cut: int, output: int) -> None:
        """The next turn of a chat, whose text goes on from the last one's or from a part of it."""
        last = self.turns.get(chat)
        text = list(last.all_token_ids) if last is not None else []
        text = text[: max(len(text) - cut, 0)]
        prompt = [*text, *document(5 + chat, new, len(text) + cut)]
        if len(prompt) > LONGEST:
            prompt = prompt[:new]
        self.turns[chat] = self._add(prompt, output, {"kv_session": f"chat {chat}"}, None)

    # --- steps ----------------------------------------------------------------------------

    @rule(count=st.integers(1, 12))
    def step(self, count: int) -> None:
        assert self.loop is not None
        for _ in range(count):
            self.loop.step()

    @rule(count=st.integers(1, 40))
    def run_on(self, count: int) -> None:
        """The same for longer, as long as there is something to do."""
        assert self.loop is not None
        while count and self._requests:
            self.loop.step()
            count -= 1

    @precondition(lambda self: self._requests)
    @rule()
    def stop_soon(self) -> None:
        """An answer ends before its time; what is accepted behind the end is dropped."""
        assert self.loop is not None
        self.loop.stop_next = True

    # --- interruptions --------------------------------------------------------------------

    @precondition(lambda self: self._requests)
    @rule(which=st.integers(0, MOST))
    def abort(self, which: int) -> None:
        assert self.loop is not None
        names = list(self._requests)
        self.loop.abort(names[which % len(names)])

    @precondition(lambda self: self.loop and self.loop.scheduler.running)
    @rule(which=st.integers(0, MOST))
    def preempt(self, which: int) -> None:
        assert self.loop is not None
        running = self.loop.scheduler.running
        self.loop.preempt(running[which % len(running)])

    @rule(is_forced=st.booleans())
    def reset(self, is_forced: bool) -> None:
        assert self.loop is not None
        self.loop.reset(is_forced)

    @precondition(lambda self: self.loop and _pause_of(self) is PauseState.UNPAUSED)
    @rule(mode=st.sampled_from(["abort", "keep", "wait"]), is_deep=st.booleans())
    def sleep(self, mode: str, is_deep: bool) -> None:
        assert self.loop is not None
        self.loop.sleep(mode, is_deep)

    @precondition(lambda self: self.loop and _pause_of(self) is not PauseState.UNPAUSED)
    @rule()
    def wake(self) -> None:
        assert self.loop is not None
        self.loop.wake()

    # --- the end --------------------------------------------------------------------------

    def teardown(self) -> None:
        if self.loop is None or self.loop.is_broken:
            return  # it has failed
        self.loop.finish(is_abrupt=bool(self.seed % 2))
        counts, scheduler = self.counts, self.loop.scheduler
        counts["steps"] += self.loop.num_steps
        counts["runs"] += 1
        counts["requests"] += self.count
        counts["finished"] += self.loop.num_finished
        counts.update(self.loop.ledger.seen)
        counts["deferrals"] += scheduler.stats.deferrals


def _pause_of(machine: Allocator) -> PauseState:
    assert machine.loop is not None
    return machine.loop.scheduler.pause_state
