"""The reader of sources, on small packages made up for it."""

import ast

import pytest

from tests.host.sources import (
    Call,
    Found,
    FunctionNode,
    Sources,
    accepts_all_of,
    signature_of,
)

SCHEDULER = """
from host.blocks import Manager as Blocks
from .fields import *

VALUE: int = 3
if VALUE:
    SOMETIMES = 1

class Base:
    spec: int = 0

    def __init__(self, config, *, on=True):
        self.config, self.manager = config, Blocks()
        other.not_mine = 1

    def hit(self, request, limit=None):
        return request

    @property
    def usage(self):
        return 0.0

class Scheduler(Base):
    def run(self):
        found = self.hit(self.request, self.limit)
        return self.manager.hit(1, 2, 3)

class Async(Scheduler):
    def hit(self, request, limit=None):
        return super().hit(request, limit)

class Stranger:
    def run(self):
        return self.hit(1, 2, 3, 4)
"""

FILES = {
    "host/__init__.py": "def __getattr__(name):\n    return {'Lazy': 1}[name]\n",
    "host/_version.py": "__version__ = version = '9.8.7'\n",
    "host/scheduler.py": SCHEDULER,
    "host/blocks.py": "import other.thing\n\nclass Manager:\n    pass\n",
    "host/fields.py": "STARRED = 1\n",
    "host/engine/__init__.py": "from .core import Core\n",
    "host/engine/core.py": """
class Core:
    def step(self, schedulers):
        self.scheduler.hit(1, limit=2)
        schedulers[0].hit(*self.all, **self.more)
        hit(1)
        type(self.scheduler).hit(self, 1)
""",
}


@pytest.fixture(scope="module")
def host(tmp_path_factory) -> Sources:
    root = tmp_path_factory.mktemp("sources")
    for name, text in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return Sources(root, "host")


def function(text: str) -> FunctionNode:
    node = ast.parse(f"def f({text}): pass").body[0]
    assert isinstance(node, FunctionNode)
    return node


def call(text: str) -> Call:
    node = ast.parse(f"x.f({text})", mode="eval").body
    assert isinstance(node, ast.Call)
    return Call.of(node, "here")


# --- calls and signatures -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("parameters", "arguments", "words"),
    [
        ("self, request", "a, b", "too many positional arguments"),
        ("self, request", "a, limit=b", "unexpected keyword argument 'limit'"),
        ("self, request, limit", "a", "missing a required argument: 'limit'"),
        ("self, request, *, limit", "a, b", "too many positional arguments"),
        ("self, request, /", "request=a", "request"),
        ("self, request", "a, b, *more", "too many positional arguments"),
        ("self, request", "a, request=b", "multiple values for argument 'request'"),
    ],
)
def test_a_call_that_is_not_taken(parameters: str, arguments: str, words: str) -> None:
    reason = call(arguments).misfit(signature_of(function(parameters), is_bound=True))
    assert reason is not None and words in reason


@pytest.mark.parametrize(
    ("parameters", "arguments"),
    [
        ("self, request, limit=None", "a, b"),
        ("self, request, *args, **kwargs", "a, b, c, limit=d"),
        ("self, request, limit", "*all"),
        ("self, request, limit", "a, **more"),
        ("self, *, limit=1", ""),
    ],
)
def test_a_call_that_is_taken(parameters: str, arguments: str) -> None:
    assert call(arguments).misfit(signature_of(function(parameters), is_bound=True)) is None


@pytest.mark.parametrize(
    ("own", "base", "words"),
    [
        ("self, request", "self, request, limit=None", "too many positional arguments"),
        ("self, other", "self, request", "request"),
        ("self, request, more", "self, request", "missing a required argument: 'more'"),
        ("self, request, limit=None", "self, request, *, limit=None, deep=0", "deep"),
        ("self, request", "self, request, **more", "any more"),
    ],
)
def test_an_override_that_takes_less_than_its_base(own: str, base: str, words: str) -> None:
    reason = accepts_all_of(
        signature_of(function(own), is_bound=True), signature_of(function(base), is_bound=True)
    )
    assert reason is not None and words in reason


@pytest.mark.parametrize(
    ("own", "base"),
    [
        ("self, request, limit=None", "self, request, limit=None"),
        ("self, request, *args, **kwargs", "self, request, limit, *, deep=0"),
        ("self, request, more=1", "self, request"),
        ("self, *args, **kwargs", "self, *args, **kwargs"),
    ],
)
def test_an_override_that_can_stand_for_its_base(own: str, base: str) -> None:
    signatures = (signature_of(function(each), is_bound=True) for each in (own, base))
    assert accepts_all_of(*signatures) is None


def test_static_methods_have_no_self_to_drop() -> None:
    node = ast.parse("@staticmethod\ndef f(parser): pass").body[0]
    assert isinstance(node, FunctionNode)
    assert list(signature_of(node, is_bound=True).parameters) == ["parser"]


# --- definitions --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "name", "where"),
    [
        ("host.scheduler", "Scheduler", "host.scheduler"),
        ("host.scheduler", "Blocks", "host.blocks"),
        ("host.scheduler", "SOMETIMES", "host.scheduler"),
        ("host.scheduler", "VALUE", "host.scheduler"),
        ("host.scheduler", "STARRED", "host.fields"),
        ("host.engine", "Core", "host.engine.core"),
        ("host.engine", "core", "host.engine.core"),
        ("host", "Lazy", "host"),
        ("host.blocks", "other", "other.thing"),
    ],
)
def test_a_name_is_found_where_it_is_defined(
    host: Sources, module: str, name: str, where: str
) -> None:
    found = host.find(module, name)
    assert found is not None and found.module == where


@pytest.mark.parametrize(
    ("module", "name"), [("host.scheduler", "Moved"), ("host.gone", "X"), ("host", "Absent")]
)
def test_a_name_that_is_gone_is_not_found(host: Sources, module: str, name: str) -> None:
    assert host.find(module, name) is None


def test_members_fields_and_attributes_of_a_class(host: Sources) -> None:
    found = host.target("host.scheduler:Async")
    assert found is not None
    assert [each.node.name for each in host.bases(found)] == ["Async", "Scheduler", "Base"]  # type: ignore[union-attr]
    assert host.fields(found) == {"spec"}
    assert {"config", "manager", "usage", "run", "spec"} <= host.attributes(found)
    assert "not_mine" not in host.attributes(found)
    assert host.target("host.scheduler:Async.usage") is not None
    assert host.target("host.scheduler:Async.gone") is None
    signature = host.signature(found)
    assert signature is not None and list(signature.parameters) == ["config", "on"]
    assert host.version == "9.8.7"


# --- who calls ----------------------------------------------------------------------------


def test_calls_are_found_with_what_they_are_called_on(host: Sources) -> None:
    found = {(each.receiver, each.owner, each.inside) for each in host.calls({"hit"})}
    assert found == {
        ("self", "self", "host.scheduler:Scheduler"),
        ("self.manager", "manager", "host.scheduler:Scheduler"),
        ("super()", "super", "host.scheduler:Async"),
        ("self", "self", "host.scheduler:Stranger"),
        ("self.scheduler", "scheduler", "host.engine.core:Core"),
        ("schedulers[0]", "schedulers", "host.engine.core:Core"),
        ("", "", "host.engine.core:Core"),
        ("type(self.scheduler)", "scheduler", "host.engine.core:Core"),
    }
    assert {each.where.split(":")[0] for each in host.calls({"hit"}, ["engine"])} == {
        "host/engine/core.py"
    }


def test_the_broken_override_of_0_33_is_found(host: Sources) -> None:
    """The base calls with two positional arguments; an override of one cannot take that."""
    own = signature_of(function("self, request"), is_bound=True)
    calls = [each for each in host.calls({"hit"}) if each.inside == "host.scheduler:Scheduler"]
    calls = [each for each in calls if each.receiver == "self"]
    assert [each.misfit(own) for each in calls] == ["too many positional arguments"]
    base = host.target("host.scheduler:Scheduler.hit")
    assert base is not None and isinstance(base.node, FunctionNode)
    assert accepts_all_of(own, signature_of(base.node, is_bound=True)) is not None


def test_a_class_is_a_module_and_a_definition(host: Sources) -> None:
    """Two classes of one name in two modules are two: `Found` says which."""
    blocks = host.find("host.blocks", "Manager")
    assert blocks == host.find("host.scheduler", "Blocks")
    assert blocks != Found("host.other", blocks.node if blocks else None)
