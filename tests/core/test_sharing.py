"""Requests that hold blocks in common, directly or through others."""

from types import SimpleNamespace

import pytest

from vllm_kvcompress.core.sharing import families


@pytest.mark.parametrize(
    ("held", "expected"),
    [
        ({}, []),
        ({"a": "", "b": "1"}, ["b"]),
        ({"a": "12", "b": "34"}, ["a", "b"]),
        ({"a": "12", "b": "23"}, ["ab"]),
        ({"a": "12", "b": "34", "c": "23"}, ["abc"]),
        ({"a": "12", "b": "23", "c": "1", "d": "3", "e": "4"}, ["abcd", "e"]),
        ({"a": "1", "b": "2", "c": "123", "d": "3", "e": "1"}, ["abcde"]),
        ({"a": "12", "b": "", "c": "2", "d": "5"}, ["ac", "d"]),
    ],
)
def test_who_holds_a_block_in_common_is_in_one_family(
    held: dict[str, str], expected: list[str]
) -> None:
    shared = {
        name: [SimpleNamespace(block_id=int(each)) for each in blocks]
        for name, blocks in held.items()
    }
    found = families(shared)  # type: ignore[arg-type]
    assert sorted("".join(sorted(each)) for each in found) == expected
