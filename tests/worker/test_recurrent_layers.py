"""The worker's side of layers with a recurrent state: specs, and vLLM's model state below ours."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.kv_cache_interface import FullAttentionSpec, MambaSpec, SlidingWindowSpec
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.model_states.encoder_only import EncoderOnlyModelState
from vllm.v1.worker.gpu.model_states.mamba_hybrid import MambaHybridModelState

from vllm_kvcompress.config.settings import LayerGroupsConfig
from vllm_kvcompress.errors import UnsupportedModelError
from vllm_kvcompress.spec import CompressedAttentionSpec, GroupMap
from vllm_kvcompress.worker.layer_specs import CompactedLayers
from vllm_kvcompress.worker.lengths import EvictedLengths
from vllm_kvcompress.worker.model_state import CompressionStateMixin, compressed

FULL = FullAttentionSpec(block_size=16, num_kv_heads=2, head_size=8, dtype=torch.float32)
STATE = MambaSpec(block_size=16, shapes=((512,),), dtypes=(torch.float32,))
WINDOWED = SlidingWindowSpec(
    block_size=16, num_kv_heads=2, head_size=8, dtype=torch.float32, sliding_window=64
)

# --- specs --------------------------------------------------------------------------------


def layers_of(types: list[str], is_hybrid: bool = True) -> Any:
    text = SimpleNamespace(num_hidden_layers=len(types), layer_types=types)
    model = SimpleNamespace(hf_text_config=text, max_model_len=1024, is_hybrid=is_hybrid)
    context = SimpleNamespace(static_forward_context={})
    return CompactedLayers(SimpleNamespace(model_config=model, compilation_config=context))


def specs_of(layers: Any, host: dict[str, Any], count: int = 1) -> dict[str, Any]:
    forward_context = layers.vllm_config.compilation_config.static_forward_context
    forward_context.update(dict.fromkeys(host, SimpleNamespace()))
    return layers.specs(host, LayerGroupsConfig(count=count))


def test_layer_groups_count_layers_that_attend() -> None:
    layers = layers_of(["mamba", "attention"] * 4)
    assert len(layers) == 4 and layers.place("model.layers.5.self_attn.attn") == 2
    host = {
        f"model.layers.{i}.{'self_attn.attn' if i % 2 else 'mixer'}": FULL if i % 2 else STATE
        for i in range(8)
    }
    found = specs_of(layers, host, count=2)
    numbers = [getattr(each, "layer_group", None) for each in found.values()]
    assert numbers == [None, 0, None, 0, None, 1, None, 1]
    assert all(found[name] is STATE for name in list(found)[::2])


def test_attention_and_a_state_may_be_in_one_layer() -> None:
    layers = layers_of(["hybrid"] * 2)
    host = {
        f"model.layers.{i}.{part}": made
        for i in range(2)
        for part, made in (("mamba", STATE), ("self_attn.attn", FULL))
    }
    found = specs_of(layers, host)
    assert [type(each) for each in found.values()] == [MambaSpec, CompressedAttentionSpec] * 2


@pytest.mark.parametrize(
    ("types", "host", "is_hybrid"),
    [
        (["attention", "attention"], {"layers.0.mixer": STATE, "layers.1.attn": FULL}, True),
        (["mamba", "attention"], {"layers.0.attn": FULL, "layers.1.attn": FULL}, True),
        (["mamba", "attention"], {"layers.0.mixer": STATE, "layers.1.attn": WINDOWED}, True),
        (["sliding_attention", "attention"], {"layers.0.mixer": STATE}, False),
    ],
    ids=["no attention", "no state", "a window", "no hybrid"],
)
def test_what_the_configuration_does_not_say_is_refused(
    types: list[str], host: dict[str, Any], is_hybrid: bool
) -> None:
    with pytest.raises(UnsupportedModelError, match="does not go with what the model's"):
        specs_of(layers_of(types, is_hybrid), host)


# --- model states -------------------------------------------------------------------------


@pytest.mark.parametrize("host", [DefaultModelState, MambaHybridModelState])
def test_our_state_goes_over_the_models(host: type[Any]) -> None:
    made = compressed(host)
    assert made is compressed(host) and issubclass(made, host)
    assert made.prepare_attn is CompressionStateMixin.prepare_attn
    assert made.postprocess_state is host.postprocess_state


def test_other_states_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="EncoderOnlyModelState.*not been tried"):
        compressed(EncoderOnlyModelState)


class Host(DefaultModelState):
    """Notes which KV cache groups it is asked to build, and with which lengths."""

    def __init__(self) -> None:
        self.asked: list[tuple[list[int], list[int]]] = []

    def prepare_attn(  # type: ignore[override]
        self, batch: Any, mode: Any, tables: Any, slots: Any, attn_groups: Any, *args: Any
    ) -> dict[str, Any]:
        built = [number for number, layers in enumerate(attn_groups) if layers]
        self.asked.append((built, batch.seq_lens.tolist()))
        return {f"layer {number}": object() for number in built}


class Batch:
    """The fields that a test sets."""


class State(CompressionStateMixin, Host):
    def __init__(self, specs: list[Any]) -> None:
        Host.__init__(self)
        self._groups, self._families = GroupMap.of(specs), None
        self.model_config = SimpleNamespace(is_mm_prefix_lm=False)
        self.lengths = EvictedLengths(len(specs), 4, torch.device("cpu"))


def test_states_are_prepared_once_a_step_with_whole_lengths() -> None:
    """A host's state computes indices of its layers' states in every call that is about them."""
    compacted = [CompressedAttentionSpec.from_full(FULL, number) for number in (0, 1)]
    specs = [STATE, compacted[0], STATE, compacted[1]]
    state = State(specs)
    attn_groups = [
        [SimpleNamespace(kernel_block_size=16, layer_names=[f"layer {number}"])]
        for number in range(4)
    ]
    batch: Any = Batch()
    batch.req_ids = ["a", "b"]
    batch.seq_lens = torch.tensor([200, 90], dtype=torch.int32)
    batch.seq_lens_cpu_upper_bound = batch.seq_lens
    batch.idx_mapping, batch.idx_mapping_np = torch.arange(2), np.arange(2)
    state.lengths.add_evicted(1, 0, 96)
    state.lengths.add_evicted(3, 0, 48)
    state.lengths.begin_batch(batch)
    for is_capture in (False, True):
        state.asked.clear()
        built = state.prepare_attn(
            batch, CUDAGraphMode.NONE, (), torch.empty(0), attn_groups, None, is_capture
        )
        assert sorted(built) == [f"layer {number}" for number in range(4)]
        assert state.asked == [([1], [104, 90]), ([3], [152, 90]), ([0, 2], [200, 90])]
