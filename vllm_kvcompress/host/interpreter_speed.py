"""Spare Triton's interpreter work that changes nothing: a kernel's result is the same bits.

On a CPU every engine step launches about a dozen of vLLM's kernels in the interpreter, and most of
a launch goes into preparing it, not into numpy. `host.cpu_triton` calls this once. Steps of the
probe model take half as long with it.
"""

import dataclasses
import inspect
from typing import Any


def speed_up(interpreter: Any) -> None:
    """Spare what follows in `interpreter`, which is Triton's module of that name.

    A Triton whose interpreter is built otherwise (known: 3.9) is left as it is.
    """
    if not _is_known(interpreter):
        return
    _look_for_builtins_once(interpreter)
    _replace_the_language_once(interpreter)
    _check_no_overflow_in_vain(interpreter)
    _build_types_of_numpy_once(interpreter)


def _is_known(interpreter: Any) -> bool:
    functions = {"_patch_builtin": ["pkg", "builder", "scope"], "_patch_lang": ["fn"]}
    functions |= {"_get_np_dtype": ["tt_dtype"]}
    for name, parameters in functions.items():
        function = getattr(interpreter, name, None)
        if function is None or list(inspect.signature(function).parameters) != parameters:
            return False
    options = interpreter.interpreter_builder.options
    return (
        all(hasattr(interpreter, name) for name in ("_patch_attr", "_LangPatchScope"))
        and hasattr(interpreter._LangPatchScope(), "_changes")
        and all(hasattr(options, name) for name in ("sanitize_overflow", "debug"))
    )


def _look_for_builtins_once(interpreter: Any) -> None:
    """Remember which names of a Triton module are builtins.

    Before each launch Triton goes through all members of its language to find them. They never
    change; within a launch, whose replacements are no builtins, they could not be told.
    """
    core, is_builtin = interpreter.tl.core, interpreter.tl.core.is_builtin
    names: dict[Any, list[str]] = {}

    def names_of(pkg: Any) -> list[str]:
        members = interpreter.inspect.getmembers(pkg)
        return [name for name, member in members if is_builtin(member)]

    def patch_builtin(pkg: Any, builder: Any, scope: Any) -> None:
        if pkg not in names:
            names[pkg] = names_of(pkg)
        for name in names[pkg]:
            member = getattr(pkg, name)
            if is_builtin(member):  # not so where this launch has replaced it already
                interpreter._patch_attr(pkg, name, member, builder, scope)

    for module in (interpreter.tl, core, core.tensor, interpreter.tl.math):
        names[module] = names_of(module)
    interpreter._patch_builtin = patch_builtin


def _replace_the_language_once(interpreter: Any) -> None:
    """Do not prepare a launch again at every call of a device function in it; `tl.max` is one.

    What such a function sees of Triton's language is mostly replaced by then. What is not is
    restored with the rest when the launch ends; Triton would leave it replaced.
    """
    language, original = interpreter.tl, interpreter._patch_lang
    launch = interpreter.GridExecutor.__call__
    launches: list[_Launch] = []  # the one that runs, if any

    def patch_lang(fn: Any) -> Any:
        if not launches:
            return original(fn)
        current, seen = launches[-1], fn.__globals__.values()
        modules = {
            module for module in (language, language.core) if any(each is module for each in seen)
        }
        if modules and modules <= current.replaced:
            return interpreter._LangPatchScope()
        current.replaced |= modules
        scope = original(fn)
        if current.scope is None:
            current.scope = scope  # Triton restores it when the launch ends
        else:
            current.scope._changes += scope._changes
        return scope

    def call(self: Any, *args: Any, **kwargs: Any) -> None:
        launches.append(_Launch())
        try:
            launch(self, *args, **kwargs)
        finally:
            launches.pop()

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_lang, call


@dataclasses.dataclass
class _Launch:
    """Modules of the language whose members are replaced, and Triton's list of them."""

    replaced: set[Any] = dataclasses.field(default_factory=set)
    scope: Any = None


def _check_no_overflow_in_vain(interpreter: Any) -> None:
    """Leave out a check whose answer Triton drops.

    For every sum and product of integers it computes in 64 bits whether they fit, nine operations,
    and hands the answer to a ``device_assert``, which does nothing unless debugging is on.
    """
    options = interpreter.interpreter_builder.options
    interpreter.interpreter_builder.options = dataclasses.replace(
        options, sanitize_overflow=options.sanitize_overflow and options.debug
    )


def _build_types_of_numpy_once(interpreter: Any) -> None:
    """Remember numpy's type of each type of Triton: a table of all is built at each load."""
    original = interpreter._get_np_dtype
    found: dict[str, Any] = {}

    def get_np_dtype(tt_dtype: Any) -> Any:
        element = tt_dtype.scalar  # a pointer is its own scalar
        if element.name not in found:
            found[element.name] = original(element)
        return found[element.name]

    interpreter._get_np_dtype = get_np_dtype
