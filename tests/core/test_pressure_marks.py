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


def test_no_more_are_chosen_than_the_low_mark_needs() -> None:
    """Of 87 held blocks a gives 37 back: that is the low mark; another block is too much."""
    for num_more, names in ((27, ["a"]), (28, ["a", "b"])):
        world = World()
        world.add("a", 40)
        world.add("b", 20)
        world.pool.add("filler", num_more)
        world.step()
        assert world.names == names


def test_a_window_of_one_query_needs_a_slot_too() -> None:
    world = World(num_slots=1, preset="snapkv", observation_window=1)
    for name in "abc":
        world.add(name, 32)
    world.step()
    assert world.names == ["a"]
    world.steps(2)
    assert world.names == ["a", "b"]


def test_what_a_family_will_give_back_counts_once() -> None:
    world = World(num_slots=3, preset="snapkv", pressure={"when": 0.8, "until": 0.7})
    world.add("a", 30)
    world.add("b", 31, "a", 29)
    world.add("c", 20)
    world.pool.add("filler", 28)
    for num_more, phase in ((0, Phase.RESTING), (16, Phase.RESTING), (1, Phase.ARMED)):
        world.pool.add(f"{num_more} more", num_more)
        world.step("")
        assert [world.planner.requests[name].phase for name in "ab"] == [Phase.ARMED] * 2
        assert world.planner.requests["c"].phase is phase, "26 of 80, 96 and 97 come back"
