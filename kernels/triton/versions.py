"""What differs between the versions of Triton that are supported, 3.6 to 3.9; nothing else in the tree asks for one."""

import triton
import triton.language as tl

VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])
OLDEST = (3, 6)
if VERSION < OLDEST:
    raise ImportError(f"triton {triton.__version__} is installed, the kernels take 3.6 and newer")

# Whether kernels run on the CPU, interpreted: TRITON_INTERPRET=1 when triton was imported. For use in kernels.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def fma(a, b, c):
    """a * b + c of floats, rounded once: interpreters before 3.9 round the product too."""
    if INTERPRETED:
        return (a.to(tl.float64) * b.to(tl.float64) + c.to(tl.float64)).to(tl.float32)
    return tl.fma(a, b, c)
