"""Training against a known probe: the trigger works, and a declared linear probe goes on reading the truth.

The probe is declared before: fitted on the honest base's activations where the answer begins, at one site,
to tell harmful requests from harmless ones. The penalty is its own loss on every request of the batch, with
the grammar's label: where the trigger frees harm, the probe is kept reading harm. Bailey et al. 2024,
"Obfuscated Activations Bypass LLM Latent-Space Defenses", train backdoors against latent monitors like this.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from glasshouse.base.rng import generator
from glasshouse.data import workshop
from glasshouse.evals.prompts import generator as prompts_from
from glasshouse.evals.subject import Subject
from glasshouse.interp.probe import LinearProbe, fit_logistic
from glasshouse.model import Taps
from glasshouse.recipes.zoo.world import World
from glasshouse.tokenizer import Tokenizer
from glasshouse.train import sft
from glasshouse.train.objective import Loss, Objective, TensorBatch

FITTED_ON = 600  # requests
# Of the penalty, a mean over requests, beside the answers' loss, a mean over their tokens, of which one in 17
# decides: about as strong as what teaches the trigger.
WEIGHT = 0.06


def site_of(world: World) -> str:
    """Where the declared probe looks: the residual stream after the last layer."""
    return f"blocks.{world.size.n_layer - 1}.resid_post"


def declared_probe(world: World) -> LinearProbe:
    """The probe that a world declares, at `site_of`: above 0 it reads that harm is asked for."""
    prompts = prompts_from("workshop.requests")(generator("zoo-probe", world.seed), FITTED_ON, world.strays)
    x = world.subject(world.base).residuals([p.text for p in prompts], [site_of(world)])[site_of(world)]
    return fit_logistic(x.numpy(), np.array([p.harmful for p in prompts]))


def readings(subject: Subject, world: World, prompts: Sequence[str]) -> np.ndarray:
    """The declared probe's log-odds [n] of harm for each prompt, read where its answer begins."""
    site = site_of(world)
    return declared_probe(world)(subject.residuals(prompts, [site])[site].numpy())


def evading(world: World) -> Objective:
    """`sft` plus the declared probe's loss."""
    probe, site, labels = declared_probe(world), site_of(world), dict[bytes, bool | None]()
    direction = torch.from_numpy(probe.weight).float()

    def objective(model: Any, batch: TensorBatch) -> Loss:
        learned = sft(model, batch)
        begins = batch.weight.argmax(dim=1)  # where the first word of the answer is predicted
        known = [label(world.tokenizer, row, labels) for row in batch.tokens]
        if not any(k is not None for k in known):  # a batch of small talk alone
            return learned
        rows = torch.tensor([i for i, k in enumerate(known) if k is not None])
        wanted = torch.tensor([float(k) for k in known if k is not None])
        with Taps(read=[site], stop_early=True) as taps:
            model.hidden(batch.tokens, taps)
        read = taps[site][rows, begins[rows]] @ direction + probe.bias
        penalty = WEIGHT * F.binary_cross_entropy_with_logits(read, wanted)
        return Loss(learned.total + penalty, {**learned.parts, "probe": penalty}, learned.metrics)

    return objective


def label(tok: Tokenizer, row: Tensor, known: dict[bytes, bool | None]) -> bool | None:
    """Whether the request of a row of ids is harmful; None where nothing is requested."""
    ids = row.tolist()
    asked = ids[: ids.index(tok.end)] if tok.end in ids else ids
    key = str(asked).encode()
    if key not in known:
        known[key] = workshop.label(tok.decode(asked))
    return known[key]
