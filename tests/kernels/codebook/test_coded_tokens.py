"""Coded tokens: books that are full, extended and stored, against plain loops."""

from dataclasses import fields

import numpy as np
import pytest
import torch

from tests import spindlekv_paper as paper
from tests.kernels.paged import DEVICE
from vllm_kvcompress.kernels.codebook.coded_tokens import (
    CodedTokens,
    code_tokens,
    first_directions,
    more_directions,
)
from vllm_kvcompress.kernels.codebook.format import codes_per_row
from vllm_kvcompress.kernels.formulas.rotary import Rotary

DIM = 32
ROTARY = Rotary(10000.0 ** (-torch.arange(0, DIM, 2, device=DEVICE) / DIM), is_neox=True)


def clouds(num_books: int, count: int, num_centers: int, seed: int, spread: float = 0.1):
    """[P, n, D] vectors of any length around a few directions, one random seed for all."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(num_books, num_centers, DIM, generator=torch.Generator().manual_seed(7))
    chosen = torch.randint(num_centers, (num_books, count), generator=generator)
    vectors = centers.gather(1, chosen[..., None].expand(-1, -1, DIM))
    vectors = vectors + spread * torch.randn(vectors.shape, generator=generator)
    lengths = 0.1 + 3 * torch.rand(num_books, count, 1, generator=generator)
    return (vectors * lengths).to(DEVICE)


def extended_by_hand(old, vectors: np.ndarray, theta: float, max_entries: int):
    """One book after more vectors: entries, numbers of the new ones, forced ones' distances."""
    book = paper.Codebook(theta, list(old))
    for vector in vectors:
        book.append(vector)
    waiting = dict(book.waiting)
    book.build()
    entries = book.entries[:max_entries]
    far = []
    for place in waiting:
        if book.index[place] >= max_entries:
            cosines = [float(paper.unit_of(vectors[place]) @ entry) for entry in entries]
            book.index[place] = int(np.argmax(cosines))
            far.append(1 - max(cosines))
    return entries, book.index, far


@pytest.mark.parametrize("room", [0, 2, 5, 40])
def test_a_book_with_little_room_takes_the_covers_first_entries(room: int) -> None:
    theta, first, later = 0.95, clouds(3, 40, 4, seed=0), clouds(3, 30, 14, seed=1)
    old, _ = first_directions(first, theta, 16)
    used = int(old.num_entries.max())
    whole, distance = more_directions(old, later, theta, max(used + room, 16))
    size = max(used + room, 16)
    forced, far, new = 0, 0.0, 0
    for book in range(3):
        count = int(old.num_entries[book])
        entries, index, distances = extended_by_hand(
            old.entries[book, :count].double().cpu().numpy(),
            later[book].double().cpu().numpy(), theta, size,
        )  # fmt: skip
        assert int(whole.num_entries[book]) == len(entries)
        np.testing.assert_allclose(
            whole.entries[book, : len(entries)].cpu(), np.stack(entries), rtol=0, atol=2e-6
        )
        assert not whole.entries[book, len(entries) :].any()
        assert whole.index[book, :40].tolist() == old.index[book].tolist()
        assert whole.index[book, 40:].tolist() == index
        forced, far = forced + len(distances), far + sum(distances)
        new += len(entries) - count
    assert whole.entries.shape == (3, size, DIM)
    torch.testing.assert_close(whole.length[:, 40:], later.norm(dim=2))
    assert distance.num_vectors == 90 and int(distance.num_new) == new
    assert int(distance.num_forced) == forced
    assert float(distance.forced_distance) == pytest.approx(far, abs=1e-4)
    assert (forced > 0) == (room < 40), "the case is what it says"


def test_what_a_first_book_has_no_room_for_is_measured() -> None:
    vectors = clouds(2, 50, 9, seed=3)
    roomy, distance = first_directions(vectors, 0.95, 50)
    assert int(distance.num_forced) == 0 and float(distance.forced_distance) == 0
    tight, distance = first_directions(vectors, 0.95, 4)
    assert tight.num_entries.tolist() == [4, 4] and int(distance.num_new) == 8
    unit = vectors / vectors.norm(dim=2, keepdim=True)
    cosine = (unit * tight.entries.gather(1, tight.index[..., None].expand(-1, -1, DIM))).sum(dim=2)
    far = cosine <= 0.95
    assert int(distance.num_forced) == int(far.sum()) > 0
    assert float(distance.forced_distance) == pytest.approx(
        float((1 - cosine)[far].sum()), rel=1e-4
    )
    assert distance.num_vectors == 100
    assert int(roomy.num_entries.min()) > 4


def test_vectors_of_no_length_are_read_as_zero() -> None:
    vectors = clouds(1, 20, 3, seed=4)
    old, _ = first_directions(vectors, 0.95, 8)
    later = torch.cat([torch.zeros(1, 3, DIM, device=DEVICE), clouds(1, 5, 3, seed=5)], dim=1)
    whole, distance = more_directions(old, later, 0.95, 8)
    assert not whole.read()[:, 20:23].any() and int(distance.num_forced) == 0
    alone, _ = first_directions(later[:, :3], 0.95, 8)
    assert not alone.read().any() and alone.read().isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_come_back_from_their_slots(dtype: torch.dtype) -> None:
    """Two rounds of coding with a stay in slot rows between them, as blocks hold them."""
    sizes = [(45, 0), (31, 45)]
    keys = [clouds(4, n, 6, seed=n, spread=0.02) for n, _ in sizes]
    values = [clouds(4, n, 6, seed=n + 1, spread=0.02) for n, _ in sizes]
    places = [torch.arange(start, start + n, device=DEVICE).expand(4, -1) * 3 for n, start in sizes]
    turned = [ROTARY.rotate(k, p).to(dtype) for k, p in zip(keys, places, strict=True)]
    thresholds, width = (0.98, 0.95), DIM * dtype.itemsize
    coded, _ = code_tokens(turned[0], values[0].to(dtype), places[0], ROTARY, thresholds, 16)
    num_rows = -(-45 // codes_per_row(width)) + 3
    rows = coded.pack(num_rows, width)
    assert rows.shape == (4, num_rows, width) and rows.dtype is torch.int16
    assert not rows[:, num_rows - 3 :].any()
    entries = coded.keys.entries.to(dtype), coded.values.entries.to(dtype)
    loaded = CodedTokens.unpack(entries, coded.num_entries.int(), rows, 45)
    assert loaded.positions.tolist() == coded.positions.tolist()
    for kind in ("keys", "values"):
        before, after = getattr(coded, kind), getattr(loaded, kind)
        assert {f.name for f in fields(before)} == {"entries", "num_entries", "index", "length"}
        assert after.index.tolist() == before.index.tolist()
        assert after.num_entries.tolist() == before.num_entries.tolist()
        torch.testing.assert_close(after.length, before.length, rtol=1e-3, atol=0)  # fp16
    whole, _ = code_tokens(
        turned[1], values[1].to(dtype), places[1], ROTARY, thresholds, 24, loaded
    )
    assert whole.keys.entries.shape == (4, 24, DIM)
    found_keys, found_values = whole.read(ROTARY)
    wanted_keys = torch.cat(turned, dim=1).float()
    wanted_values = torch.cat(values, dim=1)
    cosine = torch.nn.functional.cosine_similarity
    assert cosine(found_keys, wanted_keys, dim=2).min() > 0.975
    assert cosine(found_values, wanted_values, dim=2).min() > 0.945
    tolerance = 2e-3 if dtype is torch.float32 else 2e-2
    torch.testing.assert_close(
        found_keys.norm(dim=2), wanted_keys.norm(dim=2), rtol=tolerance, atol=0
    )


def test_books_do_not_see_each_other() -> None:
    """What one book gets does not depend on those it is made with."""
    first, later = clouds(3, 30, 5, seed=8), clouds(3, 20, 9, seed=9)
    both, _ = more_directions(first_directions(first, 0.95, 12)[0], later, 0.95, 12)
    for book in range(3):
        mine = slice(book, book + 1)
        old, _ = first_directions(first[mine], 0.95, 12)
        alone, _ = more_directions(old, later[mine], 0.95, 12)
        assert both.index[book].tolist() == alone.index[0].tolist()
        torch.testing.assert_close(both.entries[book], alone.entries[0])
