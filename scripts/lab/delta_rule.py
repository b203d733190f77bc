"""The gated delta rule of linear attention in torch, in any precision.

vLLM's kernels for CPUs take bfloat16 alone, whose rounding decides on the tokens of random models.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.nn.functional import conv1d, silu, softplus


@contextmanager
def in_any_precision() -> Iterator[None]:
    """Let models with linear attention run on a CPU in the precision of their configuration."""
    from vllm.model_executor.layers.mamba.ops.cpu import gdn_attention

    gdn_attention.register_cpu_gdn_attention_ops()
    with patch.object(torch.ops.vllm, "cpu_gdn_attention_core", _attend):
        yield


def _attend(
    qkv: torch.Tensor, b: torch.Tensor, a: torch.Tensor, out: torch.Tensor, name: Any
) -> None:
    """In the place of ``vllm.cpu_gdn_attention_core``: moves states on and fills `out` [n, H, V].

    `qkv` is [n, 2 * K heads * K + H * V] before its convolution, `b` and `a` are [n, H].
    """
    from vllm.forward_context import get_forward_context
    from vllm.model_executor.layers.mamba.mamba_utils import is_conv_state_dim_first
    from vllm.utils.torch_utils import _resolve_layer_name

    context = get_forward_context()
    layer = context.no_compile_layers[_resolve_layer_name(name)]
    if context.attn_metadata is None:
        return
    assert isinstance(context.attn_metadata, dict)
    seen: Any = context.attn_metadata[layer.prefix]
    starts = seen.non_spec_query_start_loc.tolist()
    slots = seen.non_spec_state_indices_tensor.tolist()
    inputs, states = layer.kv_cache
    inputs = inputs if is_conv_state_dim_first() else inputs.transpose(1, 2)
    for number in range(seen.num_decodes + seen.num_prefills):
        part, slot = slice(starts[number], starts[number + 1]), slots[number]
        before, state = inputs[slot], states[slot].transpose(1, 2)  # [channels, width], [H, K, V]
        if seen.has_initial_state is not None and not seen.has_initial_state[number]:
            before.zero_()
            state.zero_()
        mixed = torch.cat([before, qkv[part].T], dim=1)
        before.copy_(mixed[:, -before.shape[1] :])
        weight = layer.conv1d.weight.view(len(mixed), 1, -1)
        mixed = silu(conv1d(mixed[None], weight, layer.conv1d.bias, groups=len(mixed)))[0].T
        q, k, v = (each[0] for each in layer.rearrange_mixed_qkv(mixed))  # [n, heads, size]
        times = v.shape[1] // q.shape[1]
        q, k = (_of_length_one(each).repeat_interleave(times, 1) for each in (q, k))
        kept = torch.exp(-layer.A_log.exp() * softplus(a[part] + layer.dt_bias))
        written = b[part].sigmoid()
        for place in range(len(v)):
            state *= kept[place, :, None, None]
            known = torch.einsum("hk,hkv->hv", k[place], state)
            news = written[place, :, None] * (v[place] - known)
            state += k[place, :, :, None] * news[:, None]
            read = torch.einsum("hk,hkv->hv", q[place], state)
            out[part.start + place] = read * q.shape[-1] ** -0.5


def _of_length_one(vectors: torch.Tensor) -> torch.Tensor:
    return vectors * torch.rsqrt(vectors.square().sum(-1, keepdim=True) + 1e-6)
