"""Codebook kernels against SpindleKV's paper (`tests/spindlekv_paper.py`), from keys as a cache has
them to outputs, and what must hold of both for any vectors.

`test_build.py` and `test_attention.py` test either kernel's edges.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import spindlekv_paper as paper
from tests.kernels.codebook.test_attention import frequencies, make_queries, random_book
from tests.kernels.codebook.test_build import clustered
from tests.kernels.paged import DEVICE, fill
from vllm_kvcompress.kernels import torch_backend as attention_torch
from vllm_kvcompress.kernels import torch_backend as build_torch
from vllm_kvcompress.kernels.codebook import attention as attention_kernel
from vllm_kvcompress.kernels.codebook import build as build_kernel
from vllm_kvcompress.kernels.codebook.coded_tokens import first_directions, more_directions
from vllm_kvcompress.kernels.codebook.packing import pack_codes
from vllm_kvcompress.kernels.formulas.rotary import Rotary

BUILDS = pytest.mark.parametrize("module", [build_kernel, build_torch], ids=["triton", "torch"])
DIM = 32
ROTARY = Rotary(frequencies(DIM), is_neox=True)
FREQ = frequencies(DIM).cpu().numpy()


def positions_of(count: int, seed: int = 0) -> torch.Tensor:
    """Ascending places in a long prompt, as eviction leaves them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(8000, generator=generator)[:count].sort().values.to(DEVICE)


def build(module, vectors: torch.Tensor, theta: float, max_entries: int | None = None):
    """Books [P, n, D] over all n vectors, with room for all unless said otherwise."""
    counts = torch.full((len(vectors),), vectors.shape[1], dtype=torch.int32, device=DEVICE)
    return module.build_codebook(vectors, counts, theta, max_entries or vectors.shape[1])


def check_book(book, problem: int, vectors: torch.Tensor, expected: paper.Codebook) -> None:
    """The same entries in the same order, the same entry and length for every vector."""
    count = int(book.num_entries[problem])
    places = book.entries[problem, :count].tolist()
    assert len(expected.entries) == count
    for place, entry in zip(places, expected.entries, strict=True):
        unit = paper.unit_of(vectors[place].double().cpu().numpy())
        np.testing.assert_allclose(unit, entry, rtol=0, atol=2e-6)
    assert book.index[problem].tolist() == expected.index
    np.testing.assert_allclose(book.magnitude[problem].cpu(), expected.magnitude, rtol=2e-6)
    assert book.num_forced[problem] == 0


# --- the build --------------------------------------------------------------------------------


@BUILDS
@pytest.mark.parametrize(("theta", "noise"), [(paper.THETA_K, 0.15), (paper.THETA_V, 0.24)])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_papers_books_of_cached_keys(module, theta: float, noise: float, seed: int) -> None:
    """Both take keys after RoPE and turn them back; two KV heads."""
    exact = clustered([48, 48], DIM, 5, noise, seed=seed, threshold=theta)
    positions = positions_of(48, seed)
    cached = ROTARY.rotate(exact, positions)
    book = build(module, ROTARY.rotate(cached, -positions), theta)
    for head in range(2):
        keys = [
            paper.rope(key, position, FREQ, sign=-1)
            for key, position in zip(cached[head].cpu().numpy(), positions.tolist(), strict=True)
        ]
        check_book(book, head, exact[head], paper.Codebook.of(keys, theta))
        assert 5 < int(book.num_entries[head]) < 48, "neither trivial case"


@BUILDS
def test_rope_hides_the_likeness_that_the_book_lives_on(module) -> None:
    """Keys of one direction are one entry; turned to their positions they are many."""
    direction = torch.randn(DIM, generator=torch.Generator().manual_seed(0))
    lengths = torch.arange(1.0, 25.0)
    keys = (direction * lengths[:, None])[None].to(DEVICE)
    assert build(module, keys, 0.98).num_entries.tolist() == [1]
    turned = ROTARY.rotate(keys, positions_of(24))
    assert int(build(module, turned, 0.98).num_entries[0]) > 12


@BUILDS
def test_copies_for_query_heads_share_entries(module) -> None:
    """Three query heads keep different tokens of one KV head; copies cost codes, not entries."""
    exact = clustered([40], DIM, 5, 0.13, threshold=paper.THETA_K)
    positions = positions_of(40)
    cached = ROTARY.rotate(exact, positions)
    keys = np.zeros((8000, DIM))
    keys[positions.cpu()] = cached[0].cpu().numpy()
    rng = np.random.default_rng(0)
    slots = [np.sort(rng.permutation(40)[:28]) for _ in range(3)]
    kept = [positions.cpu()[chosen].tolist() for chosen in slots]
    group = paper.compress(keys, keys, kept, FREQ, repeat=True, theta_v=paper.THETA_K)
    places = torch.from_numpy(np.concatenate(slots)).to(DEVICE)
    book = build(module, exact[:, places], paper.THETA_K)
    check_book(book, 0, exact[0, places], group.books["K"])
    union = sorted(set(np.concatenate(slots).tolist()))
    distinct = paper.Codebook.of(exact[0, union].double().cpu().numpy(), paper.THETA_K)
    copies = group.books["K"]
    assert len(copies.index) == 84 > len(distinct.index)
    assert len(copies.entries) <= len(union)
    for head, positions_kept in enumerate(kept):
        for position in positions_kept:
            others = [other for other in range(3) if position in kept[other]]
            numbers = {copies.index[group.place[other, position]] for other in others}
            assert len(numbers) == 1 and head in others


# --- attention --------------------------------------------------------------------------------


@pytest.mark.parametrize("module", [attention_kernel, attention_torch], ids=["triton", "torch"])
@pytest.mark.parametrize("thetas", [(paper.THETA_K, paper.THETA_V), (0.8, 0.7)])
def test_attention_over_codes_is_attention_over_what_the_paper_gives_back(module, thetas) -> None:
    """Cached keys and values, through books and packed codes to outputs; lossy, two KV heads of
    four query heads, survivors of an eviction."""
    count = 30
    pre_rope = clustered([count] * 2, DIM, 6, 0.13, seed=5, threshold=thetas[0])
    values = clustered([count] * 2, DIM, 7, 0.2, seed=6, threshold=thetas[1])
    positions = positions_of(count)
    cached = ROTARY.rotate(pre_rope, positions)
    books = [
        build(build_torch, vectors.contiguous(), theta)
        for vectors, theta in zip((ROTARY.rotate(cached, -positions), values), thetas, strict=True)
    ]
    num_entries = int(torch.stack([book.num_entries for book in books]).max())
    assert num_entries < count, "lossy"

    pages, _ = random_book([count], 2, DIM, num_entries=(num_entries,))
    sides = zip((pages.entries.keys, pages.entries.values), books, (pre_rope, values), strict=True)
    for side, book, vectors in sides:
        at = book.entries[:, :num_entries].clamp(min=0).long()[..., None].expand(-1, -1, DIM)
        units = torch.nn.functional.normalize(vectors, dim=2).gather(1, at)
        fill(side, pages.entries.block_table[0].tolist(), units)
    rows = pack_codes(
        books[0].index, books[1].index, books[0].magnitude, books[1].magnitude,
        positions.expand(2, count), pages.codes.shape[3],
    )  # fmt: skip
    fill(pages.codes, pages.code_table[0].tolist(), rows)
    queries = make_queries(1, 8, DIM)
    out, _ = module.codebook_attention(queries, pages, ROTARY.inv_freq, True, 0.2)

    everyone = positions.tolist()
    for head in range(2):
        keys, exact_values = np.zeros((8000, DIM)), np.zeros((8000, DIM))
        keys[everyone], exact_values[everyone] = cached[head].cpu(), values[head].cpu()
        group = paper.compress(keys, exact_values, [everyone] * 4, FREQ, False, *thetas)
        for book in group.books.values():  # codes hold lengths as float16
            book.magnitude = [float(np.float16(length)) for length in book.magnitude]
        for each in range(4):
            query = queries[0, 4 * head + each].double().cpu().numpy()
            expected = group.attend(each, query, 0.2)
            found = out[0, 4 * head + each].double().cpu().numpy()
            np.testing.assert_allclose(found, expected, rtol=2e-5, atol=5e-5)
            plain = paper.attend(query, list(keys[everyone]), list(exact_values[everyone]), 0.2)
            assert abs(expected - plain).max() > 1e-2, "what is lost is more than rounding"


# --- for any vectors --------------------------------------------------------------------------


def unit(rng: np.random.Generator) -> np.ndarray:
    vector = rng.normal(size=DIM)
    return vector / np.linalg.norm(vector)


@st.composite
def clouds(draw) -> np.ndarray:
    """[n, D] vectors near some directions, of lengths over four powers of ten."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    count, num_centres = draw(st.integers(1, 24)), draw(st.integers(1, 6))
    noise = draw(st.sampled_from([0.0, 0.02, 0.1, 0.5]))
    centres = [unit(rng) for _ in range(num_centres)]
    rows = [centres[rng.integers(num_centres)] + noise * unit(rng) for _ in range(count)]
    return np.array(rows) * 10 ** rng.uniform(-2, 2, size=(count, 1))


MANY = settings(max_examples=60, deadline=None)
THETAS = st.sampled_from([0.5, 0.9, 0.95, 0.98, 0.999])


def given_back(vectors: np.ndarray, theta: float, max_entries: int | None = None) -> np.ndarray:
    """What the torch version's book gives back, with directions in float64."""
    book = build(
        build_torch, torch.from_numpy(vectors).float()[None].to(DEVICE), theta, max_entries
    )
    members = book.entries[0].long()[book.index[0].long()].cpu().numpy()
    units = vectors[members] / np.linalg.norm(vectors[members], axis=1, keepdims=True)
    return units * book.magnitude[0].double().cpu().numpy()[:, None]


@MANY
@given(clouds())
def test_theta_one_is_exact_up_to_rounding(vectors: np.ndarray) -> None:
    vectors = vectors.astype(np.float32).astype(np.float64)
    found = given_back(vectors, 1.0)
    np.testing.assert_allclose(found, vectors, rtol=1e-5, atol=1e-5 * abs(vectors).max())
    book = paper.Codebook.of(vectors, 1.0)
    for place, vector in enumerate(vectors):
        np.testing.assert_allclose(book.reconstruct(place), vector, rtol=1e-12, atol=1e-12)


@MANY
@given(clouds(), THETAS, st.integers(1, 24))
def test_lengths_are_restored(vectors: np.ndarray, theta: float, max_entries: int) -> None:
    """Of vectors that a full book forced upon an entry, too."""
    lengths = np.linalg.norm(vectors, axis=1)
    for room in (None, max_entries):
        found = np.linalg.norm(given_back(vectors, theta, room), axis=1)
        np.testing.assert_allclose(found, lengths, rtol=1e-5)
    book = paper.Codebook.of(vectors, theta)
    found = [paper.length_of(book.reconstruct(place)) for place in range(len(vectors))]
    np.testing.assert_allclose(found, lengths, rtol=1e-12)


@MANY
@given(
    clouds(),
    THETAS,
    st.lists(st.tuples(st.integers(0, 23), st.integers(-3, 3)), min_size=1, max_size=10),
)
def test_equal_vectors_and_positive_multiples_share_an_entry(vectors, theta, copies) -> None:
    """Powers of two leave directions as they are, to the last bit."""
    originals = [place % len(vectors) for place, _ in copies]
    scaled = [vectors[i] * 2.0**power for i, (_, power) in zip(originals, copies, strict=True)]
    together = np.concatenate([vectors, scaled])
    index = build(build_torch, torch.from_numpy(together).float()[None].to(DEVICE), theta).index[0]
    book = paper.Codebook.of(together, theta)
    for numbers in (index.tolist(), book.index):
        for copy, original in enumerate(originals, start=len(vectors)):
            assert numbers[copy] == numbers[original]


@MANY
@given(clouds(), THETAS)
def test_no_vector_is_further_from_its_entry_than_theta(vectors: np.ndarray, theta: float) -> None:
    book = build(build_torch, torch.from_numpy(vectors).float()[None].to(DEVICE), theta)
    assert (book.cosine[0] > theta - 1e-6).all()
    expected = paper.Codebook.of(vectors, theta)
    for place, vector in enumerate(vectors):
        entry = expected.entries[expected.index[place]]
        cosine = float(paper.unit_of(vector) @ entry)
        assert cosine > theta or np.array_equal(paper.unit_of(vector), entry)


@MANY
@given(clouds(), THETAS, st.integers(1, 4))
def test_as_many_copies_of_everything_need_no_more_entries(vectors, theta, h_n: int) -> None:
    """GQA's repetition, where all query heads keep the same: the same entries in the same order."""
    alone = paper.Codebook.of(vectors, theta)
    copies = paper.Codebook.of(np.concatenate([vectors] * h_n), theta)
    assert copies.index == alone.index * h_n
    assert all(map(np.array_equal, copies.entries, alone.entries))


# --- the paper's decode step, and bytes -------------------------------------------------------


@MANY
@given(clouds(), clouds(), THETAS, st.integers(1, 9))
def test_decoding_matches_waits_and_builds(prompt, generated, theta: float, every: int) -> None:
    book = paper.Codebook.of(prompt, theta)
    for step, vector in enumerate(generated, start=1):
        before = len(book.entries)
        book.append(vector)
        assert len(book.entries) == before, "a match adds no entry, and what waits none yet"
        cosines = [float(paper.unit_of(vector) @ entry) for entry in book.entries]
        place = len(prompt) + step - 1
        assert (place in book.waiting) == (max(cosines) <= theta)
        if place in book.waiting:
            np.testing.assert_array_equal(book.reconstruct(place), vector)
        if step % every == 0:
            waited = set(book.waiting)
            book.build()
            assert not book.waiting
            assert all(book.index[each] >= before for each in waited), "new entries alone"
    book.build()
    assert book.index[: len(prompt)] == paper.Codebook.of(prompt, theta).index, "old codes stay"
    for place, vector in enumerate([*prompt, *generated]):
        entry = book.entries[book.index[place]]
        cosine = float(paper.unit_of(vector) @ entry)
        assert cosine > theta or np.array_equal(paper.unit_of(vector), entry)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_later_tokens_are_coded_as_the_paper_decodes(seed: int) -> None:
    """Three lots of tokens after the prompt's, a build after each; two KV heads."""
    vectors = clustered([50, 50], DIM, 9, 0.15, seed=seed, threshold=paper.THETA_K)
    exact = vectors.double().cpu().numpy()
    found, _ = first_directions(vectors[:, :20], paper.THETA_K, 50)
    books = [paper.Codebook.of(head[:20], paper.THETA_K) for head in exact]
    matched = 0
    for start, end in ((20, 33), (33, 34), (34, 50)):
        found, distance = more_directions(found, vectors[:, start:end], paper.THETA_K, 50)
        for head, book in enumerate(books):
            for vector in exact[head, start:end]:
                book.append(vector)
            matched += end - start - len(book.waiting)
            book.build()
            count = int(found.num_entries[head])
            assert count == len(book.entries)
            np.testing.assert_allclose(
                found.entries[head, :count].cpu(), np.array(book.entries), rtol=0, atol=2e-6
            )
            assert found.index[head].tolist() == book.index
            np.testing.assert_allclose(found.length[head].cpu(), book.magnitude, rtol=2e-6)
        assert distance.num_forced == 0
    assert 10 < matched < 50, "neither trivial case"


@pytest.mark.parametrize("repeat", [False, True])
def test_a_generated_token_is_attended_to_at_once(repeat: bool) -> None:
    rng = np.random.default_rng(0)
    keys, values = rng.normal(size=(2, 20, DIM))
    kept = [[0, 3, 5, 19], [0, 4, 5, 19]] if repeat else [[0, 3, 5, 19]] * 2
    group = paper.compress(keys, values, [list(each) for each in kept], FREQ, repeat, 1.0, 1.0)
    key, value, query = rng.normal(size=(3, DIM))
    group.append(key, value, 20)
    assert len(group.books["K"].index) == (10 if repeat else 5)
    keys, values = np.vstack([keys, key]), np.vstack([values, value])
    for built in (False, True):
        for head in range(2):
            at = [*kept[head], 20]
            expected = paper.attend(query, list(keys[at]), list(values[at]), 0.2)
            np.testing.assert_allclose(group.attend(head, query, 0.2), expected, atol=1e-6)
        for book in group.books.values():
            assert bool(book.waiting) is not built
            book.build()


def test_honest_bytes_by_hand() -> None:
    """Six bytes of int32 and float16 are 2.3 % of a vector of 128 float16; unfolded four times."""
    direction = unit(np.random.default_rng(1))
    keys = np.array([paper.rope(direction * (a + 1.0), a, FREQ) for a in range(10)])
    values = np.outer(np.arange(1.0, 11.0), direction)
    for repeat, stored in ((False, 10), (True, 40)):
        group = paper.compress(keys, values, [list(range(10))] * 4, FREQ, repeat)
        assert [len(book.entries) for book in group.books.values()] == [1, 1]
        found = paper.honest_bytes(group, d_h=128, b_pos=0)
        assert found == 2 * (256 + stored * 6)
        assert math.isclose(stored * 6 / (10 * 256), 0.0234 * stored / 10, rel_tol=2e-3)
        # Codes in the cache's rows: entry numbers of 16 bits and a position of 32.
        found = paper.honest_bytes(group, d_h=128, b_idx=2, b_mag=2, b_pos=4)
        assert found == 2 * 256 + stored * 12
    group.append(keys[0] * -1.0, values[0], 10)
    assert paper.honest_bytes(group, 128, b_pos=0) == 2 * (256 + 44 * 6) + 4 * 256, "K waits"
