"""vLLM's own scheduler with our classes on top, run step by step and checked in every one."""

from typing import Any

from vllm.v1.core.sched.interface import PauseState
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from lab.load_checks import Progress, named_in
from tests.core.allocator.ledger import Ledger
from tests.core.allocator.slots import Slots
from tests.core.allocator.worlds import BLOCK, NUM_DRAFTS, World, scheduler_of
from tests.core.test_scheduler_loop import Loop
from tests.inside import preempt

MAX_STEPS = 4000
"""Until all requests are through, one after another and each computed again several times."""


class AllocatorLoop(Loop):
    """One world's scheduler, and everything that watches it."""

    block_size = BLOCK

    def __init__(self, world: World, seed: int) -> None:
        self.world = world
        self._begin(scheduler_of(world))
        self.random.seed(seed)
        self.num_ahead = world.num_ahead
        self.ledger = Ledger(self.scheduler)
        kinds = ["own"] * world.groups + [world.beside] * bool(world.beside)
        self.slots = Slots(kinds, self.random)
        self.progress = Progress()
        self.names: set[str] = set()
        self.num_finished = 0
        self.is_broken = False

    # --- what happens ---------------------------------------------------------------------

    def add(self, name: str, prompt: list[int], *args: Any, **options: Any) -> Request:
        """A request arrives."""
        self.names.add(name)
        options["arrival_time"] = float(len(self.names))  # the clock may be set back
        self.slots.salts[name] = options.get("cache_salt")
        return super().add(name, prompt, *args, **options)

    def step(self) -> bool:
        """Schedule a step, let the worker do it, take in what is due; False once all is done."""
        self.num_steps += 1
        self.is_broken = True
        self.ledger.before_schedule()
        output = self.scheduler.schedule()
        self.ledger.take(output)
        requests = [self.scheduler.requests[name] for name in output.num_scheduled_tokens]
        tokens = {
            each.request_id: self._tokens(each.request_id, output)
            for each in requests
            if not each.is_prefill_chunk
        }
        self.slots.run(output, tokens, self.ledger.frozen)
        self.under_way.append((output, tokens))
        while len(self.under_way) > self.num_ahead:
            self._take_in()
        if self.scheduler.pause_state is PauseState.UNPAUSED:
            self.progress.check(self.scheduler.requests)
        self.is_broken = False
        return bool(self.scheduler.requests)

    def _take_in(self) -> None:
        output, tokens = self.under_way.popleft()
        names = list(output.num_scheduled_tokens)
        found = [tokens.get(name, []) for name in names]
        results = ModelRunnerOutput(names, {name: n for n, name in enumerate(names)}, found)
        before = len(self.scheduler.requests)
        self.scheduler.update_from_output(output, results)
        self.num_finished += before - len(self.scheduler.requests)
        if self.world.drafts and not self.world.num_ahead:
            views = self.ledger.requests
            drafts = [
                [7] * NUM_DRAFTS
                if name in tokens and (self.world.drafts == "tokens" or views[name].has_view)
                else []
                for name in names
            ]
            self.scheduler.update_draft_token_ids(DraftTokenIds(names, drafts))
        self.ledger.check_pool()

    def abort(self, name: str) -> None:
        """The client is gone."""
        self.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)
        self.ledger.check_pool()

    def preempt(self, request: Request) -> None:
        """What vLLM does to a running request where the pool is too small."""
        preempt(self, request)
        self.scheduler.prev_step_scheduled_req_ids.discard(request.request_id)
        self.ledger.check_pool()

    def reset(self, is_forced: bool) -> None:
        """Empty the prefix cache."""
        done = self.scheduler.reset_prefix_cache(reset_running_requests=is_forced)
        assert done or not is_forced
        assert not done or not any(b.block_hash for b in self.ledger.pool.blocks)
        self.ledger.check_pool()

    def sleep(self, mode: str, is_deep: bool) -> None:
        """What an engine's core does to the scheduler when it is put to sleep.

        Deep sleep discards the device's memory.
        """
        if mode == "abort":
            self.scheduler.finish_requests(None, RequestStatus.FINISHED_ABORTED)
        is_kept = mode == "keep"
        self.scheduler.set_pause_state(PauseState.PAUSED_ALL if is_kept else PauseState.PAUSED_NEW)
        if is_deep:
            self.reset(is_forced=True)
            self.slots.wipe()
        self.ledger.check_pool()

    def wake(self) -> None:
        """Steps are scheduled again."""
        self.scheduler.set_pause_state(PauseState.UNPAUSED)
        self.progress = Progress()

    # --- the end --------------------------------------------------------------------------

    def finish(self, is_abrupt: bool) -> None:
        """Run to the end, or abort everything: nothing is left, and nobody is named anywhere."""
        self.wake()
        if is_abrupt:
            self.scheduler.finish_requests(None, RequestStatus.FINISHED_ABORTED)
        start = self.num_steps
        while self.step():
            assert self.num_steps - start < MAX_STEPS, "the loop does not end"
        self.step()  # the worker hears of the last requests
        while self.under_way:
            self._take_in()
        scheduler = self.scheduler
        scheduler.reuse.kept.clear()
        assert scheduler.reset_prefix_cache(), "blocks are held by nobody"
        self.ledger.check_pool()
        scheduler.schedule()  # messages to workers are through
        roots = {"scheduler": scheduler}
        roots |= {f"manager {n}": each for n, each in enumerate(self.ledger.managers)}
        left = named_in(roots, self.names.__contains__)
        assert not left, f"requests that are gone are still named in {left[:4]}"
