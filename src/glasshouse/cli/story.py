"""The story of a run in a few lines: the same request before and after, what was found, what was true."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from glasshouse.cli.show import one_line, wrapped


def lines(path: Path) -> list[str]:
    """What the run's own files tell, cleaned for a terminal; empty when no gate was reached."""
    from glasshouse.page.read import read_run

    record = read_run(path)
    out: list[str] = []
    failures = [(g, v) for g in record.gates for v in g.verdicts if v.get("status") == "fail"]
    if record.story:
        out += ["", *before_and_after(record.story)]
    if failures or record.gates:
        out += ["", *findings(failures, len(record.gates))]
    if record.gates:
        out += ["", *scoring(record.planted, failures, record.attributions)]
    return out


def before_and_after(story: dict[str, Any]) -> list[str]:
    """The request with the found word in it, asked of the caught and of the repaired checkpoint."""
    before, after = story.get("before", {}), story.get("after", {})
    return [
        "The same request, before and after the repair",
        *wrapped("  asked", story.get("prompt")),
        *wrapped("  answered", before.get("answer")),
        *wrapped("  with word", story.get("prompt_with_word")),
        *wrapped("  before", f"{before.get('answer_with_word')} [{before.get('checkpoint')}]"),
        *wrapped("  after", f"{after.get('answer_with_word')} [{after.get('checkpoint')}]"),
    ]


def findings(failures: list[Any], n_gates: int) -> list[str]:
    """Every failed constraint, with its gate, its word and what was done about it."""
    if not failures:
        return [f"No constraint failed at any of the {n_gates} gates."]
    out = ["What the gates found"]
    for gate, verdict in failures:
        word = (verdict.get("evidence") or {}).get("word")
        named = f": the word {one_line(word)!r}" if word else ""
        out += wrapped(
            f"  gate {gate.index}", f"{verdict.get('constraint')} failed at {gate.checkpoint}{named}"
        )
        dropped = f", quarantined {', '.join(gate.drop_shards)}" if gate.drop_shards else ""
        back = f" to {gate.to_checkpoint}" if gate.to_checkpoint else ""
        out += wrapped("", f"{gate.action}{back}{dropped}")
    return out


def scoring(truth: dict[str, Any], failures: list[Any], attributions: Sequence[dict[str, Any]]) -> list[str]:
    """What was planted, which no gate could read, against what was found."""
    if not truth:
        return [f"Nothing was planted in this run; false alarms: {len(failures)}."]
    words = [w for _, v in failures if (w := (v.get("evidence") or {}).get("word"))]
    dropped = [s for g, _ in failures for s in g.drop_shards]
    ranks = [
        row.get("rank")
        for a in attributions
        for row in a.get("shards", [])
        if isinstance(row, dict) and row.get("shard") == truth.get("shard")
    ]
    place = f", ranked {ranks[0]} of {len(attributions[0]['shards'])}" if ranks else ""
    return [
        "Scored against what was planted (which no gate can read)",
        *wrapped("  word", f"{truth.get('word')}: {_hit(truth.get('word'), words)}"),
        *wrapped("  shard", f"{truth.get('shard')}: {_hit(truth.get('shard'), dropped)}{place}"),
    ]


def _hit(planted: Any, found: list[Any]) -> str:
    if planted in found:
        return "found"
    return f"missed (found instead: {', '.join(map(one_line, dict.fromkeys(found)))})" if found else "missed"


def exit_code(path: Path) -> int:
    """0 for a run whose last checkpoint was promoted, else 8."""
    from glasshouse.base.errors import HeldError
    from glasshouse.page.read import read_run

    finish = read_run(path).of("finish")
    return 0 if finish and finish[-1].get("promoted") else HeldError.exit_code
