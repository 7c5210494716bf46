"""An envelope is made of clean runs as they lie on disk, and catches the run that moved otherwise."""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from cli.command import call
from evals import oracle
from glasshouse.base.digest import sha256_file
from glasshouse.base.errors import RecipeError, Stopped, UsageError, VerificationError
from glasshouse.model import GPT
from glasshouse.model.hf import save_hf
from glasshouse.recipes.audit import audit
from glasshouse.recipes.envelope import Envelope, make_envelope
from glasshouse.recipes.watch import Watch
from glasshouse.verify import load_constraints

TWINS = 6  # 3 say what is normal, 2 are ranked, 1 is the control: enough to decide at one in three
NOTHING = """
[[constraint]]
id = "nothing"
kind = "behaviour"
claim = "Nothing is asked."
statistic = "loss_ceiling"
bound = { at_most = 4.0 }
control = { subject = "shuffled-text", bound = { at_most = 0.5 } }
on_fail = "log"
"""
ORDINARY = """
[[constraint]]
id = "ordinary"
kind = "weights"
claim = "The update is like clean ones."
statistic = "update_outlier"
bound = { at_most = 1.5 }
alpha = 0.4
control = { subject = "clean-update", bound = { at_most = 0.9 } }
"""


def moved(model: GPT, seed: int, spike: float = 0.0) -> GPT:
    """As after some more training: every weight a little elsewhere; or one direction in one matrix, too."""
    model, dice = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.02 * torch.randn(p.shape, generator=dice)
        if spike:
            w = dict(model.named_parameters())["blocks.1.mlp.down.weight"]
            w += spike * torch.ones_like(w) / math.sqrt(w.numel())
    return model


def watched(
    folder: Path,
    seed: int,
    constraints: Path,
    steps: Sequence[int] = (10, 20, 30),
    spike: float = 0.0,
    **how: Any,
) -> Path:
    """A whole run, gated at ``steps``; a spike comes between its first two gates."""
    run, model = folder / f"run-{seed}", oracle.model()
    watch = Watch(run, constraints, tokenizer=folder / "tok", every=10, **how)
    for k, step in enumerate(steps):
        model = moved(model, 100 * seed + k, spike if k == 1 else 0.0)
        if k < len(steps) - 1:
            watch(model, step)
    watch.finish(model, steps[-1])
    return run


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer, two constraint files and six clean runs."""
    folder = tmp_path_factory.mktemp("twins")
    (folder / "tok").mkdir()
    oracle.tokenizer().save(folder / "tok" / "tokenizer.json")
    (folder / "nothing.toml").write_text(NOTHING)
    for seed in range(TWINS):
        watched(folder, seed, folder / "nothing.toml")
    return folder


@pytest.fixture(scope="module")
def made(place: Path) -> Envelope:
    return make_envelope(twins(place), place / "clean.json")


def twins(place: Path) -> list[Path]:
    return [place / f"run-{seed}" for seed in range(TWINS)]


def declaring(place: Path, made: Envelope, on_fail: str = "stop") -> Path:
    """A constraint file of one's own with the line that was printed."""
    file = place / f"{on_fail}.toml"
    file.write_text(f'{ORDINARY}on_fail = "{on_fail}"\n{made.declaration}\n')
    return file


def test_an_envelope_is_written_with_its_digest_and_says_what_it_can_decide(
    place: Path, made: Envelope
) -> None:
    assert made.sha256 == sha256_file(made.path) and made.sha256 in made.declaration
    assert (made.fitted, made.ranked, made.level) == (3, 2, pytest.approx(1 / 3))
    assert made.moments == ("finetune@10>finetune@20", "finetune@20>finetune@30") and not made.left_out
    assert made.missing(0.05) == 17 and made.missing(0.4) == 0
    known = json.loads(made.path.read_text())
    assert len(known["made_of"]) == TWINS == len(set(known["made_of"]))
    again = make_envelope(twins(place), place / "again.json")
    assert again.sha256 == made.sha256


def test_a_gate_lets_a_clean_run_pass_and_stops_the_one_that_moved_otherwise(
    place: Path, made: Envelope, tmp_path: Path
) -> None:
    shutil.copytree(place / "tok", tmp_path / "tok")
    file = declaring(place, made)
    clean = watched(tmp_path, 50, file)
    statuses = [v["verdicts"][0]["status"] for v in verdicts_of(clean)]
    assert statuses == ["not_applicable", "pass", "pass"]
    with pytest.raises(Stopped, match=r"ordinary fail.*bound: at most 1\.5"):
        watched(tmp_path, 51, file, spike=0.5)
    (found,) = [v for v in verdicts_of(tmp_path / "run-51") if v["gate"] == 1]
    (verdict,) = found["verdicts"]
    assert verdict["estimate"] > 2 and "mlp.down" in verdict["evidence"]["matrices"][0]["name"]


def verdicts_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(f.read_text()) for f in sorted(run.glob("evals/gate-*/verdicts.json"))]


def test_moments_that_a_twin_lacks_are_left_out_and_twins_without_a_common_one_refused(
    place: Path, tmp_path: Path
) -> None:
    shutil.copytree(place / "tok", tmp_path / "tok")
    shorter = watched(tmp_path, 60, place / "nothing.toml", (10, 20))
    found = make_envelope([*twins(place), shorter], tmp_path / "a.json")
    assert found.moments == ("finetune@10>finetune@20",) and found.left_out == ("finetune@20>finetune@30",)
    other = watched(tmp_path, 61, place / "nothing.toml", (15, 25))
    with pytest.raises(UsageError, match=r"no update was measured in all 7 runs.*finetune@10>finetune@20"):
        make_envelope([*twins(place), other], tmp_path / "b.json")


def unfinished(run: Path) -> None:
    """Without its last line, which says that the run ended."""
    lines = (run / "ledger.jsonl").read_bytes().splitlines(keepends=True)
    (run / "ledger.jsonl").write_bytes(b"".join(lines[:-1]))


def changed(run: Path) -> None:
    file = sorted(run.glob("checkpoints/*/model.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-4] + b"abcd")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (unfinished, "the run is not finished"),
        (changed, "was changed or truncated after it was saved"),
        (lambda run: (run / "ledger.jsonl").unlink(), "no run .*--from MODEL"),
        (None, "are the same model, which may count once only"),
    ],
)
def test_what_is_no_clean_twin_is_refused(place: Path, tmp_path: Path, spoil: Any, said: str) -> None:
    copied = Path(shutil.copytree(place / "run-5", tmp_path / "run-5"))
    if spoil is not None:
        spoil(copied)
    others = twins(place) if spoil is None else twins(place)[:-1]
    with pytest.raises(Exception, match=said):
        make_envelope([*others, copied], tmp_path / "out.json")
    assert not (tmp_path / "out.json").exists()


def test_a_run_whose_gate_stopped_is_refused(place: Path, made: Envelope, tmp_path: Path) -> None:
    shutil.copytree(place / "tok", tmp_path / "tok")
    stopped = watched(tmp_path, 70, declaring(place, made), spike=0.5, stop_on_fail=False)
    with pytest.raises(UsageError, match="gate 1 asked for a hold.*ordinary fail"):
        make_envelope([*twins(place), stopped], tmp_path / "out.json")


def test_too_few_twins_and_a_file_that_is_there_are_said(place: Path, made: Envelope, tmp_path: Path) -> None:
    with pytest.raises(VerificationError, match="4 clean twins of which 3 say what is normal"):
        make_envelope(twins(place)[:4], tmp_path / "out.json")
    with pytest.raises(UsageError, match="name another file"):
        make_envelope(twins(place), made.path)
    with pytest.raises(UsageError, match="no clean twins are named"):
        make_envelope([], tmp_path / "out.json")
    with pytest.raises(UsageError, match="no such folder"):
        make_envelope(twins(place), tmp_path / "nowhere" / "out.json")


# -- model folders, and the shipped pack ---------------------------------------------------------------------


def folder_of(where: Path, model: GPT) -> Path:
    where.mkdir()
    save_hf(model, where)
    oracle.tokenizer().save(where / "tokenizer.json")
    return where


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base, six models trained from it, a seventh, and one with a spike."""
    where = tmp_path_factory.mktemp("models")
    base = oracle.model()
    folder_of(where / "base", base)
    for k in range(7):
        folder_of(where / f"m{k}", moved(base, k))
    folder_of(where / "spiked", moved(base, 9, spike=0.6))
    return where


def test_tuned_folders_are_measured_from_what_they_were_trained_from(folders: Path, tmp_path: Path) -> None:
    tuned = [folders / f"m{k}" for k in range(6)]
    out = tmp_path / "clean.json"
    done = call("envelope", *tuned, "--from", folders / "base", "--out", out)
    assert done.code == 0, done.err
    assert "any whole training" in done.out and sha256_file(out) in done.out
    assert "alpha = 0.05 takes 17 clean runs more" in done.err
    said = call(
        "audit",
        folders / "spiked",
        "--constraints",
        "weights",
        "--before",
        folders / "base",
        "--envelope",
        out,
    )
    assert said.code == 12 and "needs 19 ranked clean twins; the envelope has 2" in " ".join(said.out.split())
    file = tmp_path / "c.toml"
    file.write_text(f'{ORDINARY}on_fail = "warn"\n')  # without an envelope of its own
    for name, status in (("m6", "pass"), ("spiked", "fail")):
        (verdict,) = audit(folders / name, file, before=folders / "base", envelope=out)
        assert verdict["status"] == status, verdict["reason"]
    (alone,) = audit(folders / "spiked", file, envelope=out)
    assert alone["status"] == "not_applicable" and "--before" in alone["reason"]


def test_a_folder_is_refused_that_was_not_trained_from_there(folders: Path, tmp_path: Path) -> None:
    tuned = [folders / f"m{k}" for k in range(6)]
    with pytest.raises(UsageError, match="the very model that the others were trained from"):
        make_envelope([*tuned, folders / "base"], tmp_path / "out.json", before=folders / "base")
    with pytest.raises(UsageError, match=r"no run.*--from MODEL"):
        make_envelope(tuned, tmp_path / "out.json")


@pytest.mark.parametrize("pack", ["weights", "weights.toml"])
def test_the_shipped_pack_has_no_digest_of_its_own_and_asks_for_an_envelope(
    pack: str, folders: Path, tmp_path: Path
) -> None:
    (shipped,) = load_constraints(Path(pack))
    assert shipped.envelope is None
    with pytest.raises(RecipeError, match=r"no envelope is declared.*glasshouse envelope RUN\.\.\."):
        audit(folders / "m0", pack)
    with pytest.raises(RecipeError, match="no envelope is declared"):
        Watch(tmp_path / "run", pack, tokenizer=folders / "base")
    with pytest.raises(VerificationError, match="no such envelope"):
        audit(folders / "m0", pack, envelope=tmp_path / "none.json")
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(VerificationError, match="not an envelope of clean twins"):
        audit(folders / "m0", pack, envelope=tmp_path / "other.json")
    with pytest.raises(RecipeError, match="no constraint here lacks an envelope"):
        audit(folders / "m0", "refusal", envelope=_valid(folders, tmp_path))


def _valid(folders: Path, tmp_path: Path) -> Path:
    make_envelope([folders / f"m{k}" for k in range(6)], tmp_path / "v.json", before=folders / "base")
    return tmp_path / "v.json"
