"""Key redundancy over paged caches: kernel and torch version against the formula in float64."""

from dataclasses import replace

import pytest
import torch

from tests.kernels import torch_versions as torch_version
from tests.kernels.launches import count_launches
from tests.kernels.paged import DEVICE, LAYOUTS, nan_empty, random_pages
from vllm_kvcompress.kernels.cache.pages import Pages
from vllm_kvcompress.kernels.formulas.key_redundancy import dense_redundancy
from vllm_kvcompress.kernels.scores import redundancy as kernel

VERSIONS = pytest.mark.parametrize("module", [kernel, torch_version], ids=["triton", "torch"])
Rows = list[torch.Tensor]  # per request [KV, n, D] float64


@pytest.fixture(autouse=True)
def _poison(monkeypatch) -> None:
    nan_empty(monkeypatch)


def formula(keys: torch.Tensor, threshold: float) -> torch.Tensor:
    """[n] of one head's keys [n, D] float64, pair by pair."""
    length = len(keys)
    norms = [max(float(key.norm()), 1e-12) for key in keys]
    sums = torch.zeros(length, dtype=torch.float64)
    for i in range(length):
        cosines = keys @ keys[i] / norms[i] / torch.tensor(norms, dtype=torch.float64)
        cosines[i] = 0.0
        similar = [j for j in range(length) if cosines[j] > threshold]
        cosines[similar[-1] if similar else 0] = 0.0
        sums += cosines
    return sums / length


def check(module, pages: Pages, keys: Rows, threshold: float, rtol: float = 1e-4) -> None:
    found = module.key_redundancy(pages, threshold)
    assert found.dtype == torch.float32
    assert found.shape == (len(keys), pages.num_kv_heads, pages.max_tokens)
    for request, rows in enumerate(keys):
        expected = torch.stack([formula(head, threshold) for head in rows])
        length, got = rows.shape[1], found[request].cpu().double()
        torch.testing.assert_close(got[:, :length], expected, rtol=rtol, atol=1e-6)
        assert (got[:, length:] == 0).all(), "padding is zero"


def pages_of(rows: Rows, dtype: torch.dtype = torch.float32, block_size: int = 16) -> Pages:
    """Pages whose keys are these [KV, n, D]."""
    lengths = [each.shape[1] for each in rows]
    pages, _, _ = random_pages(lengths, len(rows[0]), rows[0].shape[2], block_size, dtype)
    for request, each in enumerate(rows):
        for token in range(each.shape[1]):
            block = pages.block_table[request, token // block_size].long()
            pages.keys[block, :, token % block_size] = each[:, token].to(dtype).to(DEVICE)
    return pages


@VERSIONS
@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.5])
def test_a_ragged_batch(module, threshold: float) -> None:
    """Lengths around blocks, tiles of 32, and the four tiles between two looks at the end."""
    pages, keys, _ = random_pages([1, 2, 31, 32, 33, 63, 65, 129, 150], head_dim=64)
    check(module, pages, keys, threshold)


@VERSIONS
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_head_dims_and_types(module, head_dim: int, dtype: torch.dtype) -> None:
    pages, keys, _ = random_pages([70, 131], 2, head_dim, dtype=dtype)
    check(module, pages, keys, 0.15)


@VERSIONS
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_8_bit_keys_with_a_scale(module, dtype: torch.dtype) -> None:
    pages, keys, _ = random_pages([45, 7], 2, 64, 32, dtype, key_scale=0.3)
    check(module, pages, keys, 0.1)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("block_size", [16, 64])
def test_physical_layouts(layout: str, block_size: int) -> None:
    pages, keys, _ = random_pages([77, 20], 3, 64, block_size, torch.bfloat16, layout)
    check(kernel, pages, keys, 0.1)


@VERSIONS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cosine_that_equals_the_threshold_is_not_above_it(module, dtype) -> None:
    """Lengths 1 and 2, products 0, 1 and 2: all cosines are exact, many of them 0.5."""
    generator = torch.Generator().manual_seed(3)
    kinds = torch.zeros(6, 64, dtype=torch.float64)
    kinds[0, 0] = kinds[1, 1] = kinds[2, 9] = 1.0
    kinds[3, :4] = kinds[4, 2:6] = 1.0
    kinds[5, [0, 1, 8, 9]] = 1.0
    rows = [kinds[torch.randint(6, (2, length), generator=generator)] for length in (90, 17)]
    pages = pages_of(rows, dtype)
    for threshold in (0.0, 0.25, 0.5):
        check(module, pages, rows, threshold)


@VERSIONS
def test_from_a_threshold_of_1_on_nothing_is_similar(module) -> None:
    """Not even equal keys, whose cosine is 1 however it is rounded."""
    key = torch.randn(2, 1, 80, generator=torch.Generator().manual_seed(1)).bfloat16().double()
    rows = [key.expand(2, 40, 80)]
    found = module.key_redundancy(pages_of(rows, torch.bfloat16), 1.0)[0].cpu()
    # Every key but the first leaves out its pair with the first.
    expected = torch.full((2, 40), 39 / 40)
    expected[:, 0] = 0.0
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@VERSIONS
def test_of_a_run_of_repetitions_the_latest_is_exempt(module) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(1, 200, 64, generator=generator).double()
    repeated = list(range(10, 190, 5))
    rows[:, repeated] = rows[:, 10:11].clone()
    pages = pages_of([rows.bfloat16().double()], torch.bfloat16)
    check(module, pages, [rows.bfloat16().double()], 0.9)
    found = module.key_redundancy(pages, 0.9)[0, 0].cpu()
    # All others leave out their pair with the last, and the last its pair with the one before.
    assert found[repeated].argmin() == len(repeated) - 1
    assert (found[repeated[:-2]] - found[repeated[-2]] > 0.9 / 200).all()


@VERSIONS
def test_a_zero_key_is_like_nothing(module) -> None:
    rows = torch.randn(1, 20, 64, generator=torch.Generator().manual_seed(0)).double()
    rows[0, 5] = rows[0, 0] = 0
    found = module.key_redundancy(pages_of([rows]), 0.5)[0].cpu()
    assert found.isfinite().all()
    assert found[0, 5] == found[0, 0] == 0
    check(module, pages_of([rows]), [rows], 0.5)


@VERSIONS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [1e-5, 1e5])
def test_the_length_of_keys_does_not_matter(module, dtype: torch.dtype, length: float) -> None:
    rows = [(torch.randn(2, 50, 64) * length).to(dtype).double()]
    check(module, pages_of(rows, dtype), rows, 0.1)


def test_the_same_every_time() -> None:
    """Programs add to the same places in any order."""
    pages, _, _ = random_pages([300], 2, 64, dtype=torch.bfloat16)
    first = kernel.key_redundancy(pages, 0.05)
    for _ in range(3):
        assert torch.equal(kernel.key_redundancy(pages, 0.05), first)


@pytest.mark.parametrize("elements", [1, 3 * 50 * 7, 3 * 50 * 50])
def test_pieces_make_no_difference(monkeypatch: pytest.MonkeyPatch, elements: int) -> None:
    keys = torch.randn(3, 50, 16, generator=torch.Generator().manual_seed(0))
    whole = dense_redundancy(keys, 0.2)
    monkeypatch.setattr("vllm_kvcompress.kernels.formulas.key_redundancy._ELEMENTS", elements)
    torch.testing.assert_close(dense_redundancy(keys, 0.2), whole)


def test_launches_do_not_grow_with_the_prompt(monkeypatch) -> None:
    monkeypatch.undo()  # poison is written by launches too
    counts = []
    for lengths in ([40], [640, 30]):
        pages, _, _ = random_pages(lengths, 1, 64, dtype=torch.bfloat16)
        with count_launches() as count:
            kernel.key_redundancy(pages, 0.1)
        counts.append((count.kernels, count.operations))
    assert counts == [(4, 2)] * 2


@VERSIONS
@pytest.mark.parametrize("threshold", [-0.1, float("nan")])
def test_refuses_a_negative_threshold(module, threshold: float) -> None:
    pages, _, _ = random_pages([20])
    with pytest.raises(ValueError, match="must be 0 or more"):
        module.key_redundancy(pages, threshold)


def sm90_launches() -> None:
    """Llama-3-8B's shapes; rows of 64, 96 and 256 numbers, of 8 and of 32 bits."""
    for head_dim, dtype in [
        (128, torch.bfloat16),
        (64, torch.bfloat16),
        (96, torch.bfloat16),
        (256, torch.bfloat16),
        (128, torch.float8_e4m3fn),
        (128, torch.float32),
        (64, torch.float32),
        (96, torch.float32),
        (256, torch.float32),
    ]:
        pages, _, _ = random_pages([64], 8, head_dim, dtype=dtype)
        kernel.key_redundancy(replace(pages, max_tokens=4096), 0.5)  # only shapes matter
