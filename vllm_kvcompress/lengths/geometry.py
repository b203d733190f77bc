"""What a model's cache depends on, read from its ``config.json``: no torch, no vLLM."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from vllm_kvcompress.config.cache_dtypes import EIGHT_BITS
from vllm_kvcompress.errors import ConfigError, UnsupportedModelError
from vllm_kvcompress.lengths.latent import latent_width, unserved_latent
from vllm_kvcompress.lengths.layer_kinds import SERVED, TRIED_HYBRIDS, layer_types
from vllm_kvcompress.lengths.layer_words import FULL, STATE, WINDOWED

DTYPE_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}
CACHE_DTYPES = ("auto", "float16", "bfloat16", *EIGHT_BITS)


@dataclass(frozen=True)
class ModelGeometry:
    """What a model's cache depends on.

    Attributes
    ----------
    num_layers, num_kv_heads, head_dim : int
        Of the whole model; `num_layers` are those whose cache can be compacted.
    dtype : str
        Of the model: a key of `DTYPE_BYTES`.
    max_positions : int or None
        Longest sequence the model was made for, where the configuration says so.
    num_windowed : int
        Further layers, whose cache is bounded by a window and left alone.
    window : int or None
        Tokens of that window.
    num_recurrent : int
        Further layers with a state of fixed size in the place of keys and values.
    is_latent : bool
        Whether a token has one row of `head_dim` numbers for all heads (MLA), and no value.
    cache_dtype : str
        Of the cache, one of `CACHE_DTYPES`; "auto" is the model's.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    max_positions: int | None = None
    num_windowed: int = 0
    window: int | None = None
    num_recurrent: int = 0
    is_latent: bool = False
    cache_dtype: str = "auto"

    @property
    def cache_bytes(self) -> int:
        """Bytes of one number in the cache."""
        return 1 if self.has_eight_bits else DTYPE_BYTES[self._cached_as]

    @property
    def has_eight_bits(self) -> bool:
        """Whether the cache is quantised to 8 bits, with scales."""
        return self.cache_dtype in EIGHT_BITS

    @property
    def _cached_as(self) -> str:
        return self.dtype if self.cache_dtype == "auto" else self.cache_dtype

    def __str__(self) -> str:
        """Types, for people."""
        own, cached = self.dtype, self._cached_as
        return own if cached == own else f"{own}, cache {cached}"

    def kv_heads_per_worker(self, tensor_parallel_size: int) -> int:
        """KV heads of one rank; vLLM repeats them where there are more ranks than heads."""
        low, high = sorted((self.num_kv_heads, tensor_parallel_size))
        if high % low:
            raise ConfigError(
                f"--tensor-parallel-size {tensor_parallel_size}: must divide the model's "
                f"{self.num_kv_heads} KV heads or be a multiple of them."
            )
        return max(self.num_kv_heads // tensor_parallel_size, 1)

    def heads_per_worker(self, tensor_parallel_size: int) -> str:
        """What a token's cache consists of in one layer of one worker, in words."""
        if self.is_latent:
            return f"latent rows of {self.head_dim}"
        return f"KV heads {self.kv_heads_per_worker(tensor_parallel_size)} x {self.head_dim}"

    def page_bytes(self, block_size: int, tensor_parallel_size: int = 1) -> int:
        """Keys and values of `block_size` tokens of one layer on one worker."""
        heads = self.kv_heads_per_worker(tensor_parallel_size)
        size = block_size * self.head_dim * self.cache_bytes
        return size if self.is_latent else 2 * heads * size


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
    except (ValueError, RecursionError) as error:
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


def read_geometry(
    folder: Path, dtype: str = "auto", cache_dtype: str = "auto", latent: bool = False
) -> ModelGeometry:
    """Read what the cache depends on from the ``config.json`` of a local Hugging Face folder.

    Parameters
    ----------
    folder : Path
        The folder.
    dtype : str
        A key of `DTYPE_BYTES`; "auto" takes the model's, and bfloat16 for float32 as vLLM does.
    cache_dtype : str
        One of `CACHE_DTYPES`; "auto" is 8 bits if the checkpoint says so, else `dtype`.
    latent : bool
        Whether the caller knows what to do with latent attention (MLA).

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
    is_latent = text.get("kv_lora_rank") is not None
    if is_latent:
        _check_latent(text, folder, latent)
    config.whole_number("num_hidden_layers")  # which `layer_types` counts on
    positions = _positions(text)
    types = _layer_types(config, positions)
    config = replace(config, text={**text, **_own_heads(text, types)})
    text = config.text
    num_heads = config.whole_number("num_attention_heads")
    if is_latent:
        head_dim = latent_width(
            SimpleNamespace(
                kv_lora_rank=config.whole_number("kv_lora_rank"),
                qk_rope_head_dim=config.whole_number("qk_rope_head_dim"),
            )
        )
    elif text.get("head_dim") is None:
        head_dim = config.whole_number("hidden_size") // num_heads
    else:
        head_dim = config.whole_number("head_dim")
    kv_heads = 1 if is_latent else num_heads
    if not is_latent and text.get("num_key_value_heads") is not None:
        kv_heads = config.whole_number("num_key_value_heads")
    num_full, num_windowed = types.count(FULL), types.count(WINDOWED)
    return ModelGeometry(
        num_layers=num_full,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        dtype=_model_dtype(dtype, config.data, text, config.path),
        max_positions=positions,
        num_windowed=num_windowed,
        window=text["sliding_window"] if num_windowed else None,
        num_recurrent=types.count(STATE),
        is_latent=is_latent,
        cache_dtype=_cache_dtype(cache_dtype, config.data),
    )


def _own_heads(text: dict[str, Any], types: Sequence[str]) -> dict[str, Any]:
    """Fields of the layers that attend to everything, where these have heads of their own.

    Gemma 4: as published, and as transformers write it (layer by layer).
    """
    by_layer = text.get("per_layer_config")
    if isinstance(by_layer, dict):
        own = by_layer.get(str(types.index(FULL)))
        return dict(own) if isinstance(own, dict) else {}
    found = {"head_dim": text.get("global_head_dim")}
    if text.get("attention_k_eq_v"):
        found["num_key_value_heads"] = text.get("num_global_key_value_heads")
    return {name: value for name, value in found.items() if value is not None}


def _positions(text: dict[str, Any]) -> int | None:
    positions = text.get("max_position_embeddings")
    return positions if isinstance(positions, int) else None


def _layer_types(config: ConfigFile, positions: int | None) -> tuple[str, ...]:
    """What each layer attends to.

    Raises
    ------
    UnsupportedModelError
        If no layer attends to everything, or one is of a kind that is not served.
    """
    text = SimpleNamespace(**config.text)
    types, names = layer_types(text, positions), config.data.get("architectures") or ()
    strange = sorted(set(types) - SERVED)
    untried = STATE in types and not set(names) & set(TRIED_HYBRIDS)
    if strange or untried or FULL not in types:
        kind = f"layers of the kind {strange[0]}" if strange else "sliding-window layers only"
        if untried:
            kind = "recurrent layers and an architecture that has not been tried"
        raise UnsupportedModelError(
            f"--model: {config.path.parent} has {kind}, and the server would refuse to compress "
            "it: choose a decoder-only text model with layers that attend to everything."
        )
    return types


def _cache_dtype(chosen: str, data: dict[str, Any]) -> str:
    """What vLLM stores: some checkpoints ask for 8 bits by themselves."""
    quantized = data.get("quantization_config") or {}
    asked = quantized.get("kv_cache_scheme") or quantized.get("kv_cache_quant_algo")
    if isinstance(asked, dict):
        asked = asked.get("type") == "float" and asked.get("num_bits") == 8 and "fp8"
    return "fp8" if chosen == "auto" and str(asked).lower() == "fp8" else chosen


def _model_dtype(chosen: str, data: dict[str, Any], text: dict[str, Any], path: Path) -> str:
    if chosen != "auto":
        return chosen
    places = [where.get(key) for where in (text, data) for key in ("dtype", "torch_dtype")]
    found = next((value for value in places if value is not None), "float32")
    name = str(found).removeprefix("torch.")
    if name not in DTYPE_BYTES:
        allowed = ", ".join(DTYPE_BYTES)
        raise ConfigError(f"{path}: dtype {name!r} is unknown; set --dtype to one of {allowed}.")
    return "bfloat16" if name == "float32" else name


def _check_latent(text: dict[str, Any], folder: Path, is_expected: bool) -> None:
    """Refuse latent attention that the server refuses, and all where the caller has no use for it.

    Raises
    ------
    UnsupportedModelError
        With the reason.
    """
    reason = unserved_latent(SimpleNamespace(**text))
    if reason is not None:
        raise UnsupportedModelError(
            f"--model: {folder} {reason}, and the server would refuse to compress it: choose "
            "another model."
        )
    if not is_expected:
        raise UnsupportedModelError(
            f"--model: {folder} has latent attention (MLA), which the server compresses and this "
            "command does not know: choose another model."
        )


def _check_supported(data: dict[str, Any], text: dict[str, Any], folder: Path) -> None:
    """Refuse what ``host.checks`` refuses at start-up, as far as config.json tells."""
    kinds = {
        "is an encoder-decoder model": data.get("is_encoder_decoder"),
        "has layers that share the KV cache of others": text.get("num_kv_shared_layers"),
    }
    for kind, applies in kinds.items():
        if applies:
            raise UnsupportedModelError(
                f"--model: {folder} {kind}, and the server would refuse to compress it: choose a "
                "decoder-only text model."
            )
