"""The command line of ``vllm serve``: options, overrides, errors before anything is loaded."""

import pickle
from typing import Any

import pytest
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

from vllm_kvcompress.host.hooks import install_hooks


def engine_args(model: str, *options: str) -> Any:
    """What ``vllm serve MODEL options`` makes of its arguments."""
    install_hooks()
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    return AsyncEngineArgs.from_cli_args(parser.parse_args(["--model", model, *options]))


def setting(model: str, *options: str) -> dict[str, Any]:
    return engine_args(model, *options).additional_config["kv_compression"]


def test_processes_that_read_the_arguments_without_plugins_see_the_setting(
    probe_model: str,
) -> None:
    """Those of --api-server-count build engine arguments before vLLM loads plugins there."""
    install_hooks()
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    args = parser.parse_args(["--model", probe_model, "--kv-compression", "snapkv"])
    first = AsyncEngineArgs.from_cli_args(args)
    args = pickle.loads(pickle.dumps(args))
    host_function = AsyncEngineArgs.from_cli_args.__wrapped__
    for again in (host_function(AsyncEngineArgs, args), AsyncEngineArgs.from_cli_args(args)):
        assert again.additional_config == first.additional_config
        assert again.additional_config["kv_compression"]["policy"]["name"] == "snapkv"


def test_off_by_default_and_with_none(probe_model: str) -> None:
    assert not engine_args(probe_model).additional_config
    assert not engine_args(probe_model, "--kv-compression", "none").additional_config


def test_one_flag(probe_model: str) -> None:
    assert setting(probe_model, "--kv-compression", "windowkv")["policy"]["name"] == "windowkv"
    assert setting(probe_model, "--kv_compression=keydiff")["policy"]["name"] == "keydiff"


def test_dotted_overrides(probe_model: str) -> None:
    found = setting(
        probe_model,
        "--kv-compression",
        "snapkv",
        "--kv-compression-config.budget.ratio=0.25",
        "--kv-compression-config.policy.kernel_size",
        "7",
    )
    assert found["budget"]["ratio"] == 0.25
    assert found["policy"]["kernel_size"] == 7


def test_overrides_as_json_and_a_file(probe_model: str, tmp_path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("policy: {name: random, seed: 3}\nbudget: {tokens: 400}\n")
    found = setting(
        probe_model,
        "--kv-compression",
        str(path),
        "--kv-compression-config",
        '{"budget": {"ratio": 0.5}}',
    )
    assert found["policy"] == {"name": "random", "seed": 3}
    assert found["budget"] == {"ratio": 0.5, "floor": 64}


def test_other_additional_config_is_kept(probe_model: str) -> None:
    options = ["--kv-compression", "snapkv", "--additional-config", '{"mine": 1}']
    assert engine_args(probe_model, *options).additional_config["mine"] == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--kv-compression", "windokv"], ["did you mean 'windowkv'", "none", "snapkv"]),
        (["--kv-compression", "x.yaml"], ["there is no file x.yaml"]),
        (
            ["--kv-compression", "snapkv", "--kv-compression-config.budget.ratio=3"],
            ["preset snapkv", "budget.ratio", "less than or equal to 1"],
        ),
        (
            ["--kv-compression", "snapkv", "--kv-compression-config.budget.ration=0.3"],
            ["budget.ration", "unknown field", "did you mean 'ratio'", "tokens"],
        ),
        (["--kv-compression", "snapkv", "--kv-compression-config", "{"], ["not valid JSON"]),
        (["--kv-compression-config.budget.ratio=0.3"], ["--kv-compression is not set"]),
        (
            [
                *["--kv-compression", "snapkv", "--additional-config"],
                '{"kv_compression": "keydiff"}',
            ],
            ["keep one of the two"],
        ),
    ],
)
def test_errors_are_one_sentence_and_end_the_program(probe_model, options, words) -> None:
    with pytest.raises(SystemExit) as caught:
        engine_args(probe_model, *options)
    message = str(caught.value)
    assert message.startswith("vllm: error: ") and "\n" not in message
    for word in words:
        assert word in message


def test_a_refusal_from_the_command_line_is_one_sentence_too(probe_model: str) -> None:
    args = engine_args(
        probe_model, "--kv-compression", "snapkv", "--disable-hybrid-kv-cache-manager"
    )
    with pytest.raises(SystemExit, match="remove --disable-hybrid-kv-cache-manager"):
        args.create_engine_config()


def test_draft_mode(probe_model: str) -> None:
    found = setting(
        probe_model,
        "--kv-compression", "snapkv", "--kv-compression-mode", "draft", "--kv-draft-tokens", "3",
        "--kv-compression-config.draft.adaptive=true",
        "--kv-compression-config.draft.acceptance=typical",
        "--kv-compression-config.draft.typical_delta=0.2",
    )  # fmt: skip
    assert found["mode"] == "draft"
    assert (found["draft"]["tokens"], found["draft"]["adaptive"]) == (3, True)
    assert (found["draft"]["acceptance"], found["draft"]["typical_delta"]) == ("typical", 0.2)
    args = engine_args(probe_model, "--kv-compression", "snapkv", "--kv-compression-mode", "draft")
    config = args.create_engine_config()
    assert config.num_speculative_tokens == 4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--kv-compression-mode", "draft"], ["--kv-compression-mode", "--kv-compression PRESET"]),
        (["--kv-draft-tokens", "2"], ["--kv-draft-tokens", "--kv-compression PRESET"]),
        (
            ["--kv-compression", "snapkv", "--kv-compression-mode", "draft"]
            + ["--kv-draft-tokens", "0"],
            ["draft.tokens", "at least one token"],
        ),
        (
            ["--kv-compression", "snapkv", "--kv-compression-mode", "draft"]
            + ["--kv-draft-tokens", "17"],
            ["draft.tokens", "16"],
        ),
        (
            ["--kv-compression", "snapkv", "--kv-draft-tokens", "4"],
            ["--kv-draft-tokens", "nothing is drafted", "--kv-compression-mode draft"],
        ),
        (
            ["--kv-compression", "snapkv", "--kv-compression-mode", "draft"]
            + ["--kv-compression-config", '{"mode": "evict"}'],
            ["--kv-compression-mode", "--kv-compression-config", "mode", "keep one"],
        ),
        (
            ["--kv-compression", "snapkv", "--kv-compression-mode", "draft"]
            + ["--kv-draft-tokens", "2", "--kv-compression-config.draft.tokens=3"],
            ["--kv-draft-tokens", "--kv-compression-config", "tokens", "keep one"],
        ),
        (
            ["--kv-compression", "snapkv", "--kv-compression-mode", "draft"]
            + ["--kv-draft-tokens", "2", "--kv-compression-config", '{"draft": 3}'],
            ["draft", "3"],
        ),
    ],
)
def test_draft_options_that_make_no_sense(probe_model: str, options, words) -> None:
    with pytest.raises(SystemExit) as error:
        engine_args(probe_model, *options)
    for word in words:
        assert word in str(error.value)


def test_draft_mode_brings_its_own_speculation(probe_model: str) -> None:
    args = engine_args(
        probe_model,
        "--kv-compression", "snapkv", "--kv-compression-mode", "draft",
        "--speculative-config", '{"method": "ngram", "num_speculative_tokens": 2}',
    )  # fmt: skip
    with pytest.raises(SystemExit, match="--speculative-config: the mode draft"):
        args.create_engine_config()
