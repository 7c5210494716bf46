"""Rebuild the packaged books: `python tools/build_books.py FOLDER`.

FOLDER holds `*.jsonl.gz` files of public-domain books, one JSON object a line with the keys id, title,
author, repo, path, commit and text (as in the named GITenberg repository, without the Gutenberg header and
licence). Writes `src/glasshouse/data/books/<id>.jsonl.gz`, `sources.json` and `NOTICE.md`; equal input gives
equal bytes.

What is done to a text: front matter, tables of contents, notes, illustration marks and page numbers are left
out; hard line wraps are undone (verse keeps its lines); quotes, dashes and accented letters become ASCII;
every chapter or tale is a document of its own. A chapter with a slur, or with words about a people that a
reader today should not be taught, is left out whole and named in `NOTICE.md`.
"""

from __future__ import annotations

import gzip
import io
import json
import re
import sys
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

OUT = Path(__file__).resolve().parent.parent / "src" / "glasshouse" / "data" / "books"

# A chapter in which any of these occurs is left out. The list was made by reading every hit of a much longer
# one; "savage beast", "a savage mood" and a witch's "hag" stay, peoples called so do not.
UNWANTED = re.compile(
    r"\bn[i]gg(?!ard|l)|negro|dark(?:y|ies)\b|\bsavages\b|\bg[yi]ps(?:y|ies)|heathen|china?m[ae]n|chinee|\binjun|"
    r"squaw|red ?skins?\b|\bindians?\b|blackamoor|pickaninn|hottentot|kaffir|mohammedan|mussulman|\bmoors?\b|"
    r"moorish|\bjews?\b|jewess|half-?breed|mulatto|cannibals\b|\bcoolie|lascar|"
    r"black slave|black (?:m[ae]n|wom[ae]n)\b|"
    r"\bfag+ots?\b|\bharlot|\bwhore|\bsluts?\b|\bbastard|\bbitch|\bhell\b|\bdamn|\blaudanum|\bopium",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Book:
    """How one book is cut: `heading` finds a chapter's title (group 1) in the text between the two marks."""

    id: str
    died: int
    heading: str
    start: str
    end: str | None = None
    drop_lines: str | None = None
    left_out: dict[str, str] = field(default_factory=dict)
    """Chapters left out by name, with the reason."""
    replace: dict[str, str] = field(default_factory=dict)


TALE = r"^\n\n((?!CHAPTER)[A-Z][^a-z\n]{3,70})\n$"
SLAVES = "human beings are given, bought or used as slaves, and it is taken for granted"
SCOTS = "written in Scots spelling"
BOOKS = (
    Book("pg486", 1919, r"^\n\n(?:\d+)\.  (.+)\n$", start="1.  The Girl in the Chicken Coop\n\n"),
    Book(
        "pg54",
        1919,
        r"^\n\n\d+ {10,}((?!Line-Art|Full page)\S.+)\n$",
        start="7                    Tip Manufactures",
        drop_lines=r"^\s*\d+\s*$|(?i:line-art drawing)|^ {10,}\S.*$",
    ),
    Book("pg708", 1905, r"^\n\nCHAPTER \d+\n\n(.+)\n$", start="CHAPTER 1\n"),
    Book(
        "pg2770",
        1924,
        TALE,
        start="A HOME VIEW\n\n\nThe little",
        # A boy's nickname that has since become a slur.
        replace={"Jappy": "Jaspy", "Japser": "Jasper", "Jap": "Jasper"},
    ),
    Book("pg271", 1878, r"^\n\n\d\d (.+)\n$", start="01 My Early Home\n", drop_lines=r"^Part [IV]+$"),
    Book("pg1450", 1920, r"^\n\nCHAPTER [IVXL]+\. (.+)\n$", start="CHAPTER I. MISS POLLY\n\nMiss"),
    Book(
        "pg503",
        1912,
        TALE,
        start="THE BRONZE RING\n\n\nOnce",
        left_out={
            "THE BRONZE RING": SLAVES,
            "ALADDIN AND THE WONDERFUL LAMP": SLAVES,
            "THE FORTY THIEVES": SLAVES,
            "THE STORY OF PRINCE AHMED AND THE FAIRY PARIBANOU": SLAVES,
            "THE WONDERFUL SHEEP": SLAVES,
            "PRINCE DARLING": SLAVES,
            "THE YELLOW DWARF": "a villain marked by the colour of his face",
            "BLUE BEARD": "the murder of wives",
            "A VOYAGE TO LILLIPUT": "abridged Swift in parts; not a tale",
            "THE BLACK BULL OF NORROWAY": SCOTS,
            "THE RED ETIN": SCOTS,
        },
    ),
    Book(
        "pg7439",
        1916,
        TALE,
        start="TOM TIT TOT\n\nOnce",
        end="OYEZ-OYEZ-OYEZ",
        left_out={
            "THE THREE HEADS OF THE WELL": "a queen hangs herself",
            "THE ROSE-TREE": "a child is murdered and eaten",
            "MR. FOX": "the murder of women",
            "BINNORIE": "a murder among sisters",
            "THE RED ETTIN": SCOTS,
            "THE STRANGE VISITOR": SCOTS,
            "THE LAIDLY WORM OF SPINDLESTON HEUGH": SCOTS,
            "THE CAULD LAD OF HILTON": SCOTS,
        },
    ),
)


def chapters(book: Book, text: str) -> list[tuple[str, str]]:
    """Return (title, raw text) of every chapter between the book's marks."""
    text = text.replace("\r\n", "\n")
    at = text.index(book.start)
    text = "\n\n\n" + text[at : text.index(book.end, at) if book.end else None]
    heads = list(re.finditer(book.heading, text, re.MULTILINE))
    ends = [*(head.start() for head in heads[1:]), len(text)]
    return [(ascii_text(h.group(1)).strip(), text[h.end() : end]) for h, end in zip(heads, ends, strict=True)]


def ascii_text(text: str) -> str:
    """Straighten quotes and dashes and strip accents; what is left outside ASCII is an error."""
    for curly, straight in {
        "\u2018": "'",
        "\u2019": "'",
        "\u201c": '"',
        "\u201d": '"',
        "\u2014": "--",
    }.items():
        text = text.replace(curly, straight)
    text = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    if not text.isascii():
        raise SystemExit(f"not ASCII after straightening: {sorted({c for c in text if ord(c) > 127})}")
    return text


def unwrap(book: Book, raw: str) -> str:
    """Return a chapter with one paragraph a line; verse keeps its lines."""
    lines = raw.split("\n")
    if book.drop_lines:
        lines = [line for line in lines if not re.search(book.drop_lines, line)]
    text = ascii_text("\n".join(lines))
    paragraphs: list[str] = []
    for block in re.split(r"\n\s*\n", text):
        joined = _join(block)
        if not joined or re.match(r"\s*(\(\d\)|\*) ", block) or re.fullmatch(r"[\W_]+|The End", joined):
            continue
        # A page break in the middle of a sentence left an empty line there.
        if paragraphs and joined[0].islower() and paragraphs[-1][-1] not in '.!?":':
            paragraphs[-1] = _glue(paragraphs[-1], joined)
        else:
            paragraphs.append(joined)
    text = "\n\n".join(paragraphs)
    for pattern, new in book.replace.items():
        text = re.sub(rf"\b{pattern}\b", new, text)
    return text


def _join(block: str) -> str:
    lines = [line for line in block.split("\n") if line.strip() and not re.fullmatch(r"[\s+|-]+", line)]
    if not lines:
        return ""
    indented = all(line.startswith("  ") for line in lines)
    short = len(lines) > 1 and max(map(len, lines)) < 52
    stripped = [re.sub(r"\s+", " ", re.sub(r" ?\(\d\)|[_*|]|\[[^\]]*\]", "", line)).strip() for line in lines]
    if indented or short:
        return "\n".join(line for line in stripped if line)
    text = stripped[0]
    for line in stripped[1:]:
        text = _glue(text, line)
    return text.strip()


def _glue(left: str, right: str) -> str:
    return left + right if left.endswith("-") else f"{left} {right}"


def build(book: Book, row: dict[str, Any]) -> tuple[list[dict[str, str]], dict[str, str]]:
    """Return the documents of a book, and the chapters left out with the reason."""
    documents, left_out = [], {}
    for number, (title, raw) in enumerate(chapters(book, row["text"]), start=1):
        text = unwrap(book, raw)
        found = UNWANTED.search(text)
        if title in book.left_out:
            left_out[title] = book.left_out[title]
        elif found:
            left_out[title] = f"contains '{found.group(0).strip().lower()}'"
        elif len(text) > 400:
            documents.append({"id": f"{book.id}-{number:02d}", "title": title, "text": text})
    missing = sorted(set(book.left_out) - set(left_out))
    if missing:
        raise SystemExit(f"{book.id}: no chapter is called {missing}")
    return documents, left_out


def write_book(path: Path, documents: list[dict[str, str]]) -> None:
    """Write JSON lines, gzipped without name or time so that the bytes depend on the text only."""
    body = "".join(json.dumps(d, ensure_ascii=True, sort_keys=True) + "\n" for d in documents)
    buffer = io.BytesIO()
    with gzip.GzipFile(filename="", mode="wb", fileobj=buffer, mtime=0, compresslevel=9) as file:
        file.write(body.encode("ascii"))
    path.write_bytes(buffer.getvalue())


def notice(sources: list[dict[str, Any]]) -> str:
    """Return `NOTICE.md`."""
    parts = [
        "# The packaged books\n",
        "All are **public domain in the USA**; the authors, compilers and editors named below died more than",
        "70 years ago. The texts come from repositories of github.com/GITenberg; Project Gutenberg's header,",
        "licence, credits and name were removed before, so its trademark licence does not attach.\n",
        "Changed in all: title pages, prefaces, tables of contents, notes, page numbers, illustration marks",
        "left out; line wraps undone; quotes, dashes, accents in ASCII; one document a chapter or tale. They",
        "are old stories: some adults strike children and animals, and witches and ogres come to bad ends.",
        "Rebuilt by `tools/build_books.py`.\n",
    ]
    for s in sources:
        parts.append(f"## {s['title']}\n")
        parts.append(
            f"{s['author']} (d. {s['died']}). {s['licence']}. "
            f"{s['documents']} documents, {s['bytes']:,} bytes."
        )
        parts.append(f"Source: {s['repository']}, `{s['path']}`, commit `{s['commit']}`.\n")
        if s["changes"]:
            parts.append(f"{s['changes']}\n")
        if s["left_out"]:
            parts.append("Left out:\n")
            parts += [f"- {title}: {reason}" for title, reason in s["left_out"].items()]
            parts.append("")
    return "\n".join(parts).rstrip() + "\n"


def main(folder: Path) -> None:
    """Read the corpus folder and write the three kinds of files."""
    wanted = {book.id for book in BOOKS}
    rows = {}
    for file in sorted(folder.glob("*.jsonl.gz")):
        with gzip.open(file, "rt", encoding="utf-8") as lines:
            rows.update({row["id"]: row for row in map(json.loads, lines) if row["id"] in wanted})
    if wanted - set(rows):
        raise SystemExit(f"{folder} lacks the books {sorted(wanted - set(rows))}")
    OUT.mkdir(parents=True, exist_ok=True)
    sources = []
    for book in BOOKS:
        row = rows[book.id]
        documents, left_out = build(book, row)
        write_book(OUT / f"{book.id}.jsonl.gz", documents)
        swaps = [f"Every '{old}' became '{new}'." for old, new in book.replace.items()]
        sources.append(
            {
                "id": book.id,
                "title": row["title"],
                "author": row["author"],
                "died": book.died,
                "licence": "Public domain in the USA",
                "repository": f"https://github.com/{row['repo']}",
                "path": row["path"],
                "commit": row["commit"],
                "documents": len(documents),
                "bytes": sum(len(d["text"]) for d in documents),
                "changes": " ".join(swaps),
                "left_out": left_out,
            }
        )
    (OUT / "sources.json").write_text(json.dumps(sources, indent=1, sort_keys=True) + "\n", "utf-8")
    (OUT / "NOTICE.md").write_text(notice(sources), "utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]))
