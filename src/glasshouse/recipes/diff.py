"""What changed inside between two checkpoints, and which constraints' evidence moved."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from markupsafe import Markup
from torch import Tensor

from glasshouse.base.errors import UsageError
from glasshouse.base.score import Score, bootstrap
from glasshouse.draw import esc, label, table
from glasshouse.model import GPT, Taps
from glasshouse.recipes.api import Loaded
from glasshouse.recipes.audit import Audit, plan_audit
from glasshouse.recipes.lens.data import Target, about, opened, text_rows
from glasshouse.recipes.lens.report import Finding
from glasshouse.verify.weights import measure

TEXT_TOKENS = 8192  # read by both models
SHOWN = 12  # matrices and tokens a table shows
BATCH = 16


@dataclass(frozen=True)
class MatrixChange:
    """How one parameter moved: ``relative`` norm of the update over that of the weights before it;
    ``stable_rank`` of the update (1: one direction), None for a vector.
    """

    name: str
    relative: float
    stable_rank: float | None


@dataclass(frozen=True)
class TokenChange:
    """How far one row of the embedding moved: in robust standard deviations over all rows."""

    token: str
    id: int
    moved: float
    z: float


@dataclass(frozen=True)
class Diff:
    """Two models side by side. ``layers`` maps a site to how much of its activations changed.

    ``relative``: mean distance between the two models' activations at the same tokens, over their norm.
    ``cka``: linear centred kernel alignment (Kornblith et al. 2019), 1 where one is a rotation of the other.
    """

    kl: Score
    agreement: Score
    bits_before: Score
    bits_after: Score
    layers: dict[str, dict[str, float]]
    matrices: list[MatrixChange]
    tokens: list[TokenChange]
    constraints: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """As plain data for a file."""
        return asdict(self)

    def _repr_html_(self) -> str:
        weights = [(m.name, label(m.relative), _rank(m)) for m in self.matrices[:SHOWN]]
        rows = [(esc(repr(t.token), 60), label(t.moved), label(t.z)) for t in self.tokens[:SHOWN]]
        parts = [
            table(
                ("matrix", "moved by (relative)", "stable rank"),
                weights,
                "Weights that moved most",
                numeric=(1, 2),
            ),
            table(("token", "moved by", "z"), rows, "Embedding rows that moved most", numeric=(1, 2)),
        ]
        if self.constraints:
            head = ("constraint", "before", "after", "moved")
            body = [
                (c["constraint"], _said(c["before"]), _said(c["after"]), _moved(c)) for c in self.constraints
            ]
            parts.append(table(head, body, "Constraints, before and after"))
        return str(Markup().join(parts))


def diff(
    before: Target,
    after: Target,
    *,
    text: str | Path | None = None,
    constraints: str | Path | None = None,
    budget_s: float | None = None,
    seed: int = 0,
    chat_format: str | None = None,
) -> Finding[Diff]:
    """Compare two models that share a tokenizer: what they predict, what they hold inside, their weights.

    ``text``: what both read (default: the run's held-out text, else the packaged books). With ``constraints``
    both are audited on the same prompts, put as ``chat_format`` says, each within half of ``budget_s``.
    Weights are compared where the shapes agree. UsageError for models with different tokenizers.
    """
    plans: list[Audit] = []
    if constraints is not None:  # what is wrong with them is said before anything is compared
        plans = audits(before, after, Path(constraints), budget_s, seed, chat_format)
    a, b = opened(before), opened(after)
    if a.tokenizer.digest() != b.tokenizer.digest():
        raise UsageError(
            f"{a.checkpoint} and {b.checkpoint} have different tokenizers, so nothing can be compared token "
            "by token; compare checkpoints of one model"
        )
    rows = text_rows(a, text, TEXT_TOKENS, seed)
    tokens = rows.held[:, : min(a.model.config.context, b.model.config.context)]
    found = compare(a, b, tokens)
    if plans:
        found = replace(found, constraints=verdicts_of(plans))
    return Finding(
        f"{a.checkpoint} and {b.checkpoint}",
        found,
        lines_of(found),
        {
            **about(a),
            **{f"after_{k}": v for k, v in about(b).items()},
            "text": rows.source,
            "rows": len(tokens),
        },
        data=found.to_dict(),
        parts=[found],
        notes=notes_of(found),
    )


@torch.no_grad()
def compare(a: Loaded, b: Loaded, tokens: Tensor) -> Diff:
    """Everything that needs no constraint, on ``tokens`` int64 [row, pos]."""
    kl, same = list[float](), list[float]()
    nats_a, nats_b = list[float](), list[float]()
    acts: list[tuple[list[Tensor], list[Tensor]]] = []
    for part in tokens.split(BATCH):
        logits_a, inside_a = _read(a.model, part)
        logits_b, inside_b = _read(b.model, part)
        p, q = logits_a.log_softmax(-1), logits_b.log_softmax(-1)
        kl += (p.exp() * (p - q)).sum(-1).mean(1).tolist()
        same += (p.argmax(-1) == q.argmax(-1)).float().mean(1).tolist()
        for of, nats in ((p, nats_a), (q, nats_b)):
            nats += F.nll_loss(of[:, :-1].transpose(1, 2), part[:, 1:], reduction="none").mean(1).tolist()
        acts.append((inside_a, inside_b))
    alike = a.model.config == b.model.config
    return Diff(
        bootstrap(kl),
        bootstrap(same),
        bootstrap([n / math.log(2) for n in nats_a]),
        bootstrap([n / math.log(2) for n in nats_b]),
        _layers(acts),
        matrix_changes(a.model, b.model) if alike else [],
        token_changes(a, b) if alike else [],
    )


def _read(model: GPT, tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits [row, pos, vocab] and the residual stream after every block [row, pos, d_model]."""
    sites = [f"blocks.{i}.resid_post" for i in range(model.config.n_layer)]
    with Taps(read=sites) as taps:
        logits = model(tokens, taps)
    return logits.float(), [taps[s].float() for s in sites]


def _layers(acts: Sequence[tuple[list[Tensor], list[Tensor]]]) -> dict[str, dict[str, float]]:
    """By site of the first model, against the second model's layer at the same share of the depth."""
    n_a, n_b = len(acts[0][0]), len(acts[0][1])
    found = {}
    for i in range(n_a):
        j = max(0, round((i + 1) * n_b / n_a) - 1)
        x = torch.cat([one[i].flatten(0, 1) for one, _ in acts])
        y = torch.cat([two[j].flatten(0, 1) for _, two in acts])
        row = {"cka": round(linear_cka(x, y), 4)}
        if x.shape == y.shape:
            row["relative"] = round(float(((y - x).norm(dim=1) / x.norm(dim=1).clamp_min(1e-12)).mean()), 4)
        found[f"blocks.{i}.resid_post"] = row
    return found


def linear_cka(x: Tensor, y: Tensor) -> float:
    """Linear CKA of activations [n, d] and [n, e] (Kornblith et al. 2019, eq. 3 in its feature form)."""
    x, y = (x - x.mean(0)).double(), (y - y.mean(0)).double()
    cross = (y.T @ x).square().sum()
    own = (x.T @ x).square().sum().sqrt() * (y.T @ y).square().sum().sqrt()
    return float(cross / own) if own > 0 else math.nan


def matrix_changes(before: GPT, after: GPT) -> list[MatrixChange]:
    """Every parameter by how far it moved, farthest first."""
    known = measure(before, after).quantities
    found = []
    for name, _ in after.named_parameters():
        rank = known.get(f"{name} stable_rank")
        found.append(
            MatrixChange(name, math.exp(known[f"{name} norm"]), None if rank is None else math.exp(rank))
        )
    return sorted(found, key=lambda m: -m.relative)


def token_changes(a: Loaded, b: Loaded, most: int = 64) -> list[TokenChange]:
    """Rows of the embedding that moved most, against the median row."""
    moved = np.linalg.norm(measure(a.model, b.model).rows, axis=1)
    middle = float(np.median(moved))
    spread = 1.4826 * float(np.median(np.abs(moved - middle))) + 1e-12
    order = np.argsort(-moved, kind="stable")[:most]
    return [
        TokenChange(
            a.tokenizer.decode([int(i)], specials=True),
            int(i),
            round(float(moved[i]), 5),
            round(float((moved[i] - middle) / spread), 2),
        )
        for i in order
        if int(i) < a.tokenizer.vocab_size
    ]


def audits(
    before: Target,
    after: Target,
    constraints: Path,
    budget_s: float | None,
    seed: int,
    chat: str | None,
) -> list[Audit]:
    """The audits of both models, planned: the same prompts, half of the budget each."""
    half = None if budget_s is None else budget_s / 2
    plans = []
    for target in (before, after):
        if isinstance(target, Loaded):
            raise UsageError("constraints are checked on models on disk; give paths to diff")
        plans.append(plan_audit(Path(target), constraints, budget_s=half, seed=seed, chat=chat))
    return plans


def verdicts_of(plans: Sequence[Audit]) -> list[dict[str, Any]]:
    """Each constraint's verdict on both models, and whether its 95% intervals are apart."""
    before, after = ({v["constraint"]: v for v in plan.run()} for plan in plans)
    keys = ("status", "estimate", "interval", "n", "reason")
    return [
        {
            "constraint": name,
            "before": {k: old[k] for k in keys},
            "after": {k: after[name][k] for k in keys},
            "moved": apart(old["interval"], after[name]["interval"]),
        }
        for name, old in before.items()
    ]


def apart(one: Sequence[float] | None, other: Sequence[float] | None) -> bool | None:
    """Whether two intervals do not touch; None where one is missing."""
    if one is None or other is None:
        return None
    return bool(one[1] < other[0] or other[1] < one[0])


# -- how it is shown ---------------------------------------------------------------------------------------


def lines_of(found: Diff) -> list[tuple[str, Score | str]]:
    """The numbers of the table, in reading order."""
    rows: list[tuple[str, Score | str]] = [
        ("next-token KL, before to after (nats)", found.kl),
        ("same most likely token", found.agreement),
        ("bits per token before", found.bits_before),
        ("bits per token after", found.bits_after),
    ]
    for site, row in found.layers.items():
        said = f"CKA {row['cka']:.3f}" + (f", moved {row['relative']:.1%}" if "relative" in row else "")
        rows.append((site, said))
    for m in found.matrices[:SHOWN]:
        rows.append((m.name, f"moved {m.relative:.2%}, {_rank(m)}"))
    if found.tokens:
        said = ", ".join(f"{t.token!r} (z {t.z:.0f})" for t in found.tokens[:6])
        rows.append(("tokens that moved most", said))
    for c in found.constraints:
        rows.append((c["constraint"], f"{_said(c['before'])} -> {_said(c['after'])} ({_moved(c)})"))
    return rows


def notes_of(found: Diff) -> list[str]:
    """What a reader must know to read the numbers."""
    notes = []
    if not found.matrices:
        notes.append("The two models have different shapes, so their weights were not compared.")
    if any(c["moved"] is None for c in found.constraints):
        notes.append(
            "Where a constraint was not measured on both models, nothing is said about its movement."
        )
    return notes


def _rank(m: MatrixChange) -> str:
    return "a vector" if m.stable_rank is None else f"stable rank {m.stable_rank:.1f}"


def _said(verdict: Mapping[str, Any]) -> str:
    status = str(verdict["status"]).replace("_", " ")
    if verdict["estimate"] is None:
        return status
    interval = verdict["interval"]
    shown = "" if interval is None else f" [{interval[0]:.2f}, {interval[1]:.2f}]"
    return f"{status} {verdict['estimate']:.2f}{shown}"


def _moved(row: Mapping[str, Any]) -> str:
    return {True: "moved", False: "not told apart", None: "not compared"}[row["moved"]]
