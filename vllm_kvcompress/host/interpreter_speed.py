"""Spare Triton's interpreter work that changes nothing: a kernel's result is the same bits.

On a CPU every engine step launches about a dozen of vLLM's kernels in the interpreter, and most of
a launch goes into preparing it, not into numpy. `host.cpu_triton` calls this once. Steps of the
probe model take half as long with it.
"""

import dataclasses
from typing import Any


def speed_up(interpreter: Any) -> None:
    """Spare what follows in `interpreter`, which is Triton's module of that name."""
    _look_for_builtins_once(interpreter)
    _replace_the_language_once(interpreter)
    _check_no_overflow_in_vain(interpreter)
    _build_types_of_numpy_once(interpreter)


def _look_for_builtins_once(interpreter: Any) -> None:
    """Remember which names of a Triton module are builtins.

    Before each launch Triton goes through all members of its language to find them. They never
    change.
    """
    is_builtin = interpreter.tl.core.is_builtin
    names: dict[Any, list[str]] = {}

    def patch_builtin(pkg: Any, builder: Any, scope: Any) -> None:
        if pkg not in names:
            members = interpreter.inspect.getmembers(pkg)
            names[pkg] = [name for name, member in members if is_builtin(member)]
        for name in names[pkg]:
            member = getattr(pkg, name)
            if is_builtin(member):  # not so within a launch that has replaced it already
                interpreter._patch_attr(pkg, name, member, builder, scope)

    interpreter._patch_builtin = patch_builtin


def _replace_the_language_once(interpreter: Any) -> None:
    """Do not prepare a launch again at every call of a device function in it; `tl.max` is one.

    What such a function sees of Triton's language is mostly replaced by then.
    """
    language, original = interpreter.tl, interpreter._patch_lang
    launch = interpreter.GridExecutor.__call__
    replaced: list[set[Any]] = []  # of the launch that runs

    def patch_lang(fn: Any) -> Any:
        if not replaced:
            return original(fn)
        seen = fn.__globals__.values()
        modules = {
            module for module in (language, language.core) if any(each is module for each in seen)
        }
        if modules and modules <= replaced[-1]:
            return interpreter._LangPatchScope()
        replaced[-1].update(modules)
        return original(fn)

    def call(self: Any, *args: Any, **kwargs: Any) -> None:
        replaced.append(set())
        try:
            launch(self, *args, **kwargs)
        finally:
            replaced.pop()

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_lang, call


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
