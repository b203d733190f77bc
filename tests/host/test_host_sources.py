"""Our overrides, calls and imports against vLLM's sources: the installed ones, and others.

`test_contract.py` looks at the vLLM that can be imported. Here nothing of it is imported, so that
a release can be read for which there is no build: unpack it with scripts/vllm_sources.py and name
the folder in KVCOMPRESS_VLLM_SOURCES.
"""

import ast
import importlib.util
import inspect
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from lab import vllm_sources
from tests.host.contract import (
    ATTRIBUTES,
    CALLED_WITHOUT_ARGUMENTS,
    FIELDS,
    FORWARD_WRAPPERS,
    GIVEN_LATER,
    IMPLEMENTATIONS,
    INSTALLED_ONLY,
    PARAMETERS,
    RECEIVERS,
    TEXTS,
    WHERE_CALLS_ARE,
    WRAPPED,
)
from tests.host.sources import Call, Found, FunctionNode, Sources, accepts_all_of, signature_of
from vllm_kvcompress.host.checks import READ_VLLM

ROOT = Path(__file__).parents[2]
GIVEN = "KVCOMPRESS_VLLM_SOURCES"

OURS = Sources(ROOT, "vllm_kvcompress")
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in OURS.files(["."])
)


@cache
def host_of(name: str) -> Sources:
    if name == "installed":
        spec = importlib.util.find_spec("vllm")
        if spec is None or spec.origin is None:
            pytest.skip("vLLM is not installed")
        return Sources(Path(spec.origin).parents[1], "vllm")
    given = os.environ.get(GIVEN)
    if not given:
        pytest.skip(f"{GIVEN} names no unpacked sources of another vLLM (scripts/vllm_sources.py)")
    assert (Path(given) / "vllm" / "__init__.py").is_file(), f"{GIVEN}: no vllm/ in {given}"
    return Sources(Path(given), "vllm")


@pytest.fixture(params=["installed", "given"])
def host(request: pytest.FixtureRequest) -> Sources:
    return host_of(request.param)


def test_what_was_read_is_what_is_fetched_and_described() -> None:
    assert READ_VLLM == (vllm_sources.VERSION,)
    page = (ROOT / "docs" / "host-overrides.md").read_text(encoding="utf-8")
    assert all(f"vLLM {version}" in page for version in READ_VLLM)


# --- what our code says about the host ----------------------------------------------------


class Override(NamedTuple):
    """A method of ours, and the class of the host whose method it replaces."""

    owner: str
    base: tuple[str, str]
    method: FunctionNode


def host_bases(module: str) -> Iterator[tuple[ast.ClassDef, tuple[str, str]]]:
    """Classes of a module of ours with a base class of vLLM, and that base: (module, name)."""
    imported, tree = OURS.imports(module), OURS.module(module)
    assert tree is not None
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            names = [base.id for base in node.bases if isinstance(base, ast.Name)]
            for name in names:
                source = imported.get(name, ("", ""))
                if source[0].split(".")[0] == "vllm":
                    yield node, source


def subclasses() -> list[tuple[str, ast.ClassDef, tuple[str, str]]]:
    return [(module, *each) for module in MODULES for each in host_bases(module)]


def overrides(host: Sources) -> list[Override]:
    found = []
    for _, node, source in subclasses():
        base = host.find(*source)
        assert base is not None, f"{node.name}: {source} is gone"
        for method in node.body:
            if isinstance(method, FunctionNode) and host.member(base, method.name):
                found.append(Override(node.name, source, method))
    return found


def host_imports(module: str) -> dict[str, tuple[str, str]]:
    """Like ``Sources.imports``, for vLLM's modules and with imports inside functions."""
    found, tree = {}, OURS.module(module)
    assert tree is not None
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
            for each in node.names:
                found[each.asname or each.name] = (node.module or "", each.name)
        elif isinstance(node, ast.Import):
            for each in node.names:
                if each.name.split(".")[0] == "vllm":
                    found[each.asname or each.name.split(".")[0]] = (each.name, "")
    return found


# --- who calls us -------------------------------------------------------------------------


@cache
def host_calls(host: Sources) -> list[Call]:
    """Calls in the host of everything that we override or wrap."""
    names = {each.method.name for each in overrides(host)} - {"__init__"}
    names |= {called_name(target) for target in WRAPPED}
    return host.calls(names, WHERE_CALLS_ARE)


def called_name(target: str) -> str:
    """Under which name a wrapped function is called: a constructor under its class's."""
    owner, _, name = target.partition(":")[2].partition(".")
    return owner if name == "__init__" else name


def is_kin(host: Sources, inside: str, base: Found) -> bool:
    """Whether an object of our class may be ``self`` in this class of the host."""
    module, _, name = inside.partition(":")
    around = host.find(module, name)
    if around is None:
        return False
    return around in set(host.bases(base)) or base in set(host.bases(around))


def calls_on(host: Sources, calls: list[Call], name: str, base: Found, owner: str) -> list[Call]:
    """The host's calls of a method on objects that can be of our class."""
    found = []
    for call in calls:
        if call.name != name or call.receiver.startswith("super("):
            continue  # which goes past our class, on to the bases
        is_own = call.receiver in ("self", "cls") and is_kin(host, call.inside, base)
        if is_own or call.owner in RECEIVERS[owner]:
            found.append(call)
    return found


def test_overrides_accept_every_call_of_the_host(host: Sources) -> None:
    calls, wrong, unseen = host_calls(host), [], set()
    found = overrides(host)
    assert len(found) > 30
    for override in found:
        if override.method.name == "__init__":
            continue
        base = host.find(*override.base)
        assert base is not None
        own = signature_of(override.method, is_bound=True)
        name = override.method.name
        own_calls = calls_on(host, calls, name, base, override.base[1])
        wrong += [
            f"{call.where}: {override.owner}.{name}: {reason}; it takes {own}"
            for call in own_calls
            if (reason := call.misfit(own))
        ]
        if not own_calls:
            unseen.add(f"{override.base[1]}.{name}")
    assert not wrong, "\n".join(wrong)
    assert unseen <= CALLED_WITHOUT_ARGUMENTS.keys(), f"nobody calls {sorted(unseen)}"


def test_overrides_accept_whatever_their_base_accepts(host: Sources) -> None:
    """Constructors aside: what we make ourselves is made as we like."""
    wrong = []
    for override in overrides(host):
        base = host.find(*override.base)
        assert base is not None
        replaced = host.member(base, override.method.name)
        is_function = replaced is not None and isinstance(replaced.node, FunctionNode)
        if override.method.name == "__init__" or not is_function:
            continue
        own = signature_of(override.method, is_bound=True)
        reason = accepts_all_of(own, signature_of(replaced.node, is_bound=True))  # type: ignore[union-attr,arg-type]
        if reason:
            wrong.append(f"{override.owner}.{override.method.name}: {reason}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("target", WRAPPED)
def test_wrappers_accept_every_call_of_the_host(target: str, host: Sources) -> None:
    owner = target.partition(":")[2].partition(".")[0]
    base = host.target(target.rpartition(".")[0])
    assert base is not None
    own, name = wrapper_of(WRAPPED[target]), called_name(target)
    calls = host_calls(host)
    if name == owner:
        calls = [call for call in calls if call.name == name]
    else:
        calls = calls_on(host, calls, name, base, owner)
    assert calls, f"nobody calls {target}"
    assert not [f"{each.where}: {why}" for each in calls if (why := each.misfit(own))]


def wrapper_of(factory: str) -> inspect.Signature:
    """Signature of the function that a factory in host/hooks.py returns; bound, as it is called."""
    found = OURS.find("vllm_kvcompress.host.hooks", factory)
    assert found is not None and isinstance(found.node, FunctionNode), factory
    inner = next(node for node in found.node.body if isinstance(node, FunctionNode))
    takes_owner = inner.args.args and inner.args.args[0].arg in ("self", "cls")
    return signature_of(inner, is_bound=bool(takes_owner))


@pytest.mark.parametrize("target", sorted(FORWARD_WRAPPERS))
def test_wrapped_attention_accepts_every_call(target: str, host: Sources) -> None:
    found = OURS.target(target)
    assert found is not None and isinstance(found.node, FunctionNode)
    inner = next(node for node in found.node.body if isinstance(node, FunctionNode))
    own = signature_of(inner, is_bound=False)
    name = FORWARD_WRAPPERS[target]
    owners = {"forward": ("impl",), "forward_impl": ("self", "layer")}[name]
    calls = [call for call in host.calls({name}, IMPLEMENTATIONS) if call.owner in owners]
    assert len(calls) >= 2
    assert not [f"{each.where}: {why}" for each in calls if (why := each.misfit(own))]


def test_the_table_of_wraps_is_whole() -> None:
    pytest.importorskip("vllm")
    from vllm_kvcompress.host.hooks import HOOKS

    assert {hook.target: hook.wrap.__name__ for hook in HOOKS} == WRAPPED


def test_wrapped_functions_start_with_what_wrappers_read(host: Sources) -> None:
    pytest.importorskip("vllm")
    from vllm_kvcompress.host.hooks import HOOKS

    for hook in HOOKS:
        found = host.target(hook.target)
        assert found is not None and isinstance(found.node, FunctionNode), hook.target
        is_class_method = any(
            isinstance(each, ast.Name) and each.id == "classmethod"
            for each in found.node.decorator_list
        )
        names = tuple(signature_of(found.node, is_bound=is_class_method).parameters)
        assert names[: len(hook.parameters)] == hook.parameters, hook.target


# --- what we call -------------------------------------------------------------------------


@pytest.mark.parametrize("module", [name for name in MODULES if host_imports(name)])
def test_what_we_import_is_there(module: str, host: Sources) -> None:
    missing = [
        f"{source}:{name}"
        for source, name in host_imports(module).values()
        if host.find(source, name) is None
    ]
    assert not missing, f"{module} imports {missing}"


def test_what_we_call_by_its_imported_name_takes_the_call(host: Sources) -> None:
    wrong, seen = [], 0
    for module in MODULES:
        imported, tree = host_imports(module), OURS.module(module)
        assert tree is not None
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            call = Call.of(node, f"{module}:{node.lineno}")
            name = call.receiver or call.name
            found = host.find(*imported[name]) if name in imported else None
            if found is not None and call.receiver:
                found = host.member(found, call.name)
            if found is None:
                continue
            signature = host.signature(found, is_bound=bool(call.receiver))
            if signature is not None:
                seen += 1
                if reason := call.misfit(signature):
                    wrong.append(f"{call.where}: {call.name}: {reason}; it takes {signature}")
    assert seen > 20
    assert not wrong, "\n".join(wrong)


def test_what_we_pass_on_to_a_base_is_taken(host: Sources) -> None:
    wrong, seen = [], 0
    for module, node, source in subclasses():
        base = host.find(*source)
        assert base is not None
        for inner in ast.walk(node):
            if not isinstance(inner, ast.Call):
                continue
            call = Call.of(inner, f"{module}:{inner.lineno}")
            replaced = host.member(base, call.name) if call.receiver.startswith("super(") else None
            if replaced is not None and isinstance(replaced.node, FunctionNode):
                seen += 1
                signature = signature_of(replaced.node, is_bound=True)
                if reason := call.misfit(signature):
                    wrong.append(f"{call.where}: {call.name}: {reason}; it takes {signature}")
    assert seen > 20
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(("target", "parameters"), PARAMETERS.items(), ids=list(PARAMETERS))
def test_functions_start_with_the_parameters_that_we_pass(
    target: str, parameters: tuple[str, ...], host: Sources
) -> None:
    found = host.target(target)
    assert found is not None and isinstance(found.node, FunctionNode), target
    names = tuple(signature_of(found.node, is_bound=False).parameters)
    assert names[: len(parameters)] == parameters


# --- what we read -------------------------------------------------------------------------


@pytest.mark.parametrize("target", FIELDS)
def test_fields_we_read_are_there(target: str, host: Sources) -> None:
    found = host.target(target)
    assert found is not None
    assert FIELDS[target] <= host.fields(found)


@pytest.mark.parametrize("target", TEXTS)
def test_statements_we_rely_on_are_there(
    target: str, host: Sources, request: pytest.FixtureRequest
) -> None:
    if target in INSTALLED_ONLY and request.node.callspec.params["host"] == "given":
        pytest.skip("it is elsewhere there")
    found = host.target(target)
    assert found is not None and found.node is not None, target
    text = ast.unparse(found.node)
    assert not [each for each in TEXTS[target] if each not in text]


@pytest.mark.parametrize("target", ATTRIBUTES)
def test_attributes_we_read_are_there(target: str, host: Sources) -> None:
    found = host.target(target)
    assert found is not None, target
    assert ATTRIBUTES[target] <= host.attributes(found)


def test_what_mixins_read_of_themselves_is_there(host: Sources) -> None:
    """`self.x` in a subclass of ours is a name of ours, or one of the host's."""
    wrong, seen = [], 0
    for module, node, source in subclasses():
        base, own = host.find(*source), OURS.find(module, node.name)
        assert base is not None and own is not None
        known = host.attributes(base) | OURS.attributes(own)
        for inner in ast.walk(node):
            if isinstance(inner, ast.Attribute) and ast.unparse(inner.value) == "self":
                seen += 1
                if inner.attr not in known:
                    wrong.append(f"{module}:{inner.lineno}: self.{inner.attr}")
    assert seen > 100
    assert not wrong, "\n".join(wrong)


def test_what_we_read_of_annotated_arguments_is_there(host: Sources) -> None:
    """`request.x` where `request` is annotated as a class of the host."""
    wrong, seen = [], 0
    for module in MODULES:
        imported, tree = host_imports(module), OURS.module(module)
        assert tree is not None
        for function in ast.walk(tree):
            if not isinstance(function, FunctionNode):
                continue
            kinds = {
                each.arg: imported[each.annotation.id]
                for each in (*function.args.args, *function.args.kwonlyargs)
                if isinstance(each.annotation, ast.Name) and each.annotation.id in imported
            }
            for node in ast.walk(function):
                if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                    found = host.find(*kinds[node.value.id]) if node.value.id in kinds else None
                    if found is not None and isinstance(found.node, ast.ClassDef):
                        seen += 1
                        has = host.attributes(found) | GIVEN_LATER.get(found.node.name, set())
                        if node.attr not in has and not node.attr.startswith("__"):
                            where = f"{module}:{node.lineno}"
                            wrong.append(f"{where}: {node.value.id}.{node.attr}")
    assert seen > 50
    assert not wrong, "\n".join(wrong)
