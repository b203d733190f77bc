"""The compactor over caches of 8 bits: the survivors of a float32 cache of the same numbers.

Scales are powers of two, by which float32 is multiplied exactly: what differs is not rounding.
"""

import pytest
import torch

from tests.kernels.paged import DEVICE, make_cache
from tests.worker.compaction.test_compactor import (
    BLOCK,
    DIM,
    EVERY,
    KV,
    LAYERS,
    LENGTHS,
    World,
    compact,
    noise,
    rows_of,
    same_for_all,
)
from vllm_kvcompress.worker.layout.base import CacheLayout
from vllm_kvcompress.worker.layout.numbers import CacheNumbers
from vllm_kvcompress.worker.layout.packed import AmxLayout, VectorLayout
from vllm_kvcompress.worker.layout.strided import StridedLayout

SCALES = 0.25, 8.0
UNCHANGED = [(name, params) for name, params in EVERY if not params.get("rerotate_keys")]


class EightBitWorld(World):
    """Bytes, as vLLM leaves them: each number divided by its scale and rounded."""

    def __init__(self, layout: CacheLayout, caches: list[torch.Tensor]) -> None:
        super().__init__(layout, caches)
        self.stored: dict[tuple[str, int], torch.Tensor] = {}
        kind = layout.numbers.eight_bits
        assert kind is not None
        for layer, name in ((layer, name) for layer in range(LAYERS) for name in LENGTHS):
            length = LENGTHS[name]
            padded = noise(2, KV, -(-length // BLOCK) * BLOCK, DIM, seed=9)  # all bytes are numbers
            for half, rows, scale in zip(padded, rows_of(name, layer), SCALES, strict=False):
                half[:, :length] = rows / scale
            self.stored[name, layer] = padded.to(kind)
            blocks = torch.tensor(self.blocks[name], device=DEVICE)
            layout.write(caches[layer], blocks, *self.stored[name, layer].view(torch.uint8))

    def numbers(self, name: str, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [KV, n, D] float32 that the bytes stand for."""
        keys, values = self.stored[name, layer].float()[:, :, : LENGTHS[name]]
        return keys * SCALES[0], values * SCALES[1]


def numbers(kind: torch.dtype) -> CacheNumbers:
    return CacheNumbers(kind, lambda: SCALES)


def eight_bits(kind: torch.dtype, layout: str) -> EightBitWorld:
    made: CacheLayout
    if layout == "strided":
        made = StridedLayout(DIM, BLOCK, numbers(kind))
        caches = make_cache(64, KV, BLOCK, 2 * DIM, torch.uint8, "LBNHC", LAYERS)
    else:
        made = {"vec": VectorLayout, "amx": AmxLayout}[layout](DIM, numbers(kind))
        caches = [torch.zeros(64, KV, BLOCK, 2 * DIM, dtype=torch.uint8) for _ in range(LAYERS)]
    return EightBitWorld(made, caches)


def exact(like: EightBitWorld) -> World:
    """A float32 cache of the numbers that the bytes stand for; torch measures them."""
    caches = [torch.zeros(64, KV, BLOCK, 2 * DIM).to(DEVICE) for _ in range(LAYERS)]
    world = World(VectorLayout(DIM), caches)
    for name, length in LENGTHS.items():
        blocks = torch.tensor(world.blocks[name], device=DEVICE)
        for layer, cache in enumerate(caches):
            rows = like.numbers(name, layer)
            pad = [torch.nn.functional.pad(each, (0, 0, 0, -length % BLOCK)) for each in rows]
            world.layout.write(cache, blocks, *pad)
    return world


def check(name: str, params: dict, kind: torch.dtype, layout: str) -> None:
    settings = same_for_all({"name": name, **params})
    world = eight_bits(kind, layout)
    expected = compact(exact(world), settings, triton=False)
    found = compact(world, settings, triton=layout == "strided")
    assert found.keys() == expected.keys() and len(found) == 10
    for place, rows in found.items():
        assert all(each.dtype is torch.uint8 for each in rows), "bytes are moved"
        for own, number, scale in zip(rows, expected[place], SCALES, strict=True):
            assert torch.equal(own.contiguous().view(kind).float() * scale, number), place


@pytest.mark.parametrize(("name", "params"), UNCHANGED)
def test_every_policy_keeps_what_it_would_keep_of_the_same_numbers(name: str, params: dict) -> None:
    check(name, params, torch.float8_e4m3fn, "vec")


@pytest.mark.parametrize("name", ["snapkv", "windowkv", "spindlekv", "lagkv", "rkv", "criticalkv"])
def test_kernels_keep_the_same(name: str) -> None:
    """One policy for each kernel that reads a cache, and one that copies values out of it."""
    check(name, {}, torch.float8_e4m3fn, "strided")


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        (torch.float8_e5m2, "vec"),
        (torch.float8_e5m2, "amx"),
        (torch.float8_e4m3fn, "amx"),
    ],
)
@pytest.mark.parametrize("name", ["snapkv", "lagkv", "criticalkv"])
def test_other_formats_and_packings(name: str, kind: torch.dtype, layout: str) -> None:
    check(name, {}, kind, layout)


@pytest.mark.parametrize("layout", ["strided", "vec"])
def test_scales_matter_and_are_those_of_the_moment(layout: str, monkeypatch) -> None:
    settings = same_for_all({"name": "windowkv"})
    first = compact(eight_bits(torch.float8_e4m3fn, layout), settings, triton=False)
    monkeypatch.setattr("tests.worker.compaction.test_eight_bits.SCALES", (1.0, 1.0))
    world = eight_bits(torch.float8_e4m3fn, layout)  # stored with scales of 1
    monkeypatch.setattr("tests.worker.compaction.test_eight_bits.SCALES", (4.0, 1.0))
    second = compact(world, settings, triton=False)  # loaded again, with another one
    expected = compact(exact(world), settings, triton=False)
    assert any(not torch.equal(second[at][0], first[at][0]) for at in first)
    for place, rows in second.items():
        keys = rows[0].contiguous().view(torch.float8_e4m3fn).float() * 4.0
        assert torch.equal(keys, expected[place][0])


@pytest.mark.parametrize("layout", ["strided", "vec"])
def test_keys_of_8_bits_are_never_turned(layout: str) -> None:
    """Start-up and admission refuse such a policy; nothing goes on if one comes through."""
    settings = same_for_all({"name": "streaming_llm", "rerotate_keys": True})
    with pytest.raises(AssertionError, match="refused when settings are read"):
        compact(eight_bits(torch.float8_e4m3fn, layout), settings, triton=False)
