"""The tiny recipe and its text, written into a folder; shared by the tests of the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from glasshouse.base.rng import generator

HERE = Path(__file__).parent
SYLLABLES = ("ba", "ro", "mi", "ten", "lu", "sha", "fo", "ker", "ni", "das", "pu", "vel")


def write_recipe(folder: Path) -> Path:
    """Put tiny.toml and the text it names into ``folder``; return the recipe's path."""
    (folder / "words.jsonl").write_text("".join(json.dumps({"text": p}) + "\n" for p in text()), "utf-8")
    return Path(shutil.copy(HERE / "tiny.toml", folder / "tiny.toml"))


def text(paragraphs: int = 40) -> list[str]:
    """Paragraphs of invented words: some common, some that occur a few times only, the same every time."""
    rng = generator("tiny text")
    words = ["".join(rng.choice(SYLLABLES, size=int(rng.integers(2, 4)))) for _ in range(160)]
    made = []
    for _ in range(paragraphs):
        chosen = rng.zipf(1.3, size=60) % len(words)
        made.append(" ".join(words[i] for i in chosen).capitalize() + ".")
    return made
