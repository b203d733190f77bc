"""`kvcompress inspect`: which tokens of a prompt survive, in the terminal or as a page.

Runs the model with transformers; needs vLLM too, for the worker's own code. Importing this file
imports none of them.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml
from rich.style import Style
from rich.text import Text

from vllm_kvcompress.cli.common import at_least, complain, make_console, make_table, say, show
from vllm_kvcompress.cli.common import share as share_of_one
from vllm_kvcompress.config.reading import parse_config, parse_json, preset_names
from vllm_kvcompress.errors import ConfigError
from vllm_kvcompress.lengths.geometry import read_geometry

if TYPE_CHECKING:
    from vllm_kvcompress.evaluation.inspected_prompt import Piece
    from vllm_kvcompress.evaluation.inspection import Inspection, LayerSet

_INSTALL = "pip install 'vllm-kvcompress[cpu]', or [cuda] for a GPU"

EVICTED = 0.05
"""Tokens that a smaller share of the heads keeps are folded away in long runs."""
LONG_RUN, SHORT_RUN = 40, 2  # tokens of a run that is folded; the second where there is no colour
NUM_BINS = 64
_BARS = " ▁▂▃▄▅▆▇█"
# From cold to hot on a dark or a light terminal: the text has colours of its own.
_HEAT = ("#3b3f46", "#5a4636", "#7d4d27", "#a3561b", "#cc6210", "#ff7a05")


def add_inspect_options(option: Callable[..., Any]) -> None:
    """Options of the command; `option` is a parser's ``add_argument``."""
    option("--model", required=True, metavar="DIR", type=Path, help="folder of a Llama-like model")
    option("--prompt", metavar="FILE", help="file with the prompt; - reads standard input")
    option("--text", metavar="TEXT", help="the prompt itself")
    known = f"{', '.join(preset_names())}, or the path of a YAML file"
    option("--kv-compression", required=True, metavar="PRESET|FILE.yaml", help=known)
    option("--kv-compression-config", default="{}", metavar="JSON", help="fields laid over it")
    text = "share of the prompt to keep (default: the setting's)"
    option("--budget", metavar="RATIO", type=share_of_one, help=text)
    text = "put the text into the model's chat template (default: if it has one)"
    option("--chat", action=argparse.BooleanOptionalAction, default=None, help=text)
    text = "a passage of the prompt: say how much of it survives"
    option("--needle", metavar="TEXT", help=text)
    text = "layers to show, one row each, such as 0,7,12 (default: all, by layer group)"
    option("--layers", metavar="N,N,...", default="", help=text)
    option("--html", metavar="FILE.html", type=Path, help="write a page of it, too")
    text = "answer in at most N tokens, over the whole cache and over the survivors"
    option("--max-tokens", metavar="N", type=at_least(1), default=0, help=text)
    option("--full", action="store_true", help="fold no evicted text away")
    text = "as the server's (default %(default)s; on a CPU it takes 32)"
    option("--block-size", metavar="N", type=at_least(1), default=16, help=text)
    text = "where to run the model, such as cpu or cuda (default: a GPU where there is one)"
    option("--device", metavar="NAME", help=text)
    option("--json", action="store_true", help="print it for programs")


def run_inspect(args: argparse.Namespace) -> int:
    """Look at one prompt and show what survives."""
    inspection = _inspect(args)
    for note in inspection.notes:
        complain("warning", note)
    if args.html is not None:
        _write_page(args, inspection)
    if args.json:
        say(json.dumps(_as_json(args, inspection), indent=1))
        return 0
    _print(args, inspection)
    if args.html is not None:
        say(f"\nWritten to {args.html}.")
    return 0


# --- what to look at ----------------------------------------------------------------------


def _read_text(args: argparse.Namespace) -> str:
    if (args.prompt is None) == (args.text is None):
        raise ConfigError("--prompt, --text: give exactly one of the two.")
    if args.text is not None:
        return args.text
    if args.prompt == "-":
        return sys.stdin.read()
    try:
        return Path(args.prompt).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ConfigError(f"--prompt: {args.prompt} is not UTF-8 text.") from None
    except OSError as error:
        raise ConfigError(f"--prompt: {args.prompt}: {error.strerror}.") from None


def _layer_numbers(text: str) -> list[int]:
    try:
        return [int(each) for each in text.split(",")] if text else []
    except ValueError:
        raise ConfigError(
            f"--layers: {text!r} is no list of layers; allowed are numbers such as 0,7,12."
        ) from None


def _inspect(args: argparse.Namespace) -> "Inspection":
    layers, text = _layer_numbers(args.layers), _read_text(args)
    server = parse_config(args.kv_compression, parse_json(args.kv_compression_config))
    if server is None:
        raise ConfigError(
            "--kv-compression: none keeps everything, so there is nothing to look at; allowed are "
            f"{', '.join(preset_names())}, or the path of a .yaml file."
        )
    longest = read_geometry(args.model).max_positions
    if args.html is not None and not args.html.parent.is_dir():
        raise ConfigError(f"--html: there is no folder {args.html.parent}.")
    try:
        import torch

        from vllm_kvcompress.evaluation import inspected_prompt, inspection
    except ImportError as error:
        raise ConfigError(f"inspect needs vLLM and transformers ({error}): {_INSTALL}.") from None
    tokenizer = inspected_prompt.load_tokenizer(args.model)
    prompt = inspected_prompt.read_prompt(tokenizer, text, args.chat, args.needle)
    length = len(prompt.token_ids)
    if longest and length + args.max_tokens > longest:
        raise ConfigError(
            f"--prompt: {length} tokens and {args.max_tokens} of the answer are more than the "
            f"model's max_position_embeddings ({longest}); shorten it."
        )
    setting = inspection.resolve_setting(server, args.budget, prompt, tokenizer)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    replay = inspection.load_replay(args.model, args.block_size, dtype, device)
    return inspection.inspect_prompt(replay, prompt, setting, layers, tokenizer, args.max_tokens)


# --- words --------------------------------------------------------------------------------


def _task_words(inspection: "Inspection") -> str:
    deciders = {
        "config": "by the setting",
        "classifier": "by the classifier, as the server decides",
        "default": "by default",
    }
    setting = inspection.setting
    return f"{setting.task} ({deciders[setting.decided_by or 'default']})"


def _facts(args: argparse.Namespace, inspection: "Inspection") -> list[tuple[str, str]]:
    config, kept = inspection.setting.config, inspection.kept
    num_layers, heads, length = kept.shape
    budget = config.budget
    asked = f"{budget.ratio:.0%}" if budget.ratio is not None else f"{budget.tokens} tokens"
    template = "in the chat template" if inspection.prompt.in_template else "as it is"
    size, whose = args.block_size, inspection.all_layers
    found = [
        ("Model", f"{args.model}: {num_layers} layers x {heads} KV heads"),
        ("Setting", f"{args.kv_compression}: policy {config.policy.name}, budget {asked}"),
        ("Prompt", f"{length:,} tokens, {template}"),
        ("Kept", f"{inspection.kept_share:.1%} of {whose}' tokens, blocks of {size} tokens"),
    ]
    if inspection.setting.task is not None:
        found.insert(2, ("Task", _task_words(inspection)))
    needle = inspection.needle_shares()
    if needle is not None:
        count, share = len(inspection.prompt.needle or ()), needle[inspection.full].mean()
        found.append(("Needle", f"{share:.0%} of its {count} tokens survive, over {whose}"))
    return found


def _write_page(args: argparse.Namespace, inspection: "Inspection") -> None:
    from vllm_kvcompress.evaluation.inspection_page import PageTexts, render
    from vllm_kvcompress.evaluation.whole_files import write_whole

    fields = yaml.safe_dump(inspection.setting.config.to_dict(), sort_keys=False)
    title = f"What {args.kv_compression} keeps of a prompt"
    page = render(inspection, PageTexts(title, _facts(args, inspection), fields))
    try:
        write_whole(args.html, page)
    except OSError as error:
        raise ConfigError(f"--html: {args.html}: {error.strerror}.") from None


# --- for programs -------------------------------------------------------------------------


def _spans(kept: Any) -> list[list[int]]:
    """Runs of True as [start, end)."""
    edges = [i for i in range(len(kept) + 1) if (i and kept[i - 1]) != (i < len(kept) and kept[i])]
    return [[start, end] for start, end in zip(edges[::2], edges[1::2], strict=True)]


def _as_json(args: argparse.Namespace, inspection: "Inspection") -> dict[str, Any]:
    setting, prompt, answers = inspection.setting, inspection.prompt, inspection.answers
    needle = inspection.needle_shares()
    return {
        "model": str(args.model),
        "setting": setting.config.to_dict(),
        "task": setting.task,
        "task_decided_by": setting.decided_by,
        "block_size": args.block_size,
        "prompt_tokens": len(prompt.token_ids),
        "in_chat_template": prompt.in_template,
        "notes": inspection.notes,
        "kept_share": inspection.kept_share,
        "layer_groups": [
            {
                "layer_group": row.group,
                "layers": row.layers,
                "leader": row.leader,
                "coded": row.is_coded,
                "tokens_kept": float(inspection.kept[row.layers].sum(axis=2).mean()),
                "needle_kept": None if needle is None else needle[row.layers].tolist(),
            }
            for row in inspection.rows(bool(args.layers))
        ],
        "needle_tokens": prompt.needle,
        "pieces": [
            {"text": each.text, "tokens": [each.start, each.end], "kept_share": share}
            for each, share in zip(prompt.pieces, inspection.piece_shares(), strict=True)
        ],
        "survivors": {
            str(layer): [_spans(head) for head in inspection.kept[layer].tolist()]
            for layer in inspection.layers
        },
        "answers": asdict(answers) if answers else None,
    }


# --- for people ---------------------------------------------------------------------------


class _Run(NamedTuple):
    """Neighbouring pieces that are shown alike."""

    text: str
    num_tokens: int
    heat: int  # -1: evicted
    is_needle: bool


def _heat(share: float) -> int:
    return -1 if share < EVICTED else min(int(share * len(_HEAT)), len(_HEAT) - 1)


def _runs(inspection: "Inspection") -> Iterator[_Run]:
    needle = set(inspection.prompt.needle or ())
    shown = [
        (piece, _heat(share), piece.start in needle)
        for piece, share in zip(inspection.prompt.pieces, inspection.piece_shares(), strict=True)
    ]
    edges = [i for i in range(len(shown)) if i == 0 or shown[i][1:] != shown[i - 1][1:]]
    for start, end in pairwise([*edges, len(shown)]):
        pieces: list[Piece] = [piece for piece, _, _ in shown[start:end]]
        count = pieces[-1].end - pieces[0].start
        yield _Run("".join(piece.text for piece in pieces), count, *shown[start][1:])


def _prompt_text(inspection: "Inspection", fold_from: int | None) -> Text:
    """The prompt in colours; runs of evicted tokens are folded from a length on, None: never."""
    from vllm_kvcompress.evaluation.quality.text import visible

    text = Text()
    for run in _runs(inspection):
        underline = run.is_needle or None
        if run.heat >= 0:
            ink = "#ffffff" if run.heat < 4 else "#000000"
            style = Style(color=ink, bgcolor=_HEAT[run.heat], underline=underline)
            text.append(visible(run.text), style)
        elif fold_from is None or run.num_tokens < fold_from:
            text.append(visible(run.text), Style(dim=True, underline=underline))
        else:
            edge = "\n" if "\n" in run.text[-2:] else ""
            text.append(f" … {run.num_tokens:,} tokens …{edge}", Style(dim=True, italic=True))
    return text


def _print(args: argparse.Namespace, inspection: "Inspection") -> None:
    console = make_console()
    for name, value in _facts(args, inspection):
        say(f"{name + ':':8} {value}")
    layers = f"layers {args.layers}" if args.layers else inspection.all_layers
    has_colour = console.color_system is not None
    legend = Text(f"\nThe prompt, by the share of heads in {layers} that keep a token:")
    if has_colour:
        legend.append(" few ")
        for colour in _HEAT:
            legend.append("   ", Style(bgcolor=colour))
        legend.append(" all")
    console.print(legend, soft_wrap=True)
    fold_from = None if args.full else (LONG_RUN if has_colour else SHORT_RUN)
    if fold_from is not None:
        say(f"(… N tokens …: kept by less than {EVICTED:.0%}; --full shows them)")
    say("")
    console.print(_prompt_text(inspection, fold_from), overflow="fold")
    say("\nKept by position, from the first token to the last")
    say("".join(_BARS[_bar(share)] for share in inspection.histogram(NUM_BINS)) + "│")
    if inspection.prompt.needle:
        say(_needle_marks(inspection))
    _print_table(args, inspection)
    _print_answers(inspection)


def _bar(share: float) -> int:
    """Eighths, rounded up: what is kept at all is seen."""
    return -int(-share * 8 // 1)


def _needle_marks(inspection: "Inspection") -> str:
    from vllm_kvcompress.evaluation.inspection import bins_of

    bins = bins_of(inspection.kept.shape[2], NUM_BINS)
    marks = [" "] * (bins[-1] + 1)
    for place in bins[inspection.prompt.needle or []]:
        marks[place] = "^"
    return "".join(marks).rstrip() + " needle"


def _print_table(args: argparse.Namespace, inspection: "Inspection") -> None:
    titles = ["layer group", "layers", "tokens kept", "of prompt", "chosen by"]
    if inspection.prompt.needle:
        titles += ["needle: least", "mean", "most"]
    table = make_table(*titles, right=(2, 3, 5, 6, 7))
    for row in inspection.rows(bool(args.layers)):
        table.add_row(*_cells(inspection, row))
    say("")
    show(table)


def _cells(inspection: "Inspection", row: "LayerSet") -> Iterator[str]:
    from vllm_kvcompress.evaluation.inspection_page import layer_numbers

    kept = float(inspection.kept[row.layers].sum(axis=2).mean())
    yield str(row.group)
    yield layer_numbers(row.layers)
    yield f"{kept:,.0f}" + " in a codebook" * row.is_coded
    yield f"{kept / inspection.kept.shape[2]:.1%}"
    yield "each layer" if row.leader is None else f"layer {row.leader}"
    needle = inspection.needle_shares()
    if needle is not None:
        part = needle[row.layers]
        yield from (f"{each:.0%}" for each in (part.min(), part.mean(), part.max()))


def _print_answers(inspection: "Inspection") -> None:
    from vllm_kvcompress.evaluation.quality.text import visible

    answers = inspection.answers
    if answers is None:
        return
    table = make_table("over the whole cache", "over the survivors", folds=(0, 1))
    table.add_row(Text(visible(answers.whole)), Text(visible(answers.compressed)))
    show(table, least=40)
    say(f"The first {answers.num_equal} of {answers.num_tokens} tokens are the same.")
