"""What the allocator's model has found, each as the few requests that showed it."""

from dataclasses import replace
from typing import Any

from tests.core.allocator.loop import AllocatorLoop
from tests.core.allocator.machine import document
from tests.core.allocator.worlds import World


def answered(world: World, requests: list[tuple[list[int], int, Any]]) -> AllocatorLoop:
    """All requests run to their ends, and every step is checked."""
    loop = AllocatorLoop(world, 0)
    for number, (prompt, output, xargs) in enumerate(requests):
        loop.add(f"r{number}", prompt, output, xargs)
    loop.run()
    assert loop.num_finished == len(requests)
    return loop


def test_prompts_that_begin_alike_do_not_preempt_each_other_for_ever() -> None:
    """Neither fits the pool whole, and each holds the blocks that the other's compaction frees."""
    world = World(trigger="all", reads_queries=True, room=1.3)
    loop = answered(world, [(document(5, 61), 20, None), (document(5, 43), 20, None)])
    assert loop.scheduler.stats.compactions["snapkv/prompt"] > 2


def test_prompts_that_begin_alike_in_four_groups() -> None:
    world = World(groups=4, trigger="prompt", is_uneven=True, room=1.1)
    answered(world, [(document(5, 90 + 3 * n), 6, None) for n in range(4)])


def test_the_longest_prompt_and_its_drafts_fit_the_pool_that_vllm_starts_with() -> None:
    """Drafts take slots behind a chunk, and its mark's peak was counted without them."""
    for groups in (1, 3):
        world = World(groups=groups, drafts="beside", trigger="prompt", room=1.0)
        answered(world, [(document(0, length), 6, None) for length in (117, 119, 120)])


def test_where_no_cache_can_be_kept_no_prefix_is() -> None:
    """Beside the host's groups; a prefix without blocks was kept, and ended the engine."""
    asked = [([*document(0, 40), *document(1, n)], 4, {"kv_shared_prefix": 40}) for n in (5, 6)]
    loop = answered(World(beside="window", room=2.5), asked)
    assert loop.scheduler.stats.shared_prefix_requests == {"unserved": 2}


def test_states_of_steps_under_way_count() -> None:
    """vLLM counts those of one step; a prompt that filled the rest preempted itself for ever."""
    for world in (World(is_pipeline=True), World(is_async=True)):
        world = replace(world, beside="states", trigger="prompt", room=2.5)
        for length in (100, 120):
            answered(world, [(document(0, length), 1, {"kv_budget_ratio": 0.75})])
