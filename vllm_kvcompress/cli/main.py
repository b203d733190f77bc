"""The command `kvcompress`: which policies there are, whether a setting is valid, what it saves.

Importing this file imports neither torch nor vLLM. Policies need torch, so `policies`, `validate`
and `plan` import it when they look at one; none of them needs vLLM or a model's weights. `codebook`
needs both, and transformers: see ``codebook.py``.
"""

import argparse
import json
import sys
import textwrap
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from typing import Any

import yaml

from vllm_kvcompress import __version__
from vllm_kvcompress.cli.codebook import add_codebook_options, run_codebook
from vllm_kvcompress.cli.common import complain, make_table, say, show
from vllm_kvcompress.cli.doctor import add_doctor_options, run_doctor
from vllm_kvcompress.cli.eval import add_eval_options, run_eval
from vllm_kvcompress.cli.inspect import add_inspect_options, run_inspect
from vllm_kvcompress.cli.plan import add_plan_options, run_plan
from vllm_kvcompress.cli.tune import add_tune_options, run_tune
from vllm_kvcompress.config.reading import parse_config, preset_names
from vllm_kvcompress.config.settings import CompressionConfig
from vllm_kvcompress.errors import ConfigError, UnsupportedModelError
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


# --- the command line ---------------------------------------------------------------------


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
    add_plan_options(add("plan", run_plan, text))
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
    """Run one command; return 0, 1 after an error, 130 after Ctrl-C (argparse: 2, wrong usage)."""
    args = make_parser().parse_args(argv)
    try:
        return args.run(args)
    except _ERRORS as error:
        complain("error", str(error))
    except ImportError as error:
        complain("error", f"a policy's module cannot be imported: {error}.")
    except KeyboardInterrupt:
        complain("error", "interrupted; nothing half-written is left.")
        return 130
    return 1


if __name__ == "__main__":
    sys.exit(main())
