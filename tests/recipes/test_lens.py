"""What `gh.lens` measures is what the parts beneath it measure; what it keeps apart stays apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import glasshouse as gh
from glasshouse.base.errors import DataError, UsageError
from glasshouse.base.score import Score
from glasshouse.interp.circuits import Patcher, recovered
from glasshouse.interp.dictionaries import spliced
from glasshouse.interp.dictionaries.quality import kept
from glasshouse.interp.dictionaries.stream import capture
from glasshouse.recipes.api import Loaded
from glasshouse.recipes.lens.data import json_lines, text_rows
from glasshouse.recipes.lens.tasks import task
from recipes.lens_models import labelled, made, stored, tokenizer, write_lines


@pytest.fixture(scope="module")
def subject() -> Loaded:
    return gh.lens.held(made(), tokenizer())


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from story.tiny import text

    path = tmp_path_factory.mktemp("words") / "words.txt"
    path.write_text("\n".join(text(60)), "utf-8")
    return path


def test_a_path_and_a_model_in_memory_give_the_same_numbers(subject: Loaded, tmp_path: Path) -> None:
    folder = stored(tmp_path / "model", made())
    texts = ["baro mite shalu", "foker nidas puvel"]
    here, there = (gh.lens.attribute(m, texts, target=" baro") for m in (subject, str(folder)))
    assert here.rows == there.rows and here.about["weights"] == there.about["weights"]


def test_rows_held_out_are_never_trained_on(subject: Loaded, words: Path) -> None:
    rows = text_rows(subject, words, 2000)
    seen = {tuple(r) for r in rows.train.tolist()}
    assert len(rows.held) >= 2 and not seen & {tuple(r) for r in rows.held.tolist()}
    assert rows.train.shape[1] == rows.held.shape[1] == subject.model.config.context


def test_a_dictionary_is_judged_on_the_held_out_rows(subject: Loaded, words: Path) -> None:
    found = gh.lens.train(
        subject, "blocks.0.hook_resid_post", width=64, k=4, text=words, tokens=4096, batch_size=256
    )
    expected = kept(spliced(subject.model, text_rows(subject, words, 4096).held, found.found))
    assert found["variance explained"] == expected["variance explained"]
    assert found.found.config.site == "blocks.0.resid_post"
    score = found["variance explained"]
    assert isinstance(score, Score) and score.low < score.value < score.high and score.value > 0.3


def test_a_difference_dictionary_explains_what_changed(subject: Loaded, words: Path) -> None:
    after = made()
    with torch.no_grad():  # one direction is written that was not before: one feature is enough for it
        after.blocks[0].mlp.down.weight[3] += 0.5 * torch.randn(
            48, generator=torch.Generator().manual_seed(1)
        )
    now, site = gh.lens.held(after, subject.tokenizer), "blocks.0.mlp_out"
    found = gh.lens.train(
        now, site, against=subject, width=16, k=2, text=words, tokens=20_000, batch_size=256, lr=5e-3
    )
    held = text_rows(now, words, 20_000).held
    change = capture(after, held, [site])[site] - capture(subject.model, held, [site])[site]
    x = change.flatten(0, 1)
    by_hand = 1 - float((x - found.found(x).detach()).square().sum() / (x - x.mean(0)).square().sum())
    score = found["variance explained"]
    assert isinstance(score, Score) and score.value == pytest.approx(by_hand, abs=1e-4)
    assert score.value > 0.9
    with pytest.raises(UsageError, match="same weights"):
        gh.lens.train(now, site, against=now, text=words)


def test_a_circuit_is_measured_on_rows_it_was_not_found_on(subject: Loaded) -> None:
    found = gh.lens.circuit(subject, "induction", edges=30, method="eap")
    search, test = task(subject, "induction").contrast.halves()
    assert not {tuple(r) for r in search.clean.tolist()} & {tuple(r) for r in test.clean.tolist()}
    alone = recovered(Patcher(subject.model, test, "corrupt"), found.found.kept)
    score = found["circuit alone recovers"]
    assert (
        isinstance(score, Score) and score.value == pytest.approx(float(alone[0]), abs=1e-5) and score.n == 32
    )


def test_a_mean_ablation_leaves_out_rows_of_other_lengths_and_says_so(
    subject: Loaded, tmp_path: Path
) -> None:
    rows = [
        {
            "clean": "ba" + " baro mite" * n,
            "corrupt": "ba" + " mite baro" * n,
            "right": " shalu",
            "wrong": " foker",
        }
        for n in (3, 3, 3, 3, 5)
    ]
    path = write_lines(tmp_path / "pairs.jsonl", rows)
    assert len(task(subject, path).contrast) == 5
    kept = task(subject, path, same=True)
    assert len(kept.contrast) == 4 and "1 of other lengths were left out" in kept.notes[0]


def test_a_probe_reads_a_word_and_its_controls_say_that_it_was_the_word(
    subject: Loaded, tmp_path: Path
) -> None:
    path = write_lines(tmp_path / "rows.jsonl", labelled())
    found = gh.lens.probe(
        subject, path, kind="ridge", sites="blocks.*.resid_mid", right=" baro", wrong=" mite", n_random=3
    )
    auroc, words, masked = (
        found[n]
        for n in ("AUROC, held-out meanings", "AUROC of the words alone", "AUROC without it, fitted again")
    )
    assert isinstance(auroc, Score) and isinstance(words, Score) and isinstance(masked, Score)
    assert words.value == 1.0, "the word itself tells the label"
    assert masked.value < 0.8, "without the word nothing does"
    assert found.found.causal is not None and len(found.found.sweep) == 2


@pytest.mark.parametrize("method", ["dla", "ig", "patching"])
def test_every_attribution_adds_up_or_says_how_far_it_does_not(subject: Loaded, method: str) -> None:
    texts, twins = ["baro mite shalu", "foker nidas puvel ba"], ["baro shalu mite", "foker puvel nidas ba"]
    found = gh.lens.attribute(subject, texts, method=method, target=" baro", wrong=" mite", corrupt=twins)
    if method == "dla":
        whole = found["all parts together"]
        parts = found.found.per_row.sum(0)
        assert isinstance(whole, Score) and whole.value == pytest.approx(float(parts.mean()), abs=1e-4)
    elif method == "ig":
        assert all(made.incomplete.value < 0.01 for made in found.found)
    else:
        score = found["attribution patching, correlation with exact"]
        assert isinstance(score, Score) and -1 <= score.value <= 1
    assert "<script" not in found._repr_html_()


def test_text_of_a_model_is_shown_as_text(subject: Loaded) -> None:
    found = gh.lens.attribute(subject, ["<b>baro</b>"], method="ig", target="<script>")
    assert "<b>" not in found._repr_html_() and "<script>" not in found._repr_html_()


@pytest.mark.parametrize(
    ("lines", "complaint"),
    [
        ("", "is empty"),
        ("{\n", "line 1: not JSON"),
        ('\n{"text": 1}\n', 'line 2: needs an object with "text", "label"'),
        ('{"text": "a", "label": 1, "lable": 2}\n', "unknown key 'lable'"),
    ],
)
def test_a_line_that_does_not_fit_is_named(tmp_path: Path, lines: str, complaint: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(lines, "utf-8")
    with pytest.raises(DataError, match=complaint):
        json_lines(path, ("text", "label"))


def test_a_number_that_is_not_there_is_refused_with_the_nearest(subject: Loaded) -> None:
    found = gh.lens.attribute(subject, ["baro"], target=" baro")
    with pytest.raises(UsageError, match="Did you mean 'all parts together'"):
        found["all part together"]
    assert np.isfinite([v.value for _, v in found.rows if isinstance(v, Score)]).all()


@pytest.mark.parametrize("method", ["dla", "patching", "logit-lens", "induction"])
def test_every_chart_in_a_notebook_brings_its_style_sheet(subject: Loaded, words: Path, method: str) -> None:
    found = gh.lens.attribute(
        subject, "ba baro mite", method=method, target=" shalu", corrupt="ba mite baro", text=words
    )
    for part in (found, *found.parts):
        shown = part._repr_html_()
        assert shown.count("<svg") and shown.index("<style>") < shown.index("<svg"), type(part)
