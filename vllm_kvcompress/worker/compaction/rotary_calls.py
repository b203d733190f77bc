"""Whether an attention layer of one of vLLM's model classes turns its keys at all.

Some classes make a rotary embedding for every layer and call it in some (EXAONE 4: those with a
window). What counts is the call, and the conditions that it stands under.
"""

import ast
import inspect
import textwrap
from collections.abc import Iterator
from functools import cache

from torch import nn

_Guard = tuple[ast.expr, bool]


def calls_rotary(attention: nn.Module, name: str) -> bool:
    """Whether ``forward`` is known to call ``self.<name>(...)`` in this layer.

    Parameters
    ----------
    attention : nn.Module
        The layer around vLLM's attention.
    name : str
        Attribute that holds its rotary embedding.

    Returns
    -------
    bool
        True where a call stands under no condition, or under conditions on the layer's own
        attributes that hold; and where ``forward`` has no such call, for then a method that it
        calls has. False where all calls stand under others.
    """
    calls = _calls(type(attention).forward, name)
    return not calls or any(
        all(_holds(test, attention) is wanted for test, wanted in guards) for guards in calls
    )


@cache
def _calls(forward: object, name: str) -> tuple[tuple[_Guard, ...], ...]:
    """The conditions that each call stands under."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(forward))))  # type: ignore[arg-type]
    except (OSError, TypeError, SyntaxError):
        return ()
    return tuple(_find(tree, name, ()))


def _find(node: ast.AST, name: str, guards: tuple[_Guard, ...]) -> Iterator[tuple[_Guard, ...]]:
    if isinstance(node, ast.Call) and ast.unparse(node.func) == f"self.{name}":
        yield guards
    if isinstance(node, ast.If | ast.IfExp):
        yield from _find(node.test, name, guards)
        for field, wanted in (("body", True), ("orelse", False)):
            found = getattr(node, field)
            for child in found if isinstance(found, list) else [found]:
                yield from _find(child, name, (*guards, (node.test, wanted)))
        return
    for child in ast.iter_child_nodes(node):
        yield from _find(child, name, guards)


def _holds(test: ast.expr, attention: nn.Module) -> bool | None:
    """What a condition on attributes of the layer comes to; None for any other."""
    names = {node.id for node in ast.walk(test) if isinstance(node, ast.Name)}
    if names != {"self"} or any(isinstance(node, ast.Call) for node in ast.walk(test)):
        return None
    try:
        # The host's own source, which it runs at every step.
        code = compile(ast.Expression(test), "<condition>", "eval")
        return bool(eval(code, {"__builtins__": {}}, {"self": attention}))  # noqa: S307
    except Exception:  # attributes that are made later, tensors of several values
        return None
