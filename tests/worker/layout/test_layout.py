"""Cache layouts. On CPU the oracle is vLLM's own operator that fills the cache."""

import pytest
import torch

from vllm_kvcompress.worker.layout.numbers import CacheNumbers
from vllm_kvcompress.worker.layout.packed import AmxLayout, VectorLayout, cpu_layout
from vllm_kvcompress.worker.layout.strided import StridedLayout

NUM_BLOCKS, HEADS, BLOCK, SIZE = 6, 2, 32, 64


def poisoned(dtype: torch.dtype) -> torch.Tensor:
    return torch.full((NUM_BLOCKS, HEADS, BLOCK, 2 * SIZE), float("nan"), dtype=dtype)


def host_fill(cache: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, slots, isa) -> None:
    """Write rows [n, KV, D] with the operator vLLM's CPU attention uses."""
    from vllm import _custom_ops as ops

    halves = cache.view(NUM_BLOCKS, HEADS, BLOCK * 2, SIZE).chunk(2, dim=2)
    ops.cpu_attn_reshape_and_cache(
        keys, values, *halves, slots, isa, k_scale=1.0, v_scale=1.0, kv_cache_dtype="auto"
    )


def host_isas() -> list[tuple[str, torch.dtype]]:
    isas = [("vec", torch.float32), ("vec", torch.bfloat16), ("vec16", torch.float32)]
    if torch.cpu._is_amx_tile_supported():
        isas.append(("amx", torch.bfloat16))
    return isas


def load_host_operators() -> None:
    """As vLLM does: which of its libraries fits depends on the CPU, and a second one aborts."""
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    if not hasattr(torch.ops._C, "cpu_attn_reshape_and_cache"):
        pytest.skip("vLLM without its CPU operators")


@pytest.mark.parametrize(("isa", "dtype"), host_isas())
def test_reads_what_the_hosts_operator_wrote(isa: str, dtype: torch.dtype) -> None:
    load_host_operators()
    blocks = [4, 1, 5]
    slots = torch.tensor([b * BLOCK + i for b in blocks for i in range(BLOCK)])
    keys = torch.randn(len(slots), HEADS, SIZE).to(dtype)
    values = torch.randn(len(slots), HEADS, SIZE).to(dtype)
    cache = poisoned(dtype)
    host_fill(cache, keys, values, slots, isa)
    found = cpu_layout(isa, SIZE).read(cache, torch.tensor(blocks))
    assert torch.equal(found[0], keys.transpose(0, 1))
    assert torch.equal(found[1], values.transpose(0, 1))


@pytest.mark.parametrize(("isa", "dtype"), host_isas())
def test_writes_as_the_hosts_operator_does(isa: str, dtype: torch.dtype) -> None:
    load_host_operators()
    blocks = [2, 0]
    slots = torch.tensor([b * BLOCK + i for b in blocks for i in range(BLOCK)])
    keys = torch.randn(len(slots), HEADS, SIZE).to(dtype)
    values = torch.randn(len(slots), HEADS, SIZE).to(dtype)
    expected, found = poisoned(dtype), poisoned(dtype)
    host_fill(expected, keys, values, slots, isa)
    cpu_layout(isa, SIZE).write(
        found, torch.tensor(blocks), keys.transpose(0, 1), values.transpose(0, 1)
    )
    # Equal bit for bit, and the poison outside the two blocks untouched.
    assert torch.equal(expected.nan_to_num(nan=-7.0), found.nan_to_num(nan=-7.0))


@pytest.mark.parametrize(
    "layout", [VectorLayout(SIZE), AmxLayout(SIZE), StridedLayout(SIZE, BLOCK)]
)
def test_round_trip_touches_only_its_blocks(layout) -> None:
    keys = torch.randn(HEADS, 2 * BLOCK, SIZE)
    values = torch.randn(HEADS, 2 * BLOCK, SIZE)
    cache = poisoned(torch.float32)
    layout.write(cache, torch.tensor([3, 1]), keys, values)
    found = layout.read(cache, torch.tensor([3, 1]))
    assert torch.equal(found[0], keys) and torch.equal(found[1], values)
    assert cache[[0, 2, 4, 5]].isnan().all()
    again = layout.read(cache, torch.tensor([1]))
    assert torch.equal(again[0], keys[:, BLOCK:])


def test_the_documented_vector_example() -> None:
    cache = torch.zeros(1, 1, 2, 6)
    keys = torch.tensor([[[0.0, 1, 2], [10, 11, 12]]])
    VectorLayout(3).write(cache, torch.tensor([0]), keys, keys + 100)
    assert cache.flatten().tolist() == [0, 10, 1, 11, 2, 12, 100, 101, 102, 110, 111, 112]


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (1, 0, 2, 3), (2, 0, 1, 3)])
@pytest.mark.parametrize("kernel_block", [16, 32])
def test_strided_views_of_any_physical_order(order, kernel_block: int) -> None:
    """Logical [B, H, N, C] over several physical orders, kernel blocks smaller than blocks."""
    ratio = BLOCK // kernel_block
    logical = (NUM_BLOCKS * ratio, HEADS, kernel_block, 2 * SIZE)
    physical = torch.full([logical[dim] for dim in order], float("nan"))
    cache = physical.permute([order.index(dim) for dim in range(4)])
    layout = StridedLayout(SIZE, BLOCK)
    keys, values = torch.randn(HEADS, 2 * BLOCK, SIZE), torch.randn(HEADS, 2 * BLOCK, SIZE)
    layout.write(cache, torch.tensor([4, 2]), keys, values)
    for token in (0, 15, 16, 31, 32, 63):
        block, offset = [4, 2][token // BLOCK], token % BLOCK
        row = cache[block * ratio + offset // kernel_block, :, offset % kernel_block]
        assert torch.equal(row, torch.cat([keys[:, token], values[:, token]], dim=-1))
    found = layout.read(cache, torch.tensor([4, 2]))
    assert torch.equal(found[0], keys) and torch.equal(found[1], values)


def eight_bit_isas() -> list[tuple[str, torch.dtype]]:
    return [(isa, dtype) for isa, dtype in host_isas() if isa != "vec16"]


@pytest.mark.skipif(not torch.cpu._is_avx512_supported(), reason="vLLM needs AVX-512 for 8 bits")
@pytest.mark.parametrize(
    ("name", "kind"), [("fp8", torch.float8_e4m3fn), ("fp8_e5m2", torch.float8_e5m2)]
)
@pytest.mark.parametrize(("isa", "dtype"), eight_bit_isas())
def test_measures_the_numbers_that_the_hosts_operator_stored(isa, dtype, name, kind) -> None:
    """Numbers that 8 bits hold, times the scales: there is nothing to round."""
    load_host_operators()
    from vllm import _custom_ops as ops

    blocks = [4, 1, 5]
    slots = torch.tensor([b * BLOCK + i for b in blocks for i in range(BLOCK)])
    generator = torch.Generator().manual_seed(1)
    size = len(slots), HEADS, SIZE
    keys = torch.randn(size, generator=generator).to(kind).float() * 0.25
    values = torch.randn(size, generator=generator).to(kind).float() * 4
    cache = torch.zeros(NUM_BLOCKS, HEADS, BLOCK, 2 * SIZE, dtype=torch.uint8)
    halves = cache.view(NUM_BLOCKS, HEADS, BLOCK * 2, SIZE).chunk(2, dim=2)
    ops.cpu_attn_reshape_and_cache(
        keys.to(dtype), values.to(dtype), *halves, slots, isa,
        k_scale=0.25, v_scale=4.0, kv_cache_dtype=name,
    )  # fmt: skip
    layout = cpu_layout(isa, SIZE, CacheNumbers(kind, lambda: (0.25, 4.0)))
    rows = layout.rows_so_far(cache, torch.tensor(blocks), 90, torch.zeros(2, 3, SIZE), 1.0)
    assert torch.equal(rows.keys, keys[:90].transpose(0, 1))
    assert torch.equal(rows.values, values[:90].transpose(0, 1))


def test_an_unknown_packing_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="vxe"):
        cpu_layout("vxe", 64)
