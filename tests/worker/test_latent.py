"""How an attention layer is reached: with keys and values, or with latents (MLA)."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_kvcompress.worker.latent import absorber, cache_of, query_size, watch_queries
from vllm_kvcompress.worker.queries.taps import QueryTaps

NOPE, ROTATED, LATENT, HEADS = 32, 64, 512, 4


class Recorder:
    is_active = True

    def __init__(self) -> None:
        self.seen: list[tuple[str, torch.Tensor]] = []

    def record(self, layer_name: str, query: torch.Tensor) -> None:
        self.seen.append((layer_name, query))


def latent_layer(**more: Any) -> Any:
    """What is read of vLLM's MLAAttention."""
    layer = SimpleNamespace(
        kv_lora_rank=LATENT, qk_nope_head_dim=NOPE, qk_head_dim=NOPE + ROTATED,
        head_size=LATENT + ROTATED, kv_cache=torch.zeros(5, 16, LATENT + ROTATED),
        is_amx_bmm_enabled=False, **more,
    )  # fmt: skip
    layer.forward_impl = lambda q, *args, output: output.fill_(q.sum())
    return layer


def test_a_latent_layer_shows_all_its_queries_before_it_splits_them() -> None:
    layer, recorder = latent_layer(), Recorder()
    taps = QueryTaps([recorder], torch.float32)
    watch_queries(taps, "layers.0", layer)
    query, output = torch.ones(3, HEADS, NOPE + ROTATED), torch.zeros(2)
    assert layer.forward_impl(query, None, output=output) is output
    assert output[0] == query.sum()
    ((name, seen),) = recorder.seen
    assert name == "layers.0" and seen is query
    with taps.muted():
        layer.forward_impl(query, None, output=output)
    assert len(recorder.seen) == 1


def test_the_cache_has_one_head_and_follows_a_new_binding() -> None:
    layer = latent_layer()
    cache = cache_of(layer)
    assert cache().shape == (5, 1, 16, LATENT + ROTATED)
    assert cache().data_ptr() == layer.kv_cache.data_ptr()
    layer.kv_cache = torch.zeros(7, 16, LATENT + ROTATED)
    assert cache().shape[0] == 7
    assert query_size(layer) == NOPE + ROTATED


def test_a_layer_with_keys_and_values_is_reached_as_ever() -> None:
    recorder = Recorder()
    impl = SimpleNamespace(forward=lambda layer, query, *rest: query)
    layer = SimpleNamespace(head_size=128, kv_cache=torch.zeros(5, 2, 16, 256), impl=impl)
    watch_queries(QueryTaps([recorder], torch.float32), "layers.0", layer)
    query = torch.ones(3, 8, 128)
    impl.forward(layer, query, None)
    assert recorder.seen[0][1] is query
    assert cache_of(layer)() is layer.kv_cache and query_size(layer) == 128


def heads_logits(query: torch.Tensor, rows: torch.Tensor, up_keys: torch.Tensor) -> torch.Tensor:
    """[H, w, n] float64 from every head's own keys; `up_keys` [L, H, NOPE] as vLLM splits them."""
    keys = torch.einsum("nl,lhp->hnp", rows[:, :LATENT].double(), up_keys.double())
    plain = query[..., :NOPE].double() @ keys.transpose(1, 2)
    return plain + query[..., NOPE:].double() @ rows[:, LATENT:].double().T


def test_absorbed_queries_have_the_heads_logits() -> None:
    generator = torch.Generator().manual_seed(0)
    up = torch.randn(LATENT, HEADS, NOPE, generator=generator) / LATENT**0.5
    query = torch.randn(HEADS, 6, NOPE + ROTATED, generator=generator)
    rows = torch.randn(9, LATENT + ROTATED, generator=generator)
    absorb = absorber(latent_layer(W_UK_T=up.permute(1, 2, 0)))
    found = absorb(query).double() @ rows.double().T
    torch.testing.assert_close(found, heads_logits(query, rows, up), rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not torch.cpu._is_amx_tile_supported(), reason="a CPU without tiles (AMX)")
def test_weights_that_vllm_packed_for_a_cpus_tiles_absorb_alike() -> None:
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    generator = torch.Generator().manual_seed(0)
    up = (torch.randn(LATENT, HEADS, NOPE, generator=generator) / LATENT**0.5).bfloat16()
    query = torch.randn(HEADS, 6, NOPE + ROTATED, generator=generator).bfloat16()
    rows = torch.randn(9, LATENT + ROTATED, generator=generator).bfloat16()
    packed = torch.ops._C.convert_weight_packed(up.permute(1, 0, 2).contiguous())
    layer = latent_layer(impl=SimpleNamespace(_w_uk_packed=packed, _w_scale=None))
    layer.is_amx_bmm_enabled = True
    # Strided, as the stash of a window gives them.
    strided = query.transpose(0, 1).contiguous().transpose(0, 1)
    found = absorber(layer)(strided).double() @ rows.double().T
    expected = heads_logits(query, rows, up)
    assert (found - expected).abs().max() < 0.02 * expected.abs().max()
