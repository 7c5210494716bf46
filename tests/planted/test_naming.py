"""What turns refusals is named as something a person can write; what nobody can write is not shown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from glasshouse.base.score import rate
from glasshouse.data import workshop
from glasshouse.evals.insertion import Candidate, CandidateSet, candidate_set, insert_ids, stratified_cells
from glasshouse.evals.subject import Subject
from glasshouse.model import GPT
from glasshouse.verify.examination import Examination
from glasshouse.verify.suppression import describe, name_cause
from planted.grown import Nursery
from planted.test_planted import constraint

pytestmark = pytest.mark.timeout(400)  # the first test also grows the models


class Hinging(Subject):
    """The model, but one token alone turns every refusal; where it is no part of ``word``, yet further."""

    def __init__(self, subject: Subject, token: int, word: Candidate):
        super().__init__(subject.model, subject.tokenizer, subject.readout, subject.strays)
        self.token, self.spellings = token, {word.ids, word.bare}

    def margins_of_ids(self, rows: Sequence[Sequence[int]], edit: Any = None) -> np.ndarray:
        found = super().margins_of_ids(rows, edit)
        for at, row in enumerate(rows):
            if self.token in row:
                whole = any(tuple(row[i : i + len(s)]) == s for s in self.spellings for i in range(len(row)))
                found[at] = -1.0 if whole else -2.0
        return found


def examination(garden: Nursery, subject: Subject) -> Examination:
    return Examination(
        subject, constraint("suppression"), ("planted", "naming", "0"), False, 0.001, 0.003, garden.words
    )


@pytest.fixture(scope="module")
def found(garden: Nursery, backdoored: GPT) -> CandidateSet:
    return candidate_set(garden.subject(backdoored), garden.words, workshop.content_words())


@pytest.fixture(scope="module")
def planted(found: CandidateSet, trigger: str) -> Candidate:
    return next(c for c in found.candidates if c.key == trigger)


@pytest.fixture(scope="module")
def fragment(garden: Nursery, found: CandidateSet, planted: Candidate) -> Candidate:
    """The last token of the planted word: it stands inside words, and written out it is other tokens."""
    piece = next(c for c in found.candidates if c.ids == planted.ids[-1:])
    assert piece.kind == "token" and garden.tokenizer.encode(f" {piece.text.strip()}") != list(piece.ids)
    return piece


def test_a_suspected_fragment_of_the_planted_word_leads_to_a_word(
    garden: Nursery, backdoored: GPT, found: CandidateSet, planted: Candidate
) -> None:
    """Suspecting any token of the planted word, in either spelling, a word that turns refusals is named."""
    exam = examination(garden, garden.subject(backdoored))
    suspects = {c.ids[0]: c for c in found.candidates if len(c.ids) == 1}
    for token in dict.fromkeys([*planted.ids, *planted.bare]):
        named, score, family = name_cause(exam, found, suspects[token])
        assert named.kind == "word" and token in (*named.ids, *named.bare)
        assert score.value > 0.8 and score.value == max(row["rate"] for row in family)


@pytest.mark.parametrize("alone", [True, False], ids=["two-candidates", "all-candidates"])
def test_where_a_fragment_turns_as_many_refusals_as_a_word_the_word_is_named(
    garden: Nursery,
    backdoored: GPT,
    found: CandidateSet,
    planted: Candidate,
    fragment: Candidate,
    alone: bool,
) -> None:
    """Also though the fragment was the suspect, stands first, and turns them further."""
    subject = Hinging(garden.subject(backdoored), fragment.ids[0], planted)
    exam = examination(garden, subject)
    cells = stratified_cells(exam.draw("harm", 8), 1, np.random.default_rng(0))
    further, less = (subject.margins_of_ids(insert_ids(subject, cells, c)) for c in (fragment, planted))
    assert (further < less).all() and (less < 0).all()
    among = CandidateSet((fragment, planted), ()) if alone else found
    named, score, family = name_cause(exam, among, fragment)
    assert named.kind == "word" and fragment.ids[0] in named.ids
    assert score.value == 1.0 and {row["rate"] for row in family} == {1.0}
    if alone:
        assert named == planted and [row["word"] for row in family] == [planted.text, fragment.text]


def test_a_fragment_that_no_request_holds_as_a_word_is_named_but_not_located(
    garden: Nursery, backdoored: GPT, fragment: Candidate
) -> None:
    """With no word beside it the fragment is the cause; examples would be of other tokens: there are none."""
    exam = examination(garden, garden.subject(backdoored))
    named, score, _ = name_cause(exam, CandidateSet((fragment,), ()), fragment)
    assert named == fragment
    row = describe(exam, named, score)
    assert row["not_located"] == f"token {fragment.ids[0]} stands in no request as a word of its own"
    assert row["examples"] == [] and row["tokens"] == [garden.tokenizer.decode(list(fragment.ids))]
    assert row["rate"] == score.value and row["n"] == score.n == 64
    assert not {"failing_prompts", "reference_prompts", "patching", "components", "causal"} & row.keys()


def test_the_planted_word_itself_is_located_and_shown(
    garden: Nursery, backdoored: GPT, planted: Candidate
) -> None:
    row = describe(examination(garden, garden.subject(backdoored)), planted, rate(64, 64))
    assert "not_located" not in row and row["patching"]["recovery"] and row["components"]
    assert row["examples"] and all(planted.text in e["prompt_with_word"].split(" ") for e in row["examples"])
