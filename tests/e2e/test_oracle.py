"""Decoding over a compacted cache against Hugging Face attending to the same survivors."""

import pytest
import torch

from tests.e2e.conftest import FOUR_GROUPS, opened

pytestmark = pytest.mark.engine

NUM_TOKENS = 12


def hugging_face_tokens(model_dir: str, prompt: list[int], kept: list[torch.Tensor]) -> list[int]:
    """Greedy tokens after pruning the cache to `kept`, [KV, K] prompt positions per layer."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    with torch.inference_mode():
        output = model(torch.tensor([prompt]), use_cache=True)
        cache = output.past_key_values
        for layer, positions in zip(cache.layers, kept, strict=True):
            index = positions[None, :, :, None].expand(1, -1, -1, layer.keys.shape[-1])
            layer.keys = layer.keys.gather(2, index)
            layer.values = layer.values.gather(2, index)
        tokens = [int(output.logits[0, -1].argmax())]
        for step in range(NUM_TOKENS - 1):
            output = model(
                torch.tensor([tokens[-1:]]),
                past_key_values=cache,
                position_ids=torch.tensor([[len(prompt) + step]]),
                use_cache=True,
            )
            tokens.append(int(output.logits[0, -1].argmax()))
    return tokens


@pytest.mark.parametrize("policy", ["windowkv", "snapkv", "random"])
def test_tokens_equal_those_of_a_pruned_cache(probe_model, prompts, policy) -> None:
    """Random survivors break the answer, so equality there is no accident of retrieval."""
    recorded: list[torch.Tensor] = []
    with opened(probe_model, FOUR_GROUPS) as engine:
        compactor = engine.runner.compactor
        original = compactor._copy

        def spy(chosen, layer, group, scores, forced, keys, values):
            original(chosen, layer, group, scores, forced, keys, values)
            region = group.lengths.region_len
            indices = chosen.select(scores[:, :region], forced[:region], group.lengths.kept_len)
            tail = torch.arange(region, len(prompts[0])).expand(indices.shape[0], -1)
            recorded.append(torch.cat([indices, tail], dim=1))

        compactor._copy = spy
        found = engine.generate(
            prompts[:1], NUM_TOKENS, {"kv_compression": policy}, ignore_eos=True
        )[0]
    assert len(recorded) == 4
    assert found == hugging_face_tokens(probe_model, prompts[0], recorded)
