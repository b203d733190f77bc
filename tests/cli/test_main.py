"""The command `kvcompress`: what it prints, what it refuses, what it does not import."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from vllm_kvcompress import __version__
from vllm_kvcompress.cli import main as cli
from vllm_kvcompress.cli.common import PIPE_WIDTH
from vllm_kvcompress.cli.main import main
from vllm_kvcompress.config.reading import parse_config, preset_names
from vllm_kvcompress.errors import ConfigError
from vllm_kvcompress.registry import load_policy_class, policy_names

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Call `kvcompress` with arguments; return its status, output and error output."""

    def call(*arguments: str) -> tuple[int, str, str]:
        status = main(arguments)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )


# --- the command itself -------------------------------------------------------------------


def test_importing_it_and_help_are_light() -> None:
    code = (
        "import sys; from vllm_kvcompress.cli.main import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as end: assert end.code == 0, end\n"
        "assert not {'torch', 'vllm'} & sys.modules.keys()"
    )
    for option in ("--help", "--version"):
        result = python(code, option)
        assert result.returncode == 0, result.stderr


def test_no_command_needs_vllm(probe_model: str) -> None:
    code = (
        "import sys; from vllm_kvcompress.cli.main import main\n"
        "status = main(sys.argv[1:]); assert 'vllm' not in sys.modules; sys.exit(status)"
    )
    plan = ["plan", "--prompt-len=2000", "--kv-compression=snapkv", f"--model={probe_model}"]
    for arguments in (["policies"], ["validate", "snapkv"], plan):
        result = python(code, *arguments)
        assert result.returncode == 0, result.stderr


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    for option, words in (
        ("--version", [f"kvcompress {__version__}"]),
        ("--help", ["policies", "validate", "plan", "codebook"]),
    ):
        with pytest.raises(SystemExit) as caught:
            main([option])
        assert caught.value.code == 0
        out = capsys.readouterr().out
        assert all(word in out for word in words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["COMMAND"]),
        (["polices"], ["'polices'", "'policies'"]),
        (["validate"], ["FILE"]),
        (["plan", "--prompt-len", "many"], ["--prompt-len", "'many'"]),
        (["plan", "--prompt-len", "0"], ["--prompt-len", "must be 1 or more, got 0"]),
        (["plan", "--kv-cache-memory", "40G"], ["'40G'", "40GiB, 40GB or a number of bytes"]),
        (["plan", "--prompt-len", "9"], ["--kv-compression", "--model"]),
    ],
)
def test_wrong_usage_ends_with_2(arguments, words, capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    err = capsys.readouterr().err
    for word in words:
        assert word in err


# --- policies -----------------------------------------------------------------------------


def test_policies_are_what_their_classes_say(run: Run) -> None:
    status, out, err = run("policies", "--json")
    listed = {policy["name"]: policy for policy in json.loads(out)}
    assert (status, err) == (0, "")
    assert sorted(listed) == policy_names()
    for name, shown in listed.items():
        policy = load_policy_class(name)()
        assert shown["error"] is None
        assert shown["distribution"] == f"vllm-kvcompress {__version__}"
        assert shown["presets"] == [p for p in preset_names() if uses(p, name)]
        assert type(policy).__doc__.startswith(shown["summary"]) and shown["summary"]
        assert shown["queries"] == policy.queries.value
        assert shown["output_projection"] is policy.needs_output_projection
        assert shown["while_decoding"] is policy.runs_while_decoding
        assert shown["parameters"].keys() == type(policy).model_fields.keys()
    assert listed["snapkv"]["parameters"]["kernel_size"] == 5


def uses(preset: str, name: str) -> bool:
    config = parse_config(preset)
    return config is not None and config.policy.name == name


def test_the_table_cuts_no_name_off(run: Run, monkeypatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    status, out, _ = run("policies")
    assert status == 0
    assert "…" not in out
    assert all(len(line) <= PIPE_WIDTH for line in out.splitlines())
    for name in [*policy_names(), *preset_names()]:
        assert f" {name} *" in out
    for parameter in load_policy_class("windowkv").model_fields:
        assert f" {parameter}: " in out


def test_a_narrow_terminal_cuts_nothing_off(run: Run, probe_model: str, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    out = run("policies")[1]
    assert all(f" {name} *" in out for name in [*policy_names(), *preset_names()])
    out = plan(run, probe_model)[1]
    row = ["0", "0-3", "8,000", "960", "500", "60", "15.6", "MiB", "1.9", "MiB"]
    assert row in [line.split() for line in out.splitlines()]


def test_a_broken_policy_is_shown_with_its_error(run: Run, monkeypatch) -> None:
    def load(name: str) -> type:
        if name == "keydiff":
            raise ImportError("no module named moonlight")
        return str if name == "random" else load_policy_class(name)

    monkeypatch.setattr(cli, "load_policy_class", load)
    listed = {policy["name"]: policy for policy in json.loads(run("policies", "--json")[1])}
    assert listed["keydiff"]["error"] == "ImportError: no module named moonlight"
    assert "no subclass of vllm_kvcompress.policies.base.Policy" in listed["random"]["error"]
    assert listed["snapkv"]["error"] is None
    status, out, _ = run("policies")
    assert status == 0
    assert "cannot be loaded" in out and "moonlight" in out


def test_a_policy_with_a_required_parameter_is_listed(run: Run, monkeypatch) -> None:
    class Picky(load_policy_class("random")):  # type: ignore[misc]
        """Picky: cannot be made without its taste."""

        taste: str

    monkeypatch.setattr(cli, "policy_names", lambda: ["random"])
    monkeypatch.setattr(cli, "load_policy_class", lambda name: Picky)
    (shown,) = json.loads(run("policies", "--json")[1])
    assert shown["required"] == ["taste"] and shown["error"] is None
    assert shown["queries"] is None and shown["while_decoding"] is None
    assert "taste: (required)" in run("policies")[1]


def test_two_packages_with_one_name_are_one_sentence(run: Run, monkeypatch) -> None:
    def names() -> list[str]:
        raise ConfigError("Two installed packages register a policy called 'x': uninstall one.")

    monkeypatch.setattr(cli, "policy_names", names)
    assert run("policies") == (
        1,
        "",
        "kvcompress: error: Two installed packages register a policy called 'x': uninstall one.\n",
    )


# --- validate -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", preset_names())
def test_a_valid_setting_is_printed_in_full(run: Run, name: str) -> None:
    status, out, err = run("validate", name)
    assert (status, err) == (0, "")
    printed, config = parse_config(yaml.safe_load(out)), parse_config(name)
    assert printed is not None and config is not None
    assert printed.build_policy() == config.build_policy()
    assert printed.model_copy(update={"policy": config.policy}) == config
    assert printed.policy.params.keys() == type(config.build_policy()).model_fields.keys()


def test_files_are_validated_each(run: Run, tmp_path: Path) -> None:
    good, bad = tmp_path / "good.yaml", tmp_path / "bad.yaml"
    good.write_text("policy: {name: random}\nbudget: {tokens: 99}\npinned: [[0, 9]]\n")
    bad.write_text("policy: {name: random, sed: 3}\nbudget: {tokens: 99}\n")
    status, out, err = run("validate", str(bad), str(good), "keydiff")
    assert status == 1
    assert err.startswith(f"kvcompress: error: {bad}: policy.sed: unknown field")
    assert err.count("\n") == 1
    documents = [each for each in yaml.safe_load_all(out) if each]
    assert [each["policy"] for each in documents] == [{"name": "random", "seed": 0}] + [
        {"name": "keydiff"}
    ]
    assert documents[0]["pinned"] == [[0, 9]]
    assert f"# {good}" in out


def test_long_lines_and_brackets_are_printed_as_they_are(run: Run, tmp_path: Path) -> None:
    path = tmp_path / ("a" * 150 + "[bold].yaml")
    path.write_text("policy: {name: random}\nbudget: {tokens: 99}\n")
    assert f"# {path}\n" in run("validate", str(path))[1]


def test_unreadable_files_are_one_sentence(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "latin.yaml"
    path.write_bytes("policy: {name: caf\xe9}\n".encode("latin-1"))
    for name, word in ((str(path), "decode"), ("no/such.yaml", "no file"), ("snapvk", "snapkv")):
        status, out, err = run("validate", name)
        assert (status, out) == (1, "")
        assert word in err and err.count("\n") == 1
    assert run("validate", "none")[:2] == (0, "# none\n# no compression\n")


# --- plan ---------------------------------------------------------------------------------


def plan(run: Run, model: str, *options: str, preset: str = "streaming_llm") -> Any:
    arguments = ["--prompt-len", "8000", "--kv-compression", preset, "--model", model]
    return run("plan", *arguments, *options)


def test_plan_in_numbers(run: Run, probe_model: str) -> None:
    """Probe model: 8 KiB per layer and block; 12 % of 8,000 tokens is 960."""
    options = ("--json", "--kv-cache-memory", "1GiB", "--output-len", "100")
    status, out, err = plan(run, probe_model, *options)
    found = json.loads(out)
    assert (status, err) == (0, "")
    assert found["model"]["num_layers"] == 4 and found["model"]["dtype"] == "bfloat16"
    assert parse_config(found["setting"]) == parse_config("streaming_llm")
    assert found["block_bytes"] == 4 * 8192
    assert [g["tokens_after"] for g in found["groups"]] == [960]
    assert (found["blocks_before"], found["blocks_after"], found["blocks_peak"]) == (500, 60, 560)
    assert found["blocks_needed"] == 500 and found["kept_ratio"] == 0.12
    assert found["longest_prompt"] == {"without": 8192, "with": 8192}
    assert found["requests"] == {
        "stock_prompts": 65,  # 32,767 blocks of 32 KiB
        "prompts": 65,
        "stock_decoding": 64,
        "decoding": 489,  # 67 blocks each
        "one_by_one": 482,
    }


def test_plan_for_people(run: Run, probe_model: str) -> None:
    status, out, err = plan(run, probe_model, "--kv-cache-memory", "1GiB", preset="pyramidkv")
    assert (status, err) == (0, "")
    assert "4 layers, KV heads 2 x 64, bfloat16, 16 tokens per block" in out
    assert "layer group" in out and "total" in out
    assert "Requests at once in 1.0 GiB" in out
    assert all(len(line) <= PIPE_WIDTH for line in out.splitlines())
    inside = '{"trigger": "prompt", "prompt_interval": 512, "budget": {"tokens": 512}}'
    options = ("--kv-cache-memory", "4MiB", "--kv-compression-config", inside)
    out = plan(run, probe_model, *options)[1]
    assert "tokens, counted back from its end: until it\nis done, 2.0 MiB are held" in out
    (row,) = (line for line in out.splitlines() if "tokens of the longest prompt" in line)
    assert "2,032" in row and "8,192" in row  # 127 blocks of 16 tokens; the model's longest
    without = plan(run, probe_model)[1]
    assert "Requests at once" not in without and "12.0% of the cache stays" in without


def test_plan_takes_overrides_and_the_servers_options(run: Run, probe_model: str) -> None:
    override = '{"budget": {"ratio": 0.5}, "layer_groups": {"count": 2}}'
    options = ("--json", "--kv-compression-config", override, "--block-size", "32")
    more = ("--dtype", "float32", "--tensor-parallel-size", "2")
    found = json.loads(plan(run, probe_model, *options, *more)[1])
    assert [(g["first_layer"], g["num_layers"]) for g in found["groups"]] == [(0, 2), (2, 2)]
    assert found["kept_ratio"] == 0.5
    assert found["block_bytes"] == 2 * (2 * 32 * 1 * 64 * 4)


def test_plan_of_a_cache_of_8_bits(run: Run, probe_model: str) -> None:
    """12 % of it is 6 % of the bytes of one in bfloat16."""
    whole = json.loads(plan(run, probe_model, "--json")[1])
    found = json.loads(plan(run, probe_model, "--json", "--kv-cache-dtype", "fp8")[1])
    assert found["kept_ratio"] == whole["kept_ratio"] == 0.12
    assert found["block_bytes"] == whole["block_bytes"] / 2
    assert (found["model"]["dtype"], found["model"]["cache_dtype"]) == ("bfloat16", "fp8")
    status, out, err = plan(run, probe_model, "--kv-cache-dtype", "fp8_e5m2")
    assert (status, err) == (0, "")
    assert "bfloat16, cache fp8_e5m2, 16 tokens" in out
    assert "12.0% of the cache stays (6.0% of the bytes of a whole cache in bfloat16)" in out
    options = ("--kv-cache-dtype", "fp8", "--dtype", "float32")
    assert "(3.0% of the bytes of a whole cache in float32)" in plan(run, probe_model, *options)[1]


def test_plan_refuses_what_rewrites_rows_of_8_bits(run: Run, probe_model: str) -> None:
    for preset, word in (("spindlekv", "codebook: "), ("streaming_llm_rerotated", "policy.name: ")):
        status, out, err = plan(run, probe_model, "--kv-cache-dtype", "fp8", preset=preset)
        assert (status, out) == (1, "") and word in err and "--kv-cache-dtype auto" in err
    options = ("--kv-cache-dtype", "fp8", "--speed", "--machine", "h200")
    status, _, err = plan(run, probe_model, *options)
    assert status == 1 and "leave out --speed or --kv-cache-dtype" in err


def test_plan_says_that_requests_stay_whole_until_memory_is_scarce(
    run: Run, probe_model: str
) -> None:
    marks = '{"trigger": "pressure", "pressure": {"when": 0.9, "until": 0.6}}'
    status, out, _ = plan(run, probe_model, "--kv-compression-config", marks)
    assert status == 0
    assert "Requests stay whole until they hold 90% of the blocks" in out
    assert "until 60% are held. What is shown is a request that was." in out


def test_plan_while_decoding(run: Run, probe_model: str) -> None:
    options = ("--kv-compression-config", '{"trigger": "interval", "interval": 64}')
    status, out, err = plan(run, probe_model, *options, "--output-len", "100")
    assert (status, err) == (0, "")
    assert "from 64 output tokens on" in out
    err = plan(run, probe_model, *options)[2]
    assert "left alone: --output-len 0 is below the interval of 64" in err


def test_a_task_that_keeps_more_is_shown(run: Run, probe_model: str) -> None:
    tasks = '{"localization": {"budget": {"ratio": 0.2}}, "aggregation": {"budget": {"ratio": 0.4}}'
    status, out, err = plan(
        run, probe_model, "--json", "--kv-compression-config", f'{{"tasks": {tasks}}}}}'
    )
    assert status == 0
    assert json.loads(out)["kept_ratio"] == 0.4
    assert err == "kvcompress: warning: requests of the task aggregation keep most and are shown.\n"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--output-len", "200"], ["8200 tokens", "max_position_embeddings (8192)"]),
        (["--prompt-len", "100"], ["left alone: it is shorter than min_prompt_len (512)"]),
        (["--prompt-len", "512", "--kv-compression-config", '{"budget": {"ratio": 1}}'], ["whole"]),
        (["--kv-cache-memory", "15MiB"], ["15.0 MiB is too small", "15.7 MiB"]),
    ],
)
def test_plan_warns(run: Run, probe_model: str, options: list[str], words: list[str]) -> None:
    status, out, err = plan(run, probe_model, *options)
    assert status == 0 and out
    assert err.startswith("kvcompress: warning: ") and err.count("\n") == 1
    for word in words:
        assert word in err


def test_plan_of_drafts_promises_no_memory(run: Run, probe_model: str) -> None:
    options = ("--kv-compression-config", '{"mode": "draft"}', "--kv-cache-memory", "1GiB")
    status, out, err = plan(run, probe_model, *options)
    assert status == 0 and "Nothing is evicted" in out and "view" in out
    assert "kept" not in out and "of the cache stays" not in out and "Requests at once" not in out
    assert "--kv-cache-memory: the mode draft evicts nothing" in err
    found = json.loads(plan(run, probe_model, *options, "--json")[1])
    assert found["kept_ratio"] == 1.0 and found["requests"] is None


def test_plan_warns_of_padding(run: Run, probe_model: str, tmp_path: Path) -> None:
    fields = json.loads((Path(probe_model) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(fields | {"num_hidden_layers": 5}))
    options = ("--kv-compression-config", '{"layer_groups": {"size": 3}}')
    err = plan(run, str(tmp_path), *options)[2]
    assert "so 16.7% of the pool stays empty" in err and "5 layers" in err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--kv-compression", "none"], ["nothing to plan", "snapkv"]),
        (["--kv-compression", "snapvk"], ["did you mean 'snapkv'"]),
        (["--kv-compression-config", "{"], ["not valid JSON"]),
        (["--kv-compression-config", '{"budget": {"ratio": 2}}'], ["budget.ratio", "got 2"]),
        (["--model", "nowhere"], ["--model", "no folder nowhere"]),
        (["--tensor-parallel-size", "3"], ["--tensor-parallel-size 3", "2 KV heads"]),
    ],
)
def test_plan_errors_are_one_sentence(run: Run, probe_model: str, options, words) -> None:
    status, out, err = plan(run, probe_model, *options)
    assert (status, out) == (1, "")
    assert err.startswith("kvcompress: error: ") and err.count("\n") == 1
    assert err.endswith(".\n")
    for word in words:
        assert word in err
