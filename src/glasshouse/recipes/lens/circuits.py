"""`lens.circuit`: which edges carry a behaviour, what they are worth, and what became of them elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
import torch

from glasshouse.base.errors import UsageError, suggest
from glasshouse.base.score import Score, rate
from glasshouse.interp.circuits import (
    METHODS,
    Circuit,
    EdgeScores,
    Faithfulness,
    Patcher,
    completeness,
    faithfulness,
    mib_curve,
    minimality,
    recovered,
    score_edges,
)
from glasshouse.interp.circuits.ablation import Kind
from glasshouse.interp.circuits.circuit import measured
from glasshouse.recipes.api import Loaded
from glasshouse.recipes.lens.data import Target, about, opened
from glasshouse.recipes.lens.report import Finding
from glasshouse.recipes.lens.tasks import Task, answered, task

RECOVER = 0.8  # of the behaviour, which the circuit must keep on the rows it is found on
SIZES = 32  # circuit sizes that are tried
RANDOM = 20  # random circuits of equal size beside each
MOST = 300  # edges up to which every one is tested for being needed
SHOWN = 20  # edges in the table
ABLATIONS = get_args(Kind)


def circuit(
    model: Target,
    pairs: str | Path,
    *,
    method: str = "eap-ig",
    ablation: str = "corrupt",
    edges: int | None = None,
    chat: bool = False,
    seed: int = 0,
    out: str | Path | None = None,
    diff: str | Path | None = None,
) -> Finding[Circuit]:
    """Find a circuit on the even rows of a contrast and measure it on the odd ones.

    ``pairs``: "induction", "refusal", or a JSON-lines file of {"clean", "corrupt", "right", "wrong"}.
    ``edges``: its size; None: the smallest that keeps `RECOVER` of the behaviour on the rows it is found on
    (or what the method itself chose). ``out``: a MIB circuit file. ``diff``: another to compare with.
    DataError for unusable rows; UsageError for an unknown method, or a model that has no such behaviour.
    """
    found = opened(model)
    kind = check_names(method, ablation)
    told = task(found, pairs, chat=chat, seed=seed, same=ablation in ("mean", "resample"))
    if len(told.contrast) < 4:
        raise UsageError(
            f"{told.source}: {len(told.contrast)} pairs are too few; half find the circuit and half measure "
            "it: give 4 or more, better 50"
        )
    search, test = told.contrast.halves()
    patcher = Patcher(found.model, search, kind)
    scores = score_edges(patcher, method)
    kept = chosen(patcher, scores, edges)
    held = Patcher(found.model, test, kind)
    worth = faithfulness(held, kept, random=RANDOM, seed=seed)
    kept = measured(kept, worth.recovered)
    rows = [*answers(found, told), *worth_rows(worth), *inner(held, kept, seed)]
    curve = mib_curve(held, scores, random=3, seed=seed)
    rows += [
        ("CPR (area under recovered)", curve.cpr),
        ("CPR of rankings by chance", curve.random_cpr),
        ("CMD (area under |1 - recovered|)", curve.cmd),
        ("CMD of rankings by chance", curve.random_cmd),
    ]
    if out is not None:
        kept.save(out)
    finding = told_of(found, told, kept, worth, rows)
    shown = replace(finding, parts=(*finding.parts, curve, scores), title=f"Circuit of {told.source}")
    return shown if diff is None else compared(shown, diff)


def check(
    model: Target,
    file: str | Path,
    pairs: str | Path,
    *,
    ablation: str | None = None,
    chat: bool = False,
    seed: int = 0,
    diff: str | Path | None = None,
) -> Finding[Circuit]:
    """Measure a saved circuit on this model, beside random circuits; all rows are new to it.

    ``ablation`` None: the one that it was found under. CheckpointError for a damaged file, UsageError for one
    of another shape of model.
    """
    found, saved = opened(model), Circuit.load(file)
    recorded = saved.about.ablation.partition(",")[0]
    kind = check_names("eap", ablation or (recorded if recorded in ABLATIONS else "corrupt"))
    told = task(found, pairs, chat=chat, seed=seed, same=kind in ("mean", "resample"))
    saved.fits(found.model)
    patcher = Patcher(found.model, told.contrast, kind, split_input=saved.graph.split_input)
    worth = faithfulness(patcher, saved, random=RANDOM, seed=seed)
    rows = [*answers(found, told), *worth_rows(worth)]
    if saved.recovered is not None:
        rows.append(("recovered when it was found", saved.recovered))
    finding = told_of(found, told, saved, worth, rows)
    note = "" if worth.same_model else "The circuit was found on other weights than these."
    shown = replace(finding, notes=(*finding.notes, *([note] if note else [])))
    return shown if diff is None else compared(shown, diff)


def check_names(method: str, ablation: str) -> Kind:
    """The ablation. UsageError with the nearest name for an unknown method or ablation."""
    for name, known, what in ((method, METHODS, "method"), (ablation, ABLATIONS, "ablation")):
        if name not in known:
            raise UsageError(f"no {what} {name!r}.{suggest(name, known)} There are {', '.join(known)}")
    return cast(Kind, ablation)


def chosen(patcher: Patcher, scores: EdgeScores, edges: int | None) -> Circuit:
    """The circuit of a size that is asked for, that the method chose, or that recovers enough."""
    if edges is not None:
        return _not_empty(scores.circuit(edges, prune=True), edges)
    if scores.chosen is not None:
        return _not_empty(scores.circuit(prune=True), int(scores.chosen.sum()))
    graph, total = patcher.graph, len(patcher.graph.edges)
    sizes = np.unique(np.geomspace(1, total, SIZES).astype(int))
    sets = np.stack([graph.prune(graph.top(scores.values, int(n))) for n in sizes])
    enough = np.flatnonzero((recovered(patcher, sets) >= RECOVER) & sets.any(1))
    return scores.circuit(int(sizes[enough[0]]) if len(enough) else total, prune=True)


def _not_empty(found: Circuit, edges: int) -> Circuit:
    if not len(found):
        raise UsageError(
            f"none of the {edges} strongest edges is on a way from the input to the logits; ask for more "
            "(--edges)"
        )
    return found


def answers(found: Loaded, told: Task) -> list[tuple[str, Score | str]]:
    """How often the model does what is explained: without that, a circuit explains nothing."""
    clean, corrupt = answered(found, told.contrast)
    if not bool(torch.isfinite(clean).all() and torch.isfinite(corrupt).all()):
        raise UsageError("the model's answers are not finite numbers: look for NaN in its weights")
    return [
        ("clean rows that prefer the right answer", rate(int((clean > 0).sum()), len(clean))),
        ("corrupt rows that do", rate(int((corrupt > 0).sum()), len(corrupt))),
    ]


def worth_rows(worth: Faithfulness) -> list[tuple[str, Score | str]]:
    """A circuit's faithfulness as rows."""
    return [
        ("edges", f"{worth.size:,} of {worth.edges:,}"),
        ("circuit alone recovers", worth.recovered),
        ("random circuits of equal size recover", worth.random),
        ("random circuits that recover less", worth.beaten),
        ("left without the circuit", worth.left),
        ("left without random circuits", worth.random_left),
        ("KL(model || circuit), nats", worth.kl),
    ]


def inner(patcher: Patcher, kept: Circuit, seed: int) -> list[tuple[str, Score | str]]:
    """Completeness and, for circuits of up to `MOST` edges, minimality."""
    rows: list[tuple[str, Score | str]] = [
        ("completeness gap (0 is complete)", completeness(patcher, kept, seed=seed).gap)
    ]
    if len(kept) <= MOST:
        rows.append(("edges that are needed", minimality(patcher, kept, seed=seed).needed))
    return rows


def told_of(
    found: Loaded, told: Task, kept: Circuit, worth: Faithfulness, rows: list[tuple[str, Score | str]]
) -> Finding[Circuit]:
    """What both ways report."""
    made = kept.about
    facts = about(
        found,
        task=told.source,
        rows=len(told.contrast),
        method=made.method,
        metric=made.metric,
        ablation=worth.ablation,
        found_on_weights=made.model,
        found_on_data=made.data,
    )
    strongest = {name: float(kept.scores[kept.graph.number[name]]) for name in kept.edges[:SHOWN]}
    data: Mapping[str, Any] = {"edges": strongest, "found": asdict(made)}
    return Finding("Circuit checked again", kept, rows, facts, data, (kept,), told.notes)


def compared(finding: Finding[Circuit], other: str | Path) -> Finding[Circuit]:
    """The finding, with what changed between another circuit file and it."""
    change = Circuit.load(other).diff(finding.found)
    rows = [*finding.rows, (f"beside {Path(other).name}", str(change))]
    lists = {"removed": list(change.removed), "added": list(change.added), "shared": list(change.shared)}
    data = {**finding.data, "diff": {"other": Path(other).name, "overlap": change.overlap, **lists}}
    return replace(finding, rows=rows, data=data, parts=(*finding.parts, change))
