"""Everything that says whether a probe means something, in one call on activations read in one pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from glasshouse.base.errors import UsageError, suggest
from glasshouse.base.score import Score
from glasshouse.interp.probes.causal import Causal, Decision, causal_effect
from glasshouse.interp.probes.controls import (
    Control,
    Leakage,
    Reading,
    control_task,
    evident,
    leakage,
    same_rows,
    settled,
)
from glasshouse.interp.probes.core import LINEAR, Probe, ProbeConfig, shaped
from glasshouse.interp.probes.quality import Calibration, area, calibration
from glasshouse.interp.probes.rows import (
    Array,
    Bools,
    Floats,
    activations,
    classes,
    grouped,
    plain,
    positions,
    split,
)
from glasshouse.interp.probes.show import report_html, report_text

Ints = NDArray[np.int64]
SHARES = (0.4, 0.2, 0.4)  # of meanings: to fit, to choose the site, to test


@dataclass(frozen=True)
class ProbeReport:
    """What a probe found, on what, and what else could explain it. Shows itself in a notebook.

    ``sweep``: AUROC of each site on the rows that choose the site; ``auroc``: of the chosen site, on meanings
    that neither fitted nor chose anything. ``scores``, ``held`` [n_test]: log-odds, labels of ``test_rows``.
    ``rows``, ``meanings``: how many fitted, chose and tested.
    """

    probe: Probe
    site: str
    sweep: Mapping[str, Score]
    auroc: Score
    calibration: Calibration
    control: Control | None
    leakage: Leakage
    causal: Causal | None
    rows: tuple[int, int, int]
    meanings: tuple[int, int, int]
    scores: Floats
    held: Bools
    test_rows: Ints
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data: every number with its interval, and what it was measured on."""
        return {
            "kind": self.probe.config.kind,
            "config": self.probe.config.model_dump(mode="json"),
            "strength": self.probe.strength,
            "model_digest": self.probe.model_digest,
            "width": self.probe.width,
            "site": self.site,
            "rows": dict(zip(("fit", "choose", "test"), self.rows, strict=True)),
            "meanings": dict(zip(("fit", "choose", "test"), self.meanings, strict=True)),
            "layer_sweep": {s: asdict(v) for s, v in self.sweep.items()},
            "auroc": asdict(self.auroc),
            "calibration": asdict(self.calibration),
            "control": None if self.control is None else asdict(self.control),
            "leakage": asdict(self.leakage),
            "causal": None if self.causal is None else asdict(self.causal),
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        return report_text(self)

    def _repr_html_(self) -> str:
        return report_html(self)


def probe_report(
    acts: Mapping[str, Array],
    labels: Array,
    *,
    groups: Sequence[object] | None = None,
    config: ProbeConfig | None = None,
    mask: Array | None = None,
    masked: Mapping[str, Array] | None = None,
    evidence: Array | None = None,
    words: Array | None = None,
    decide: Decision | None = None,
    towards: bool = False,
    edit_sites: Sequence[str] | None = None,
    n_random: int = 8,
    drawn: Literal["sphere", "covariance"] = "sphere",
    labelings: int = 5,
    shares: tuple[float, float, float] = SHARES,
    model_digest: str = "",
    seed: int = 0,
) -> ProbeReport:
    """Fit a probe at every site, choose one, and test it on meanings held out whole.

    ``acts``: site -> [n, d] (attention probes: [n, pos, d] and ``mask`` bool [n, pos]); ``labels`` [n].
    ``groups`` [n]: each row's meaning; rows of one never stand on both sides of a split, they are the control
    task's keys, and intervals count them as the draws. Without groups every row is its own. ``shares`` of
    the meanings fit, choose the site, and test.
    Leakage: ``masked``, site -> activations of the same rows with the concept's own words replaced; or
    ``evidence`` bool [n, pos], positions an attention probe must not read; ``words`` [n, vocabulary], counts
    as ``bag_of_words`` makes them.
    Causal effect of a linear probe: ``decide`` gives the behaviour, under edits, of rows not of class
    ``towards``; ``edit_sites`` (default the chosen site) are edited, ``n_random`` directions drawn as
    ``drawn`` says (see ``causal_effect``).
    UsageError for shapes that do not fit; VerificationError for NaN, one class, or too few meanings.
    """
    config = config or ProbeConfig()
    if not acts:
        raise UsageError("no activations: pass {site: [n, d]} for at least one site")
    readings = _read(acts, config, mask)
    n = len(next(iter(readings.values())).x)
    y, group = classes(labels, n), grouped(groups, n)
    part = split(y, group, shares, seed)
    fit, choose, test = (np.flatnonzero(part == p) for p in range(3))
    probe, sweep = _best(readings, config, y, group, fit, choose, seed)
    probe = replace(probe, model_digest=model_digest)
    site, reading = probe.site, readings[probe.site]
    fixed, scores = settled(config, probe.strength), reading.score(probe, test)
    hidden = _hidden(masked, evidence, reading, site, config, mask)
    counted = None if words is None else activations(words, "words")
    leak = leakage(
        scores, y, (fit, test), group, fixed, probe, masked=hidden, words=counted, seed=seed
    )  # fmt: skip
    control = None
    if groups is not None:
        control = control_task(reading, y, group.astype(str).tolist(), fixed, labelings=labelings, seed=seed)
    causal = None
    if decide is not None and config.kind in LINEAR and probe.weight.any():
        causal = causal_effect(
            probe.direction, reading.x[fit], y[fit], decide, edit_sites or [site], towards=towards,
            n_random=n_random, drawn=drawn, seed=seed
        )  # fmt: skip
    return ProbeReport(
        probe,
        site,
        sweep,
        area(scores, y[test], group[test]),
        calibration(scores, y[test], group[test], seed=seed),
        control,
        leak,
        causal,
        (len(fit), len(choose), len(test)),
        (len(set(group[fit])), len(set(group[choose])), len(set(group[test]))),
        scores,
        y[test],
        test,
        _notes(probe, groups is not None, control, hidden, counted, decide),
    )


def _read(acts: Mapping[str, Array], config: ProbeConfig, mask: Array | None) -> dict[str, Reading]:
    """Every site's activations, checked, with one number of rows."""
    out: dict[str, Reading] = {}
    for site, x in acts.items():
        rows = shaped(activations(x, f"activations of {site}"), config.kind, mask)
        out[site] = Reading(rows, positions(mask, rows) if rows.ndim == 3 else None)
    counts = {site: len(r.x) for site, r in out.items()}
    if len(set(counts.values())) > 1:
        raise UsageError(f"sites have different numbers of rows: {counts}")
    return out


def _best(
    readings: Mapping[str, Reading],
    config: ProbeConfig,
    y: Bools,
    group: Ints,
    fit: Ints,
    choose: Ints,
    seed: int,
) -> tuple[Probe, dict[str, Score]]:
    """The probe of the site that is read best on the rows to choose by, and every site's AUROC there."""
    probes = {s: r.fit(y, fit, config, group, seed) for s, r in readings.items()}
    sweep = {s: area(r.score(probes[s], choose), y[choose], group[choose]) for s, r in readings.items()}
    site = max(sweep, key=lambda s: sweep[s].value)
    return replace(probes[site], site=site), sweep


def _hidden(
    masked: Mapping[str, Array] | None,
    evidence: Array | None,
    reading: Reading,
    site: str,
    config: ProbeConfig,
    mask: Array | None,
) -> Reading | None:
    """The chosen site's activations with the concept's own words out of sight."""
    if masked is not None and evidence is not None:
        raise UsageError("pass masked activations or evidence positions, not both")
    if masked is not None:
        if site not in masked:
            raise UsageError(f"masked has no activations of the chosen site {site!r}.{suggest(site, masked)}")
        return Reading(same_rows(masked[site], reading.x, f"masked activations of {site}"), reading.mask)
    if evidence is None:
        return None
    if config.kind != "attention" or reading.mask is None:
        raise UsageError("evidence positions are for attention probes; others take masked activations")
    seen = plain(evidence).astype(bool)
    if seen.shape != reading.mask.shape:
        raise UsageError(f"evidence: expected {list(reading.mask.shape)}, got {list(seen.shape)}")
    return Reading(reading.x, evident(reading.mask, seen))


def _notes(
    probe: Probe,
    meanings: bool,
    control: Control | None,
    hidden: Reading | None,
    words: Floats | None,
    decide: Decision | None,
) -> tuple[str, ...]:
    """What was not measured, and why."""
    out = []
    if not meanings:
        out.append("Rows were held out, not meanings: no groups were given, so no control task either.")
    elif control is None:
        out.append("No control task: too few meanings occur twice.")
    if hidden is None and words is None:
        out.append("Leakage was not measured: neither masked activations nor word counts were given.")
    if decide is None:
        out.append("Causal effect was not measured: no behaviour was given.")
    elif probe.config.kind not in LINEAR:
        out.append(f"Causal effect was not measured: {probe.config.kind} probes have no single direction.")
    elif not probe.weight.any():
        out.append("Causal effect was not measured: the classes look alike here, so there is no direction.")
    return tuple(out)
