"""Prompts and what follows them, compacted on the way, against plain attention over explicit sets.

The reference computes the whole prompt anew after every compaction. A table says which tokens each
token sees in each layer and KV head; a compaction takes what it evicts away from all later tokens.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, AutoModelForCausalLM

from lab.random_hybrids import write_random_hybrid
from lab.random_models import distinct_tokens, write_random_model
from vllm_kvcompress.config.reading import parse_config
from vllm_kvcompress.config.settings import CompressionConfig
from vllm_kvcompress.evaluation.quality.variants import kept_share
from vllm_kvcompress.evaluation.replay import Replay
from vllm_kvcompress.evaluation.replay_decoding import Decoding
from vllm_kvcompress.evaluation.replay_latent import LatentReplay
from vllm_kvcompress.evaluation.replay_rows import KeptRows
from vllm_kvcompress.lengths.budgets import group_budgets, layer_groups

BLOCK, SINKS, WINDOW = 16, 4, 8
LENGTH, MARKS = 430, (100, 210, 320, 430)
PINS = (100, 112), (250, 260)
NUM_TOKENS = 6


def setting(**more: Any) -> CompressionConfig:
    config = parse_config(
        {
            "policy": {"name": "knorm"},
            "budget": {"ratio": 0.2, "floor": 1},
            "trigger": "prompt",
            "prompt_interval": 110,
            "observation_window": WINDOW,
            "min_prompt_len": 100,
            "num_sink_tokens": SINKS,
            **more,
        }
    )
    assert config is not None
    return config


# --- the reference ------------------------------------------------------------------------


class Plain:
    """A model whose tokens see what a table says.

    Attributes
    ----------
    seen : list[torch.Tensor]
        Per layer [KV, n, n] bool: whether a token (row) sees another.
    weights : list[torch.Tensor]
        Of the last run, per layer [H, n, n].
    """

    def __init__(self, folder: str, num_tokens: int) -> None:
        AttentionInterface.register("plain_sets", self._attend)
        self.model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="plain_sets"
        ).eval()
        config = self.model.config
        self.heads = 1 if hasattr(config, "kv_lora_rank") else config.num_key_value_heads
        causal = torch.ones(num_tokens, num_tokens, dtype=torch.bool).tril()
        self.windows = {
            number: config.sliding_window
            for number, kind in enumerate(getattr(config, "layer_types", None) or [])
            if kind == "sliding_attention"
        }
        self.seen = []
        for layer in range(config.num_hidden_layers):
            near = causal.triu(1 - self.windows.get(layer, num_tokens))
            self.seen.append(near.expand(self.heads, -1, -1).clone())
        self.weights: list[torch.Tensor] = [torch.empty(0)] * config.num_hidden_layers

    def _attend(
        self, module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any
    ) -> Any:
        layer, count = module.layer_idx, query.shape[2]
        shared = query.shape[1] // key.shape[1]
        key, value = (each.repeat_interleave(shared, dim=1) for each in (key, value))
        seen = self.seen[layer][:, :count, :count]
        seen = seen.repeat_interleave(query.shape[1] // self.heads, dim=0)
        logits = query @ key.transpose(2, 3) * module.scaling
        weights = logits.masked_fill(~seen, -math.inf).softmax(-1)
        self.weights[layer] = weights[0]
        return (weights @ value).transpose(1, 2), None

    @torch.inference_mode()
    def run(self, tokens: list[int]) -> tuple[list[torch.Tensor], int]:
        """Rows [KV, n, D] by which keys are told apart, per layer, and the next token."""
        # Windowed layers of the cache keep the last rows alone, of which nobody asks.
        output = self.model(torch.tensor([tokens]), use_cache=True)
        rows = []
        for each in output.past_key_values.layers:
            both = [each.keys[0], each.values[0]] if self.heads == 1 else [each.keys[0]]
            rows.append(torch.cat(both, dim=-1))
        return rows, int(output.logits[0, -1].argmax())


Score = Callable[[Plain, list[torch.Tensor], int], torch.Tensor]
"""Of a layer [KV, n], after a run over n tokens."""


def shortest(plain: Plain, rows: list[torch.Tensor], layer: int) -> torch.Tensor:
    return -rows[layer].norm(dim=-1)


def last_query(plain: Plain, rows: list[torch.Tensor], layer: int) -> torch.Tensor:
    return plain.weights[layer][:, -1].mean(0).expand(plain.heads, -1)


def by_hand(
    plain: Plain, tokens: list[int], config: CompressionConfig, score: Score, num_tokens: int
) -> tuple[list[list[torch.Tensor]], list[int]]:
    """Survivors of the prompt, [kept] by layer and KV head, and greedy tokens."""
    layers = [n for n in range(len(plain.seen)) if n not in plain.windows]
    groups = layer_groups(len(layers), config.layer_groups)
    # Positions in the order in which they lie in the cache.
    held = [[torch.empty(0, dtype=torch.int64)] * plain.heads for _ in plain.seen]
    stays = torch.zeros(LENGTH + num_tokens, dtype=torch.bool)
    for start, end in [(0, SINKS), *config.pinned]:
        stays[start:end] = True

    def compact(rows: list[torch.Tensor], done: int, mark: int) -> None:
        budgets = group_budgets(mark, int(LENGTH * 0.2), config, max(groups) + 1)
        for layer, group in zip(layers, groups, strict=True):
            scores = score(plain, rows, layer)
            for head in range(plain.heads):
                cached = torch.cat([held[layer][head], torch.arange(done, mark)])
                tail = len(cached) % BLOCK
                region = cached[: len(cached) - tail]
                keep = math.ceil((budgets[group] - tail) / BLOCK) * BLOCK
                lost = region[:0]
                if keep < len(region):
                    forced = stays[region] | (region >= mark - WINDOW)
                    worth = scores[head, region].masked_fill(forced, math.inf)
                    lost = region[worth.argsort(descending=True)[keep:]]
                    assert not (stays[lost] | (lost >= mark - WINDOW)).any()
                    left = region[~torch.isin(region, lost)]
                    cached = torch.cat(
                        [left[stays[left]], left[~stays[left]], cached[len(region) :]]
                    )
                held[layer][head] = cached
                plain.seen[layer][head, mark:, lost] = False

    first, done = -1, 0
    marks = MARKS if config.compresses_in_prompts else MARKS[-1:]
    for mark in marks:
        rows, first = plain.run(tokens[:mark])
        if config.compresses_prompts:
            compact(rows, done, mark)
            done = mark
    survivors = [list(heads) for heads in held]
    said = [first]
    while len(said) < num_tokens:
        rows, token = plain.run([*tokens, *said])
        if config.compacts_at_intervals and len(said) % config.interval == 0:
            compact(rows, done, LENGTH + len(said))
            done = LENGTH + len(said)
        said.append(token)
    return survivors, said


# --- comparisons --------------------------------------------------------------------------

PYRAMID = {"layer_groups": {"count": 2}, "layer_budget": {"shape": "pyramid", "beta": 4}}
TOVA = {"policy": {"name": "tova"}}
CASES = {
    "one layer group": ("llama", {}, shortest),
    "two layer groups": ("llama", PYRAMID, shortest),
    "the window's queries": ("llama", TOVA, last_query),
    "the window's queries, two layer groups": ("llama", {**TOVA, **PYRAMID}, last_query),
    "pins": ("llama", {"pinned": [list(pin) for pin in PINS]}, shortest),
    "windowed layers": ("gemma3", {}, shortest),
    "latents": ("deepseek_v3", {}, shortest),
}


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    torch.set_num_threads(1)
    found: dict[str, Path] = {}

    def folder(name: str) -> str:
        if name not in found:
            found[name] = write_random_model(tmp_path_factory.mktemp(name), name)
        return str(found[name])

    return folder


def replay_of(folder: str, name: str) -> Replay:
    return (LatentReplay if name == "deepseek_v3" else Replay)(folder, BLOCK)


@pytest.mark.parametrize("case", CASES)
def test_survivors_and_tokens_are_those_of_plain_attention(case: str, folder_of: Any) -> None:
    name, more, score = CASES[case]
    folder, tokens, config = folder_of(name), distinct_tokens(LENGTH, seed=3), setting(**more)
    plain = Plain(folder, LENGTH + NUM_TOKENS)
    held, said = by_hand(plain, tokens, config, score, NUM_TOKENS)
    replay = replay_of(folder, name)
    prompt = replay.prefill(tokens)
    kept = replay.survivors(prompt, config)
    for layer in (n for n in range(len(kept)) if n not in plain.windows):
        for head, positions in enumerate(kept[layer]):
            assert positions.tolist() == held[layer][head].tolist()
    assert replay.generate(prompt, config, NUM_TOKENS) == said
    at_the_end = replay.survivors(prompt, setting(**more, trigger="end_of_prompt"))
    full = replay.full_layers
    assert any(kept[n].shape == at_the_end[n].shape for n in full)
    assert any(set(kept[n][0].tolist()) != set(at_the_end[n][0].tolist()) for n in full)


FOLLOWING = {
    "the prompt's end, and behind it": ("llama", {"trigger": "both"}, shortest),
    "behind the prompt alone": ("llama", {"trigger": "interval"}, shortest),
    "inside the prompt, too": ("llama", {"trigger": "all", **PYRAMID}, shortest),
    "the window's queries": ("llama", {**TOVA, "trigger": "both"}, last_query),
    "pins": ("llama", {"trigger": "both", "pinned": [list(pin) for pin in PINS]}, shortest),
    "windowed layers": ("gemma3", {"trigger": "both"}, shortest),
    "latents": ("deepseek_v3", {"trigger": "both"}, shortest),
}


@pytest.mark.parametrize("case", FOLLOWING)
def test_what_is_compacted_while_decoding_is_that_of_plain_attention(
    case: str, folder_of: Any
) -> None:
    name, more, score = FOLLOWING[case]
    interval, num_tokens = 20, 50
    folder, tokens = folder_of(name), distinct_tokens(LENGTH, seed=3)
    config = setting(**more, interval=interval)
    plain = Plain(folder, LENGTH + num_tokens)
    _, said = by_hand(plain, tokens, config, score, num_tokens)
    replay = replay_of(folder, name)
    prompt = replay.prefill(tokens)
    assert replay.generate(prompt, config, num_tokens) == said
    request = Decoding(replay, prompt, config)
    several = request.extend(said[:-1]).argmax(-1).tolist()
    assert [request.prompt.first_token, *several] == said
    full = [request.kept[layer].positions for layer in replay.full_layers]
    assert any(each.shape[1] < LENGTH // 2 for each in full) and 0 < request.mean_kept < 1
    # Something was evicted that had survived the prompt, or had been generated.
    before = replay.survivors(prompt, config)
    lost = [set(before[n][0].tolist()) - set(request.kept[n].positions[0].tolist())
            for n in replay.full_layers]  # fmt: skip
    assert all(lost)
    with_all = setting(**{**more, "trigger": "end_of_prompt"})
    assert replay.generate(prompt, with_all, num_tokens) != said


def test_the_reference_agrees_without_marks(folder_of: Any) -> None:
    """So that both sides cannot be wrong in the same way inside prompts alone."""
    tokens, config = distinct_tokens(LENGTH, seed=4), setting(trigger="end_of_prompt")
    plain = Plain(folder_of("llama"), LENGTH + NUM_TOKENS)
    _, said = by_hand(plain, tokens, config, shortest, NUM_TOKENS)
    replay = replay_of(folder_of("llama"), "llama")
    assert replay.generate(replay.prefill(tokens), config, NUM_TOKENS) == said


def test_a_prompt_is_computed_once_for_its_setting(folder_of: Any) -> None:
    replay, tokens = replay_of(folder_of("llama"), "llama"), distinct_tokens(LENGTH, seed=5)
    prompt, config = replay.prefill(tokens), setting()
    part = replay.under(prompt, config)
    assert part is not prompt and part.token_ids == tokens
    assert replay.under(part, config) is part
    assert replay.under(prompt, None) is prompt
    assert replay.under(prompt, setting(trigger="end_of_prompt")) is prompt
    other = setting(prompt_interval=200)
    assert replay.generate(part, other, 6) == replay.generate(prompt, other, 6)
    assert replay.generate(part, None, 6) == replay.generate(prompt, None, 6)
    share = kept_share(config, LENGTH, len(replay.layers), BLOCK, 1)
    held = replay.rows(part, config)[0][0][0].shape[1]
    assert share == held / LENGTH


def test_a_prompt_that_stays_whole_is_not_compacted_inside(folder_of: Any) -> None:
    replay, tokens = replay_of(folder_of("llama"), "llama"), distinct_tokens(LENGTH, seed=5)
    prompt = replay.prefill(tokens)
    for more in ({"budget": {"ratio": 1.0}}, {"min_prompt_len": LENGTH + 1}):
        assert replay.under(prompt, setting(**more)) is prompt


@pytest.mark.parametrize("name", ["lfm2", "granite4", "nemotron_h"])
def test_recurrent_layers_keep_their_states(tmp_path: Path, name: str) -> None:
    """Nothing is evicted from these. Where all is kept inside, tokens are those of the end."""
    replay, tokens = Replay(str(write_random_hybrid(tmp_path, name)), BLOCK), distinct_tokens(300)
    whole = replay.prefill(tokens)
    config = setting(budget={"ratio": 0.5, "floor": 1})
    part = replay.under(whole, config)
    assert part.held is not None and part.held.positions[replay.full_layers[0]].shape[1] < 300
    kept: list[KeptRows] = []
    for start, end in ((0, 110), (110, 300)):
        part = replay.forward(tokens[start:end], kept, start, part.states if kept else None)
        kept = replay.kept(replace(part, token_ids=tokens[:end]), None)
    assert part.first_token == whole.first_token
    for a, b in zip(part.keys, whole.keys, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
