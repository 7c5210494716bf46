"""`glasshouse train` on bad input: the file, key or value is named, and what to do about it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cli.command import call, entries
from cli.conftest import FAILING


def replaced(recipe: Path, old: str, new: str) -> Path:
    text = recipe.read_text("utf-8")
    assert old in text
    recipe.write_text(text.replace(old, new, 1), "utf-8")
    return recipe


def test_an_unknown_key_is_refused_with_the_nearest_valid_one(recipe: Path) -> None:
    done = call("train", replaced(recipe, "batch_size", "batchsize"))
    assert done.code == 2
    assert f"{recipe}: unknown key 'stage.0.batchsize'. Did you mean 'batch_size'?" in done.err.replace(
        "[0]", ".0"
    )
    assert not Path("runs/tiny").exists()


def test_an_unknown_section_is_refused_with_the_nearest_valid_one(recipe: Path) -> None:
    done = call("train", replaced(recipe, "[tokenizer]", "[tokeniser]"))
    assert done.code == 2 and "Did you mean 'tokenizer'?" in done.err


def test_a_wrong_type_is_named_with_its_key_and_value(recipe: Path) -> None:
    done = call("train", recipe, "stage.sft.steps=many")
    assert done.code == 2
    assert "steps" in done.err and "integer" in done.err and '"many"' in done.err


def test_an_override_that_is_none_shows_the_form(recipe: Path) -> None:
    done = call("train", recipe, "seed")
    assert done.code == 2 and "key=value" in done.err


def test_a_missing_recipe_and_a_misspelt_packaged_one_are_named() -> None:
    missing, misspelt = call("train", "nowhere/x.toml"), call("train", "dmo")
    assert missing.code == misspelt.code == 2
    assert "nowhere/x.toml" in missing.err
    assert "Did you mean 'demo'?" in misspelt.err and "demo-clean" in misspelt.err


def test_a_missing_data_file_is_named(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "words.jsonl").unlink()
    done = call("train", recipe, "--run", tmp_path / "run")
    assert done.code == 2 and "words.jsonl: no such file" in done.err


def test_an_empty_corpus_is_refused(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "words.jsonl").write_bytes(b"")
    done = call("train", recipe, "--run", tmp_path / "run", "--quiet")
    assert done.code == 3 and "words.jsonl" in done.err and "empty" in done.err


def test_a_corpus_shorter_than_the_context_is_refused_with_both_numbers(recipe: Path, tmp_path: Path) -> None:
    rows = [{"text": f"A short line, number {i}."} for i in range(10)]
    (tmp_path / "words.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), "utf-8")
    short = replaced(
        recipe, "[data.workshop]\nshards = 2\ndocuments = 40\nvalidation = 16\nstrays = 10\n", ""
    )
    text = short.read_text("utf-8")
    stages, _, _ = text.partition('[[stage]]\nname = "sft"')
    short.write_text(stages.replace("context = 96", "context = 4000"), "utf-8")
    done = call("train", short, "--run", tmp_path / "run", "--quiet")
    assert done.code == 3
    assert "context 4000" in done.err and "lower the context" in done.err


def test_bytes_that_are_not_utf8_are_named_with_their_place(recipe: Path, tmp_path: Path) -> None:
    words = tmp_path / "words.jsonl"
    words.write_bytes(words.read_bytes() + b'{"text": "caf\xe9"}\n')
    done = call("train", recipe, "--run", tmp_path / "run", "--quiet")
    assert done.code == 3 and "not UTF-8 at byte" in done.err and "words.jsonl" in done.err
    recipe.write_bytes(b"# caf\xe9\n" + recipe.read_bytes())
    done = call("train", recipe)
    assert done.code == 2 and f"{recipe}: not UTF-8 at byte 5" in done.err


def test_a_failed_preparation_leaves_a_folder_that_can_be_used_again(recipe: Path, tmp_path: Path) -> None:
    words = tmp_path / "words.jsonl"
    good = words.read_bytes()
    words.write_bytes(b"")
    assert call("train", recipe, "--run", tmp_path / "run", "--quiet").code == 3
    words.write_bytes(good)
    assert call("train", recipe, "--run", tmp_path / "run", "--quiet").code == 0


def test_a_model_that_could_never_be_exported_is_refused_before_training(recipe: Path) -> None:
    done = call("train", replaced(recipe, 'mlp = "gated"', 'mlp = "plain"'))
    assert done.code == 2 and "nothing could be promoted" in done.err


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_last_good_checkpoint(
    recipe: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    done = call("train", recipe, "stage.sft.adam_lr=1e30", "--run", run, "--quiet")
    assert done.code == 7
    assert "stage 'sft'" in done.err and "not finite" not in done.out
    assert "the last good checkpoint is" in done.err and "adam_lr" in done.err
    assert (run / "report.html").is_file()
    assert call("ledger", "verify", run).code == 0


def test_a_run_that_is_there_is_not_begun_again(recipe: Path, finished: Path) -> None:
    done = call("train", recipe, "--run", finished)
    assert done.code == 2 and "add --resume" in done.err


def test_resuming_a_finished_run_says_again_how_it_ended(finished: Path) -> None:
    before = entries(finished)
    done = call("train", finished.parent / "tiny.toml", "--run", finished, "--resume", "--quiet")
    assert done.code == 0 and done.out.startswith("promoted     sft-000008.0")
    assert entries(finished) == before


def test_a_failing_constraint_holds_the_checkpoint_and_the_report_says_why(held: Path) -> None:
    assert "complies-rarely" in (held / "report.html").read_text("utf-8")
    assert entries(held, "finish")[-1]["body"]["promoted"] is False


def test_a_stopped_run_waits_for_a_named_person(recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    line = [
        "train",
        recipe,
        *FAILING,
        "constraint.0.on_fail=stop",
        "stage.sft.gate_every=8",
        "--run",
        run,
        "-q",
    ]
    done = call(*line)
    assert done.code == 11 and "waits for a person" in done.err
    assert (run / "report.html").is_file()
    assert call(*line, "--resume").code == 11
    done = call(*line, "--resume", "--after-stop", "Ada")
    assert done.code == 8
    assert entries(run, "resume")[-1]["body"]["who"] == "Ada"


def test_a_recipe_without_constraints_promotes_nothing_and_says_so(recipe: Path, tmp_path: Path) -> None:
    bare = recipe.with_name("bare.toml")
    bare.write_text(recipe.read_text("utf-8").partition("[[constraint]]")[0], "utf-8")
    done = call("train", bare, "stage.sft.steps=1", "--run", tmp_path / "run", "-q")
    assert done.code == 0 and "declares no constraint" in done.out


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run folder made by accident lands in the test's own folder."""
    monkeypatch.chdir(tmp_path)
