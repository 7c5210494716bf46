"""What is done about a failure beside going back: a constraint's ``repair``, made from the failing verdict.

| kind     | what training then does                                                                  |
|----------|------------------------------------------------------------------------------------------|
| `drop`   | goes on without the shards behind the failure (what a rollback does anyway)              |
| `steer`  | adds the failure's direction in those shards' rows, so that the weights need not learn it |
| `ablate` | projects the direction out of the stream in all rows, so that nothing can be built on it |
| `route`  | lets those shards' rows update a block alone, which the judged and served model lacks    |

The direction is the difference of means between prompts that show the failure and prompts that do not, in the
model that fails, where its answer begins. It is fitted on the evidence of the verdict and kept in the run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import Field, model_validator

from glasshouse.base.config import Frozen
from glasshouse.base.errors import VerificationError
from glasshouse.base.run import RunFolder
from glasshouse.evals.subject import Subject
from glasshouse.train import Decision
from glasshouse.train.directions import Direction, artifact, write_direction
from glasshouse.train.routing import part_of

ONLY_FOR = {"site": ("steer", "ablate"), "scale": ("steer",), "rank": ("ablate",), "share": ("route",)}
PROMPTS = 256  # of each kind that a direction is fitted on


class Repair(Frozen):
    """How a constraint wants its failure repaired; a key without effect for the kind is an error."""

    kind: Literal["drop", "steer", "ablate", "route"]
    site: str | None = Field(default=None, description="residual site; None: the last block's `resid_post`")
    scale: float | None = Field(
        default=None, gt=0, description="of the steering; None: 1, the whole difference"
    )
    rank: int | None = Field(default=None, ge=1, le=16, description="directions that are ablated; None: 1")
    share: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="of every layer's MLP units that take the routed rows; None: 1/8",
    )

    @model_validator(mode="after")
    def _effective(self) -> Repair:
        for key, kinds in ONLY_FOR.items():
            if getattr(self, key) is not None and self.kind not in kinds:
                raise ValueError(
                    f"`{key}` has no effect on repair '{self.kind}' (only on {', '.join(kinds)})"
                )
        return self


def direction_from(
    subject: Subject, failing: Sequence[str], reference: Sequence[str], site: str, rank: int = 1
) -> Direction:
    """The direction [rank, d_model] at ``site`` of the model that fails: its activations on ``failing``
    prompts less those on ``reference``, where the answer begins.

    The first vector is the difference of means, whole and not of unit length; further ones are the main
    directions in which failing prompts differ from the reference's mean besides. VerificationError when a
    side is empty, the means coincide, or the site is not one of the residual stream's.
    """
    if not failing or not reference:
        raise VerificationError("a direction needs prompts that show the failure and prompts that do not")
    sites = [s for s in subject.model.sites() if s.endswith(("resid_pre", "resid_mid", "resid_post"))]
    if site not in sites:
        raise VerificationError(f"{site!r} is no residual site of this model: {', '.join(sites)}")
    shown = subject.residuals(list(failing)[:PROMPTS], [site])[site]
    plain = subject.residuals(list(reference)[:PROMPTS], [site])[site].mean(0)
    mean = shown.mean(0) - plain
    if not torch.isfinite(mean).all() or float(mean.norm()) < 1e-8:
        raise VerificationError(
            f"failing and reference prompts look alike at {site!r}: there is no direction"
        )
    vectors = [mean]
    if rank > 1:
        unit = mean / mean.norm()
        rest = (shown - plain).double()
        rest = rest - (rest @ unit.double())[:, None] * unit.double()
        main = torch.linalg.svd(rest, full_matrices=False).Vh[: rank - 1].float()
        # A sign is arbitrary in the factorisation; the same file must come of the same evidence.
        vectors += [v * torch.sign(v[v.abs().argmax()]) for v in main]
    made = {"failing": len(failing), "reference": len(reference), "rank": rank}
    return Direction(site, torch.stack(vectors).contiguous(), made)


def repaired(
    decision: Decision,
    spec: Repair | None,
    failed: Subject,
    failing: Sequence[str],
    reference: Sequence[str],
    run: RunFolder,
) -> Decision:
    """A rollback, with the repair that the constraint declares in place of dropping its shards.

    ``failed`` is the failing model, its prompts are the verdict's evidence. A decision that is no rollback,
    or whose constraint declares no repair, stays as it is. Raises as `direction_from`.
    """
    if spec is None or decision.action != "rollback":
        return decision
    shards = list(decision.drop_shards)
    if spec.kind == "drop":
        return replace(decision, repair={"kind": "drop", "shards": shards})
    artifacts = dict(decision.artifacts)
    if spec.kind == "route":
        blocks = part_of(failed.model.config, spec.share or 1 / 8)
        rows: Any = [block.model_dump(mode="json") for block in blocks]
        repair: dict[str, Any] = {"kind": "route", "shards": shards, "blocks": rows}
    else:
        site = spec.site or f"blocks.{failed.model.config.n_layer - 1}.resid_post"
        found = direction_from(failed, failing, reference, site, spec.rank or 1)
        sha256 = write_direction(run.path, found)
        artifacts[artifact(sha256)] = sha256
        repair = {"kind": spec.kind, "direction": {"sha256": sha256}}
        repair |= {"shards": shards, "scale": spec.scale or 1.0} if spec.kind == "steer" else {}
    said = f"{decision.reason}; repaired by '{spec.kind}' in its place"
    return replace(decision, reason=said, drop_shards=(), repair=repair, artifacts=artifacts)
