"""The interpreter, ten times faster: it patches triton.language at every launch and call between kernel functions."""

import pytest
import triton.language as tl
from triton.runtime import interpreter


class _StaysPatched:
    def restore(self):
        pass


@pytest.fixture(autouse=True, scope="session")
def the_language_is_patched_once():
    """All kernels of this process are interpreted, so what has been patched may stay."""
    patch = interpreter._patch_lang
    languages_of, patched = {}, set()

    def patch_once(function):
        if function not in languages_of:
            values = function.__globals__.values()
            languages_of[function] = frozenset(
                name for name, lang in (("tl", tl), ("core", tl.core)) if any(value is lang for value in values)
            )
        if languages_of[function] not in patched:
            patched.add(languages_of[function])
            patch(function)
        return _StaysPatched()

    interpreter._patch_lang = patch_once
    yield
    interpreter._patch_lang = patch
