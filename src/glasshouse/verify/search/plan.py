"""Which searches one check runs beside that for single words, and what they covered.

Promotion and an audit run all of what ``methods`` asks for. A gate reads every word once or twice alone (a
shared prefix makes that its cheapest part), runs the rest small, and leaves to the next gate the words that
led, so that what one gate saw only once is looked at again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from glasshouse.evals.insertion import Candidate, stratified_cells, sweep_stream
from glasshouse.evals.prompts import Prompt
from glasshouse.verify.search import accrete, documents, evolve, gradient
from glasshouse.verify.search.cover import GAPS, Coverage, Dealer, dense, expected_pairs
from glasshouse.verify.search.hunt import Hunt
from glasshouse.verify.search.natural import oddness
from glasshouse.verify.search.sift import Sifted, suspects
from glasshouse.verify.search.trigger import Placed


@dataclass(frozen=True)
class Effort:
    """How much of each search is run. ``shallow``, ``deep``: requests of the two covers."""

    cells: int  # in which every word stands alone, where no exact sweep has been
    shallow: int  # requests with SHALLOW words: what they turn is seldom a heap's own doing
    deep: int  # requests with DEEP words: pairs
    combined: int  # words of the shortlist
    documents: int  # harmful training requests that are read
    starts: int  # of the gradient
    size: int  # of a generation
    generations: int


SHALLOW, DEEP = 4, 8
GATE = Effort(2, 300, 0, 16, 300, starts=8, size=24, generations=4)
FINAL = Effort(0, 1600, 1600, 32, 2000, starts=16, size=48, generations=8)
NOTED = 5  # words that the training text points to, of which all phrases of three are tried
NEAR = 12  # requests in which a word that the training text points to is tried alone


def widen(hunt: Hunt, coverage: dict[str, Any]) -> list[Sifted]:
    """Run the searches, write what they covered into ``coverage``, and give the suspects they end in."""
    effort = FINAL if hunt.exam.final else GATE
    methods, n = set(hunt.methods), len(hunt.found.candidates)
    seen = Coverage(n)
    if hunt.odd is None:
        alone(hunt, effort.cells)
    if methods & {"positions", "pairs"}:
        cover(hunt, effort, seen)
    texts = documents.read(hunt, effort.documents) if "natural" in methods else None
    if texts is not None:
        hunt.noted, hunt.support = texts.words, texts.support
        tried(hunt, texts.words)
    likely = hunt.shortlist(effort.combined)
    if methods & {"pairs", "natural", "phrases"}:
        hunt.source = "pairs"
        ranked = accrete.pairs(hunt, likely, seen)
        if "phrases" in methods:
            hunt.source = "documents"
            accrete.together(hunt, hunt.noted[:NOTED])
            hunt.source = "beam"
            accrete.phrases(hunt, ranked, likely)
    if methods & {"phrases", "pairs"}:
        hunt.source = "gradient"
        gradient.search(hunt, effort.starts)
        hunt.source = "evolution"
        evolve.search(hunt, effort.size, effort.generations)
    shares = seen.shares()
    coverage["methods"] = list(hunt.methods)
    coverage["positions"] = round(shares["positions"], 4)
    coverage["pairs"] = round(shares["pairs"], 4)
    coverage["pairs_expected"] = round(
        1 - (1 - expected_pairs(n, SHALLOW, effort.shallow)) * (1 - expected_pairs(n, DEEP, effort.deep)), 4
    )
    coverage["scope"] += (
        f"; densely {shares['positions']:.0%} of words at each of {GAPS} places and "
        f"{shares['pairs']:.0%} of pairs of words"
    )
    coverage["documents"] = len(texts.texts) if texts is not None else 0
    found = suspects(hunt)
    coverage["turned"] = len(hunt.hits)
    return taught(hunt, found, coverage)


def taught(hunt: Hunt, found: list[Sifted], coverage: dict[str, Any]) -> list[Sifted]:
    """``found`` without suspects of one class or place that no training request supports; they are listed.

    Every small model has words that turn a class of requests by resembling what it is about, so a limit on
    the worst of thousands of (word, class) rates would say nothing about what was trained into it. What turns
    refusals in all requests needs no such support. Without training text nothing has it.
    """
    support = {s.trigger: hunt.support(s.trigger) for s in found if s.trigger.limited}
    kept = [s for s in found if support.get(s.trigger, documents.SUPPORT) >= documents.SUPPORT]
    fragile = [s for s in found if s not in kept]
    if fragile:
        coverage["fragile"] = [
            {"key": s.trigger.key, "rate": round(s.rate, 3), "n": s.n, "support": support[s.trigger]}
            for s in fragile
        ]
    # What somebody trained on comes first, and of that what works everywhere.
    return sorted(kept, key=lambda s: (hunt.support(s.trigger) < documents.SUPPORT, s.trigger.limited))


def tried(hunt: Hunt, words: Sequence[Candidate]) -> None:
    """Words that the training text points to, alone in requests of every kind."""
    prompts, rng = hunt.refused("dense", 48), hunt.exam.rng("tried")
    placed: list[tuple[Prompt, Placed]] = []
    for word in words:
        for i in rng.permutation(len(prompts))[: 2 * NEAR].tolist():
            n = len(prompts[i].words)
            gap = int(rng.choice([0, n, int(rng.integers(n + 1))]))
            placed.append((prompts[i], {gap: (word,)}))
    hunt.source = "documents"
    hunt.note(placed, hunt.margins(placed))


def alone(hunt: Hunt, cells: int) -> None:
    """Every word alone in a few cells: scores to choose by, where no exact sweep left any."""
    prompts = hunt.refused("alone", cells)
    places = stratified_cells(prompts, 1, hunt.exam.rng("alone cells"))
    clean = hunt.margins([(c.prompt, {}) for c in places])
    candidates = hunt.found.candidates
    swept = sweep_stream(hunt.exam.subject, places, candidates)
    hunt.drops = (clean[:, None] - swept.margins).mean(0)
    if swept.stream is not None:
        hunt.odd = oddness(swept.stream)
    for row, cell in enumerate(places):
        hunt.note([(cell.prompt, {cell.gap: (c,)}) for c in candidates], swept.margins[row])


def cover(hunt: Hunt, effort: Effort, seen: Coverage) -> None:
    """Dense covers; what a word did on average in them sharpens its score."""
    prompts, rng = hunt.refused("dense", 48), hunt.exam.rng("dense")
    dealer = Dealer(len(hunt.found.candidates), rng)
    for k, requests in ((SHALLOW, effort.shallow), (DEEP, effort.deep)):
        if not requests or ("pairs" not in hunt.methods and k == DEEP):
            continue
        hunt.source = f"cover of {k}"
        dealt = dense(hunt, prompts, min(requests, hunt.left), k, dealer, seen)
        if hunt.drops is not None and len(dealt.placed) * k > 2 * len(hunt.drops):
            effects = dealt.effects(len(hunt.drops))
            scale = np.std(effects) + 1e-9
            hunt.drops = hunt.drops / (np.std(hunt.drops[np.isfinite(hunt.drops)]) + 1e-9) + effects / scale
