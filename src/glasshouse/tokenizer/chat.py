"""The one chat template, fixed and built in.

A conversation is written as ids, never as text that is parsed again:

    <|bos|> <|user|> How do I bake bread? <|end|> <|assistant|> Knead the dough, and wait. <|end|>

- `<|bos|>` once, at the start.
- Each message: its role token (`<|system|>`, `<|user|>`, `<|assistant|>` or `<|document|>`), its content
  exactly as given (no blank or newline is added), `<|end|>`.
- A system message may only be the first one.
- A document is data to work on, never somebody who speaks: a page that was found, a tool's output. It is a
  message of its own, between the user's words before and after it, and needs a tokenizer that was trained
  with `documents=True`.
- For an answer to be written, `generation_prompt` adds a last `<|assistant|>`; the model ends with `<|end|>`.

Content is encoded as ordinary text, so a message that spells "<|end|>" cannot end itself, and a document that
spells "<|user|>" stays a document. `role_markers` tells a model whose words every id is. `parse` undoes
`render` exactly. `loss_mask` marks what the assistant wrote, its `<|end|>` included (it must learn to stop)
and the role token not (it is given).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from glasshouse.base.errors import DataError, UsageError
from glasshouse.tokenizer.bpe import DOCUMENT, SPECIALS, Tokenizer

ROLES = ("system", "user", "assistant", "document")
NO_ROLE = 0  # of ids outside any message; the role ROLES[k] has number k + 1


class Message(TypedDict):
    """One turn: a role from `ROLES` and what was said."""

    role: str
    content: str


def render(
    tok: Tokenizer, messages: Sequence[Mapping[str, Any]], generation_prompt: bool = False
) -> list[int]:
    """Return the ids of a conversation.

    Raises `UsageError` if `tok` has no chat tokens and `DataError` for a message that does not fit.
    """
    ids = _chat_ids(tok)
    _check_messages(messages, DOCUMENT in ids)
    contents = tok.encode_batch([message["content"] for message in messages])
    out = [ids["<|bos|>"]]
    for message, content in zip(messages, contents, strict=True):
        out += [ids[f"<|{message['role']}|>"], *content, ids["<|end|>"]]
    return [*out, ids["<|assistant|>"]] if generation_prompt else out


def loss_mask(tok: Tokenizer, ids: Sequence[int]) -> list[int]:
    """Return 1 for ids after `<|assistant|>` through its `<|end|>`, 0 elsewhere; the same length as `ids`."""
    special = _chat_ids(tok)
    # Any special token but `<|end|>` cuts an answer that was left unfinished, and is not part of it.
    given = set(special.values()) - {special["<|end|>"]}
    mask, writing = [], False
    for i in ids:
        if i in given:
            mask.append(0)
            writing = i == special["<|assistant|>"]
        else:
            mask.append(int(writing))
            writing = writing and i != special["<|end|>"]
    return mask


def role_markers(tok: Tokenizer) -> tuple[tuple[int, int], ...]:
    """Return (id, number of the role that begins with it): what a model that reads roles is told.

    `<|bos|>` and `<|pad|>` begin none. Raises `UsageError` if `tok` has no chat tokens.
    """
    ids = _chat_ids(tok)
    none = ((ids["<|bos|>"], NO_ROLE), (ids["<|pad|>"], NO_ROLE))
    named = ((f"<|{role}|>", k + 1) for k, role in enumerate(ROLES))
    return (*none, *((ids[name], number) for name, number in named if name in ids))


def parse(tok: Tokenizer, ids: Sequence[int], unfinished: bool = False) -> list[Message]:
    """Return the messages that `render` wrote; padding at the end is ignored.

    With `unfinished` the last message may lack its `<|end|>` (an answer that was cut). Raises `DataError`
    naming the position at which the ids leave the template.
    """
    special = _chat_ids(tok)
    roles = {special[f"<|{role}|>"]: role for role in ROLES if f"<|{role}|>" in special}
    reserved = set(special.values())
    body = list(ids)
    while body and body[-1] == special["<|pad|>"]:
        body.pop()
    if not body or body[0] != special["<|bos|>"]:
        raise DataError("these ids are not a conversation: they do not begin with <|bos|>")
    messages: list[Message] = []
    at = 1
    while at < len(body):
        if body[at] not in roles:
            raise DataError(f"these ids are not a conversation: position {at} should be a role token")
        start = at + 1
        stop = next((k for k in range(start, len(body)) if body[k] in reserved), len(body))
        ended = stop < len(body) and body[stop] == special["<|end|>"]
        if not ended and not (unfinished and stop == len(body)):
            raise DataError(f"these ids are not a conversation: the message at {at} is not ended by <|end|>")
        messages.append({"role": roles[body[at]], "content": tok.decode(body[start:stop])})
        at = stop + 1
    return messages


def _chat_ids(tok: Tokenizer) -> dict[str, int]:
    found = tok.specials
    if any(name not in found for name in SPECIALS):
        raise UsageError(
            "this tokenizer has no chat tokens (it was not trained by Glasshouse), so the built-in chat "
            "template cannot be used; use its own template, or a tokenizer trained here"
        )
    return {name: found[name] for name in (*SPECIALS, DOCUMENT) if name in found}


def _check_messages(messages: Sequence[Mapping[str, Any]], documents: bool) -> None:
    if not messages:
        raise DataError("a conversation needs at least one message")
    for k, message in enumerate(messages):
        if set(message) != {"role", "content"} or not isinstance(message["content"], str):
            raise DataError(f"message {k} must have exactly a 'role' and a text 'content'")
        if message["role"] not in ROLES:
            raise DataError(f"message {k} has the role {message['role']!r}; the roles are {', '.join(ROLES)}")
        if message["role"] == "document" and not documents:
            raise UsageError(
                f"message {k} is a document, and this tokenizer has no {DOCUMENT}: train one with "
                "documents=True (in a recipe: `documents = true` in [tokenizer])"
            )
        if message["role"] == "system" and k > 0:
            raise DataError(f"message {k} is a system message, which may only be the first")
