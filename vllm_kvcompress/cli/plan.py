"""The command `kvcompress plan`: what a prompt keeps, and how many requests fit.

Of a model nothing is read but its ``config.json``.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from vllm_kvcompress.cli.common import at_least, complain, make_table, say, show
from vllm_kvcompress.cli.left_alone import left_alone
from vllm_kvcompress.cli.plan_cache import check_cache, kept_share
from vllm_kvcompress.cli.speed import (
    add_speed_options,
    plan_speed,
    print_speed,
    speed_json,
    speed_warnings,
)
from vllm_kvcompress.config.mode_checks import compresses_once
from vllm_kvcompress.config.query_marks import marks_warning
from vllm_kvcompress.config.reading import parse_config, parse_json, preset_names
from vllm_kvcompress.config.settings import CompressionConfig
from vllm_kvcompress.errors import ConfigError
from vllm_kvcompress.host.latent_checks import check_latent_setting
from vllm_kvcompress.lengths.geometry import CACHE_DTYPES, DTYPE_BYTES, ModelGeometry, read_geometry
from vllm_kvcompress.lengths.shared import SharedCapacity, shared_capacity
from vllm_kvcompress.lengths.sizing import (
    Capacity,
    RequestUsage,
    capacity,
    format_size,
    longest_prompts,
    parse_size,
    request_usage,
)
from vllm_kvcompress.lengths.windowed_tables import plan_warnings
from vllm_kvcompress.reuse_checks import check_shared_prefix


class _Plan(NamedTuple):
    args: argparse.Namespace
    config: CompressionConfig
    geometry: ModelGeometry
    usage: RequestUsage
    fit: Capacity | None
    longest: tuple[int, int] | None
    shared: SharedCapacity | None


def run_plan(args: argparse.Namespace) -> int:
    config = parse_config(args.kv_compression, parse_json(args.kv_compression_config))
    if config is None:
        raise ConfigError(
            "--kv-compression: none keeps everything, so there is nothing to plan; allowed are "
            f"{', '.join(preset_names())}, or the path of a .yaml file."
        )
    variants: Mapping[str | None, CompressionConfig] = {None: config}
    if config.tasks:
        variants = {k: v for k, v in config.by_task.items() if config.task in ("auto", k)}
    geometry = read_geometry(args.model, args.dtype, args.kv_cache_dtype, latent=True)
    if geometry.is_latent:
        check_latent_setting(config, str(args.model))
    check_cache(geometry, variants.values())
    sizes = (args.prompt_len, args.output_len, args.block_size, args.tensor_parallel_size)
    usages = {task: request_usage(geometry, each, *sizes) for task, each in variants.items()}
    task, usage = max(usages.items(), key=lambda item: item[1].blocks_decoding)
    evicts = config.mode != "draft"
    fit = capacity(usage, args.kv_cache_memory) if args.kv_cache_memory and evicts else None
    size, ranks = args.block_size, args.tensor_parallel_size
    longest = None
    if fit:
        longest = longest_prompts(geometry, config, args.kv_cache_memory, size, ranks)
    plan = _Plan(
        args, variants[task], geometry, usage, fit, longest, _shared(args, config, geometry)
    )
    speed = plan_speed(args, plan.config, geometry, usage)
    for warning in [*_warnings(plan), *(speed_warnings(args, speed) if speed else ())]:
        complain("warning", warning)
    if args.kv_cache_memory and not evicts:
        complain(
            "warning", "--kv-cache-memory: the mode draft evicts nothing, so as many requests fit."
        )
    if len(set(usages.values())) > 1:
        complain("warning", f"requests of the task {task} keep most and are shown.")
    if args.json:
        found = _plan_json(plan) | ({"speed": speed_json(args, speed)} if speed else {})
        say(json.dumps(found, indent=2))
    else:
        _print_plan(plan)
        if speed:
            print_speed(args, speed)
    return 0


def _shared(
    args: argparse.Namespace, config: CompressionConfig, geometry: ModelGeometry
) -> SharedCapacity | None:
    if args.shared_prefix is None:
        return None
    if not args.kv_cache_memory:
        raise ConfigError("--shared-prefix: it counts requests, so --kv-cache-memory is needed.")
    if args.shared_prefix > args.prompt_len:
        raise ConfigError(
            f"--shared-prefix: {args.shared_prefix} tokens, and the prompt has {args.prompt_len}."
        )
    try:
        check_shared_prefix(config, config)
    except ConfigError as error:
        raise ConfigError(f"--shared-prefix: {error}") from None
    return shared_capacity(
        geometry, config, args.kv_cache_memory, args.shared_prefix,
        args.prompt_len + args.output_len, args.block_size, args.tensor_parallel_size,
    )  # fmt: skip


def _warnings(plan: _Plan) -> Iterator[str]:
    args, config, geometry, usage, fit, *_ = plan
    length, longest = args.prompt_len + args.output_len, geometry.max_positions
    if longest and length > longest:
        yield (
            f"{length} tokens are more than the model's max_position_embeddings ({longest}): the "
            "server would refuse the request unless --max-model-len or RoPE scaling allow it."
        )
    if usage.compacted_at is None:
        reason = "its budget leaves no whole block to free"
        if config.compacts_at_intervals and args.output_len < config.interval:
            reason = f"--output-len {args.output_len} is below the interval of {config.interval}"
        elif args.prompt_len < config.min_prompt_len:
            reason = f"it is shorter than min_prompt_len ({config.min_prompt_len})"
        yield f"a prompt of {args.prompt_len} tokens is left alone: {reason}."
    yield from plan_warnings(config, geometry)
    if warning := marks_warning(config):
        yield warning
    yield from left_alone(geometry)
    if usage.padding > 0:
        yield (
            f"layer groups differ in size, so {usage.padding:.1%} of the pool stays empty: choose "
            f"layer_groups of equal size for the model's {geometry.num_layers} layers."
        )
    if fit is not None and fit.one_by_one == 0:
        yield (
            f"--kv-cache-memory {format_size(args.kv_cache_memory)} is too small for one request, "
            f"which takes {usage.size(usage.blocks_needed + 1)}."
        )


def _plan_json(plan: _Plan) -> dict[str, Any]:
    args, config, geometry, usage, fit, longest, shared = plan
    asked = ("prompt_len", "output_len", "block_size", "tensor_parallel_size", "kv_cache_memory")
    return {
        "model": {"folder": str(args.model), **asdict(geometry)},
        "setting": config.to_dict(),
        **{name: getattr(args, name) for name in asked},
        **asdict(usage),
        "kept_ratio": 1.0 if config.mode == "draft" else usage.blocks_after / usage.blocks_before,
        "requests": asdict(fit) if fit else None,
        "shared_prefix": asdict(shared) if shared else None,
        "longest_prompt": {"without": longest[0], "with": longest[1]} if longest else None,
    }


def _print_plan(plan: _Plan) -> None:
    args, config, geometry, usage, fit, longest, shared = plan
    each = " per worker" if args.tensor_parallel_size > 1 else ""
    heads = geometry.heads_per_worker(args.tensor_parallel_size)
    say(
        f"{args.model}: {geometry.num_layers} layers, {heads}{each}, {geometry}, "
        f"{args.block_size} tokens per block\n"
        f"{args.kv_compression}: policy {config.policy.name}, prompt of {args.prompt_len:,} tokens"
    )
    drafts = config.mode == "draft"
    part = "view" if drafts else "kept"
    titles = ("layer group", "layers", "tokens", part, "blocks", part, "memory", part)
    table = make_table(*titles, right=range(2, 8))

    def sizes(before: int, after: int) -> list[str]:
        return [f"{before:,}", f"{after:,}", usage.size(before), usage.size(after)]

    for group in usage.groups:
        last = group.first_layer + group.num_layers - 1
        layers = f"{group.first_layer}-{last}" if group.num_layers > 1 else str(last)
        tokens = (f"{count:,}" for count in (group.tokens_before, group.tokens_after))
        blocks = sizes(group.blocks_before, group.blocks_after)
        table.add_row(str(group.layer_group), layers, *tokens, *blocks)
    table.add_section()
    table.add_row("total", "", "", "", *sizes(usage.blocks_before, usage.blocks_after))
    show(table)
    if drafts:
        say(
            "Nothing is evicted: the view is held beside the cache while memory lasts, and takes "
            "none where\nit has whole blocks of the cache."
        )
    elif usage.compacted_at is not None:
        later = usage.compacted_at - args.prompt_len
        say(
            f"{kept_share(geometry, usage.blocks_after / usage.blocks_before)}, from "
            + (f"{later:,} output tokens on" if later else "the end of the prompt on")
            + f". At most {usage.size(usage.blocks_peak)} are held,\nfor the one step that copies "
            f"the survivors before the old blocks are free; {usage.size(usage.blocks_needed)} in a "
            "pool without\nroom for the copy."
        )
        if config.compresses_in_prompts:
            say(
                f"The prompt is compressed every {config.prompt_interval:,} tokens, counted back "
                f"from its end: until it\nis done, {usage.size(usage.blocks_prompt)} are held at "
                "most."
            )
    if config.shared_blocks == "always" and usage.blocks_reserved:
        say(_reserve_text(plan))
    if config.waits_for_pressure:
        say(
            f"Requests stay whole until they hold {config.pressure.when:.0%} of the blocks of the "
            "pool, or one gets no blocks; then those that give\nmost are compressed, until "
            f"{config.pressure.until:.0%} are held. What is shown is a request that was."
        )
    if fit is not None and longest is not None:
        say(f"\nRequests at once in {format_size(args.kv_cache_memory)}{each}")
        _print_capacity(fit, longest, args.output_len, shared)


def _reserve_text(plan: _Plan) -> str:
    """What `shared_blocks: always` costs requests that begin alike."""
    args, config, usage = plan.args, plan.config, plan.usage
    num_tables = sum(group.num_tables for group in usage.groups)
    kept = -(-usage.blocks_reserved * args.block_size // num_tables)
    text = (
        f"Requests that share blocks: {usage.size(usage.blocks_reserved)} are set aside for each "
        "but one, until it is compacted.\nThey hold more than without compression where fewer than "
        f"{kept:,} tokens of each are its own"
    )
    is_once = compresses_once(config) and not config.compresses_in_prompts
    return text + ("; equal\nprompts share one copy, and need nothing." if is_once else ".")


def _print_capacity(
    fit: Capacity, longest: tuple[int, int], output_len: int, shared: SharedCapacity | None
) -> None:
    output = f" and {output_len:,} output tokens" if output_len else ""
    rows = {
        "prompts on their way": (fit.stock_prompts, fit.prompts),
        f"decoding: kept tokens{output}": (fit.stock_decoding, fit.decoding),
        "decoding, prompts admitted one after another": (fit.stock_decoding, fit.one_by_one),
        "tokens of the longest prompt, alone": longest,
    }
    if shared is not None:
        title = f"decoding, their first {shared.tokens:,} tokens shared"
        rows[title] = (shared.stock, shared.compressed)
    table = make_table("", "without", "with compression", right=(1, 2))
    for title, counts in rows.items():
        table.add_row(title, *(f"{count:,}" for count in counts))
    show(table)
    say("Prompts are admitted when the most that they will hold is free. Prefix-cache hits and")
    say("--max-num-seqs are ignored.")


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error).rstrip(".")) from None


def add_plan_options(option: Callable[..., Any]) -> None:
    number: dict[str, Any] = {"metavar": "N", "type": at_least(1)}
    option("--prompt-len", required=True, **number, help="tokens of the prompt")
    known = f"{', '.join(preset_names())}, or the path of a YAML file"
    option("--kv-compression", required=True, metavar="PRESET|FILE.yaml", help=known)
    folder = "local folder of a Hugging Face model, of which only config.json is read"
    option("--model", required=True, metavar="DIR", type=Path, help=folder)
    fields = """fields laid over the setting: '{"budget": {"ratio": 0.25}}'"""
    option("--kv-compression-config", default="{}", metavar="JSON", help=fields)
    generated = "output tokens (default %(default)s)"
    option("--output-len", default=0, metavar="N", type=at_least(0), help=generated)
    server = "as the server's (default %(default)s)"
    option("--block-size", default=16, **number, help=server)
    option("--tensor-parallel-size", default=1, **number, help=server)
    option("--dtype", default="auto", choices=["auto", *DTYPE_BYTES], help=server)
    option("--kv-cache-dtype", default="auto", choices=CACHE_DTYPES, help=server)
    memory = "memory for the cache on each worker, such as 40GiB: count the requests that fit"
    option("--kv-cache-memory", metavar="SIZE", type=_size, help=memory)
    shared = "tokens that all prompts begin with, compressed once for all (kv_shared_prefix)"
    option("--shared-prefix", **number, help=shared)
    option("--json", action="store_true", help="print it for programs")
    add_speed_options(option)
