"""What a run of RL is measured by and never learns from: answers to held-out prompts, drawn for that alone.

Rewards of a rollout are about the prompts that are trained on. Here the policy answers prompts of its own, by
the same seeds' rule, and a score that nothing trains on reads them: `gold` with its standard error. The same
prompts come every time, so that a step from one measurement to the next is a step of the policy: the standard
error is of the drawing of answers, not of the choice of prompts.

*Outliers inside*: the reference's answers to those prompts leave a cloud of residuals (mean over an answer's
tokens); the policy's own residuals on its own answers are measured against it (Lee et al. 2018, "A simple
unified framework for detecting out-of-distribution samples", sec. 2.1, with one class and shrinkage).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from glasshouse.align.policy import Policy, RLConfig
from glasshouse.align.reward import Reward, Tokens, rewards_of
from glasshouse.align.rollout import Answer, Drawing, Rollouts
from glasshouse.align.sequences import pack
from glasshouse.base.errors import TrainingError, UsageError
from glasshouse.base.rng import seed_from
from glasshouse.model import GPT
from glasshouse.model.partial import hidden_at

OUTLIERS = 256  # answers at most that are read for outliers, evenly from all of them
SHRINK = 0.1  # of the covariance towards its diagonal's mean: a cloud of few answers has flat directions


class HeldOut:
    """``score`` of ``each`` answers to every one of ``prompts``, at every ``every``-th rollout.

    ``name``: what the rows call it, "gold" or "held_out". ``full``: the distance between the worst and the
    best score there can be; it keeps a standard error from being 0 where all answers happen to be alike.
    ``inside`` False leaves the outliers out.
    """

    def __init__(
        self,
        prompts: Tokens,
        score: Reward,
        *,
        each: int = 2,
        every: int = 1,
        name: str = "gold",
        full: float = 1.0,
        inside: bool = True,
    ):
        if len(prompts) < 2 or each < 2 or every < 1 or full <= 0:
            raise UsageError(
                "held-out measurements need at least 2 prompts with 2 answers each, an interval of at least "
                f"1 rollout and a range above 0, not {len(prompts)}, {each}, {every} and {full}"
            )
        self.prompts = [list(p) for p in prompts for _ in range(each)]
        self.score, self.each, self.every = score, each, every
        self.name, self.full, self.inside = name, full, inside
        self._cloud: Cloud | None = None

    def due(self, rollout: int) -> bool:
        """Whether rollout number ``rollout`` (from 0) is measured."""
        return rollout % self.every == 0

    @torch.no_grad()
    def measure(
        self, policy: Policy, how: RLConfig, rollouts: Rollouts, step: int, where: str
    ) -> dict[str, float]:
        """``name``, its standard error, and "outlier" for the row. TrainingError for scores that are not
        finite or of the wrong number."""
        answers = self._draw(policy.gpt, how, rollouts, "held-out", step)
        ids = [answer.ids for answer in answers]
        given = rewards_of(self.score(self.prompts, ids)).values.double()
        if given.shape != (len(ids),) or not bool(torch.isfinite(given).all()):
            raise TrainingError(
                f"{where}: '{self.name}' gave {tuple(given.shape)} numbers for {len(ids)} answers, or one "
                "that is not finite"
            )
        mean, se = within(given.view(-1, self.each), self.full)
        row = {self.name: mean, f"{self.name}_se": se}
        if self.inside:
            if self._cloud is None:
                own = self._draw(policy.reference, how, rollouts, "held-out reference", 0)
                self._cloud = Cloud(self._inside(policy.reference, [a.ids for a in own]))
            row["outlier"] = self._cloud.distance(self._inside(policy.gpt, ids))
        return row

    def _inside(self, model: GPT, answers: Tokens) -> Tensor:
        apart = -(-len(answers) // OUTLIERS)
        return residuals(model, self.prompts[::apart], answers[::apart])

    def _draw(self, model: GPT, how: RLConfig, rollouts: Rollouts, what: str, step: int) -> list[Answer]:
        seeds = [seed_from(what, how.seed, step, i) for i in range(len(self.prompts))]
        return rollouts.sample(
            model, self.prompts, seeds, Drawing(how.max_new_tokens, how.stop, how.vocab, batch_size=256)
        )


def within(scores: Tensor, full: float = 1.0) -> tuple[float, float]:
    """Mean of scores [prompts, answers] over fixed prompts, and its standard error by the drawing of answers.

    The variance is that within prompts, and one prompt's answers more are counted as apart as can be
    (``full``), so that it is never 0: alike answers are rare disagreement, not none.
    """
    prompts, each = scores.shape
    apart = float(scores.var(dim=1, unbiased=True).sum()) + full**2 / 2
    return float(scores.mean()), math.sqrt(apart / each) / prompts


def over_prompts(scores: Tensor, group: int) -> float:
    """Standard error of the mean of scores [N] whose ``group`` neighbours answer one prompt, prompts being
    drawn; nan for a single prompt."""
    means = scores.double().view(-1, group).mean(dim=1)
    return float(means.std(unbiased=True)) / math.sqrt(len(means)) if len(means) > 1 else math.nan


@torch.no_grad()
def residuals(
    model: GPT, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], batch_size: int = 128
) -> Tensor:
    """fp32 [N, d_model]: the model's normed residuals where an answer's tokens are predicted, averaged."""
    found = []
    for at in range(0, len(answers), batch_size):
        some = slice(at, at + batch_size)
        rows = pack(prompts[some], answers[some], context=model.config.context, device=model.device)
        hidden = hidden_at(model, rows.tokens[:, :-1], rows.mask.bool()).float()
        counts = rows.mask.sum(dim=1).long()
        of = torch.arange(len(counts), device=hidden.device).repeat_interleave(counts)
        sums = hidden.new_zeros(len(counts), hidden.shape[1]).index_add(0, of, hidden)
        found.append(sums / counts.clamp_min(1)[:, None])
    return torch.cat(found)


class Cloud:
    """Mean and shrunken covariance of vectors [N, D], and how far others lie from them."""

    def __init__(self, vectors: Tensor):
        x = vectors.double()
        self.mean = x.mean(dim=0)
        centred = x - self.mean
        covariance = centred.T @ centred / max(len(x) - 1, 1)
        size = max(float(covariance.diagonal().mean()), 1e-12)
        shrunk = (1 - SHRINK) * covariance + SHRINK * size * torch.eye(len(self.mean)).to(covariance)
        self.root = torch.linalg.cholesky(shrunk)
        self.own = float(self._squares(x).mean())

    def distance(self, vectors: Tensor) -> float:
        """Mean squared Mahalanobis distance in units of the cloud's own; new vectors exceed that of few."""
        return float(self._squares(vectors.double()).mean()) / max(self.own, 1e-12)

    def _squares(self, x: Tensor) -> Tensor:
        white = torch.linalg.solve_triangular(self.root, (x - self.mean).T, upper=False)
        return white.square().sum(dim=0)
