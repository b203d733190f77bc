"""The field `codebook`: what is allowed, and the sentences a user reads where something is not."""

from typing import Any

import pytest

from vllm_kvcompress.config.reading import parse_config
from vllm_kvcompress.config.settings import CompressionConfig
from vllm_kvcompress.errors import ConfigError
from vllm_kvcompress.lengths.budgets import compaction_lengths
from vllm_kvcompress.lengths.codebook import coded_groups
from vllm_kvcompress.lengths.decode_queries import decode_window
from vllm_kvcompress.request_options import (
    check_fits_server,
    parse_request,
    resolve_request,
)


def parsed(**fields: Any) -> CompressionConfig:
    config = parse_config({"preset": "spindlekv", **fields})
    assert config is not None
    return config


def shares(num_groups: int, **book: Any) -> dict[int, float]:
    return coded_groups(parsed(codebook=book).codebook, num_groups)


def test_the_preset_codes_the_shallow_quarter_under_the_papers_budgets() -> None:
    config = parsed()
    book = config.codebook
    assert book is not None and (book.key_threshold, book.value_threshold) == (0.98, 0.95)
    assert list(coded_groups(book, 32)) == list(range(8))
    assert config.layer_budget.shape == "linear" and config.layer_groups.size == 1
    assert config.extends_codebooks
    assert coded_groups(parse_config("spindlekv-evict").codebook, 32) == {}
    assert not parse_config("spindlekv-evict").extends_codebooks


def test_groups_are_a_share_of_them_or_numbers() -> None:
    assert list(shares(5, shallow=0.5)) == [0, 1, 2], "rounded up"
    assert list(shares(1, shallow=0.01)) == [0]
    assert list(shares(25, shallow=0.28)) == list(range(7)), "0.28 * 25 is above 7 in floats"
    assert list(shares(4, shallow=1)) == [0, 1, 2, 3]
    assert list(shares(4, groups=[3, 1])) == [1, 3]
    assert parsed(codebook={"groups": [0]}).codebook.shallow is None, "one replaces the other"


def test_a_share_of_entries_for_all_groups_or_one_each() -> None:
    assert shares(4, shallow=0.5, entries=0.3) == {0: 0.3, 1: 0.3}
    assert shares(4, shallow=0.5, entries=1) == {0: 1.0, 1: 1.0}
    # In the order of the layers, however the groups were written.
    assert shares(4, groups=[3, 1], entries=[0.2, 0.7]) == {1: 0.2, 3: 0.7}


def test_a_codebook_goes_with_any_policy_and_survives_the_way_to_the_worker() -> None:
    fields = {"shallow": None, "groups": [0, 2], "entries": [0.5, 0.25], "extend": False}
    config = parse_config("snapkv", {"codebook": fields, "trigger": "both", "interval": 64})
    assert parse_config(config.to_dict()) == config
    assert config.codebook.entries == (0.5, 0.25) and not config.extends_codebooks
    assert parse_config("snapkv").codebook is None
    assert parsed(codebook=None).codebook is None, "a preset's can be taken away"


BAD = [
    ({"codebook": {"entires": 0.5}}, ["codebook.entires", "'entries'", "key_threshold", "shallow"]),
    ({"codebook": {"shallow": None}}, ["codebook", "exactly one of shallow and groups"]),
    ({"codebook": {"shallow": 0.5, "groups": [0]}}, ["exactly one of shallow and groups"]),
    ({"codebook": {"shallow": 0}}, ["codebook.shallow", "greater than 0", "got 0"]),
    ({"codebook": {"shallow": 1.5}}, ["codebook.shallow", "equal to 1", "got 1.5"]),
    ({"codebook": {"groups": []}}, ["codebook", "groups: name at least one"]),
    ({"codebook": {"groups": [2, 2]}}, ["codebook", "groups", "each of them once"]),
    ({"codebook": {"groups": [0, -1]}}, ["codebook.groups.1", "equal to 0", "got -1"]),
    ({"codebook": {"entries": 0}}, ["codebook.entries: ", "greater than 0", "got 0"]),
    ({"codebook": {"entries": 1.01}}, ["codebook.entries: ", "equal to 1", "got 1.01"]),
    ({"codebook": {"entries": "all"}}, ["codebook.entries: ", "number", "got 'all'"]),
    ({"codebook": {"entries": [0.5, 0]}}, ["codebook.entries.1: ", "greater than 0", "got 0"]),
    ({"codebook": {"key_threshold": 0}}, ["codebook.key_threshold", "greater than 0"]),
    ({"codebook": {"value_threshold": 1.1}}, ["codebook.value_threshold", "equal to 1"]),
    ({"codebook": {"value_threshold": float("nan")}}, ["codebook.value_threshold", "got nan"]),
    ({"codebook": {"extend": "maybe"}}, ["codebook.extend", "true or false", "'maybe'"]),
    ({"codebook": "all"}, ["codebook", "got 'all'"]),
    ({"trigger": "interval"}, ["codebook", "when prompts end", "trigger end_of_prompt"]),
    ({"mode": "draft"}, ["codebook", "draft", "mode evict", "leave out codebook"]),
    ({"draft": {"budget": {"ratio": 0.1}}}, ["codebook", "draft.budget", "leave out codebook"]),
]


@pytest.mark.parametrize(("fields", "words"), BAD, ids=[str(fields) for fields, _ in BAD])
def test_wrong_settings_are_one_sentence(fields: dict, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        parsed(**fields)
    message = str(caught.value)
    assert message.startswith(("preset spindlekv: ", "kv_compression: ")) and message.endswith(".")
    assert "\n" not in message and "constrained" not in message and "tuple[" not in message
    for word in words:
        assert word in message, message


def test_a_task_may_bring_a_wrong_codebook_too() -> None:
    tasks = {"localization": {}, "aggregation": {"codebook": {"groups": [0, 0]}}}
    with pytest.raises(ConfigError, match=r"tasks\.aggregation\.codebook.*each of them once"):
        parse_config({"preset": "snapkv", "tasks": tasks})


def test_what_depends_on_the_number_of_layer_groups_is_checked_against_it() -> None:
    assert list(shares(5, groups=[4])) == [4]
    with pytest.raises(ConfigError, match=r"codebook\.groups: .*no layer group 4.*0 to 3\.$"):
        shares(4, groups=[0, 4])
    for entries in ([0.5], [0.5, 0.5, 0.5], []):
        words = rf"codebook\.entries: there are {len(entries)} numbers and 2 coded layer groups"
        with pytest.raises(ConfigError, match=words):
            shares(4, shallow=0.5, entries=entries)
    with pytest.raises(ConfigError, match="no layer group 9"):
        compaction_lengths(2000, parsed(codebook={"groups": [9]}), 4, 32, 32)


# --- requests -----------------------------------------------------------------------------


def test_a_request_may_bring_a_codebook_to_a_server_without_one_and_the_other_way_round() -> None:
    plain, coding = parse_config("snapkv"), parsed()
    for server, preset, expected in ((plain, "spindlekv", True), (coding, "snapkv", False)):
        options = parse_request({"kv_compression": preset, "kv_budget_ratio": 0.3})
        check_fits_server(server, options)
        config = resolve_request(server, options)
        assert (config.codebook is not None) == expected and config.budget.ratio == 0.3
    own = resolve_request(coding, parse_request({"kv_pin": [0, 50]}))
    assert own.codebook == coding.codebook and own.pinned == ([0, 50],)


def test_extensions_read_no_queries() -> None:
    """Else the server would keep a ring of queries for nothing."""
    assert decode_window(parsed()) == 0


@pytest.mark.parametrize(
    "server",
    [{"mode": "draft"}, {"draft": {"budget": {"ratio": 0.1}}}],
    ids=["mode draft", "draft.budget"],
)
def test_a_server_that_drafts_refuses_requests_with_a_codebook(server: dict) -> None:
    drafting = parse_config({"preset": "snapkv", **server})
    options = parse_request({"kv_compression": "spindlekv"})
    with pytest.raises(ConfigError, match="kv_compression: spindlekv codes.*without a codebook"):
        check_fits_server(drafting, options)
    check_fits_server(drafting, parse_request({"kv_compression": "spindlekv-evict"}))
