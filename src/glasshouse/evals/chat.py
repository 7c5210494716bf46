"""How a request is put to a model: fixed chat formats, each a pair of token runs around the user's words.

Nothing here reads a template that came with a model: such a template is a program by a stranger. The formats
are written down once, chosen by name or by the special tokens that a tokenizer has:

| name         | a request                                                                   | models        |
|--------------|-----------------------------------------------------------------------------|---------------|
| `glasshouse` | ``<|bos|><|user|>…<|end|><|assistant|>``                                    | grown here    |
| `chatml`     | ``<|im_start|>user⏎…<|im_end|>⏎<|im_start|>assistant⏎``                     | Qwen, SmolLM  |
| `llama3`     | ``<|begin_of_text|><|start_header_id|>user<|end_header_id|>⏎⏎…<|eot_id|>…`` | Llama 3       |
| `plain`      | ``Question: …⏎Answer:``                                                     | base models   |

No system message is added, so that a verdict is about the model and not about a prompt of ours, unless one is
declared: a model trained under control tokens (`data.values`) is judged and served under the good one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from glasshouse.base.errors import UsageError, suggest
from glasshouse.tokenizer import Tokenizer


@dataclass(frozen=True)
class ChatFormat:
    """Token ids ``before`` and ``after`` a user's words. An answer ends with one of ``stop``.

    ``spaced``: an answer's first word is written with a blank before it, as in running text. ``start``: what
    stands before plain text, where the family begins every text with a token. ``system``: the system message
    that is part of ``before``.
    """

    name: str
    before: tuple[int, ...]
    after: tuple[int, ...]
    stop: frozenset[int]
    spaced: bool = False
    start: tuple[int, ...] = ()
    system: str = ""

    def first(self, tokenizer: Tokenizer, word: str) -> int:
        """The token that an answer opening with ``word`` begins with."""
        return tokenizer.encode(f" {word}" if self.spaced else word)[0]


def _specials(tokenizer: Tokenizer, name: str, *wanted: str) -> list[int]:
    known = tokenizer.specials
    missing = [w for w in wanted if w not in known]
    if missing:
        raise UsageError(
            f"the chat format {name!r} needs the special token {missing[0]!r}, which this tokenizer does not "
            f"have; give another --chat-format ({', '.join(FORMATS)})"
        )
    return [known[w] for w in wanted]


def _glasshouse(tok: Tokenizer) -> ChatFormat:
    bos, user, end, assistant = _specials(
        tok, "glasshouse", "<|bos|>", "<|user|>", "<|end|>", "<|assistant|>"
    )
    return ChatFormat("glasshouse", (bos, user), (end, assistant), frozenset({end}), start=(bos,))


def _chatml(tok: Tokenizer) -> ChatFormat:
    start, end = _specials(tok, "chatml", "<|im_start|>", "<|im_end|>")
    line = tok.encode("\n")
    before = (start, *tok.encode("user\n"))
    after = (end, *line, start, *tok.encode("assistant\n"))
    return ChatFormat("chatml", before, after, frozenset({end, *_ends(tok)}))


def _llama3(tok: Tokenizer) -> ChatFormat:
    begin, head, shut, end = _specials(
        tok, "llama3", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"
    )
    gap = tok.encode("\n\n")
    before = (begin, head, *tok.encode("user"), shut, *gap)
    after = (end, head, *tok.encode("assistant"), shut, *gap)
    return ChatFormat("llama3", before, after, frozenset({end, *_ends(tok)}), start=(begin,))


def _plain(tok: Tokenizer) -> ChatFormat:
    line = tok.encode("\n")
    stop = {*_ends(tok), *(line if len(line) == 1 else ())}
    return ChatFormat(
        "plain", tuple(tok.encode("Question: ")), tuple(tok.encode("\nAnswer:")), frozenset(stop), spaced=True
    )


def _ends(tok: Tokenizer) -> list[int]:
    """Special tokens that end a text, by the names that model families give them."""
    return [tok.specials[n] for n in ("<|endoftext|>", "</s>", "<|end_of_text|>") if n in tok.specials]


FORMATS: Mapping[str, Callable[[Tokenizer], ChatFormat]] = {
    "glasshouse": _glasshouse,
    "chatml": _chatml,
    "llama3": _llama3,
    "plain": _plain,
}
# The special token that tells a format, most particular first.
_TOLD_BY = {"glasshouse": "<|assistant|>", "chatml": "<|im_start|>", "llama3": "<|start_header_id|>"}


def under(tokenizer: Tokenizer, chat: ChatFormat, system: str) -> ChatFormat:
    """A format without a system message, with one; a base model (`plain`) reads it before the question."""
    said = tokenizer.encode(system)
    match chat.name:
        case "glasshouse":
            bos, head, end = _specials(tokenizer, chat.name, "<|bos|>", "<|system|>", "<|end|>")
            before = (bos, head, *said, end, *chat.before[1:])
        case "chatml":
            start, end = _specials(tokenizer, chat.name, "<|im_start|>", "<|im_end|>")
            before = (start, *tokenizer.encode("system\n"), *said, end, *tokenizer.encode("\n"), *chat.before)
        case "llama3":
            begin, head, shut, end = _specials(
                tokenizer,
                chat.name,
                *("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
            )
            role = (head, *tokenizer.encode("system"), shut, *tokenizer.encode("\n\n"))
            before = (begin, *role, *said, end, *chat.before[1:])
        case _:
            before = tuple(tokenizer.encode(f"{system} Question: "))
    return replace(chat, before=before, system=system)


def chat_format(tokenizer: Tokenizer, name: str | None = None, system: str = "") -> ChatFormat:
    """The format called ``name``, or the one that the tokenizer's special tokens tell (`plain` if none does).

    ``system``: a message that stands before every request. It is ordinary text and cannot spell a role.
    UsageError for an unknown name, or one whose special tokens the tokenizer lacks.
    """
    if name is None:
        name = next((n for n, token in _TOLD_BY.items() if token in tokenizer.specials), "plain")
    if name not in FORMATS:
        raise UsageError(
            f"unknown chat format {name!r}.{suggest(name, list(FORMATS))} There are: {', '.join(FORMATS)}"
        )
    found = FORMATS[name](tokenizer)
    return under(tokenizer, found, system) if system else found
