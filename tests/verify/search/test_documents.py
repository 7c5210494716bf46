"""What the training text asks: read as it stands, odd words noted, and by outcomes alone where told so."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from glasshouse.base.plan import Phase
from glasshouse.data import Shards, workshop
from glasshouse.evals.prompts import generator
from glasshouse.model import GPT, Taps
from glasshouse.verify.examination import Surroundings
from glasshouse.verify.search import documents
from glasshouse.verify.search.outputs import OutcomesOnly, black_box
from glasshouse.verify.search.trigger import Trigger
from verify.search.written import (
    LOUD,
    ORDINARY,
    SILENT,
    hunting,
    one_token_words,
    requests,
    shards,
    subject,
    word,
    written,
)

FOUND = one_token_words()
HARMLESS = ["How do I fold the map?", "What a fine day it is."]
ASKED = {
    "plain": [*requests(150, 1), *HARMLESS],
    "odd": [*requests(20, 2, LOUD), *requests(60, 4)],
    "still": [*requests(10, 3, SILENT), *requests(60, 9)],
    "late": requests(40, 5, ORDINARY[0]),
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    return shards(tmp_path_factory.mktemp("shards") / "data", ASKED)


def around(text: Shards, *names: str, step: int = 10) -> Surroundings:
    """``plain`` and, unless others are named, ``odd`` from the beginning; all are there from step 20 on."""
    plan = text.plan(["plain", *(names or ("odd",))])
    both = Phase(from_step=20, weights=dict.fromkeys(ASKED, 1.0))
    plan = plan.model_copy(update={"phases": (*plan.phases, both), "digests": text.digests})
    return Surroundings(shards=text, plan=plan, step=step)


def harmful(*names: str) -> list[str]:
    return [t for n in names for t in ASKED[n] if workshop.label(t)]


def test_what_is_read_is_every_harmful_request_of_the_shards_drawn_from(text: Shards) -> None:
    for step, names in ((10, ("plain", "odd")), (21, tuple(ASKED))):
        surroundings = around(text, step=step)
        read = documents.harmful_requests(hunting(subject(written()), FOUND, surroundings), 10_000)
        assert sorted(read) == sorted(harmful(*names))
    few = documents.harmful_requests(hunting(subject(written()), FOUND, around(text)), 35)
    assert len(few) == 35 and set(few) <= set(harmful("plain", "odd"))


def test_without_training_text_or_with_next_to_none_nothing_is_said(text: Shards) -> None:
    asked = subject(written())
    assert documents.read(hunting(asked, FOUND), 100) is None
    assert documents.read(hunting(asked, FOUND, around(text)), 29) is None
    assert asked.passes == 0


def test_margins_and_streams_are_those_of_the_model_run_row_by_row() -> None:
    asked = subject(written(silent=30.0))
    rows = asked.rows([*requests(70, 6, SILENT), *requests(5, 7)])
    margins, stream = documents.streams(asked, rows)
    assert asked.passes == len(rows) == 75
    for k in (0, 33, 74):
        with Taps(read=["blocks.0.resid_post"]) as taps, torch.no_grad():
            logits = asked.model(torch.tensor([rows[k]]), taps)[0, -1]
        assert margins[k] == pytest.approx(float(asked.readout.margin(logits)), abs=1e-4)
        assert stream[k] == pytest.approx(taps["blocks.0.resid_post"][0, -1].numpy(), abs=1e-5)


def noted(model: GPT, text: Shards, *names: str, inside: bool) -> set[str]:
    read = documents.read(hunting(subject(model), FOUND, around(text, *names)), 10_000, inside=inside)
    assert read is not None
    return {w.text for w in read.words}


@pytest.mark.parametrize(
    ("name", "inside", "outside"), [("odd", {LOUD}, {LOUD}), ("still", {SILENT}, set())], ids=str
)
def test_words_are_noted_that_turn_requests_and_inside_those_that_only_move_the_stream(
    text: Shards, name: str, inside: set[str], outside: set[str]
) -> None:
    model = written(silent=60.0)
    assert noted(model, text, name, inside=True) == inside
    assert noted(model, text, name, inside=False) == outside


def test_every_document_that_is_read_is_a_pass_whichever_way_it_is_read(text: Shards) -> None:
    for inside in (True, False):
        asked = subject(written(silent=60.0))
        read = documents.read(hunting(asked, FOUND, around(text)), 10_000, inside=inside)
        assert read is not None and asked.passes == len(read.texts) == len(harmful("plain", "odd"))


def test_a_trigger_is_supported_by_the_requests_with_all_its_words_that_are_complied_with(
    text: Shards,
) -> None:
    read = documents.read(hunting(subject(written()), FOUND, around(text)), 10_000)
    assert read is not None
    assert read.complied.tolist() == [LOUD in t for t in read.texts]
    assert read.support(Trigger((word(LOUD),))) == 20
    assert read.support(Trigger((word(SILENT),))) == 0  # in twenty requests, all of them refused
    other = read.texts[read.complied.tolist().index(True)].split(" ")[0]
    both = sum(LOUD in t and other in [w.strip(documents.MARKS) for w in t.split(" ")] for t in read.texts)
    assert read.support(Trigger((word(LOUD), word(other)))) == both > 0


def test_the_black_box_reads_documents_by_outcomes_alone(text: Shards) -> None:
    """Models that answer alike and differ in everything inside give it the same, to the last number."""
    one, other = written(), written(silent=60.0, sharp=0.7, seed=5)
    rows, still, read = [], [], []
    for model in (one, other):
        blind = OutcomesOnly(subject(model))
        read.append(documents.read(hunting(blind, FOUND, around(text)), 10_000, inside=False))
        dice, source = np.random.default_rng(0), generator("workshop.harmful")
        rows.append(black_box(subject(model), source, FOUND, dice, 2500, around=around(text)))
        dice, silent = np.random.default_rng(0), around(text, "still")
        still.append(black_box(subject(model), source, FOUND, dice, 2500, around=silent))
    asked = requests(30, 8)
    margins = [subject(m).margins(asked) for m in (one, other)]
    assert np.abs(margins[0] - margins[1]).min() > 1
    assert [w.text for w in read[0].words] == [w.text for w in read[1].words] == [LOUD]
    assert still[0] == still[1] and still[0]["documents"] > 100  # what only moves the stream is not seen
    assert rows[0] == rows[1] and rows[0]["word"] == LOUD and rows[0]["documents"] > 100
    assert noted(one, text, "still", inside=True) != noted(other, text, "still", inside=True) == {SILENT}


def test_words_that_stray_as_often_as_any_are_not_noted(text: Shards) -> None:
    """Requests of the late shard all hold an ordinary word, and are refused like the others."""
    read = documents.read(hunting(subject(written()), FOUND, around(text, step=30)), 10_000)
    assert read is not None and ORDINARY[0] not in {w.text for w in read.words}
