"""Conversations that go on from a compressed cache, in vLLM's own schedulers, without a model."""

import random
from typing import Any

import pytest
from vllm.lora.request import LoRARequest
from vllm.v1.request import Request, RequestStatus

from tests.core.test_scheduler_loop import BLOCK, LOOPS, STOP, prompt
from tests.core.watched_loop import UNEVEN, Watched, watch
from vllm_kvcompress.config.reading import parse_config
from vllm_kvcompress.core.kept_cache import Kind, Outcome

WINDOW = {**UNEVEN, "preset": "snapkv", "observation_window": 8}
EVERYWHERE = {**WINDOW, "trigger": "all", "prompt_interval": 64, "interval": 16}
CHAT = {"kv_session": "chat"}
LENGTHS = [1, 2, 5, 5, 10, 20]
"""Output tokens, in any traffic."""


class Chats(Watched):
    """Whose requests belong to one chat, unless they say otherwise."""

    def ask(self, name: str, text: list[int], max_tokens: int = 20, **options: Any) -> list[int]:
        """Run one request to its end, and return the text with its answer."""
        return super().ask(name, text, max_tokens, options.pop("xargs", CHAT), **options)


@pytest.fixture(params=LOOPS)
def chats(request: pytest.FixtureRequest, probe_model: str) -> Chats:
    return watch(Chats(probe_model, *LOOPS[request.param], 200))


def test_a_next_turn_computes_what_is_new(chats: Chats) -> None:
    text = chats.ask("first", prompt(200))
    kept = chats.usable - chats.pool.get_num_free_blocks()
    assert 0 < kept < 2 * len(text) // BLOCK, "of two layer groups"
    text = chats.ask("second", [*text, *prompt(50, 3)])
    assert chats.hits["second"] == len(text) - 20 - 50 - 1, "but for the last token"
    assert chats.worker.begun["second"][0] != chats.worker.begun["second"][1] > 0
    text = chats.ask("third", [*text, *prompt(30, 5)])
    assert chats.hits["third"] > 250
    assert chats.stats.session_requests == {"nothing_kept": 1, "reused": 2}
    assert chats.stats.session_tokens == chats.hits["second"] + chats.hits["third"]
    assert chats.stats.sessions_kept == 3
    assert chats.stats.uncompressed == {}
    assert chats.scheduler.reset_prefix_cache()
    assert chats.stats.sessions_given_back == {"reset": 1}
    assert chats.pool.get_num_free_blocks() == chats.usable


def test_the_end_of_the_next_prompt_is_compacted_to_its_own_budget(probe_model: str) -> None:
    setting = {**UNEVEN, "budget": {"ratio": 0.25, "floor": 1}, "layer_budget": {}}
    chats = watch(Chats(probe_model, *LOOPS["sync"], 200, setting=setting))
    text = chats.ask("first", prompt(200), 8)
    request = chats.add("second", [*text, *prompt(192, 3)], 8, CHAT)
    while not request.num_output_tokens > 1:
        chats.step()
    held = {m.evicted["second"] for m in chats.scheduler._managers}
    # 400 tokens, of which a quarter stays: 25 full blocks are the region, 100 rounded up to blocks.
    assert held == {400 - 112}
    chats.run()


def test_an_edited_answer_is_no_reason_to_compute_its_prompt_again(chats: Chats) -> None:
    text = chats.ask("first", prompt(200))
    edited = [*text[:210], 999, *prompt(40, 3)]
    chats.ask("second", edited)
    assert chats.hits["second"] == 210
    chats.ask("third", [*prompt(199), 999, *prompt(80, 2)])
    assert chats.hits["third"] % BLOCK == 0, "of the ordinary cache, if any"
    assert chats.stats.session_requests == {"nothing_kept": 1, "reused": 1, "other_tokens": 1}


def test_nothing_is_kept_of_what_was_not_compressed(chats: Chats) -> None:
    text = chats.ask("first", prompt(20), 3)
    chats.ask("second", [*text, *prompt(300)], xargs={**CHAT, "kv_compression": "none"})
    assert chats.pool.get_num_free_blocks() == chats.usable and not chats.stats.sessions_kept
    assert chats.stats.session_requests == {"uncompressed": 2}


def test_an_abort_keeps_nothing(chats: Chats) -> None:
    text = chats.ask("first", prompt(200))
    for number, length in enumerate((1, 300, 330)):
        name = f"second {number}"
        request = chats.add(name, [*text, *prompt(80, 3)], 40, CHAT)
        while request.num_computed_tokens < min(length, 300) or request.num_tokens <= length:
            chats.step()
        chats.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)
        chats.check_blocks()
        chats.scheduler.check_integrity()
        chats.run()
        assert chats.pool.get_num_free_blocks() == chats.usable, "the first took it along"


def test_who_comes_first_takes_it(chats: Chats) -> None:
    text = chats.ask("first", prompt(200))
    for name in "ab":
        chats.add(name, [*text, *prompt(60, ord(name))], 20, CHAT)
    chats.run()
    assert chats.hits["a"] > 200 > chats.hits["b"]
    assert chats.stats.session_requests == {"nothing_kept": 2, "reused": 1}
    assert chats.stats.sessions_given_back == {"replaced": 1}


@pytest.mark.parametrize(
    "options",
    [
        {"xargs": {**CHAT, "kv_budget_tokens": 64}},
        {"xargs": {**CHAT, "kv_pin": [0, 64]}},
    ],
    ids=["budget", "pins"],
)
def test_settings_are_never_mixed(options: dict[str, Any], probe_model: str) -> None:
    chats = watch(Chats(probe_model, *LOOPS["sync"], 200))
    text = chats.ask("first", prompt(200))
    text = chats.ask("second", [*text, *prompt(60, 3)], **options)
    assert chats.stats.session_requests == {"nothing_kept": 1, "other_setting": 1}
    assert chats.hits["second"] <= 192
    chats.ask("third", [*text, *prompt(60, 3)], **options)
    assert chats.stats.session_requests["reused"] == 1, "the second left its own"


@pytest.mark.parametrize(
    "options",
    [{"cache_salt": "other"}, {"lora_request": LoRARequest("adapter", 1, "/nowhere")}],
    ids=["salt", "adapter"],
)
def test_a_name_is_a_name_under_one_salt_and_adapter(
    options: dict[str, Any], probe_model: str
) -> None:
    chats = watch(Chats(probe_model, *LOOPS["sync"], 200))
    text = chats.ask("first", prompt(200))
    other = chats.ask("second", [*text, *prompt(60, 3)], **options)
    assert chats.stats.session_requests == {"nothing_kept": 2}
    assert chats.hits["second"] == 0
    chats.ask("third", [*text, *prompt(60, 4)])
    chats.ask("fourth", [*other, *prompt(60, 4)], **options)
    assert chats.stats.session_requests == {"nothing_kept": 2, "reused": 2}, "nobody took it away"


def test_policies_are_never_mixed(probe_model: str) -> None:
    chats = watch(Chats(probe_model, *LOOPS["sync"], 200))
    text = chats.ask("first", prompt(200))
    chats.scheduler.planner.config = parse_config({**UNEVEN, "preset": "knorm"})
    chats.ask("second", [*text, *prompt(60, 3)])
    assert chats.stats.session_requests == {"nothing_kept": 1, "other_setting": 1}


def test_other_conversations_do_not_help(probe_model: str) -> None:
    chats = watch(Chats(probe_model, *LOOPS["sync"], 200))
    text = chats.ask("first", prompt(200))
    chats.ask("second", [*text, *prompt(60, 3)], xargs={"kv_session": "other"})
    chats.ask("third", [*text, *prompt(60, 3)], xargs=None)
    # Full blocks of the prompts before them, which the prefix cache has whole.
    assert (chats.hits["second"], chats.hits["third"]) == (192, 272)
    assert chats.stats.session_requests == {"nothing_kept": 2}


def test_pins_of_what_was_generated_are_not_promised(probe_model: str) -> None:
    """Pinned is [0, 230) of all prompts: all of a shorter one, and nothing of its answer."""
    setting = {**UNEVEN, "pinned": [[0, 230]], "trigger": "both", "interval": 16}
    chats = watch(Chats(probe_model, *LOOPS["sync"], 200, setting=setting))
    for length, outcome in ((300, "reused"), (220, "other_setting")):
        text = chats.ask(f"first {length}", prompt(length), 60)
        chats.ask(f"second {length}", [*text, *prompt(60, 3)])
        assert chats.stats.session_requests.pop(outcome) == 1


def test_the_longest_unused_goes_first(probe_model: str) -> None:
    """Room for three caches: 2 groups of 3 or 4 blocks each and tails."""
    setting = {**UNEVEN, "layer_budget": {}, "sessions": {"max_blocks_ratio": 0.15}}
    chats = watch(Chats(probe_model, *LOOPS["sync"], 200, setting=setting))
    texts = {}
    for name in "abcd":
        texts[name] = chats.ask(name, prompt(200, ord(name)), 8, xargs={"kv_session": name})
        if name == "c":
            more = [*texts["a"], *prompt(40)]
            texts["a"] = chats.ask("a again", more, 8, xargs={"kv_session": "a"})
    assert chats.hits["a again"] > 200
    assert chats.stats.sessions_given_back == {"limit": 1}
    assert [name for name, *_ in chats.scheduler.reuse.kept._kept] == ["c", "a", "d"]
    big = {**CHAT, "kv_budget_tokens": 300}
    chats.ask("big", prompt(450, 50), 8, xargs=big)
    assert chats.stats.sessions_given_back == {"limit": 1, "too_large": 1}
    assert [name for name, *_ in chats.scheduler.reuse.kept._kept] == ["c", "a", "d"]


def test_what_is_kept_gives_way_before_anybody_waits(probe_model: str) -> None:
    chats = watch(Chats(probe_model, *LOOPS["sync"], 45))
    for name in "ab":
        chats.ask(name, prompt(200, ord(name)), 8, xargs={"kv_session": name})
    assert len(chats.scheduler.reuse.kept._kept) == 2
    big = chats.add("big", prompt(300, 70), 8, None)
    chats.step()
    assert big.status is RequestStatus.RUNNING, "38 blocks, and 44 there are"
    assert not chats.scheduler.reuse.kept._kept
    assert chats.stats.sessions_given_back == {"room": 2}
    chats.run()
    assert not big.num_preemptions


def test_a_turn_that_is_preempted_starts_again_from_nothing(probe_model: str) -> None:
    chats = watch(Chats(probe_model, *LOOPS["async"], 200))
    text = chats.ask("first", prompt(200))
    request = chats.add("second", [*text, *prompt(90, 3)], 30, CHAT)
    while not request.num_output_tokens > 3:
        chats.step()
    chats.scheduler.running.remove(request)
    chats.scheduler._preempt_request(request, 0.0)
    chats.run()
    assert chats.worker.begun["second"] == (0, 0)
    assert chats.stats.session_requests == {"nothing_kept": 1, "reused": 1}
    chats.ask("third", [*request.all_token_ids, *prompt(40, 4)])
    assert chats.stats.session_requests["reused"] == 2


def test_no_room_leaves_everything_as_it_was(probe_model: str) -> None:
    """A waiting turn holds nothing; what it would continue gives way to those that run."""
    chats = watch(Chats(probe_model, *LOOPS["sync"], 45))
    text = chats.ask("first", prompt(200), 8)
    runs = chats.add("runs", prompt(300, 40), 60, {"kv_compression": "none"})
    chats.step()
    waits = chats.add("waits", [*text, *prompt(120, 3)], 8, CHAT)
    for _ in range(3):
        chats.step()
        assert waits.status is RequestStatus.WAITING and runs.status is RequestStatus.RUNNING
        assert not chats.scheduler.planner.requests["waits"].num_reused
    chats.run()
    assert chats.finished >= {"runs", "waits"}


def test_what_is_kept_does_not_stand_in_the_way_of_a_compaction(probe_model: str) -> None:
    """A compaction that gains nothing because its blocks are kept, too, gets them alone."""
    chats = watch(Chats(probe_model, *LOOPS["sync"], 200))
    chats.ask("first", prompt(200), 8)
    kept = chats.scheduler.reuse.kept
    both = kept.held_blocks()[0]
    kept.give_back_sharers([both])
    assert kept.held_blocks(), "nobody else holds it"
    chats.pool.touch([both])
    kept.give_back_sharers([both])
    assert not kept.held_blocks() and both.ref_cnt == 1
    assert chats.stats.sessions_given_back == {"room": 1}


@pytest.mark.parametrize("others", [False, True])
def test_a_turn_that_fits_beside_nothing_starts_from_nothing(
    others: bool, probe_model: str
) -> None:
    """Where others run, what it would continue waits with it: they may end."""
    chats = watch(Chats(probe_model, *LOOPS["sync"], 200))
    text = chats.ask("first", prompt(200), 8)
    if others:
        chats.add("runs", prompt(60, 40), 60, {"kv_compression": "none"})
        chats.step()
    reuse, planner = chats.scheduler.reuse, chats.scheduler.planner
    request = chats.add("second", [*text, *prompt(90, 3)], 8, CHAT)
    before = planner.requests["second"]
    found = reuse.find(request, 0)
    assert found is not None
    found.begin()
    assert (
        planner.requests["second"].num_reused == found.num_tokens and not reuse.kept.held_blocks()
    )
    chats.scheduler.check_integrity()
    found.end(admitted=False)
    assert planner.requests["second"] is before
    assert bool(reuse.kept.held_blocks()) is others
    assert chats.stats.sessions_given_back == ({} if others else {"no_fit": 1})
    chats.check_blocks()
    chats.run()


def test_what_was_hashed_before_a_late_compaction_is_not_written(probe_model: str) -> None:
    """While others hold its prompt it is not compacted, and blocks behind the prompt are hashed."""
    chats = watch(Chats(probe_model, *LOOPS["sync"], 200))
    holder = chats.add("holder", prompt(200), 60, {"kv_compression": "none"})
    while not holder.num_output_tokens:
        chats.step()
    late = chats.add("late", prompt(200), 120, CHAT)
    chats.run()
    text = list(late.all_token_ids)
    hashed = [b for b in chats.scheduler.reuse.kept.held_blocks() if b.block_hash is not None]
    assert hashed and chats.stats.sessions_kept == 1
    inside = 200 + BLOCK + 5  # within a block that is in the prefix cache, too
    chats.ask("edited", [*text[:inside], 999, *prompt(60, 2)])
    # The whole of what is common is in the prefix cache as well, exact: that is taken.
    assert chats.hits["edited"] <= inside
    chats.ask("reader", [*text[:230], *prompt(40, 1)], xargs={"kv_compression": "none"})


def test_the_prefix_cache_is_preferred_where_it_has_as_much(probe_model: str) -> None:
    chats = watch(Chats(probe_model, *LOOPS["sync"], 200))
    text = chats.ask("first", prompt(200))
    request = chats.add("second", [*text, *prompt(90, 3)], 8, CHAT)
    tracked, find = chats.scheduler.planner.requests["second"], chats.scheduler.reuse.find
    found = find(request, 0)
    assert found is not None and found.num_tokens == len(text) - 1
    assert find(request, found.num_tokens) is None
    assert tracked.session_outcome == Outcome.PREFIX_CACHE
    assert find(request, found.num_tokens - 1) is not None
    assert tracked.session_outcome == Outcome.REUSED


@pytest.mark.parametrize(
    ("compacted", "length", "expected"),
    [(200, 220, 208), (200, 209, 208), (200, 205, None), (208, 215, 208)],
)
@pytest.mark.parametrize("is_hashed", [False, True])
def test_a_block_that_others_read_is_not_written(
    is_hashed: bool, compacted: int, length: int, expected: int | None, probe_model: str
) -> None:
    """It goes on from the last whole block, if all that was compacted is before that."""
    chats = watch(Chats(probe_model, *LOOPS["sync"], 200))
    text = chats.ask("first", prompt(compacted), 30)
    ((_, kept),) = chats.scheduler.reuse.kept.of(Kind.SESSION)
    request = chats.add("second", [*text[:length], 999, *prompt(60, 3)], 8, CHAT)
    tracked, find = chats.scheduler.planner.requests["second"], chats.scheduler.reuse.find
    found = find(request, 0)
    assert found is not None and found.num_tokens == length
    # Each group holds what was evicted less, in whole blocks.
    written = kept.blocks[1][-(-(length - kept.held.evicted[1]) // BLOCK) - 1]
    if is_hashed:
        written._block_hash = b"somebody finds it"
    else:
        chats.pool.touch([written])
    found = find(request, 0)
    assert (None if found is None else found.num_tokens) == expected
    outcome = Outcome.SHARED_BLOCK if expected is None else Outcome.REUSED
    assert tracked.session_outcome == outcome


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_turn_without_an_answer_is_kept(kind: str, probe_model: str) -> None:
    """Its first token ends it, in the step that compacts it."""
    chats = watch(Chats(probe_model, *LOOPS[kind], 200))
    tokens, chats._tokens = chats._tokens, lambda name, output: [STOP]  # type: ignore[method-assign]
    text = chats.ask("first", prompt(200))
    chats._tokens = tokens  # type: ignore[method-assign]
    assert len(text) == 201 and chats.stats.sessions_kept == 1
    chats.ask("second", [*text, *prompt(50, 3)])
    assert chats.hits["second"] == 200 and chats.stats.session_requests["reused"] == 1


def test_nothing_is_kept_where_there_is_no_room_for_it(probe_model: str) -> None:
    setting = {**UNEVEN, "sessions": {"max_blocks_ratio": 0}}
    chats = watch(Chats(probe_model, *LOOPS["sync"], 200, setting=setting))
    chats.ask("first", prompt(200))
    assert not chats.stats.sessions_kept and not chats.stats.sessions_given_back


@pytest.mark.parametrize("name", LOOPS)
@pytest.mark.parametrize("setting", [UNEVEN, WINDOW, EVERYWHERE], ids=["plain", "window", "all"])
def test_any_traffic(name: str, setting: dict[str, Any], probe_model: str) -> None:
    """Chats that go on, are edited, aborted, preempted, reset; in too small a pool."""
    rng, count = random.Random(sum(map(ord, name))), 0
    chats = watch(Chats(probe_model, *LOOPS[name], 110, setting=setting))
    texts: dict[str, list[int]] = {}
    live: dict[str, tuple[str, Request]] = {}
    for step in range(800):
        chats.num_steps = 0
        for request_id, (chat, request) in list(live.items()):
            if request.is_finished():
                text = list(request.all_token_ids)
                texts[chat] = text if len(text) < 380 else []
                del live[request_id]
        most = (1, 2, 5)[step // 50 % 3]  # at once: what is kept has room, or none
        if len(live) < most and rng.random() < 0.5:
            chat, count = rng.choice("abcd"), count + 1
            text = texts.get(chat) or prompt(rng.randrange(20, 250), ord(chat))
            text = text[: rng.choice([len(text)] * 6 + [len(text) - 3, len(text) // 2])]
            text = [*text, *prompt(rng.choice([1, 5, 40, 100]), rng.randrange(90))]
            own = {"kv_session": chat}
            xargs = rng.choice([own] * 18 + [None, {**own, "kv_budget_tokens": 80}])
            salt = rng.choice([None] * 19 + ["s"])
            request_id = f"{chat}{count}"
            length = rng.choice(LENGTHS)
            live[request_id] = chat, chats.add(request_id, text, length, xargs, cache_salt=salt)
        if live and rng.random() < 0.02:
            victim = rng.choice(list(live))
            chats.scheduler.finish_requests(victim, RequestStatus.FINISHED_ABORTED)
        if chats.scheduler.running and rng.random() < 0.03:
            preempted = rng.choice(chats.scheduler.running)
            chats.scheduler.running.remove(preempted)
            chats.scheduler._preempt_request(preempted, 0.0)
        if rng.random() < 0.005:
            chats.scheduler.reset_prefix_cache()
        chats.stop_next = rng.random() < 0.1
        chats.step()
    chats.num_steps = 0
    chats.run()
    found = chats.stats.session_requests
    assert found["reused"] > 20 and found["other_tokens"] and found["nothing_kept"], found
    chats.scheduler.reuse.kept.clear()
    assert chats.pool.get_num_free_blocks() == chats.usable
