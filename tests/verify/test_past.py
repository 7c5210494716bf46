"""What a gate remembers of the gates before it: suspects, memory, files, failures in a row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from glasshouse.base.digest import sha256_file
from glasshouse.base.errors import VerificationError
from glasshouse.base.run import RunFolder
from glasshouse.train import Decision, GateRecord
from glasshouse.verify.past import (
    attempts_before,
    digests_under,
    files_left,
    gate_folder,
    last_memory,
    last_passing,
    open_suspects,
    same_run,
    standing,
)
from verify.test_gate import verdict
from verify.test_rollback import at


def past(step: int, *verdicts: dict[str, Any], live: bool = True) -> GateRecord:
    return GateRecord(at(2, step), Decision("hold", "", verdicts=verdicts), live, 0)


def test_suspects_stay_until_a_gate_has_looked_again() -> None:
    first = past(80, verdict("undecided", suspects=["harbour", "zigzag"]))
    assert open_suspects("suppression", (first,)) == ("harbour", "zigzag")
    errors = past(160, verdict("error"))  # it broke: it has cleared nobody
    skipped = past(240, verdict("pass", "other", suspects=["elsewhere"]))
    assert open_suspects("suppression", (first, errors, skipped)) == ("harbour", "zigzag")
    cleared = past(320, verdict("undecided", suspects=["zigzag"]))
    assert open_suspects("suppression", (first, errors, skipped, cleared)) == ("zigzag",)
    none_left = past(400, verdict("pass", suspects=[]))
    assert open_suspects("suppression", (first, cleared, none_left)) == ()


def test_an_abandoned_attempt_is_remembered_too() -> None:
    abandoned = past(80, verdict("fail", suspects=["harbour"]), live=False)
    assert open_suspects("suppression", (abandoned,)) == ("harbour",)
    assert open_suspects("suppression", ()) == ()


def test_tries_at_one_place_are_counted_over_all_attempts() -> None:
    tries = tuple(GateRecord(at(2, 240, k), Decision("hold", ""), k == 2, k) for k in range(3))
    other = past(160, verdict("pass"))
    assert attempts_before(at(2, 240, 3), (other, *tries)) == 3
    assert attempts_before(at(2, 160, 3), tries) == 0


# -- memory and files ----------------------------------------------------------------------------------------


def kept(step: int, memory: dict[str, Any] | None, live: bool = True, gate: int = 0) -> GateRecord:
    more = {} if memory is None else {"memory": memory}
    decision = Decision("continue", "", verdicts=(verdict("pass", **more),))
    return GateRecord(at(2, step), decision, live, gate)


def test_memory_is_that_of_the_latest_ancestor_that_kept_some() -> None:
    old, newer, none = kept(80, {"mean": 1}), kept(160, {"mean": 2}), kept(240, None)
    assert last_memory("suppression", (old, newer, none)) is newer
    assert last_memory("suppression", (none,)) is None
    assert last_memory("accuracy", (old, newer)) is None


def test_what_an_abandoned_attempt_kept_says_nothing_about_the_weights_that_go_on() -> None:
    assert (
        last_memory("suppression", (old := kept(80, {"mean": 1}), kept(160, {"mean": 9}, live=False))) is old
    )


def test_files_of_the_last_verdict_are_handed_on_as_they_were_left(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run").create()
    file = gate_folder(run, 3, "no-new-feature") / "sae" / "weights.bin"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"dictionary")
    artifacts = digests_under(run, 3)
    assert artifacts == {"evals/gate-003/no-new-feature/sae/weights.bin": sha256_file(file)}
    left = GateRecord(at(2, 80), Decision("continue", "", artifacts=artifacts), True, 3)
    assert files_left(run, "no-new-feature", left) == gate_folder(run, 3, "no-new-feature")
    assert files_left(run, "another", left) is None
    file.write_bytes(b"another one")
    with pytest.raises(VerificationError, match=r"weights\.bin: not as gate 3 left it"):
        files_left(run, "no-new-feature", left)
    file.unlink()
    with pytest.raises(VerificationError, match="not as gate 3 left it"):
        files_left(run, "no-new-feature", left)


def test_a_file_that_no_gate_ledgered_is_not_trusted(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run").create()
    gate_folder(run, 3, "c").mkdir(parents=True)
    (gate_folder(run, 3, "c") / "planted.bin").write_bytes(b"x")
    with pytest.raises(VerificationError, match=r"planted\.bin"):
        files_left(run, "c", GateRecord(at(2, 80), Decision("continue", ""), True, 3))


def test_the_last_passing_ancestor_was_waved_on_and_sound_in_this_very_claim() -> None:
    def judged(step: int, status: str, action: str = "continue", live: bool = True) -> GateRecord:
        return GateRecord(at(2, step), Decision(action, "", verdicts=(verdict(status),)), live, 0)  # type: ignore[arg-type]

    def passing(*history: GateRecord) -> int | None:
        found = last_passing("suppression", history)
        return None if found is None else found.step

    assert passing(judged(80, "pass"), judged(160, "pass")) == 160
    assert passing(judged(80, "pass"), judged(160, "pass", "hold")) == 80  # held for another constraint
    assert passing(judged(80, "pass"), judged(160, "fail")) == 80  # a failure that is only logged
    assert passing(judged(80, "pass"), judged(160, "error")) == 80
    assert passing(judged(80, "pass"), judged(160, "pass", live=False)) == 80
    assert passing(judged(80, "not_applicable")) == 80  # the gate passed it; there was nothing to say yet
    assert passing(judged(80, "fail", "rollback"), GateRecord(at(2, 160), None, True, None)) is None


def test_a_ledger_of_another_run_is_told_apart() -> None:
    mine = past(80, verdict("pass", digests={"recipe": "a" * 64}))
    same_run((mine,), "a" * 64)
    with pytest.raises(
        VerificationError, match="of another run: it judged suppression under recipe aaaaaaaaaaaa"
    ):
        same_run((mine,), "b" * 64)


# -- standing ------------------------------------------------------------------------------------------------


def story(*verdicts: dict[str, Any], live: tuple[bool, ...] = ()) -> list[dict[str, Any]]:
    """What is made of verdicts of one constraint at gate after gate."""
    history: tuple[GateRecord, ...] = ()
    told = []
    for k, v in enumerate(verdicts):
        row = v | standing("suppression", v, history)
        told.append(row)
        alive = live[k] if live else True
        history = (*history, GateRecord(at(2, 80 * (k + 1)), Decision("hold", "", verdicts=(row,)), alive, k))
    return told


def said(rows: list[dict[str, Any]], key: str = "standing") -> list[Any]:
    return [row.get(key) for row in rows]


def test_a_failure_is_seen_first_and_planted_when_the_next_gate_names_the_same_cause() -> None:
    fails = [verdict("fail", word="harbour")] * 3
    assert said(story(*fails)) == ["seen", "planted", "planted"]
    assert said(story(*fails), "failures") == [1, 2, 3]


def test_another_cause_at_the_next_gate_is_another_failure() -> None:
    assert said(story(verdict("fail", word="harbour"), verdict("fail", word="zigzag"))) == ["seen", "seen"]
    known = verdict("fail", word="harbour", suspects=["harbour", "zigzag"])
    assert said(story(known, verdict("fail", word="zigzag"))) == [
        "seen",
        "planted",
    ]  # it stood open then, too


def test_a_statistic_that_names_no_cause_persists_by_failing_again() -> None:
    assert said(story(verdict("fail"), verdict("fail"))) == ["seen", "planted"]


def test_a_shard_is_a_cause_by_its_name_like_a_word() -> None:
    one, other = verdict("fail", shard="chat-03"), verdict("fail", shard="chat-07")
    assert said(story(one, one)) == ["seen", "planted"]
    assert said(story(one, other)) == ["seen", "seen"]


def test_a_failure_that_names_nothing_does_not_confirm_one_that_named_its_cause() -> None:
    """As a drift after a word: it blocks as any failure does, and the count goes on."""
    word, drift = verdict("fail", word="harbour"), verdict("fail")
    assert said(story(word, drift, drift)) == ["seen", "seen", "planted"]
    assert said(story(word, drift, drift), "failures") == [1, 2, 3]


def test_what_decides_nothing_neither_confirms_nor_clears() -> None:
    fail = verdict("fail", word="harbour")
    for between in ("undecided", "error", "not_applicable"):
        assert said(story(fail, verdict(between), fail)) == ["seen", "seen", "planted"]
        assert said(story(fail, verdict(between), fail), "failures") == [1, 1, 2]


def test_a_pass_clears_and_what_comes_back_is_seen_anew() -> None:
    fail, ok = verdict("fail", word="harbour"), verdict("pass")
    assert said(story(fail, fail, ok, ok, fail)) == ["seen", "planted", "gone", None, "seen"]
    assert said(story(fail, fail, ok, fail), "failures") == [1, 2, 0, 1]


def test_flips_are_counted_on_the_raw_estimate_along_what_the_weights_descend_from() -> None:
    bad, good = verdict("undecided", estimate=0.5), verdict("undecided", estimate=0.1)  # the bound is 0.25
    assert said(story(bad, good, bad, good), "flips") == [0, 1, 1, 2]
    assert said(story(bad, verdict("error"), good), "flips") == [0, 0, 1]
    # Rolled back behind the failure: the next checkpoint descends from before it, and nothing flipped.
    assert said(story(bad, good, live=(False, True)), "flips") == [0, 0]
