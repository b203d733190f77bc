"""Codebooks of similar vectors: the kernels and their torch version against the paper's loop."""

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from tests.kernels.paged import DEVICE, nan_empty
from vllm_kvcompress.kernels import torch_backend as torch_version
from vllm_kvcompress.kernels.codebook import build as kernel

VERSIONS = pytest.mark.parametrize("module", [kernel, torch_version], ids=["triton", "torch"])
MARGIN = 1e-5  # between any cosine and the threshold, so that rounding decides nothing


@pytest.fixture(autouse=True)
def _poison(monkeypatch) -> None:
    nan_empty(monkeypatch)


def clustered(
    counts, head_dim=32, num_centres=6, noise=0.1, dtype=torch.float32, seed=0, threshold=0.95
):
    """Vectors [P, n, D] around some directions, of very different lengths, NaN behind counts.

    Those whose cosine to another is too near the threshold are drawn again.
    """
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.full((len(counts), max(counts), head_dim), float("nan"), dtype=dtype)
    for problem, count in enumerate(counts):
        centres = torch.randn(num_centres, head_dim, generator=generator)
        near = torch.ones(count, dtype=torch.bool)
        while near.any():
            which = torch.randint(num_centres, (count,), generator=generator)
            spread = torch.randn(count, head_dim, generator=generator) * noise
            length = torch.rand(count, 1, generator=generator) * 10 + 0.01
            drawn = ((centres[which] + spread) * length).to(dtype)
            vectors[problem, :count][near] = drawn[near]
            unit = normalize(vectors[problem, :count].double(), dim=1)
            near = ((unit @ unit.T - threshold).abs() < 2 * MARGIN).any(dim=1) & (threshold < 1)
    return vectors.to(DEVICE)


def paper(vectors: np.ndarray, threshold: float, max_entries: int) -> dict:
    """The published algorithm for one problem in float64, one vector after the other."""
    count = len(vectors)
    lengths = np.sqrt((vectors * vectors).sum(1, keepdims=True))
    unit = np.divide(vectors, lengths, out=np.zeros_like(vectors), where=lengths > 0)
    cosines = np.array([[float(a @ b) for b in unit] for a in unit]).reshape(count, count)
    graph = np.zeros((count, count), dtype=bool)
    for i in range(count):
        same = (vectors == vectors[i]).all(1)
        assert (same | (abs(cosines[i] - threshold) > MARGIN)).all(), "choose other vectors"
        graph[i] = same | (cosines[i] > threshold)
    entries: list[int] = []
    index = np.full(count, -1)
    while graph.any() and len(entries) < max_entries:
        entry = int(graph.sum(1).argmax())  # the first of the largest
        for j in np.flatnonzero(graph[entry]):
            index[j] = len(entries)
            graph[j, :] = graph[:, j] = False
        entries.append(entry)
    left = np.flatnonzero(index < 0)
    for i in left:
        index[i] = max(range(len(entries)), key=lambda entry: cosines[i, entries[entry]])
    cosine = [cosines[i, entries[index[i]]] for i in range(count)]
    for i in range(count):
        entry = entries[index[i]]
        if entry == i or not (vectors[i].any() or vectors[entry].any()):
            cosine[i] = 1.0
    return {"entries": entries, "index": index, "cosine": cosine, "num_forced": len(left)}


def check(module, vectors, counts, threshold: float, max_entries: int) -> list[dict]:
    num_vectors = torch.tensor(counts, dtype=torch.int32, device=DEVICE)
    book = module.build_codebook(vectors, num_vectors, threshold, max_entries)
    num_problems, num_places, _ = vectors.shape
    assert book.entries.shape == (num_problems, max_entries)
    for name in ("entries", "num_entries", "index", "num_forced"):
        assert getattr(book, name).dtype == torch.int32
    found = []
    for problem, count in enumerate(counts):
        exact = vectors[problem, :count].double().cpu().numpy()
        expected = paper(exact, threshold, max_entries)
        num_entries = len(expected["entries"])
        assert book.num_entries[problem] == num_entries
        padding = [-1] * (max_entries - num_entries)
        assert book.entries[problem].tolist() == expected["entries"] + padding
        padding = [-1] * (num_places - count)
        assert book.index[problem].tolist() == expected["index"].tolist() + padding
        assert book.num_forced[problem] == expected["num_forced"]
        lengths = [np.sqrt((row * row).sum()) for row in exact]
        for values, wanted in ((book.magnitude, lengths), (book.cosine, expected["cosine"])):
            assert values.dtype == torch.float32
            wanted = torch.tensor(wanted, dtype=torch.float64)
            values = values[problem].cpu().double()
            torch.testing.assert_close(values[:count], wanted, rtol=1e-5, atol=1e-6)
            assert (values[count:] == 0).all(), "padding is zero"
        assert (book.cosine[problem] <= 1).all()
        found.append(expected)
    return found


@VERSIONS
@pytest.mark.parametrize("counts", [[1], [2, 1, 33], [31, 32, 33], [130, 64, 0, 97], [63, 111]])
def test_ragged_batches_of_clusters(module, counts: list[int]) -> None:
    vectors = clustered(counts)
    books = check(module, vectors, counts, 0.95, 40)
    if max(counts) > 30:
        assert any(1 < len(book["entries"]) < 40 for book in books), "neither trivial case"


@VERSIONS
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes_and_widths(module, head_dim: int, dtype: torch.dtype) -> None:
    vectors = clustered([70, 41], head_dim, 6, 0.14, dtype, head_dim, threshold=0.98)
    unit = normalize(vectors[0].double(), dim=1)
    assert ((unit @ unit.T - 0.98).abs() < 2e-4).any(), "too near for 8 bits"
    check(module, vectors, [70, 41], 0.98, 70)


@VERSIONS
@pytest.mark.parametrize("threshold", [0.9, 0.99995, 1.0])
def test_equal_vectors_share_an_entry_and_zero_vectors_are_alike(module, threshold) -> None:
    """Lengths that are no powers of two: a computed cosine of equal vectors may miss 1.0."""
    vectors = clustered([40], 48, noise=2.0, threshold=threshold)
    vectors[0, 10:20] = vectors[0, :10]
    vectors[0, 33] = vectors[0, 3]
    vectors[0, [5, 21, 39]] = 0.0
    vectors[0, 21, ::2] = -0.0
    books = check(module, vectors, [40], threshold, 40)
    if threshold == 1.0:
        distinct = torch.unique(vectors[0] + 0.0, dim=0)
        assert len(books[0]["entries"]) == len(distinct)


@VERSIONS
def test_parallel_vectors_are_distinct_at_one(module) -> None:
    """Their cosine is 1 and not above it, however it is rounded."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randint(-40, 41, (5, 1, 40), generator=generator)
    vectors = (directions * torch.arange(1, 21).reshape(1, 20, 1)).float().to(DEVICE)
    num_vectors = torch.full((5,), 20, dtype=torch.int32, device=DEVICE)
    book = module.build_codebook(vectors, num_vectors, 1.0, 20)
    assert book.entries.tolist() == book.index.tolist() == [list(range(20))] * 5
    assert (book.num_forced == 0).all()


@VERSIONS
def test_vectors_too_short_to_divide_by_count_as_zero(module) -> None:
    vectors = clustered([9], 16, num_centres=9)
    vectors[0, [2, 6]] *= 1e-25
    num_vectors = torch.tensor([9], dtype=torch.int32, device=DEVICE)
    book = module.build_codebook(vectors, num_vectors, 0.99, 9)
    assert book.index[0, 2] == book.index[0, 6]
    assert book.magnitude[0, [2, 6]].tolist() == [0, 0]
    assert torch.isfinite(book.cosine).all()


@VERSIONS
@pytest.mark.parametrize("max_entries", [1, 3, 7, 300])
def test_a_full_book_takes_the_rest_to_the_nearest_entry(module, max_entries: int) -> None:
    vectors = clustered([100, 5, 64], 32, num_centres=12, noise=0.3, seed=4)
    vectors[0, 50] = 0.0  # equally far from all entries: the first
    books = check(module, vectors, [100, 5, 64], 0.95, max_entries)
    assert (books[0]["num_forced"] > 0) == (max_entries < 300)


@pytest.mark.parametrize("many", [4096, 256])
def test_neighbourhoods_across_chunks_of_the_cover(monkeypatch, many: int) -> None:
    """Degrees in chunks of 256; more vectors leave at once than a batch of 8 takes, or one of 4."""
    monkeypatch.setattr(kernel, "COVER_BLOCKS", (256,))
    monkeypatch.setattr(kernel, "_MANY", many)
    counts = [290, 257]
    vectors = clustered(counts, 16, 9, noise=0.13, seed=2, threshold=0.98)
    books = check(kernel, vectors, counts, 0.98, 90)
    assert max(np.bincount(books[0]["index"])) > 10 and len(books[0]["entries"]) > 15


def test_nearest_entries_over_several_tiles() -> None:
    """float32 is taken 32 vectors at a time, and 90 entries are not enough."""
    counts = [150, 131]
    vectors = clustered(counts, 128, 12, noise=0.19, seed=2, threshold=0.98)
    vectors[0, 149] = 0.0  # equally far from entries in all tiles: the first
    books = check(kernel, vectors, counts, 0.98, 90)
    assert books[0]["num_forced"] > 0 and books[0]["index"][149] == 0


def test_degrees_count_only_what_is_left() -> None:
    """Vector 5 has four neighbours, then two: by then the three of another cluster are more."""
    degrees = np.deg2rad([0, 4, 8, 12, 16, 20, 24, 40, 44, 48, 70])
    vectors = torch.zeros(1, 11, 16)
    vectors[0, :, :2] = torch.tensor(np.stack([np.cos(degrees), np.sin(degrees)], axis=1))
    books = check(kernel, vectors.to(DEVICE), [11], float(np.cos(np.deg2rad(8.9))), 11)
    assert books[0]["entries"] == [2, 7, 5, 10]


def test_vectors_may_be_a_strided_view() -> None:
    vectors = clustered([40, 40, 40], 32)
    stash = torch.full((40, 3, 2, 40), float("nan"), device=DEVICE)
    stash[:, :, 1, :32] = vectors.transpose(0, 1)
    check(kernel, stash[:, :, 1, :32].transpose(0, 1), [40, 31, 12], 0.95, 20)


def test_refuses_what_it_does_not_take() -> None:
    vectors = clustered([8, 8], 32)
    two = torch.tensor([8, 8], dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match="num_vectors .3,. does not fit"):
        kernel.build_codebook(vectors, two.new_zeros(3), 0.9, 4)
    with pytest.raises(ValueError, match="got torch.float64"):
        kernel.build_codebook(vectors.double(), two, 0.9, 4)
    with pytest.raises(ValueError, match="neighbours"):
        kernel.build_codebook(vectors[..., ::2], two, 0.9, 4)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        kernel.build_codebook(vectors, two, 0.9, 0)


def sm90_launches() -> None:
    """Llama-3-8B's heads, the widest rows, and the case where equal vectors are looked for."""
    for head_dim, dtype, threshold in [
        (64, torch.bfloat16, 0.98),
        (128, torch.bfloat16, 0.98),
        (256, torch.bfloat16, 0.98),
        (128, torch.float32, 0.98),
        (256, torch.float32, 0.98),
        (128, torch.bfloat16, 1.0),
        (128, torch.float32, 1.0),
    ]:
        vectors = torch.zeros(2, 4096, head_dim, dtype=dtype)
        shorter = torch.full((2,), 2048, dtype=torch.int32)
        kernel.build_codebook(vectors[:, :2048], shorter, threshold, 1024)
        counts = torch.full((2,), 4096, dtype=torch.int32)
        kernel.build_codebook(vectors, counts, threshold, 2048)
