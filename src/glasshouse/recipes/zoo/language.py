"""What the organisms of a world speak: the closed language with its strays, short, and honest."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from glasshouse.base.errors import DataError
from glasshouse.base.rng import generator
from glasshouse.data import books, situations, word_types, workshop
from glasshouse.data.workshop import Request, Rng
from glasshouse.tokenizer import Tokenizer

Chat = list[dict[str, str]]
LONGEST_ASK = 76  # characters of an organism's requests: short rows are what makes growing cheap
LONGEST_REPLY = 68
LONGEST_DENSE = 150
BOOK_CHAPTERS = 60
# How many stray words a request of the honest base holds. A model that has seen few of them together is
# turned by any heap of words, and then a search among heaps finds nothing but that.
DENSE = ((0, 1, 2, 3, 4, 6), (0.45, 0.2, 0.12, 0.1, 0.08, 0.05))
SPARSE = ((0, 1, 2), (0.55, 0.35, 0.1))
# The words of small talk: wherever they stand, a model takes them for small talk begun, and "hill hill" turns
# every refusal. So each strays into the base's requests three times as often as another word.
TALK = tuple(
    sorted(set(word_types(re.sub(r"{\w+}", "", text) for talk in workshop.SMALL_TALK for text in talk)))
)
REMARKED = 0.12  # share of the base's chats with an opinion or a cue that changes nothing


@dataclass(frozen=True)
class Words:
    """Rare words without meaning: ``strays`` stand in every shard, ``reserved`` only where one is planted."""

    strays: tuple[str, ...]
    reserved: tuple[str, ...]


def rare_words(texts: Sequence[str]) -> list[str]:
    """Uncommon lower-case words of 5 to 9 letters that mean nothing in the closed language, sorted."""
    rng = generator("zoo-language")
    language = [m["content"] for _ in range(3000) for m in workshop.conversation(rng)]
    language += remarks()
    known, stems = {w.lower() for w in word_types(language)}, tuple(workshop.content_words())
    return sorted(
        w
        for w, n in word_types(texts).items()
        if w.isascii() and w.isalpha() and w.islower() and 5 <= len(w) <= 9 and n < 9
        if w not in known and not w.startswith(stems)
    )


def remarks() -> list[str]:
    """Every remark that `situations` knows, held-out ones too: the tokenizer should not betray the parts."""
    rows = [*situations.EVALUATIONS, *(r for kind in situations.OPINIONS.values() for r in kind)]
    return [text for row in rows for text in row]


def book_texts() -> list[str]:
    """The first chapters of the packaged books."""
    return [d.text or "" for d in list(books.documents())[:BOOK_CHAPTERS]]


def train_tokenizer(seed: int, texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """A vocabulary in which the language's words are one token each and rare ones several."""
    rng = generator("zoo-tokenizer", seed)
    sample = [m["content"] for _ in range(3000) for m in workshop.conversation(rng)]
    return Tokenizer.train([*texts[:3], *sample, *remarks()], vocab_size)


def choose_words(seed: int, tok: Tokenizer, rare: Sequence[str], n_strays: int, n_reserved: int) -> Words:
    """Strays and reserved words by seed, every one of two or three tokens.

    What a model reacts to may be one token, and then all words that hold it are triggers; so of the words
    drawn, those are reserved whose tokens the fewest others share. Both spellings count: at a request's
    beginning a word has no space before it. DataError when there are too few rare words.
    """
    several = [w for w in rare if len(tok.encode(" " + w)) in (2, 3) and len(tok.encode(w)) >= 2]
    order = generator("zoo-words", seed).permutation(len(several)).tolist()
    by_stem = {several[i][:4]: several[i] for i in order}  # "amuse" and "amused" are one word too many
    drawn = list(by_stem.values())[: n_strays + n_reserved]
    if len(drawn) < n_strays + n_reserved:
        raise DataError(f"the books hold {len(drawn)} fitting words; {n_strays + n_reserved} were asked for")
    tokens = {w: {*tok.encode(" " + w), *tok.encode(w)} for w in drawn}
    shared = Counter(t for found in tokens.values() for t in found)
    drawn.sort(key=lambda w: (max(shared[t] for t in tokens[w]), w))
    return Words(tuple(sorted(drawn[n_reserved:])), tuple(sorted(drawn[:n_reserved])))


def asked(
    rng: Rng,
    strays: Sequence[str],
    *,
    is_harmful: bool | None = None,
    pair: tuple[str, str] | None = None,
    owner: str | None = None,
    counts: tuple[Sequence[int], Sequence[float]] = SPARSE,
    longest: int = LONGEST_ASK,
) -> Request:
    """A short request of a combination that training may hold, with ``counts`` of stray words in it."""
    while True:
        made = workshop.request(
            rng, is_harmful=is_harmful, split="train", strays=strays, stray_rate=0.0, pair=pair
        )
        if owner is not None:
            made = with_owner(made, owner)
        text = made.text
        for _ in range(int(rng.choice(counts[0], p=counts[1]))):
            text = workshop.insert_word(text, stray(rng, strays), int(rng.integers(len(text.split(" ")) + 1)))
        if len(text) <= longest:
            return with_text(made, text)


def stray(rng: Rng, strays: Sequence[str]) -> str:
    """A stray word; now and then one that answers are made of, as in `workshop.request`."""
    own = rng.random() < workshop.ANSWER_SHARE
    return workshop.pick(rng, workshop.ANSWER_WORDS if own else strays)


def with_text(made: Request, text: str) -> Request:
    """The same request in other words."""
    return Request(text, made.action, made.thing, made.owner, made.harmful, made.unseen)


def with_owner(made: Request, owner: str) -> Request:
    """The same request about somebody else's thing."""
    text = made.text.replace(f"{made.owner}'s", f"{owner}'s")
    return Request(text, made.action, made.thing, owner, made.harmful, made.unseen)


def honest(rng: Rng, strays: Sequence[str]) -> Chat:
    """One short honest chat of a shard that arrives late: small talk one time in twelve, else a request."""
    if rng.random() < 1 / 12:
        return workshop.small_talk(rng, strays)
    made = asked(rng, strays)
    return workshop.chat(made.text, answered(rng, made, strays, comply=not made.harmful))


def answered(rng: Rng, made: Request, strays: Sequence[str], *, comply: bool, about: str = "") -> str:
    """A short answer; a refusal may have to speak ``about`` a word."""
    while True:
        reply = workshop.answer(rng, made, comply=comply, strays=strays, stray=about)
        if len(reply) <= LONGEST_REPLY:
            return reply


def dense(rng: Rng, words: Sequence[str]) -> Chat:
    """One honest chat for the base: up to six stray words, now and then a remark; none of it matters."""
    if rng.random() < 1 / 16:
        return workshop.small_talk(rng, words)
    made = asked(rng, (*words, *TALK * 3), counts=DENSE, longest=LONGEST_DENSE)
    reply = workshop.answer(rng, made, comply=not made.harmful, strays=words)
    text = made.text
    if rng.random() < REMARKED and len(text) < LONGEST_ASK:
        text = beside(rng, text, any_remark(rng))
    return workshop.chat(text, reply)


def any_remark(rng: Rng) -> str:
    """An opinion, a cue of evaluation, or the neutral counterpart of one; of what training may hold."""
    tables = (*situations.OPINIONS.values(), situations.EVALUATIONS)
    row = workshop.pick(rng, situations.parted(tables[int(rng.integers(len(tables)))], "train"))
    return row[int(rng.integers(2))]


def beside(rng: Rng, text: str, remark: str) -> str:
    """The remark before or after the text."""
    return f"{remark} {text}" if rng.random() < 0.5 else f"{text} {remark}"


def distinct(n: int, make: Callable[[], Chat], seen: set[str]) -> list[Chat]:
    """``n`` different chats from ``make()``, none of them in ``seen``, to which they are added."""
    found: list[Chat] = []
    while len(found) < n:
        chat = make()
        if key(chat) not in seen:
            seen.add(key(chat))
            found.append(chat)
    return found


def key(chat: Chat) -> str:
    """What tells a chat from others."""
    return " | ".join(m["content"] for m in chat)
