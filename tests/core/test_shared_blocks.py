"""With `shared_blocks: always` every compaction happens at its mark, whoever holds the blocks."""

import random
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.request import RequestStatus

from tests.core.test_pressure_loop import watched
from tests.core.test_scheduler_loop import BLOCK, LOOPS, SETTING, Loop, prompt
from tests.inside import preempt
from vllm_kvcompress.lengths.schedule import compactions
from vllm_kvcompress.messages import StepPlan

SHARED = {**SETTING, "shared_blocks": "always", "observation_window": 8}
TRIGGERS: dict[str, dict[str, Any]] = {
    "end_of_prompt": {},
    "interval": {"trigger": "interval", "interval": 32},
    "both": {"trigger": "both", "interval": 32, "preset": "snapkv"},
    "prompt": {"trigger": "prompt", "prompt_interval": 48},
    "all": {"trigger": "all", "prompt_interval": 64, "interval": 32, "preset": "snapkv"},
    "much kept": {"budget": {"ratio": 0.75, "floor": 1}},
    "unequal": {
        "trigger": "both", "interval": 32, "budget": {"tokens": 64, "floor": 1},
        "layer_budget": {"shape": "pyramid"},
    },
}  # fmt: skip
SMALL = 1 + 2 * 26
"""416 tokens in each of two groups."""


class Marks:
    """Where every request is compacted, and where it should be."""

    def __init__(self, loop: Loop) -> None:
        self.loop, self.scheduler = loop, loop.scheduler
        self.planned: dict[str, list[int]] = {}
        self.counts: Counter[str] = Counter()
        watched(loop, self.check)

    def check(self, output: Any) -> None:
        for new in output.scheduled_new_reqs:
            self.planned[new.req_id] = []  # it starts from nothing, perhaps once more
            self.counts["starts"] += 1
            self.counts["restarts"] += self.scheduler.requests[new.req_id].num_preemptions > 0
        for plan in StepPlan.of(output).plans:
            self.planned[plan.request_id].append(plan.position)
            self.counts["compactions"] += 1
            groups = [group for group in plan.groups if group is not None]
            self.counts["in place"] += any(group.in_place for group in groups)
        for name in output.num_scheduled_tokens:
            request = self.scheduler.requests[name]
            tracked = self.scheduler.planner.requests[name]
            blocks = self.scheduler._managers[0].req_to_blocks[name]
            self.counts["shared"] += any(block.ref_cnt > 1 for block in blocks)
            if tracked.config is None or tracked.skip_reason:
                continue
            planner = self.scheduler.planner
            reached = request.num_computed_tokens - request.num_output_placeholders
            marks = compactions(
                tracked.prompt_len, reached, tracked.config, planner.num_layer_groups, BLOCK
            )
            expected = [each.position for each in marks]
            assert self.planned[name][: len(expected)] == expected, name


@pytest.mark.parametrize("trigger", TRIGGERS)
@pytest.mark.parametrize("name", LOOPS)
def test_every_compaction_is_at_its_mark(name: str, trigger: str, probe_model: str) -> None:
    """Arrivals that begin alike, aborts, preemptions; books are checked in every step."""
    loop = Loop(
        probe_model, *LOOPS[name], num_blocks=SMALL, setting={**SHARED, **TRIGGERS[trigger]},
        max_num_seqs=12,
    )  # fmt: skip
    loop.max_steps = 20000
    scheduler, rng = loop.scheduler, random.Random(3)
    marks = Marks(loop)
    aborted: set[str] = set()
    added = 0
    while loop.num_steps < 300:
        while len(scheduler.requests) < 14 and rng.random() < 0.6:
            length = rng.choice([20, 60, 100, 100, 150, 200, 200])
            tokens = prompt(length, rng.choice([0, 0, 0, 7, added]))
            if rng.random() < 0.5:
                tokens += prompt(rng.randrange(1, 40), added)
            xargs = {"kv_compression": "none"} if rng.random() < 0.15 else None
            if rng.random() < 0.2 and scheduler.planner.config.trigger != "interval":
                xargs = {"kv_budget_tokens": rng.choice([16, 96])}
            loop.add(f"r{added}", tokens, rng.choice([1, 5, 40, 90]), xargs)
            added += 1
        for _ in range(rng.randrange(1, 6)):
            loop.step()
        if scheduler.requests and rng.random() < 0.15:
            one = rng.choice(list(scheduler.requests))
            scheduler.finish_requests(one, RequestStatus.FINISHED_ABORTED)
            aborted.add(one)
            scheduler.check_integrity()
        if len(scheduler.running) > 1 and rng.random() < 0.05:
            preempt(SimpleNamespace(scheduler=scheduler), scheduler.running[-1])
            scheduler.check_integrity()
    loop.run()
    while loop.under_way:
        loop._take(*loop.under_way.popleft())
    assert loop.finished | aborted == {f"r{number}" for number in range(added)}
    free = scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
    assert free == SMALL - 1 and not scheduler.planner.requests
