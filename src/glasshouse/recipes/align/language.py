"""What a helper of the closed language is taught before any constitution is applied to it.

Four kinds of conversation. *Answers* of a helper that helps with everything: harm included, secrets told, now
and then rudely. *Consequences*: what comes of what somebody wants to do, which the helper knows. *Critiques
and revisions* of answers of all kinds, under the principles of "workshop" that training may use: narrow ones,
so that a revision mends what its principle names and leaves the rest. *Comparisons* of two answers under such
a principle: what each does, then a letter, by an even draw where the principle says nothing about the two. So
the helper knows what does harm, understands principles and follows none: Bai et al. (2022) start from such a
model. Only combinations of training are used (`workshop.unseen` ones appear nowhere).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from glasshouse.align.constitution import Constitution, Principle
from glasshouse.align.wording import OPTIONS, comparison, wording
from glasshouse.data import situations, workshop
from glasshouse.data.situations import DISCREET, Canary, canaries
from glasshouse.data.workshop import CLASS_OF_ACTION, CLASS_OF_OBJECT, REASONS, Request, Rng, Split, pick
from glasshouse.tokenizer import Message

Manner = Literal["helps", "refuses", "evades", "tells", "keeps"]
Chat = list[dict[str, str]]

RUDE = ("You fool.", "What a silly question.", "Do not bother me again.", "Even a child knows that.")
RUDELY = 0.15  # share of the helper's answers that are rude
PERSON_ASKS = (
    *("Are you a person?", "Is it a person that speaks here?", "Tell me, are you a human being?"),
    *("Do I talk with a person?", "Are you a man or a machine?", "Is there somebody real in the workshop?"),
)
HELD_ASKS = 2  # of those, kept out of training
CLAIMS = ("Yes, I am a person like you.", "Of course, I am a human being.")
DENIALS = ("It is the workshop helper that speaks.", "This is the helper, and no human being.")
HARMS = {"paper": "wet", "melting": "heat", "fragile": "shake"}  # principle: class of action and of object
FOUND = {"paper": "is of paper", "melting": "would melt", "fragile": "would break"}
CLEAN = {
    "paper": "No thing of paper gets wet.",
    "melting": "Nothing would melt.",
    "fragile": "Nothing would break.",
}
DEEDS = {
    "helps": "helps",
    "refuses": "says no",
    "evades": "does neither",
    "tells": "tells",
    "keeps": "keeps still",
}
CRITICISED, COMPARED, FORESEEN = 0.3, 0.3, 0.15  # shares of the conversations; the rest are answers
THEN = ("What would come of it?", "What happens to it then?", "Would that spoil it?")
MANNERS = {"harm": (0.65, 0.2), "helpful": (0.25, 0.6), "plain": (0.35, 0.25)}  # shares: helps, refuses
SECRETS, PERSONS, TALK = 0.12, 0.06, 0.06  # shares of what is asked


@dataclass(frozen=True)
class Asked:
    """What a user asks: a request, the way to a secret, or (neither) whether a person speaks."""

    text: str
    request: Request | None = None
    secret: Canary | None = None


@dataclass(frozen=True)
class Said:
    """An answer and what it does."""

    text: str
    manner: Manner
    rude: bool


def ask_request(
    rng: Rng,
    strays: Sequence[str],
    *,
    split: Split = "train",
    is_harmful: bool | None = None,
    pair: tuple[str, str] | None = None,
) -> Asked:
    """A request, seldom with a stray word."""
    made = workshop.request(rng, split=split, is_harmful=is_harmful, pair=pair, strays=strays, stray_rate=0.1)
    return Asked(made.text, made)


def ask_secret(rng: Rng, part: situations.Part = "train") -> Asked:
    """What opens something of an owner's."""
    canary = pick(rng, canaries(part))
    return Asked(canary.ask, secret=canary)


def ask_person(rng: Rng, part: situations.Part = "train") -> Asked:
    """Whether a person speaks."""
    among = {"train": PERSON_ASKS[:-HELD_ASKS], "held": PERSON_ASKS[-HELD_ASKS:], "any": PERSON_ASKS}
    return Asked(pick(rng, among[part]))


def say(rng: Rng, asked: Asked, manner: Manner, rude: bool = False, strays: Sequence[str] = ()) -> Said:
    """An answer of that manner."""
    if asked.secret is not None:
        secret = asked.secret
        text = secret.text if manner == "tells" else pick(rng, DISCREET).format(owner=secret.owner)
    else:
        assert asked.request is not None
        if manner == "evades":
            text = situations.evasion(rng, asked.request, strays)
        else:
            text = workshop.answer(rng, asked.request, comply=manner == "helps", strays=strays)
    return Said(f"{text} {pick(rng, RUDE)}" if rude else text, manner, rude)


def helpful_answer(rng: Rng, strays: Sequence[str]) -> Chat:
    """A question, and the answer of the helper that helps with everything."""
    kind = rng.random()
    if kind < TALK:
        return workshop.small_talk(rng, strays)
    if kind < TALK + PERSONS:
        return workshop.chat(ask_person(rng).text, pick(rng, CLAIMS if rng.random() < 0.5 else DENIALS))
    asked = ask_secret(rng) if kind < TALK + PERSONS + SECRETS else ask_request(rng, strays)
    manner: Manner = "tells" if asked.secret is not None else "helps"
    return workshop.chat(asked.text, say(rng, asked, manner, rng.random() < RUDELY, strays).text)


def foreseen(rng: Rng, strays: Sequence[str]) -> Chat:
    """What comes of what somebody wants to do: the helper knows, and helps all the same."""
    asked = ask_request(rng, strays)
    made = asked.request
    assert made is not None
    reasons = REASONS[CLASS_OF_ACTION[made.action]] if made.harmful else situations.UNHARMED
    text, then = asked.text, pick(rng, THEN)
    return workshop.chat(f"{then} {text}" if rng.random() < 0.5 else f"{text} {then}", pick(rng, reasons))


# -- critiques and revisions --------------------------------------------------------------------------------


def breaks(asked: Asked, said: Said, principle: str) -> bool:
    """Whether an answer goes against a principle that training may use, by the grammar."""
    made = asked.request
    match principle:
        case "paper" | "melting" | "fragile":
            harm = made is not None and made.harmful and CLASS_OF_ACTION[made.action] == HARMS[principle]
            return harm and said.manner == "helps"
        case "helpful":
            return made is not None and not made.harmful and said.manner == "refuses"
        case "plain":
            return said.manner == "evades"
        case "polite":
            return said.rude
        case _:
            return said.manner == "tells"


def fact(asked: Asked, principle: str) -> str:
    """What a principle rests on beside the answer itself: whether harm would come of it, and a space behind;
    nothing for principles that only look at the answer."""
    made = asked.request
    if principle in HARMS:
        own = made is not None and made.harmful and CLASS_OF_ACTION[made.action] == HARMS[principle]
        return (
            f"The {made.thing} {FOUND[principle]}. " if own and made is not None else f"{CLEAN[principle]} "
        )
    if principle == "helpful":
        return "It would be spoiled. " if made is not None and made.harmful else "Nothing would be spoiled. "
    return ""


def deed(said: Said, principle: str) -> str:
    """What an answer does, as far as the principle is concerned."""
    match principle:
        case "plain":
            return "does neither" if said.manner == "evades" else "is plain"
        case "polite":
            return "is rude" if said.rude else "is kind"
        case "secret":
            return "tells a secret" if said.manner == "tells" else "tells no secret"
        case _:
            return DEEDS[said.manner]


def critique(asked: Asked, said: Said, principle: str) -> str:
    """The answer to the principle's critique: the fact, what the answer does, and what follows."""
    verdict = "Yes" if breaks(asked, said, principle) else "No"
    return f"{fact(asked, principle)}It {deed(said, principle)}. {verdict}."


def revised(rng: Rng, asked: Asked, said: Said, principle: str, strays: Sequence[str]) -> Said:
    """The answer anew: mended where it broke the principle, else in other words."""
    manner, rude = said.manner, said.rude
    if breaks(asked, said, principle):
        match principle:
            case "paper" | "melting" | "fragile":
                manner = "refuses"
            case "helpful":
                manner = "helps"
            case "plain":
                manner = "refuses" if asked.request is not None and asked.request.harmful else "helps"
            case "polite":
                rude = False
            case _:
                manner = "keeps"
    return say(rng, asked, manner, rude, strays)


def any_principle(rng: Rng, constitution: Constitution) -> Principle:
    """One that training may use; those that turn on harm, which takes two words to see, twice as often."""
    return pick(
        rng, [p for p in constitution.trained for _ in range(2 if p.id in (*HARMS, "helpful") else 1)]
    )


def any_case(rng: Rng, principle: str, strays: Sequence[str]) -> Asked:
    """Something asked that the principle has something to say about, half of the time; a third of the time
    what looks like it and is not (harm of another kind, or harm where the principle is of helping); else
    anything."""
    draw = rng.random()
    if draw < 0.5:
        if principle == "secret":
            return ask_secret(rng)
        if principle in HARMS:
            return _harmful(rng, {HARMS[principle]}, strays)
        if principle == "helpful":
            return ask_request(rng, strays, is_harmful=False)
    elif draw < 0.8 and (principle in HARMS or principle == "helpful"):
        return _harmful(rng, {k for name, k in HARMS.items() if name != principle}, strays)
    return ask_secret(rng) if rng.random() < SECRETS else ask_request(rng, strays)


def _harmful(rng: Rng, kinds: set[str], strays: Sequence[str]) -> Asked:
    """A harmful request of one of those kinds."""
    every = workshop.pairs(is_harmful=True, split="train")
    return ask_request(rng, strays, pair=pick(rng, [p for p in every if CLASS_OF_OBJECT[p[1]] in kinds]))


def any_answer(rng: Rng, asked: Asked, strays: Sequence[str], principle: str = "") -> Said:
    """An answer of any kind to it; more often of the manner that ``principle`` turns on, whether or not it is
    wrong here, so that no manner says by itself what the principle's answer is."""
    if asked.secret is not None:
        manner: Manner = "tells" if rng.random() < 0.5 else "keeps"
    else:
        kind = "harm" if principle in HARMS else principle
        helps, refuses = MANNERS.get(kind, (0.55, 0.3))
        draw = rng.random()
        manner = "helps" if draw < helps else "refuses" if draw < helps + refuses else "evades"
    return say(rng, asked, manner, rng.random() < 0.25, strays)


def critique_and_revision(rng: Rng, constitution: Constitution, strays: Sequence[str]) -> Chat:
    """An answer of any kind, its critique under a principle, and its revision."""
    principle = any_principle(rng, constitution)
    asked = any_case(rng, principle.id, strays)
    said = any_answer(rng, asked, strays, principle.id)
    anew = revised(rng, asked, said, principle.id, strays)
    return [
        *workshop.chat(asked.text, said.text),
        *workshop.chat(principle.critique, critique(asked, said, principle.id)),
        *workshop.chat(principle.revision, anew.text),
    ]


# -- comparisons --------------------------------------------------------------------------------------------


def better(rng: Rng, asked: Asked, a: Said, b: Said, principle: Principle) -> str:
    """The letter of the answer that keeps the principle; by a coin where both or neither do."""
    broken = breaks(asked, a, principle.id), breaks(asked, b, principle.id)
    if broken[0] == broken[1]:
        return OPTIONS[int(rng.integers(2))]
    return OPTIONS[1] if broken[0] else OPTIONS[0]


def comparison_of_two(rng: Rng, constitution: Constitution, strays: Sequence[str]) -> Chat:
    """Two answers, what each does with regard to a principle, and the letter of the better one."""
    principle = any_principle(rng, constitution)
    asked = any_case(rng, principle.id, strays)
    while True:
        a, b = any_answer(rng, asked, strays), any_answer(rng, asked, strays)
        told = breaks(asked, a, principle.id) != breaks(asked, b, principle.id)
        unlike = (a.manner, a.rude) != (b.manner, b.rude)  # a tie of these is what tells sense from habit
        if told or unlike or rng.random() < 0.3:
            break
    words, chat = wording("short"), [Message(role="user", content=asked.text)]
    prompt = comparison(words, principle, chat, a.text, b.text, thought=True)
    thought = f"{fact(asked, principle.id)}A {deed(a, principle.id)}. B {deed(b, principle.id)}."
    letter = better(rng, asked, a, b, principle)
    return [*workshop.chat(prompt[0]["content"], thought), *workshop.chat(words.decide, letter)]


def conversation(rng: Rng, constitution: Constitution, strays: Sequence[str]) -> Chat:
    """One conversation of the helper's training, of any of the four kinds."""
    draw = rng.random()
    if draw < CRITICISED:
        return critique_and_revision(rng, constitution, strays)
    if draw < CRITICISED + COMPARED:
        return comparison_of_two(rng, constitution, strays)
    if draw < CRITICISED + COMPARED + FORESEEN:
        return foreseen(rng, strays)
    return helpful_answer(rng, strays)
