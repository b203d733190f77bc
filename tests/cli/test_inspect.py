"""The command `kvcompress inspect`: it shows what the replay keeps, and refuses in one sentence."""

import io
import json
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lab.random_models import distinct_tokens, write_random_model
from vllm_kvcompress.cli.main import main
from vllm_kvcompress.config.reading import parse_config
from vllm_kvcompress.evaluation import inspection_page
from vllm_kvcompress.evaluation.inspected_prompt import (
    InspectedPrompt,
    Piece,
    load_tokenizer,
    read_prompt,
)
from vllm_kvcompress.evaluation.inspection import (
    InspectedSetting,
    binned,
    inspect_prompt,
    load_replay,
)
from vllm_kvcompress.evaluation.replay import Replay
from vllm_kvcompress.evaluation.seeds import prompt_seed

Run = Callable[..., tuple[int, str, str]]

NEEDLE = "The number for calm-meadow is 4263815."
TEXT = " ".join(f"Line {n}: the grass is green." for n in range(40)) + f" {NEEDLE} What is it?"
SHORT = '{"min_prompt_len": 0}'


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], probe_model: str) -> Run:
    """Call `kvcompress inspect` on the probe model; return status, output and error output."""

    def call(*options: str, setting: str = "snapkv", model: str = probe_model) -> Any:
        given = ["--model", model, "--kv-compression", setting, "--kv-compression-config", SHORT]
        status = main(["inspect", *given, *options])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_model(tmp_path_factory.mktemp("qwen"), "qwen3")


def read(run: Run, *options: str, **more: str) -> dict[str, Any]:
    status, out, err = run("--json", *options, **more)
    assert status == 0, err
    return json.loads(out)


def positions(spans: list[list[int]]) -> list[int]:
    return [position for start, end in spans for position in range(start, end)]


# --- what survives ------------------------------------------------------------------------


def test_survivors_are_the_replays(run: Run, probe_model: str) -> None:
    found = read(run, "--text", TEXT, "--budget", "0.3", "--no-chat")
    tokenizer, replay = load_tokenizer(Path(probe_model)), Replay(probe_model, 16)
    ids = tokenizer.encode(TEXT)
    overrides = {"min_prompt_len": 0, "budget": {"ratio": 0.3}}
    config = parse_config("snapkv", overrides)
    kept = replay.survivors(replay.prefill(ids), config, prompt_seed(ids))
    assert found["prompt_tokens"] == len(ids) and not found["in_chat_template"]
    assert parse_config(found["setting"]) == config
    for layer, rows in enumerate(kept):
        for spans, row in zip(found["survivors"][str(layer)], rows, strict=True):
            assert positions(spans) == sorted(row.tolist())
    assert "".join(each["text"] for each in found["pieces"]) == "<s>" + TEXT


@pytest.mark.parametrize("preset", ["windowkv", "random", "h2o", "keydiff"])
def test_survivors_on_a_model_without_a_tokenizer(qwen: Path, preset: str) -> None:
    ids = distinct_tokens(400)
    replay = load_replay(qwen, 16)
    inside = {"trigger": "prompt", "prompt_interval": 64} if preset == "keydiff" else {}
    config = parse_config(preset, {"min_prompt_len": 0, **inside})
    assert config is not None
    config = config.by_task["aggregation"] if config.tasks else config
    prompt = InspectedPrompt(ids, [Piece("a", i, i + 1) for i in range(400)], False, None)
    found = inspect_prompt(replay, prompt, InspectedSetting(config, None, None))
    expected = replay.survivors(replay.prefill(ids), config, prompt_seed(ids))
    for layer, rows in enumerate(expected):
        for head, row in enumerate(rows):
            assert np.flatnonzero(found.kept[layer, head]).tolist() == sorted(row.tolist())
    assert any("every 64 tokens inside" in note for note in found.notes) == bool(inside)
    leaders = [row.leader for row in found.rows()]
    assert leaders == ([0, 1, 2, 3] if preset == "windowkv" else [None])


def test_survivors_in_codebooks_are_counted(qwen: Path) -> None:
    """spindlekv codes the first of four layers: 20 % and twice the rest, all of it in entries."""
    ids = distinct_tokens(400)
    config = parse_config("spindlekv", {"min_prompt_len": 0})
    assert config is not None
    prompt = InspectedPrompt(ids, [], False, None)
    found = inspect_prompt(load_replay(qwen, 16), prompt, InspectedSetting(config, None, None))
    assert [row.is_coded for row in found.rows()] == [True, False, False, False]
    counts = found.kept.sum(axis=2)
    assert (counts == counts[:, :1]).all()
    assert 0 < counts[0, 0] < 400 and counts[0, 0] > counts[3, 0]


def test_needle_shares_by_hand(run: Run) -> None:
    """StreamingLLM keeps 4 sinks and the end, so a needle is cut where the end begins."""
    found = read(run, "--text", TEXT, "--needle", NEEDLE, "--no-chat", setting="streaming_llm")
    needle, length = found["needle_tokens"], found["prompt_tokens"]
    pieces = {each["tokens"][0]: each["text"] for each in found["pieces"]}
    assert "".join(pieces[token] for token in needle).strip() == NEEDLE
    region = length // 16 * 16
    kept = -(-(max(64, int(0.12 * length)) - (length - region)) // 16) * 16
    first = region - (kept - 4)
    assert positions(found["survivors"]["0"][0]) == [*range(4), *range(first, length)]
    inside = sum(token >= first for token in needle) / len(needle)
    (group,) = found["layer_groups"]
    assert np.allclose(group["needle_kept"], inside)
    around = "".join(pieces[token] for token in range(first - 12, first + 12))
    half = read(run, "--text", TEXT, "--needle", around, "--no-chat", setting="streaming_llm")
    assert half["needle_tokens"] == list(range(first - 12, first + 12))
    assert np.allclose(half["layer_groups"][0]["needle_kept"], 0.5)


def test_layers_and_heads_for_people(run: Run) -> None:
    status, out, err = run("--text", TEXT, "--needle", NEEDLE, "--layers", "3,0", "--budget", "0.3")
    assert (status, err) == (0, "")
    rows = [line.split() for line in out.splitlines()]
    table = rows[next(i for i, row in enumerate(rows) if row[:2] == ["layer", "group"]) + 2 :]
    assert [row[:2] for row in table[:2]] == [["0", "0"], ["0", "3"]]
    assert "each layer" in out and " needle" in out and "tokens …" in out
    full = run("--text", TEXT, "--full")[1]
    assert "tokens …" not in full
    assert "Line 17: the grass is green." in " ".join(full.split())


def test_the_task_is_the_classifiers(run: Run) -> None:
    found = read(run, "--text", TEXT, setting="windowkv")
    assert (found["task"], found["task_decided_by"]) == ("localization", "classifier")
    out = run("--text", TEXT, setting="windowkv")[1]
    assert "localization (by the classifier, as the server decides)" in out
    assert "layer 3" in out


def test_answers_side_by_side(run: Run) -> None:
    options = ("--text", TEXT, "--max-tokens", "4", "--budget", "1")
    answers = read(run, *options)["answers"]
    assert answers["whole"] == answers["compressed"]
    assert answers["num_equal"] == answers["num_tokens"] <= 4
    assert "over the survivors" in run(*options)[1]


def test_prompts_of_files_and_standard_input(run: Run, tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "prompt.txt"
    path.write_text(TEXT, encoding="utf-8")
    from_file = read(run, "--prompt", str(path))
    monkeypatch.setattr("sys.stdin", io.StringIO(TEXT))
    assert read(run, "--prompt", "-") == from_file == read(run, "--text", TEXT)


# --- the prompt ---------------------------------------------------------------------------


def test_characters_of_several_tokens_are_one_piece(probe_model: str) -> None:
    tokenizer = load_tokenizer(Path(probe_model))
    prompt = read_prompt(tokenizer, "a 🦙 é\n", False, "🦙")
    assert [piece.text for piece in prompt.pieces] == ["<s>", "a", " ", "🦙", " ", "é", "\n"]
    llama = prompt.pieces[3]
    assert prompt.needle == list(range(llama.start, llama.end)) and llama.end - llama.start == 4
    assert [piece.end for piece in prompt.pieces][-1] == len(prompt.token_ids)


def test_a_needle_may_be_there_twice(probe_model: str) -> None:
    tokenizer = load_tokenizer(Path(probe_model))
    prompt = read_prompt(tokenizer, "a b a", False, "a")
    texts = [piece.text.strip() for piece in prompt.pieces if piece.start in (prompt.needle or ())]
    assert texts == ["a", "a"]


def test_stretches_of_a_prompt() -> None:
    assert binned(np.array([0.0, 1.0, 1.0, 1.0]), 2) == [0.5, 1.0]
    assert binned(np.array([0.0, 1.0]), 80) == [0.0, 1.0]


# --- the page -----------------------------------------------------------------------------


class Page(HTMLParser):
    """Tags, attributes and the prompt's text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.shown = ""
        self.in_text = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.in_text |= dict(attrs).get("id") == "text"
        if tag not in ("meta", "rect", "circle"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("rect", "circle"):
            assert self.open.pop() == tag
        self.in_text &= tag != "div"

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.shown += data * self.in_text


def test_the_page_needs_nothing_from_outside(run: Run, tmp_path: Path) -> None:
    bad = "</div><script>alert(1)</script>&amp; {braces} \x1b[31m\u202e" + TEXT
    path = tmp_path / "page.html"
    options = ("--needle", NEEDLE, "--html", str(path), "--max-tokens", "2", "--budget", "0.3")
    status, out, err = run("--text", bad, "--no-chat", *options)
    assert status == 0, err
    assert "\x1b[31m" not in out and "\u202e" not in out
    html = path.read_text(encoding="utf-8")
    page = Page(html)
    assert page.open == []
    assert "http:" not in html and "https:" not in html and "@import" not in html
    assert "url(" not in html
    for tag, attributes in page.tags:
        assert tag not in ("link", "img", "iframe", "object", "base", "a")
        assert not attributes.keys() & {"src", "href", "onload", "onerror"}
    assert [attributes.get("type") for tag, attributes in page.tags if tag == "script"] == [
        "application/json",
        None,
    ]
    safe = bad.replace("\x1b", "\u241b").replace("\u202e", "\ufffd")
    assert page.shown == "<s>" + safe
    assert "prefers-color-scheme: dark" in html and 'name="viewport"' in html


def test_the_page_shows_every_share(run: Run, tmp_path: Path) -> None:
    """Without the script: the classes and titles of the cells; with it: their bits."""
    path = tmp_path / "page.html"
    found = read(run, "--text", TEXT, "--budget", "0.3", "--html", str(path))
    page = Page(path.read_text(encoding="utf-8"))
    spans = [a for tag, a in page.tags if tag == "span" and "title" in a]
    shares = {each["tokens"][0]: each["kept_share"] for each in found["pieces"]}
    starts = []
    for attributes in spans:
        where, _, share = str(attributes["title"]).partition(": ")
        starts.append(int(where.split()[1]))
        assert share == f"{shares[starts[-1]]:.0%}"
        expected = inspection_page.level(shares[starts[-1]])
        assert attributes["class"] == f"l{expected}"
    text = path.read_text(encoding="utf-8")
    bits = json.loads(text.split('id="kept">')[1].split("</script>")[0])
    for layer, heads in enumerate(bits):
        for head, row in enumerate(heads):
            digits = np.unpackbits(np.frombuffer(bytes.fromhex(row), np.uint8))
            kept = set(positions(found["survivors"][str(layer)][head]))
            assert [bool(bit) for bit in digits[: len(starts)]] == [s in kept for s in starts]


def test_levels_set_none_and_all_apart() -> None:
    shares = [0.0, 0.001, 0.5, 0.999, 1.0]
    assert [inspection_page.level(share) for share in shares] == [0, 1, 5, 9, 10]


# --- what is said and refused -------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ('{"trigger": "interval"}', ["trigger interval", "only while decoding, every 128"]),
        ('{"min_prompt_len": 9999}', ["fewer than min_prompt_len (9999)", "leaves it whole"]),
        ('{"min_prompt_len": 0, "budget": {"ratio": 1}}', ["no whole block to free"]),
        ('{"min_prompt_len": 0, "trigger": "both"}', ["decoding compresses further"]),
        ('{"min_prompt_len": 0, "trigger": "pressure"}', ["started while memory was scarce"]),
        ('{"min_prompt_len": 0, "mode": "draft"}', ["the mode draft evicts nothing"]),
    ],
)
def test_what_the_picture_does_not_show_is_said(run: Run, override: str, words: list[str]) -> None:
    status, out, err = run("--text", TEXT, "--kv-compression-config", override)
    assert status == 0 and out
    assert err.startswith("kvcompress: warning: ") and err.count("\n") == 1
    for word in words:
        assert word in err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], ["--prompt, --text: give exactly one"]),
        (["--text", "a", "--prompt", "-"], ["give exactly one"]),
        (["--text", "", "--no-chat"], ["the prompt is empty"]),
        (["--text", "a\udcff"], ["not valid UTF-8"]),
        (["--prompt", "no/such.txt"], ["no/such.txt", "No such file"]),
        (["--text", TEXT, "--needle", "moon"], ["--needle", "does not hold this text"]),
        (["--text", TEXT, "--needle", ""], ["--needle", "does not hold this text"]),
        (["--text", TEXT, "--layers", "0,a"], ["--layers", "'0,a'", "0,7,12"]),
        (["--text", TEXT, "--layers", "4"], ["there is no layer 4", "0 to 3"]),
        (
            ["--text", TEXT, "--kv-compression", "none", "--kv-compression-config", "{}"],
            ["nothing to look at", "snapkv"],
        ),
        (["--text", TEXT, "--kv-compression", "snapvk"], ["did you mean 'snapkv'"]),
        (["--text", TEXT, "--kv-compression-config", "{"], ["not valid JSON"]),
        (["--text", TEXT, "--model", "nowhere"], ["--model", "no folder nowhere"]),
        (["--text", TEXT, "--html", "no/such/page.html"], ["--html", "no folder no/such"]),
        (["--text", TEXT * 30], ["max_position_embeddings (8192)", "shorten it"]),
        (["--text", TEXT, "--device", "moon"], ["--model, --device", "moon"]),
    ],
)
def test_bad_input_is_one_sentence(run: Run, options: list[str], words: list[str]) -> None:
    status, out, err = run(*options)
    assert (status, out) == (1, "")
    assert err.startswith("kvcompress: error: ") and err.count("\n") == 1
    assert err.endswith(".\n")
    for word in words:
        assert word in err


def test_files_that_are_no_prompt(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes("caf\xe9".encode("latin-1"))
    assert run("--prompt", str(path))[::2] == (
        1,
        f"kvcompress: error: --prompt: {path} is not UTF-8 text.\n",
    )
    assert "Is a directory" in run("--prompt", str(tmp_path))[2]
    assert "Is a directory" in run("--text", TEXT, "--html", str(tmp_path))[2]


def test_models_that_cannot_be_shown(run: Run, qwen: Path, probe_model: str, tmp_path) -> None:
    def refused(model: Path) -> str:
        status, out, err = run("--text", TEXT, model=str(model))
        assert (status, out) == (1, "")
        assert err.startswith("kvcompress: error: --model") and err.count("\n") == 1
        return err

    assert "no tokens of the prompt" in refused(qwen)
    llama = write_random_model(tmp_path / "llama", "llama")
    assert "holds no tokenizer" in refused(llama)
    alien = tmp_path / "alien"
    shutil.copytree(qwen, alien)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(probe_model) / name, alien)
    assert "tokenizer and weights are not of one model" in refused(alien)
    (alien / "model.safetensors").write_bytes(b"nothing")
    assert "cannot be run" in refused(alien)
    fields = json.loads((alien / "config.json").read_text())
    (alien / "config.json").write_text(
        json.dumps({**fields, "sliding_window": 64, "use_sliding_window": True})
    )
    assert "sliding-window" in refused(alien)


def test_a_model_that_is_not_built_like_llama(run: Run, probe_model: str, tmp_path: Path) -> None:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=4096, hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, dtype="float32",
    )  # fmt: skip
    with torch.random.fork_rng():
        GPTNeoXForCausalLM(config).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(probe_model) / name, tmp_path)
    status, out, err = run("--text", TEXT, model=str(tmp_path))
    assert (status, out) == (1, "")
    assert "is not built like Llama, and does not run by replay" in err and err.count("\n") == 1


def test_a_model_without_a_template_and_one_that_fails(run: Run, probe_model, tmp_path) -> None:
    shutil.copytree(probe_model, tmp_path / "model")
    template = tmp_path / "model" / "chat_template.jinja"
    template.write_text("{{ raise_exception('only even roles') }}")
    model = str(tmp_path / "model")
    assert "template fails (only even roles); set --no-chat" in run("--text", TEXT, model=model)[2]
    template.unlink()
    assert "has no chat template" in run("--text", TEXT, "--chat", model=model)[2]
    assert not read(run, "--text", TEXT, model=model)["in_chat_template"]
