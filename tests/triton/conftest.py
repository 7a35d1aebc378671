"""The interpreter, several times faster: it patches all of triton.language anew for every call between kernel functions."""

import pytest
import triton.language as tl
from triton.runtime import interpreter


class _Nothing:
    def restore(self):
        pass


@pytest.fixture(autouse=True, scope="session")
def patch_the_language_once_per_launch():
    """Within a launch a language that has been patched stays so: a second pass over its members finds nothing to do."""
    patch, run = interpreter._patch_lang, interpreter.GridExecutor.__call__
    languages_of, patched = {}, set()

    def patch_once(function):
        if function not in languages_of:
            values = function.__globals__.values()
            languages_of[function] = frozenset(name for name, lang in (("tl", tl), ("core", tl.core)) if any(v is lang for v in values))
        if languages_of[function] in patched:
            return _Nothing()
        patched.add(languages_of[function])
        return patch(function)

    def run_patched(self, *arguments, **keywords):
        patched.clear()
        return run(self, *arguments, **keywords)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_once, run_patched
    yield
    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch, run
