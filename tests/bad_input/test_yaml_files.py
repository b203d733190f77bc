"""1,000 files for ``--kv-compression``: a setting or one sentence, and only that file is opened."""

import time
from collections import Counter
from pathlib import Path

import pytest

from lab.bad_input.audit import watched
from lab.bad_input.yaml_files import KINDS, write_files
from vllm_kvcompress.config.reading import parse_config, preset, preset_names
from vllm_kvcompress.config.yaml_reader import parse_yaml
from vllm_kvcompress.errors import MAX_LENGTH, ConfigError

MOST_SECONDS = 60
"""Of one file, on a machine that is busy: it takes 3 at most."""


def test_a_thousand_files(tmp_path: Path) -> None:
    for name in preset_names():
        preset(name).build_policy()
    seen: Counter[tuple[str, str]] = Counter()
    for kind, path in write_files(tmp_path, 1000):
        start = time.perf_counter()
        with watched() as events:
            try:
                config = parse_config(str(path))
                assert config is not None and parse_config(config.to_dict()) == config
                seen[kind, "a setting"] += 1
            except ConfigError as error:
                message = str(error)
                assert len(message) <= MAX_LENGTH and message.isprintable(), (kind, path)
                assert message.endswith(".") and str(path) in message, (kind, path)
                seen[kind, "a sentence"] += 1
        opened = {(name, str(args[0])) for name, args in events}
        assert opened <= {("open", str(path))}, (kind, path, opened)
        assert time.perf_counter() - start < MOST_SECONDS, (kind, path)
    assert seen.total() == 1000
    kinds = {make.__name__ for make in KINDS}
    # Of those that are no file at all, and of tags, none may come through.
    for kind in kinds - {"unreadable"}:
        assert seen[kind, "a sentence"] > 20, (kind, seen)
    for kind in ("folder", "pipe", "endpoint", "link", "tags", "doubled"):
        assert not seen[kind, "a setting"], (kind, seen)
    assert sum(seen[kind, "a setting"] for kind in kinds) > 30


def test_a_number_too_large_to_be_read_is_said_to_be_one() -> None:
    """In base 60; it was said to be an escape that stands for no character."""
    with pytest.raises(ConfigError, match=r"line 2, column 4: this number cannot be read"):
        parse_yaml("b: 1\na: 1:" + "59:" * 3000 + "59.5", "x.yaml")
