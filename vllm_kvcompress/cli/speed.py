"""`kvcompress plan --speed`: what a setting costs and saves in time, computed from rates."""

import argparse
import math
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_kvcompress.cli.common import make_table, say, show
from vllm_kvcompress.config.settings import CompressionConfig
from vllm_kvcompress.errors import ConfigError
from vllm_kvcompress.lengths.geometry import ModelGeometry, read_config
from vllm_kvcompress.lengths.sizing import RequestUsage, format_size
from vllm_kvcompress.speed.machine import (
    LAUNCH_MICROSECONDS,
    MACHINES,
    make_machine,
    parse_bandwidth,
    parse_flops,
)
from vllm_kvcompress.speed.paths import Path as Work
from vllm_kvcompress.speed.shapes import read_shape

if TYPE_CHECKING:
    from vllm_kvcompress.speed.plan import SpeedPlan

DEFAULT_BATCHES = (1, 32, 256)

LEFT_OUT = (
    "activations, norms and block tables",
    "sampling and the host's own work per step",
    "waits between tensor-parallel ranks",
    "what kernels reach below the peak",
    "prompts that share steps with decoding",
)
"""What no number here contains."""

_OPTIONS = (
    "machine", "measured", "bandwidth", "flops", "link_bandwidth", "launch_us", "batch", "accepted",
)  # fmt: skip


# --- options ------------------------------------------------------------------------------


def _checked(parse: Callable[[str], float]) -> Callable[[str], float]:
    """Type of an option whose error is a sentence of ours."""

    def rate(text: str) -> float:
        try:
            return parse(text)
        except ConfigError as error:
            raise argparse.ArgumentTypeError(str(error).rstrip(".")) from None

    return rate


def _number_from(smallest: float) -> Callable[[str], float]:
    def number(text: str) -> float:
        value = float(text)
        if not smallest <= value < math.inf:
            raise argparse.ArgumentTypeError(f"must be {smallest:g} or more, got {text}")
        return value

    return number


def _batches(text: str) -> tuple[int, ...]:
    sizes = tuple(int(part) for part in text.split(","))
    if min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"must be whole numbers from 1 up, got {text}")
    return sizes


def add_speed_options(option: Callable[..., Any]) -> None:
    """Options of `plan` that go with ``--speed``."""
    text = "also compute times: bytes, FLOPs and launches of prefill, compaction, decoding, drafts"
    option("--speed", action="store_true", help=text)
    names = f"rates of NVIDIA's data sheet: {', '.join(MACHINES)}"
    option("--machine", choices=list(MACHINES), help=names)
    text = "kernels.csv of scripts/bench_kernels.py: bandwidth and FLOP/s that were measured"
    option("--measured", metavar="FILE", type=Path, help=text)
    rate: dict[str, Any] = {"metavar": "RATE", "type": _checked(parse_bandwidth)}
    option("--bandwidth", **rate, help="of the GPU's memory, such as 4.8TB/s")
    text = "of matrix products in the model's dtype, such as 990TFLOP/s"
    option("--flops", metavar="RATE", type=_checked(parse_flops), help=text)
    text = "from one tensor-parallel rank to another, such as 450GB/s"
    option("--link-bandwidth", **rate, help=text)
    text = f"microseconds of the host per kernel launch (default {LAUNCH_MICROSECONDS:g}, assumed)"
    option("--launch-us", metavar="N", type=_number_from(0), help=text)
    text = f"requests decoding at once (default {','.join(map(str, DEFAULT_BATCHES))})"
    option("--batch", metavar="N,N,...", type=_batches, help=text)
    text = "tokens per step that drafts over the survivors gain, 1 to draft.tokens + 1"
    option("--accepted", metavar="N", type=_number_from(1), help=text)


def plan_speed(
    args: argparse.Namespace,
    config: CompressionConfig,
    geometry: ModelGeometry,
    usage: RequestUsage,
) -> "SpeedPlan | None":
    """The plan that the options ask for; None without ``--speed``.

    Raises
    ------
    ConfigError
        If options do not fit together, or the model or the policy cannot be counted.
    UnsupportedModelError
        If the model's layers are not modelled.
    """
    if not args.speed:
        for name in _OPTIONS:
            if getattr(args, name) is not None:
                raise ConfigError(f"--{name.replace('_', '-')}: goes with --speed only.")
        return None
    if config.compresses_in_prompts:
        raise ConfigError(
            "--speed: times of compactions inside the prompt are not modelled; plan with the "
            "trigger end_of_prompt, or leave it out."
        )
    machine = make_machine(
        args.machine, args.measured, args.bandwidth, args.flops, args.link_bandwidth, args.launch_us
    )
    shape = read_shape(read_config(args.model), geometry).shard(args.tensor_parallel_size)
    most = config.draft.tokens + 1
    if args.accepted is not None and args.accepted > most:
        raise ConfigError(
            f"--accepted {args.accepted:g}: with draft.tokens {config.draft.tokens} a step gains "
            f"at most {most} tokens."
        )
    from vllm_kvcompress.speed.plan import SpeedPlan

    sizes = args.prompt_len, args.output_len, args.block_size
    plan = SpeedPlan(shape, machine, config, usage, *sizes)
    if args.accepted is not None and not plan.can_draft:
        raise ConfigError(
            "--accepted: drafts over the survivors are computed for settings with the trigger "
            "end_of_prompt, and without codebook and draft.budget."
        )
    return plan


def speed_warnings(args: argparse.Namespace, plan: "SpeedPlan") -> Iterator[str]:
    """What a reader should know beside the numbers."""
    if args.tensor_parallel_size > 1 and math.isinf(plan.machine.link_bandwidth):
        yield (
            "the sums of activations over ranks take no time here: give --link-bandwidth (or "
            "--machine)."
        )
    if not args.output_len:
        yield "--output-len is 0: steps are those of the first output token, and no throughput."


# --- for programs -------------------------------------------------------------------------


def work_json(work: Work, plan: "SpeedPlan") -> dict[str, Any]:
    """One path, with its stages."""
    return {
        "bytes_read": work.read,
        "bytes_written": work.written,
        "flops": work.flops,
        "launches": work.launches,
        "device_seconds": work.device_seconds(plan.machine),
        "host_seconds": work.host_seconds(plan.machine),
        "seconds": work.seconds(plan.machine),
        "stages": [asdict(stage) for stage in work.stages],
    }


def speed_json(args: argparse.Namespace, plan: "SpeedPlan") -> dict[str, Any]:
    """Everything, marked as computed."""
    rates = {k: v if v != math.inf else None for k, v in asdict(plan.machine).items()}
    found: dict[str, Any] = {
        "computed": True,
        "machine": rates,
        "left_out": LEFT_OUT,
        "prefill": work_json(plan.prefill, plan),
        "capture": work_json(plan.compaction.capture, plan),
        "compaction": work_json(plan.compaction.run, plan),
        "batches": [_batch_json(plan, batch, args.accepted) for batch in _batches_of(args)],
        "throughput": None,
    }
    if args.kv_cache_memory and args.output_len:
        served = plan.served(args.kv_cache_memory, args.accepted)
        found["throughput"] = {name: each and asdict(each) for name, each in served.items()}
    return found


def _batches_of(args: argparse.Namespace) -> tuple[int, ...]:
    return args.batch or DEFAULT_BATCHES


def _batch_json(plan: "SpeedPlan", batch: int, accepted: float | None) -> dict[str, Any]:
    found: dict[str, Any] = {"batch": batch, "without": work_json(plan.stock_step(batch), plan)}
    if plan.evicts:
        found["with"] = work_json(plan.step(batch), plan)
        found |= {"gain": plan.gain(batch), "tokens_to_pay": plan.tokens_to_pay(batch)}
    if plan.can_draft:
        case = plan.drafting(batch)
        found["draft"] = {
            "num_drafts": case.num_drafts,
            "draft_step": work_json(case.draft_step, plan),
            "verify_pass": work_json(case.verify_pass, plan),
            "accepted_to_pay": plan.needed_length(batch),
            "speed_up": accepted and case.speed_up(accepted, machine=plan.machine),
        }
    return found


# --- for people ---------------------------------------------------------------------------


def print_speed(args: argparse.Namespace, plan: "SpeedPlan") -> None:
    """Tables behind those of memory."""
    say(
        f"\nTimes, COMPUTED and not measured, on {plan.machine.describe()}\n({plan.machine.source})"
    )
    each = " and worker" if args.tensor_parallel_size > 1 else ""
    say(f"\nOnce per request{each}")
    _print_once(plan)
    drafts = "; drafts and a verify pass make a step of draft mode" * plan.can_draft
    say(f"Every step{each}, {plan.tail:,.0f} output tokens in{drafts}")
    _print_steps(args, plan)
    if args.kv_cache_memory and args.output_len:
        say(f"Output tokens per second with a full cache of {format_size(args.kv_cache_memory)}")
        _print_throughput(args, plan)
    say(textwrap.fill(f"Left out: {'; '.join(LEFT_OUT)}.", 100))


def _numbers(work: Work, plan: "SpeedPlan") -> list[str]:
    return [
        f"{work.read / 1e9:,.3f}",
        f"{work.written / 1e9:,.3f}",
        f"{work.flops / 1e12:,.3f}",
        f"{work.launches:,}",
        f"{work.device_seconds(plan.machine) * 1e3:,.2f}",
        f"{work.host_seconds(plan.machine) * 1e3:,.2f}",
    ]


def _print_once(plan: "SpeedPlan") -> None:
    titles = ("", "GB read", "GB written", "TFLOP", "launches", "ms of the GPU", "ms of the host")
    table = make_table(*titles, right=range(1, 7))
    table.add_row("prefill", *_numbers(plan.prefill, plan))
    table.add_section()
    for stage in plan.compaction.path.stages:
        table.add_row(stage.name, *_numbers(Work((stage,)), plan))
    table.add_section()
    whole = plan.compaction.path
    table.add_row("compression", *_numbers(whole, plan))
    show(table)
    share = whole.seconds(plan.machine) / plan.prefill.seconds(plan.machine)
    say(f"Compression adds {share:.2%} to the prefill, by the longer of GPU and host.\n")


def _print_steps(args: argparse.Namespace, plan: "SpeedPlan") -> None:
    titles = ["batch", "without: GB", "ms"]
    if plan.evicts:
        titles += ["with: GB", "ms", "faster", "pays after"]
    if plan.can_draft:
        titles += [f"{plan.config.draft.tokens} drafts: GB", "ms", "pays from"]
        titles += [f"at {args.accepted:g}"] if args.accepted else []
    table = make_table(*titles, right=range(len(titles)))
    for batch in _batches_of(args):
        cells = [f"{batch:,}", *_short(plan.stock_step(batch), plan)]
        if plan.evicts:
            pays = plan.tokens_to_pay(batch)
            cells += [*_short(plan.step(batch), plan), f"{plan.gain(batch):.2f} x"]
            cells.append("never" if pays is None else f"{pays:,.1f} tokens")
        if plan.can_draft:
            case = plan.drafting(batch)
            cells += [*_short(case.step, plan), draft_limit(plan, batch)]
            if args.accepted:
                cells.append(f"{case.speed_up(args.accepted, machine=plan.machine):.2f} x")
        table.add_row(*cells)
    show(table)


def draft_limit(plan: "SpeedPlan", batch: int) -> str:
    """Accepted length from which on drafting pays, for people."""
    needed = plan.needed_length(batch)
    return f"{needed:.2f} a step" if needed <= plan.config.draft.tokens + 1 else "never"


def _short(work: Work, plan: "SpeedPlan") -> list[str]:
    return [f"{work.num_bytes / 1e9:,.2f}", f"{work.seconds(plan.machine) * 1e3:,.2f}"]


def _print_throughput(args: argparse.Namespace, plan: "SpeedPlan") -> None:
    titles = ("", "requests at once", "ms per step", "while all decode", "prompts included")
    table = make_table(*titles, right=range(1, 5))
    names = {"without": "without compression", "with": "with compression"}
    names["draft"] = f"draft mode at {args.accepted:g} a step" if args.accepted else ""
    for name, each in plan.served(args.kv_cache_memory, args.accepted).items():
        cells = ["0", "", "", ""]
        if each is not None:
            step = f"{each.step_seconds * 1e3:,.2f}"
            cells = [f"{each.batch:,}", step, f"{each.decode_rate:,.0f}", f"{each.rate:,.0f}"]
        table.add_row(names[name], *cells)
    show(table)
