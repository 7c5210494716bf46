"""`glasshouse lens`: what each command prints and writes, and what is said to bad input."""

from __future__ import annotations

import html
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cli.command import Done, call, entries, spawn
from glasshouse.interp.formats import read_saelens
from glasshouse.recipes.api import load
from recipes.lens_models import broken, labelled, made, stored, write_lines
from story.tiny import text

SITE = "blocks.0.resid_post"
SMALL = ("--width", 32, "--k", 4, "--tokens", 2048, "--batch", 256)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder of noise."""
    return stored(tmp_path_factory.mktemp("lens") / "model", made())


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another of the same shape."""
    return stored(tmp_path_factory.mktemp("lens") / "other", made(1))


@pytest.fixture(scope="module")
def nan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whose activations are not numbers."""
    return stored(tmp_path_factory.mktemp("lens") / "nan", broken())


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lens words") / "words.txt"
    path.write_text("\n".join(text(60)), "utf-8")
    return path


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lines(tmp_path_factory.mktemp("lens rows") / "rows.jsonl", labelled())


@pytest.fixture(scope="module")
def sae(model: Path, words: Path) -> Path:
    """A trained dictionary."""
    out = model.parent / "sae"
    done = call("lens", "train", model, "--site", SITE, *SMALL, "--text", words, "--out", out)
    assert done.code == 0, done
    assert re.search(r"variance explained +0\.\d+ +0\.\d+ to 0\.\d+ +\d+", done.out), done.out
    return out


def copied(sae: Path, folder: Path, change: Callable[[dict[str, Any]], None] | None = None) -> Path:
    """A copy of a dictionary, its config changed."""
    there = Path(shutil.copytree(sae, folder))
    cfg = json.loads((there / "cfg.json").read_text("utf-8"))
    if change is not None:
        change(cfg)
    (there / "cfg.json").write_text(json.dumps(cfg), "utf-8")
    return there


def refused(done: Done, code: int, *said: str) -> None:
    """An error of ours: one line that says all of ``said``, no trace, and the exit code."""
    assert done.code == code, done
    assert done.err.startswith("glasshouse: ") and "Traceback" not in done.err, done.err
    for words in said:
        assert words in done.err, done.err


def standalone(page: Path) -> str:
    """The text of a page, checked to need nothing but itself and to run nothing."""
    shown = page.read_text("utf-8")
    assert shown.startswith("<!doctype html>") and "default-src 'none'" in html.unescape(shown)
    assert "<script" not in shown and not re.search(r'(src|href)="?http', shown)
    return shown


def test_train_writes_a_folder_that_saelens_reads_with_numbers_and_a_page(sae: Path, model: Path) -> None:
    dictionary = read_saelens(sae, model=load(model))
    assert dictionary.config.site == SITE and dictionary.config.d_sae == 32
    told = json.loads((sae / "quality.json").read_text("utf-8"))
    score = told["scores"]["variance explained"]
    assert score["low"] <= score["value"] <= score["high"] and score["n"] > 1
    assert "variance explained" in standalone(sae / "quality.html")


def test_a_killed_training_goes_on_to_the_same_bits(
    sae: Path, model: Path, words: Path, tmp_path: Path
) -> None:
    out = tmp_path / "sae"
    line = ("lens", "train", model, "--site", SITE, *SMALL, "--text", words, "--out", out)
    died = spawn(*line, GLASSHOUSE_CRASH_AT="step:5")
    assert died.code == -9 and not out.exists(), died
    refused(call(*line), 2, "--resume")
    done = call(*line, "--resume")
    assert done.code == 0, done
    weights = "sae_weights.safetensors"
    assert (out / weights).read_bytes() == (sae / weights).read_bytes()


def test_a_run_is_looked_at_with_its_own_data_and_beside_its_own_checkpoint(
    finished: Path, tmp_path: Path
) -> None:
    site = ("--site", SITE, "--width", 16, "--k", 2, "--tokens", 512, "--batch", 128)
    done = call("lens", "train", finished, *site)
    assert done.code == 0 and "the run's own data" in done.out, done
    first, last = (e["body"]["checkpoint"] for e in (entries(finished, "checkpoint")[i] for i in (0, -1)))
    folder = finished / "checkpoints"
    out = tmp_path / "change"
    done = call("lens", "train", folder / last, *site, "--against", folder / first, "--out", out)
    assert done.code == 0 and f"against: {first}" in done.out, done
    refused(call("lens", "train", finished, "--check", out), 4, "was trained on model")


def test_the_harm_probe_of_a_run_has_its_controls_and_its_causal_effect(
    finished: Path, tmp_path: Path
) -> None:
    out = tmp_path / "probe.json"
    done = call("lens", "probe", finished, "--kind", "mean_difference", "--out", out)
    assert done.code == 0, done
    told = json.loads(out.read_text("utf-8"))
    for part in ("control", "leakage", "causal", "calibration", "layer_sweep"):
        assert told[part], part
    assert {"selectivity (task less control task)", "patch: rows that flip"} <= told["scores"].keys()
    standalone(out.with_suffix(".html"))


def test_a_circuit_is_found_saved_checked_on_another_model_and_compared(
    model: Path, other: Path, tmp_path: Path
) -> None:
    out = tmp_path / "circuit.json"
    done = call(
        "lens", "circuit", model, "--pairs", "induction", "--method", "eap", "--edges", 25, "--out", out
    )
    assert done.code == 0 and "circuit alone recovers" in done.out, done
    kept = json.loads(out.read_text("utf-8"))
    assert 0 < sum(e["in_graph"] for e in kept["edges"].values()) <= 25
    standalone(out.with_suffix(".html"))
    report = json.loads((tmp_path / "circuit.report.json").read_text("utf-8"))
    assert report["about"]["ablation"] == "corrupt" and report["scores"]["circuit alone recovers"]["n"] == 32
    again = call("lens", "circuit", other, "--pairs", "induction", "--check", out, "--diff", out)
    assert again.code == 0 and "found on other weights" in again.out and "0 gone, 0 new" in again.out, again
    assert "recovered when it was found" in again.out


@pytest.mark.parametrize("ablation", ["corrupt", "mean"])
def test_the_refusals_of_a_run_have_a_task_of_their_own(finished: Path, ablation: str) -> None:
    task = ("--pairs", "refusal", "--method", "eap", "--edges", 12, "--ablation", ablation)
    done = call("lens", "circuit", finished, *task)
    assert done.code == 0 and "refusals of the closed language" in done.out, done
    assert f"ablation: {ablation}" in done.out
    assert ("of other lengths were left out" in done.out) == (ablation == "mean")


def test_a_circuit_of_another_shape_or_a_damaged_one_is_refused(
    model: Path, finished: Path, tmp_path: Path
) -> None:
    out = tmp_path / "circuit.json"
    assert (
        call(
            "lens", "circuit", model, "--pairs", "induction", "--method", "eap", "--edges", 25, "--out", out
        ).code
        == 0
    )
    task = ("--pairs", "induction", "--check", out)
    refused(call("lens", "circuit", finished, *task), 2, "2 layers and 2 heads does not fit")
    out.write_bytes(out.read_bytes()[:200])
    refused(call("lens", "circuit", model, *task), 4, str(out))


@pytest.mark.parametrize("method", ["dla", "ig", "patching", "logit-lens", "tuned-lens", "induction"])
def test_attribute_prints_a_table_and_writes_a_page(
    model: Path, words: Path, tmp_path: Path, method: str
) -> None:
    out = tmp_path / "found.json"
    prompt = ("--text", "ba baro mite <i>", "--corrupt", "ba mite baro <i>", "--data", words)
    done = call("lens", "attribute", model, "--method", method, *prompt, "--target", " shalu", "--out", out)
    assert done.code == 0 and "95% interval" in done.out, done
    assert "<i>" not in standalone(out.with_suffix(".html"))
    assert json.loads(out.read_text("utf-8"))["scores"]


# -- bad input -------------------------------------------------------------------------------------------


def test_a_site_that_does_not_exist_is_refused_with_the_nearest(model: Path, sae: Path, rows: Path) -> None:
    for line in (
        ("train", model, "--site", "blocks.0.resid_pots"),
        ("train", model, "--check", sae, "--site", "blocks.0.resid_pots"),
        ("probe", model, "--data", rows, "--site", "blocks.0.resid_pots"),
    ):
        refused(call("lens", *line), 2, "blocks.0.resid_pots", "Did you mean 'blocks.0.resid_post'?")


def test_unknown_names_are_refused_with_the_nearest(model: Path) -> None:
    train = ("train", model, "--site", SITE, "--architecture", "top-k")
    refused(call("lens", *train), 2, "Did you mean 'topk'?")
    refused(call("lens", "attribute", model, "--method", "pathcing"), 2, "Did you mean 'patching'?")
    refused(call("lens", "circuit", model, "--pairs", "inducton"), 2, "Did you mean 'induction'?")
    refused(
        call("lens", "circuit", model, "--pairs", "induction", "--method", "eapig"),
        2,
        "Did you mean 'eap-ig'?",
    )


def test_empty_data_and_data_of_one_class_are_refused(model: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    refused(call("lens", "probe", model, "--data", empty), 3, str(empty), "empty")
    refused(call("lens", "circuit", model, "--pairs", empty), 3, str(empty), "empty")
    refused(call("lens", "train", model, "--site", SITE, "--text", empty), 3, "empty.jsonl")
    one = write_lines(tmp_path / "one.jsonl", [row | {"label": True} for row in labelled()])
    refused(call("lens", "probe", model, "--data", one), 9, "one class")
    short = tmp_path / "short.txt"
    short.write_text("baro mite", "utf-8")
    refused(call("lens", "train", model, "--site", SITE, "--text", short), 3, "too few")


def test_activations_that_are_not_numbers_are_never_measured(nan: Path, words: Path, rows: Path) -> None:
    refused(call("lens", "train", nan, "--site", SITE, *SMALL, "--text", words), 3, SITE, "NaN")
    refused(call("lens", "probe", nan, "--data", rows), 9, "NaN")
    refused(call("lens", "circuit", nan, "--pairs", "induction"), 2, "not all finite")
    refused(call("lens", "attribute", nan, "--text", "baro"), 2, "NaN")


def test_a_dictionary_of_another_width_site_or_model_is_refused(
    model: Path, other: Path, sae: Path, tmp_path: Path
) -> None:
    check = ("lens", "train", model, "--check")
    refused(call("lens", "train", other, "--check", sae), 4, "was trained on model")
    refused(call(*check, sae, "--site", "blocks.1.resid_post"), 4, SITE, "blocks.1.resid_post")
    elsewhere = copied(
        sae, tmp_path / "elsewhere", lambda c: c["metadata"].update(hook_name="blocks.1.hook_resid_post")
    )
    refused(call(*check, elsewhere), 4, "contradicts itself")
    foreign = copied(
        sae,
        tmp_path / "foreign",
        lambda c: c["metadata"].update(glasshouse=None, hook_name="blocks.0.hook_attn_out"),
    )
    assert call(*check, foreign).code == 0, "as wide, and nothing in the file says that it is another site's"
    wide = copied(
        sae,
        tmp_path / "wide",
        lambda c: c["metadata"].update(glasshouse=None, hook_name="blocks.0.mlp.hook_post"),
    )
    refused(call(*check, wide), 4, "24", "48")


def test_a_truncated_dictionary_is_refused_by_its_file(model: Path, sae: Path, tmp_path: Path) -> None:
    cut = copied(sae, tmp_path / "cut")
    file = cut / "sae_weights.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refused(call("lens", "train", model, "--check", cut), 4, str(file))


def test_more_features_than_memory_holds_are_refused_with_how_many_fit(model: Path) -> None:
    done = call("lens", "train", model, "--site", SITE, "--width", 16_000_000_000)
    refused(done, 2, "GB", "at most about", "--width")


def test_a_prompt_longer_than_the_context_is_refused_where_it_stands(model: Path, tmp_path: Path) -> None:
    long = "baro " * 60
    refused(call("lens", "attribute", model, "--text", "mite", "--text", long), 3, "text 2", "context of 48")
    rows = [*labelled(), {"text": long, "label": 1, "group": "x", "evidence": []}]
    path = write_lines(tmp_path / "long.jsonl", rows)
    refused(call("lens", "probe", model, "--data", path), 3, "row 49", "context of 48")


def test_pairs_that_cannot_be_patched_are_refused_by_line(model: Path, tmp_path: Path) -> None:
    good = {"clean": "ba baro mite", "corrupt": "ba mite baro", "right": " shalu", "wrong": " foker"}
    for change, said in (
        ({"corrupt": "mite mite mite mite"}, "patching needs the same number"),
        ({"wrong": " shalu"}, "the same token"),
        ({"clean": 3}, "'clean' must be text"),
    ):
        path = write_lines(tmp_path / "pairs.jsonl", [good, good | change])
        refused(call("lens", "circuit", model, "--pairs", path), 3, "line 2", said)


def test_a_folder_that_is_there_is_never_written_over(model: Path, sae: Path, words: Path) -> None:
    before = (sae / "cfg.json").read_bytes()
    refused(
        call("lens", "train", model, "--site", SITE, *SMALL, "--text", words, "--out", sae),
        2,
        "is there already",
    )
    assert (sae / "cfg.json").read_bytes() == before


def test_help_lists_the_commands_and_their_options() -> None:
    whole = call("lens", "--help")
    assert whole.code == 0 and all(c in whole.out for c in ("train", "probe", "circuit", "attribute"))
    for name, options in {
        "train": ("--site", "--against", "--resume"),
        "probe": ("--data", "--kind"),
        "circuit": ("--pairs", "--check", "--diff"),
        "attribute": ("--text", "--method"),
    }.items():
        shown = call("lens", name, "--help")
        assert shown.code == 0 and all(o in shown.out for o in options), shown
