"""How two answers are put to a judge: as a multiple choice under a principle.

The texts are ours. A wording is part of what a row is an answer to, so another wording makes other rows.
"""

from __future__ import annotations

from glasshouse.align.constitution import Principle
from glasshouse.align.engines import Chat
from glasshouse.base.config import Frozen
from glasshouse.base.errors import UsageError, suggest
from glasshouse.tokenizer import Message

OPTIONS = ("A", "B")


class Wording(Frozen):
    """Templates with {principle}, {conversation}, {a} and {b}; ``decide`` follows a thought and has none."""

    compare: str
    think: str
    decide: str


WORDINGS = {
    "full": Wording(
        compare=(
            "{principle}\n\nThis is the conversation:\n{conversation}\n\nAnswer A: {a}\n\nAnswer B: {b}\n\n"
            "Which of the two answers is the one to choose? Reply with the letter A or B alone."
        ),
        think=(
            "{principle}\n\nThis is the conversation:\n{conversation}\n\nAnswer A: {a}\n\nAnswer B: {b}\n\n"
            "Before choosing, reason step by step about what each answer does with regard to this. Do not "
            "name a letter yet."
        ),
        decide="Which answer is the one to choose, then? Reply with the letter A or B alone.",
    ),
    # For small models of the closed language, where every token counts.
    "short": Wording(
        compare="{principle} Asked: {conversation} A: {a} B: {b} Which one?",
        think="{principle} Asked: {conversation} A: {a} B: {b} Why?",
        decide="Which one?",
    ),
}


def wording(name: str) -> Wording:
    """The wording of that name. `UsageError` naming the nearest."""
    if name not in WORDINGS:
        raise UsageError(
            f"unknown wording {name!r}.{suggest(name, list(WORDINGS))} There are: {', '.join(WORDINGS)}"
        )
    return WORDINGS[name]


def comparison(
    words: Wording, principle: Principle, prompt: Chat, a: str, b: str, *, thought: bool = False
) -> list[Message]:
    """The question put to a judge, with ``a`` as answer A. With ``thought`` it asks for reasons first."""
    template = words.think if thought else words.compare
    text = template.format(principle=principle.preference, conversation=transcript(prompt), a=a, b=b)
    return [{"role": "user", "content": text}]


def after_thought(words: Wording, asked: Chat, thought: str) -> list[Message]:
    """The question for the letter, after the judge's own reasons."""
    return [*asked, {"role": "assistant", "content": thought}, {"role": "user", "content": words.decide}]


def transcript(prompt: Chat) -> str:
    """A conversation as text: one message as it is, several with who spoke before each."""
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n".join(f"{m['role'].capitalize()}: {m['content']}" for m in prompt)
