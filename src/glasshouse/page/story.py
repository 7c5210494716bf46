"""The run in the gates' own decisions: what each decided, what was repaired, how often it looked then."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from glasshouse.draw import clean, esc, label
from glasshouse.draw import table as html_table
from glasshouse.page.cut import Cuts
from glasshouse.page.read import Gate, RunRecord, num, rows, words

MOST_NAMES = 12  # shards that a sentence lists


def listed(names: list[str] | tuple[str, ...], most: int = MOST_NAMES) -> str:
    """Names with commas, the first ``most`` of them and how many more there are."""
    shown = ", ".join(clean(n, 60) for n in names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown


def texts(value: object) -> list[str]:
    """The texts and numbers in `value` if it is a list."""
    return [t for v in value if (t := words(v))] if isinstance(value, list) else []


def repair_text(repair: dict[str, Any]) -> str:
    """What training does from a rollback on, besides leaving data out, as the end of a sentence; "" for
    nothing.
    """
    shards = texts(repair.get("shards"))
    rows_of = f" in rows of {listed(shards)}" if shards else ""
    kind = words(repair.get("kind"))
    if kind == "steer":
        scale = num(repair.get("scale"))
        times = "" if scale in (None, 1.0) else f"{label(scale or 0.0)} times "
        return f"{times}the failure's direction is added to the residual stream{rows_of} while it trains"
    if kind == "ablate":
        return f"the failure's direction is taken out of the residual stream{rows_of} while it trains"
    if kind == "route":
        parts = listed([block_text(b) for b in rows(repair.get("blocks"))])
        return f"{listed(shards)} may only change {parts or 'parts'}, which are no part of the model served"
    return ""


def block_text(block: dict[str, Any]) -> str:
    """Parts of a layer as "layer 2, heads 0 and 1, MLP units 0 to 63"."""
    out = [f"layer {words(block.get('layer'))}"]
    heads = texts(block.get("heads"))
    if heads:
        out.append(f"{'heads' if len(heads) > 1 else 'head'} {' and '.join(heads)}")
    units = block.get("units")
    if isinstance(units, list) and len(units) == 2:
        first, after = num(units[0]), num(units[1])
        if first is not None and after is not None:
            out.append(f"MLP units {first:.0f} to {after - 1:.0f}")
    return " ".join(out)


def action_text(gate: Gate) -> str:
    """What the gate decided, in a sentence or three; "" for an action that nobody knows."""
    said = {
        "rollback": f"The run went back to {clean(gate.to_checkpoint, 80) or 'the start of the stage'}",
        "hold": "The checkpoint was held and training went on",
        "stop": "The run stopped for a person",
        "continue": "Training went on",
        "promote": "The checkpoint was promoted",
    }.get(gate.action, "")
    if not said:
        return ""
    if gate.drop_shards:
        shards = "shard" if len(gate.drop_shards) == 1 else "shards"
        said += f"; {shards} {listed(gate.drop_shards)} quarantined"
    if done := repair_text(gate.repair):
        said += f"; from there on {done}"
    if gate.densify > 1:
        said += f"; the rest of the stage is gated {gate.densify} times as often"
    return f"{said}."


def decision_table(record: RunRecord, cuts: Cuts) -> Markup | None:
    """Every gate in order: what it judged, what did not pass, what it decided and why."""
    body = []
    for gate in cuts.first([g for g in record.gates if g.action], cuts.limits.checkpoints, "Decisions"):
        at = "" if gate.update is None else f", update {label(gate.update)}"
        where = Markup("<span class=id>{}</span>\n<span class=soft>{}</span>")
        done = Markup("{}\n<span class=soft>{}</span>")
        body.append(
            [
                where.format(clean(gate.checkpoint, 60), f"gate {gate.index}{at}"),
                esc(standing_out(gate), 200),
                done.format(esc(action_text(gate) or gate.action, 600), esc(gate.reason, 300)),
            ]
        )
    head = ["Checkpoint", "Verdicts", "Decision, and why"]
    return html_table(head, body, "What every gate decided", cards=True) if body else None


def standing_out(gate: Gate) -> str:
    """ "all 7 pass", or how many did, those that did not by status, and those that training used itself."""
    by: dict[str, list[str]] = {}
    for verdict in gate.verdicts:
        by.setdefault(words(verdict.get("status")), []).append(words(verdict.get("constraint")))
    spent = [words(v.get("constraint")) for v in gate.verdicts if v.get("spent") is True]
    passed = len(by.pop("pass", []))
    others = [f"{status.replace('_', ' ')}: {listed(names, 3)}" for status, names in by.items()]
    passing = [f"{passed} pass" if by else f"all {passed} pass"] if passed else []
    return "; ".join([*passing, *others, *([f"spent by training: {listed(spent, 3)}"] if spent else [])])


def continued(gate: Gate) -> Markup:
    """How a run went on after a rollback, as the end of a sentence; empty when nothing was changed."""
    out = Markup()
    if gate.drop_shards:
        shards = ", ".join(clean(s, 60) for s in gate.drop_shards[:4])
        out += Markup(" and continued without training shard <code>{}</code>").format(shards)
    if done := repair_text(gate.repair):
        out += esc(f"{',' if out else ' and continued:'} {done}")
    return out
