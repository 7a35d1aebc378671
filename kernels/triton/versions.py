"""What differs between the versions of Triton that are supported, 3.6 to 3.9; nothing else in the tree asks for one."""

import triton
import triton.language as tl

VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])
OLDEST = (3, 6)
if VERSION < OLDEST:
    raise ImportError(f"triton {triton.__version__} is installed, the kernels take 3.6 and newer")

# Whether kernels run on the CPU, interpreted: TRITON_INTERPRET=1 when triton was imported. For use in kernels.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


def _let_one_element_be_an_index() -> None:
    """Interpreters before 3.9 take int() of arrays of one element, which NumPy 2.4 refuses."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_index_too(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = patch_index_too


def _let_maxima_drop_nan() -> None:
    """Interpreters before 3.8 keep a NaN in tl.maximum and tl.minimum, which GPUs and later interpreters drop."""
    import numpy as np
    from triton.runtime.interpreter import InterpreterBuilder

    InterpreterBuilder.create_maxnumf = lambda self, a, b: self.binary_op(a, b, np.fmax)
    InterpreterBuilder.create_minnumf = lambda self, a, b: self.binary_op(a, b, np.fmin)


def _let_a_constant_hold_a_tensor() -> None:
    """3.7 and 3.8: interpreted, a constexpr times a tensor is a constexpr of a tensor, which comparisons refuse."""
    from triton.language.semantic import TritonSemantic

    to_tensor = TritonSemantic.to_tensor

    def held_too(self, x, check_type=True):
        held = x.value if isinstance(x, tl.constexpr) else None
        return held if isinstance(held, tl.tensor) else to_tensor(self, x, check_type)

    TritonSemantic.to_tensor = held_too


if INTERPRETED.value and VERSION < (3, 9):
    _let_one_element_be_an_index()
if INTERPRETED.value and VERSION < (3, 8):
    _let_maxima_drop_nan()
if INTERPRETED.value and (3, 7) <= VERSION < (3, 9):
    _let_a_constant_hold_a_tensor()

# Interpreters before 3.9 round a * b before they add c.
_FMA_ROUNDS_TWICE = tl.constexpr(INTERPRETED.value and VERSION < (3, 9))


@triton.jit
def fma(a, b, c):
    """a * b + c of floats, rounded once; in an interpreter that rounds twice by way of double, nearly always once."""
    if _FMA_ROUNDS_TWICE:
        return (tl.cast(a, tl.float64) * tl.cast(b, tl.float64) + tl.cast(c, tl.float64)).to(tl.float32)
    return tl.fma(a, b, c)


@triton.jit
def widened(x):
    """A tensor as loaded, in float32: the interpreter loses bfloat16's subnormals."""
    if INTERPRETED and x.dtype == tl.bfloat16:
        return (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def narrowed(x, dtype: tl.constexpr):
    """A float32 rounded to nearest even to a storage type: the interpreter cuts bfloat16 off."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(x == x, rounded, 0x7FC0).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)
