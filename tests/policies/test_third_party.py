"""examples/third_party_policy: installed beside this package, seen and used by it, offline."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from vllm_kvcompress.registry import POLICY_GROUP, policy_names

Python = Callable[..., subprocess.CompletedProcess[str]]

KVCOMPRESS = ("-m", "vllm_kvcompress.cli.main")


@pytest.fixture(scope="module")
def source(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the example: pip leaves build files beside what it installs."""
    folder = tmp_path_factory.mktemp("third_party") / "source"
    leftovers = shutil.ignore_patterns("build", "*.egg-info", "__pycache__", ".*")
    return shutil.copytree(root / "examples" / "third_party_policy", folder, ignore=leftovers)


@pytest.fixture(scope="module")
def python(source: Path) -> Python:
    """Run a Python that has the example installed, outside this checkout."""
    target = source.parent / "site"
    install = ["-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-index"]
    options = ["--no-deps", "--no-build-isolation", "--target", str(target)]
    subprocess.run([sys.executable, *install, *options, str(source)], check=True)

    def run(*arguments: str, also: Path | None = None) -> subprocess.CompletedProcess[str]:
        path = os.pathsep.join(map(str, filter(None, [target, also])))
        return subprocess.run(
            [sys.executable, *arguments],
            env=os.environ | {"PYTHONPATH": path},
            cwd=source.parent,
            capture_output=True,
            text=True,
            check=False,
        )

    return run


def register(folder: Path, name: str, target: str) -> Path:
    """What pip leaves of an installed package that registers one policy."""
    info = folder / "other_policies-2.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other-policies\nVersion: 2.0\n")
    (info / "entry_points.txt").write_text(f"[{POLICY_GROUP}]\n{name} = {target}\n")
    return folder


def test_it_is_not_one_of_ours() -> None:
    assert "vatp" not in policy_names()


def test_its_own_tests_pass(python: Python, source: Path) -> None:
    result = python("-m", "pytest", "-q", "-p", "no:cacheprovider", str(source))
    assert result.returncode == 0, result.stdout


def test_it_is_listed_with_its_distribution(python: Python) -> None:
    result = python(*KVCOMPRESS, "policies", "--json")
    assert result.returncode == 0, result.stderr
    listed = {policy["name"]: policy for policy in json.loads(result.stdout)}
    assert set(policy_names()) < listed.keys()
    assert listed["vatp"]["distribution"] == "kvcompress-vatp 0.1.0"
    assert listed["vatp"]["queries"] == "window"
    assert listed["vatp"]["parameters"] == {"norm_power": 1.0}
    assert listed["vatp"]["summary"].startswith("VATP: ")
    table = python(*KVCOMPRESS, "policies").stdout
    assert "From kvcompress-vatp 0.1.0\n" in table and "norm_power: 1.0" in table


def test_its_setting_is_valid_and_can_be_planned(
    python: Python, source: Path, probe_model: str
) -> None:
    setting = str(source / "vatp.yaml")
    result = python(*KVCOMPRESS, "validate", setting)
    assert result.returncode == 0, result.stderr
    assert "  name: vatp\n  norm_power: 1.0\n" in result.stdout
    options = ("--prompt-len=8000", f"--kv-compression={setting}", f"--model={probe_model}")
    assert "12.0% of the cache stays" in python(*KVCOMPRESS, "plan", *options).stdout


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        ("name: vatp\n  power: 2", "policy.power: unknown field (did you mean 'norm_power'?)"),
        ("name: vatp\n  norm_power: -1", "policy.norm_power: input should be greater than"),
        ("name: vat", "policy.name: there is no policy 'vat'; installed are "),
    ],
)
def test_a_wrong_setting_is_one_sentence(python: Python, source: Path, policy, words) -> None:
    path = source.parent / "wrong.yaml"
    path.write_text(f"policy:\n  {policy}\nbudget: {{ratio: 0.1}}\n")
    result = python(*KVCOMPRESS, "validate", str(path))
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith(f"kvcompress: error: {path}: {words}")
    assert result.stderr.count("\n") == 1


def test_a_name_of_ours_is_refused(python: Python, tmp_path: Path) -> None:
    other = register(tmp_path, "snapkv", "elsewhere:SnapKV")
    for command in (["policies"], ["validate", "keydiff"]):
        result = python(*KVCOMPRESS, *command, also=other)
        assert result.returncode == 1
        assert result.stdout == ""
        assert result.stderr.count("\n") == 1
        for word in ("'snapkv'", "elsewhere:SnapKV", "vllm_kvcompress.policies.snapkv:SnapKV"):
            assert word in result.stderr


def test_a_package_that_cannot_be_imported_is_shown(python: Python, tmp_path: Path) -> None:
    other = register(tmp_path, "broken", "no_such_module:Policy")
    result = python(*KVCOMPRESS, "policies", "--json", also=other)
    assert result.returncode == 0, result.stderr
    listed = {policy["name"]: policy for policy in json.loads(result.stdout)}
    assert listed["broken"]["distribution"] == "other-policies 2.0"
    assert "no_such_module" in listed["broken"]["error"]
    assert listed["vatp"]["error"] is None
    setting = tmp_path / "broken.yaml"
    setting.write_text("policy: {name: broken}\nbudget: {ratio: 0.1}\n")
    result = python(*KVCOMPRESS, "validate", str(setting), also=other)
    assert (result.returncode, result.stderr.count("\n")) == (1, 1)
    assert "no_such_module" in result.stderr


SERVE = """
import json, sys
from vllm_kvcompress.evaluation.engine import Engine

model, setting = sys.argv[1:]
engine = Engine(model, setting)
prompt = [7 + index * index % 1000 for index in range(1500)]
(tokens,) = engine.generate([prompt], 8, ignore_eos=True)
stats = engine.scheduler.stats
print("RESULT", json.dumps([len(tokens), stats.requests, stats.tokens_evicted]))
engine.close()
"""


@pytest.mark.engine
def test_an_engine_serves_with_it(python: Python, source: Path, probe_model: str) -> None:
    result = python("-c", SERVE, probe_model, str(source / "vatp.yaml"))
    assert result.returncode == 0, result.stderr[-4000:]
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("RESULT ")]
    num_tokens, requests, evicted = json.loads(line.removeprefix("RESULT "))
    assert num_tokens == 8
    assert requests == {"vatp": 1}
    assert evicted == {"vatp/0": 1472 - 160}  # 180 tokens: 28 behind the region, 152 in 5 blocks
