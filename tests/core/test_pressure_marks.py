"""The marks of memory pressure, to a block and to a token."""

from tests.core.test_pressure_trigger import World
from vllm_kvcompress.core.tracked_request import Phase


def test_the_marks_are_reached_by_as_much_as_they_say() -> None:
    world = World()
    for num_held, is_on in ((79, False), (80, True), (51, True), (50, False), (79, False)):
        world.pool.add("filler", num_held)
        assert world.room.num_held == num_held
        world.step()
        assert world.pressure.is_on is is_on, num_held
        world.pool.free("filler")


def test_one_block_above_the_low_mark_is_one_too_many() -> None:
    world = World()
    world.pool.add("filler", 80)
    world.step()
    world.pool.free("filler")
    world.pool.add("filler", 31)
    world.add("a", 20)
    assert world.room.num_held == 51
    world.step()
    assert world.names == ["a"]


def test_tokens_that_may_come_to_nothing_do_not_count() -> None:
    """A prompt's end counts once it is certain."""
    world = World()
    tracked, running = world.add("a", 85), list(world.running.values())
    world.pressure.update(running, lambda request: 1)
    assert world.pressure.is_on and tracked.phase is Phase.RESTING
    world.pressure.update(running, lambda request: 0)
    assert tracked.phase is Phase.ARMED
