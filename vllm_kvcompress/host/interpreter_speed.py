"""Spare Triton's interpreter work that changes nothing: a kernel's result is the same bits.

On a CPU every engine step launches about a dozen of vLLM's kernels in the interpreter, and most of
a launch goes into preparing it, not into numpy. `host.cpu_triton` calls this once. Steps of the
probe model take less than half as long with it.
"""

import dataclasses
import functools
import inspect
from typing import Any

_OPERANDS = {
    "binary_op_type_checking_impl": [
        *("lhs", "rhs", "allow_lhs_ptr", "allow_rhs_ptr", "arithmetic_check", "div_or_mod")
    ],
    "computation_type_impl": ["a_ty", "a_is_scalar", "b_ty", "b_is_scalar", "div_or_mod"],
    "broadcast_impl_value": ["lhs", "rhs"],
}
"""What `_check_operands_once` replaces, with its parameters."""


def speed_up(interpreter: Any) -> None:
    """Spare what follows in `interpreter`, which is Triton's module of that name.

    A Triton whose interpreter is built otherwise (known: 3.9) is left as it is.
    """
    if not _is_known(interpreter):
        return
    _look_for_builtins_once(interpreter)
    _remember_replacements(interpreter)
    _replace_the_language_once(interpreter)
    _check_no_overflow_in_vain(interpreter)
    _build_types_of_numpy_once(interpreter)
    _work_out_shapes_once(interpreter.tl.core)
    _check_operands_once(interpreter.TritonSemantic)


def _is_known(interpreter: Any) -> bool:
    functions = {"_patch_builtin": ["pkg", "builder", "scope"], "_patch_lang": ["fn"]}
    functions |= {"_get_np_dtype": ["tt_dtype"]}
    known = [(getattr(interpreter, name, None), names) for name, names in functions.items()]
    core = interpreter.tl.core
    known.append((core.tensor.__init__, ["self", "handle", "type"]))
    known.append((core.block_type.__init__, ["self", "element_ty", "shape"]))
    semantic = getattr(interpreter, "TritonSemantic", None)
    for name, names in _OPERANDS.items():
        known.append((getattr(semantic, name, None), ["self", *names]))
    for function, parameters in known:
        if function is None or list(inspect.signature(function).parameters) != parameters:
            return False
    options = interpreter.interpreter_builder.options
    return (
        all(hasattr(interpreter, name) for name in ("_patch_attr", "_LangPatchScope"))
        and hasattr(interpreter._LangPatchScope(), "_changes")
        and hasattr(interpreter, "_MISSING")
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


def _remember_replacements(interpreter: Any) -> None:
    """Replace the members of Triton's language at a launch by what replaced them at the last one.

    A replacement depends on the member alone, and each launch makes about 200 of them anew. Where
    a member is not the one of last time, Triton's own function is asked again.
    """
    language, original = interpreter.tl, interpreter._patch_lang
    remembered: dict[frozenset[int], list[tuple[Any, str, Any, Any]]] = {}

    def patch_lang(fn: Any) -> Any:
        names = frozenset(id(each) for each in _modules_of(fn, language))
        changes = remembered.get(names)
        if changes and all(
            getattr(obj, name, interpreter._MISSING) is old for obj, name, old, _ in changes
        ):
            scope = interpreter._LangPatchScope()
            for obj, name, _, new in changes:
                scope.set_attr(obj, name, new)
            return scope
        scope = original(fn)
        first: dict[tuple[int, str], tuple[Any, str, Any]] = {}  # one may be replaced twice
        for obj, name, old in scope._changes:
            first.setdefault((id(obj), name), (obj, name, old))
        remembered[names] = [
            (obj, name, old, getattr(obj, name)) for obj, name, old in first.values()
        ]
        return scope

    interpreter._patch_lang = patch_lang


def _modules_of(fn: Any, language: Any) -> set[Any]:
    """Which of Triton's two modules of the language a kernel's file names."""
    seen = fn.__globals__.values()
    return {module for module in (language, language.core) if any(each is module for each in seen)}


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
        current, modules = launches[-1], _modules_of(fn, language)
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


def _work_out_shapes_once(core: Any) -> None:
    """Remember what Triton derives from a shape for every tensor and type that has it.

    Each tensor of a kernel wraps its shape, and each type of a block checks and prints it, number
    by number: together about a quarter of a launch. `core` is Triton's module of that name, the
    same for all copies of the interpreter.
    """
    if hasattr(core.tensor.__init__, "__wrapped__"):
        return  # done already
    make_tensor, make_type = core.tensor.__init__, core.block_type.__init__
    constexpr = core.constexpr
    of_scalars: dict[str, Any] = {}
    types: dict[Any, dict[str, Any]] = {}
    shapes: dict[Any, Any] = {}

    @functools.wraps(make_tensor)
    def tensor(self: Any, handle: Any, type: Any) -> None:
        known = vars(type).setdefault("_of_tensors", {}) if type.is_block() else of_scalars
        if not known:
            make_tensor(self, handle, type)
            known |= {"shape": self.shape, "numel": self.numel}
            return
        own = vars(self)
        own["handle"], own["type"], own["dtype"] = handle, type, type.scalar
        own.update(known)

    @functools.wraps(make_type)
    def block_type(self: Any, element_ty: Any, shape: Any) -> None:
        numbers = [each.value if isinstance(each, constexpr) else each for each in shape]
        key = (element_ty.name, *numbers)
        known = types.get(key)
        if known is None:
            make_type(self, element_ty, shape)
            # One object for all types of a shape, so that `is` tells that shapes are equal.
            self.shape = shapes.setdefault(key[1:], self.shape)
            self._of_tensors = {}
            types[key] = dict(vars(self))
            return
        vars(self).update(known)
        self.element_ty = element_ty

    core.tensor.__init__, core.block_type.__init__ = tensor, block_type


def _check_operands_once(semantic: Any) -> None:
    """Remember of which types of operands an operation leaves both as they are.

    Before each operation Triton works out the type of its result, converts both operands to it and
    stretches them to one shape. Mostly they have it already. `semantic` is Triton's class of that
    name, the same for all copies of the interpreter.
    """
    if hasattr(semantic.broadcast_impl_value, "__wrapped__"):
        return  # done already
    check, broadcast = semantic.binary_op_type_checking_impl, semantic.broadcast_impl_value
    compute = semantic.computation_type_impl
    unchanged: dict[Any, bool] = {}
    results: dict[Any, Any] = {}

    @functools.wraps(check)
    def binary_op_type_checking_impl(self: Any, lhs: Any, rhs: Any, *args: Any, **more: Any) -> Any:
        tensor = self.tensor
        if type(lhs) is not tensor or type(rhs) is not tensor:
            return check(self, lhs, rhs, *args, **more)
        key = (lhs.dtype.name, rhs.dtype.name, *args, *more.items())
        if unchanged.get(key):
            return self.broadcast_impl_value(lhs, rhs)
        found = check(self, lhs, rhs, *args, **more)
        if key not in unchanged:
            # Two pointers may differ in what their names do not say.
            both = lhs.dtype.is_ptr() and rhs.dtype.is_ptr()
            names = tuple(each.dtype.name for each in found)
            unchanged[key] = not both and names == key[:2]
        return found

    @functools.wraps(compute)
    def computation_type_impl(
        self: Any, a_ty: Any, a_is_scalar: bool, b_ty: Any, b_is_scalar: bool, div_or_mod: bool
    ) -> Any:
        key = (a_ty.name, a_is_scalar, b_ty.name, b_is_scalar, div_or_mod)
        if key not in results:
            results[key] = compute(self, a_ty, a_is_scalar, b_ty, b_is_scalar, div_or_mod)
        return results[key]

    @functools.wraps(broadcast)
    def broadcast_impl_value(self: Any, lhs: Any, rhs: Any) -> Any:
        one, other = lhs.type, rhs.type
        if one.is_block() and other.is_block():
            are_equal = one.shape is other.shape
        else:
            are_equal = not one.is_block() and not other.is_block()
        return (lhs, rhs) if are_equal else broadcast(self, lhs, rhs)

    for function in (binary_op_type_checking_impl, computation_type_impl, broadcast_impl_value):
        setattr(semantic, function.__name__, function)
