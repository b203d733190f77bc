"""What the checks of `kvcompress doctor` are asked, and what they answer."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from vllm_kvcompress.config.settings import CompressionConfig

State = Literal["ok", "warning", "fail"]


class Finding(NamedTuple):
    """What a check found.

    Attributes
    ----------
    state : {"ok", "warning", "fail"}
        "fail" keeps a server from starting with compression.
    check : str
        What was looked at, in a word or two.
    sentence : str
        What was found and, unless it is ok, what to do.
    """

    state: State
    check: str
    sentence: str


@dataclass
class Question:
    """What a user asks about, and what checks have learnt on the way.

    Attributes
    ----------
    model : Path or None
        Folder of the model.
    setting, overrides : str
        As ``--kv-compression`` and ``--kv-compression-config`` take them; "none" for no setting.
    cache_memory : int or None
        Bytes for the cache per worker.
    config : CompressionConfig or None
        The setting, once it is read.
    vllm_config : VllmConfig or None
        What vLLM makes of the model, once it is made.
    """

    model: Path | None = None
    setting: str = "none"
    overrides: str = "{}"
    cache_memory: int | None = None
    config: CompressionConfig | None = None
    vllm_config: Any = None


Check = Callable[[Question], Iterator[Finding]]
