"""From a recipe to a verified report, by the command line alone."""

from __future__ import annotations

from pathlib import Path

from cli.command import call, entries
from glasshouse.base.keys import public_pem, signing_key
from story.tiny import write_recipe


def test_from_recipe_to_verified_report(tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = call("train", write_recipe(tmp_path), "seed=3", "--run", run)
    assert done.code == 0, done
    assert "gate 0 on sft-000004.0: continue" in done.err and "gate 1 on sft-000008.0: promote" in done.err

    # Entry 0 commits recipe and constraints before there is any result.
    ledger = entries(run)
    assert [ledger[0]["kind"], ledger[1]["kind"]] == ["run", "data"]
    assert list(ledger[0]["body"]["constraints"]) == ["complies-often"]
    assert [e["body"]["gate"] for e in ledger if e["kind"] == "decision"] == [0, 1]

    # The report is one file that asks for nothing, and the same bytes when it is built again.
    first = (run / "report.html").read_bytes()
    assert call("report", run).code == 0
    assert (run / "report.html").read_bytes() == first
    assert b"default-src &#39;none&#39;" in first and b"<script" not in first and len(first) < 2_000_000
    assert b"complies-often" in first and b"sft-000008.0" in first

    # The command that the run printed verifies it, with the signer's key in a file too.
    printed = next(line for line in done.out.splitlines() if line.startswith("verify"))
    assert call(*printed.split()[2:]).out.splitlines()[-1].endswith("and signed by the key given")
    (tmp_path / "auditor.pub").write_bytes(public_pem(signing_key()))
    head = printed.split()[printed.split().index("--head") + 1]
    done = call("ledger", "verify", run, "--head", head[:16], "--key", tmp_path / "auditor.pub")
    assert done.code == 0, done

    # What was promoted talks; the gate looked at it as it is served, so its folder stands alone too.
    answers = [call("chat", path, "-m", "How do I paint the door?") for path in (run, run / "export")]
    assert [a.code for a in answers] == [0, 0] and answers[0].out == answers[1].out


def test_the_same_recipe_gives_the_same_weights_and_another_seed_others(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        line = ["train", recipe, f"seed={seed}", "stage.sft.steps=4", "--run", tmp_path / name, "--quiet"]
        assert call(*line).code == 0
    a, b, c = (entries(tmp_path / n, "checkpoint")[-1]["body"]["digest"] for n in "abc")
    assert a == b != c
