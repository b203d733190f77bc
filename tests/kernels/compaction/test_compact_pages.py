"""Compaction of pages: the kernel and its torch version against loops, bit for bit."""

import pytest
import torch

from tests.kernels import torch_versions as torch_version
from tests.kernels.paged import DEVICE, LAYOUTS, OUTSIDE, fill, make_cache
from vllm_kvcompress.kernels.cache.layer_caches import LayerCaches
from vllm_kvcompress.kernels.compaction import compact_pages as kernel
from vllm_kvcompress.kernels.formulas.rotary import Rotary

VERSIONS = pytest.mark.parametrize("module", [kernel, torch_version], ids=["triton", "torch"])


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Integers of a tensor's elements: NaN equals NaN."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
    return tensor.contiguous().view(kinds[tensor.element_size()]).cpu()


class Case:
    """Two layers of one group; requests of some lengths keep some of their tokens."""

    def __init__(
        self,
        lengths: list[int],
        kept: list[int],
        num_kv_heads: int = 2,
        head_dim: int = 32,
        block_size: int = 16,
        dtype: torch.dtype = torch.float32,
        layout: str = "LBHNC",
        seed: int = 0,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        num_layers, num_requests = 2, len(lengths)
        sources = [-(-n // block_size) for n in lengths]
        targets = [-(-k // block_size) for k in kept]
        total = sum(sources) + sum(targets) + 3
        self.caches = make_cache(
            total, num_kv_heads, block_size, 2 * head_dim, dtype, layout, num_layers + 1
        )[1:]
        self.kept, self.head_dim, self.block_size = kept, head_dim, block_size
        order = torch.randperm(total, generator=generator).tolist()
        self.source = torch.full((num_requests, max(sources) + 1), OUTSIDE, dtype=torch.int32)
        self.destination = torch.full((num_requests, max(targets) + 1), OUTSIDE, dtype=torch.int32)
        self.indices = torch.full(
            (num_layers, num_requests, num_kv_heads, max(kept)), -1, dtype=torch.int64
        )
        for request, (length, count) in enumerate(zip(lengths, kept, strict=True)):
            blocks = [order.pop() for _ in range(sources[request])]
            self.source[request, : len(blocks)] = torch.tensor(blocks)
            for layer, cache in enumerate(self.caches):
                rows = torch.randn(num_kv_heads, length, 2 * head_dim, generator=generator)
                fill(cache, blocks, rows.to(DEVICE))
                for head in range(num_kv_heads):
                    chosen = torch.randperm(length, generator=generator)[:count].sort().values
                    self.indices[layer, request, head, :count] = chosen
            for position in range(targets[request]):
                self.destination[request, position] = order.pop()

    def run(self, module, **rotation) -> None:
        layers = LayerCaches.of(self.caches, self.head_dim)
        tables = [t.to(DEVICE) for t in (self.source, self.destination, self.indices)]
        num_keep = torch.tensor(self.kept, dtype=torch.int32, device=DEVICE)
        module.compact_pages(layers, *tables, num_keep, **rotation)

    def expected(self, turn=lambda key, distance: key, first=None) -> list[torch.Tensor]:
        """Caches after the move, row by row."""
        result, size = [cache.clone() for cache in self.caches], self.block_size
        for layer, cache in enumerate(result):
            for request, count in enumerate(self.kept):
                for head in range(cache.shape[1]):
                    for slot in range(count):
                        index = int(self.indices[layer, request, head, slot])
                        old = self.caches[layer][
                            self.source[request, index // size], head, index % size
                        ]
                        new = old.clone()
                        if first is not None:
                            distance = first[request] + slot - index
                            new[: self.head_dim] = turn(old[: self.head_dim], distance)
                        block = self.destination[request, slot // size]
                        cache[block, head, slot % size] = new
        return result


def check_copy(module, case: Case) -> None:
    expected = case.expected()
    case.run(module)
    for found, wanted in zip(case.caches, expected, strict=True):
        assert torch.equal(bits(found), bits(wanted))


@VERSIONS
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("block_size", [16, 32, 64])
def test_physical_layouts(module, layout: str, block_size: int) -> None:
    check_copy(module, Case([70, 100], [16, 40], block_size=block_size, layout=layout))


@VERSIONS
@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2],
)
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_dtypes_and_row_widths(module, dtype: torch.dtype, head_dim: int) -> None:
    check_copy(module, Case([40], [17], head_dim=head_dim, dtype=dtype))


@VERSIONS
@pytest.mark.parametrize("kept", [1, 15, 16, 17, 63, 111])
def test_ragged_batches_around_the_edges_of_blocks(module, kept: int) -> None:
    check_copy(module, Case([kept, 130, 2 * kept], [kept, 32, kept], num_kv_heads=1))


def by_hand(is_neox: bool, half: int):
    """RoPE of one key in float64, pair by pair."""
    inv_freq = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)

    def turn(key: torch.Tensor, distance: int) -> torch.Tensor:
        turned = key.double().clone()
        for pair in range(half):
            i, j = (pair, pair + half) if is_neox else (2 * pair, 2 * pair + 1)
            angle = distance * inv_freq[pair]
            a, b = key[i].double(), key[j].double()
            turned[i] = a * angle.cos() - b * angle.sin()
            turned[j] = b * angle.cos() + a * angle.sin()
        largest = torch.finfo(key.dtype).max
        return turned.clamp(-largest, largest).to(key.dtype)

    return turn, Rotary(inv_freq.float().to(DEVICE), is_neox)


@VERSIONS
@pytest.mark.parametrize("is_neox", [True, False])
@pytest.mark.parametrize(
    ("dtype", "head_dim", "half"),
    [
        (torch.float32, 32, 16),
        (torch.float32, 96, 48),
        (torch.bfloat16, 64, 16),
        (torch.float8_e4m3fn, 64, 32),
    ],
)
def test_keys_are_turned_by_the_distance_they_move(module, is_neox, dtype, head_dim, half) -> None:
    case = Case([60, 45], [20, 33], head_dim=head_dim, dtype=dtype)
    turn, rotary = by_hand(is_neox, half)
    first = [40, 12]
    expected = case.expected(turn, first)
    targets = torch.tensor(first, dtype=torch.int32, device=DEVICE)
    case.run(module, first_target=targets, rotary=rotary)
    step = torch.finfo(dtype).eps  # one rounding: the kernel's float32 against float64
    for found, wanted in zip(case.caches, expected, strict=True):
        found, wanted = found.float(), wanted.float()
        assert torch.equal(found.isnan(), wanted.isnan())
        torch.testing.assert_close(
            found.nan_to_num(), wanted.nan_to_num(), rtol=1.01 * step, atol=4e-5
        )
        values = slice(head_dim, None)
        assert torch.equal(found[..., values].nan_to_num(), wanted[..., values].nan_to_num())


def test_a_rotation_beyond_the_largest_number_saturates() -> None:
    case = Case([16], [16], num_kv_heads=1, head_dim=32, dtype=torch.float8_e4m3fn)
    for cache in case.caches:
        fill(cache, case.source[0, :1].tolist(), torch.full((1, 16, 64), 448.0, device=DEVICE))
    _, rotary = by_hand(True, 16)
    case.run(
        kernel, first_target=torch.tensor([1], dtype=torch.int32, device=DEVICE), rotary=rotary
    )
    kept = case.caches[0][case.destination[0, 0], 0].float()
    assert kept.isfinite().all() and kept.max() == 448.0


def test_refuses_what_does_not_fit() -> None:
    case = Case([20], [16])
    with pytest.raises(ValueError, match="come together"):
        case.run(kernel, rotary=by_hand(True, 16)[1])
    case.indices = case.indices[:1]
    with pytest.raises(ValueError, match="do not fit 2 layers"):
        case.run(kernel)
    with pytest.raises(ValueError, match="one dtype, shape and strides"):
        LayerCaches.of([case.caches[0], case.caches[1].half()], 32)
    with pytest.raises(ValueError, match="16-byte addresses"):
        LayerCaches.of([case.caches[0][..., 1:]], 32)


def sm90_launches() -> None:
    """Llama-3-8B's rows, in 16, 8 and 32 bits."""
    for dtype in (torch.bfloat16, torch.float8_e4m3fn, torch.float32):
        case = Case([64], [32], num_kv_heads=8, head_dim=128, dtype=dtype, layout="LBNHC")
        case.run(kernel)
        targets = torch.tensor([32], dtype=torch.int32)
        for is_neox in (True, False):
            case.run(kernel, first_target=targets, rotary=by_hand(is_neox, 64)[1])
