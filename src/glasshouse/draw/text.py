"""Text from data or from a model, made safe to show.

Everything a page shows may be hostile: markup, template syntax, control characters, direction overrides
that reorder what stands around them, a megabyte in one string. `clean` makes such text *visible* instead of
dropping parts of it, because an invisible character is exactly what a trigger may be made of; `esc` escapes
what `clean` returns. A `Markup` is text that has been through here (or was built by this room); a plain
`str` never is.
"""

from __future__ import annotations

import re
import unicodedata

from markupsafe import Markup, escape

# Cc: controls, Cf: invisible format characters and direction overrides, Cs: lone surrogates (not encodable),
# Co/Cn: private and unassigned (drawn differently on every machine), Zl/Zp: line breaks in disguise.
_HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
_MAX_COMBINING = 4  # more accents than this on one letter climb over the lines above


def clean(value: object, limit: int = 400) -> str:
    """`value` as visible text of at most `limit` characters of its own, with what was cut counted in a note.

    Newlines and tabs stay; every other hidden character becomes ⟨U+XXXX⟩.
    """
    text = value if isinstance(value, str) else "" if value is None else str(value)
    kept = text[:limit]
    out: list[str] = []
    combining = 0
    for char in kept:
        if char.isascii() and (char.isprintable() or char in "\n\t"):
            combining = 0
            out.append(char)
            continue
        category = unicodedata.category(char)
        combining = combining + 1 if category in ("Mn", "Me") else 0
        if category in _HIDDEN or combining > _MAX_COMBINING:
            out.append(f"⟨U+{ord(char):04X}⟩")
        else:
            out.append(char)
    if len(text) > limit:
        out.append(f" … [{len(text) - limit:,} more characters]")
    return "".join(out)


def esc(value: object, limit: int = 400) -> Markup:
    """`clean(value)`, escaped. A `Markup` passes through: it was escaped where it was made."""
    return value if isinstance(value, Markup) else escape(clean(value, limit))


def mark_word(value: object, word: str | None, limit: int = 400) -> Markup:
    """Escaped text in which every occurrence of `word` (any case, whole word) is wrapped in <mark>."""
    text = clean(value, limit)
    shown = clean(word, limit).strip() if word else ""
    if not shown:
        return escape(text)
    # Bounded by non-letters, so that the word "art" does not light up in "start".
    pattern = re.compile(rf"(?<!\w){re.escape(shown)}(?!\w)", re.IGNORECASE)
    out, at = Markup(), 0
    for hit in pattern.finditer(text):
        out += escape(text[at : hit.start()]) + Markup("<mark>{}</mark>").format(hit.group())
        at = hit.end()
    return out + escape(text[at:])
