"""One row per policy: its preset, and a harder setting. Every generic test runs over this table."""

from typing import Any

CASES: dict[str, list[dict[str, Any]]] = {
    "keydiff": [{}],
    "random": [{}, {"seed": 7}],
    "snapkv": [{}, {"kernel_size": 1}, {"kernel_size": 13}],
    "streaming_llm": [{}],
    "windowkv": [
        {},
        {"task": "aggregation", "window_size": 16},
        {"window_size": 1},
        {"window_size": 37, "share_indices": False},
    ],
}
