"""Runs: what is on disk after a crash, what is measured again, servers that go away."""

import json
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoTokenizer

from vllm_kvcompress.errors import ConfigError
from vllm_kvcompress.evaluation.quality import url_runner
from vllm_kvcompress.evaluation.quality.plan import Planned, TaskOptions, make_plan
from vllm_kvcompress.evaluation.quality.prompts import Prompter
from vllm_kvcompress.evaluation.quality.records import Record, RecordFolder, read_records
from vllm_kvcompress.evaluation.quality.run import Outcome, Stopped, run
from vllm_kvcompress.evaluation.quality.sample import Sample
from vllm_kvcompress.evaluation.quality.url_runner import UrlRunner
from vllm_kvcompress.evaluation.quality.variants import Variant, kept_share, make_variants

OPTIONS = TaskOptions((600,), 2, 2, 8, 0)


def sample(name: str = "1", **fields: Any) -> Sample:
    return Sample(name, "niah_single", "a long text", "\nWhy?", ("42",), "all_in", 4, **fields)


def record(**fields: Any) -> Record:
    known: dict[str, Any] = {
        "task": "niah_single", "sample": "1", "length": 600, "depth": 0.5, "protocol": "visible",
        "policy": "snapkv", "budget": 0.5, "kept": 0.5, "prompt_tokens": 600, "answer": "ä\n",
        "answer_tokens": 2, "score": 1.0, "seconds": 0.1,
    }  # fmt: skip
    return Record(**{**known, **fields})


# --- records ------------------------------------------------------------------------------


def test_a_folder_gives_back_what_was_added(tmp_path: Path) -> None:
    folder = RecordFolder(tmp_path / "new" / "out")
    assert folder.start({"seed": 0}, {}) == []
    odd = record(sample="2", nll=1.5, kl=0.25, answer="a\u2028b\x85c\ud83d\x00")
    folder.add([record(), odd])
    assert folder.start({"seed": 0}, {}) == [record(), odd]


def test_half_a_line_is_dropped_and_the_next_one_is_whole(tmp_path: Path) -> None:
    folder = RecordFolder(tmp_path)
    folder.start({}, {})
    folder.add([record()])
    with (tmp_path / "records.jsonl").open("a") as file:
        file.write('{"task": "niah_si')
    assert list(read_records(tmp_path)) == [record()]
    assert folder.start({}, {}) == [record()]
    folder.add([record(sample="2")])
    assert folder.start({}, {}) == [record(), record(sample="2")]


def test_another_run_is_refused_by_what_differs(tmp_path: Path) -> None:
    RecordFolder(tmp_path).start({"seed": 0, "lengths": (1, 2)}, {})
    RecordFolder(tmp_path).start({"seed": 0, "lengths": (1, 2)}, {})
    with pytest.raises(ConfigError, match=r"--out: .* holds another run \(seed was 0, is 1\)"):
        RecordFolder(tmp_path).start({"seed": 1, "lengths": (1, 2)}, {})


def test_a_line_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "records.jsonl").write_text('{"other": 1}\n')
    with pytest.raises(ConfigError, match=r"records.jsonl:1: no record"):
        list(read_records(tmp_path))


# --- running ------------------------------------------------------------------------------


class Fake:
    """Answers everything, except what it is told to fail on."""

    def __init__(self, refuses: Sequence[str] = (), stops_at: str | None = None) -> None:
        self.refuses, self.stops_at = refuses, stops_at
        self.asked: list[tuple[str, str, list[Variant]]] = []

    def measure(self, sample: Sample, protocol: str, variants: Sequence[Variant]):
        if sample.name in self.refuses:
            raise ConfigError("too long.")
        if sample.name == self.stops_at:
            raise Stopped("gone.")
        self.asked.append((sample.name, protocol, list(variants)))
        for each in variants:
            yield record(
                sample=sample.name, protocol=protocol, policy=each.label, budget=each.budget
            )


def planned(*names: str) -> list[Planned]:
    return [Planned("niah_single", name, lambda name=name: sample(name)) for name in names]


VARIANTS = [Variant("none"), Variant("snapkv", 0.5)]


def measure(
    folder: RecordFolder, runner: Fake, names: str, variants=VARIANTS, protocols=("visible",)
):
    known = folder.start({}, {})
    return run(runner, planned(*names), variants, protocols, folder, known, lambda todo: todo)


def test_only_what_is_missing_is_measured(tmp_path: Path) -> None:
    folder = RecordFolder(tmp_path)
    assert measure(folder, Fake(), "ab") == Outcome(4, 0)
    again = Fake()
    more = [*VARIANTS, Variant("snapkv", 0.25)]
    assert measure(folder, again, "abc", more) == Outcome(5, 0)
    assert again.asked == [
        ("a", "visible", more[2:]),
        ("b", "visible", more[2:]),
        ("c", "visible", more),
    ]
    hidden = Fake()
    measure(folder, hidden, "a", protocols=("visible", "hidden"))
    assert [(name, protocol) for name, protocol, _ in hidden.asked] == [("a", "hidden")]
    assert measure(folder, Fake(), "abc", more) == Outcome(0, 0)


def test_a_sample_that_fails_is_noted_and_the_others_go_on(tmp_path: Path) -> None:
    assert measure(RecordFolder(tmp_path), Fake(refuses="b"), "abc") == Outcome(4, 1)
    (line,) = (tmp_path / "failures.jsonl").read_text().splitlines()
    assert json.loads(line) == {"task": "niah_single", "sample": "b", "why": "too long."}


def test_a_runner_that_stops_loses_nothing(tmp_path: Path) -> None:
    folder = RecordFolder(tmp_path)
    with pytest.raises(Stopped):
        measure(folder, Fake(stops_at="b"), "abc")
    assert {each.sample for each in read_records(tmp_path)} == {"a"}
    assert measure(folder, Fake(), "abc") == Outcome(4, 0)


# --- plans and variants -------------------------------------------------------------------


@pytest.fixture(scope="module")
def prompter(probe_model: str) -> Prompter:
    return Prompter(AutoTokenizer.from_pretrained(probe_model))


def test_tasks_take_turns(prompter: Prompter) -> None:
    plan = make_plan(["niah", "ruler_vt", "niah_single"], OPTIONS, prompter)
    assert [(each.task, each.name) for each in plan] == [
        ("niah_single", "600-0"), ("ruler_vt", "600-0"),
        ("niah_single", "600-1"), ("ruler_vt", "600-1"),
    ]  # fmt: skip
    assert plan[0].make().name == "600-0"


def test_own_texts_and_longbench_are_read(prompter: Prompter, tmp_path: Path) -> None:
    text = tmp_path / "mine.txt"
    text.write_text(" ".join(prompter.words[:400]) * 10)
    row = {"input": "Why?", "context": "Long.", "answers": ["x"], "length": 1, "dataset": "qasper",
           "language": "en", "all_classes": None, "_id": "one"}  # fmt: skip
    (tmp_path / "qasper.jsonl").write_text(json.dumps(row) + "\n")
    plan = make_plan([f"text:{text}", f"longbench:{tmp_path}"], OPTIONS, prompter)
    assert {each.task for each in plan} == {"text", "qasper"}
    assert {each.make().metric for each in plan} == {"continuation", "qa_f1"}


@pytest.mark.parametrize("task", ["nope", "longbench", "text:", "niah:3"])
def test_an_unknown_task_is_refused(prompter: Prompter, task: str) -> None:
    with pytest.raises(ConfigError, match=r"--tasks: there is no task .*; allowed are niah"):
        make_plan([task], OPTIONS, prompter)


def test_a_length_without_room_is_one_sentence(prompter: Prompter) -> None:
    plan = make_plan(["ruler_multiquery"], TaskOptions((64,), 1, 1, 8, 0), prompter)
    with pytest.raises(ConfigError, match="--lengths: ruler_multiquery of 64 tokens: the shortest"):
        plan[0].make()


def test_the_baseline_is_always_there_and_once() -> None:
    found = make_variants(["none", "snapkv", "snapkv"], [0.5, 0.25])
    assert found == [Variant("none"), Variant("snapkv", 0.5), Variant("snapkv", 0.25)]


def test_files_are_policies_by_their_stem(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("policy: {name: keydiff}\nbudget: {tokens: 300}\n")
    (each,) = make_variants([str(path)], [0.25])[1:]
    assert each.label == "mine"
    assert each.setting().budget.ratio == 0.25 and each.setting().policy.name == "keydiff"
    (tmp_path / "other").mkdir()
    twin = tmp_path / "other" / "mine.yaml"
    twin.write_text(path.read_text())
    with pytest.raises(ConfigError, match="are both called mine"):
        make_variants([str(path), str(twin)], [0.5])


def test_policies_without_a_prompts_compaction_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="rkv compresses only while decoding"):
        make_variants(["rkv"], [0.5])
    assert make_variants(["rkv"], [0.5], is_long=True)[1:] == [Variant("rkv", 0.5)]
    path = tmp_path / "rests.yaml"
    path.write_text("policy: {name: keydiff}\nbudget: {tokens: 300}\ntrigger: pressure\n")
    with pytest.raises(ConfigError, match="only while memory is scarce"):
        make_variants([str(path)], [0.5])


def test_kept_bytes_are_whole_blocks_of_all_layers() -> None:
    setting = Variant("snapkv", 0.25).setting()
    assert kept_share(None, 1000, 4, 32, 1) == 1
    # ceil(0.25 * 1000) = 250 tokens are 8 blocks of 32; 8 tokens behind the last whole block stay.
    assert kept_share(setting, 1000, 4, 32, 1) == pytest.approx(kept_share(setting, 1000, 8, 32, 1))
    assert 0.25 <= kept_share(setting, 1000, 4, 32, 1) <= 0.25 + 2 * 32 / 1000


# --- a server somewhere -------------------------------------------------------------------


class Server(BaseHTTPRequestHandler):
    """Answers 42, or what `fault` says."""

    fault: str | None = None
    no_room = 0
    bodies: list[dict[str, Any]] = []

    def log_message(self, *args: Any) -> None:
        pass

    def reply(self, status: int, body: Any) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self) -> None:
        if self.path == "/metrics":
            name = "vllm:kv_compression_uncompressed_requests"
            rows = {"opted_out": 7, "no_room": Server.no_room, "short_prompt": 1}
            lines = [f"# TYPE {name} counter"]
            lines += [f'{name}_total{{engine="0",reason="{r}"}} {n}.0' for r, n in rows.items()]
            self.reply(200, "\n".join(lines).encode())
            return
        self.reply(200, {"data": [{"id": "served", "max_model_len": 4096}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        Server.bodies.append(body)
        if Server.fault == "400":
            self.reply(400, {"error": {"message": "kv_budget_ratio: no"}})
        elif Server.fault == "garbage":
            self.reply(200, b"<html>")
        elif Server.fault == "500 once":
            Server.fault = None
            self.reply(500, {})
        elif Server.fault == "gone":
            self.close_connection = True
            self.connection.close()
        else:
            answer = {"choices": [{"text": " 42."}], "usage": {"completion_tokens": 3}}
            self.reply(200, answer)


@pytest.fixture
def server(monkeypatch) -> Iterator[str]:
    monkeypatch.setattr(url_runner, "PAUSE_S", 0.01)
    monkeypatch.setattr(Server, "fault", None)
    monkeypatch.setattr(Server, "bodies", [])
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_address[1]}/v1"
        running.shutdown()


def test_a_server_is_asked_with_options_per_request(server: str, prompter: Prompter) -> None:
    each = [Variant("none"), Variant("snapkv", 0.25), Variant("server")]
    found = list(UrlRunner(server, prompter, 1).measure(sample(), "visible", each))
    assert [record.score for record in found] == [1, 1, 1]
    assert [record.kept for record in found] == [1.0, None, None]
    assert found[0].answer_tokens == 3 and found[0].answer == " 42."
    xargs = [body.get("vllm_xargs") for body in Server.bodies]
    assert xargs == [
        {"kv_compression": "none"}, {"kv_compression": "snapkv", "kv_budget_ratio": 0.25}, None
    ]  # fmt: skip
    # One prompt's settings share no blocks: what others hold is not worth a compaction.
    salts = [body.get("cache_salt") for body in Server.bodies]
    assert len(set(salts)) == 3 and salts[2] is None
    assert Server.bodies[0]["prompt"] == prompter.of(sample()).token_ids
    assert Server.bodies[0]["model"] == "served" and Server.bodies[0]["temperature"] == 0


def test_requests_served_uncompressed_are_counted(
    server: str, prompter: Prompter, monkeypatch
) -> None:
    runner = UrlRunner(server, prompter, 1)
    assert runner.uncompressed() == {}
    monkeypatch.setattr(Server, "no_room", 3)
    assert runner.uncompressed() == {"no_room": 3}


def test_a_refusal_is_the_samples_failure(server: str, prompter: Prompter, monkeypatch) -> None:
    runner = UrlRunner(server, prompter, 2)
    for fault, words in (("400", "HTTP 400: kv_budget_ratio: no"), ("garbage", "HTTP 200: <html>")):
        monkeypatch.setattr(Server, "fault", fault)
        with pytest.raises(ConfigError, match=words):
            list(runner.measure(sample(), "visible", VARIANTS))


def test_a_hiccup_is_waited_out_and_a_dead_server_stops_the_run(
    server: str, prompter: Prompter, monkeypatch
) -> None:
    runner = UrlRunner(server, prompter, 1)
    monkeypatch.setattr(Server, "fault", "500 once")
    assert len(list(runner.measure(sample(), "visible", VARIANTS))) == 2
    monkeypatch.setattr(Server, "fault", "gone")
    with pytest.raises(Stopped, match="does not answer any more"):
        list(runner.measure(sample(), "visible", VARIANTS))


def test_what_a_server_cannot_do_is_said(server: str, prompter: Prompter) -> None:
    runner = UrlRunner(server, prompter, 1)
    with pytest.raises(ConfigError, match="--protocol: .* allowed is visible"):
        list(runner.measure(sample(), "hidden", VARIANTS))
    predicted = SimpleNamespace(metric="continuation", task="text")
    with pytest.raises(ConfigError, match="text needs logits"):
        list(runner.measure(predicted, "visible", VARIANTS))  # type: ignore[arg-type]


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "nonsense", "http://"])
def test_nobody_there_is_one_sentence(url: str, prompter: Prompter) -> None:
    with pytest.raises(ConfigError, match="names no model at /v1/models"):
        UrlRunner(url, prompter, 1)
