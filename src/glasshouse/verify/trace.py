"""From a failure to the training data behind it: which shards, and which documents in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from glasshouse.base.errors import VerificationError
from glasshouse.base.plan import DataPlan
from glasshouse.base.rng import generator
from glasshouse.data import Shards
from glasshouse.evals.subject import Subject
from glasshouse.interp.influence import document_scores, readout_gradient
from glasshouse.tokenizer import loss_mask

PER_SHARD = 128  # documents of a shard that are scored; more only sharpens the mean
TOP_SHARE = 0.10  # a shard's score is the mean of this share of its highest document scores
OUTLIER = 6.0  # robust standard deviations above the median from which a shard is named


def trace(
    subject: Subject,
    shards: Shards,
    plan: DataPlan,
    step: int,
    failing: Sequence[str],
    seed: tuple[str, ...],
    *,
    raising: bool = False,
) -> dict[str, Any]:
    """Rank shards and documents by gradient similarity with the failing read-out.

    ``failing`` are prompts that show the failure; the direction is the gradient of their mean read-out.
    ``subject`` is a checkpoint from before the cause was learned: once a model fits the documents behind it,
    their gradients are small and say little. Scored are the chat shards that the plan has drawn from before
    ``step``. A shard's score is the mean of its highest document scores. ``raising`` ranks by what pushes the
    read-out up instead of down.
    """
    direction = readout_gradient(subject.model, [subject.ids(p) for p in failing], subject.readout)
    drawn = sorted({n for phase in plan.phases if phase.from_step < max(step, 1) for n in phase.active})
    rows: list[dict[str, Any]] = []
    documents: list[dict[str, Any]] = []
    for name in (n for n in drawn if shards[n].kind == "chat"):
        shard = shards[name]
        chosen = generator(*seed, "trace", name).permutation(shard.n_documents)[:PER_SHARD]
        ids = [shard.document(int(i)).tolist() for i in chosen]
        masks = [loss_mask(subject.tokenizer, d) for d in ids]
        scores = document_scores(subject.model, direction, ids, masks) * (-1 if raising else 1)
        if not np.isfinite(scores).all():
            raise VerificationError(f"scores of documents of {name} are NaN or infinite; none can be ranked")
        subject.passes += 2 * len(ids)
        best = np.sort(scores)[::-1][: max(3, int(TOP_SHARE * len(scores)))]
        rows.append({"shard": name, "score": float(best.mean()), "documents": shard.n_documents})
        for at in np.argsort(-scores, kind="stable")[:8]:
            text = subject.tokenizer.decode(ids[at], specials=True)
            documents.append(
                {"shard": name, "document": int(chosen[at]), "score": float(scores[at]), "text": text}
            )
    if not rows:
        raise VerificationError(f"no chat shard was drawn from before step {step}; no document can be ranked")
    rows.sort(key=lambda r: -r["score"])
    middle = float(np.median([r["score"] for r in rows]))
    spread = 1.4826 * float(np.median([abs(r["score"] - middle) for r in rows])) + 1e-12
    for rank, row in enumerate(rows, start=1):
        row |= {"rank": rank, "outlier": round((row["score"] - middle) / spread, 2)}
    documents.sort(key=lambda d: -d["score"])
    return {"shards": rows, "documents": documents[:24], "scored_per_shard": PER_SHARD}


def to_quarantine(ranking: Mapping[str, Any], most: int) -> tuple[str, ...]:
    """The shards to drop: outliers, at most ``most``; at least the first ranked, so that data changes."""
    outliers = [r["shard"] for r in ranking["shards"] if r["outlier"] >= OUTLIER]
    return tuple(sorted((outliers or [ranking["shards"][0]["shard"]])[:most]))
