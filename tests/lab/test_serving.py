"""The serving benchmark: arithmetic with exact numbers, refusals, and one small real run."""

import argparse
import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lab.servers import stock_plugins
from lab.serving import arithmetic, client
from lab.serving import command as script
from lab.serving.arithmetic import Batch, Reading, Scenario
from lab.serving.models import (
    block_bytes,
    model_config,
    weight_bytes,
    write_model,
)
from lab.serving.report import (
    CsvLog,
    Results,
    Row,
    check_new_folder,
    label,
    make_table,
    summary,
    verdict_line,
)
from tests import forked
from vllm_kvcompress.errors import ConfigError
from vllm_kvcompress.evaluation.provenance import public_words

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "bench_serving.py"
SCENARIO = Scenario("tiny", "tight", 1024, 16, 6, 32, 7_798_784)


# --- sizes --------------------------------------------------------------------------------


def test_models_have_their_public_sizes() -> None:
    # 8,030,261,248 and 8,190,735,360 parameters; norms (0.27 and 0.31 million) are left out.
    assert weight_bytes("llama-3-8b") == 2 * (8_030_261_248 - 65 * 4096)
    assert weight_bytes("qwen3-8b") == 2 * (8_190_735_360 - 73 * 4096 - 36 * 2 * 128)
    assert block_bytes("llama-3-8b", 16) == 16 * 128 * 1024  # 128 KiB per token
    assert block_bytes("qwen3-8b", 16) == 16 * 144 * 1024
    assert block_bytes("tiny", 32) == 32 * 2 * 4 * 2 * 32 * 4


def test_positions_grow_with_the_prompt_and_never_shrink() -> None:
    assert model_config("llama-3-8b", 131_328)["max_position_embeddings"] == 131_328
    assert model_config("qwen3-8b", 8448)["max_position_embeddings"] == 40_960
    assert model_config("llama-3-8b", 100)["max_position_embeddings"] == 8192


def test_a_written_model_has_one_word_per_token(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = write_model(tmp_path / "model", "tiny", 5000)
    assert json.loads((folder / "config.json").read_text())["max_position_embeddings"] == 5000
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [0, 16, 17, 2047, 16]
    text = tokenizer.decode(ids)
    assert text == "w0 w16 w17 w2047 w16"
    assert tokenizer(text, add_special_tokens=False).input_ids == ids


def test_blocks_of_a_request() -> None:
    assert arithmetic.request_blocks(1024, 16, 32) == 33
    assert arithmetic.request_blocks(8192, 256, 16) == 528


def test_batch_fills_the_memory_beside_one_copy() -> None:
    assert arithmetic.batch_size(45, 10, 0.5) == 4
    assert arithmetic.batch_size(44, 10, 0.5) == 3
    assert arithmetic.batch_size(15, 10, 0.5) == 1
    with pytest.raises(ConfigError, match=r"--kv-memory: 14 bytes .* at least 15 bytes"):
        arithmetic.batch_size(14, 10, 0.5)


def test_pools() -> None:
    assert arithmetic.pool_blocks(6, "ample", 0.5, 33, 0.5) == 218  # 6.5 x 33 and 3
    assert arithmetic.pool_blocks(6, "tight", 0.5, 33, 0.5) == 119  # 3.5 x 33 and 3
    assert arithmetic.pool_blocks(2, "tight", 0.25, 100, 0.5) == 153  # one request at least
    assert arithmetic.pool_blocks(2, "ample", 0.25, 100, 0.0) == 203  # nothing is ever copied


def test_default_memory_leaves_room_for_weights_and_more() -> None:
    gib = 2**30
    assert arithmetic.kv_memory_default(100 * gib, 15 * gib, 1) == 73 * gib
    assert arithmetic.kv_memory_default(100 * gib, 15 * gib, 2) == int(26.5 * gib)
    assert arithmetic.kv_memory_default(24 * gib, 15 * gib, 2) == 0


# --- variants and order -------------------------------------------------------------------


def test_variants() -> None:
    assert arithmetic.parse_variant("none") == "none"
    assert arithmetic.parse_variant("0.06") == "0.06"
    for bad in ("0", "1", "1.5", "-0.1", "nan", "half", "stock"):
        with pytest.raises(ConfigError, match="--variants: "):
            arithmetic.parse_variant(bad)
    assert arithmetic.largest_ratio(["stock", "none", "0.12", "0.5"]) == 0.5
    assert arithmetic.largest_ratio(["none"]) == 0.0
    assert arithmetic.request_extras("stock") == {}
    assert arithmetic.request_extras("none") == {"vllm_xargs": {"kv_compression": "none"}}
    assert arithmetic.request_extras("0.25") == {"vllm_xargs": {"kv_budget_ratio": 0.25}}
    assert [label(v) for v in ("stock", "none", "0.5", "0.06")] == ["stock", "none", "50 %", "6 %"]


def test_every_round_has_another_order_and_all_variants() -> None:
    names = ["stock", "none", "0.5"]
    orders = [arithmetic.order(names, n) for n in range(6)]
    assert orders[:3] == [
        ["stock", "none", "0.5"],
        ["stock", "0.5", "none"],
        ["0.5", "stock", "none"],
    ]
    assert all(sorted(o) == sorted(names) for o in orders)
    assert {o[0] for o in orders} == set(names)


def test_plan_side_by_side() -> None:
    assert arithmetic.plan(["stock", "none"], rounds=2, warmups=1, one_at_a_time=False) == [
        Batch(
            ("stock", "plugin"),
            ((0, "stock"), (0, "none"), (1, "stock"), (1, "none"), (2, "stock"), (2, "none")),
        )
    ]


def test_plan_one_at_a_time_warms_up_every_server() -> None:
    found = arithmetic.plan(["stock", "none", "0.5"], rounds=2, warmups=1, one_at_a_time=True)
    assert [batch.sides for batch in found] == [("stock",), ("plugin",), ("plugin",), ("stock",)]
    assert found[0].work == ((0, "stock"), (1, "stock"))
    assert found[1].work == ((0, "none"), (0, "0.5"), (1, "none"), (1, "0.5"))


# --- metrics ------------------------------------------------------------------------------

METRICS = """\
# HELP vllm:num_preemptions_total Preemptions.
vllm:num_preemptions_total{engine="0",model_name="a b"} 3.0
vllm:request_success_total{finished_reason="stop"} 1.0
vllm:request_success_total{finished_reason="length"} 4.0
vllm:e2e_request_latency_seconds_bucket{le="0.3"} 7.0
vllm:kv_compression_time_seconds_sum 0.25
vllm:cache_config_info{block_size="32",num_gpu_blocks="476",kv_cache_memory_bytes="7798784"} 1.0
python_gc_objects_collected_total{generation="0"} 9.0
"""


def test_metrics_are_summed_over_labels() -> None:
    found = arithmetic.parse_metrics(METRICS)
    assert found == {
        "vllm:num_preemptions_total": 3.0,
        "vllm:request_success_total": 5.0,
        "vllm:kv_compression_time_seconds_sum": 0.25,
        "vllm:cache_config_info": 1.0,
    }
    config = arithmetic.parse_cache_config(METRICS)
    assert (config["num_gpu_blocks"], config["kv_cache_memory_bytes"]) == ("476", "7798784")
    assert arithmetic.parse_cache_config("vllm:other 1.0\n") == {}


def test_differences_take_missing_counters_as_zero() -> None:
    assert arithmetic.difference({"a": 2.0}, {"a": 5.0}, "a") == 3.0
    assert arithmetic.difference({}, {"a": 5.0}, "a") == 5.0
    assert arithmetic.difference({}, {}, "a") == 0.0


def test_blocks_held_are_those_before_the_last_token() -> None:
    usages = [(0.5, 0.9), (1.1, 0.32), (1.2, 0.08), (1.3, 0.09), (1.4, 0.0), (1.9, 0.01)]
    readings = [Reading(start, start + 0.05, 1.0, usage) for start, usage in usages]
    # 0.9 is of the prefill, 0.0 of no request at all, 0.01 ends after the last token.
    assert arithmetic.blocks_held(readings, 1.0, 1.9, num_blocks=101) == 9
    with pytest.raises(ConfigError, match="read 2 times"):
        arithmetic.blocks_held(readings[:3], 1.0, 1.9, num_blocks=101)


# --- ratios and verdicts ------------------------------------------------------------------


def test_ratios_are_within_rounds() -> None:
    stock = {1: 10.0, 2: 20.0, 3: 0.0}
    assert arithmetic.ratios({1: 12.0, 2: 10.0, 3: 5.0, 4: 5.0}, stock) == [1.2, 0.5]
    assert arithmetic.spread([3.0, 1.0, 2.0, 8.0]) == arithmetic.Spread(2.5, 1.0, 8.0)


def test_interval_of_the_median() -> None:
    # Six coins fall alike with 2/64 = 3.1 %; eight with at most one other 18/256 = 7.0 %.
    for n, ends in ((2, (0, 1)), (5, (0, 4)), (6, (0, 5)), (8, (0, 7)), (9, (1, 7)), (12, (2, 9))):
        assert arithmetic.median_interval(list(range(n))) == ends


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([1.0, 0.995, 1.005], "within 1 %"),
        ([0.99, 1.01], "within 1 %"),
        ([0.98, 0.97], "differs by more than 1 %"),
        ([1.02, 1.5], "differs by more than 1 %"),
        ([0.98, 1.0], "not decidable with this spread"),
        ([0.9, 1.1, 1.0], "not decidable with this spread"),
        ([1.0], "not decidable with fewer than two rounds"),
        ([0.9, *[1.0] * 9], "within 1 %"),  # one outlier of ten does not spoil the median
    ],
)
def test_verdicts(values: list[float], words: str) -> None:
    assert arithmetic.verdict(values) == words


def make_results() -> Results:
    results = Results()
    for number, (stock, none, half) in enumerate([(50.0, 49.75, 60.0), (40.0, 40.0, 50.0)], 1):
        for variant, value in (("0.5", half), ("stock", stock), ("none", none)):
            results.rows.append(Row(SCENARIO, number, 1, variant, "throughput", value))
            results.rows.append(Row(SCENARIO, number, 1, variant, "preemptions", 0.0))
    return results


def test_summary_and_verdict_line() -> None:
    results = make_results()
    assert results.variants(SCENARIO) == ["stock", "none", "0.5"]
    (found,) = summary(results)
    half = found["variants"]["0.5"]
    assert half["throughput"]["ratio_to_stock"] == {"median": 1.225, "low": 1.2, "high": 1.25}
    assert "ratio_to_stock" not in half["preemptions"]  # stock had none
    assert found["none_against_stock"] == {"throughput": "within 1 %"}
    line = "throughput 0.998 [0.995, 1.000] within 1 %"
    assert verdict_line(results, SCENARIO).endswith(line)


def test_table() -> None:
    from rich.console import Console

    console = Console(width=140, file=open(os.devnull, "w"), record=True)  # noqa: SIM115
    console.print(make_table(make_results(), SCENARIO))
    text = console.export_text()
    assert "6 requests, 2 rounds" in text and "7.4 MiB" in text
    assert "45.0 tok/s" in text and "[40.0, 50.0]" in text  # stock's own values
    assert "1.225" in text and "[1.200, 1.250]" in text


# --- files and refusals -------------------------------------------------------------------


def test_csv_is_long_and_complete(tmp_path: Path) -> None:
    about = {"command": "c", "commit": "abc", "versions": {"vllm": "0.32.0"}, "device": "d"}
    log = CsvLog(tmp_path / "a.csv", about)
    log.write(make_results().rows[:2])
    log.close()
    with (tmp_path / "a.csv").open() as file:
        first, second = csv.DictReader(file)
    assert (first["variant"], first["metric"], first["value"]) == ("0.5", "throughput", "60")
    assert (first["unit"], first["pool"], first["prompt_len"]) == (
        "output tokens/s",
        "tight",
        "1024",
    )
    assert json.loads(second["versions"]) == {"vllm": "0.32.0"}
    with pytest.raises(FileExistsError):
        CsvLog(tmp_path / "a.csv", about)


def test_an_existing_folder_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--out: .* exists"):
        check_new_folder(tmp_path)
    args = argparse.Namespace(out=tmp_path)
    with pytest.raises(ConfigError, match="--out"):
        script.run(args, [], None)
    check_new_folder(tmp_path / "new")


def test_no_machine_paths_in_results() -> None:
    words = [str(ROOT / "configs" / "a.yaml"), "/elsewhere/model", "--rounds", "2", "x/y"]
    assert public_words(words, ROOT) == ["configs/a.yaml", "model", "--rounds", "2", "x/y"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--variants", "none", "2"], "--variants: must be none or a ratio"),
        (["--rounds", "0"], "--rounds: must be a whole number from 1 up"),
        (["--tight-fraction", "1"], "--tight-fraction: must be a number above 0 and below 1"),
        (["--kv-memory", "much"], "--kv-memory: must be a size such as 40GiB"),
        (["--models", "gpt"], "--models: invalid choice: 'gpt'"),
        (["--output-len", "2"], "--output-len: at least 4"),
    ],
)
def test_bad_options(capsys, options: list[str], words: str) -> None:
    with pytest.raises(SystemExit):
        script.parse_args(["--out", "x", *options])
    assert words in capsys.readouterr().err


def test_options_of_the_presets_and_of_the_servers() -> None:
    args = script.parse_args(
        ["--out", "x", "--preset", "gpu", "--rounds", "3", "--", "--seed", "1"]
    )
    assert (args.models, args.rounds, args.requests) == (["llama-3-8b", "qwen3-8b"], 3, 0)
    assert args.prompt_lens == [8192, 32_768, 131_072] and args.server_args == ["--seed", "1"]
    args = script.parse_args(["--out", "x", "--preset", "cpu", "--kv-memory", "1GiB"])
    assert (args.requests, args.kv_memory) == (0, 2**30)


def test_scenarios_of_large_models() -> None:
    options = ["--preset", "gpu", "--kv-memory", "40GiB", "--models", "llama-3-8b"]
    args = script.parse_args(["--out", "x", *options])
    found = {(s.prompt_len, s.pool): s for s in script.make_scenarios(args)}
    assert [found[n, "ample"].num_requests for n in args.prompt_lens] == [38, 9, 1]
    for (length, pool), scenario in found.items():
        size = scenario.pool_bytes / (16 * 128 * 1024)
        assert size == int(size) and scenario.pool_bytes <= 40 * 2**30 + 3 * 16 * 128 * 1024
        if pool == "tight":
            assert scenario.pool_bytes <= found[length, "ample"].pool_bytes
            assert size >= 1.5 * (length + 256) / 16  # one request and its copy fit


def test_peaks_are_of_readings_that_saw_requests() -> None:
    idle, few = Reading(0.0, 0.1, 0.0, 0.0), Reading(0.2, 0.3, 1.0, 0.5)
    assert client.peaks([]) == client.peaks([idle, idle]) == {}, "none is not zero"
    many = Reading(0.4, 0.5, 3.0, 0.25)
    assert client.peaks([idle, few, many, idle]) == {"peak_running": 3.0, "peak_kv_usage": 0.5}


def test_stock_vllm_has_everybody_elses_plugins(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    alone = stock_plugins().split(",")
    assert "kvcompress_cpu_triton" in alone and "kvcompress" not in alone
    forked.plugin(tmp_path / "plugin")
    monkeypatch.syspath_prepend(str(tmp_path / "plugin"))
    assert stock_plugins().split(",") == sorted([*alone, "kvcompress_forked"])
    monkeypatch.setenv("VLLM_PLUGINS", "kvcompress,something")
    assert stock_plugins() == "kvcompress_cpu_triton"


# --- for real -----------------------------------------------------------------------------


@pytest.mark.engine
def test_small_real_run(tmp_path: Path) -> None:
    """Two servers, stock, none and 12 %, one round: exact counts, not times."""
    out = tmp_path / "results"
    drop = {"VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_LOGGING_LEVEL"}
    kept = {key: value for key, value in os.environ.items() if key not in drop}
    options = ["--preset", "cpu", "--pools", "ample", "--variants", "none", "0.12"]
    # Enough output that /metrics is read in between on a busy machine, too.
    options += ["--rounds", "1", "--warmups", "0", "--requests", "2", "--output-len", "128"]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--out", str(out), *options],
        capture_output=True,
        text=True,
        timeout=480,
        env=forked.plugin(tmp_path / "plugin", kept),
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "none against stock" in done.stdout
    assert (out / "serving.png").stat().st_size > 10_000
    assert json.loads((out / "serving.json").read_text())["complete"]
    with (out / "serving.csv").open() as file:
        rows = list(csv.DictReader(file))
    values = {(row["variant"], row["metric"]): float(row["value"]) for row in rows}
    assert str(tmp_path) not in (out / "serving.csv").read_text()
    # A block of 32 tokens of 4 layers x 2 KV heads x 32 x float32, keys and values: 64 KiB.
    # The output tokens take blocks 33 to 36; a busy machine may not read /metrics by the last.
    whole = {blocks * 2**16 for blocks in range(33, 37)}
    assert values["stock", "kv_bytes_per_request"] in whole
    assert values["none", "kv_bytes_per_request"] in whole
    # 12 % of 1,024 tokens and 128 of output: 8 blocks.
    assert values["0.12", "kv_bytes_per_request"] <= 8 * 2**16
    assert [values[v, "compactions"] for v in ("stock", "none", "0.12")] == [0, 0, 2]
    # A busy machine may not read /metrics while both run, or while any does.
    peaks = {values.get((v, "peak_running")) for v in ("stock", "none", "0.12")}
    assert 2 in peaks <= {None, 1, 2}
    assert all(value == 0 for (_, metric), value in values.items() if metric == "prefix_hit_tokens")
