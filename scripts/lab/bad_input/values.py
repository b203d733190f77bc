"""Hypothesis strategies for every per-request option: right ones, nearly right ones, anything."""

from typing import Any

from hypothesis import strategies as st

from vllm_kvcompress.config.reading import NONE, preset_names

MARK = "kvcprobe"
"""In every text that could be a path or code, so that an audit hook finds it again."""

PATHS = (
    f"../{MARK}",
    f"../../../../{MARK}.yaml",
    f"/etc/{MARK}",
    f"/dev/{MARK}",
    f"./configs/{MARK}.yaml",
    f"~/{MARK}.yml",
    f"%2e%2e%2f{MARK}",
    f"..%c0%af{MARK}",
    f"file:///{MARK}",
    f"C:\\{MARK}",
    f"windowkv/../{MARK}",
    f"windowkv\0{MARK}",
    f"windowkv.yaml?{MARK}",
)
CODE = (
    f"!!python/object/apply:os.system ['{MARK}']",
    f"!!python/name:{MARK}.x",
    f"__import__('{MARK}')",
    f"{MARK}.module:Class",
    f"$(touch {MARK})",
    "{0.__class__.__init__.__globals__}" + MARK,
    f"%s%n{MARK}",
    f"<script>{MARK}()</script>",
)
ODD_TEXTS = (
    "",
    " ",
    "\n",
    "windowkv\n",
    "WINDOWKV",
    "none ",
    "\x1b[2J\x1b]0;x\x07",
    "line 1\r\nINFO: line 2",
    "\u202enimda",
    "\u2028",
    "\0",
    "\ud800",
    "\uffff",
    "e\u0301" * 64,
    "𐌠" * 128,
    "x" * 129,
    "x" * 100_000,
    "null",
    "NaN",
    "1",
    "0x10",
)
ODD_NUMBERS: tuple[Any, ...] = (
    *(0, 1, -1, 2, 64, 999, 1000, 1001, 2**31, 2**53 + 1, 2**63 - 1, 2**63, 2**64, -(2**63)),
    *(10**400, -(10**4000), 0.0, -0.0, 0.5, 1.0, 1.5, 1e-320, 5e-324, 1e300, 1.0000000000000002),
    *(float("nan"), float("inf"), -float("inf"), True, False),
)

texts = st.sampled_from([*PATHS, *CODE, *ODD_TEXTS]) | st.text(max_size=12)
numbers = st.sampled_from(ODD_NUMBERS) | st.integers() | st.floats()
leaves = st.none() | numbers | texts
anything = st.recursive(
    leaves | st.binary(max_size=3) | st.builds(object),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(texts | st.integers(), inner, max_size=3)
        | st.tuples(inner, inner)
    ),
    max_leaves=8,
)
positions = st.integers(-2, 1002) | st.sampled_from([2**31, 2**63, -1, 10**400])
pins = st.lists(positions | leaves, max_size=8) | st.lists(positions, max_size=8).map(sorted)
pins |= st.integers(0, 2000).map(lambda count: [0, 1] * count)

RIGHT: dict[str, st.SearchStrategy[Any]] = {
    "kv_compression": st.sampled_from([NONE, *preset_names()]),
    "kv_budget_ratio": st.floats(0, 1, exclude_min=True),
    "kv_budget_tokens": st.integers(1, 2000),
    "kv_pin": st.tuples(st.integers(0, 900), st.integers(1, 100)).map(lambda p: [p[0], sum(p)]),
    "kv_task": st.sampled_from(["auto", "localization", "aggregation"]),
    "kv_draft_tokens": st.integers(0, 8),
    "kv_session": st.text(min_size=1, max_size=128),
    "kv_shared_prefix": st.integers(1, 1000),
}
VALUES = st.one_of(*RIGHT.values()) | pins | anything
"""For any key: what is right for one of them, lists of positions, anything."""


def in_json(value: Any) -> bool:
    """Whether a value can be sent as JSON (NaN and infinity can: Python's JSON has them)."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and in_json(key) for key in value) and all(
            map(in_json, value.values())
        )
    if isinstance(value, list | tuple):
        return all(map(in_json, value))
    if isinstance(value, int) and not isinstance(value, bool):
        return value.bit_length() < 13_000  # Python prints no more than 4300 digits
    return value is None or isinstance(value, str | float | bool)
