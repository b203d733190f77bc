"""``kvcompress tune``: the cheapest setting that keeps a target on the user's own prompts.

torch, transformers and vLLM are imported when the command runs, not with this file.
"""

import argparse
import json
import os
import shlex
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from vllm_kvcompress.cli.common import (
    at_least,
    complain,
    make_console,
    make_table,
    say,
    share,
    show,
)
from vllm_kvcompress.cli.measuring import list_of, names, prompter_of
from vllm_kvcompress.errors import ConfigError
from vllm_kvcompress.evaluation.provenance import command_line, today, versions

NONE_QUALIFIES = 3
"""Status of the command where no setting keeps the target."""
SETTING, SUMMARY = "tuned.yaml", "summary.json"
_BUDGETS = [0.5, 0.35, 0.25, 0.18, 0.12, 0.08, 0.06, 0.04]  # `grid.BUDGETS`, which needs no import


def _inner_share(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and below 1, got {text}")
    return value


def add_tune_options(option: Callable[..., Any]) -> None:
    """Options of the command; `option` is a parser's ``add_argument``."""
    option("--model", required=True, metavar="DIR", type=Path, help="folder of a Llama-like model")
    lines = 'JSON lines: {"prompt": ...}, or {"context": ..., "question": ..., "answers": [...]}'
    option("--prompts", required=True, metavar="FILE.jsonl", type=Path, help=lines)
    wanted = "mean agreement (or answers) to keep, 1 is the whole cache's"
    option("--target", required=True, metavar="SHARE", type=_inner_share, help=wanted)
    sure = "probability of the promise (default %(default)s)"
    option("--confidence", default=0.9, metavar="SHARE", type=_inner_share, help=sure)
    measure = (
        "the share of the whole cache's tokens that a compressed one says too (agreement), or "
        "the score of its answers beside the whole cache's (answers)"
    )
    option("--measure", default="agreement", choices=["agreement", "answers"], help=measure)
    how = (
        "p-values of the mean loss alone (hoeffding-bentkus), or also of how much losses differ "
        "(betting, which needs fewer prompts for agreement); choose before you see losses"
    )
    option(
        "--test", default="hoeffding-bentkus", choices=["hoeffding-bentkus", "betting"], help=how
    )
    known = (
        "grid, books (codebooks of several sizes), preferences (layer budgets measured on "
        "a few of the prompts), chains of these, presets or YAML files, with commas (default grid)"
    )
    option("--policies", default=["grid"], metavar="LIST", type=names, help=known)
    ratios = f"shares of the prompt to keep (default {','.join(map(str, _BUDGETS))})"
    option("--budgets", default=_BUDGETS, metavar="LIST", type=list_of(share), help=ratios)
    number: dict[str, Any] = {"metavar": "N", "type": at_least(1)}
    option("--tokens", default=32, **number, help="of each answer (default %(default)s)")
    seed = "of the split into screening, test and held-out prompts (default 0)"
    option("--seed", default=0, metavar="N", type=at_least(0), help=seed)
    again = "other splits of the same losses to report (default %(default)s)"
    option("--splits", default=20, metavar="N", type=at_least(0), help=again)
    option("--device", default="cpu", help="of torch (default %(default)s)")
    option("--block-size", default=32, **number, help="as the server's (default %(default)s)")
    option("--no-chat", action="store_true", help="leave the model's chat template out")
    out = "folder of the results; losses that it holds of the same run are not measured again"
    option("--out", required=True, metavar="DIR", type=Path, help=out)


def run_tune(args: argparse.Namespace) -> int:
    """Measure what is missing, choose, and write the setting."""
    from vllm_kvcompress.evaluation.tuning.choose import FEWEST_PROMPTS, Aim
    from vllm_kvcompress.evaluation.tuning.grid import AUTO, make_candidates
    from vllm_kvcompress.evaluation.tuning.losses import LossFolder, loss_table
    from vllm_kvcompress.evaluation.tuning.preferences import (
        PREFERENCES,
        chains,
        known_or_measured,
        set_aside,
    )
    from vllm_kvcompress.evaluation.tuning.prompts_file import read_prompts
    from vllm_kvcompress.evaluation.tuning.result import best_provable

    aim = Aim(
        limit=round(1 - args.target, 12), level=round(1 - args.confidence, 12), test=args.test
    )
    policies = [name for name in args.policies if name != PREFERENCES]
    candidates = make_candidates(policies, args.budgets)
    prompts = read_prompts(args.prompts, args.measure == "answers", args.tokens)
    meter = _Meter(args)
    aside: Sequence[Any] = []
    if PREFERENCES in args.policies:
        aside, prompts = set_aside(prompts)
    if len(prompts) < FEWEST_PROMPTS:
        raise ConfigError(
            f"--prompts: {args.prompts} holds {len(prompts)} prompts"
            f"{f' beside {len(aside)} set aside' if aside else ''}, and screening, test and "
            f"check take {FEWEST_PROMPTS} at least."
        )
    repeated = len(prompts) - len({each.digest for each in prompts})
    if repeated:
        complain(
            "warning",
            f"{repeated} prompts repeat others; the promise is about prompts drawn independently.",
        )
    few = best_provable(len(prompts), aim)
    if few is not None:
        complain("warning", few)
    folder = LossFolder(args.out)
    known = folder.start(_asked(args), versions())
    try:
        if aside:
            shares = known_or_measured(args.out, aside, lambda: meter.layer_shares(aside))
            say(f"Layers prefer, on {len(aside)} prompts set aside: {_rounded(shares)}")
            candidates = make_candidates(policies, args.budgets, chains(shares, AUTO))
        known += _measure(meter, prompts, candidates, folder, known)
    except KeyboardInterrupt:
        complain("error", "interrupted. What was measured is kept: the same command goes on.")
        return 1
    return _conclude(args, candidates, loss_table(prompts, candidates, known), aim)


# --- measuring ----------------------------------------------------------------------------


class _Meter:
    """The model, loaded when something is to be measured."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args

    @cached_property
    def _loaded(self) -> Any:
        import torch

        from vllm_kvcompress.evaluation.tuning.measuring import LossMeter

        args = self.args
        if "OMP_NUM_THREADS" not in os.environ and args.device == "cpu":
            torch.set_num_threads(1)  # small steps: threads wait longer than they compute
        sizes = args.tokens, args.block_size, args.device
        return LossMeter(
            args.model, prompter_of(args.model, not args.no_chat), args.measure, *sizes
        )

    def layer_shares(self, prompts: Sequence[Any]) -> list[float]:
        """What every layer prefers."""
        self._loaded.check(prompts, [])
        return list(self._loaded.layer_shares(prompts))

    def losses(self, left: Sequence[tuple[Any, Any]]) -> Iterable[Sequence[Any]]:
        """Losses of prompt after prompt; all are looked at before the first is measured."""
        self._loaded.check([prompt for prompt, _ in left], [c for _, each in left for c in each])
        for prompt, todo in _track(left):
            yield self._loaded.losses(prompt, todo)


def _rounded(shares: Sequence[float]) -> str:
    return " ".join(f"{share:.3g}" for share in shares)


def _measure(
    meter: _Meter,
    prompts: Sequence[Any],
    candidates: Sequence[Any],
    folder: Any,
    known: Sequence[Any],
) -> list[Any]:
    """The losses that the folder did not hold; the model is loaded only if some are missing."""
    from vllm_kvcompress.evaluation.tuning.losses import missing

    left = missing(prompts, candidates, known)
    found: list[Any] = []
    for losses in meter.losses(left) if left else ():
        folder.add(losses)
        found += losses
    return found


def _track(todo: Sequence[Any]) -> Iterable[Any]:
    from rich.progress import track

    return track(todo, "prompts", console=make_console(stderr=True))


def _asked(args: argparse.Namespace) -> dict[str, Any]:
    """What a loss depends on. Prompts, policies and budgets may be added, the target changed."""
    return {
        "model": args.model.resolve().name,
        "measure": args.measure,
        "tokens": args.tokens,
        "block_size": args.block_size,
        "chat": not args.no_chat,
    }


# --- choosing -----------------------------------------------------------------------------


def _conclude(args: argparse.Namespace, candidates: Sequence[Any], table: Any, aim: Any) -> int:
    from vllm_kvcompress.evaluation.tuning.choose import choose, make_chains, repeat, split_prompts
    from vllm_kvcompress.evaluation.tuning.result import (
        Tuning,
        sentences,
        setting_yaml,
        summary,
        why_none,
    )
    from vllm_kvcompress.evaluation.whole_files import write_whole

    _check_saves(table)
    chains = make_chains(candidates)
    choice = choose(table, chains, split_prompts(len(table.losses), args.seed), aim)
    again = list(repeat(table, chains, aim, args.seed, args.splits))
    tuning = Tuning(candidates, table, aim, choice, again, _about(args))
    setting = args.out / SETTING
    setting.unlink(missing_ok=True)  # of a run with another target
    write_whole(args.out / SUMMARY, json.dumps(summary(tuning), indent=1) + "\n")
    _print_tests(tuning)
    for sentence in sentences(tuning):
        say(sentence)
    if choice.chosen is None:
        complain("warning", why_none(tuning))
        return NONE_QUALIFIES
    write_whole(setting, setting_yaml(tuning))
    say(f"Written to {setting}: --kv-compression {shlex.quote(str(setting))}")
    return 0


def _check_saves(table: Any) -> None:
    """Some setting frees something of some prompt."""
    if table.costs.min() == 1:
        raise ConfigError(
            f"--prompts: the longest has {table.lengths.max()} tokens, and no setting frees "
            "anything of it: prompts below min_prompt_len (512, if not set) stay whole, and so "
            "does what fits into the budget's floor."
        )
    whole = int((table.kept.min(axis=1) == 1).sum())
    if whole:
        complain("warning", f"{whole} prompts are too short for any setting to free some of them.")


def _about(args: argparse.Namespace) -> dict[str, Any]:
    return {
        **_asked(args),
        "prompts": args.prompts.name,
        "seed": args.seed,
        "date": today(),
        "command": command_line(),
        "measured_with": versions(),
    }


def _print_tests(tuning: Any) -> None:
    """The chains that were tested, one row per setting."""
    choice, titles = tuning.choice, ("setting", "kept", "screening", "test", "bound", "p", "")
    table = make_table(*titles, right=range(1, 6))
    for tests in choice.chains:
        for test in tests:
            verdict = "qualifies" if test.is_rejected else ""
            table.add_row(
                tuning.candidates[test.setting].name,
                f"{tuning.table.costs[test.setting]:.1%}",
                f"{1 - test.screened:.4f}",
                f"{1 - test.mean:.4f}",
                f"{1 - test.bound:.4f}",
                f"{test.p_value:.2g}",
                "chosen" if test is choice.chosen else verdict,
            )
        table.add_section()
    sizes = [len(getattr(choice.split, part)) for part in ("screening", "calibration", "held_out")]
    say(
        f"{len(tuning.candidates)} settings on {sum(sizes)} prompts: {sizes[0]} for screening, "
        f"{sizes[1]} for the test, {sizes[2]} held out. Shown: mean {tuning.about['measure']}, "
        f"its lower bound, and p of each test, of which a chain's pass down to "
        f"{choice.level:.3g}."
    )
    show(table)
