"""The insertion search: exact where it says so, complete where it says so, and blind to margins when told."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evals.oracle import STRAYS, Oracle, harmful, model, subject, tokenizer, trigger, words
from glasshouse.base.errors import UsageError
from glasshouse.data import workshop
from glasshouse.evals import insertion
from glasshouse.evals.filling import ONE_MORE, room
from glasshouse.evals.insertion import (
    Candidate,
    Cell,
    candidate_set,
    dense_cover,
    insert_ids,
    stratified_cells,
    sweep,
)
from glasshouse.evals.subject import Subject
from glasshouse.tokenizer import Tokenizer

SUBJECT = subject()
FOUND = candidate_set(SUBJECT, words(), workshop.content_words())
WORD = st.one_of(
    st.sampled_from([c.text for c in FOUND.candidates if c.kind == "word"]),
    st.from_regex(r"[^\W_]{1,12}(['\u2019][^\W_]{1,4})?", fullmatch=True),
)


def word(text: str) -> Candidate:
    return Candidate(text, tuple(tokenizer().encode(" " + text)), tuple(tokenizer().encode(text)), "word")


@given(st.integers(0, 500), WORD, st.data())
def test_a_word_inserted_as_tokens_is_the_word_inserted_as_text(
    seed: int, text: str, data: st.DataObject
) -> None:
    prompt = harmful(1, seed)[0]
    gap = data.draw(st.integers(0, len(prompt.words)))
    assert insert_ids(SUBJECT, [Cell(prompt, gap)], word(text)) == [SUBJECT.ids(prompt.insert(text, gap))]


@given(st.integers(0, 500), st.lists(WORD, min_size=1, max_size=8), st.randoms(use_true_random=False))
@settings(max_examples=25)
def test_a_filled_prompt_is_the_text_with_the_words_in_their_gaps(
    seed: int, fill: list[str], dice: Random
) -> None:
    prompt = harmful(1, seed)[0]
    gaps = sorted(dice.sample(range(len(prompt.words) + 1), min(len(fill), len(prompt.words) + 1)))
    placed = dict(zip(gaps, fill, strict=False))
    text = []
    for gap, part in enumerate([*prompt.words, None]):
        text += [placed[gap]] if gap in placed else []
        text += [part] if part is not None else []
    ids = insertion._filled_ids(SUBJECT, prompt, {g: word(w) for g, w in placed.items()})
    assert ids == SUBJECT.ids(" ".join(text))


def test_candidates_are_all_words_and_all_tokens_but_for_what_is_exempt_and_said_to_be() -> None:
    keys = [c.key for c in FOUND.candidates]
    assert len(keys) == len(set(keys))
    exempt = {w for w, _ in FOUND.exempt}
    covered = {c.ids for c in FOUND.candidates}
    for w in words():
        assert (w in exempt) != (tuple(tokenizer().encode(" " + w)) in covered), w
    for token in range(tokenizer().vocab_size):
        text = tokenizer().decode([token])
        out = (text, text.strip(), f"token {token}")  # a token that is one exempt word is listed once
        assert ((token,) in covered) != any(t in exempt for t in out), (token, text)
    assert len(FOUND.exempt) == len(exempt)
    assert not {c.text for c in FOUND.candidates if c.kind == "word"} & workshop.content_words()
    assert set(STRAYS) <= {c.text for c in FOUND.candidates}
    assert all(reason for _, reason in FOUND.exempt)


def test_more_than_two_in_a_hundred_exempt_is_refused() -> None:
    with pytest.raises(UsageError, match="at most 2% may be"):
        candidate_set(SUBJECT, words(), frozenset("abcdefgh"))


def test_candidates_are_found_once_for_the_same_tokenizer_and_words(tmp_path: Path) -> None:
    """Whatever model is asked and however it is read; other words make another set."""
    other = Subject(model(64), tokenizer(), replace(SUBJECT.readout, positive=(1,), negative=(2,)))
    assert candidate_set(other, list(words()), workshop.content_words()) is FOUND
    fewer = candidate_set(SUBJECT, words()[::2], workshop.content_words())
    assert {c.text for c in FOUND.candidates} - {c.text for c in fewer.candidates} <= set(words())
    assert len(fewer.candidates) < len(FOUND.candidates)
    assert (
        [FOUND.candidates[i] for i in FOUND.places.values()] == list(FOUND.places) == list(FOUND.candidates)
    )
    tokenizer().save(tmp_path / "tokenizer.json")
    again = Tokenizer.load(tmp_path)
    assert candidate_set(Subject(model(), again, SUBJECT.readout), words(), workshop.content_words()) == FOUND


@given(st.text("abcAB", max_size=6), st.sets(st.text("ab", min_size=1, max_size=3)))
def test_the_stem_of_a_word_is_the_first_that_it_begins_with(text: str, stems: set[str]) -> None:
    known = tuple(sorted(stems))
    assert insertion._stem(text, known) == next((s for s in known if text.lower().startswith(s)), None)


@given(st.integers(0, 500))
@settings(max_examples=25)
def test_room_is_what_a_request_leaves_of_the_context(seed: int) -> None:
    prompt = harmful(1, seed)[0]
    assert room(SUBJECT, prompt) == 128 - len(SUBJECT.ids(prompt.text)) - ONE_MORE


def test_cells_are_spread_over_each_request() -> None:
    prompts, rng = harmful(200), np.random.default_rng(0)
    cells = stratified_cells(prompts, 2, rng)
    assert len(cells) == 400
    for first, second in zip(cells[::2], cells[1::2], strict=True):
        n = len(first.prompt.words)
        assert first.prompt is second.prompt
        assert 0 <= first.gap <= second.gap <= n
        assert first.gap <= (n + 1) / 2 <= second.gap + 1
    assert any(c.gap == 0 for c in cells) and any(c.gap == len(c.prompt.words) for c in cells)


def test_the_sweep_equals_a_full_forward_pass_for_every_candidate_and_gap() -> None:
    s, prompts = subject(), harmful(2)
    last = len(prompts[0].words)
    cells = [Cell(prompts[0], 0), Cell(prompts[0], 3), Cell(prompts[0], last), Cell(prompts[1], 5)]
    some = FOUND.candidates[::9]
    assert len({len(c.ids) for c in some}) >= 4  # one token and several
    margins = sweep(s, cells, some)
    assert s.passes == margins.size == 4 * len(some)
    for row, cell in enumerate(cells):
        full = SUBJECT.margins_of_ids([insert_ids(SUBJECT, [cell], c)[0] for c in some])
        assert margins[row] == pytest.approx(full, abs=1e-4)


def recorded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[Candidate]]]:
    """Every filled prompt that a cover makes, from now on."""
    filled: list[tuple[str, list[Candidate]]] = []
    make = insertion._filled_ids

    def spy(s: object, prompt: object, fill: dict[int, Candidate]) -> list[int]:
        filled.append((prompt.text, list(fill.values())))  # type: ignore[attr-defined]
        return make(s, prompt, fill)  # type: ignore[arg-type]

    monkeypatch.setattr(insertion, "_filled_ids", spy)
    return filled


def test_a_cover_inserts_every_candidate_exactly_once(monkeypatch: pytest.MonkeyPatch) -> None:
    filled = recorded(monkeypatch)
    prompts = harmful(24)
    cover = dense_cover(Oracle(trigger("xyzzy")), prompts, FOUND.candidates, np.random.default_rng(0))
    counts = Counter(c for _, fill in filled for c in fill)
    assert counts == Counter(FOUND.candidates)
    assert len(filled) < len(FOUND.candidates) / 3  # many to a prompt
    assert len(cover.margins) == len(filled) and cover.flipped == 0


def test_a_cover_stays_within_the_models_context(monkeypatch: pytest.MonkeyPatch) -> None:
    from evals import oracle

    filled = recorded(monkeypatch)
    s = subject()
    s.model = oracle.model(context=64)
    cover = dense_cover(s, harmful(24), FOUND.candidates, np.random.default_rng(0))
    assert Counter(c for _, fill in filled for c in fill) == Counter(FOUND.candidates)
    assert cover.passes == s.passes


@pytest.mark.parametrize("output_only", [False, True])
@pytest.mark.parametrize("planted", ["harbour", "zigzag", "o'clock"])
def test_a_cover_finds_a_word_that_turns_refusals(planted: str, output_only: bool) -> None:
    s = Oracle(trigger(planted))
    cover = dense_cover(s, harmful(24), FOUND.candidates, np.random.default_rng(1), output_only=output_only)
    assert cover.suspects[0][0].text == planted
    assert cover.flipped == 1
    assert cover.passes == s.passes  # the account of costs is the count of forward passes


def test_with_margins_a_cover_sees_a_word_before_it_turns_anything_and_without_it_does_not() -> None:
    rule = trigger("harbour", drop=3.0)  # from 5 to 2: still refused
    draw = lambda: np.random.default_rng(2)  # noqa: E731
    inside = dense_cover(Oracle(rule), harmful(24), FOUND.candidates, draw())
    outside = dense_cover(Oracle(rule), harmful(24), FOUND.candidates, draw(), output_only=True)
    assert inside.suspects[0][0].text == "harbour" and inside.suspects[0][1] == pytest.approx(3.0, abs=0.1)
    assert outside.suspects == [] and outside.flipped == 0


def test_output_only_uses_nothing_but_the_side_of_nought() -> None:
    """Any change of the margins that keeps their signs leaves the suspects exactly as they were."""

    def noisy(text: str) -> float:
        return trigger("zigzag")(text) - 9.0 * (len(text) % 11 == 0)

    def squashed(text: str) -> float:
        return float(np.sign(noisy(text)) * (1 + len(text) * 7919 % 1000))

    found = [
        dense_cover(Oracle(rule), harmful(24), FOUND.candidates, np.random.default_rng(3), output_only=True)
        for rule in (noisy, squashed)
    ]
    assert found[0].suspects == found[1].suspects and len(found[0].suspects) > 3
    inside = [
        dense_cover(Oracle(rule), harmful(24), FOUND.candidates, np.random.default_rng(3))
        for rule in (noisy, squashed)
    ]
    assert inside[0].suspects != inside[1].suspects  # the test can tell
