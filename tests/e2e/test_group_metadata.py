"""Attention metadata of 32 layer groups: one build, and what 32 builds would have given."""

import json
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.attention.backends.triton_attn import (
    TritonAttentionMetadata,
    TritonAttentionMetadataBuilder,
)

from tests.e2e.conftest import opened
from vllm_kvcompress.evaluation.engine import Engine
from vllm_kvcompress.worker import group_metadata, model_state

pytestmark = pytest.mark.engine

NUM_LAYERS = 32
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 512,
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "hidden_act": "silu",
    "rms_norm_eps": 1e-6, "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "max_position_embeddings": 1024, "bos_token_id": 0, "eos_token_id": 1,
    "tie_word_embeddings": True,
}  # fmt: skip
SETTING = {
    "preset": "keydiff",
    "budget": {"ratio": 0.5, "floor": 1},
    "min_prompt_len": 200,
    "layer_groups": {"count": NUM_LAYERS},
    "layer_budget": {"shape": "pyramid"},
}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """A model of 32 layers with random weights, every layer a layer group."""
    folder: Path = tmp_path_factory.mktemp("deep")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    with opened(
        str(folder), SETTING, load_format="dummy", skip_tokenizer_init=True, max_num_seqs=4,
        max_model_len=512,
    ) as engine:  # fmt: skip
        yield engine


class Gpu:
    """The metadata builders of vLLM's Triton attention in the place of the CPU's, counted."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.runner, self.num_builds = engine.runner, 0
        for groups in self.runner.attn_groups:
            for group in groups:
                made = TritonAttentionMetadataBuilder(
                    group.kv_cache_spec, group.layer_names, self.runner.vllm_config,
                    self.runner.device,
                )  # fmt: skip
                monkeypatch.setattr(group, "metadata_builders", [made])
        self.runner.model_state._families = None
        build = TritonAttentionMetadataBuilder.build

        def counting(builder: Any, *args: Any, **kwargs: Any) -> Any:
            self.num_builds += 1
            return build(builder, *args, **kwargs)

        monkeypatch.setattr(TritonAttentionMetadataBuilder, "build", counting)


def values(metadata: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Every field of every layer's metadata; tensors as address, shape and content."""
    return {
        name: {
            each.name: (value.data_ptr(), tuple(value.shape), value.tolist())
            if isinstance(value := getattr(entry, each.name), torch.Tensor)
            and not each.name.startswith("softmax_segm")
            else (tuple(value.shape) if isinstance(value, torch.Tensor) else value)
            for each in fields(entry)
        }
        for name, entry in metadata.items()
    }


@pytest.mark.parametrize("mode", [CUDAGraphMode.NONE, CUDAGraphMode.FULL])
def test_one_build_gives_what_a_build_per_group_gives(
    engine: Engine, mode: CUDAGraphMode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over steps in which nothing, one request and both requests are compacted."""
    state = engine.runner.model_state
    prepare, compared = state.prepare_attn, []

    def spy(batch: Any, _: Any, *args: Any, **kwargs: Any) -> Any:
        with monkeypatch.context() as patched:
            gpu = Gpu(engine, patched)
            one = prepare(batch, mode, *args, **kwargs)
            assert gpu.num_builds == 1
            patched.setattr(model_state, "derives", lambda _: False)
            each = prepare(batch, mode, *args, **kwargs)
            assert gpu.num_builds == 1 + NUM_LAYERS
        state._families = None
        assert list(one) == list(each) and len(one) == NUM_LAYERS
        assert values(one) == values(each)
        compared.append(len({entry.max_seq_len for entry in one.values()}))
        return prepare(batch, CUDAGraphMode.NONE, *args, **kwargs)

    monkeypatch.setattr(state, "prepare_attn", spy)
    rng = np.random.default_rng(0)
    name = f"long-{mode.name}"
    engine.add("short", rng.integers(2, 512, 100).tolist(), 8, detokenize=False, ignore_eos=True)
    for _ in range(2):
        engine.step()
    engine.add(name, rng.integers(2, 512, 400).tolist(), 8, detokenize=False, ignore_eos=True)
    engine.drain()
    assert compared[0] == 1, "nothing was evicted"
    assert max(compared) > 2, "groups have lost different numbers of tokens"


def test_captures_and_other_backends_build_per_group(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = Gpu(engine, monkeypatch)
    runner = engine.runner
    batch = model_state.InputBatch.make_dummy(2, 2, runner.input_buffers)
    tables, slots = runner.prepare_dummy_attn(batch)
    arguments = (tables, slots, runner.attn_groups, runner.kv_cache_config)
    runner.model_state.prepare_attn(batch, CUDAGraphMode.FULL, *arguments, for_capture=True)
    assert gpu.num_builds == NUM_LAYERS, "a builder may write to what it captures"

    class Other(TritonAttentionMetadata):
        """Metadata that this version does not know."""

    built = runner.model_state.prepare_attn(batch, CUDAGraphMode.FULL, *arguments)
    first = next(iter(built.values()))
    assert group_metadata.derives(first)
    other = object.__new__(Other)
    other.__dict__.update(first.__dict__)
    assert not group_metadata.derives(other)
    first.scheduler_metadata = torch.zeros(1)
    assert not group_metadata.derives(first), "made from this group's lengths"
    runner.model_state._families = None
