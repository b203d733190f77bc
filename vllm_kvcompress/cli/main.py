"""The command `kvcompress`: which policies there are, whether a setting is valid, what it saves.

Importing this file imports neither torch nor vLLM. Policies need torch, so `policies`, `validate`
and `plan` import it when they look at one; none of them needs vLLM or a model's weights. `codebook`
needs both, and transformers: see ``codebook.py``.
"""

import argparse
import json
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from vllm_kvcompress import __version__
from vllm_kvcompress.cli.codebook import add_codebook_options, run_codebook
from vllm_kvcompress.cli.common import at_least, complain, make_table, say, show
from vllm_kvcompress.cli.doctor import add_doctor_options, run_doctor
from vllm_kvcompress.cli.eval import add_eval_options, run_eval
from vllm_kvcompress.cli.inspect import add_inspect_options, run_inspect
from vllm_kvcompress.cli.left_alone import left_alone
from vllm_kvcompress.cli.plan_cache import check_cache, kept_share
from vllm_kvcompress.cli.speed import (
    add_speed_options,
    plan_speed,
    print_speed,
    speed_json,
    speed_warnings,
)
from vllm_kvcompress.cli.tune import add_tune_options, run_tune
from vllm_kvcompress.config.reading import parse_config, parse_json, preset_names
from vllm_kvcompress.config.settings import CompressionConfig
from vllm_kvcompress.errors import ConfigError, UnsupportedModelError
from vllm_kvcompress.host.latent_checks import check_latent_setting
from vllm_kvcompress.lengths.geometry import CACHE_DTYPES, DTYPE_BYTES, ModelGeometry, read_geometry
from vllm_kvcompress.lengths.sizing import (
    Capacity,
    RequestUsage,
    capacity,
    format_size,
    parse_size,
    request_usage,
)
from vllm_kvcompress.lengths.windowed_tables import plan_warnings
from vllm_kvcompress.registry import POLICY_GROUP, load_policy_class, policy_names

_ERRORS = (ConfigError, UnsupportedModelError, OSError, UnicodeError)

LIST_WIDTH = 116  # at least, of the table of policies: words would be broken
PARAMETER_WIDTH = 30  # of a parameter and its value there, where there is a space to break at


# --- policies -----------------------------------------------------------------------------

_QUERIES = {"none": "", "window": "window queries", "prompt": "prompt queries", None: "(depends)"}
_DECODING = {True: "yes", False: "no", None: "(depends)"}


def _describe(policy_class: Any) -> dict[str, Any]:
    """What a class says about itself; what takes an instance is null if a parameter is required."""
    from vllm_kvcompress.policies.base import Policy

    if not (isinstance(policy_class, type) and issubclass(policy_class, Policy)):
        raise TypeError(f"{policy_class!r} is no subclass of vllm_kvcompress.policies.base.Policy")
    required = [name for name, field in policy_class.model_fields.items() if field.is_required()]
    policy = None if required else policy_class()
    return {
        "summary": (policy_class.__doc__ or "").strip().partition("\n")[0],
        "queries": policy and policy.queries.value,
        "output_projection": policy and policy.needs_output_projection,
        "rotary": policy and (policy.needs_rotary or policy.rerotates_keys),
        "while_decoding": policy and policy.runs_while_decoding,
        "parameters": policy.model_dump(mode="json") if policy else {},
        "required": required,
    }


def _presets_by_policy() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for preset in preset_names():
        try:
            config = parse_config(preset)
        except (ConfigError, ImportError, AttributeError):
            continue  # the row of its policy says what is wrong
        assert config is not None
        found.setdefault(config.policy.name, []).append(preset)
    return found


def installed_policies() -> list[dict[str, Any]]:
    """Every registered policy, third-party ones included; "error" is why one cannot be loaded."""
    names, presets = policy_names(), _presets_by_policy()
    owners = {entry.name: entry.dist for entry in entry_points(group=POLICY_GROUP)}
    found = []
    for name in names:
        owner = owners[name]
        try:
            described = {"error": None, **_describe(load_policy_class(name))}
        except Exception as error:  # somebody else's code: shown, and the others still listed
            described = {"error": f"{type(error).__name__}: {error}"}
        source = f"{owner.name} {owner.version}" if owner else "unknown"
        first = {"name": name, "distribution": source, "presets": presets.get(name, [])}
        found.append(first | described)
    return found


def _policy_row(policy: dict[str, Any]) -> list[str]:
    name = policy["name"]
    others = [f"  {preset} *" for preset in policy["presets"] if preset != name]
    names = "\n".join([name + " *" * (name in policy["presets"]), *others])
    if policy["error"]:
        return [names, f"cannot be loaded: {policy['error']}", "", "", ""]
    needs = [word.replace("_", " ") for word in ("output_projection", "rotary") if policy[word]]
    needs = [_QUERIES[policy["queries"]], *needs]
    parameters = [f"{parameter}: (required)" for parameter in policy["required"]]
    for item in policy["parameters"].items():
        parameters.append(yaml.safe_dump(dict([item]), default_flow_style=True, width=999)[1:-2])
    return [
        names,
        policy["summary"],
        "\n".join(filter(None, needs)) or "nothing",
        _DECODING[policy["while_decoding"]],
        "\n".join(textwrap.fill(each, PARAMETER_WIDTH) for each in parameters),
    ]


def _run_policies(args: argparse.Namespace) -> int:
    policies = installed_policies()
    if args.json:
        say(json.dumps(policies, indent=2))
        return 0
    for source in sorted({policy["distribution"] for policy in policies}):
        table = make_table(
            "policy", "what it does", "needs", "decoding", "parameters", folds=(1, 2)
        )
        for policy in policies:
            if policy["distribution"] == source:
                table.add_row(*_policy_row(policy), style="red" if policy["error"] else None)
        say(f"From {source}")
        show(table, LIST_WIDTH)
    say("* also a preset. decoding: can also compress every interval of generated tokens.")
    return 0


# --- validate -----------------------------------------------------------------------------


def resolved_yaml(config: CompressionConfig) -> str:
    """A complete setting as YAML, with the policy's defaults written out."""
    fields = config.to_dict()
    policy = config.build_policy().model_dump(mode="json")
    fields["policy"] = {"name": config.policy.name, **policy}
    return yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)


def _run_validate(args: argparse.Namespace) -> int:
    status = 0
    for number, setting in enumerate(args.files):
        try:
            config = parse_config(setting)
        except _ERRORS as error:
            complain("error", str(error))
            status = 1
            continue
        text = "# no compression\n" if config is None else resolved_yaml(config)
        say(("---\n" if number else "") + f"# {setting}\n" + text.rstrip())
    return status


# --- plan ---------------------------------------------------------------------------------


class _Plan(NamedTuple):
    args: argparse.Namespace
    config: CompressionConfig
    geometry: ModelGeometry
    usage: RequestUsage
    fit: Capacity | None


def _run_plan(args: argparse.Namespace) -> int:
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
    plan = _Plan(args, variants[task], geometry, usage, fit)
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


def _warnings(plan: _Plan) -> Iterator[str]:
    args, config, geometry, usage, fit = plan
    length, longest = args.prompt_len + args.output_len, geometry.max_positions
    if longest and length > longest:
        yield (
            f"{length} tokens are more than the model's max_position_embeddings ({longest}): the "
            "server would refuse the request unless --max-model-len or RoPE scaling allow it."
        )
    if usage.compacted_at is None:
        reason = "its budget leaves no whole block to free"
        if config.compresses_while_decoding and args.output_len < config.interval:
            reason = f"--output-len {args.output_len} is below the interval of {config.interval}"
        elif args.prompt_len < config.min_prompt_len:
            reason = f"it is shorter than min_prompt_len ({config.min_prompt_len})"
        yield f"a prompt of {args.prompt_len} tokens is left alone: {reason}."
    yield from plan_warnings(config, geometry)
    yield from left_alone(geometry)
    if usage.padding > 0:
        yield (
            f"layer groups differ in size, so {usage.padding:.1%} of the pool stays empty: choose "
            f"layer_groups of equal size for the model's {geometry.num_layers} layers."
        )
    if fit is not None and fit.one_by_one == 0:
        yield (
            f"--kv-cache-memory {format_size(args.kv_cache_memory)} is too small for one request "
            f"to be compressed, which takes {usage.size(usage.blocks_peak + 1)} for one step."
        )


def _plan_json(plan: _Plan) -> dict[str, Any]:
    args, config, geometry, usage, fit = plan
    asked = ("prompt_len", "output_len", "block_size", "tensor_parallel_size", "kv_cache_memory")
    return {
        "model": {"folder": str(args.model), **asdict(geometry)},
        "setting": config.to_dict(),
        **{name: getattr(args, name) for name in asked},
        **asdict(usage),
        "kept_ratio": 1.0 if config.mode == "draft" else usage.blocks_after / usage.blocks_before,
        "requests": asdict(fit) if fit else None,
    }


def _print_plan(plan: _Plan) -> None:
    args, config, geometry, usage, fit = plan
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
            "the survivors before the old blocks are free."
        )
    if fit is not None:
        say(f"\nRequests at once in {format_size(args.kv_cache_memory)}{each}")
        _print_capacity(fit, args.output_len)


def _print_capacity(fit: Capacity, output_len: int) -> None:
    output = f" and {output_len:,} output tokens" if output_len else ""
    rows = {
        "whole prompts, none compressed yet": (fit.stock_prompts, fit.prompts),
        f"decoding: kept tokens{output}": (fit.stock_decoding, fit.decoding),
        "decoding, prompts admitted one after another": (fit.stock_decoding, fit.one_by_one),
    }
    table = make_table("", "without", "with compression", right=(1, 2))
    for title, counts in rows.items():
        table.add_row(title, *(f"{count:,}" for count in counts))
    show(table)
    say("Prompts are admitted whole. Prefix-cache hits and --max-num-seqs are ignored.")


# --- the command line ---------------------------------------------------------------------


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error).rstrip(".")) from None


def _add_plan_options(option: Callable[..., Any]) -> None:
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
    option("--json", action="store_true", help="print it for programs")
    add_speed_options(option)


def make_parser() -> argparse.ArgumentParser:
    """Options of `kvcompress` and its commands."""
    parser = argparse.ArgumentParser(
        prog="kvcompress", description="Look at KV-cache compression settings without a server."
    )
    parser.add_argument("--version", action="version", version=f"kvcompress {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run: Callable[..., int], text: str) -> Callable[..., Any]:
        command = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        command.set_defaults(run=run)
        return command.add_argument

    option = add("policies", _run_policies, "list the installed policies, third-party ones too")
    option("--json", action="store_true", help="print them for programs")
    option = add("validate", _run_validate, "check settings and print them in full, as YAML")
    option("files", nargs="+", metavar="FILE", help="a .yaml file, or the name of a preset")
    text = "work out what a prompt keeps per layer group, and how many requests fit"
    _add_plan_options(add("plan", _run_plan, text))
    text = "measure on a model which layers a codebook pays for, and how large it must be"
    add_codebook_options(add("codebook", run_codebook, text))
    text = "compare a model's answers under compressed caches with those from the whole cache"
    add_eval_options(add("eval", run_eval, text))
    text = "choose the cheapest setting that keeps a target on your own prompts"
    add_tune_options(add("tune", run_tune, text))
    text = "show which tokens of a prompt survive, per layer group and KV head"
    add_inspect_options(add("inspect", run_inspect, text))
    text = "check this installation, and whether a server would start with a model and a setting"
    add_doctor_options(add("doctor", run_doctor, text))
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return 0, or 1 after an error (argparse exits with 2 on wrong usage)."""
    args = make_parser().parse_args(argv)
    try:
        return args.run(args)
    except _ERRORS as error:
        complain("error", str(error))
    except ImportError as error:
        complain("error", f"a policy's module cannot be imported: {error}.")
    return 1


if __name__ == "__main__":
    sys.exit(main())
