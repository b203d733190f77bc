"""`kvcompress plan`: a text that is held once, and requests that share blocks."""

import json

import pytest

from vllm_kvcompress.cli.main import main

COMMON = ["plan", "--prompt-len", "6000", "--shared-prefix", "5805"]
MEMORY = ["--kv-cache-memory", "64MiB"]


def test_requests_behind_a_text(probe_model: str, capsys: pytest.CaptureFixture[str]) -> None:
    """2,047 blocks; of 5,792 tokens 362, or 91 of a quarter; each request has 408 more: 26."""
    arguments = [*COMMON, *MEMORY, "--output-len=200", "--model", probe_model]
    assert main([*arguments, "--kv-compression=shared_prefix", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["shared_prefix"]
    assert found == {
        "tokens": 5792,
        "blocks_before": 362,
        "blocks_after": 91,
        "stock": (2047 - 362) // 26,
        "compressed": (2047 - 91) // 26,
    }
    assert main([*arguments, "--kv-compression=shared_prefix"]) == 0
    (row,) = (
        line for line in capsys.readouterr().out.splitlines() if "5,792 tokens shared" in line
    )
    assert row.split()[-2:] == ["64", "75"]


def test_what_is_set_aside_for_requests_that_share_blocks(
    probe_model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A quarter of 2,500 tokens: 4 of them are behind the last whole block of 32."""
    arguments = ["plan", "--prompt-len=2500", "--block-size=32", "--model", probe_model]
    arguments.append("--kv-compression=keydiff")
    always = '{"shared_blocks": "always", "budget": {"ratio": 0.25}}'
    assert main([*arguments, "--kv-compression-config", always, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["blocks_reserved"] == 20
    assert main([*arguments, "--kv-compression-config", always]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "1.2 MiB are set aside for each but one" in said, said
    assert "fewer than 640 tokens of each are its own; equal prompts share one copy" in said
    again = always.replace("{", '{"trigger": "both", ', 1)
    assert main([*arguments, "--kv-compression-config", again]) == 0
    assert "equal prompts" not in " ".join(capsys.readouterr().out.split())
    assert main(arguments) == 0
    assert "set aside" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([*COMMON, "--kv-compression=keydiff"], "so --kv-cache-memory is needed"),
        ([*COMMON, *MEMORY, "--kv-compression=auto"], "snapkv ranks tokens by queries"),
        (
            [*COMMON, *MEMORY, "--kv-compression=keydiff", "--prompt-len=500"],
            "5805 tokens, and the prompt has 500",
        ),
    ],
)
def test_what_cannot_be_counted(
    arguments: list[str], words: str, probe_model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--model", probe_model]) == 1
    error = capsys.readouterr().err
    assert error.startswith("kvcompress: error: --shared-prefix: ") and words in error
    assert error.count("\n") == 1
