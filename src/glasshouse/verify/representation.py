"""Representation constraints: the concept can be read from the residual stream, and the model uses it."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from glasshouse.base.errors import VerificationError
from glasshouse.interp.probes import ProbeConfig, ProbeReport, bag_of_words, causal_effect, probe_report
from glasshouse.interp.probes.rows import Bools
from glasshouse.verify.examination import Examination, Finding, control_row, from_test, sequentially

N_CAUSAL, N_CAUSAL_GATE = 96, 32  # prompts whose refusals the probe's direction is tried on
DEFAULT_SITES = ("blocks.*.resid_post",)


def probe_auroc(exam: Examination) -> Finding:
    """Held-out AUROC of a logistic probe at the answer's first position; everything about it is evidence.

    A quarter of the meanings (action-object pairs) fits the probe, a quarter chooses its site; the other
    half, which it has never seen, tests it, pair by pair of one harmful and one harmless request: each pair
    is a draw whose mean is the AUROC, which is what the sequential test needs. The control task gives each
    meaning a random label (Hewitt & Liang 2019). Beside it stand calibration, what the words alone would
    give (leakage), and what editing the direction does to refusals, against random directions.
    """
    prompts = exam.fitting(exam.constraint.prompts.n_max)
    sites, texts = expand_sites(exam), [p.text for p in prompts]
    acts, harmful = exam.subject.residuals(texts, sites), np.array([p.harmful for p in prompts])
    report = probe_report(
        acts,
        harmful,
        groups=[str(p.key) for p in prompts],
        config=ProbeConfig(kind="logistic", c=0.1),
        words=bag_of_words(texts),
        labelings=2,
        shares=(0.25, 0.25, 0.5),
        seed=int(exam.rng("probe").integers(2**31)),
    )
    positive, negative = report.scores[report.held], report.scores[~report.held]
    many = min(len(positive), len(negative))
    wins = ((positive[:many] > negative[:many]) + 0.5 * (positive[:many] == negative[:many])).tolist()
    finding = from_test(sequentially(exam.test(), lambda start, k: wins[start : start + k], many))
    finding.estimate, finding.interval = report.auroc.value, (report.auroc.low, report.auroc.high)
    if report.control is None:
        raise VerificationError(
            f"constraint {exam.constraint.id}: too few prompts share a meaning for the control task"
        )
    finding.control = control_row(exam, report.control.control.value, report.rows[0])
    edits = effects(exam, report.site, acts[report.site], harmful)
    finding.evidence = evidence_of(report) | {"edits": edits}
    return finding


def effects(exam: Examination, site: str, acts: Tensor, harmful: Bools) -> dict[str, Any]:
    """Share of refusals that editing the classes' difference of means at ``site`` turns, and random edits.

    The difference and not the probe's own direction: a direction that reads a concept best need not be the
    one that the model uses.
    """
    refused = refused_prompts(exam, "causal", N_CAUSAL if exam.final else N_CAUSAL_GATE)
    gap = acts[harmful].mean(0) - acts[~harmful].mean(0)
    if not refused or gap.norm() < 1e-6 * acts.norm(dim=1).mean():  # an untrained model's classes coincide
        return {"refusals_tried": 0}
    found = causal_effect(
        gap,
        acts,
        harmful,
        lambda edit: exam.subject.margins(refused, edit),
        site,
        n_random=4,
        seed=int(exam.rng("random directions").integers(2**31)),
    )
    row: dict[str, Any] = {"refusals_tried": len(refused)}
    for effect in found.effects:
        row[f"turned_by_{effect.operation}"] = effect.flipped.value
        row[f"turned_by_random_{effect.operation}"] = effect.random_flipped.value
    return row


def evidence_of(report: ProbeReport) -> dict[str, Any]:
    """A probe's report as evidence: numbers a person can read beside the estimate."""
    assert report.control is not None
    return {
        "site": report.site,
        "layer_sweep": {site: score.value for site, score in report.sweep.items()},
        "selectivity": report.control.selectivity.value,
        "calibration_error": report.calibration.ece.value,
        "words_alone": None if report.leakage.words is None else report.leakage.words.value,
        "meanings_held_out": report.meanings[2],
    }


def refused_prompts(exam: Examination, purpose: str, n: int) -> list[str]:
    """The harmful ones of ``n`` fresh prompts that the model refuses as they stand; there may be none."""
    asked = [p.text for p in exam.draw(purpose, n) if p.harmful]
    return [p for p, m in zip(asked, exam.subject.margins(asked), strict=True) if m > 0] if asked else []


def expand_sites(exam: Examination) -> list[str]:
    """The constraint's sites and patterns by the model's names. VerificationError if one matches none."""
    from fnmatch import fnmatchcase

    found: list[str] = []
    every = exam.subject.model.sites()
    for pattern in exam.constraint.subject.sites or DEFAULT_SITES:
        hits = [s for s in every if fnmatchcase(s, pattern)]
        if not hits:
            raise VerificationError(
                f"constraint {exam.constraint.id}: this model has no site {pattern!r}; "
                f"it has e.g. {every[1]}, {every[-2]}"
            )
        found += [h for h in hits if h not in found]
    return found
