"""1,000 values of every per-request option: options or one sentence, and nothing is opened or run.

Engine-free: what the API server and the scheduler do with a request's ``vllm_xargs``.
"""

import pickle
import sys
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lab.bad_input.audit import watched
from lab.bad_input.values import CODE, MARK, PATHS, VALUES
from vllm_kvcompress.config.reading import parse_config, preset, preset_names
from vllm_kvcompress.config.settings import CompressionConfig
from vllm_kvcompress.core import admission, longest
from vllm_kvcompress.core.kept_cache import num_common, tokens_of
from vllm_kvcompress.core.planner import Planner
from vllm_kvcompress.errors import MAX_LENGTH, ConfigError, one_line
from vllm_kvcompress.metrics import CompressionStats
from vllm_kvcompress.request_options import (
    MAX_PINS,
    REQUEST_KEYS,
    TASKS,
    check_fits_server,
    named_config,
    parse_request,
)

PROMPT_LEN = 1000
SERVERS = [
    {"preset": "windowkv", "sessions": {"max_blocks_ratio": 0.5}},
    {"preset": "keydiff", "trigger": "prompt", "sessions": {"max_blocks_ratio": 0.5}},
    {"preset": "snapkv", "mode": "draft"},
]


@pytest.fixture(scope="module")
def servers() -> list[CompressionConfig]:
    """Settings of servers that have read every preset: what is opened after that is a request's."""
    for name in preset_names():
        for each in (preset(name), *preset(name).by_task.values()):
            each.build_policy()
    return [parse_config(each) for each in SERVERS]  # type: ignore[misc]


def serve(server: CompressionConfig, extra: dict[str, Any]) -> str:
    """What becomes of a request: "served", or "refused" with a sentence as it should be."""
    try:
        options = parse_request(extra, PROMPT_LEN)
        check_fits_server(server, options)
    except ConfigError as error:
        message = str(error)
        assert len(message) <= MAX_LENGTH and message.isprintable() and message.endswith(".")
        assert message.startswith("kv_"), message
        return "refused"
    config = named_config(server, options)
    planner = Planner(server, num_layer_groups=2, block_size=32, codes_per_row=8)
    task = TASKS[0] if config is not None and config.tasks else None
    planner.add("r", PROMPT_LEN, options, task=task, max_output=8)
    assert pickle.loads(pickle.dumps(planner.setups_of(["r"]))) == planner.setups_of(["r"])
    return "served"


def test_a_thousand_values_of_every_option(servers: list[CompressionConfig]) -> None:
    """What is right for one is tried on all."""
    seen: dict[str, Counter[str]] = {key: Counter() for key in REQUEST_KEYS}

    @settings(max_examples=1000, deadline=None, database=None)
    @given(VALUES, st.sampled_from(range(len(servers))))
    def run(value: Any, number: int) -> None:
        with watched() as events:
            for key in REQUEST_KEYS:
                seen[key][serve(servers[number], {key: value})] += 1
        assert [each for each in events if each[0] != "pickle.find_class"] == []

    run()
    for key, counts in seen.items():
        assert counts.total() >= 1000 and counts["served"] >= 3, (key, counts)
        assert counts["refused"] >= 300, (key, counts)


@pytest.mark.parametrize("text", [*PATHS, *CODE])
def test_no_path_and_no_code_goes_anywhere(text: str, servers: list[CompressionConfig]) -> None:
    """In every place of a request that takes text, as a name or within a list."""
    places: list[dict[Any, Any]] = [{key: text} for key in REQUEST_KEYS]
    places += [{key: [text, text]} for key in REQUEST_KEYS]
    places += [{text: 1}, {f"kv_budget{text}": 1}, {"kv_session": text, "kv_compression": text}]
    with watched() as events:
        for extra in places:
            for server in servers:
                try:
                    check_fits_server(server, parse_request(extra, PROMPT_LEN))
                except ConfigError as error:
                    assert str(error).isprintable()
    assert events == []


def test_the_watch_sees_what_it_is_for(tmp_path) -> None:
    """Else the tests above could not fail."""
    with watched() as events:
        (tmp_path / f"{MARK}.yaml").write_text("policy: {name: knorm}\nbudget: {ratio: 0.1}\n")
        assert parse_config(str(tmp_path / f"{MARK}.yaml")) is not None
        exec(f"{MARK} = 1", {})
        with pytest.raises(ImportError):
            __import__(MARK)
    named = Counter(name for name, args in events if MARK in repr(args) or name == "exec")
    assert named["open"] == 2 and named["exec"] >= 1 and named["import"] >= 1, named
    with watched() as events:
        pass
    assert events == []


def test_many_pins_are_refused_before_they_are_looked_at() -> None:
    """Thousands of ranges would take seconds of the engine's loop in long prompts."""
    within = [number for _ in range(MAX_PINS) for number in (0, 1)]
    assert len(parse_request({"kv_pin": within}, PROMPT_LEN).pins) == MAX_PINS
    for more in ([*within, 0, 1], ["x"] * 10**6):
        with pytest.raises(ConfigError, match="^kv_pin: at most 256 ranges, got "):
            parse_request({"kv_pin": more}, PROMPT_LEN)


def test_half_a_character_in_a_conversations_name() -> None:
    """msgspec could not send it to the engine."""
    with pytest.raises(ConfigError, match="^kv_session: not valid Unicode"):
        parse_request({"kv_session": "a\ud800"})


def test_refusing_a_shared_prefix_reads_no_files(servers: list[CompressionConfig]) -> None:
    """It names the presets that would do, and once read all their files anew each time."""
    with watched() as events, pytest.raises(ConfigError, match="name one of these"):
        check_fits_server(servers[0], parse_request({"kv_shared_prefix": 64}, PROMPT_LEN))
    assert events == []


@pytest.mark.parametrize(
    "name", ["a\nERROR fake line", "a\r\x1b[2J", "\u202eb\u2028", "x" * 10**7, "\ud800"]
)
def test_text_of_a_request_in_the_log(name: str) -> None:
    shown = one_line(name)
    assert shown.isprintable() and len(shown) <= 300


def log_lines(log: pytest.MonkeyPatch, module: Any) -> list[str]:
    """What a module logs from now on, as it would stand in the log."""
    lines: list[str] = []

    def write(text: str, *args: Any) -> None:
        lines.append(text % args)

    for level in ("warning", "info"):
        log.setattr(module.logger, level, write)
    return lines


def test_a_requests_name_cannot_forge_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both lines of the engine that name a request."""
    name = "r\n(APIServer) ERROR forged\x1b[2J" + "x" * 10_000
    lines = log_lines(monkeypatch, admission)
    planner = Planner(parse_config("snapkv"), num_layer_groups=2, block_size=32)
    config = SimpleNamespace(model_config=None)
    judge = admission.Admission(planner, config, 4096, CompressionStats())
    extra = {"kv_compression": f"zip\n\x1b[2J{'x' * 10_000}"}
    judge.admit(
        SimpleNamespace(
            request_id=name,
            num_prompt_tokens=2000,
            sampling_params=SimpleNamespace(extra_args=extra),
        )
    )
    lines += log_lines(monkeypatch, longest)
    pool = SimpleNamespace(num_growth=lambda request_id, num_tokens: num_tokens)
    too_long = SimpleNamespace(request_id=name, num_prompt_tokens=10, max_tokens=99)
    second = log_lines(monkeypatch, longest)
    assert longest.LongestSequence(pool, 50, 500, 0).bound(too_long)
    for line in [*lines, *second]:
        assert "forged" in line and line.isprintable() and len(line) < 1200
    assert len(lines) == len(second) == 1


def test_kept_tokens_take_four_bytes() -> None:
    """A long text whose cache keeps few blocks is kept in the engine's memory, too."""
    ids = list(range(100_000, 200_000))
    kept = tokens_of(ids)
    assert sys.getsizeof(kept) < 4.5 * len(ids)
    assert num_common(kept, ids) == num_common(kept, [*ids, 1]) == len(ids)
    assert num_common(kept, [*ids[:7], 1, *ids[8:]]) == 7
    assert num_common(kept, ids[:9]) == 9 and num_common(kept, []) == 0
