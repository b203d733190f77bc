"""Decoding over a compacted cache against Hugging Face attending to the same survivors."""

from collections import defaultdict
from typing import Any

import pytest
import torch

from tests.e2e.conftest import FOUR_GROUPS, opened
from vllm_kvcompress.evaluation.engine import Engine

pytestmark = pytest.mark.engine

# Sequence length -> layer -> (survivors [KV, K], length of the region they are from)
Selections = dict[int, dict[int, tuple[torch.Tensor, int]]]


def watch_selections(engine: Engine) -> Selections:
    """Record what every later compaction of the engine keeps, in the order it is written."""
    found: Selections = defaultdict(dict)
    compactor = engine.runner.compactor
    select = compactor._select

    def watched(group: Any, layers: list[Any], scores: Any) -> torch.Tensor:
        indices = select(group, layers, scores)
        for layer, rows in zip(layers, indices, strict=True):
            for job, plan, row in zip(group.jobs, group.plans, rows, strict=True):
                lengths = plan.lengths
                kept = row[:, : lengths.kept_len]
                found[job.plan.position][layer.index] = (kept, lengths.region_len)
        return indices

    compactor._select = watched
    return found


def hugging_face_tokens(
    model_dir: str, prompt: list[int], kept: Selections, num_tokens: int, rerotate: bool = False
) -> list[int]:
    """Greedy tokens of a model whose cache is pruned at the same lengths to the same survivors."""
    from transformers import AutoModelForCausalLM
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()

    def prune(cache: Any, length: int) -> None:
        for number, (indices, region) in kept.get(length, {}).items():
            layer = cache.layers[number]
            tail = torch.arange(region, layer.keys.shape[2]).expand(indices.shape[0], -1)
            rows = torch.cat([indices, tail], dim=1)
            index = rows[None, :, :, None].expand(1, -1, -1, layer.keys.shape[-1])
            layer.keys = layer.keys.gather(2, index)
            layer.values = layer.values.gather(2, index)
            if rerotate:  # neighbours that end at the tail: all heads keep the same tokens here
                count = indices.shape[1]
                turn = torch.arange(region - count, region) - indices[0]
                cos, sin = model.model.rotary_emb(layer.keys, turn[None])
                turned, _ = apply_rotary_pos_emb(*[layer.keys[:, :, :count]] * 2, cos, sin)
                layer.keys = torch.cat([turned, layer.keys[:, :, count:]], dim=2)

    with torch.inference_mode():
        output = model(torch.tensor([prompt]), use_cache=True)
        cache, length = output.past_key_values, len(prompt)
        prune(cache, length)
        tokens = [int(output.logits[0, -1].argmax())]
        while len(tokens) < num_tokens:
            output = model(
                torch.tensor([tokens[-1:]]),
                past_key_values=cache,
                position_ids=torch.tensor([[length]]),
                use_cache=True,
            )
            length += 1
            prune(cache, length)
            tokens.append(int(output.logits[0, -1].argmax()))
    return tokens


@pytest.mark.parametrize("policy", ["windowkv", "snapkv", "random", "streaming_llm_rerotated"])
def test_tokens_equal_those_of_a_pruned_cache(probe_model, prompts, policy) -> None:
    """Random survivors break the answer, so equality there is no accident of retrieval."""
    with opened(probe_model, FOUR_GROUPS) as engine:
        kept = watch_selections(engine)
        found = engine.generate(prompts[:1], 12, {"kv_compression": policy}, ignore_eos=True)[0]
    assert [len(layers) for layers in kept.values()] == [4]
    rerotate = policy == "streaming_llm_rerotated"
    assert found == hugging_face_tokens(probe_model, prompts[0], kept, 12, rerotate)


@pytest.mark.parametrize("policy", ["snapkv", "rkv", "random", "streaming_llm_rerotated"])
def test_repeated_compactions_equal_a_cache_pruned_again_and_again(
    probe_model, prompts, policy
) -> None:
    """Prompt's end and three intervals, groups of different length, a pin in the middle."""
    setting = {
        "preset": policy,
        "budget": {"tokens": 160, "floor": 1},
        "layer_groups": {"count": 2},
        "layer_budget": {"shape": "pyramid", "beta": 3},
        "observation_window": 8,
        "trigger": "both",
        "interval": 24,
        "min_prompt_len": 0,
    }
    rerotate = policy == "streaming_llm_rerotated"
    xargs = None if rerotate else {"kv_pin": [200, 230]}
    prompt = prompts[0][:600]
    with opened(probe_model, setting) as engine:
        kept = watch_selections(engine)
        found = engine.generate([prompt], 84, xargs, ignore_eos=True)[0]
        assert engine.scheduler.stats.compactions[f"{setting_policy(setting)}/decode"] == 3
    assert list(kept) == [600, 624, 648, 672]
    if xargs:
        first, _ = kept[600][0]
        assert all(set(range(200, 230)) <= set(row) for row in first.tolist())
        again, _ = kept[624][0]
        start = first[0].tolist().index(200)  # right behind the sinks, in every head
        assert all(set(range(start, start + 30)) <= set(row) for row in again.tolist())
    assert found == hugging_face_tokens(probe_model, prompt, kept, 84, rerotate)


def setting_policy(setting: dict[str, Any]) -> str:
    from vllm_kvcompress.config.reading import parse_config

    config = parse_config(setting)
    assert config is not None
    return config.policy.name
