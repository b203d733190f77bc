"""scripts/bench_speculation.py: counts, what it concludes from them, refusals, one small run."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lab.serving.client import BenchError
from lab.speculation import command as script
from lab.speculation.engines import VARIANTS, Meter, Pass, check_counts
from lab.speculation.report import conclude, make_table, target_line
from vllm_kvcompress.config.reading import parse_config
from vllm_kvcompress.errors import ConfigError
from vllm_kvcompress.speed.drafting import Speculation

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "bench_speculation.py"


def options(*words: str) -> Any:
    return script.parse_args(["--out", "x", "--device", "cpu", *words])


# --- counts -------------------------------------------------------------------------------


def counts(drafts: int, accepted: int) -> dict[str, float]:
    return {"drafts": drafts, "draft_tokens": 4 * drafts, "accepted_tokens": accepted}


def test_counters_that_agree_with_steps() -> None:
    # 7 steps of 5 tokens: 35, of which 31 fit; all 28 accepted drafts are counted.
    check_counts(counts(7, 28), decode_tokens=31, request_steps=7, batch=1, drafts=4)
    check_counts(counts(0, 0), decode_tokens=31, request_steps=31, batch=1, drafts=4)


@pytest.mark.parametrize(
    ("drafts", "accepted"),
    [(7, 23), (7, 29), (8, 28)],
    ids=["too few accepted", "more than one step cuts off", "more drafts than steps"],
)
def test_counters_that_do_not(drafts: int, accepted: int) -> None:
    with pytest.raises(BenchError, match="31 tokens in 7 steps"):
        check_counts(counts(drafts, accepted), 31, 7, batch=1, drafts=4)


# --- times --------------------------------------------------------------------------------


def made_pass(start: float, **fields: Any) -> Any:
    """A pass of 2 s, drafts of 3 s in 4 steps behind it, of two rows that decode."""
    made = {"rows": 2, "num_drafts": 8, "decodes": True, "draft_steps": 4, "view_share": 0.3}
    made |= {"draft_start": start + 2, "draft_end": start + 5, "end": start + 5.5}
    return Pass(start, **{**made, **fields})


def made_meter(passes: list[Any], speculates: bool = True) -> Any:
    runner = SimpleNamespace(execute_model=None, sample_tokens=None)
    if speculates:
        runner.speculator = SimpleNamespace(propose=None)
    meter = Meter(SimpleNamespace(runner=runner), False, 100, has_views=speculates)
    meter.passes = passes
    return meter


def test_times_of_full_steps_alone() -> None:
    passes = [
        made_pass(0.0, decodes=False),
        made_pass(10.0, num_drafts=0),
        made_pass(20.0),  # 6 s
        made_pass(26.0),  # 6 s
        made_pass(32.0),  # the next one has another batch
        made_pass(50.0, rows=1),
    ]
    found = made_meter(passes).times(2)
    assert found == {
        "full_steps": 2.0,
        "step_seconds": 6.0,
        "pass_seconds": 2.0,
        "draft_seconds": 3.0,
        "draft_step_seconds": 0.75,
        "view_share": pytest.approx(0.3),
    }


def test_times_without_speculation() -> None:
    plain = {"num_drafts": 0, "draft_start": None, "draft_end": None, "draft_steps": 0}
    passes = [made_pass(6.0 * n, **plain) for n in range(3)]
    found = made_meter(passes, speculates=False).times(2)
    assert found == {"full_steps": 2.0, "step_seconds": 6.0, "pass_seconds": 5.5}


def test_an_output_too_short_for_a_full_batch() -> None:
    with pytest.raises(BenchError, match="--output-len: no two steps decoded all 2"):
        made_meter([made_pass(0.0)]).times(2)


def test_a_pass_and_its_draft_steps_are_noted() -> None:
    """How many draft steps there were is the speculator's word: graphs run no Python."""
    exists = np.array([True, False, True])
    views = SimpleNamespace(
        exists=exists, blocks=[0, 1], num_dropped_np=lambda group, rows: 10 * (group + rows)
    )
    runner = SimpleNamespace(
        execute_model=lambda output: None,
        sample_tokens=lambda: runner.speculator.propose(batch),
        speculator=SimpleNamespace(
            propose=lambda batch: [0, 0, 0],
            num_steps=3,
            state=SimpleNamespace(views=views),
        ),
    )
    batch = SimpleNamespace(idx_mapping_np=np.array([2, 1, 0]), num_reqs=2)
    request = SimpleNamespace(num_computed_tokens=105, num_prompt_tokens=100)
    scheduler = SimpleNamespace(requests={"a": request})
    meter = Meter(SimpleNamespace(runner=runner, scheduler=scheduler), False, 100, True)
    for scheduled in (5, 6):
        tokens = {"a": [1] * (scheduled - 1)}
        output = SimpleNamespace(
            num_scheduled_tokens={"a": scheduled}, scheduled_spec_decode_tokens=tokens
        )
        runner.execute_model(output)
        assert len(runner.sample_tokens()) == 3
    first, second = meter.passes
    assert (first.decodes, second.decodes) == (True, False)
    assert (first.rows, first.num_drafts, first.draft_steps) == (1, 4, 3)
    assert first.start < first.draft_start < first.draft_end < first.end < second.start
    # Of rows 2 and 1, row 2 has a view: 20 and 30 of 100 tokens dropped in its two groups.
    assert first.view_share == pytest.approx(0.75)


def test_order_turns() -> None:
    found = [script.order(["a", "b", "c"], number) for number in range(3)]
    assert found == [["a", "b", "c"], ["a", "c", "b"], ["c", "a", "b"]]


# --- conclusions --------------------------------------------------------------------------


def made_values() -> dict[tuple[int, str, str], list[float]]:
    """Two rounds: a draft step costs 1.5 and 2.5 plain ones, tokens come 2 and 1.2 times faster."""
    rounds = {
        "none": {"tokens_per_second": [10, 20], "step_seconds": [0.2, 0.1]},
        "ngram": {"tokens_per_second": [15, 20], "step_seconds": [0.2, 0.1]},
        "draft": {"tokens_per_second": [20, 24], "step_seconds": [0.3, 0.25]},
    }
    rounds["ngram"]["accepted_length"] = [1.5, 1.5]
    rounds["draft"] |= {"accepted_length": [4.0, 4.0], "view_share": [0.3, 0.3]}
    for each in rounds.values():
        each |= {"pass_seconds": [0.1, 0.1], "engine_steps": [9, 9], "equal_tokens": [32, 32]}
    rounds["draft"] |= {"draft_seconds": [0.1, 0.1], "draft_step_seconds": [0.025, 0.025]}
    return {(1, v, m): x for v, each in rounds.items() for m, x in each.items()}  # type: ignore[misc]


def test_speed_ups() -> None:
    args = options("--batch", "1")
    shape = script.shape_of(args)
    none, ngram, draft = conclude(script.sizes_of(args), shape, made_values())
    assert "speed_up" not in none
    assert ngram["speed_up"] == {"median": 1.25, "low": 1.0, "high": 1.5}
    assert (ngram["by_steps"], ngram["by_bytes"]) == (1.5, 1.5)
    assert draft["speed_up"] == {"median": 1.6, "low": 1.2, "high": 2.0}
    assert draft["step_ratio"]["median"] == pytest.approx(2.0)
    assert draft["by_steps"] == pytest.approx(2.0)
    case = Speculation(shape, 1, 1000, 0.3, 4, tail=16)
    assert draft["by_bytes"] == pytest.approx(case.speed_up(4.0))
    assert draft["length_for_2x"] == pytest.approx(4.0)
    assert "length of 4.00" in target_line(draft, 4)
    assert "more than the 3 there can be" in target_line(draft, 2)


def test_times_judged_at_a_given_length() -> None:
    args = options("--batch", "1", "--accepted", "3", "--accepted-ngram", "2")
    _, ngram, draft = conclude(script.sizes_of(args), script.shape_of(args), made_values())
    assert ngram["by_steps"] == 2.0
    assert draft["by_steps"] == pytest.approx(1.5)
    assert draft["speed_up"]["median"] == 1.6, "what was measured stays"


def test_table() -> None:
    from rich.console import Console

    args = options("--batch", "1", "--accepted", "3")
    entries = conclude(script.sizes_of(args), script.shape_of(args), made_values())
    with open(os.devnull, "w") as nowhere:
        console = Console(width=170, file=nowhere, record=True)
        console.print(make_table(entries, "title"))
    text = console.export_text()
    assert "1.60 [1.20, 2.00]" in text and "1.50 (at 3)" in text and "32 of 32" in text


# --- options ------------------------------------------------------------------------------


def test_the_probe_model_and_its_shape() -> None:
    args = options()
    assert (args.batch, args.prompt_len, args.one_at_a_time) == ([1, 4], 1000, False)
    shape = script.shape_of(args)
    assert shape.kv_token_bytes == 2 * 4 * 2 * 64 * 4, "float32"


def test_sizes_of_a_gpu() -> None:
    words = ["--out", "x", "--device", "gpu"]
    args = script.parse_args(words)
    assert (args.model, args.prompt_len, args.one_at_a_time) == ("llama-3-8b", 32_768, True)
    block = 16 * 128 * 1024
    # 16 requests: 40,960 tokens of cache and view, twice 128 + 4 + 16 to spare, and some blocks.
    assert script.pool_bytes(args) == 16 * (2579 + 4) * block + 8 * block
    script.check_memory(args, 141 * 10**9)
    with pytest.raises(ConfigError, match=r"--batch: 32 requests .* at most 20 do"):
        script.check_memory(script.parse_args([*words, "--batch", "32"]), 141 * 10**9)


def test_each_variant_has_the_same_pool() -> None:
    args = options("--engine-args", '{"max_num_batched_tokens": 512}')
    found = {v: script.engine_options(args, v, Path("m")) for v in VARIANTS}
    assert len({each["engine"]["kv_cache_memory_bytes"] for each in found.values()}) == 1
    assert {each["engine"]["max_num_batched_tokens"] for each in found.values()} == {512}
    assert "speculative_config" in found["ngram"]["engine"]
    assert (found["none"]["setting"], found["ngram"]["setting"]) == (None, None)
    config = parse_config(found["draft"]["setting"])
    assert config is not None and config.num_draft_tokens == 4 and config.budget.ratio == 0.25


def test_fields_over_the_setting() -> None:
    args = options("--setting", '{"budget": {"tokens": 200}}', "--preset", "keydiff")
    config = parse_config(script.setting(args))
    assert config is not None and (config.budget.tokens, config.budget.ratio) == (200, None)
    assert config.policy.name == "keydiff"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--draft-tokens", "17"], "--draft-tokens: must be from 1 to 16"),
        (["--budget", "0"], "--budget: must be above 0 and at most 1"),
        (["--output-len", "19"], "--output-len: must be at least 20"),
        (["--accepted", "5.5"], "--accepted: must be from 1 to 5"),
        (["--accepted-ngram", "0.5"], "--accepted-ngram: must be from 1 to 5"),
        (["--ngram", "3", "2"], "--ngram: must be 1 <= MIN <= MAX"),
        (["--batch", "0"], "--batch: must be from 1 up"),
    ],
)
def test_bad_options(capsys, words: list[str], message: str) -> None:
    with pytest.raises(SystemExit):
        options(*words)
    assert message in capsys.readouterr().err


def test_refused_before_anything_starts(tmp_path: Path, capsys) -> None:
    assert script.main(["--out", str(tmp_path), "--device", "cpu"]) == 1
    assert "--out" in capsys.readouterr().err
    new = str(tmp_path / "new")
    assert script.main(["--out", new, "--device", "cpu", "--model", "gpt"]) == 1
    assert "--model: must be tiny, llama-3-8b" in capsys.readouterr().err
    words = ["--out", new, "--device", "cpu", "--setting", '{"mode": "evict"}']
    assert script.main(words) == 1
    assert "--setting" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


# --- for real -----------------------------------------------------------------------------


@pytest.mark.engine
def test_small_real_run(tmp_path: Path) -> None:
    """Three engines, one round: exact counts and equal tokens, not times."""
    out = tmp_path / "results"
    words = ["--prompt-len", "400", "--output-len", "12", "--draft-tokens", "2"]
    words += ["--rounds", "1", "--batch", "1", "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--out", str(out), *words],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "Triton's interpreter" in done.stdout
    assert (out / "speculation.png").stat().st_size > 10_000
    text = (out / "speculation.csv").read_text()
    assert str(tmp_path) not in text and str(ROOT) not in text
    rows = list(csv.DictReader(line for line in text.splitlines() if not line.startswith("#")))
    values = {(row["variant"], row["metric"]): float(row["value"]) for row in rows}
    assert [values[v, "equal_tokens"] for v in ("none", "ngram", "draft")] == [12, 12, 12]
    assert values["none", "engine_steps"] == values["none", "decode_tokens"] == 11
    assert values["draft", "engine_steps"] < 11
    assert values["draft", "drafts"] >= 1 and values["draft", "accepted_length"] > 1
    assert 0.2 < values["draft", "view_share"] < 0.5
    assert values["draft", "pass_seconds"] + values["draft", "draft_seconds"] > 0
    results = json.loads((out / "speculation.json").read_text())["results"]
    assert [entry["variant"] for entry in results] == ["none", "ngram", "draft"]
    assert results[2]["by_bytes"] <= results[2]["by_bytes_limit"]
