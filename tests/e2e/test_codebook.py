"""Requests with codebooks: what the cache holds, what is answered from it, and what is given back.

One engine serves most tests. Its setting is read when a request comes, so `serving` lets it serve
under others with the same layer groups, which saves a start each.
"""

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from tests.e2e.coded_runs import (
    FULL,
    HEADS,
    INTERVAL,
    LAYERS,
    LOSSLESS,
    LOSSY,
    NGRAM,
    NUM_TOKENS,
    ODD,
    ROOMY,
    Request,
    Run,
    Snapshot,
    add,
    check_vectors,
    count_by_hand,
    every_kind,
    run_all,
    rush,
    snapshot,
)
from tests.e2e.codes_by_hand import cosines, rotated
from tests.e2e.conftest import assert_idle, feature_of, opened, serving
from tests.inside import preempt
from vllm_kvcompress.config.reading import parse_config
from vllm_kvcompress.evaluation.engine import Engine
from vllm_kvcompress.evaluation.replay import Prefilled, Replay
from vllm_kvcompress.evaluation.tasks.needle import make_samples
from vllm_kvcompress.metrics import CODEBOOK_MEASURES
from vllm_kvcompress.plans import BookLengths
from vllm_kvcompress.request_options import parse_request, resolve_request
from vllm_kvcompress.worker.codebook.feature import CodebookFeature

pytestmark = pytest.mark.engine


# --- requests -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prompts(tokenize: Callable[[str], list[int]]) -> list[list[int]]:
    """Ends of prompts that ask for a number."""
    found = [tokenize(each.prompt) for each in make_samples(4, 450, tokenize, seed=11)]
    return [each[-length:] for each, length in zip(found, (FULL, FULL, FULL, ODD), strict=True)]


@pytest.fixture(scope="module")
def requests(prompts) -> dict[str, Request]:
    """All kinds at once."""
    return every_kind(prompts)


@pytest.fixture(scope="module")
def engine(probe_model: str) -> Iterator[Engine]:
    with opened(probe_model, LOSSY) as engine:
        yield engine


@pytest.fixture(scope="module")
def replay(probe_model: str) -> Replay:
    return Replay(probe_model)


@pytest.fixture(scope="module")
def prefilled(replay: Replay, requests) -> dict[str, Prefilled]:
    """What Hugging Face has of every request's prompt."""
    return {name: replay.prefill(prompt) for name, (prompt, _, _) in requests.items()}


@pytest.fixture(scope="module")
def lossy(engine: Engine, requests, probe_model: str) -> Run:
    asked = {name: each for name, each in requests.items() if name != "preset"}
    return run_all(engine, asked, probe_model)


@pytest.fixture(scope="module")
def roomy(engine: Engine, requests, probe_model: str) -> Run:
    with serving(engine, ROOMY):
        asked = {name: requests[name] for name in ("full", "odd", "none", "preset")}
        return run_all(engine, asked, probe_model)


# --- answers ------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "setting"), [("lossy", LOSSY), ("roomy", ROOMY)])
def test_every_kind_in_one_batch_gives_the_replays_tokens(
    kind, setting, requests, replay, prefilled, request
) -> None:
    """Up to the first extension, which a replay refuses."""
    done: Run = request.getfixturevalue(kind)
    until = INTERVAL + 1 if parse_config(setting).extends_codebooks else NUM_TOKENS
    differs = []
    for name, tokens in done.tokens.items():
        _, count, xargs = requests[name]
        config = resolve_request(parse_config(setting), parse_request(xargs))
        coded = config is not None and config.codebook is not None
        told = min(until, count) if coded else count
        assert len(tokens) == count
        assert tokens[:told] == replay.generate(prefilled[name], config, told), name
        differs.append(coded and tokens != replay.generate(prefilled[name], None, count))
    assert any(differs), "a book that changes no answer shows nothing"


@pytest.mark.parametrize("name", ["full", "odd"])
def test_what_is_said_follows_from_what_the_cache_holds(lossy, requests, replay, name) -> None:
    """Hugging Face goes on from the decoded cache, behind the prompt and behind every extension."""
    prompt, count, _ = requests[name]
    tokens, seen = lossy.tokens[name], lossy.snapshots[name]
    assert [each.position - len(prompt) for each in seen] == [0] + [INTERVAL] * (name == "full")
    ends = [each.num_generated for each in seen[1:]] + [count]
    for each, end in zip(seen, ends, strict=True):
        cache = DynamicCache(config=replay.model.config)
        for layer, (keys, values) in enumerate(each.kept):
            cache.update(keys[None], values[None], layer)
        said = tokens[: each.num_generated]
        while len(said) < end:
            said.append(replay.next_token(cache, said[-1], len(prompt) + len(said) - 1))
        assert said == tokens[:end], f"behind {each.position} tokens"


def test_a_book_of_equal_vectors_changes_no_token(engine, prompts, replay, probe_model) -> None:
    """Generated tokens are coded too, over the whole cache; the metrics count distinct tokens."""
    asked: dict[str, Request] = {str(n): (prompts[n], NUM_TOKENS, None) for n in (0, 1)}
    with serving(engine, LOSSLESS):
        done = run_all(engine, asked, probe_model)
    num_distinct = num_coded = 0
    for number in (0, 1):
        tokens = done.tokens[str(number)]
        assert tokens == replay.generate(replay.prefill(prompts[number]), None, NUM_TOKENS)
        first, second = done.snapshots[str(number)]
        assert list(first.books) == list(second.books) == [0], "one layer, and nothing evicted"
        coded = prompts[number] + tokens[:INTERVAL]
        book, found = second.books[0]
        assert np.array_equal(found.positions, np.tile(np.arange(416), (HEADS, 1)))
        # 0.46 * 384 and 0.46 * 416 are 6 blocks of entries; 12 and 13 slots of codes are 1.
        assert (book.num_tokens, book.num_entries, book.num_code_rows) == (416, 192, 32)
        assert first.num_blocks == [6 + 1 + 1, 13, 13, 13]
        assert second.num_blocks == [6 + 1, 13, 13, 13]
        assert done.blocks[str(number)][417] == [6 + 1 + 1, 14, 14, 14]
        num_coded += len(coded)
        num_distinct += len(set(coded))
    for kind in ("key", "value"):
        assert done.codebooks[f"{kind}/vectors"] == HEADS * num_coded
        assert done.codebooks[f"{kind}/entries"] == HEADS * num_distinct
        assert done.codebooks[f"{kind}/forced"] == done.codebooks[f"{kind}/forced_distance"] == 0


# --- the cache ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lossy", "roomy"])
@pytest.mark.parametrize("name", ["full", "odd"])
def test_codes_of_a_prompt_stand_for_its_vectors(
    kind, name, prefilled, probe_model, request
) -> None:
    """Against keys and values that Hugging Face has of the prompt."""
    done: Run = request.getfixturevalue(kind)
    prompt, seen = prefilled[name], done.snapshots[name][0]
    length = len(prompt.token_ids)
    assert list(seen.books) == ([0, 1, 2, 3] if kind == "lossy" else [0, 1, 3])
    num_forced = 0
    for layer, (book, coded) in seen.books.items():
        # 0.6 of 408 (394) are 244 (236), 24 (10) of which are behind the region.
        num_coded = 220 if length == FULL else 226
        assert book.num_tokens == num_coded
        assert (book.num_entries, book.num_code_rows) == (32 if kind == "lossy" else 160, 32)
        for positions in coded.positions:
            assert len(set(positions.tolist())) == num_coded and positions.max() < 384
            forced = {0, 1, 2, 3, *range(length - 16, 384)}
            assert forced <= set(positions.tolist())
        places = torch.from_numpy(coded.positions)[..., None].expand(-1, -1, 64)
        keys = prompt.keys[layer].gather(1, places).double().numpy()
        values = prompt.values[layer].gather(1, places).double().numpy()
        bare = rotated(keys, -coded.positions, probe_model)
        num_forced += check_vectors(coded.keys, bare, book.num_entries, 0.98)
        num_forced += check_vectors(coded.values, values, book.num_entries, 0.95)
        # Behind the region nothing is coded.
        for kept, whole in zip(seen.kept[layer], (prompt.keys, prompt.values), strict=True):
            torch.testing.assert_close(
                kept[:, num_coded:], whole[layer][:, 384:], rtol=1e-4, atol=1e-4
            )
    assert (num_forced > 0) == (kind == "lossy"), "with room, all are similar to their entries"


def test_an_extension_keeps_old_codes_and_adds_the_full_blocks(lossy, probe_model) -> None:
    first, second = lossy.snapshots["full"]
    assert list(second.books) == [0, 1, 2, 3]
    for layer, (book, coded) in second.books.items():
        _, before = first.books[layer]
        assert book == BookLengths(220 + 32, 32, 32), "25.2 entries and 8 slots of codes"
        assert np.array_equal(coded.positions[:, :220], before.positions)
        assert np.array_equal(coded.positions[:, 220:], np.tile(np.arange(384, 416), (HEADS, 1)))
        for old, new in ((before.keys, coded.keys), (before.values, coded.values)):
            assert np.array_equal(new.index[:, :220], old.index)
            assert np.array_equal(new.length[:, :220], old.length)
            used = old.index.max() + 1
            assert np.array_equal(new.entries[:, :used], old.entries[:, :used])
        true = [each.double().numpy() for each in second.added[layer]]
        assert true[0].shape == true[1].shape == (HEADS, 32, 64)
        now = coded.keys.read()[:, 220:], coded.values.read()[:, 220:]
        true[0] = rotated(true[0], -coded.positions[:, 220:], probe_model)
        for new, vectors, book_of, theta in zip(
            now, true, (coded.keys, coded.values), (0.98, 0.95), strict=True
        ):
            lengths = np.linalg.norm(vectors, axis=-1)
            np.testing.assert_allclose(np.linalg.norm(new, axis=-1), lengths, rtol=2**-11 + 1e-5)
            every = np.einsum("hnd,hed->hne", vectors, book_of.entries) / lengths[..., None]
            own = cosines(new, vectors)
            assert ((own > theta - 1e-5) | (own > every.max(axis=2) - 1e-5)).all()


def test_blocks_held_are_exactly_the_books_and_the_tails(lossy, roomy) -> None:
    """Blocks in each group once so many tokens' keys are computed, by hand."""
    # Two blocks of book, then the tail: 24 tokens and more; at 416 it is coded with the rest.
    full, last = lossy.blocks["full"], FULL + NUM_TOKENS - 1
    for computed in range(FULL + 1, last):
        assert full[computed] == [2 + 1] * LAYERS, computed
    assert lossy.snapshots["full"][1].num_blocks == [2] * LAYERS
    # From 394 on, 8 more are 18 behind the region: no block, so nothing is done.
    for computed in range(ODD + 1, ODD + NUM_TOKENS - 1):
        assert lossy.blocks["odd"][computed] == [2 + 1] * LAYERS, computed
    # 160 entries and 32 slots of codes; 224 tokens where there is no book.
    for computed in range(FULL + 1, last):
        more = 1 if computed <= 416 else 2
        assert roomy.blocks["full"][computed] == [6 + more, 6 + more, 7 + more, 6 + more]


def test_metrics_count_what_the_cache_shows(lossy, roomy, prefilled, probe_model) -> None:
    """All books of a run: vectors, entries, vectors below the threshold, and their distances.

    Books are decoded as they are at the end: what is coded once stays.
    """
    for done in (lossy, roomy):
        counted, unsure = count_by_hand(done, prefilled, probe_model)
        for kind, count in unsure.items():
            found = {what: done.codebooks[f"{kind}/{what}"] for what in CODEBOOK_MEASURES}
            by_hand = {what: counted[f"{kind}/{what}"] for what in CODEBOOK_MEASURES}
            assert count < 5 and abs(found["forced"] - by_hand["forced"]) <= count
            assert (found["vectors"], found["entries"]) == (by_hand["vectors"], by_hand["entries"])
            distance = pytest.approx(by_hand["forced_distance"], rel=1e-3, abs=0.05 * count + 1e-3)
            assert found["forced_distance"] == distance
        assert (done.codebooks["key/forced"] > 100) == (done is lossy)


# --- lives of requests --------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["prompt", "extension"])
def test_an_abort_between_plan_and_commit_returns_every_block(engine, prompts, stage) -> None:
    engine.add("victim", prompts[0], NUM_TOKENS, ignore_eos=True)
    planned = 0
    while planned < (1 if stage == "prompt" else 2):
        engine.step()
        victim = engine.live()["victim"]
        planned += engine.scheduler.compactions.is_planned(victim.request_id)
    books = feature_of(engine, CodebookFeature).books
    assert books._sizes.np.any(), "the worker has written the book"
    engine.abort("victim")
    engine.scheduler.check_integrity()
    engine.step()
    assert_idle(engine)


def test_a_request_that_ends_with_its_prompt_leaves_nothing_behind(engine, prompts) -> None:
    before = engine.scheduler.stats.uncompressed.get("short_output", 0)
    engine.generate([prompts[0]], 1)
    assert engine.scheduler.stats.uncompressed["short_output"] == before + 1
    assert_idle(engine)


def test_the_prefix_cache_holds_the_prompt_and_no_codes(engine, lossy, prompts) -> None:
    """Whoever comes after a coded request finds its prompt's blocks as they were."""
    assert engine.scheduler.reset_prefix_cache()
    tokens = lossy.tokens["full"]
    longer = prompts[0] + tokens
    engine.add("first", prompts[0], NUM_TOKENS, ignore_eos=True)
    engine.drain()
    none = {"kv_compression": "none"}
    add(engine, {"again": (prompts[0], 8, None)})
    engine.drain()
    add(engine, {"whole": (prompts[0], 8, none), "longer": (longer, 4, none)})
    engine.drain()
    cached = {name: engine.results[name].num_cached_tokens for name in ("again", "whole", "longer")}
    # A coded prompt computes its observation window anew; the 13th block was filled after coding.
    assert cached == {"again": 384, "whole": 384, "longer": 384}
    assert engine.results["first"].token_ids == tokens
    assert engine.results["again"].token_ids == tokens[:8]
    whole = engine.results["whole"].token_ids
    assert engine.scheduler.reset_prefix_cache()
    assert engine.generate([prompts[0]], 8, none, ignore_eos=True) == [whole]
    assert engine.scheduler.reset_prefix_cache()
    add(engine, {"fresh": (longer, 4, none)})
    engine.drain()
    assert engine.results["fresh"].token_ids == engine.results["longer"].token_ids
    assert_idle(engine)


def test_a_preempted_request_is_coded_again_and_says_the_same(
    engine, lossy, prompts, probe_model
) -> None:
    """First behind an extension that found the pool dry, and happened in place; then again.

    It comes back with its prompt and what it has said, several query tokens over a fresh book.
    """
    stats, tokens = engine.scheduler.stats, lossy.tokens["full"]
    deferrals, preemptions = stats.deferrals, engine.num_preemptions
    compactions = sum(stats.compactions.values())
    engine.add("full", prompts[0], NUM_TOKENS, ignore_eos=True)
    result = engine.results["full"]
    while len(result.token_ids) < 4:
        engine.step()
    taken = engine.pool.get_new_blocks(engine.pool.get_num_free_blocks())
    while len(result.token_ids) < INTERVAL + 2:
        engine.step()
        engine.scheduler.check_integrity()
    assert stats.deferrals == deferrals
    assert sum(stats.compactions.values()) == compactions + 2
    assert result.token_ids == tokens[: INTERVAL + 2]
    preempt(engine, engine.live()["full"])
    engine.step()
    engine.pool.free_blocks(taken)
    books = feature_of(engine, CodebookFeature).books
    assert not books._sizes.np.any(), "its row starts over"
    seen: list[Snapshot] = []
    while len(result.token_ids) < 12:
        engine.step()
        engine.scheduler.check_integrity()
        request = engine.live()["full"]
        if engine.scheduler.compactions.is_planned(request.request_id):
            seen.append(snapshot(engine, "full", probe_model))
    assert [each.position for each in seen] == [FULL, FULL + INTERVAL], "where it was before"
    # What it had said went through the model at once, each token seeing those before it.
    for layer, before in lossy.snapshots["full"][1].added.items():
        for kept, expected in zip(seen[1].added[layer], before, strict=True):
            torch.testing.assert_close(kept, expected, rtol=1e-4, atol=1e-4)
    preempt(engine, request)
    engine.drain()
    assert engine.num_preemptions == preemptions + 2
    assert result.token_ids == tokens
    assert_idle(engine)


# --- other schedulings --------------------------------------------------------------------


def test_async_scheduling_in_chunks_gives_the_same_tokens(
    probe_model, lossy, prompts, requests
) -> None:
    with opened(probe_model, LOSSY, async_scheduling=True, max_num_batched_tokens=192) as engine:
        assert engine.core.batch_queue is not None, "steps really overlap"
        asked = {name: requests[name] for name in lossy.tokens}
        add(engine, asked)
        while engine.engine.has_unfinished_requests():
            engine.step()
            engine.scheduler.check_integrity()
        found = {name: engine.results[name].token_ids for name in asked}
        assert found == lossy.tokens
        assert engine.scheduler.stats.codebooks == pytest.approx(lossy.codebooks)
        assert_idle(engine)
        ends = engine.generate([requests["full"][0]], INTERVAL + 1, ignore_eos=True)
        assert ends == [lossy.tokens["full"][: INTERVAL + 1]], "it ends with its extension"
        rush(engine, prompts)


def test_ngram_drafts_over_codes_give_the_same_tokens(probe_model, lossy, requests) -> None:
    """Several query tokens per step over a book."""
    with opened(probe_model, LOSSY, speculative_config=NGRAM) as engine:
        asked = {name: requests[name] for name in ("full", "odd", "none")}
        add(engine, asked)
        said, accepted = {"full": 1, "odd": 1}, 0
        while engine.engine.has_unfinished_requests():
            engine.step()
            engine.scheduler.check_integrity()
            for name, before in said.items():
                said[name] = len(engine.results[name].token_ids)
                accepted += max(said[name] - before - 1, 0)
        assert all(engine.results[name].token_ids == lossy.tokens[name] for name in asked)
        ends = engine.generate([requests["full"][0]], INTERVAL + 1, ignore_eos=True)
        assert ends == [lossy.tokens["full"][: INTERVAL + 1]]
        assert accepted > 0, "no draft over a book was right; the test shows little"
        assert_idle(engine)
