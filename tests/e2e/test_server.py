"""``vllm serve`` as a user starts it: HTTP, per-request options, metrics, the line at start-up."""

import json
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.serving import VLLM, Server, environment, serving
from vllm_kvcompress.cli.main import main
from vllm_kvcompress.evaluation.tasks.needle import is_right
from vllm_kvcompress.host.prometheus import COUNTERS
from vllm_kvcompress.request_options import REQUEST_KEYS

pytestmark = pytest.mark.engine

# Otherwise as a user would: the model's bfloat16, torch.compile on. Other engines use neither.
OPTIONS = [
    *["--max-model-len", "4096", "--kv-cache-memory-bytes", "67108864", "--max-num-seqs", "4"],
]
COUNTED = ("requests_total", "compactions_total", "blocks_taken_total", "blocks_returned_total")


@pytest.fixture(scope="module")
def server(probe_model: str, tmp_path_factory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("server") / "log.txt"
    # The probe model's four layers retrieve in layers of their own: each ranks for itself.
    setting = ["--kv-compression", "windowkv", "--kv-compression-config.layer_groups.count=4"]
    setting += ["--kv-compression-config.policy.window_size=32"]
    setting += ["--kv-compression-config.budget.floor=100"]
    with serving(probe_model, log, *OPTIONS, *setting, as_a_user=True) as running:
        yield running


def test_one_line_at_start_up_says_what_it_saves(server: Server) -> None:
    lines = [line for line in server.log.read_text().splitlines() if "KV compression:" in line]
    assert len(lines) == 1
    for words in ("policy windowkv", "12% of the prompt", "4 layer group(s)", "of 512 blocks"):
        assert words in lines[0]


def test_every_family_is_there_from_the_start(server: Server) -> None:
    """Runs before the first request that compresses; vLLM's own labels are on every sample."""
    text = httpx.get(f"{server.url}/metrics", timeout=30).text
    for name, family in COUNTERS.items():
        samples = re.findall(rf"^vllm:kv_compression_{name}_total(\{{.*\}}) (\S+)$", text, re.M)
        assert samples, name
        for labels, value in samples:
            assert 'model_name="probe"' in labels and 'engine="0"' in labels
            assert all(f'{label}="' in labels for label in family.labels)
            assert float(value) == 0, (name, labels)
    for name in ("kept_ratio", "time_seconds"):
        assert re.search(rf'^vllm:kv_compression_{name}_count\{{.*engine="0".*\}} 0.0$', text, re.M)


def test_answers_and_counts(server: Server, samples) -> None:
    sample = samples[4]
    before = server.metric("vllm:kv_compression_requests_total", policy="windowkv")
    response = server.complete(sample.prompt)
    assert response.status_code == 200
    assert is_right(response.json()["choices"][0]["text"], sample.answer)
    counted = {
        name: server.metric(f"vllm:kv_compression_{name}", policy="windowkv") for name in COUNTED
    }
    assert counted["requests_total"] == before + 1
    assert counted["blocks_returned_total"] > counted["blocks_taken_total"] > 0
    at_the_end = server.metric("vllm:kv_compression_compactions_total", trigger="prompt")
    assert at_the_end == counted["compactions_total"]
    assert server.metric("vllm:kv_compression_tasks_total", decided_by="classifier") >= 1
    for group in "0123":
        evicted = server.metric("vllm:kv_compression_tokens_evicted_total", layer_group=group)
        assert evicted >= 1200
    assert server.metric("vllm:kv_compression_kept_ratio_count", policy="windowkv") >= 1
    assert server.metric("vllm:kv_compression_time_seconds_count") >= 1
    assert server.metric("vllm:kv_compression_time_seconds_sum") > 0


def test_chat(server: Server, samples) -> None:
    sample = samples[6]
    body = {
        "model": "probe",
        "messages": [{"role": "user", "content": sample.prompt}],
        "max_tokens": 10,
        "temperature": 0,
    }
    response = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=120)
    assert is_right(response.json()["choices"][0]["message"]["content"], sample.answer)


def test_options_of_one_request(server: Server, samples) -> None:
    requests = server.metric("vllm:kv_compression_requests_total")
    opted_out = server.metric("vllm:kv_compression_uncompressed_requests_total", reason="opted_out")
    response = server.complete(samples[5].prompt, vllm_xargs={"kv_compression": "none"})
    assert response.status_code == 200
    assert server.metric("vllm:kv_compression_requests_total") == requests
    found = server.metric("vllm:kv_compression_uncompressed_requests_total", reason="opted_out")
    assert found == opted_out + 1
    decided = server.metric("vllm:kv_compression_tasks_total", task="aggregation")
    assert server.complete(samples[5].prompt, vllm_xargs={"kv_task": "aggregation"}).is_success
    after = server.metric("vllm:kv_compression_tasks_total", task="aggregation")
    assert after == decided + 1
    xargs = {"kv_compression": "keydiff", "kv_budget_tokens": 640, "kv_pin": [0, 50, 90, 120]}
    assert server.complete(samples[5].prompt, vllm_xargs=xargs).status_code == 200
    assert server.metric("vllm:kv_compression_requests_total", policy="keydiff") == 1


@pytest.mark.parametrize(
    ("xargs", "words"),
    [
        ({"kv_compression": "zip"}, ["no preset 'zip'", "windowkv", "none"]),
        ({"kv_budget_ratio": 2}, ["kv_budget_ratio", "at most 1"]),
        ({"kv_budget_tokens": -1}, ["kv_budget_tokens", "from 1 up"]),
        ({"kv_pin": [0, 100000]}, ["kv_pin", "its length"]),
        ({"kv_budget_token": 5}, ["unknown key", "did you mean 'kv_budget_tokens'"]),
        ({"kv_task": "qa"}, ["kv_task", "auto, localization or aggregation"]),
        ({"kv_task": "auto", "kv_compression": "snapkv"}, ["snapkv does not depend on the task"]),
        ({"kv_session": ""}, ["kv_session", "a text of 1 to 128 characters"]),
        ({"kv_session": "c", "kv_compression": "h2o"}, ["kv_session", "h2o scores whole prompts"]),
        ({"kv_compression": "rkv"}, ["reads 8 queries while decoding", "keeps 0"]),
    ],
)
def test_bad_options_are_http_400_and_disturb_nothing(server, samples, xargs, words) -> None:
    response = server.complete(samples[0].prompt, vllm_xargs=xargs)
    assert response.status_code == 400
    message = response.json()["error"]["message"]
    for word in words:
        assert word in message
    assert server.complete("One, two", max_tokens=2).status_code == 200


def odd_values() -> list[tuple[str, Any]]:
    """A few values for every option; whichever is right generates two tokens at most."""
    values = ["../x", "\n\x1b[2J", "\ud800", "", "1", -1, 0, 1.5, 1e300, float("nan"), 2**63, True]
    values += [None, [], ["x"], [1] * 1000, [0, -1], {"a": 1}, [[1]], "x" * 10**5]
    return [(key, value) for key in REQUEST_KEYS for value in values]


def test_bad_input_disturbs_nobody(server: Server, samples) -> None:
    """160 odd values, while a good request is served again and again; 1,000 of each are tried
    without a server in tests/bad_input."""
    good = {"max_tokens": 6, "ignore_eos": True, "return_token_ids": True}
    good["vllm_xargs"] = {"kv_task": "localization"}

    def tokens(_: int) -> list[int]:
        response = server.complete(samples[8].prompt, **good)
        return response.json()["choices"][0]["token_ids"]

    expected, statuses = tokens(0), Counter()
    with ThreadPoolExecutor(1) as beside:
        meanwhile = beside.map(tokens, range(4))
        for key, value in odd_values():
            body = {"model": "probe", "prompt": "One, two", "max_tokens": 2, "temperature": 0}
            body["vllm_xargs"] = {key: value}
            url, content = f"{server.url}/v1/completions", json.dumps(body)
            headers = {"content-type": "application/json"}
            response = httpx.post(url, content=content, headers=headers, timeout=120)
            statuses[response.status_code] += 1
            assert response.status_code in (200, 400), (key, value, response.text[:500])
            assert len(response.content) < 5000, (key, value)
            if response.status_code == 400:
                message = response.json()["error"]["message"]
                assert "\x1b" not in message
        assert list(meanwhile) == [expected] * 4
    assert statuses[400] > 120 and statuses[200] > 3, statuses
    assert tokens(0) == expected
    log = server.log.read_bytes()
    assert b"\x1b[2J" not in log and len(log) < 5 * 2**20


def test_ten_megabytes_are_not_echoed(server: Server) -> None:
    for xargs in (
        {"kv_session": "x" * 10**7},
        {"kv_pin": [1] * 10**5},
        {"kv_pin" + "x" * 10**6: 1},
    ):
        response = server.complete("One, two", max_tokens=1, vllm_xargs=xargs)
        assert response.status_code == 400 and len(response.content) < 1000
    assert server.log.stat().st_size < 5 * 2**20


def test_a_disconnecting_client_leaves_no_blocks_behind(server: Server, samples) -> None:
    body = {"model": "probe", "prompt": samples[7].prompt, "max_tokens": 2000, "stream": True}
    body["ignore_eos"] = True
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=120) as response:
        next(response.iter_lines())
    deadline = time.monotonic() + 60
    while server.metric("vllm:num_requests_running") and time.monotonic() < deadline:
        time.sleep(0.5)
    server.complete("One, two", max_tokens=2)  # the gauges are renewed by a step
    assert server.metric("vllm:num_requests_running") == 0
    assert server.metric("vllm:kv_cache_usage_perc") < 0.02


def test_an_unknown_preset_ends_the_program_before_the_model_is_loaded(probe_model: str) -> None:
    done = subprocess.run(
        [str(VLLM), "serve", probe_model, "--kv-compression", "windokv"],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment(),
    )
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("vllm: error: --kv-compression: ")
    assert "Loading" not in done.stderr + done.stdout


def test_eval_asks_this_server(
    server: Server, probe_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`kvcompress eval --url` with policies by name; the server counts what it was asked."""
    names = ("keydiff", "snapkv")
    before = [server.metric("vllm:kv_compression_requests_total", policy=name) for name in names]
    words = ["--policies", ",".join(names) + ",server", "--budgets", "0.25", "--tasks", "niah"]
    words += ["--lengths", "700", "--samples", "2", "--no-chat", "--out", str(tmp_path / "out")]
    assert main(["eval", "--url", server.url, "--model", probe_model, *words]) == 0
    lines = (tmp_path / "out" / "records.jsonl").read_text().splitlines()
    found = Counter(record["policy"] for record in map(json.loads, lines))
    assert found == {"none": 2, "keydiff": 2, "snapkv": 2, "server": 2}
    assert (tmp_path / "out" / "report.html").is_file()
    after = [server.metric("vllm:kv_compression_requests_total", policy=name) for name in names]
    assert [b - a for a, b in zip(before, after, strict=True)] == [2, 2]
    assert "served uncompressed" not in capsys.readouterr().err


def test_the_client_example(server: Server, root: Path) -> None:
    """examples/client.py as its first lines say; test_examples.py has the offline one."""
    before = server.metric("vllm:kv_compression_requests_total", policy="windowkv")
    command = [sys.executable, str(root / "examples" / "client.py"), server.url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "refused: kv_budget_ratio: must be greater than 0 and at most 1" in done.stdout
    assert 'policy="keydiff"' in done.stdout
    assert server.metric("vllm:kv_compression_requests_total", policy="windowkv") == before + 3


def test_the_questions_example(server: Server, root: Path) -> None:
    """examples/questions.py: of three questions at once, two find the text compressed."""
    outcome = "vllm:kv_compression_shared_prefix_requests_total"
    command = [sys.executable, str(root / "examples" / "questions.py"), server.url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    first, *answers, last = done.stdout.splitlines()
    num_tokens = int(re.findall(r"\d+", first)[0])
    assert len(answers) == 3 and num_tokens > 600
    # Of whole blocks.
    assert 2 * (num_tokens - 32) < int(re.findall(r"\d+", last)[0]) <= 2 * num_tokens
    assert server.metric(outcome, outcome="computed") == 1
    assert server.metric(outcome, outcome="reused") == 2


def test_the_chat_example(server: Server, root: Path) -> None:
    """examples/chat.py: its later turns compute little but what they bring."""
    outcome = "vllm:kv_compression_session_requests_total"
    before = server.metric(outcome, outcome="reused")
    command = [sys.executable, str(root / "examples" / "chat.py"), server.url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    counts = [[int(n) for n in re.findall(r"\d+", line)] for line in done.stdout.splitlines()]
    (_, first), (second_len, second), (third_len, third) = counts
    assert first == 0 and second_len - 80 < second < second_len < third < third_len
    assert server.metric(outcome, outcome="reused") == before + 2
    assert server.metric("vllm:kv_compression_session_tokens_total") > 1000
