"""Policies by name: entry points of group ``vllm_kvcompress.policies``, loaded when asked for."""

from functools import cache
from importlib.metadata import EntryPoint, entry_points

from vllm_kvcompress.errors import ConfigError

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
def load_policy_class(name: str) -> type:
    """Return the policy class registered under `name`.

    Raises
    ------
    ConfigError
        If no installed package registers that name, or its package cannot be imported.
    """
    try:
        entry = _entry_points()[name]
    except KeyError:
        raise ConfigError(
            f"policy.name: there is no policy {name!r}; installed are {', '.join(policy_names())}."
        ) from None
    try:
        return entry.load()
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"policy.name: {name!r} ({entry.value}) cannot be loaded: {error}."
        ) from error
