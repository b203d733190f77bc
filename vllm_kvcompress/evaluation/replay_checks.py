"""Which models a tool that replays prompts cannot measure: one sentence each."""

from typing import TYPE_CHECKING

from vllm_kvcompress.errors import UnsupportedModelError
from vllm_kvcompress.lengths.layer_kinds import layer_types
from vllm_kvcompress.lengths.layer_words import FULL, WINDOWED

if TYPE_CHECKING:
    from vllm_kvcompress.evaluation.replay import Replay


def check_all_full(replay: "Replay") -> None:
    """Refuse a model with windowed layers, for tools that measure every layer of a model alike.

    Raises
    ------
    UnsupportedModelError
        Naming what measures it.
    """
    if len(replay.full_layers) < len(replay.layers):
        raise UnsupportedModelError(
            "--model: it has sliding-window layers beside full ones, and books are measured where "
            "all layers attend to everything: choose such a model, or measure settings with a "
            "codebook by their answers (kvcompress eval)."
        )


def check_full_or_windowed(replay: "Replay") -> None:
    """Refuse layers over which several caches cannot be decoded together.

    Raises
    ------
    UnsupportedModelError
        Naming what measures such a model.
    """
    kinds = set(layer_types(replay.text_config, replay.longest))
    if strange := sorted(kinds - {FULL, WINDOWED}):
        raise UnsupportedModelError(
            f"--model: it has layers of the kind {strange[0]}, and only a server measures those: "
            "run kvcompress eval --url, or choose a model whose layers attend to everything or to "
            "a window."
        )
