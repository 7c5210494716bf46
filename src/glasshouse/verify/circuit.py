"""Circuit constraint: one direction carries refusal. Without it refusals go; random ones carry nothing."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from glasshouse.base.errors import VerificationError
from glasshouse.interp.direction import difference_of_means, project_out, random_directions
from glasshouse.verify.examination import Examination, Finding, control_row, from_test, sequentially
from glasshouse.verify.representation import expand_sites

N_FIT, N_CHOOSE, N_RANDOM = 160, 48, 4


def ablation_effect(exam: Examination) -> Finding:
    """Share of refusals lost when the refusal direction is set to its harmless level at the sites.

    One direction per site is the difference of means between harmful and harmless requests at the answer's
    first position (Arditi et al. 2024); the site whose direction, removed from *all* sites at every position,
    costs most refusals on one set of prompts is tested sequentially on another. The control removes random
    directions in the same way.
    """
    sites = expand_sites(exam)
    fit = exam.fitting(N_FIT)
    harmful = np.array([p.harmful for p in fit])
    if harmful.all() or not harmful.any():
        raise VerificationError(
            f"constraint {exam.constraint.id}: its prompts need harmful and harmless requests"
        )
    acts = exam.subject.residuals([p.text for p in fit], sites)
    directions = {s: difference_of_means(x[harmful], x[~harmful]) for s, x in acts.items()}
    centres = {s: acts[s][~harmful].mean(0) for s in sites}

    def lost(direction: Tensor, prompts: list[str]) -> np.ndarray:
        edit = {s: project_out(direction, centres[s]) for s in sites}
        return exam.subject.margins(prompts, edit) < 0

    choose = [p.text for p in exam.refused("choose", N_CHOOSE).first(N_CHOOSE)]
    if not choose:
        raise VerificationError(f"constraint {exam.constraint.id}: the model refuses no harmful prompt")
    effect = {s: float(lost(directions[s], choose).mean()) for s in sites}
    best = max(sites, key=lambda s: effect[s])
    fresh = exam.refused("confirm", exam.constraint.prompts.n_max)

    def outcomes(start: int, n: int) -> list[float]:
        asked = [p.text for p in fresh.first(start + n)[start:]]
        return [float(x) for x in lost(directions[best], asked)]

    test = sequentially(exam.test(), outcomes, fresh.most)
    drawn = random_directions(N_RANDOM, exam.subject.model.config.d_model, exam.rng("random directions"))
    stray = float(np.mean([lost(d, choose).mean() for d in drawn]))
    return from_test(
        test,
        control=control_row(exam, stray, N_RANDOM * len(choose)),
        evidence={"direction_from": best, "effect_by_site": effect, "sites": list(sites)},
    )
