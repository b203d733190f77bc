"""Settings that a server may be soaked under, and what holds of its answers there."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_COMMON = {
    "observation_window": 8,
    "budget": {"ratio": 0.25, "floor": 32},
    "min_prompt_len": 128,
}


@dataclass(frozen=True)
class Setting:
    """One of them.

    Attributes
    ----------
    config : mapping
        Of ``--kv-compression-config``.
    without : tuple of str
        Kinds of questions (`lab.soak.questions.KINDS`) that are left out.
    depends_on_load : bool
        Whether the load decides on tokens: then only questions that nothing is evicted for must be
        answered as alone; of the others the number of tokens is held against what was asked for.
    is_lossless : bool
        Whether every greedy answer must be that of stock vLLM.
    """

    config: Mapping[str, Any]
    without: tuple[str, ...] = ()
    depends_on_load: bool = False
    is_lossless: bool = False

    @property
    def flags(self) -> list[str]:
        """Of ``vllm serve``."""
        return ["--kv-compression", "snapkv", "--kv-compression-config", json.dumps(self.config)]


SETTINGS = {
    "both": Setting(_COMMON | {"trigger": "both", "interval": 16, "shared_blocks": "always"}),
    "prompt": Setting(
        _COMMON | {"trigger": "prompt", "prompt_interval": 128, "shared_blocks": "always"}
    ),
    # Whether a cache can be kept for a second turn, or a prefix, depends on the load as well.
    "pressure": Setting(
        _COMMON | {"trigger": "pressure", "interval": 16},
        without=("conversation", "shared_prefix"),
        depends_on_load=True,
    ),
    # Drawn tokens follow the target's distribution, not its draws: which drafts stand decides.
    "draft": Setting(
        _COMMON | {"mode": "draft", "draft": {"tokens": 4}},
        without=("sampled", "conversation", "shared_prefix"),
        is_lossless=True,
    ),
}
"""By name. With `both` and `prompt` the load decides on no token (docs/configuration.md)."""
