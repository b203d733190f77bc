"""Wraps functions of the host. Each wrap has a reason and a checked signature.

The implementation objects of attention layers are wrapped elsewhere, one by one
(worker/queries/taps.py, worker/codebook/reader.py). Everything else hooks in by subclass or
registered entry point: the scheduler, the worker, the model runner, the model state, the block
manager, the KV cache spec.
"""

import functools
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vllm.logger import init_logger

from vllm_kvcompress.config.query_marks import marks_warning
from vllm_kvcompress.config.reading import (
    CONFIG_KEY,
    NONE,
    parse_config,
    preset_names,
    server_setting,
)
from vllm_kvcompress.config.settings import CompressionConfig
from vllm_kvcompress.errors import ConfigError, UnsupportedModelError
from vllm_kvcompress.host.checks import check_config, check_setting
from vllm_kvcompress.host.cli_options import exit_with, move_to_additional_config
from vllm_kvcompress.host.model_checks import layer_groups_warning, num_full_layers
from vllm_kvcompress.host.prometheus import PrometheusRecorder
from vllm_kvcompress.host.request_checks import check_request
from vllm_kvcompress.lengths.budgets import layer_groups
from vllm_kvcompress.messages import ROOM_ATTRIBUTE, take_counts

logger = init_logger(f"vllm.{__name__}")

_MARK = "_kvcompress_wrapped"
_FROM_CLI = "_kvcompress_from_cli"

CPU_BLOCK_SIZE = 32
"""Block size on CPU where the user sets none: vLLM's 128 is coarse beside a small budget."""

_WORKERS = {
    "vllm.v1.worker.cpu_worker.CPUWorker": "vllm_kvcompress.worker.cpu_worker.CompressedCPUWorker",
    "vllm.v1.worker.gpu_worker.Worker": "vllm_kvcompress.worker.gpu_worker.CompressedGPUWorker",
}
_SCHEDULER = "vllm_kvcompress.core.scheduler.CompressedScheduler"
_ASYNC_SCHEDULER = "vllm_kvcompress.core.scheduler.CompressedAsyncScheduler"


@dataclass(frozen=True)
class Hook:
    """One wrapped host function.

    Attributes
    ----------
    target : str
        "module:Class.function".
    reason : str
        Why no entry point or subclass does.
    parameters : tuple[str, ...]
        The first parameters the host function must have, in order, for the wrapper to be right.
    wrap : callable
        Takes the host function and returns its replacement.
    """

    target: str
    reason: str
    parameters: tuple[str, ...]
    wrap: Callable[[Callable[..., Any]], Callable[..., Any]]

    def resolve(self) -> tuple[type, str, Any]:
        """Return the class, the attribute's name and the raw attribute."""
        module_name, _, path = self.target.partition(":")
        class_name, _, name = path.partition(".")
        owner = getattr(importlib.import_module(module_name), class_name)
        return owner, name, inspect.getattr_static(owner, name)

    def check_signature(self) -> None:
        """Raise UnsupportedModelError if the host function has changed."""
        owner, name, _ = self.resolve()
        found = tuple(inspect.signature(getattr(owner, name)).parameters)
        if found[: len(self.parameters)] != self.parameters:
            raise UnsupportedModelError(
                f"vllm-kvcompress does not fit this vLLM: {self.target} takes {found}, expected "
                f"{self.parameters} first; install vllm==0.32.0 or uninstall vllm-kvcompress."
            )


# --- command line -------------------------------------------------------------------------


def _add_cli_args(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def add_cli_args(parser: Any) -> Any:
        parser = original(parser)
        group = parser.add_argument_group(
            title="KV compression", description="Options of the vllm-kvcompress plugin."
        )
        group.add_argument(
            "--kv-compression",
            default=NONE,
            metavar="PRESET|FILE.yaml",
            help="Compress the KV cache of prompts: "
            f"none, {', '.join(preset_names())}, or the path of a YAML file.",
        )
        group.add_argument(
            "--kv-compression-config",
            default=None,
            metavar="JSON",
            help="Fields laid over the preset, as JSON or dotted: "
            "--kv-compression-config.budget.ratio=0.25",
        )
        group.add_argument(
            "--kv-compression-mode",
            choices=("evict", "draft"),
            default=None,
            help="evict: give the memory of evicted tokens back. draft: keep all tokens, draft "
            "over the survivors and verify over the whole cache (lossless, unless "
            "draft.acceptance is typical).",
        )
        group.add_argument(
            "--kv-draft-tokens",
            type=int,
            default=None,
            metavar="N",
            help="Tokens drafted per step in the mode draft; 4 if not given.",
        )
        return parser

    return add_cli_args


def _from_cli_args(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def from_cli_args(cls: Any, args: Any) -> Any:
        move_to_additional_config(args)
        engine_args = original(cls, args)
        setattr(engine_args, _FROM_CLI, True)
        return engine_args

    return from_cli_args


# --- engine configuration -----------------------------------------------------------------


def _install(vllm_config: Any, config: Any) -> None:
    """Put our classes into a vLLM configuration that has passed the checks."""
    scheduler = vllm_config.scheduler_config
    scheduler.scheduler_cls = _ASYNC_SCHEDULER if scheduler.async_scheduling else _SCHEDULER
    parallel = vllm_config.parallel_config
    parallel.worker_cls = _WORKERS[parallel.worker_cls]
    vllm_config.additional_config[CONFIG_KEY] = config.to_dict()


def _draft_carrier(given: Any, config: CompressionConfig) -> dict[str, Any]:
    """A speculative configuration that makes vLLM verify drafts; the runner swaps the drafter.

    vLLM's model runner V2 has no name for a speculator from outside. The n-gram one needs no
    weights, and everything around it (scheduling, verification, metrics) is the same.
    """
    if given is not None:
        raise ConfigError(
            "--speculative-config: the mode draft brings its own drafts; remove it, or choose "
            "--kv-compression-mode evict."
        )
    return {
        "method": "ngram_gpu",  # of the two, the one with which vLLM schedules asynchronously
        "num_speculative_tokens": config.num_draft_tokens,
        "draft_sample_method": config.draft.sample,
    }


def _create_engine_config(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        setting = (self.additional_config or {}).get(CONFIG_KEY)
        try:
            config = parse_config(setting)
            if config is None:
                return original(self, *args, **kwargs)
            from vllm.platforms import current_platform

            if config.num_draft_tokens:
                self.speculative_config = _draft_carrier(self.speculative_config, config)
            if self.block_size is None and current_platform.is_cpu():
                self.block_size = CPU_BLOCK_SIZE
            vllm_config = original(self, *args, **kwargs)
            check_config(vllm_config)
            check_setting(config, vllm_config)
            groups = layer_groups_warning(config, vllm_config.model_config)
            for warning in filter(None, (groups, marks_warning(config))):
                logger.warning("--kv-compression: %s", warning)
        except (ConfigError, UnsupportedModelError) as error:
            if getattr(self, _FROM_CLI, False):
                exit_with(error)
            raise
        _install(vllm_config, config)
        return vllm_config

    return create_engine_config


# --- requests -----------------------------------------------------------------------------


def _process_inputs(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def process_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        request = original(self, *args, **kwargs)
        try:
            check_request(self.vllm_config, request)
        except Exception:  # the server's answer to the client
            _forget_images(self.renderer.mm_processor_cache, request.mm_features)
            raise
        return request

    return process_inputs


def _forget_images(sent: Any, features: Any) -> None:
    """Images of a refused request never reach the engine, and count as sent since they were read.

    The next request with one of them would be answered with an error of vLLM's (cache drift).
    """
    for feature in features or ():
        if sent is not None:
            sent.invalidate(feature.mm_hash or feature.identifier)


# --- memory -------------------------------------------------------------------------------


def _allocate_slots(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def allocate_slots(self: Any, request: Any, num_new_tokens: int, **options: Any) -> Any:
        # The host's scheduler names all further arguments.
        room = getattr(self, ROOM_ATTRIBUTE, None)
        if room is None:
            return original(self, request, num_new_tokens, **options)
        return room.allocate(functools.partial(original, self), request, num_new_tokens, **options)

    return allocate_slots


# --- metrics ------------------------------------------------------------------------------


_RECORDER = "_kvcompress_recorder"


def _init_stat_loggers(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def init(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        original(self, vllm_config, *args, **kwargs)
        additional = vllm_config.additional_config
        setting = server_setting(additional)
        if setting is None:
            return
        model = vllm_config.model_config
        groups = layer_groups(num_full_layers(model), setting.layer_groups)
        recorder = PrometheusRecorder(
            model.served_model_name,
            self.engine_indexes,
            {each.policy.name for each in (setting, *setting.by_task.values())},
            max(groups) + 1,
        )
        setattr(self, _RECORDER, recorder)

    return init


def _record(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def record(
        self: Any,
        scheduler_stats: Any,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int | None = None,
    ) -> Any:
        if counts := take_counts(scheduler_stats):
            recorder = getattr(self, _RECORDER, None)
            if recorder is None:  # must not end the server for it
                logger.warning_once("No metrics of KV compression: this process has no setting.")
            else:
                try:
                    recorder.record(counts, engine_idx or 0)
                except Exception as error:  # the task that ends here hands out all answers
                    logger.exception(
                        "KV compression: some counts could not be added to /metrics (%s).",
                        type(error).__name__,
                    )
        return original(self, scheduler_stats, iteration_stats, mm_cache_stats, engine_idx)

    return record


HOOKS: tuple[Hook, ...] = (
    Hook(
        "vllm.engine.arg_utils:EngineArgs.add_cli_args",
        "vLLM loads general plugins before it builds the parser, but offers no place for options",
        ("parser",),
        _add_cli_args,
    ),
    Hook(
        "vllm.engine.arg_utils:EngineArgs.from_cli_args",
        "options of plugins are not carried from the parser to the engine arguments",
        ("args",),
        _from_cli_args,
    ),
    Hook(
        "vllm.engine.arg_utils:EngineArgs.create_engine_config",
        "scheduler and worker classes depend on what the platform decides while this runs",
        ("self",),
        _create_engine_config,
    ),
    Hook(
        "vllm.v1.engine.input_processor:InputProcessor.process_inputs",
        "vllm_xargs of plugins are not validated before the engine takes the request",
        ("self", "request_id", "prompt", "params"),
        _process_inputs,
    ),
    Hook(
        "vllm.v1.core.kv_cache_manager:KVCacheManager.allocate_slots",
        "the scheduler builds this class by name, and preempts or stops admitting on its None",
        ("self", "request", "num_new_tokens", "num_new_computed_tokens", "new_computed_blocks"),
        _allocate_slots,
    ),
    Hook(
        "vllm.v1.metrics.loggers:StatLoggerManager.record",
        "the entry point for stat loggers switches statistics on for servers that turned them off",
        ("self", "scheduler_stats", "iteration_stats", "mm_cache_stats", "engine_idx"),
        _record,
    ),
    Hook(
        "vllm.v1.metrics.loggers:StatLoggerManager.__init__",
        "our counters must be there before the first event, and after vLLM has dropped old ones",
        ("self", "vllm_config", "engine_idxs"),
        _init_stat_loggers,
    ),
)


def install_hooks() -> None:
    """Wrap every host function once; later calls do nothing."""
    for hook in HOOKS:
        owner, name, raw = hook.resolve()
        function = raw.__func__ if isinstance(raw, staticmethod | classmethod) else raw
        if getattr(function, _MARK, False):
            continue
        hook.check_signature()
        wrapped = hook.wrap(function)
        setattr(wrapped, _MARK, True)
        kind = type(raw) if isinstance(raw, staticmethod | classmethod) else None
        setattr(owner, name, kind(wrapped) if kind else wrapped)
