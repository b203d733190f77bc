"""`kvcompress codebook`: measure what codebooks do to a model's caches, and say which layers pay.

Runs the model with transformers; needs vLLM too, for the worker's own code. Importing this file
imports none of them.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml
from rich.progress import track

from vllm_kvcompress.cli.common import (
    at_least,
    make_console,
    say,
    share,
    show,
)
from vllm_kvcompress.config.codebook import CodebookConfig
from vllm_kvcompress.config.reading import parse_config, parse_json, preset_names
from vllm_kvcompress.config.settings import CompressionConfig, LayerGroupsConfig
from vllm_kvcompress.errors import ConfigError
from vllm_kvcompress.evaluation.provenance import command_line, versions
from vllm_kvcompress.lengths.budgets import layer_groups
from vllm_kvcompress.lengths.geometry import DTYPE_BYTES, ModelGeometry, read_geometry

if TYPE_CHECKING:
    from vllm_kvcompress.evaluation.codebook_choice import Limits, Recommendation, Tried
    from vllm_kvcompress.evaluation.codebook_profile import (
        CodedPrompt,
        Comparison,
        LayerProfile,
        Options,
    )
    from vllm_kvcompress.evaluation.codebook_report import CheckRow

PRESET = "spindlekv"
RATIOS = [1.0, 0.5, 0.25]
SHARES = [0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6]
PROMPT_LEN, NUM_PROMPTS = 2000, 8
SEED = 0
SPINDLE_NAME, FITS_NAME, CHECK_NAME = "spindle.csv", "entries.csv", "decoding.csv"
PLOT_NAME, RUN_NAME = "spindle.png", "run.json"
_INSTALL = "pip install 'vllm-kvcompress[cpu,eval]', or [cuda,eval] for a GPU"


def add_codebook_options(option: Callable[..., Any]) -> None:
    """Options of the command; `option` is a parser's ``add_argument``."""
    number: dict[str, Any] = {"metavar": "N", "type": at_least(1)}
    some: dict[str, Any] = {"metavar": "SHARE", "type": share, "nargs": "+"}
    one: dict[str, Any] = {"metavar": "SHARE", "type": share}
    option("--model", required=True, metavar="DIR", type=Path, help="folder of a Llama-like model")
    text = "one prompt per line; .jsonl: strings, token ids, or objects with the field prompt"
    option("--prompts", metavar="FILE", type=Path, help=f"{text} (default: needle prompts)")
    text = f"longest needle prompt, in tokens (default {PROMPT_LEN}); a FILE's prompts are cut"
    option("--prompt-len", **number, help=text)
    text = f"how many prompts (default {NUM_PROMPTS}; of a FILE, all)"
    option("--num-prompts", **number, help=text)
    text = "shares of the prompt to keep before coding; 1 keeps all (default 1.0 0.5 0.25)"
    option("--budget-ratio", default=RATIOS, **some, help=text)
    known = f"says which tokens survive: {', '.join(preset_names())}, or a YAML file"
    option("--kv-compression", default=PRESET, metavar="PRESET|FILE.yaml", help=known)
    option("--kv-compression-config", default="{}", metavar="JSON", help="fields laid over it")
    text = "layer groups to choose among (default: one per layer)"
    option("--layer-groups", **number, help=text)
    text = "entries to try, as shares of the coded tokens"
    option("--entries", default=SHARES, **some, help=f"{text} (default 0.1 to 0.6)")
    fields, text = CodebookConfig.model_fields, "cosine above which an entry stands for a"
    for kind in ("key", "value"):
        default = fields[f"{kind}_threshold"].default
        text_of_kind = f"{text} {kind} (default %(default)s)"
        option(f"--{kind}-threshold", default=default, **one, help=text_of_kind)
    text = "least share of next tokens that stay the same (default %(default)s)"
    option("--agreement", default=0.98, **one, help=text)
    text = "least share of the coded blocks to come free (default %(default)s)"
    option("--min-saving", default=0.25, **one, help=text)
    option("--block-size", default=16, **number, help="as the server's (default %(default)s)")
    text = "of the cache, as the server's (default %(default)s)"
    option("--dtype", default="auto", choices=["auto", *DTYPE_BYTES], help=text)
    text = "where to run the model, such as cpu or cuda (default: a GPU where there is one)"
    option("--device", metavar="NAME", help=text)
    option("--out", metavar="DIR", type=Path, help="write CSV files and a plot into a new folder")


class _Run(NamedTuple):
    """What is measured."""

    args: argparse.Namespace
    geometry: ModelGeometry
    config: CompressionConfig
    options: "Options"
    replay: Any
    prompts: list[list[int]]
    group_of: list[int]

    def coded(self, prompt: list[int], ratio: float) -> "CodedPrompt":
        """A prompt in codebooks."""
        from vllm_kvcompress.evaluation.codebook_profile import CodedPrompt

        return CodedPrompt(self.replay, prompt, self.config, ratio, self.options)

    def layers(self, groups: tuple[int, ...]) -> tuple[int, ...]:
        """Layers of layer groups."""
        return tuple(layer for layer, group in enumerate(self.group_of) if group in groups)

    def track(self, ratio: float, what: str) -> Any:
        """Prompts with their numbers, and a bar on the error output."""
        numbered = list(enumerate(self.prompts))
        return track(numbered, f"{ratio:.0%} kept, {what}", console=make_console(stderr=True))


def run_codebook(args: argparse.Namespace) -> int:
    """Measure, print, and write what was asked for."""
    _check_output(args)
    run = _prepare(args)
    from vllm_kvcompress.evaluation.codebook_choice import recommend

    _say_what(run)
    profiles: list[LayerProfile] = []
    checks: list[CheckRow] = []
    found: dict[float, Recommendation | None] = {}
    for ratio in sorted(set(args.budget_ratio), reverse=True):
        profiled, tried, checked = _measure(run, ratio)
        profiles += profiled
        checks += checked
        found[ratio] = recommend(tried, _limits(args))
        _print_ratio(run, ratio, profiled, tried)
        _print_choice(run, found[ratio], checked)
    if args.out is not None:
        _write(run, profiles, found, checks)
        say(f"Written to {args.out}.")
    return 0


# --- what to measure ----------------------------------------------------------------------


def _check_output(args: argparse.Namespace) -> None:
    if args.out is None:
        return
    if args.out.exists():
        raise ConfigError(f"--out: {args.out} exists; name a new folder.")
    if find_spec("matplotlib") is None:
        raise ConfigError(f"--out: the plot needs matplotlib: {_INSTALL}.")


def _prepare(args: argparse.Namespace) -> _Run:
    config = parse_config(args.kv_compression, parse_json(args.kv_compression_config))
    if config is None:
        raise ConfigError(
            "--kv-compression: none names no survivors; allowed are "
            f"{', '.join(preset_names())}, or the path of a .yaml file. --budget-ratio 1 keeps all."
        )
    geometry = read_geometry(args.model, args.dtype)
    count = min(args.layer_groups or geometry.num_layers, geometry.num_layers)
    config = config.model_copy(update={"layer_groups": LayerGroupsConfig(count=count)})
    try:
        import torch

        from vllm_kvcompress.evaluation.codebook_profile import (
            CHECK_TOKENS,
            Options,
            at_ratio,
            check_rotary,
        )
        from vllm_kvcompress.evaluation.prompt_files import first_line, read_prompts
        from vllm_kvcompress.evaluation.replay import Replay
        from vllm_kvcompress.evaluation.replay_checks import check_all_full
    except ImportError as error:
        raise ConfigError(f"codebook needs vLLM and transformers ({error}): {_INSTALL}.") from None
    at_ratio(config, 1)  # refuses before a model is loaded
    dtype = getattr(torch, geometry.dtype)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    prompts = read_prompts(
        args.model,
        args.prompts,
        args.prompt_len or (PROMPT_LEN if args.prompts is None else None),
        args.num_prompts or (NUM_PROMPTS if args.prompts is None else None),
    )
    _check_lengths(args, prompts, geometry, CHECK_TOKENS)
    try:
        # On a CPU, 16-bit matrix products are slow; what is cached is rounded all the same.
        model_dtype = torch.float32 if device == "cpu" else dtype
        replay = Replay(str(args.model), args.block_size, model_dtype, device)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"--model, --device: {first_line(error)}.") from None
    check_all_full(replay)
    check_rotary(replay)
    vocab_size, ids = replay.model.config.vocab_size, {each for p in prompts for each in p}
    if min(ids) < 0 or max(ids) >= vocab_size:
        raise ConfigError(f"--prompts: token ids must be in 0 to {vocab_size - 1}.")
    options = Options(
        tuple(sorted(set(args.entries))),
        args.key_threshold,
        args.value_threshold,
        args.block_size,
        dtype,
    )
    group_of = layer_groups(geometry.num_layers, config.layer_groups)
    return _Run(args, geometry, config, options, replay, prompts, group_of)


def _check_lengths(
    args: argparse.Namespace, prompts: list[list[int]], geometry: ModelGeometry, num_read: int
) -> None:
    lengths, longest = [len(prompt) for prompt in prompts], geometry.max_positions
    if min(lengths) < args.block_size:
        raise ConfigError(
            f"--prompts: one has {min(lengths)} tokens; allowed are prompts of at least one block "
            f"(--block-size {args.block_size})."
        )
    if longest and max(lengths) + num_read > longest:
        raise ConfigError(
            f"--prompts: one has {max(lengths)} tokens, {num_read} more are read behind it, and "
            f"the model's max_position_embeddings are {longest}: cut it by --prompt-len."
        )


# --- measuring ----------------------------------------------------------------------------


def _measure(run: _Run, ratio: float) -> "tuple[list[LayerProfile], list[Tried], list[CheckRow]]":
    """All prompts at one budget: every layer by itself, and every size and shallow part."""
    from vllm_kvcompress.evaluation.codebook_choice import shallow_parts
    from vllm_kvcompress.evaluation.codebook_profile import Choice
    from vllm_kvcompress.evaluation.codebook_report import check_row, tried

    parts = shallow_parts(max(run.group_of) + 1)
    pairs = [(groups, share) for share in run.options.shares for groups in parts]
    choices = [Choice(run.layers(groups), share) for groups, share in pairs]
    profiles: list[LayerProfile] = []
    compared: list[list[Comparison]] = []
    for number, prompt in run.track(ratio, "building codebooks"):
        coded = run.coded(prompt, ratio)
        profiles += coded.profile(number)
        compared.append(coded.compare(choices))
    of_choice = list(zip(*compared, strict=True))
    found = [
        tried(profiles, run.group_of, *pair, each)
        for pair, each in zip(pairs, of_choice, strict=True)
    ]
    rows = [
        check_row(ratio, choice.layers, one, each)
        for choice, one, each in zip(choices, found, of_choice, strict=True)
    ]
    return profiles, found, rows


def _limits(args: argparse.Namespace) -> "Limits":
    from vllm_kvcompress.evaluation.codebook_choice import Limits

    return Limits(args.agreement, args.min_saving)


# --- printing -----------------------------------------------------------------------------


def _say_what(run: _Run) -> None:
    args, geometry, lengths = run.args, run.geometry, [len(prompt) for prompt in run.prompts]
    source = "needle prompts" if args.prompts is None else f"prompts of {args.prompts}"
    say(
        f"{args.model}: {geometry.num_layers} layers, KV heads {geometry.num_kv_heads} x "
        f"{geometry.head_dim}, {geometry.dtype}, {args.block_size} tokens per block\n"
        f"{len(lengths)} {source}, {min(lengths)} to {max(lengths)} tokens; survivors by "
        f"{args.kv_compression}; thresholds {args.key_threshold:g} (keys) and "
        f"{args.value_threshold:g} (values); on {run.replay.device}"
    )


def _print_ratio(
    run: _Run, ratio: float, profiles: "list[LayerProfile]", tried: "list[Tried]"
) -> None:
    """Three tables: what is shared without a limit, errors of limited books, and what pays."""
    from vllm_kvcompress.evaluation import codebook_report as report

    kept = "all tokens" if ratio == 1 else f"{ratio:.0%} of the prompt kept"
    say(f"\n{kept}: books as large as the thresholds ask for; keys before RoPE, then values")
    show(report.spindle_table(profiles))
    say("Relative error of the layer's attention output, worst prompt, by entries per coded token")
    show(report.error_table(profiles))
    say(
        "Next tokens that stay the same with the first layer groups coded, and slots that come "
        "free, by entries per coded token; * keeps all limits"
    )
    show(report.choice_table(tried, _limits(run.args)))


def _print_choice(run: _Run, found: "Recommendation | None", checks: "list[CheckRow]") -> None:
    from vllm_kvcompress.evaluation.codebook_choice import setting_fields

    args, num_groups = run.args, max(run.group_of) + 1
    if found is None:
        say(
            f"No layer pays: with no size of the books do {args.agreement:.0%} of the next tokens "
            f"stay the same and {args.min_saving:.0%} of the coded blocks come free."
        )
        return
    numbers = " ".join(map(str, found.groups))
    layers = " ".join(map(str, run.layers(found.groups)))
    say(
        f"Layer groups that pay: {numbers} of {num_groups}, with entries for {found.share:.0%} of "
        f"the coded tokens. {found.saving:.1%} of what is left of the cache comes free."
    )
    check = next(row for row in checks if (row.layers, row.entries) == (layers, found.share))
    say(
        f"Reading on over them, {check.equal_tokens} of {check.tokens} next tokens are those over "
        f"the survivors as they are, all of them in {check.equal_prompts} of {check.prompts} "
        f"prompts; divergence {check.divergence:.2g} nats."
    )
    fields = setting_fields(found, num_groups, args.key_threshold, args.value_threshold)
    say("For the configuration:\n")
    say(yaml.safe_dump(fields, sort_keys=False).rstrip())


def _write(
    run: _Run,
    profiles: "list[LayerProfile]",
    found: "dict[float, Recommendation | None]",
    checks: Sequence[Any],
) -> None:
    """Write the folder: all of it, or none."""
    from vllm_kvcompress.evaluation import codebook_report as report
    from vllm_kvcompress.evaluation.whole_files import whole, write_whole

    args, spindle = run.args, report.spindle_rows(profiles)
    title = f"{args.model.name}: tokens that share a codebook entry, {len(run.prompts)} prompts"
    about = {
        "command": command_line(),
        "versions": versions(),
        "model": asdict(run.geometry),
        "options": {key: value for key, value in vars(args).items() if key not in ("run", "out")},
        "setting": run.config.to_dict(),
        "device": str(run.replay.device),
        "prompt_tokens": [len(prompt) for prompt in run.prompts],
        "recommended": {f"{ratio:g}": each and asdict(each) for ratio, each in found.items()},
    }
    text = json.dumps(about, indent=1, ensure_ascii=False, default=str) + "\n"
    with whole(args.out) as folder:
        folder.mkdir(parents=True, exist_ok=True)
        report.write_csv(folder / SPINDLE_NAME, spindle)
        report.write_csv(folder / FITS_NAME, report.fit_rows(profiles))
        report.plot(folder / PLOT_NAME, spindle, title)
        report.write_csv(folder / CHECK_NAME, checks)
        write_whole(folder / RUN_NAME, text)
