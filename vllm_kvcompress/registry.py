"""Policies by name: entry points of group ``vllm_kvcompress.policies``, loaded when asked for."""

from functools import cache
from importlib.metadata import EntryPoint, entry_points

from pydantic import BaseModel

from vllm_kvcompress.errors import ConfigError, config_error

POLICY_GROUP = "vllm_kvcompress.policies"


@cache
def _entry_points() -> dict[str, EntryPoint]:
    found: dict[str, EntryPoint] = {}
    for entry in entry_points(group=POLICY_GROUP):
        known = found.setdefault(entry.name, entry)
        if known.value != entry.value:
            raise ConfigError(
                f"Two installed packages register a policy called {entry.name!r} "
                f"({known.value} and {entry.value}): uninstall one of them."
            )
    return found


def policy_names() -> list[str]:
    """Names of all installed policies, sorted."""
    return sorted(_entry_points())


@cache
def load_policy_class(name: str) -> type[BaseModel]:
    """Return the policy class registered under `name`, a pydantic model.

    Raises
    ------
    ConfigError
        If no installed package registers that name, or what it registers is no policy. The
        sentence does not name the field: a policy may be a parameter of another one.
    """
    try:
        entry = _entry_points()[name]
    except KeyError:
        rule = f"there is no policy {{got}}; installed are {', '.join(policy_names())}"
        raise config_error("", "", rule, name) from None
    try:
        found = entry.load()
    except Exception as error:  # somebody else's code, which may fail in any way
        rule = f"{name!r} ({entry.value}) cannot be loaded: {type(error).__name__}: {error}"
        raise config_error("", "", rule) from error
    if not (isinstance(found, type) and issubclass(found, BaseModel)):
        rule = "is no subclass of vllm_kvcompress.policies.base.Policy"
        raise config_error("", "", f"{name!r} ({entry.value}) {rule}")
    return found
