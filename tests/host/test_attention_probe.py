"""What transformers' attention layers do with positions, told by running them."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel

from vllm_kvcompress.host.attention_probe import ProbedLayer, probe

SMALL: dict[str, Any] = {
    "hidden_size": 96,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 4,
    "vocab_size": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
NOPE = [1, 0, 1, 0]


def config(name: str, **fields: Any) -> Any:
    return AutoConfig.for_model(name, **{**SMALL, **fields})


@pytest.mark.parametrize(
    ("name", "fields", "width", "is_neox", "projection"),
    [
        ("llama", {"head_dim": 32}, 16, True, "o_proj"),
        ("olmo2", {}, 12, True, "o_proj"),
        ("seed_oss", {"head_dim": 32}, 16, True, "o_proj"),
        ("glm4", {"head_dim": 32}, 8, False, "o_proj"),  # half of the channels, neighbours in pairs
        ("phi", {}, 6, True, "dense"),  # half of the channels, cut off beforehand
        ("cohere", {}, 12, False, "o_proj"),
    ],
)
def test_rotary_embeddings_and_projections_are_found(
    name: str, fields: dict, width: int, is_neox: bool, projection: str
) -> None:
    layers = probe(config(name, **fields))
    assert sorted(layers) == [0, 1, 2, 3]
    for layer in layers.values():
        assert layer.rotary is not None and layer.turns
        assert (len(layer.rotary.inv_freq), layer.rotary.is_neox) == (width, is_neox)
        assert layer.output_projection == projection


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("smollm3", {"no_rope_layers": NOPE}),
        ("exaone4", {"layer_types": ["sliding_attention", "full_attention"] * 2}),
        ("cohere2", {"layer_types": ["sliding_attention", "full_attention"] * 2}),
    ],
)
def test_layers_without_a_rotary_embedding_are_found(name: str, fields: dict) -> None:
    """By an attribute, or by what they attend to: the probe asks neither."""
    layers = probe(config(name, **fields))
    assert [layers[number].turns for number in range(4)] == [True, False, True, False]
    assert all(layer.rotary is not None for layer in layers.values())


def test_each_kind_of_layer_has_its_own_frequencies() -> None:
    kinds = ["sliding_attention", "full_attention"] * 2
    rope = {
        "full_attention": {"rope_theta": 1e6, "rope_type": "default"},
        "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
    }
    layers = probe(config("gemma3_text", head_dim=32, layer_types=kinds, rope_parameters=rope))
    for number, base in ((0, 1e4), (1, 1e6)):
        rotary = layers[number].rotary
        assert rotary is not None
        expected = base ** -(torch.arange(0, 32, 2) / 32)
        torch.testing.assert_close(rotary.inv_freq, expected)


def test_a_gate_behind_attention_hides_the_projection() -> None:
    """afmoe multiplies what was attended to by a gate before it is projected."""
    layers = probe(config("afmoe", head_dim=32, num_experts=2, num_dense_layers=4))
    assert layers and all(layer.output_projection is None for layer in layers.values())


def test_what_cannot_be_run_is_not_known() -> None:
    assert probe(SimpleNamespace(num_hidden_layers=2)) == {}
    assert probe(config("bloom", n_head=4, n_layer=2)) == {}
    assert not ProbedLayer().turns


def test_a_broken_layer_is_not_known(monkeypatch) -> None:
    from transformers.models.llama.modeling_llama import LlamaAttention

    def forward(self, hidden_states, position_embeddings, other, **kwargs):
        raise AssertionError("never with these arguments")

    monkeypatch.setattr(LlamaAttention, "forward", forward)
    assert probe(config("llama", head_dim=24)) == {}


def test_keys_that_are_scaled_by_position_are_not_known(monkeypatch) -> None:
    """Frequencies are there, and keys do not turn by them."""
    from transformers.models.llama import modeling_llama

    original = modeling_llama.apply_rotary_pos_emb

    def scaled(q, k, cos, sin, **kwargs):
        q, k = original(q, k, cos, sin)
        return q, k * torch.linspace(1, 2, k.shape[2])[:, None]

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", scaled)
    layers = probe(config("llama", head_dim=40))
    assert all(layer.rotary is None for layer in layers.values()) and len(layers) == 4
    assert layers[0].output_projection == "o_proj"


@pytest.mark.parametrize("name", ["hunyuan_v1_dense", "hunyuan_v1_moe"])
def test_keys_that_are_normed_once_they_are_turned_are_not_known(name: str) -> None:
    """Turning them afterwards would be something else: a norm's weights differ by channel."""
    layers = probe(config(name, head_dim=32))
    assert all(layer.rotary is None for layer in layers.values()) and len(layers) == 4
    assert all(layer.output_projection == "o_proj" for layer in layers.values())


def test_nothing_is_left_behind() -> None:
    """The configuration is the caller's, and models that are made later are as ever."""
    given = config("llama", head_dim=48)
    before = given.to_dict(), given._attn_implementation
    probe(given)
    assert (given.to_dict(), given._attn_implementation) == before
    model = AutoModel.from_config(given)
    assert isinstance(model.layers[0].self_attn.q_proj, torch.nn.Linear)
