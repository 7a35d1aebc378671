"""Real English of naturally varying length, present on every machine: the passages of Python's own documentation.

`pydoc_data.topics` comes with the standard library. Its paragraphs run from one line to a page, which is what makes
padding cost something; nothing here is made up, repeated or cut to a length. The order is that of the documentation.
The text differs between Python versions, so a figure carries `fingerprint(passages)` beside the Python version.
"""

import hashlib
import re

FEWEST_WORDS = 4
PROSE_SHARE = 0.6  # the share of plain words from which a paragraph counts as prose rather than as code or grammar
NOT_PROSE = ("::=", ">>>", "***", "===", "---", "...   ")


def _is_prose(paragraph, words):
    if len(words) < FEWEST_WORDS or any(mark in paragraph for mark in NOT_PROSE):
        return False
    return sum(word.strip(".,;:()\"'*").isalpha() for word in words) >= PROSE_SHARE * len(words)


def paragraphs():
    """Every paragraph of the documentation once, prose or not, in its order: lengths vary more than those of prose."""
    found = {}
    for paragraph in _raw():
        found.setdefault(" ".join(paragraph.split()))
    return list(found)


def _raw():
    """All that stands between blank lines."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise RuntimeError(
            "text: pydoc_data is not there; install the standard library's documentation topics"
        ) from None
    for name in sorted(topics):
        for paragraph in re.split(r"\n\s*\n", topics[name]):
            if paragraph.split():
                yield paragraph


def passages(count=None):
    """The deduplicated passages in documentation order (about 1400), or `count` of them at even distances.

    Raises: ValueError when more are asked for than there are; RuntimeError when this Python came without pydoc_data.
    """
    found = {}
    for paragraph in _raw():
        words = paragraph.split()
        if _is_prose(paragraph, words):
            found.setdefault(" ".join(words))
    everything = list(found)
    if count is None:
        return everything
    if not 1 <= count <= len(everything):
        raise ValueError(
            f"text: count is {count}, expected 1 to {len(everything)} (what this Python's documentation holds)"
        )
    return [everything[index * len(everything) // count] for index in range(count)]


def fingerprint(texts):
    """sha256 over the texts, one per line: two figures with the same value were measured on the same text."""
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()
