"""Reads a package's sources without importing them: what is defined where, and who calls what.

vLLM's next release has no build for a CPU, so nothing of it can be imported here. What our code
overrides, calls and imports can be compared with its sources all the same. The same reading serves
the installed vLLM, and our own code.
"""

import ast
import inspect
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

Parameter = inspect.Parameter
FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Found:
    """Where a name is defined, and as what.

    Attributes
    ----------
    module : str
        Dotted name of the module with the definition, imports followed.
    node : ast.AST or None
        The definition; None for a module, and for a name that a module makes up when it is asked.
    """

    module: str
    node: ast.AST | None


@dataclass(frozen=True)
class Call:
    """One call in the sources.

    Attributes
    ----------
    where : str
        "path:line".
    inside : str
        "module:Class" around it; empty in a plain function.
    receiver : str
        Source text before the last dot, "super()" included; empty for a bare name.
    name : str
        What is called.
    num_positional : int
        Arguments without a name, not counting a ``*args``.
    keywords : tuple[str, ...]
        Names of the others, not counting a ``**kwargs``.
    is_open : bool
        Whether a ``*args`` or ``**kwargs`` is among them, so that more may be given.
    """

    where: str
    inside: str
    receiver: str
    name: str
    num_positional: int
    keywords: tuple[str, ...]
    is_open: bool

    @property
    def owner(self) -> str:
        """Last name of the receiver: "scheduler" of ``self.scheduler``."""
        return re.sub(r"\W+$", "", re.sub(r"\[[^]]*\]", "", self.receiver)).rpartition(".")[2]

    def misfit(self, signature: inspect.Signature) -> str | None:
        """Why a function with this signature cannot take the call; None if it can."""
        bind = signature.bind_partial if self.is_open else signature.bind
        try:
            bind(*[None] * self.num_positional, **dict.fromkeys(self.keywords))
        except TypeError as error:
            return str(error)
        return None

    @classmethod
    def of(cls, node: ast.Call, where: str, inside: str = "") -> "Call":
        """Read the arguments of a call."""
        function = node.func
        is_method = isinstance(function, ast.Attribute)
        named = [keyword.arg for keyword in node.keywords if keyword.arg is not None]
        starred = [each for each in node.args if isinstance(each, ast.Starred)]
        return cls(
            where=where,
            inside=inside,
            receiver=ast.unparse(function.value) if isinstance(function, ast.Attribute) else "",
            name=function.attr if is_method else getattr(function, "id", ""),  # type: ignore[union-attr]
            num_positional=len(node.args) - len(starred),
            keywords=tuple(named),
            is_open=bool(starred) or len(named) < len(node.keywords),
        )


def signature_of(node: FunctionNode, is_bound: bool) -> inspect.Signature:
    """Signature of a function by its definition; without ``self`` or ``cls`` where it is bound."""
    arguments = node.args
    positional = [(each, Parameter.POSITIONAL_ONLY) for each in arguments.posonlyargs]
    positional += [(each, Parameter.POSITIONAL_OR_KEYWORD) for each in arguments.args]
    num_required = len(positional) - len(arguments.defaults)
    parameters = [
        Parameter(each.arg, kind, default=Parameter.empty if number < num_required else None)
        for number, (each, kind) in enumerate(positional)
    ]
    decorators = {each.id for each in node.decorator_list if isinstance(each, ast.Name)}
    if is_bound and "staticmethod" not in decorators:
        parameters = parameters[1:]
    if arguments.vararg:
        parameters.append(Parameter(arguments.vararg.arg, Parameter.VAR_POSITIONAL))
    for each, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        given = Parameter.empty if default is None else None
        parameters.append(Parameter(each.arg, Parameter.KEYWORD_ONLY, default=given))
    if arguments.kwarg:
        parameters.append(Parameter(arguments.kwarg.arg, Parameter.VAR_KEYWORD))
    return inspect.Signature(parameters)


def widest_calls(signature: inspect.Signature) -> Iterator[Call]:
    """The calls that together show what a signature accepts: all by place, all by name, the least.

    Parameters with a default are given in all but the last two.
    """
    fixed = [
        each
        for each in signature.parameters.values()
        if each.kind not in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
    ]
    for some in (fixed, [each for each in fixed if each.default is Parameter.empty]):
        by_place = [each for each in some if each.kind is not Parameter.KEYWORD_ONLY]
        by_name = [each.name for each in some if each.kind is not Parameter.POSITIONAL_ONLY]
        only_named = tuple(each.name for each in some if each.kind is Parameter.KEYWORD_ONLY)
        only_placed = len(some) - len(by_name)
        yield Call("base", "", "", "", len(by_place), only_named, False)
        yield Call("base", "", "", "", only_placed, tuple(by_name), False)


def _statements(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements of a module or class, those under ``if``, ``try`` and ``with`` included."""
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try | ast.With):
            for field in ("body", "orelse", "finalbody"):
                yield from _statements(getattr(node, field, ()))
            for handler in getattr(node, "handlers", ()):
                yield from _statements(handler.body)


def _names(node: ast.stmt) -> Iterator[str]:
    """Names that a statement defines, imports aside."""
    if isinstance(node, FunctionNode | ast.ClassDef):
        yield node.name
    elif isinstance(node, ast.Assign):
        for target in node.targets:
            yield from (each.id for each in ast.walk(target) if isinstance(each, ast.Name))
    elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        yield node.target.id


def _owners(node: ast.AST, owner: str = "") -> Iterator[tuple[ast.Call, str]]:
    """Every call inside a class, with the class's name."""
    for child in ast.iter_child_nodes(node):
        if owner and isinstance(child, ast.Call):
            yield child, owner
        yield from _owners(child, child.name if isinstance(child, ast.ClassDef) else owner)


class Sources:
    """The sources of one top-level package.

    Parameters
    ----------
    root : Path
        Folder that holds the package's folder.
    package : str
        Its name.
    """

    def __init__(self, root: Path, package: str) -> None:
        self.root, self.package = root, package
        self._modules: dict[str, ast.Module | None] = {}
        self._found: dict[tuple[str, str], Found | None] = {}

    @cached_property
    def version(self) -> str:
        """What the package's version file says; empty where there is none."""
        path = self.root / self.package / "_version.py"
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        found = re.search(r"^__version__ = version = ['\"]([^'\"]+)", text, re.MULTILINE)
        return found.group(1) if found else ""

    # --- definitions ----------------------------------------------------------------------

    def path_of(self, module: str) -> Path | None:
        """The file of a module, or None."""
        base = self.root.joinpath(*module.split("."))
        for path in (base / "__init__.py", base.with_suffix(".py")):
            if path.is_file():
                return path
        return None

    def module(self, name: str) -> ast.Module | None:
        """The parsed module, or None if there is none of this name."""
        if name not in self._modules:
            path = self.path_of(name)
            self._modules[name] = ast.parse(path.read_text(encoding="utf-8")) if path else None
        return self._modules[name]

    def imports(self, module: str) -> dict[str, tuple[str, str]]:
        """(module, name) behind every name that a module's top level imports; "" for modules."""
        tree, found = self.module(module), {}
        is_package = (path := self.path_of(module)) is not None and path.stem == "__init__"
        for node in _statements(tree.body if tree else ()):
            if isinstance(node, ast.ImportFrom):
                parts = module.split(".")
                up = node.level - is_package
                base = ".".join(parts[: len(parts) - up]) if node.level else ""
                source = ".".join(filter(None, (base, node.module or "")))
                for each in node.names:
                    key = f"* of {source}" if each.name == "*" else each.asname or each.name
                    found[key] = (source, each.name)
            elif isinstance(node, ast.Import):
                for each in node.names:
                    found[each.asname or each.name.split(".")[0]] = (each.name, "")
        return found

    def find(self, module: str, name: str = "") -> Found | None:
        """Where a module's name comes from. Imports are followed; other packages are not."""
        if (module, name) not in self._found:
            self._found[module, name] = self._find(module, name)
        return self._found[module, name]

    def _find(self, module: str, name: str) -> Found | None:
        tree = self.module(module)
        if tree is None or not name:
            return None if tree is None else Found(module, None)
        for node in _statements(tree.body):
            if name in _names(node):
                return Found(module, node)
        source, original = self.imports(module).get(name, ("", ""))
        if source.split(".")[0] == self.package:
            return self.find(source, original) or self.find(f"{source}.{original}")
        if source:
            return Found(source, None)
        if self.path_of(f"{module}.{name}"):
            return Found(f"{module}.{name}", None)
        for source, original in self.imports(module).values():
            if original == "*" and (found := self.find(source, name)):
                return found
        asks = any("__getattr__" in _names(node) for node in _statements(tree.body))
        texts = (each.value for each in ast.walk(tree) if isinstance(each, ast.Constant))
        return Found(module, None) if asks and name in texts else None

    def target(self, target: str) -> Found | None:
        """Look up "module:name" or "module:Class.member", members of base classes included."""
        module, _, path = target.partition(":")
        name, _, member = path.partition(".")
        found = self.find(module, name)
        if found is None or not member:
            return found
        return self.member(found, member)

    # --- classes --------------------------------------------------------------------------

    def bases(self, found: Found) -> Iterator[Found]:
        """A class and its base classes of this package, nearest first."""
        if not isinstance(found.node, ast.ClassDef):
            return
        yield found
        for base in found.node.bases:
            expression = base.value if isinstance(base, ast.Subscript) else base
            if isinstance(expression, ast.Name):
                above = self.find(found.module, expression.id)
                if above is not None:
                    yield from self.bases(above)

    def member(self, found: Found, name: str) -> Found | None:
        """A method, property or field of a class or of its bases."""
        for each in self.bases(found):
            assert isinstance(each.node, ast.ClassDef)
            for node in _statements(each.node.body):
                if name in _names(node):
                    return Found(each.module, node)
        return None

    def fields(self, found: Found) -> set[str]:
        """Annotated names in the bodies of a class and its bases: a dataclass's fields."""
        return {
            node.target.id
            for each in self.bases(found)
            for node in _statements(each.node.body)  # type: ignore[union-attr]
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
        }

    def attributes(self, found: Found) -> set[str]:
        """What an instance has: members, fields, and what methods assign to ``self``."""
        names = set()
        for each in self.bases(found):
            assert isinstance(each.node, ast.ClassDef)
            for node in _statements(each.node.body):
                names.update(_names(node))
            for inner in ast.walk(each.node):
                if isinstance(inner, ast.Attribute) and isinstance(inner.ctx, ast.Store):
                    names |= {inner.attr} if ast.unparse(inner.value) == "self" else set()
        return names

    def signature(self, found: Found, is_bound: bool = False) -> inspect.Signature | None:
        """Signature of a function, or of a class as it is called; None if it cannot be read."""
        if isinstance(found.node, FunctionNode):
            return signature_of(found.node, is_bound)
        if isinstance(found.node, ast.ClassDef):
            init = self.member(found, "__init__")
            if init is not None and isinstance(init.node, FunctionNode):
                return signature_of(init.node, is_bound=True)
        return None

    # --- calls ----------------------------------------------------------------------------

    def files(self, under: Iterable[str]) -> Iterator[Path]:
        """Python files under some folders or files of the package."""
        for each in under:
            path = self.root / self.package / each
            yield from sorted(path.rglob("*.py")) if path.is_dir() else [path]

    def calls(self, names: Iterable[str], under: Iterable[str] = (".",)) -> list[Call]:
        """Every call of a function or method of one of these names."""
        wanted = set(names)
        mentioned = re.compile(rf"\b({'|'.join(map(re.escape, wanted))})\b")
        found = []
        for path in self.files(under):
            text = path.read_text(encoding="utf-8")
            if not mentioned.search(text):
                continue
            tree = ast.parse(text)
            owners = dict(_owners(tree))
            place = path.relative_to(self.root)
            module = ".".join(place.with_suffix("").parts).removesuffix(".__init__")
            for node in ast.walk(tree):
                if isinstance(node, ast.Call):
                    inside = f"{module}:{owners[node]}" if node in owners else ""
                    call = Call.of(node, f"{place}:{node.lineno}", inside)
                    if call.name in wanted:
                        found.append(call)
        return found


def accepts_all_of(own: inspect.Signature, base: inspect.Signature) -> str | None:
    """Why a function cannot stand for another; None if it takes whatever the other takes."""
    for call in widest_calls(base):
        if reason := call.misfit(own):
            return f"{reason}: it takes {own}, its base {base}"
    takes = {each.kind for each in own.parameters.values()}
    for kind in {each.kind for each in base.parameters.values()}:
        if kind in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD) and kind not in takes:
            return f"it takes {own}, its base any more: {base}"
    return None
