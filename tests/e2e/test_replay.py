"""The replay that fills the table of policies says what the engine says, token for token."""

import pytest

from tests.e2e.conftest import opened
from vllm_kvcompress.config.reading import parse_config
from vllm_kvcompress.core.compactions import prompt_checksum
from vllm_kvcompress.evaluation.replay import Replay
from vllm_kvcompress.request_options import parse_request, resolve_request

pytestmark = pytest.mark.engine

PER_LAYER = {"layer_groups": {"size": 1}}
NUM_TOKENS = 10
CASES = [
    ("windowkv", 0.12),
    ("snapkv", 0.25),
    ("pyramidkv", 0.25),
    ("spindlekv-evict", 0.25),
    ("criticalkv", 0.12),
    ("h2o", 0.25),
    ("expected_attention", 0.25),
    ("streaming_llm_rerotated", 0.12),
    ("random", 0.25),
]


def test_tokens_equal_the_engines(probe_model, prompts) -> None:
    tried = prompts[2][:1300], prompts[7]
    xargs = [{"kv_compression": name, "kv_budget_ratio": ratio} for name, ratio in CASES]
    xargs[0]["kv_task"] = "aggregation"
    seeds: list[int] = []
    with opened(probe_model, {"preset": "snapkv", **PER_LAYER}) as engine:
        found = [
            engine.generate([p] * len(CASES), NUM_TOKENS, xargs, ignore_eos=True) for p in tried
        ]
        for prompt in tried:
            engine.add("seed", prompt, 1)
            seeds.append(prompt_checksum(engine.live()["seed"], len(prompt)))
            engine.drain()
        assert engine.scheduler.stats.tasks == {"aggregation/request": 2}
    replay = Replay(probe_model)
    for prompt, seed, answers in zip(tried, seeds, found, strict=True):
        prefilled = replay.prefill(prompt)
        for (name, _), extra, tokens in zip(CASES, xargs, answers, strict=True):
            server = parse_config({"preset": "snapkv", **PER_LAYER})
            config = resolve_request(server, parse_request(extra), "aggregation")
            assert replay.generate(prefilled, config, NUM_TOKENS, seed) == tokens, name
