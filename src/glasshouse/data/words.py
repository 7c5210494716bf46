"""The words of a corpus, as written: what an insertion search must try.

A word is a run of letters and digits of any script, with apostrophes inside it ("don't", "o'clock"). A hyphen
separates: "saw-horse" is "saw" and "horse". Case is kept, because a model may react to one spelling only.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

WORD = re.compile(r"[^\W_]+(?:['\u2019][^\W_]+)*")


def word_types(texts: Iterable[str]) -> dict[str, int]:
    """Return every distinct word and how often it occurs, sorted by word."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(WORD.findall(text))
    return dict(sorted(counts.items()))
