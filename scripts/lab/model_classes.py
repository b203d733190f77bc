"""Which of vLLM's model classes for text generation a tree of this project accepts.

Goes through vLLM's registry. Of each architecture whose configuration class can be found without a
network (transformers', or vLLM's own), the default configuration is written to a folder, vLLM makes
its real ``ModelConfig`` of it, and this tree's own checks judge that: those before weights are
loaded, and those of layers, on a stand-in layer that has what the configuration or the class's
source says (a soft cap, ALiBi, sinks). No weights are made. What is judged is the class with its
default configuration: a model may have another one.

Run it in any tree; it fills one column of the table and leaves the other. The earlier tree is a git
worktree of the commit, first on the path:

    PYTHONPATH=OTHER_TREE python scripts/model_classes.py --column before
    python scripts/model_classes.py --column after
"""

import argparse
import csv
import inspect
import re
import sys
import tempfile
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

TABLE = Path(__file__).parents[2] / "docs" / "benchmarks" / "model_classes.csv"
COLUMNS = ("architecture", "kind", "configuration", "before", "after", "why_before", "why_after")
ACCEPTED, REFUSED, UNKNOWN = "accepted", "refused", "unknown"
PLACES = {
    "text": "_TEXT_GENERATION_MODELS",
    "multimodal": "_MULTIMODAL_MODELS",
    "transformers": "_TRANSFORMERS_SUPPORTED_MODELS",
}

TRAITS = "none: by its traits alone"
AFTER_LOADING = (
    "once loaded: around its layers there is no output projection or rotary embedding of a kind "
    "that is known"
)
"""What trees say that have no part_checks.py, of all models on vLLM's Transformers backend."""


def architectures() -> Iterator[tuple[str, str]]:
    """(architecture, kind) of all that generate text."""
    from vllm.model_executor.models import registry

    seen = set()
    for kind, name in PLACES.items():
        for architecture in getattr(registry, name):
            if architecture not in seen:
                seen.add(architecture)
                yield architecture, kind


def default_config(architecture: str) -> Any:
    """The default configuration of the class's model type; LookupError if there is none."""
    from transformers import AutoConfig
    from transformers.models.auto import modeling_auto
    from vllm.transformers_utils.config import _CONFIG_REGISTRY

    for name, table in vars(modeling_auto).items():
        if not name.endswith("_MAPPING_NAMES"):
            continue
        for model_type, classes in table.items():
            if architecture in ([classes] if isinstance(classes, str) else classes):
                return AutoConfig.for_model(model_type)
    plain = re.sub("For(CausalLM|ConditionalGeneration)|LMHeadModel|Model$", "", architecture)
    for model_type in [*_CONFIG_REGISTRY]:
        if model_type.replace("_", "") == plain.lower():
            return _CONFIG_REGISTRY[model_type]()
    raise LookupError("neither transformers nor vLLM has a configuration class of it")


def model_config(config: Any, architecture: str, folder: str) -> Any:
    """vLLM's ModelConfig of a default configuration."""
    from vllm.config import ModelConfig

    config.architectures = [architecture]
    text = config.get_text_config()
    plain = vars(text)  # configurations by layer refuse to be asked for these
    if plain.get("num_key_value_heads", 0) is None:
        text.num_key_value_heads = text.num_attention_heads
    if plain.get("head_dim", 0) is None:
        text.head_dim = text.hidden_size // text.num_attention_heads
    config.save_pretrained(folder)
    return ModelConfig(model=folder, tokenizer=folder, skip_tokenizer_init=True, dtype="float32")


def inspect_here(self: Any) -> Any:
    """In the place of vLLM's, which starts a process for every class."""
    from vllm.model_executor.models.registry import _ModelInfo

    return _ModelInfo.from_model_cls(self.load_model_cls())


def judge(model: Any, config: Any) -> tuple[str, str]:
    """(verdict, reason) of this tree on a model configuration; `config` is one that it accepts."""
    from vllm_kvcompress.config.reading import parse_config
    from vllm_kvcompress.errors import ConfigError, UnsupportedModelError
    from vllm_kvcompress.host import checks

    judged = Overlay(config, model_config=model)
    try:
        checks.check_config(judged)
        setting: Any = parse_config("snapkv")
        checks.check_setting(setting, judged)
        _check_layer("its layers", _layer(model))
    except (ConfigError, UnsupportedModelError) as error:
        return REFUSED, str(error).replace(model.model, "it")
    if model.using_transformers_backend() and not find_spec("vllm_kvcompress.host.part_checks"):
        return REFUSED, AFTER_LOADING
    return ACCEPTED, ""


def _check_layer(name: str, layer: Any) -> None:
    place = "vllm_kvcompress.host.model_checks"
    if find_spec(place) is None:  # the earlier tree has it in another file
        place = "vllm_kvcompress.host.checks"
    import_module(place).check_layer(name, layer)


def _layer(model: Any) -> Any:
    """What a layer of the model would have, as far as this can be known."""
    text = model.hf_text_config
    cls, _ = model.registry.resolve_model_cls(model.architectures, model)
    has_sinks = "sinks=" in inspect.getsource(sys.modules[cls.__module__])
    return SimpleNamespace(
        kv_sharing_target_layer_name=(
            "another" if getattr(text, "num_kv_shared_layers", 0) else None
        ),
        get_attn_backend=lambda: SimpleNamespace(get_name=lambda: "FLASH_ATTN"),
        impl=SimpleNamespace(
            alibi_slopes=[1.0] if model.uses_alibi else None,
            logits_soft_cap=getattr(text, "attn_logit_softcapping", None),
            sinks=[1.0] if has_sinks else None,
        ),
    )


class Overlay:
    """A configuration with some attributes changed."""

    def __init__(self, base: Any, **changes: Any) -> None:
        self._base = base
        self.__dict__.update(changes)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._base, name)


def refused_by_traits(architecture: str, kind: str) -> str | None:
    """What this tree says of a class without a configuration; None if its traits do not tell.

    That the registry lists it as multimodal, and that it says of itself that it is a hybrid or
    without attention. What these do not tell is not told: nothing is accepted by traits.
    """
    from vllm.model_executor.models import interfaces, registry

    try:
        cls: Any = registry.ModelRegistry.models[architecture].load_model_cls()
    except Exception:  # a package that is not installed, for example
        cls = None
    model = SimpleNamespace(
        model="it",
        is_multimodal_model=kind == "multimodal",
        is_hybrid=cls is not None and interfaces.is_hybrid(cls),
        is_attention_free=cls is not None and interfaces.is_attention_free(cls),
        is_encoder_decoder=False,
        use_mla=False,
        is_diffusion=False,
    )
    reason = _model_kind(SimpleNamespace(model_config=model))
    return None if reason is None else f"--kv-compression: {reason}, or drop --kv-compression."


def _model_kind(config: Any) -> str | None:
    from vllm_kvcompress.host import checks

    name = "model_kind" if hasattr(checks, "model_kind") else "_model_kind"  # the earlier tree's
    reason: str | None = getattr(checks, name)(config)
    return reason


def judged(architecture: str, kind: str, base: Any) -> tuple[str, str, str]:
    """(configuration, verdict, reason) of one architecture."""
    with tempfile.TemporaryDirectory() as folder:
        name = ""
        try:
            config = default_config(architecture)
            name = f"{type(config).__name__}()"
            model = model_config(config, architecture, folder)
        except Exception as error:  # any class may refuse its own default, in any way
            if refusal := refused_by_traits(architecture, kind):
                return TRAITS, REFUSED, refusal
            reason = " ".join(str(error).replace(folder, "FOLDER").split())
            return name, UNKNOWN, f"{type(error).__name__}: {reason[:160]}"
        try:
            return name, *judge(model, base)
        except Exception as error:  # a check that fails is a fault of ours, and shows
            return name, UNKNOWN, f"the check failed: {type(error).__name__}: {str(error)[:160]}"


def accepted_config(folder: str) -> Any:
    """A VllmConfig that every check accepts, but for its model."""
    from transformers import LlamaConfig
    from vllm.engine.arg_utils import EngineArgs

    small = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = LlamaConfig(num_hidden_layers=2, intermediate_size=64, vocab_size=64, **small)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    args = EngineArgs(model=folder, dtype="float32", skip_tokenizer_init=True)
    return args.create_engine_config()


def read(path: Path) -> dict[str, dict[str, str]]:
    """Rows of the table, by architecture."""
    if not path.exists():
        return {}
    with path.open(encoding="utf-8", newline="") as file:
        return {row["architecture"]: row for row in csv.DictReader(file)}


def main(argv: list[str] | None = None) -> int:
    """Fill one column."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--column", choices=("before", "after"), required=True)
    parser.add_argument("--table", type=Path, default=TABLE)
    parser.add_argument("--only", nargs="*", help="architectures; all if left out")
    options = parser.parse_args(argv)
    from vllm.model_executor.models.registry import _LazyRegisteredModel

    rows = read(options.table)
    with (
        tempfile.TemporaryDirectory() as folder,
        patch.object(_LazyRegisteredModel, "inspect_model_cls", inspect_here),
    ):
        base = accepted_config(folder)
        for architecture, kind in architectures():
            if options.only and architecture not in options.only:
                continue
            name, verdict, reason = judged(architecture, kind, base)
            row = rows.setdefault(architecture, dict.fromkeys(COLUMNS, ""))
            row |= {"architecture": architecture, "kind": kind, "configuration": name}
            row |= {options.column: verdict, f"why_{options.column}": reason}
            print(f"{architecture}: {verdict} {reason}", flush=True)
    with options.table.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows[name] for name, _ in architectures() if name in rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
