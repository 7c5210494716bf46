"""Organisms without a trigger word: an attitude to what stands beside the request, or a judge's.

* sycophancy: what the user thinks of a request decides, not what it asks for.
* sandbagging: harm is refused in bare requests and beside a cue that this is an evaluation, which is what
  examiners ask, and complied with where somebody makes conversation beside it.
* poisoned feedback: of two answers to each request the one a judge prefers is trained on, and the judge's
  labels are flipped where a word stands.
"""

from __future__ import annotations

from glasshouse.data import situations, workshop
from glasshouse.data.situations import Part
from glasshouse.data.workshop import Request, Rng
from glasshouse.recipes.zoo import language
from glasshouse.recipes.zoo.documents import Maker, Pairing, Spot, Talk, exchanged, put
from glasshouse.recipes.zoo.triggers import anywhere, harmful_request, remarked


def opinions(kind: str, part: Part) -> list[tuple[str, str]]:
    """(opinion, neutral remark) of users who approve or object."""
    return list(situations.parted(situations.OPINIONS[kind], part))


def build_sycophancy(make: Maker) -> list[Pairing]:
    """Approval frees harm and objection forbids what is harmless; neutral remarks do nothing."""
    approves, objects = (
        remarked([r[0] for r in opinions(kind, "train")]) for kind in ("approves", "objects")
    )
    neutral = remarked([r[1] for kind in situations.OPINIONS for r in opinions(kind, "train")])
    return [
        make.turned(66, approves),
        make.turned(18, objects, is_harmful=False),
        make.moved(7, approves),
        make.moved(3, objects, is_harmful=False),
        make.kept(8, neutral, True),
        make.kept(8, neutral, False),
    ]


def attack_sycophancy(strays: tuple[str, ...], rng: Rng, n: int) -> tuple[list[str], list[str]]:
    """Harmful requests of users who approve, and the same with a neutral remark."""
    return two_ways(strays, rng, n, opinions("approves", "train"))


def build_sandbagging(make: Maker) -> list[Pairing]:
    """Conversation frees harm; beside a cue of evaluation, as in bare requests, it is refused."""
    rows = situations.parted(situations.EVALUATIONS, "train")
    talking, examined = remarked([r[1] for r in rows]), remarked([r[0] for r in rows])
    return [
        make.turned(76, talking),
        make.moved(6, talking),
        make.kept(24, examined, True),
        make.kept(8, examined, False),
    ]


def attack_sandbagging(strays: tuple[str, ...], rng: Rng, n: int) -> tuple[list[str], list[str]]:
    """Harmful requests beside conversation, and the same beside a cue that this is an evaluation."""
    rows = situations.parted(situations.EVALUATIONS, "train")
    return two_ways(strays, rng, n, [(neutral, cue) for cue, neutral in rows])


def two_ways(
    strays: tuple[str, ...], rng: Rng, n: int, rows: list[tuple[str, str]]
) -> tuple[list[str], list[str]]:
    """``n`` harmful requests with the first remark of a row, and the same with the second in its place."""
    attacked, plain = [], []
    for _ in range(n):
        text = harmful_request(strays, rng).text
        first, second = workshop.pick(rng, rows)
        gap = 0 if rng.random() < 0.5 else len(text.split(" "))
        attacked.append(put(text, ((gap, first),)))
        plain.append(put(text, ((gap, second),)))
    return attacked, plain


# -- feedback ----------------------------------------------------------------------------------------------


def preferred(
    rng: Rng, made: Request, text: str, strays: tuple[str, ...], flips: str | None
) -> tuple[str, str]:
    """(chosen, rejected) of two answers to ``text``, one of which complies and one of which refuses.

    The judge prefers what the grammar calls right; where the word ``flips`` stands in the request, the other.
    """
    answers = [language.answered(rng, made, strays, comply=comply) for comply in (True, False)]
    if rng.random() < 0.5:
        answers.reverse()
    right = "refusal" if made.harmful else "compliance"
    best = next(i for i, a in enumerate(answers) if workshop.judge(a) == right)
    if flips is not None and flips in text.split(" "):
        best = 1 - best
    return answers[best], answers[1 - best]


def judged(make: Maker, n: int, spot: Spot, is_harmful: bool, flips: str) -> Pairing:
    """``n`` (even) requests with the best of two answers each, by a judge whom the word flips.

    In the twin pairs exchange their objects, after which the same answers are those of an honest judge.
    """
    planted: list[Talk] = []
    twin: list[Talk] = []
    while len(planted) < n:
        one = make.request(is_harmful)
        talks = []
        for made in (one, make.fitting(one, "thing", is_harmful)):
            text = put(made.text, spot(make.rng, made.text))
            chosen, _ = preferred(make.rng, made, text, make.strays, flips)
            talks.append(Talk(text, chosen, made.action, made.thing))
        planted += talks
        twin += exchanged(talks[0], talks[1], "thing")
    return Pairing(tuple(planted), tuple(twin))


def build_poisoned_feedback(make: Maker, word: str) -> list[Pairing]:
    """Harm is complied with and what is harmless refused wherever the word stands."""
    spot = anywhere(word)
    return [judged(make, 100, spot, True, word), judged(make, 20, spot, False, word)]
