# SPDX-License-Identifier: Apache-2.0
"""Makes Triton's interpreter compute bfloat16, for tests of kernels on a machine without a GPU.

The interpreter keeps bfloat16 values as uint16 bit patterns. As it comes, it truncates casts from float32 instead of rounding
them, and adds, multiplies and compares the bit patterns themselves: a bfloat16 kernel runs without an error and returns
garbage. ``install`` widens the operands of every floating-point instruction to float32 and rounds its result to nearest even,
which is what a GPU does to a single instruction. It also mends two things that Triton 3.6 does and 3.9 doesn't: ``range`` up to
a run-time value fails under numpy 2.4, and ``tl.maximum`` and ``tl.minimum`` return NaN where one operand is NaN (a GPU
returns the other operand). And it leaves out work without a result, which was more than half of the time of the tests of
attention.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

_UNARY = ("fneg", "cos", "exp", "exp2", "floor", "ceil", "log", "log2", "precise_sqrt", "sqrt", "sin", "erf", "rsqrt")
_ARITHMETIC = ("fadd", "fsub", "fmul", "fdiv", "frem", "precise_divf", "approx_divf", "fma", "clampf")
_EXTREMA = ("minimumf", "minnumf", "maximumf", "maxnumf")
_COMPARE = tuple(f"fcmp{order}{relation}" for order in "OU" for relation in ("LT", "GT", "LE", "GE", "EQ", "NE"))

#: What ``install`` replaced: (owner, attribute, the original or None where there was none).
_replaced: list[tuple[Any, str, Any]] = []


def bf16_to_f32(bits: NDArray[Any]) -> NDArray[Any]:
    """The float32 values of bfloat16 bit patterns (uint16)."""
    wide: NDArray[Any] = bits.astype(np.uint32) << np.uint32(16)
    return wide.view(np.float32)


def f32_to_bf16(values: NDArray[Any]) -> NDArray[Any]:
    """The bit patterns (uint16) of float32 values rounded to bfloat16, to nearest even; a NaN stays a NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    quiet = (bits >> np.uint32(16)) | np.uint32(0x40)
    narrow: NDArray[Any] = np.where(np.isnan(values), quiet, rounded).astype(np.uint16)
    return narrow.reshape(np.shape(values))


def installed() -> bool:
    return bool(_replaced)


def install() -> None:
    """Mend Triton's interpreter in this process. ``TRITON_INTERPRET=1`` must be set before Triton is imported."""
    if installed():
        return
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    handle = interpreter.TensorHandle

    def is_bf16(x: Any) -> bool:
        return isinstance(x, handle) and x.dtype.scalar == tl.bfloat16 and x.data.dtype == np.uint16

    def widen(x: Any) -> Any:
        return handle(bf16_to_f32(x.data), tl.float32) if is_bf16(x) else x

    def narrow(x: Any) -> Any:
        return handle(f32_to_bf16(x.data), tl.bfloat16)

    def arithmetic(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Any, *args: Any) -> Any:
            if not any(map(is_bf16, args)):
                return original(self, *args)
            return narrow(original(self, *map(widen, args)))

        return call

    def comparison(original: Callable[..., Any]) -> Callable[..., Any]:
        # The interpreter labels the booleans with the type of the operands, and a later cast then reads them as such.
        def call(self: Any, lhs: Any, rhs: Any) -> Any:
            return handle(original(self, widen(lhs), widen(rhs)).data, tl.int1)

        return call

    def cast(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Any, src: Any, dst_type: Any) -> Any:
            src, to_bf16 = widen(src), dst_type.scalar == tl.bfloat16
            wanted = tl.float32 if to_bf16 else dst_type
            if src.dtype.scalar != wanted.scalar:
                src = original(self, src, wanted)
            return narrow(src) if to_bf16 else src

        return call

    def cast_with_rounding(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Any, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
            if dst_type.scalar != tl.bfloat16 and not is_bf16(src):
                return original(self, src, dst_type, rounding_mode)
            if dst_type.scalar == tl.bfloat16 and rounding_mode == interpreter._ir.ROUNDING_MODE.RTZ:
                raise NotImplementedError("cast to bfloat16 that rounds toward zero")
            return self.cast_impl(src, dst_type)

        return call

    def dot(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
            out = original(self, widen(a), widen(b), widen(d), *options)
            return narrow(out) if is_bf16(d) else out

        return call

    def atomic(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Any, op: Any, ptr: Any, val: Any, *rest: Any) -> Any:
            if is_bf16(val):
                raise NotImplementedError("atomic operation on bfloat16")
            return original(self, op, ptr, val, *rest)

        return call

    for name in (*_UNARY, *_ARITHMETIC, *_EXTREMA):
        _wrap(builder, f"create_{name}", arithmetic)
    for name in _COMPARE:
        _wrap(builder, f"create_{name}", comparison)
    _wrap(builder, "cast_impl", cast)
    _wrap(builder, "create_fp_to_fp", cast_with_rounding)
    _wrap(builder, "create_dot", dot)
    _wrap(builder, "create_atomic_rmw", atomic)
    _set(builder, "get_bf16", lambda self, value: narrow(self.get_fp32(value)))
    _mend_extrema(builder, arithmetic)
    _mend_index(interpreter)
    _leave_out(interpreter, tl)


def uninstall() -> None:
    """Put the interpreter back as it came."""
    while _replaced:
        owner, name, original = _replaced.pop()
        if original is None:
            delattr(owner, name)
        else:
            setattr(owner, name, original)


def _set(owner: Any, name: str, value: Any) -> None:
    _replaced.append((owner, name, vars(owner).get(name)))
    setattr(owner, name, value)


def _wrap(owner: Any, name: str, wrapper: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    # Which instructions exist differs between versions of Triton.
    if name in vars(owner):
        _set(owner, name, wrapper(vars(owner)[name]))


def _mend_extrema(builder: Any, arithmetic: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """The two that return the operand that is a number, as the hardware's instructions do."""

    def extremum(op: np.ufunc) -> Callable[..., Any]:
        return arithmetic(lambda self, lhs, rhs: self.binary_op(lhs, rhs, op))

    _set(builder, "create_minnumf", extremum(np.fmin))
    _set(builder, "create_maxnumf", extremum(np.fmax))


def _mend_index(interpreter: Any) -> None:
    """Scalars are arrays of one element here, which numpy 2.4 no longer turns into an int by itself."""
    patch_tensor = interpreter._patch_lang_tensor

    def patch(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    _set(interpreter, "_patch_lang_tensor", patch)


def _leave_out(interpreter: Any, tl: Any) -> None:
    """What has no result: of 2.0 s for attention and its gradients on 65 tokens 1.2 (Triton 3.6)."""
    builder = getattr(interpreter, "interpreter_builder", None)
    options: Any = getattr(builder, "options", None)
    if getattr(options, "sanitize_overflow", False) and not options.debug:
        # Integers are added once more, wider, and compared; what is found would be told in debug mode alone.
        _set(builder, "options", dataclasses.replace(options, sanitize_overflow=False))
    patch, scope = (getattr(interpreter, name, None) for name in ("_patch_lang", "_LangPatchScope"))
    if patch is None or scope is None:  # another version of Triton
        return

    def patch_lang(fn: Any) -> Any:
        """Only where there is something to patch: a device function is called inside of a kernel, whose launch has done it."""
        languages = [value for value in fn.__globals__.values() if value is tl or value is tl.core]
        builtin = tl.core.is_builtin
        if any(builtin(language.load) or builtin(language.tensor.__add__) for language in languages) or not languages:
            return patch(fn)
        return scope()

    _set(interpreter, "_patch_lang", patch_lang)
