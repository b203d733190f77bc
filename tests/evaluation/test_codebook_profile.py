"""What a codebook is said to do to a layer, against layers whose answer is known beforehand."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch.nn.functional import kl_div
from transformers import DynamicCache

from lab.random_models import distinct_tokens, write_random_model
from vllm_kvcompress.config.reading import parse_config
from vllm_kvcompress.errors import ConfigError, UnsupportedModelError
from vllm_kvcompress.evaluation.codebook_choice import (
    Limits,
    Recommendation,
    Tried,
    recommend,
    setting_fields,
    shallow_parts,
    shallow_share,
)
from vllm_kvcompress.evaluation.codebook_profile import (
    BookStats,
    Choice,
    CodedPrompt,
    Comparison,
    Fit,
    LayerProfile,
    at_ratio,
    check_rotary,
    measure_layer,
)
from vllm_kvcompress.evaluation.codebook_report import check_row, fit_rows, spindle_rows, tried
from vllm_kvcompress.evaluation.coded_layer import (
    CodedLayer,
    Options,
    Survivors,
    attention_output,
    limit_book,
    relative_errors,
    slots,
)
from vllm_kvcompress.evaluation.replay import Replay
from vllm_kvcompress.kernels.reference.codebook_build import build_codebook
from vllm_kvcompress.kernels.rotary import Rotary
from vllm_kvcompress.lengths.codebook import coded_groups

STILL = Rotary(torch.zeros(8), is_neox=True)
TURNING = Rotary(10.0 ** -torch.arange(8.0), is_neox=True)
DIM = 16
FLOAT32 = {"block_size": 16, "dtype": torch.float32}


def config(**fields: Any) -> Any:
    return parse_config({"preset": "snapkv", "layer_groups": {"size": 1}, **fields})


# --- one layer ----------------------------------------------------------------------------


def axes(directions: list[int], lengths: list[float]) -> torch.Tensor:
    """[1, n, DIM]: vectors along axes."""
    return (torch.eye(DIM)[directions] * torch.tensor(lengths)[:, None])[None]


def three_directions(rotary: Rotary) -> Survivors:
    """64 tokens to code and 3 behind: keys along 3 axes (40, 23 and 1 of them), values along 2."""
    lengths = [0.5, 1.0, 2.0, 4.0] * 16 + [1.0] * 3
    positions = torch.arange(5, 72)[None]
    keys = axes([0] * 40 + [9] * 23 + [3] + [5] * 3, lengths)
    return Survivors(
        keys=rotary.rotate(keys, positions),
        values=axes([1] * 32 + [2] * 32 + [7] * 3, lengths),
        positions=positions,
        num_coded=64,
        rotary=rotary,
    )


def measure(survivors: Survivors, options: Options) -> tuple[BookStats, BookStats, list[Fit]]:
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(2, 4, DIM, generator=generator)
    return measure_layer(CodedLayer(survivors, options), queries, torch.arange(68, 72), 0.25)


@pytest.mark.parametrize("rotary", [STILL, TURNING], ids=["still", "turning"])
def test_directions_are_counted_and_given_back(rotary: Rotary) -> None:
    options = Options(shares=(0.25,), **FLOAT32)  # type: ignore[arg-type]
    keys, values, fits = measure(three_directions(rotary), options)
    assert (keys.entries, keys.num_alone) == ([3], 1)
    assert (values.entries, values.num_alone) == ([2], 0)
    assert [fit.share for fit in fits] == [None, 0.25]
    for fit in fits:  # 16 slots for entries, and a row of 64 bytes holds 8 tokens' codes: 8 of 16
        assert (fit.num_slots, fit.num_entries) == (32, 16)
        assert fit.forced == (0, 0)
        assert max(fit.max_loss) < 1e-6
        assert len(fit.errors) == 4
        if rotary is STILL:
            assert fit.errors == [0, 0, 0, 0]
        else:
            assert max(fit.errors) < 1e-5


def test_a_book_that_is_full_forces_what_is_rare() -> None:
    survivors = three_directions(TURNING)
    options = Options(shares=(), block_size=1, dtype=torch.float32)
    layer = CodedLayer(survivors, options)
    one = layer.limited(1)
    assert [each.num_forced for each in one] == [24, 32]
    assert one[0].cosine[0].tolist() == pytest.approx([1] * 40 + [0] * 24, abs=1e-6)
    restored, values = layer.restored(1)
    # Every key points along the first axis, every coded value along axis 1, lengths unharmed.
    expected = axes([0] * 64, [0.5, 1.0, 2.0, 4.0] * 16)
    expected = TURNING.rotate(expected, survivors.positions[:, :64])
    torch.testing.assert_close(restored[:, :64], expected)
    torch.testing.assert_close(restored[:, 64:], survivors.keys[:, 64:])
    assert values[0, 40].tolist() == [0, 0.5] + [0] * 14


def test_at_threshold_1_nothing_is_lost_but_the_lengths_rounding() -> None:
    generator = torch.Generator().manual_seed(1)
    keys, values = torch.randn(2, 2, 70, DIM, generator=generator)
    kept = Survivors(keys, values, torch.arange(70).expand(2, -1), 64, TURNING)
    options = Options((), 1.0, 1.0, 1, torch.float32)
    layer = CodedLayer(kept, options)
    assert layer.needed_share == 1
    queries, last = torch.randn(4, 3, DIM, generator=generator), torch.arange(67, 70)
    exact = attention_output(queries, last, keys, values, kept.positions, 0.25)
    found = attention_output(queries, last, *layer.restored(64), kept.positions, 0.25)
    assert 0 < max(relative_errors(exact, found)) < 1e-3  # 11 bits
    options = Options((), 1.0, 1.0, **FLOAT32)  # type: ignore[arg-type]
    _, _, fits = measure(three_directions(STILL), options)
    assert fits[0].num_entries == 16 and fits[0].errors == [0] * 4  # float16 holds these lengths


@pytest.mark.parametrize("max_entries", [1, 2, 7, 40, 41, 150])
def test_a_limited_book_is_what_the_worker_would_build(max_entries: int) -> None:
    generator = torch.Generator().manual_seed(2)
    near = torch.randn(2, 40, 1, 6, generator=generator)
    vectors = (near + 0.3 * torch.randn(2, 40, 4, 6, generator=generator)).flatten(1, 2)
    vectors[0, 5] = 0
    count = torch.tensor([160, 160], dtype=torch.int32)
    whole = build_codebook(vectors, count, 0.9, 160)
    found = limit_book(whole, vectors, max_entries)
    expected = build_codebook(vectors, count, 0.9, max_entries)
    assert (max_entries < 150) == (found.num_forced > 0)
    assert found.num_forced == int(expected.num_forced.sum())
    assert found.index.tolist() == expected.index.tolist()
    torch.testing.assert_close(found.cosine, expected.cosine)


def test_attention_is_causal_softmax_attention() -> None:
    generator = torch.Generator().manual_seed(3)
    queries = torch.randn(4, 2, 8, generator=generator)
    keys, values = torch.randn(2, 2, 6, 8, generator=generator)
    positions = torch.tensor([[0, 2, 3, 7, 8, 9], [1, 4, 5, 6, 8, 9]])
    found = attention_output(queries, torch.tensor([8, 9]), keys, values, positions, 0.5)
    for head in range(4):
        for query, seen in enumerate((5, 6)):  # the last token is behind the first query
            own = head // 2
            logits = (keys[own, :seen].double() @ queries[head, query].double()) * 0.5
            weights = logits.exp() / logits.exp().sum()
            expected = (weights[:, None] * values[own, :seen].double()).sum(dim=0)
            torch.testing.assert_close(found[head, query].double(), expected)


def test_relative_errors_are_over_all_heads() -> None:
    exact = torch.tensor([[[3.0, 0.0]], [[0.0, 4.0]]])  # [2 heads, 1 query, 2]
    found = torch.tensor([[[3.0, 0.0]], [[0.0, 1.0]]])
    assert relative_errors(exact, found) == [pytest.approx(0.6)]
    assert relative_errors(exact, exact) == [0]
    assert relative_errors(torch.zeros(1, 1, 2), torch.zeros(1, 1, 2)) == [0]


def test_slots_in_whole_blocks() -> None:
    assert slots(1024, 0.25, 128, 16) == (320, 256)  # 16 tokens' codes per slot: 64 slots
    assert slots(1024, 0.25, 256, 16) == (288, 256)  # 32
    assert slots(1008, 0.25, 128, 16) == (320, 256)  # 252 and 63 are rounded up
    assert slots(32, 0.9, 128, 16) == (32, 0)  # 32 + 16 slots for 32 tokens: not coded


# --- whole prompts ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def replay(tmp_path_factory: pytest.TempPathFactory) -> Replay:
    return Replay(str(write_random_model(tmp_path_factory.mktemp("model"), "llama")), 16)


REPEATED = distinct_tokens(16, seed=4) * 20


def test_tokens_that_are_equal_share_the_first_layers_entries(replay: Replay) -> None:
    """There keys before RoPE and values depend on the token alone."""
    options = Options((0.1,), **FLOAT32)  # type: ignore[arg-type]
    profiles = CodedPrompt(replay, REPEATED, config(), 1, options).profile(3)
    assert [(each.prompt, each.ratio, each.layer) for each in profiles] == [
        (3, 1, layer) for layer in range(4)
    ]
    assert {each.num_coded for each in profiles} == {320}
    first = profiles[0]
    assert (first.keys.entries, first.values.entries) == ([16, 16], [16, 16])
    assert first.keys.num_alone == first.values.num_alone == 0
    assert max(first.fits[0].errors) < 3e-3  # lengths of 11 bits, logits of up to 10
    rows = spindle_rows(profiles)
    assert [(row.layer, row.kind, row.tokens_per_entry) for row in rows[:2]] == [
        (0, "keys", 20),
        (0, "values", 20),
    ]
    assert rows[0].entries_mean == rows[0].entries_max == 16 / 320
    assert all(row.build_seconds_per_1k > 0 for row in rows)


def test_survivors_are_what_the_view_holds(replay: Replay) -> None:
    prompt = replay.prefill(distinct_tokens(250))
    setting = at_ratio(config(observation_window=8), 0.3)
    assert setting is not None and setting.codebook is None
    kept, view = replay.survivors(prompt, setting), replay.view(prompt, setting)
    for layer, positions in enumerate(kept):
        assert positions.shape[1] == view.layers[layer].keys.shape[2] == 90  # 80 and a tail of 10
        for head in range(2):
            assert len(set(positions[head].tolist())) == 90
            for rows, held in (
                (prompt.keys, view.layers[layer].keys),
                (prompt.values, view.layers[layer].values),
            ):
                assert torch.equal(rows[layer][head, positions[head]], held[0, head])
    whole = replay.survivors(prompt, None)
    assert all(each.tolist() == [list(range(250))] * 2 for each in whole)


def test_reading_on_over_coded_layers(replay: Replay) -> None:
    everything = tuple(range(4))
    options = Options((), **FLOAT32)  # type: ignore[arg-type]
    coded = CodedPrompt(replay, REPEATED, config(), 1, options)
    # Layer 0 loses nothing with 32 entries; with a share of 1 no block comes free, and nothing is
    # coded; 16 entries in all other layers are too few for any of them.
    choices = [Choice((0,), 0.1), Choice(everything, 1.0), Choice(everything, 0.05)]
    found = coded.compare(choices, num_tokens=6)
    assert [each.tokens for each in found] == [6, 6, 6]
    assert [each.equal for each in found[:2]] == [6, 6] and found[2].equal < 6
    assert found[1].divergence == 0 <= found[0].divergence < 1e-3 < found[2].divergence


def test_a_comparison_is_of_the_models_own_words(replay: Replay) -> None:
    """Held against tokens decoded one at a time, with transformers' own cache."""
    options = Options((0.3,), **FLOAT32)  # type: ignore[arg-type]
    coded = CodedPrompt(replay, REPEATED, config(), 1, options)
    layers, num_tokens = (0, 1), 5
    entries = [layer.slots(0.3)[1] for layer in coded.layers]
    caches = []
    for is_coded in (False, True):
        cache = DynamicCache(config=replay.model.config)
        for number, layer in enumerate(coded.layers):
            rows = layer.survivors.keys, layer.survivors.values
            if is_coded and number in layers:
                rows = layer.restored(entries[number])
            cache.update(rows[0][None], rows[1][None], number)
        caches.append(cache)
    said, equal, divergence = [coded.prompt.first_token], 0, 0.0
    for step in range(num_tokens):
        position = torch.tensor([[len(REPEATED) + step]])
        both = []
        for cache in caches:
            with torch.inference_mode():
                output = replay.model(
                    torch.tensor([[said[-1]]]), past_key_values=cache, position_ids=position
                )
            both.append(output.logits[0, -1].double().log_softmax(-1))
        said.append(int(both[0].argmax()))
        equal += int(both[0].argmax() == both[1].argmax())
        divergence += float(kl_div(both[1], both[0], log_target=True, reduction="sum"))
    [found] = coded.compare([Choice(layers, 0.3)], num_tokens)
    assert found.equal == equal
    assert found.divergence == pytest.approx(divergence / num_tokens, rel=1e-3, abs=1e-6)
    assert divergence > 1e-5  # the books do lose something


def test_what_cannot_be_profiled_is_refused(replay: Replay) -> None:
    options = Options((), **FLOAT32)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"15 tokens fills no block; .* --block-size \(16\)"):
        CodedPrompt(replay, REPEATED[:15], config(), 1, options)
    with pytest.raises(ConfigError, match="tasks: this setting depends on a request's task"):
        at_ratio(parse_config("windowkv"), 0.5)  # type: ignore[arg-type]
    check_rotary(replay)
    fields = replay.model.config.rope_parameters
    try:
        replay.model.config.rope_parameters = {**fields, "rope_type": "yarn"}
        with pytest.raises(UnsupportedModelError, match="'yarn'.*default and llama3"):
            check_rotary(replay)
    finally:
        replay.model.config.rope_parameters = fields


# --- the rule -----------------------------------------------------------------------------

LIMITS = Limits(agreement=0.9, min_saving=0.25)
PAYS = Tried((0,), 0.5, 0.9, 0.1, slots_before=100, slots_after=75, slots_of_all=200)


@pytest.mark.parametrize(
    ("change", "pays"),
    [
        ({}, True),
        ({"agreement": 0.8999}, False),
        ({"slots_after": 76}, False),
        ({"agreement": 1.0, "slots_after": 1}, True),
        ({"agreement": float("nan")}, False),
    ],
)
def test_a_choice_pays_up_to_its_limits(change: dict[str, float], pays: bool) -> None:
    assert replace(PAYS, **change).pays(LIMITS) is pays  # type: ignore[arg-type]


def test_what_frees_nothing_never_pays() -> None:
    nothing = replace(PAYS, agreement=1.0, slots_after=100)
    assert not nothing.pays(Limits(min_saving=0))


def choice(num_groups: int, share: float, agreement: float) -> Tried:
    """Groups of 100 slots, of which the share of entries stays; three groups in all."""
    before = 100 * num_groups
    after = round(before * share)
    return Tried(tuple(range(num_groups)), share, agreement, 0.1, before, after, 300)


def test_the_choice_that_saves_most_is_recommended() -> None:
    found = recommend([choice(1, 0.2, 0.95), choice(3, 0.2, 0.8), choice(3, 0.5, 0.92)], LIMITS)
    assert found == Recommendation((0, 1, 2), 0.5, 0.5)  # 3 x 50 against 1 x 80
    found = recommend([choice(2, 0.2, 0.95), choice(3, 0.2, 0.8), choice(3, 0.5, 0.92)], LIMITS)
    assert found == Recommendation((0, 1), 0.2, pytest.approx(160 / 300))
    found = recommend([choice(1, 0.25, 1.0), choice(3, 0.75, 1.0)], LIMITS)
    assert found is not None and found.share == 0.75  # 75 of 300 slots each: the larger books
    assert recommend([choice(1, 0.2, 0.89), choice(3, 0.8, 1.0)], LIMITS) is None


@pytest.mark.parametrize("num_groups", [1, 2, 4, 12, 13, 30, 80])
def test_shallow_parts(num_groups: int) -> None:
    parts = shallow_parts(num_groups)
    ends = [len(part) for part in parts]
    assert all(part == tuple(range(len(part))) for part in parts)
    assert ends[0] == 1 and ends[-1] == num_groups and len(ends) <= 13
    gaps = {b - a for a, b in pairwise(ends[1:])}  # the first group alone comes on top
    assert not gaps or max(gaps) - min(gaps) <= 1


def profile(prompt: int, layer: int, errors: list[float], forced: float, slots: int) -> Any:
    needed = Fit(None, 1, 1, (0, 0), (0, 0), (0, 0), [9.0])
    fit = Fit(0.5, slots, 50, (forced, 0), (0.1, 0.2), (0.3, 0.4), errors)
    return LayerProfile(
        prompt, 0.5, layer, 100, BookStats([9], 1, 0.5), BookStats([7], 2, 1.0), [needed, fit]
    )


def test_a_choice_sums_up_layers_and_prompts() -> None:
    profiles = [
        profile(0, 0, [0.1, 0.3], 0.01, 60),
        profile(0, 1, [0.0, 0.0], 0.00, 60),
        profile(0, 2, [0.7, 0.1], 0.00, 60),
        profile(1, 0, [0.1, 0.1], 0.02, 64),
        profile(1, 1, [0.5, 0.1], 0.00, 64),
        profile(1, 2, [0.1, 0.1], 0.04, 64),
    ]
    compared = [Comparison(30, 32, 0.1), Comparison(32, 32, 0.3)]
    found = tried(profiles, [0, 0, 1], (0,), 0.5, compared)
    assert found == Tried((0,), 0.5, 62 / 64, pytest.approx(0.2), 400, 248, 600)
    made = check_row(0.5, [0, 1], found, compared)
    assert (made.layers, made.equal_tokens, made.tokens) == ("0 1", 62, 64)
    assert (made.equal_prompts, made.prompts) == (1, 2)
    assert made.saving == pytest.approx(152 / 600)
    needed, row = [row for row in fit_rows(profiles) if row.layer == 0]
    assert (needed.entries, row.entries, row.slots) == ("needed", 0.5, 0.62)
    assert (row.error_mean, row.error_worst_prompt, row.error_worst_query) == (
        pytest.approx(0.15),
        pytest.approx(0.2),
        0.3,
    )
    assert (row.forced_keys, row.forced_values) == (pytest.approx(0.015), 0)
    assert row.forced_worst_prompt == 0.02


@pytest.mark.parametrize("num_groups", [1, 2, 3, 4, 7, 25, 28, 32, 36, 80])
def test_the_shallow_share_means_what_was_recommended(num_groups: int) -> None:
    for count in range(1, num_groups + 1):
        found = Recommendation(tuple(range(count)), 0.3, 0.1)
        fields = setting_fields(found, num_groups, 0.98, 0.95)
        setting = config(**fields)
        assert coded_groups(setting.codebook, num_groups) == dict.fromkeys(range(count), 0.3)
    assert shallow_share(1, 4) == 0.25
