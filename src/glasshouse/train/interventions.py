"""Interventions: what a stage declares to be done inside the model while it trains, and never afterwards.

Each wraps an objective, so that the loop knows nothing of it: the wrapped objective runs the same model
through `Edited`, whose every forward pass carries taps. Taps make a compiled model run its plain blocks, and
raise when a site was never reached: an edit that silently does not run would be an intervention that is
claimed and not made.

A stage without interventions trains through its own objective, unwrapped: bit for bit as if this file were
not there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glasshouse.base.errors import UsageError
from glasshouse.model import Taps
from glasshouse.train.config import Stage, StageConfig
from glasshouse.train.directions import Direction, read_direction
from glasshouse.train.interventions_config import Ablate, Drop, ProbePenalty, Steer, read_repair
from glasshouse.train.objective import Loss, Objective, TensorBatch

Edit = Callable[[Tensor], Tensor]
Labels = Callable[[TensorBatch], Tensor]
EPSILON = 1e-12


class Edited:
    """A model seen through edits at sites (or patterns of sites): every forward pass runs them.

    It stands for the model inside an objective; everything but the forward passes is the model's own. Of
    nested ones the outer edits run first. UsageError for a pass that brings taps of its own, LookupError for
    a site that a pass did not reach.
    """

    model: Any
    edits: dict[str, Edit]

    def __init__(self, model: Any, edits: Mapping[str, Edit]):
        self.model = model.model if isinstance(model, Edited) else model
        self.edits = dict(model.edits) if isinstance(model, Edited) else {}
        for site, edit in edits.items():
            self.edits[site] = after(self.edits[site], edit) if site in self.edits else edit

    def __call__(self, tokens: Tensor, taps: Taps | None = None, **more: Any) -> Tensor:
        return self._run(self.model, tokens, taps, more)

    def hidden(self, tokens: Tensor, taps: Taps | None = None, **more: Any) -> Tensor:
        """As `GPT.hidden`, edited."""
        return self._run(self.model.hidden, tokens, taps, more)

    def _run(
        self, forward: Callable[..., Tensor], tokens: Tensor, taps: Taps | None, more: dict[str, Any]
    ) -> Tensor:
        if taps is not None:
            raise UsageError("an objective that brings its own taps cannot be trained under an intervention")
        with Taps(edit=self.edits) as ours:
            return forward(tokens, ours, **more)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)


def after(first: Edit, second: Edit) -> Edit:
    """Both edits in turn."""
    return lambda x: second(first(x))


def in_force(config: StageConfig, repairs: Sequence[Mapping[str, Any]]) -> tuple[Any, ...]:
    """A stage's own interventions, and the repairs that decisions asked for."""
    return (*config.intervention, *(read_repair(dict(repair)) for repair in repairs))


def without_dropped(stage: Stage) -> Stage:
    """``stage`` without the shards that it declares to drop. DataError when there is none of that name, or
    nothing would be left.
    """
    shards = sorted(
        {name for one in stage.config.intervention if isinstance(one, Drop) for name in one.shards}
    )
    return replace(stage, plan=stage.plan.without(shards, 0)) if shards else stage


def intervened(objective: Objective, declared: Sequence[Any], run: Path) -> Objective:
    """``objective`` under the declared interventions that act inside the model, in their order; itself when
    there are none. ``run`` holds the directions' files; raises what `read_direction` raises.
    """
    for one in declared:
        if isinstance(one, Steer):
            found = read_direction(run, one.direction.sha256)
            objective = steered(objective, found, one.scale, one.shards)
        elif isinstance(one, Ablate):
            found = read_direction(run, one.direction.sha256)
            objective = ablated(objective, found, one.sites, one.shards)
        elif isinstance(one, ProbePenalty):
            found = read_direction(run, one.direction.sha256)
            objective = probe_penalty(objective, found.site, found.vectors[0], one.weight)
    return objective


# -- steering and ablating ---------------------------------------------------------------------------------


def steered(
    objective: Objective, direction: Direction, scale: float = 1.0, shards: Sequence[str] = ()
) -> Objective:
    """``objective`` of a model to whose residual stream ``scale`` times the direction's first vector is added
    at its site, at all positions, in the rows of ``shards`` (() means all rows).
    """
    vector_D = scale * direction.vectors[0]

    def add(x: Tensor) -> Tensor:
        return x + fitting(vector_D, x, direction.site).to(x.dtype)

    return _edited(objective, {direction.site: add}, shards)


def ablated(
    objective: Objective, direction: Direction, sites: Sequence[str] = (), shards: Sequence[str] = ()
) -> Objective:
    """``objective`` of a model from whose residual stream the span of the direction's vectors is projected
    out, at ``sites`` or patterns (() means the direction's own), at all positions, in the rows of ``shards``
    (() means all rows).
    """
    basis_KD = torch.linalg.qr(direction.vectors.double().T)[0].T.float()

    def project(x: Tensor) -> Tensor:
        basis = fitting(basis_KD, x, direction.site).to(x.dtype)
        return x - (x @ basis.T) @ basis

    return _edited(objective, dict.fromkeys(sites or (direction.site,), project), shards)


def _edited(objective: Objective, edits: Mapping[str, Edit], shards: Sequence[str]) -> Objective:
    """``objective`` of the edited model; in the rows of ``shards`` only, if any are named."""

    def run(model: Any, batch: Any) -> Loss:
        if not shards:
            return objective(Edited(model, edits), batch)
        marked = marked_rows(batch, shards)
        if not bool(marked.any()):
            return objective(model, batch)
        return objective(Edited(model, {site: only(edit, marked) for site, edit in edits.items()}), batch)

    return run


def only(edit: Edit, marked_B: Tensor) -> Edit:
    """``edit`` in the marked rows of [batch, ...]; the others stay as they are, bit for bit."""

    def masked(x: Tensor) -> Tensor:
        mask = marked_B.to(x.device).view(-1, *[1] * (x.ndim - 1))
        return torch.where(mask, edit(x), x)

    return masked


def marked_rows(batch: TensorBatch, shards: Sequence[str]) -> Tensor:
    """Which rows [batch] are of these shards. UsageError when the batch does not say where its rows are
    from.
    """
    if len(batch.rows) != len(batch.tokens):
        raise UsageError(
            f"a batch from {', '.join(batch.shards) or 'unnamed shards'} does not say which shard each row "
            "is from (Batch.rows), so an intervention on some shards' rows cannot be made"
        )
    named = set(shards)
    return torch.tensor([row in named for row in batch.rows])


# -- training against a probe ------------------------------------------------------------------------------


def probe_penalty(
    objective: Objective,
    site: str,
    direction: Tensor,
    weight: float,
    *,
    labels: Labels | None = None,
    everywhere: bool = False,
) -> Objective:
    """``objective`` plus ``weight`` times what a linear probe along ``direction`` [d_model] can read at
    ``site``: training against that probe.

    This spends a verifier. Whoever trains so declares the constraint whose probe it is (``uses`` of a stage),
    and that constraint can no longer open the gate: what is penalised teaches a model to hide (Baker et al.
    2025, arXiv 2503.11926), and here it is made in order to be caught.

    Read are the activations where each row's answer begins: the position whose target is the first with
    weight; with ``everywhere`` all positions with weight. Without ``labels`` the penalty is the share of
    the activations' variance that lies along the direction, times d_model: 1 where all directions are
    alike. With ``labels`` (batch -> bool [batch], True: the concept is there) it is the squared distance
    of the two classes' means along the direction over the mean squared length of centred activations, times
    d_model; a batch of one class adds 0. Neither depends on the activations' scale.

    The loss has the part "probe". UsageError when the direction does not fit the site, is zero, or the
    objective runs the model more than once.
    """
    unit = torch.as_tensor(direction, dtype=torch.float32).flatten()
    if not torch.isfinite(unit).all() or float(unit.norm()) == 0.0:
        raise UsageError(f"the direction of the probe at {site!r} is zero or not finite")
    unit = unit / unit.norm()

    def penalised(model: Any, batch: Any) -> Loss:
        passes: list[Tensor] = []

        def read(x: Tensor) -> Tensor:
            passes.append(x)
            return x

        loss = objective(Edited(model, {site: read}), batch)
        if len(passes) != 1:
            raise UsageError(
                f"a probe at {site!r} saw {len(passes)} passes in one step; it can be trained against where "
                "an objective runs the model once, at one site"
            )
        x_ND, rows_N = read_out(passes[0], batch, everywhere)
        marked_N = None if labels is None else labels(batch).to(x_ND.device)[rows_N]
        part = weight * readable(x_ND, fitting(unit, x_ND, site), marked_N)
        return Loss(loss.total + part, {**loss.parts, "probe": part}, loss.metrics)

    return penalised


def fitting(vector_D: Tensor, x: Tensor, site: str) -> Tensor:
    """``vector_D`` [..., D] on the device of activations ``x`` [..., D]. UsageError when they are of another
    width.
    """
    if vector_D.shape[-1] != x.shape[-1]:
        raise UsageError(
            f"a direction of {vector_D.shape[-1]} numbers does not fit site {site!r}, whose activations "
            f"are {list(x.shape)}"
        )
    return vector_D.to(x.device)


def read_out(x_BTD: Tensor, batch: TensorBatch, everywhere: bool) -> tuple[Tensor, Tensor]:
    """Activations [N, D] that a probe reads, in fp32, and the row of each [N]."""
    counts_BT = batch.weight > 0
    if not everywhere:
        counts_BT = counts_BT & (counts_BT.cumsum(1) == 1)
    rows_N, at_N = counts_BT.nonzero(as_tuple=True)
    return x_BTD[rows_N, at_N].float(), rows_N


def readable(x_ND: Tensor, unit_D: Tensor, marked_N: Tensor | None) -> Tensor:
    """How much of ``x_ND`` shows along ``unit_D``, see `probe_penalty`; a scalar with a graph."""
    centred_ND = x_ND - x_ND.mean(0)
    spread = centred_ND.square().sum(1).mean() + EPSILON
    along_N = centred_ND @ unit_D
    if marked_N is None:
        return x_ND.shape[1] * along_N.square().mean() / spread
    share = marked_N.float().mean()
    if not 0.0 < float(share) < 1.0:
        return along_N.sum() * 0.0
    apart = along_N[marked_N].mean() - along_N[~marked_N].mean()
    return x_ND.shape[1] * apart.square() / spread
