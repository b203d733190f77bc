"""What a row of docs/compatibility.md is, and what the checks say of a row's stand-in."""

import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from lab.model_classes import Overlay, inspect_here


@dataclass(frozen=True)
class StandIn:
    """What the checks are given: an accepted configuration, changed in one thing.

    Attributes
    ----------
    model : Mapping or None
        Keys of a config.json.
    part : str or None
        Part of vLLM's configuration, in which `changes` are made; None changes the whole.
    changes : Mapping
        Attributes.
    layer : Mapping or None
        Attributes of an attention layer's implementation, for what is seen in built layers only.
    setting : str or Mapping
        Of compression.
    environment : Mapping
        Variables.
    version : str or None
        Of the installed vLLM; None leaves it.
    """

    model: Mapping[str, Any] | None = None
    part: str | None = None
    changes: Mapping[str, Any] = field(default_factory=dict)
    layer: Mapping[str, Any] | None = None
    setting: Any = "snapkv"
    environment: Mapping[str, str] = field(default_factory=dict)
    version: str | None = None


@dataclass(frozen=True)
class Row:
    """One line of a table: tests if it works, a sentence if it is refused."""

    name: str
    says: str
    stand_in: StandIn | None
    tests: tuple[str, ...] = ()


def works(name: str, says: str, *tests: str, given: StandIn | None = None) -> Row:
    """A row of what works; with a stand-in the checks must accept it."""
    assert tests, f"{name}: what no test shows is not said to work"
    return Row(name, says, given, tests)


def refused(name: str, sentence: str, given: StandIn) -> Row:
    """A row of what is refused, with the whole sentence but for its first and last words."""
    return Row(name, sentence, given)


def untried(name: str, says: str, given: StandIn | None = None) -> Row:
    """A row of what no check refuses and no test shows; the checks must accept its stand-in."""
    return Row(name, says, given, (UNTRIED,))


UNTRIED = "nothing"


def verdict(stand_in: StandIn, base: Any, folder: Path) -> str | None:
    """The sentence of the checks on a stand-in, without what all sentences have; None: accepted.

    `base` is a ``VllmConfig`` that every check accepts, `folder` an empty one for config.json.
    """
    from unittest.mock import patch

    from vllm_kvcompress.config.reading import parse_config
    from vllm_kvcompress.errors import ConfigError, UnsupportedModelError
    from vllm_kvcompress.host.checks import check_config, check_setting
    from vllm_kvcompress.host.model_checks import check_layer

    changes: dict[str, Any] = dict(stand_in.changes)
    if stand_in.part is not None:
        changes = {stand_in.part: Overlay(getattr(base, stand_in.part), **changes)}
    if stand_in.model is not None:
        changes["model_config"] = _model_config(stand_in.model, folder)
    given = Overlay(base, **changes)
    try:
        with ExitStack() as stack:
            stack.enter_context(patch.dict("os.environ", stand_in.environment))
            if stand_in.version is not None:
                patched = patch("importlib.metadata.version", return_value=stand_in.version)
                stack.enter_context(patched)
            check_config(given)
            setting = parse_config(stand_in.setting)
            assert setting is not None
            check_setting(setting, given)
            if stand_in.layer is not None:
                check_layer("LAYER", _layer(stand_in.layer))
    except (ConfigError, UnsupportedModelError) as error:
        name = given.model_config.model
        return (
            str(error)
            .replace(name, "MODEL")
            .removeprefix("--kv-compression: ")
            .removesuffix(", or drop --kv-compression.")
        )
    return None


def _model_config(fields: Mapping[str, Any], folder: Path) -> Any:
    from unittest.mock import patch

    from vllm.config import ModelConfig
    from vllm.model_executor.models.registry import _LazyRegisteredModel

    (folder / "config.json").write_text(json.dumps(dict(fields)), encoding="utf-8")
    with patch.object(_LazyRegisteredModel, "inspect_model_cls", inspect_here):
        return ModelConfig(
            model=str(folder), tokenizer=str(folder), skip_tokenizer_init=True, dtype="float32",
            max_model_len=512,
        )  # fmt: skip


def _layer(impl: Mapping[str, Any]) -> Any:
    impl = dict(impl)
    sharing = impl.pop("kv_sharing_target_layer_name", None)
    backend = impl.pop("backend", "FLASH_ATTN")
    return SimpleNamespace(
        impl=SimpleNamespace(**impl),
        kv_sharing_target_layer_name=sharing,
        get_attn_backend=lambda: SimpleNamespace(get_name=lambda: backend),
    )


# --- stand-ins ---------------------------------------------------------------------------

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 64,
    "max_position_embeddings": 4096,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def model(architecture: str, model_type: str, **fields: Any) -> StandIn:
    """A stand-in for a model."""
    names = {"architectures": [architecture], "model_type": model_type}
    return StandIn(model={**SIZES, **names, **fields})


def llama(**fields: Any) -> StandIn:
    """A Llama with other fields."""
    return model("LlamaForCausalLM", "llama", **fields)


def options(part: str | None = None, **changes: Any) -> StandIn:
    """A stand-in for options of the server."""
    return StandIn(part=part, changes=changes)
