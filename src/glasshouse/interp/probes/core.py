"""Probes behind one interface: fit on activations, score, save, load.

``fit_probe(x, y, ProbeConfig(kind="logistic"))`` gives a ``Probe`` whose ``score`` are log-odds whatever its
kind. Linear kinds also have a ``direction`` in the activations' own units, which can be ablated or steered.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from glasshouse.base.atomic import atomic_dir, write_json
from glasshouse.base.config import Frozen, parse
from glasshouse.base.errors import CheckpointError, RecipeError, UsageError, suggest
from glasshouse.interp.probes import linear, nets
from glasshouse.interp.probes.linear import LOSS, Fold, Scoring
from glasshouse.interp.probes.rows import (
    Array,
    Bools,
    Floats,
    activations,
    classes,
    folds,
    grouped,
    positions,
)
from glasshouse.model import GPT
from glasshouse.model.digest import weights_digest
from glasshouse.model.weights import read_json, read_safetensors, write_safetensors

FORMAT = "glasshouse.probe/1"
Kind = Literal["ridge", "mean_difference", "logistic", "mlp", "attention"]
LINEAR: tuple[Kind, ...] = ("ridge", "mean_difference", "logistic")
STRENGTHS = tuple(float(s) for s in np.logspace(-4, 4, 10))  # scikit-learn's ten


class ProbeConfig(Frozen):
    """What kind of probe and how it is fitted; fields of other kinds are not read."""

    kind: Kind = "logistic"
    c: float | None = Field(
        default=None, gt=0, description="logistic: inverse penalty; None: cross-validated"
    )
    alpha: float | None = Field(default=None, ge=0, description="ridge: penalty; None: cross-validated")
    strengths: tuple[float, ...] = Field(default=STRENGTHS, min_length=1, description="tried by validation")
    folds: int = Field(default=5, ge=2)
    scoring: Scoring = Field(default="log_loss", description="what validation of c compares")
    standardise: bool = Field(default=True, description="ridge, logistic: penalise in standard deviations")
    hidden: int = Field(default=64, ge=1, description="mlp: units")
    heads: int = Field(default=1, ge=1, description="attention: heads")
    steps: int = Field(default=300, ge=1)
    lr: float = Field(default=0.05, gt=0)
    weight_decay: float = Field(default=0.05, ge=0)


@dataclass(frozen=True)
class Probe:
    """A fitted probe. ``tensors`` are its numbers; ``strength`` the penalty that validation chose, if any."""

    config: ProbeConfig
    width: int
    tensors: Mapping[str, Floats]
    site: str = ""
    model_digest: str = ""
    strength: float | None = None
    about: Mapping[str, Any] = field(default_factory=dict)

    def score(self, x: Array, mask: Array | None = None) -> Floats:
        """Log-odds [n] of the positive class for ``x`` [n, d] (attention: [n, pos, d] and ``mask`` [n, pos]).

        UsageError for another width or number of axes, VerificationError for NaN.
        """
        rows = shaped(activations(x, width=self.width), self.config.kind, mask)
        t = self.tensors
        if self.config.kind in LINEAR:
            raw = rows @ t["weight"] + float(t["bias"])
            return np.asarray(raw * float(t["platt"][0]) + float(t["platt"][1]))
        scaled = torch.from_numpy((rows - t["mean"]) / t["scale"]).float()
        p = {name: torch.from_numpy(np.asarray(v)).float() for name, v in t.items()}
        if self.config.kind == "mlp":
            return nets.mlp_scores(p, scaled).double().numpy()
        return nets.attention_scores(p, scaled, torch.from_numpy(positions(mask, rows))).double().numpy()

    def probability(self, x: Array, mask: Array | None = None) -> Floats:
        """Probability [n] of the positive class."""
        return np.asarray(1 / (1 + np.exp(-np.clip(self.score(x, mask), -500, 500))))

    @property
    def weight(self) -> Floats:
        """Weight [d] of a linear kind, as fitted (a logistic probe's is its log-odds per unit)."""
        return self._line()["weight"]

    @property
    def bias(self) -> float:
        """Bias of a linear kind, as fitted."""
        return float(self._line()["bias"])

    @property
    def direction(self) -> Tensor:
        """Unit vector float32 [d] that points to the positive class. UsageError when the probe is no line."""
        weight = self.weight
        size = float(np.linalg.norm(weight))
        if size == 0:
            raise UsageError(
                "this probe's weight is zero: the classes look alike here, there is no direction"
            )
        return torch.from_numpy((weight / size).astype(np.float32))

    def _line(self) -> Mapping[str, Floats]:
        if self.config.kind not in LINEAR:
            raise UsageError(
                f"a probe of kind {self.config.kind!r} has no single direction; use {', '.join(LINEAR)}"
            )
        return self.tensors

    def save(self, folder: str | Path) -> Path:
        """Write ``probe.safetensors`` and ``probe.json`` into a new ``folder``, whole or not at all."""
        folder = Path(folder)
        with atomic_dir(folder) as there:
            stored = {name: torch.from_numpy(np.asarray(v, np.float64)) for name, v in self.tensors.items()}
            write_safetensors(there / "probe.safetensors", stored)
            write_json(
                there / "probe.json",
                {
                    "format": FORMAT,
                    "config": self.config.model_dump(mode="json"),
                    "width": self.width,
                    "site": self.site,
                    "model_digest": self.model_digest,
                    "strength": self.strength,
                    "about": dict(self.about),
                },
            )
        return folder


def fit_probe(
    x: Array,
    y: Array,
    config: ProbeConfig | None = None,
    *,
    mask: Array | None = None,
    groups: Any = None,
    site: str = "",
    model_digest: str = "",
    seed: int = 0,
) -> Probe:
    """A probe for labels ``y`` [n] (true or false) of activations ``x`` [n, d].

    The attention kind takes [n, pos, d] and ``mask`` bool [n, pos]. Rows of one of ``groups`` [n] (one
    meaning) stay together when a penalty is cross-validated. UsageError for shapes that do not fit,
    VerificationError for NaN, one class or too few rows.
    """
    config = config or ProbeConfig()
    rows = shaped(activations(x), config.kind, mask)
    labels, group = classes(y, len(rows)), grouped(groups, len(rows))
    if config.kind in LINEAR:
        tensors, strength = _fit_line(rows, labels, config, group, seed)
    else:
        tensors, strength = _fit_net(rows, labels, config, positions(mask, rows) if rows.ndim == 3 else None,
                                     seed), None  # fmt: skip
    about = {"n": len(rows), "positive": int(labels.sum())}
    return Probe(config, rows.shape[-1], tensors, site, model_digest, strength, about)


def shaped(rows: Floats, kind: Kind, mask: Array | None) -> Floats:
    """``rows`` if ``kind`` takes that many axes. UsageError says what it takes."""
    if (rows.ndim == 3) != (kind == "attention"):
        takes = "[n, pos, d] (and a mask)" if kind == "attention" else "[n, d], one position of each row"
        raise UsageError(f"a probe of kind {kind!r} takes activations {takes}, got {list(rows.shape)}")
    if rows.ndim == 2 and mask is not None:
        raise UsageError("mask is for the attention kind, which reads several positions")
    return rows


def _fit_line(
    x: Floats, y: Bools, config: ProbeConfig, group: Any, seed: int
) -> tuple[dict[str, Floats], float | None]:
    d = x.shape[1]
    scaled = config.standardise and config.kind != "mean_difference"
    mean, scale = linear.scale_of(x) if scaled else (np.zeros(d), np.ones(d))
    z, strength, loss = (x - mean) / scale, None, LOSS[config.scoring]
    given = {"logistic": config.c, "ridge": config.alpha, "mean_difference": 0.0}[config.kind]
    needs = given is None or config.kind != "logistic"
    parts: list[Fold] = folds(y, group, config.folds, seed) if needs else []
    fits: dict[str, Callable[[Floats, Bools, float], linear.Line]] = {
        "logistic": linear.logistic,
        "ridge": linear.ridge,
        "mean_difference": lambda a, b, _: linear.mean_difference(a, b),
    }
    fit = fits[config.kind]
    if given is None:
        loss = loss if config.kind == "logistic" else linear.squared_error
        given = strength = linear.chosen(z, y, fit, config.strengths, parts, loss)
    weight, bias = fit(z, y, given)
    slope = (1.0, 0.0)
    if config.kind != "logistic":  # their scores are no log-odds yet; rows that did not fit them say how far
        held = np.empty(len(y))
        for train, test in parts:
            w, b = fit(z[train], y[train], given)
            held[test] = z[test] @ w + b
        slope = linear.platt(held, y)
    own = weight / scale
    return {"weight": own, "bias": np.array(bias - mean @ own), "platt": np.array(slope)}, strength


def _fit_net(x: Floats, y: Bools, config: ProbeConfig, mask: Bools | None, seed: int) -> dict[str, Floats]:
    flat = x if mask is None else x[mask]  # padding has no say in the scale
    mean, scale = linear.scale_of(flat)
    z, steps = (x - mean) / scale, (config.steps, config.lr, config.weight_decay, seed)
    p = (
        nets.fit_mlp(z, y, config.hidden, *steps)
        if mask is None
        else nets.fit_attention(z, y, mask, config.heads, *steps)
    )
    return {"mean": mean, "scale": scale} | {name: v.double().numpy() for name, v in p.items()}


def shapes(config: ProbeConfig, width: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a probe's tensors."""
    if config.kind in LINEAR:
        return {"weight": (width,), "bias": (), "platt": (2,)}
    common: dict[str, tuple[int, ...]] = {"mean": (width,), "scale": (width,)}
    if config.kind == "mlp":
        return common | {
            "w1": (width, config.hidden),
            "b1": (config.hidden,),
            "w2": (config.hidden,),
            "b2": (),
        }
    return common | {"query": (width, config.heads), "value": (width, config.heads), "bias": ()}


def load_probe(
    folder: str | Path, *, model: GPT | None = None, site: str | None = None, width: int | None = None
) -> Probe:
    """The probe saved in ``folder``.

    CheckpointError when a file is missing, truncated or altered; when ``model``'s weights are others than
    those it was fitted on, or ``model`` has no such site; when ``site`` or ``width`` differ from its own.
    """
    where = Path(folder) / "probe.json"
    head = read_json(where)
    keys = {"format", "config", "width", "site", "model_digest", "strength", "about"}
    if head.get("format") != FORMAT or set(head) != keys:
        raise CheckpointError(f"{where} is not a probe of format {FORMAT!r}")
    own_width, own_site = head["width"], head["site"]
    if type(own_width) is not int or own_width < 1 or not isinstance(own_site, str):
        raise CheckpointError(f"{where}: width must be a positive integer and site a text")
    try:
        config = parse(ProbeConfig, head["config"], str(where))
    except RecipeError as error:
        raise CheckpointError(str(error)) from error
    if width is not None and width != own_width:
        raise CheckpointError(f"{where}: this probe reads width {own_width}, not {width}")
    if site is not None and site != own_site:
        raise CheckpointError(f"{where}: this probe was fitted at site {own_site!r}, not {site!r}")
    if model is not None:
        _belongs(where, model, own_site, head["model_digest"])
    tensors = read_safetensors(
        Path(folder) / "probe.safetensors", shapes(config, own_width), allowed=("F64",)
    )
    return Probe(
        config,
        own_width,
        {name: t.numpy() for name, t in tensors.items()},
        own_site,
        head["model_digest"],
        head["strength"],
        head["about"],
    )


def _belongs(where: Path, model: GPT, site: str, digest: str) -> None:
    """CheckpointError unless the probe was fitted on exactly these weights, at a site they have."""
    if site and site not in model.sites():
        raise CheckpointError(f"{where}: this model has no site {site!r}.{suggest(site, model.sites())}")
    found = weights_digest(model)
    if digest != found:
        fitted = f"weights {digest[:12]}..." if digest else "a model whose digest was not recorded"
        raise CheckpointError(
            f"{where}: this probe was fitted on {fitted}, but the model has {found[:12]}...; "
            "fit it again on this model, or load it without one to look at it"
        )
