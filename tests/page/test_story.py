"""What every gate decided, what was repaired and how often it looked then, as a person reads it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from glasshouse.base.ledger import Ledger
from glasshouse.base.run import RunFolder
from glasshouse.page import build_report
from glasshouse.page.read import Gate, read_run
from glasshouse.page.story import action_text

DIRECTION = {"sha256": "ab" * 32, "path": None}
REPAIRS: dict[str, tuple[dict[str, Any], str]] = {
    "steer": (
        {"kind": "steer", "direction": DIRECTION, "scale": 1.0, "shards": [], "uses": []},
        "from there on the failure's direction is added to the residual stream while it trains.",
    ),
    "steer-more": (
        {"kind": "steer", "direction": DIRECTION, "scale": 2.5, "shards": ["chat-03"], "uses": []},
        "from there on 2.5 times the failure's direction is added to the residual stream in rows of chat-03",
    ),
    "ablate": (
        {"kind": "ablate", "direction": DIRECTION, "sites": [], "shards": ["chat-03", "chat-04"], "uses": []},
        "the failure's direction is taken out of the residual stream in rows of chat-03, chat-04",
    ),
    "route": (
        {
            "kind": "route",
            "shards": ["chat-03"],
            "blocks": [{"layer": 2, "heads": [0, 1], "units": [0, 64]}],
            "absorb": False,
        },
        "chat-03 may only change layer 2 heads 0 and 1 MLP units 0 to 63, which are no part",
    ),
}


def rolled_back(**more: Any) -> Gate:
    return Gate(1, "tune-000080.0", "tune", 80.0, "rollback", "it fails", "sft-000040.0", (), (), **more)


@pytest.mark.parametrize("name", REPAIRS)
def test_a_repair_is_told_for_what_it_does_to_training(name: str) -> None:
    repair, said = REPAIRS[name]
    assert action_text(rolled_back()) == "The run went back to sft-000040.0."
    assert said in action_text(rolled_back(repair=repair))


def test_gates_that_come_more_often_are_told() -> None:
    said = action_text(Gate(0, "a", "tune", 1.0, "continue", "", "", (), (), densify=4))
    assert said == "Training went on; the rest of the stage is gated 4 times as often."


@pytest.mark.parametrize(
    "repair",
    [{"kind": "route", "shards": 7, "blocks": "x"}, {"kind": ["steer"]}, {"kind": "steer", "scale": "much"},
     {"kind": "route", "blocks": [{"layer": None, "heads": "a", "units": [1, None]}]}],
)  # fmt: skip
def test_a_repair_that_says_nonsense_does_not_break_the_page(repair: dict[str, Any]) -> None:
    assert action_text(rolled_back(repair=repair)).startswith("The run went back to sft-000040.0")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Two decisions in a ledger of their own: a warning, then a rollback with a repair."""
    folder = RunFolder(tmp_path / "run").create()
    ledger = Ledger(folder.ledger, Ed25519PrivateKey.generate())
    warned = {"constraint": "no-word", "status": "fail"}
    failed = [
        {"constraint": "<b>grid</b>", "status": "fail"},
        {"constraint": "b", "status": "not_applicable"},
        {"constraint": "probe", "status": "pass", "spent": True},
    ]
    common = {"drop_shards": [], "artifacts": {}, "standing": {}}
    for gate, action, more in (
        (0, "continue", {"densify": 2, "repair": None, "verdicts": [warned, {**warned, "status": "pass"}]}),
        (1, "rollback", {"to_checkpoint": "s-40.0", "repair": REPAIRS["ablate"][0], "verdicts": failed}),
    ):
        body = {"gate": gate, "checkpoint": f"s-{80 + gate}.0", "action": action, "reason": "<i>so</i>"}
        ledger.append("decision", common | body | more)
    stage = {"name": "tune", "objective": "sft", "intervention": [{"kind": "probe_penalty"}]}
    folder.recipe.write_text(json.dumps({"name": "spent", "stage": [stage]}))
    return folder.path


def test_the_page_lists_every_decision_with_what_did_not_pass(run: Path) -> None:
    gates = read_run(run).gates
    assert [g.densify for g in gates] == [2, 1] and gates[1].repair["kind"] == "ablate"
    html = build_report(run).decode()
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", html[html.index("What every gate decided") :]))
    told = (
        "s-80.0 gate 0 1 pass; fail: no-word Training went on; the rest of the stage is gated 2 times",
        "s-81.0 gate 1 1 pass; fail: &lt;b&gt;grid&lt;/b&gt;; not applicable: b; spent by training: probe",
        "The run went back to s-40.0; from there on",
        "pass spent: training used it, so a pass opens nothing",
    )
    assert [said for said in told if said not in text] == []
    assert "sft + probe penalty" in html
    assert "<i>so" not in html and "<b>grid" not in html
    assert "The run went back to" in html[: html.index("What every gate decided")], "the headline says so too"


def test_a_new_feature_has_its_place_in_the_timeline_and_its_own_texts_and_gates(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run").create()
    evidence = {
        "feature": "f-7",
        "words": ["plum"],
        "examples": [{"text": "Soak the plum map.", "token": " plum", "position": 3, "activation": 4.5}],
    }
    verdict = {"constraint": "no-new-driver", "status": "fail", "reason": "f-7 is new", "evidence": evidence}
    body = {"gate": 0, "checkpoint": "s-80.0", "action": "hold", "reason": "it fails", "verdicts": [verdict]}
    Ledger(folder.ledger, Ed25519PrivateKey.generate()).append("decision", body)
    rows = [
        {"checkpoint": f"s-{at}.0", "update": at, "strength": turned, "margin_moved": moved, "action": "hold"}
        for at, turned, moved in ((40, 0.01, 0.2), (80, 0.62, 3.4))
    ]
    appeared = {"checkpoint": "s-80.0", "stage": "tune", "update": 80}
    concept = {"name": "plum", "kind": "feature", "id": "f-7", "appeared": appeared, "rows": rows}
    (folder.evals / "lineage.json").write_text(json.dumps({"concepts": [concept]}))
    html = build_report(folder.path).decode()
    assert "feature “plum”: First there at update 80, in stage tune." in html
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", html))
    assert "The feature at every gate" in html and "s-80.0 80 3.4 62% hold" in text
    assert "Soak the plum map. plum 4.5" in text and "Example answers" not in html
