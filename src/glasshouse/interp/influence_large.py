"""Influence with curvature, for runs whose data no plain dot product ranks well: EK-FAC by `kronfluence`.

`interp.influence` takes every direction of parameter space alike. EK-FAC (George et al. 2018; Grosse et al.
2023, "Studying large language model generalization with influence functions") divides by the curvature first,
so that directions in which every document pulls count less. It needs the extra ``influence``, fits its
factors on a sample of the documents, and keeps them in a folder. Only weights of linear layers are tracked:
embeddings, a head tied to them, and norms are not.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from glasshouse.base.errors import UsageError, VerificationError
from glasshouse.interp.patching import Margin
from glasshouse.model import GPT

Rows = Sequence[Sequence[int]]
Batch = dict[str, Tensor]


class _Rows(Dataset[Batch]):
    """Token rows padded on the right, the weight of each token's prediction, and each row's last place."""

    def __init__(self, rows: Rows, masks: Rows | None = None):
        width = max(map(len, rows))
        self.tokens = torch.zeros(len(rows), width, dtype=torch.int64)
        self.weight = torch.zeros(len(rows), width)
        for i, row in enumerate(rows):
            self.tokens[i, : len(row)] = torch.as_tensor(row, dtype=torch.int64)
            if masks is not None:
                self.weight[i, : len(row)] = torch.as_tensor(masks[i], dtype=torch.float32)
        self.last = torch.tensor([len(row) - 1 for row in rows])

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, i: int) -> Batch:
        return {"tokens": self.tokens[i], "weight": self.weight[i], "last": self.last[i]}


def curved_scores(
    model: GPT,
    rows: Rows,
    readout: Margin,
    documents: Rows,
    masks: Rows,
    folder: str | Path,
    *,
    sample: int = 1024,
    batch: int = 16,
    strategy: Literal["ekfac", "kfac", "diagonal", "identity"] = "ekfac",
) -> np.ndarray:
    """Score [n] of each document: positive when fitting it *lowers* the mean read-out over token ``rows``.

    ``masks`` marks the tokens whose prediction counts. ``sample`` documents fit the factors, which are kept
    in ``folder``: give a new one for every model. "identity" is the plain dot product. UsageError without the
    extra ``influence`` or without documents; VerificationError when a score is not finite.
    """
    try:
        from kronfluence.analyzer import Analyzer, prepare_model
        from kronfluence.arguments import FactorArguments, ScoreArguments
        from kronfluence.task import Task
    except ImportError as missing:
        raise UsageError(
            f"influence with curvature needs kronfluence, which is not installed ({missing}): "
            "pip install 'glasshouse-lm[influence]'"
        ) from missing
    if not rows or not documents:
        raise UsageError("influence needs rows of the read-out and documents to rank; one of them is empty")

    class Ranking(Task):  # type: ignore[misc]  # kronfluence has no types
        """The training loss of a document, and the read-out as what is measured."""

        def compute_train_loss(self, batch: Batch, model: nn.Module, sample: bool = False) -> Tensor:
            return summed_loss(model, batch, sample)

        def compute_measurement(self, batch: Batch, model: nn.Module) -> Tensor:
            return summed_margin(model, batch, readout)

        def get_influence_tracked_modules(self) -> list[str]:
            return [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]

        def get_attention_mask(self, batch: Batch) -> None:
            return None  # a causal model never sees what is padded on the right

    was = logging.getLogger().level
    task, found, asked = Ranking(), _Rows(documents, masks), _Rows(rows)
    prepared = prepare_model(copy.deepcopy(model).eval(), task)
    analyzer = Analyzer(
        "influence", prepared, task, cpu=model.device.type == "cpu", output_dir=str(folder),
        disable_tqdm=True, disable_model_save=True, log_level=logging.ERROR,
    )  # fmt: skip
    chosen: Any = found
    if len(found) > sample:
        at = np.random.default_rng(0).permutation(len(found))[:sample].tolist()
        chosen = torch.utils.data.Subset(found, at)
    analyzer.fit_all_factors(
        "factors", chosen, per_device_batch_size=batch, factor_args=FactorArguments(strategy=strategy)
    )
    analyzer.compute_pairwise_scores(
        "scores", "factors", asked, found,
        per_device_query_batch_size=batch, per_device_train_batch_size=batch,
        score_args=ScoreArguments(aggregate_query_gradients=True),
    )  # fmt: skip
    logging.getLogger().setLevel(was)
    scores: np.ndarray = analyzer.load_pairwise_scores("scores")["all_modules"].double().cpu().numpy()[0]
    if not np.isfinite(scores).all():
        raise VerificationError("a document's score is NaN or infinite; nothing was measured")
    return scores / len(rows)


def summed_loss(model: nn.Module, batch: Batch, sample: bool = False) -> Tensor:
    """Next-token loss in nats, summed over what counts; ``sample``: of tokens drawn from the model itself."""
    tokens, weight = batch["tokens"], batch["weight"][:, 1:]
    logits = model(tokens)[:, :-1].float()
    target = tokens[:, 1:]
    if sample:  # the true Fisher matrix takes labels from the model (Kunstner et al. 2019)
        with torch.no_grad():
            chance = logits.softmax(-1).flatten(0, 1)
            target = torch.multinomial(chance, 1).view(target.shape)
    nats = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view(target.shape)
    return (nats * weight).sum()


def summed_margin(model: nn.Module, batch: Batch, readout: Margin) -> Tensor:
    """The read-out at each row's last token, summed over rows."""
    logits = model(batch["tokens"])
    return readout.margin(logits[torch.arange(len(logits), device=logits.device), batch["last"]]).sum()
