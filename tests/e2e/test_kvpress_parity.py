"""Kept tokens and continuations against kvpress 0.5.5, method by method, through the whole engine.

The reference (``tests/data/kvpress_parity.json``) was written by ``scripts/kvpress_oracle.sh
.venv-oracle parity``; scripts/lab/oracle/parity.py says how. ``--log-cli-level=INFO`` shows the
least agreement per model and method.
"""

import base64
import json
import logging
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lab.random_models import weights_digest, write_random_model
from tests.e2e.conftest import opened
from vllm_kvcompress.config.reading import parse_config
from vllm_kvcompress.evaluation.engine import Engine

pytestmark = pytest.mark.engine

REFERENCE = json.loads(
    (Path(__file__).parents[1] / "data" / "kvpress_parity.json").read_text(encoding="utf-8")
)
METHODS = list(dict.fromkeys(case["method"] for case in REFERENCE["cases"]))
LEAST_JACCARD = 0.98
CLEAR_MARGIN = 1e-3  # between the two highest logits; below it, float32 sums may choose either
LAYER_GROUPS = {"size": 1}  # as in kvpress, every layer may have a budget of its own

log = logging.getLogger(__name__)


def make_setting(case: dict[str, Any]) -> dict[str, Any]:
    """Our configuration of a press: its options, and nothing protected that it does not protect."""
    method, options = case["method"], dict(case["options"])
    window = options.pop("window_size", 1)
    sinks = options.get("n_sink", 0)
    average = sum(case["num_kept"]) // len(case["num_kept"])
    layer_budget: dict[str, Any] = {"shape": "uniform"}
    if method == "pyramidkv":
        method = "snapkv"
        # The last layer gets C / beta in kvpress, (C - w) / beta + w in KVCache-Factory and here.
        last = average / options.pop("beta")
        layer_budget = {"shape": "pyramid", "beta": (average - window) / (last - window)}
    elif method == "streaming_llm":
        del options["n_sink"]
    elif method == "observed_attention":
        method, options = "h2o", {"average": True}
    elif method == "chunkkv":
        window = 64
        options["scorer"] = {"name": "snapkv", "kernel_size": 5}
    return {
        "policy": {"name": method, **options},
        "budget": {"tokens": average, "floor": 1},
        "layer_groups": LAYER_GROUPS,
        "layer_budget": layer_budget,
        "num_sink_tokens": sinks,
        "observation_window": window,
        "min_prompt_len": 0,
    }


def unpack(bitmap: str) -> np.ndarray:
    """Mask of the positions in a bitmap of the reference; prompts fill whole bytes."""
    return np.unpackbits(
        np.frombuffer(base64.b64decode(bitmap), np.uint8), bitorder="little"
    ).astype(bool)


def run_together(
    engine: Engine, cases: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> list[tuple[dict[int, np.ndarray], list[int]]]:
    """Serve each case's prompt under its setting: masks [num_kv_heads, n] per layer, and tokens.

    Requests are admitted one after the other, because a setting is read on admission (a request
    can name presets and budgets only), and then share batches.
    """
    planner, compactor = engine.scheduler.planner, engine.runner.compactor
    state = engine.runner.model_state
    kept: dict[str, dict[int, np.ndarray]] = {}
    select = compactor._select

    def recording_select(group: Any, layers: list[Any], scores: Any) -> Any:
        indices = select(group, layers, scores)
        for layer, rows in zip(layers, indices.numpy(), strict=True):
            for job, plan, row in zip(group.jobs, group.plans, rows, strict=True):
                masks = kept[job.plan.request_id.rsplit("-", 1)[0]]  # vLLM appends to our id
                assert layer.index not in masks, "compacted once"
                mask = np.zeros((row.shape[0], plan.lengths.region_len), bool)
                np.put_along_axis(mask, row[:, : plan.lengths.kept_len], True, axis=1)
                masks[layer.index] = mask
        return indices

    with monkeypatch.context() as patches:
        patches.setattr(compactor, "_select", recording_select)
        for case in cases:
            config = parse_config(make_setting(case))
            patches.setattr(planner, "config", config)
            patches.setattr(state, "config", config)
            request_id = f"case-{len(engine.results)}"
            kept[request_id] = {}
            num_tokens = REFERENCE["settings"]["num_new_tokens"]
            engine.add(request_id, prompt_of(case), num_tokens, ignore_eos=True)
            while not any(row.startswith(f"{request_id}-") for row in state._rows):
                engine.step()
        engine.drain()
    return [(masks, engine.results[key].token_ids) for key, masks in kept.items()]


def prompt_of(case: dict[str, Any]) -> list[int]:
    """Token ids of a case's prompt."""
    return REFERENCE["models"][case["model"]]["prompts"][case["prompt"]]


def jaccard(found: np.ndarray, expected: np.ndarray) -> float:
    """Size of the intersection over size of the union."""
    return float((found & expected).sum() / max((found | expected).sum(), 1))


def without_protection(case: dict[str, Any], layer: int, head: int) -> np.ndarray:
    """What kvpress keeps where the last token has to earn its place."""
    mask = unpack(case["kept"][layer][head])
    position = case["displaced"][layer][head] if "displaced" in case else -1
    if position >= 0:
        mask[-1], mask[position] = False, True
    return mask


@pytest.fixture(scope="module", params=REFERENCE["models"])
def served(
    request: pytest.FixtureRequest, probe_model: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Engine]]:
    """A model of the reference in an engine whose prefill takes several chunks."""
    name = request.param
    if name == "probe":
        folder, arguments = Path(probe_model), {}
        digest = sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    else:
        folder = write_random_model(tmp_path_factory.mktemp("random") / name, name)
        digest, arguments = weights_digest(folder), {"skip_tokenizer_init": True}
    assert digest == REFERENCE["models"][name]["weights_sha256"]
    setting = {"preset": "snapkv", "layer_groups": LAYER_GROUPS}
    with opened(
        str(folder),
        setting,
        enable_prefix_caching=False,
        max_model_len=4096,
        max_num_batched_tokens=512,
        **arguments,
    ) as engine:
        yield name, engine


def test_full_cache(served: tuple[str, Engine]) -> None:
    """Without compression the models are the same in both engines."""
    name, engine = served
    model = REFERENCE["models"][name]
    num_tokens = REFERENCE["settings"]["num_new_tokens"]
    options = {"kv_compression": "none"}
    tokens = engine.generate(model["prompts"], num_tokens, options, ignore_eos=True)
    assert tokens == model["full_tokens"]


@pytest.mark.parametrize("method", METHODS)
def test_method(served: tuple[str, Engine], method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kept tokens agree in every layer and KV head, and so do continuations."""
    name, engine = served
    cases = [c for c in REFERENCE["cases"] if (c["model"], c["method"]) == (name, method)]
    assert len(cases) == 4
    all_scores, num_full = [], 0
    for case, (kept, tokens) in zip(cases, run_together(engine, cases, monkeypatch), strict=True):
        where = f"{name}, {len(prompt_of(case))} tokens, {method} {case['ratio']}"
        assert sorted(kept) == list(range(len(case["kept"]))), where
        for layer, heads in enumerate(case["kept"]):
            assert kept[layer].sum(axis=1).tolist() == [case["num_kept"][layer]] * len(heads), where
            for head, bitmap in enumerate(heads):
                found, expected = kept[layer][head], unpack(bitmap)
                tied = case["tied"].get(f"{layer}.{head}")
                settled = ~unpack(tied) if tied else np.ones_like(found)
                score = jaccard(found & settled, expected & settled)
                plain = jaccard(found, without_protection(case, layer, head))
                all_scores.append((score, jaccard(found, expected), plain))
                assert score >= LEAST_JACCARD, f"{where}, layer {layer}, head {head}"
        margins = case["margins"]
        num_clear = next((i for i, m in enumerate(margins) if m < CLEAR_MARGIN), len(margins))
        assert tokens[:num_clear] == case["tokens"][:num_clear], where
        num_full += num_clear == len(margins)
    least = [min(column) for column in zip(*all_scores, strict=True)]
    log.info(
        "%s %s: least Jaccard %.4f without ties, %.4f with, %.4f where nothing is protected; "
        "%d of %d continuations equal in full",
        *(name, method, *least, num_full, len(cases)),
    )
    assert num_full >= 3
