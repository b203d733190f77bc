"""Compactions inside a prompt: where they fall due, and what happens where one has to wait."""

import pytest

from tests.core.test_planner import compact
from vllm_kvcompress.config.reading import parse_config
from vllm_kvcompress.core import planner as planner_module
from vllm_kvcompress.core.planner import Planner
from vllm_kvcompress.core.tracked_request import Phase, SkipReason, TrackedRequest
from vllm_kvcompress.errors import ConfigError
from vllm_kvcompress.lengths.budgets import evicting_marks, prompt_marks
from vllm_kvcompress.request_options import parse_request

SETTING = {
    "preset": "snapkv",
    "trigger": "prompt",
    "prompt_interval": 500,
    "budget": {"tokens": 256},
    "observation_window": 16,
}


def planner(**more: object) -> Planner:
    config = parse_config({**SETTING, **more})
    assert config is not None
    return Planner(config, 1, block_size=32)


def add(plan: Planner, prompt_len: int) -> TrackedRequest:
    return plan.add("r", prompt_len, parse_request(None))


@pytest.mark.parametrize(
    ("prompt_len", "marks"),
    [
        (2000, (500, 1000, 1500, 2000)),
        (2016, (16, 516, 1016, 1516, 2016)),  # the first one has its window
        (2015, (515, 1015, 1515, 2015)),
        (499, ()),
        (512, (512,)),
        (516, (16, 516)),
    ],
)
def test_marks_are_counted_back_from_the_end(prompt_len: int, marks: tuple[int, ...]) -> None:
    config = parse_config({**SETTING, "min_prompt_len": 500})
    assert config is not None
    assert prompt_marks(prompt_len, config) == marks
    ends = parse_config({**SETTING, "trigger": "end_of_prompt"})
    assert ends is not None
    assert prompt_marks(prompt_len, ends) == marks[-1:]


def test_a_prompt_goes_back_to_its_budget_at_every_mark() -> None:
    plan = planner()
    tracked = add(plan, 1900)
    (setup,) = plan.setups_of(["r"]).values()
    assert setup.marks == (400, 900, 1400, 1900)
    done, most, chunks = 0, 0, []
    while done < 1900:
        count = plan.clip_chunk("r", done, min(400, 1900 - done), 1900)
        done += count
        chunks.append(count)
        held = tracked.compaction.caches_at(done)[0].num_tokens
        most = max(most, held)
        if plan.note_progress("r", done):
            compact(plan)
    assert chunks == [400, 400, 100, 400, 100, 400, 100]
    assert most == 256 + 24 + 500, "the budget in whole blocks, part of one, and one interval"
    assert tracked.phase is Phase.DONE and tracked.compaction.compacted_at == 1900
    assert plan.clip_chunk("r", 1900, 1, 1901) == 1


def test_a_hit_ends_before_the_window_of_the_first_mark() -> None:
    plan = planner()
    add(plan, 1900)
    assert plan.max_cached_tokens("r") == 400 - 16
    plan = planner(policy={"name": "keydiff"})
    add(plan, 1900)
    assert plan.max_cached_tokens("r") == 399


def test_a_first_part_within_the_budget_stays_whole() -> None:
    """So a short one behind which marks are counted from the end is not compacted to nothing."""
    plan = planner()
    assert add(plan, 1750).marks == (750, 1250, 1750), "not at 250"
    assert plan.add("s", 1800, parse_request(None)).marks == (300, 800, 1300, 1800)
    share = planner(budget={"ratio": 0.5})
    assert share.add("r", 1800, parse_request(None)).marks == (1300, 1800)


def test_marks_at_which_the_cache_is_whole_are_left_out() -> None:
    """So a long prefix may come from the prefix cache, although the first mark is short of it."""
    plan = planner(budget={"tokens": 1000})
    tracked = add(plan, 1900)
    assert tracked.marks == (1400, 1900) and plan.max_cached_tokens("r") == 1400 - 16
    assert plan.clip_chunk("r", 0, 1800, 1900) == 1400
    two = evicting_marks(1900, tracked.config, 2, 32)
    assert two == (1400, 1900)
    pyramid = {"layer_groups": {"count": 2}, "layer_budget": {"shape": "pyramid"}}
    config = parse_config({**SETTING, "budget": {"tokens": 1000}, **pyramid})
    assert config is not None
    assert evicting_marks(1900, config, 2, 32) == (1400, 1900)


def test_of_marks_that_have_waited_the_last_is_made_up_for() -> None:
    """Others hold the first blocks; the queries of older marks are not read any more."""
    plan = planner()
    tracked = add(plan, 1900)
    for start, done in ((0, 400), (400, 900)):
        assert plan.clip_chunk("r", start, 1400, 1900) == done - start
        assert plan.note_progress("r", done)
        assert tracked.position == done
        plan.decline(tracked)
    assert plan.clip_chunk("r", 900, 300, 1900) == 300
    assert plan.note_progress("r", 1200) and tracked.position == 900
    compact(plan)
    assert (tracked.next_at, tracked.phase) == (1400, Phase.ARMED)
    assert plan.clip_chunk("r", 1200, 600, 1900) == 200


def test_a_preempted_request_stops_at_its_marks_again() -> None:
    plan = planner()
    tracked = add(plan, 1900)
    plan.note_progress("r", 400)
    compact(plan)
    plan.restart("r")
    assert (tracked.next_at, tracked.compaction.compacted_at) == (400, 0)
    assert plan.clip_chunk("r", 0, 1950, 1950) == 400, "its output does not move them"


def test_generated_tokens_trigger_more_where_the_setting_says_so() -> None:
    plan = planner(trigger="all", interval=64)
    tracked = add(plan, 1100)
    assert tracked.marks == (600, 1100)
    for done in (600, 1100):
        plan.note_progress("r", done)
        compact(plan)
    assert (tracked.next_at, tracked.phase) == (1164, Phase.ARMED)


def test_a_request_that_ends_inside_its_prompt_is_no_uncompressed_one() -> None:
    plan = planner(budget={"tokens": 1000})
    add(plan, 1900)
    assert not plan.note_progress("r", 900), "nothing to evict yet"
    tracked = plan.remove("r")
    assert tracked is not None and tracked.skip_reason is None
    plan = planner(budget={"tokens": 2000})
    assert add(plan, 1900).skip_reason == SkipReason.UNDER_BUDGET


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"prompt_interval": 15}, "prompt_interval: must be at least observation_window"),
        ({"preset": "h2o"}, "trigger.*h2o cannot compress inside the prompt"),
        ({"preset": "spindlekv"}, "codebook: keys are coded by their positions"),
        ({"preset": "expected_attention"}, "expected_attention cannot compress inside the prompt"),
        ({"mode": "draft"}, "the mode draft keeps the whole cache"),
    ],
)
def test_settings_that_do_not_go_with_marks(more: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config({**SETTING, **more})


def test_an_interval_of_prompts_without_the_trigger_does_nothing() -> None:
    with pytest.raises(ConfigError, match="nothing is done inside prompts"):
        parse_config({"preset": "snapkv", "prompt_interval": 500})


def test_outputs_are_bounded_where_generated_tokens_trigger_more() -> None:
    """Of prompts without a mark, too: they are shorter than min_prompt_len, or one interval."""
    plan = planner(trigger="all", interval=64)
    for name, length in (("short", 300), ("one mark", 515), ("long", 1900)):
        assert plan.add(name, length, parse_request(None)).skip_reason is None
        assert plan.most_held(0, name, length + 3000) <= max(min(length, 800), 256 + 32 + 64 + 300)
    ends = planner()
    ends.add("r", 515, parse_request(None))
    assert ends.most_held(0, "r", 515 + 3000) > 3000


def test_every_group_asks_and_one_answer_is_worked_out(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, calls = planner(), []
    add(plan, 1900)
    real = planner_module.peak_tokens

    def counted(*args: object, **options: object) -> list[int]:
        calls.append(args[1])
        return real(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(planner_module, "peak_tokens", counted)
    held = [plan.most_held(0, "r", tokens) for tokens in (1900, 1900, 1950, 1900)]
    assert held == [780, 780, 780, 780] and calls == [1900, 1950]
    plan.num_lookahead = 3
    assert plan.most_held(0, "r", 1900) == 783, "drafts write behind them"
    assert plan.most_held(0, "r", 300) == 300
    plan.restart("r")
    plan.most_held(0, "r", 1900)
    assert calls == [1900, 1950, 300, 1900]


def test_a_request_of_one_token_is_compacted_inside_its_prompt() -> None:
    """It may not fit otherwise; what its end compacts nobody reads."""
    plan = planner()
    tracked = plan.add("r", 1900, parse_request(None), max_output=1)
    assert tracked.skip_reason is None and tracked.next_at == 400
    assert plan.most_held(0, "r", 1900) < 800
    two = plan.add("two", 900, parse_request(None), max_output=1)
    assert two.marks == (400, 900) and two.skip_reason is None
    short = plan.add("s", 515, parse_request(None), max_output=1)
    assert short.skip_reason == SkipReason.SHORT_OUTPUT
    assert plan.most_held(0, "s", 515) == 515
