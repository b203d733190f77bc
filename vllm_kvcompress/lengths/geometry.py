"""What a model's cache depends on, read from its ``config.json``: no torch, no vLLM."""

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from vllm_kvcompress.errors import ConfigError, UnsupportedModelError
from vllm_kvcompress.lengths.layer_kinds import FULL, WINDOWED, layer_types

DTYPE_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}


@dataclass(frozen=True)
class ModelGeometry:
    """What a model's cache depends on.

    Attributes
    ----------
    num_layers, num_kv_heads, head_dim : int
        Of the whole model; `num_layers` are those whose cache can be compacted.
    dtype : str
        Of the cache: a key of `DTYPE_BYTES`.
    max_positions : int or None
        Longest sequence the model was made for, where the configuration says so.
    num_windowed : int
        Further layers, whose cache is bounded by a window and left alone.
    window : int or None
        Tokens of that window.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    max_positions: int | None = None
    num_windowed: int = 0
    window: int | None = None

    def kv_heads_per_worker(self, tensor_parallel_size: int) -> int:
        """KV heads of one rank; vLLM repeats them where there are more ranks than heads."""
        low, high = sorted((self.num_kv_heads, tensor_parallel_size))
        if high % low:
            raise ConfigError(
                f"--tensor-parallel-size {tensor_parallel_size}: must divide the model's "
                f"{self.num_kv_heads} KV heads or be a multiple of them."
            )
        return max(self.num_kv_heads // tensor_parallel_size, 1)

    def page_bytes(self, block_size: int, tensor_parallel_size: int = 1) -> int:
        """Keys and values of `block_size` tokens of one layer on one worker."""
        heads = self.kv_heads_per_worker(tensor_parallel_size)
        return 2 * block_size * heads * self.head_dim * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class ConfigFile:
    """A ``config.json`` that was read.

    Attributes
    ----------
    path : Path
        The file.
    data : dict
        All of it.
    text : dict
        The part that describes the language model, which may be all of it.
    """

    path: Path
    data: dict[str, Any]
    text: dict[str, Any]

    def whole_number(self, name: str) -> int:
        """A field of `text` that must be there.

        Raises
        ------
        ConfigError
            If it is missing, or no whole number from 1 up.
        """
        value = self.text.get(name)
        if value is None:
            raise ConfigError(f"{self.path}: the field {name} is missing.")
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(
                f"{self.path}: {name} must be a whole number from 1 up, got {value!r}."
            )
        return value


def read_config(folder: Path) -> ConfigFile:
    """Read the ``config.json`` of a local Hugging Face folder.

    Raises
    ------
    ConfigError
        If a file is missing or wrong.
    """
    if not folder.is_dir():
        raise ConfigError(
            f"--model: there is no folder {folder}; give the local folder of a Hugging Face model."
        )
    path = folder / "config.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"--model: {folder} holds no config.json.") from None
    except ValueError as error:
        raise ConfigError(f"{path}: not valid JSON: {error}.") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: the file must hold an object of fields.")
    text = data["text_config"] if isinstance(data.get("text_config"), dict) else data
    if text is not data:
        text = _language_model(folder) or text
    return ConfigFile(path, data, text)


def _language_model(folder: Path) -> dict[str, Any] | None:
    """What transformers make of a multimodal model's text part; None where they make nothing.

    Such files leave out what is as the model's class has it, numbers of heads for example.
    """
    try:
        from transformers import AutoConfig

        found = AutoConfig.from_pretrained(folder, local_files_only=True).get_text_config()
        return found.to_dict()
    except Exception:  # no transformers, a class they do not know, a field they do not take
        return None


def read_geometry(folder: Path, dtype: str = "auto") -> ModelGeometry:
    """Read what the cache depends on from the ``config.json`` of a local Hugging Face folder.

    Parameters
    ----------
    folder : Path
        The folder.
    dtype : str
        A key of `DTYPE_BYTES`; "auto" takes the model's, and bfloat16 for float32 as vLLM does.

    Raises
    ------
    ConfigError
        If a file or a field is missing or wrong.
    UnsupportedModelError
        If the server would refuse to compress this model.
    """
    config = read_config(folder)
    text = config.text
    _check_supported(config.data, text, folder)
    num_heads = config.whole_number("num_attention_heads")
    if text.get("head_dim") is None:
        head_dim = config.whole_number("hidden_size") // num_heads
    else:
        head_dim = config.whole_number("head_dim")
    kv_heads = num_heads
    if text.get("num_key_value_heads") is not None:
        kv_heads = config.whole_number("num_key_value_heads")
    count, positions = config.whole_number("num_hidden_layers"), _positions(text)
    types = _layer_types(count, text, positions, folder)
    num_full = types.count(FULL)
    return ModelGeometry(
        num_layers=num_full,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        dtype=_cache_dtype(dtype, config.data, text, config.path),
        max_positions=positions,
        num_windowed=count - num_full,
        window=text["sliding_window"] if num_full < count else None,
    )


def _positions(text: dict[str, Any]) -> int | None:
    positions = text.get("max_position_embeddings")
    return positions if isinstance(positions, int) else None


def _layer_types(
    count: int, text: dict[str, Any], positions: int | None, folder: Path
) -> tuple[str, ...]:
    """What each layer attends to.

    Raises
    ------
    UnsupportedModelError
        If no layer attends to everything, or one attends to something else than a window.
    """
    types = layer_types(SimpleNamespace(**{**text, "num_hidden_layers": count}), positions)
    strange = sorted(set(types) - {FULL, WINDOWED})
    if strange or FULL not in types:
        kind = f"layers of the kind {strange[0]}" if strange else "sliding-window layers only"
        raise UnsupportedModelError(
            f"--model: {folder} has {kind}, and the server would refuse to compress it: choose a "
            "decoder-only text model with layers that attend to everything."
        )
    return types


def _cache_dtype(chosen: str, data: dict[str, Any], text: dict[str, Any], path: Path) -> str:
    if chosen != "auto":
        return chosen
    places = [where.get(key) for where in (text, data) for key in ("dtype", "torch_dtype")]
    found = next((value for value in places if value is not None), "float32")
    name = str(found).removeprefix("torch.")
    if name not in DTYPE_BYTES:
        allowed = ", ".join(DTYPE_BYTES)
        raise ConfigError(f"{path}: dtype {name!r} is unknown; set --dtype to one of {allowed}.")
    return "bfloat16" if name == "float32" else name


def _check_supported(data: dict[str, Any], text: dict[str, Any], folder: Path) -> None:
    """Refuse what ``host.checks`` refuses at start-up, as far as config.json tells."""
    kinds = {
        "is an encoder-decoder model": data.get("is_encoder_decoder"),
        "has multi-head latent attention (MLA)": text.get("kv_lora_rank"),
    }
    for kind, applies in kinds.items():
        if applies:
            raise UnsupportedModelError(
                f"--model: {folder} {kind}, and the server would refuse to compress it: choose a "
                "decoder-only text model."
            )
