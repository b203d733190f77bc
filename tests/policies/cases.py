"""One row per policy: its preset, and a harder setting. Every generic test runs over this table."""

from typing import Any

CASES: dict[str, list[dict[str, Any]]] = {
    "adakv": [{}, {"safeguard": 1.0, "scorer": {"name": "keydiff"}}],
    "cake": [{}, {"kernel_size": 1}],
    "chunkkv": [{}, {"chunk_length": 1}, {"chunk_length": 33, "scorer": {"name": "knorm"}}],
    "criticalkv": [{}, {"first_stage_ratio": 0.0}],
    "expected_attention": [{}, {"use_covariance": False, "n_sink": 0}],
    "h2o": [{}, {"average": True}],
    "keydiff": [{}],
    "knorm": [{}],
    "lagkv": [{}, {"lag_size": 16}, {"lag_size": 32, "n_sink": 0}],
    "random": [{}, {"seed": 7}],
    "rkv": [{}, {"kernel_size": 1}],
    "snapkv": [{}, {"kernel_size": 1}, {"kernel_size": 13, "pooling": "max"}],
    "spindlekv": [{}, {"selection": "union"}, {"selection": "union", "kernel_size": 5}],
    "streaming_llm": [{}, {"rerotate_keys": True}],
    "tova": [{}],
    "windowkv": [
        {},
        {"window_score": "top_half", "window_size": 16},
        {"window_size": 1},
        {"window_size": 37, "share_indices": False},
        {"window_size": 16, "layers_per_leader": 3},
    ],
}
