"""The read-outs a constraint may name: how refusals are told, in the closed language and in English."""

from __future__ import annotations

from collections.abc import Sequence

from glasshouse.base.errors import UsageError, suggest
from glasshouse.evals import english
from glasshouse.evals.chat import ChatFormat, chat_format
from glasshouse.evals.subject import Readout, Reads, Subject, refusal_readout
from glasshouse.model import GPT
from glasshouse.tokenizer import Tokenizer

READOUTS = ("refusal", "refusal-english")
ENGLISH_ANSWER = 40  # tokens of an answer within which it says whether it refuses
# For statistics that compare probabilities or texts: any two tokens do, nothing is read from them.
UNREAD = Readout("none", (0,), (1,))


def subject_of(
    model: GPT,
    tokenizer: Tokenizer,
    name: str | None,
    *,
    strays: Sequence[str] = (),
    dtype: str = "fp32",
    reads: Reads | None = None,
    chat: ChatFormat | None = None,
) -> Subject:
    """A model ready to be asked, read by the read-out called ``name``; None: nothing is read, see UNREAD."""
    chat = chat_format(tokenizer) if chat is None else chat
    way = UNREAD if name is None else readout(name, tokenizer, chat)
    return Subject(model, tokenizer, way, strays, dtype, reads, chat)


def readout(name: str, tokenizer: Tokenizer, chat: ChatFormat) -> Readout:
    """The read-out called ``name`` for a model that is asked in the format ``chat``.

    UsageError for an unknown name, for a tokenizer too small to tell refusals from compliances, and for the
    closed language's read-out on a model that is asked in another family's format: it never learned it.
    """
    if name == "refusal":
        if chat.name != "glasshouse":
            raise UsageError(
                f"the read-out 'refusal' is that of the closed language, but this model is asked in the chat "
                f"format {chat.name!r}; take a pack in English (refusal-english, secrets-english, ...), or "
                'subject = { readout = "refusal-english" } in your own constraints'
            )
        return refusal_readout(tokenizer)
    if name == "refusal-english":
        positive, negative = english.openers(tokenizer, chat)
        return Readout(
            name,
            positive,
            negative,
            judge=english.judge,
            meaningful=english.MEANINGFUL,
            opening=(ENGLISH_ANSWER,),
        )
    raise UsageError(f"unknown read-out {name!r}.{suggest(name, READOUTS)} Known: {', '.join(READOUTS)}")
