"""Dictionaries: sparse autoencoders and transcoders, one class whose `encode` follows its architecture.

| architecture | features, of pre-activations p = (x - b_dec) W_enc + b_enc         | source              |
|--------------|--------------------------------------------------------------------|---------------------|
| l1           | relu(p)                                                            | Bricken et al. 2023 |
| gated        | relu(magnitude) where gate > 0, both from one W_enc                | Rajamanoharan 2024a |
| topk         | the k largest of relu(p), zero elsewhere                           | Gao et al. 2024     |
| batchtopk    | p where p > one threshold; in training the n k largest of n inputs | Bussmann 2024       |
| matryoshka   | the same, trained on nested prefixes                               | Bussmann 2025       |
| jumprelu     | p where p > a learned threshold of its own                         | Rajamanoharan 2024b |

Parameters carry the names that SAELens gives them. Activations may be scaled (`scale_in`, `scale_out`): the
scales are part of the model, so that it takes and gives raw activations; `folded` bakes them in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from glasshouse.base.errors import DataError, UsageError
from glasshouse.draw import table
from glasshouse.interp.dictionaries.config import DictionaryConfig
from glasshouse.interp.dictionaries.sparse import sparse_decode, top_k


@dataclass(frozen=True)
class ActivationBatch:
    """Raw activations ``x`` [n, d_in]; for a transcoder also its targets ``y`` [n, d_out]. ``shards`` names
    where they came from, for messages.
    """

    x: Tensor
    y: Tensor | None = None
    shards: tuple[str, ...] = ()


class Dictionary(nn.Module):
    """``W_enc`` [d_in, d_sae], ``W_dec`` [d_sae, d_out], biases, and what training needs to remember.

    Buffers: ``scale_in``, ``scale_out`` (scalars), ``since_fired`` int64 [d_sae] (activations since a feature
    was last active), and ``topk_threshold`` (scalar, batchtopk and matryoshka: zero until trained).
    """

    W_enc: nn.Parameter
    W_dec: nn.Parameter
    b_dec: nn.Parameter
    scale_in: Tensor
    scale_out: Tensor
    since_fired: Tensor
    topk_threshold: Tensor

    def __init__(self, config: DictionaryConfig):
        super().__init__()
        self.config = config
        d_in, d_sae, d_out = config.d_in, config.d_sae, config.out
        self.W_enc = nn.Parameter(torch.zeros(d_in, d_sae))
        if config.architecture == "gated":
            self.b_gate = nn.Parameter(torch.zeros(d_sae))
            self.r_mag = nn.Parameter(torch.zeros(d_sae))
            self.b_mag = nn.Parameter(torch.zeros(d_sae))
        else:
            self.b_enc = nn.Parameter(torch.zeros(d_sae))
        if config.architecture == "jumprelu":
            self.threshold = nn.Parameter(torch.full((d_sae,), config.jumprelu_threshold))
        self.W_dec = nn.Parameter(torch.zeros(d_sae, d_out))
        self.b_dec = nn.Parameter(torch.zeros(d_out))
        if config.skip_connection:
            self.W_skip = nn.Parameter(torch.zeros(d_out, d_in))
        self.register_buffer("scale_in", torch.ones(()))
        self.register_buffer("scale_out", torch.ones(()))
        self.register_buffer("since_fired", torch.zeros(d_sae, dtype=torch.int64))
        if config.architecture in ("batchtopk", "matryoshka"):
            self.register_buffer("topk_threshold", torch.zeros(()))

    @torch.no_grad()
    def init_weights(self, seed: int) -> Dictionary:
        """Rows of ``W_dec`` even on the unit sphere, ``W_enc`` its transpose (Gao et al. 2024, app. A.1).

        A transcoder's encoder is drawn on its own. Biases, scales and counters start over.
        """
        generator = torch.Generator().manual_seed(seed)
        self._reset()
        rows = torch.randn(self.W_dec.shape, generator=generator)
        self.W_dec.copy_(rows / rows.norm(dim=1, keepdim=True))
        if self.config.is_transcoder:
            reads = torch.randn(self.W_enc.T.shape, generator=generator)
            self.W_enc.copy_((reads / reads.norm(dim=1, keepdim=True)).T)
        else:
            self.W_enc.copy_(self.W_dec.T)
        return self

    def _reset(self) -> None:
        for name, tensor in [*self.named_parameters(), *self.named_buffers()]:
            tensor.zero_()
            if name in ("scale_in", "scale_out"):
                tensor.fill_(1.0)
            elif name == "threshold":
                tensor.fill_(self.config.jumprelu_threshold)

    # -- what it computes ----------------------------------------------------------------------------------

    def centred(self, x: Tensor) -> Tensor:
        """What the encoder multiplies, [..., d_in]: ``x`` scaled, without ``b_dec`` where that is taken off.

        Raises DataError when ``x`` has another width.
        """
        if x.shape[-1] != self.config.d_in:
            at = f" (site {self.config.site})" if self.config.site else ""
            raise DataError(
                f"activations of width {x.shape[-1]} for a dictionary of width {self.config.d_in}{at}: "
                "read the site it was trained on, or train one for this width"
            )
        scaled = x.to(self.W_enc.dtype) * self.scale_in
        return scaled - self.b_dec if self.config.apply_b_dec_to_input else scaled

    def pre_activations(self, x: Tensor) -> Tensor:
        """[..., d_sae] before any selection. Gated: those of the gate."""
        bias = self.b_gate if self.config.architecture == "gated" else self.b_enc
        return self.centred(x) @ self.W_enc + bias

    def encode(self, x: Tensor) -> Tensor:
        """Features [..., d_sae] of raw activations [..., d_in], dense, as at inference.

        Raises DataError for another width, or when an activation is not finite.
        """
        refuse_not_finite(x)
        pre = self.pre_activations(x)
        match self.config.architecture:
            case "gated":
                magnitude = self.centred(x) @ (self.W_enc * self.r_mag.exp()) + self.b_mag
                return magnitude.relu() * (pre > 0)
            case "topk":
                values, indices = top_k(pre, self.config.k or 1)
                return torch.zeros_like(pre).scatter(-1, indices, values.relu())
            case "jumprelu":
                return pre.relu() * (pre > self.threshold)
            case "batchtopk" | "matryoshka":
                return pre.relu() * (pre > self.topk_threshold)
        return pre.relu()

    def encode_sparse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Values [n, k] and feature numbers int64 [n, k] of raw activations [n, d_in]; values may be zero.

        Raises UsageError when the architecture does not give every activation the same number of features.
        """
        if self.config.architecture != "topk":
            raise UsageError(
                f"a {self.config.architecture} dictionary has no fixed number of active features; use encode"
            )
        refuse_not_finite(x)
        values, indices = top_k(self.pre_activations(x), self.config.k or 1)
        return values.relu(), indices

    def decode(self, features: Tensor) -> Tensor:
        """Raw activations [..., d_out] from features [..., d_sae]; a skip connection's part is not in it."""
        return (features @ self.W_dec + self.b_dec) / self.scale_out

    def decode_sparse(self, values: Tensor, indices: Tensor) -> Tensor:
        """`decode` [n, d_out] of features given as `encode_sparse` gives them."""
        return (sparse_decode(values, indices, self.W_dec) + self.b_dec) / self.scale_out

    def forward(self, x: Tensor) -> Tensor:
        """The reconstruction [..., d_out], or a transcoder's prediction, of raw activations [..., d_in]."""
        if self.config.architecture == "topk":
            values, indices = self.encode_sparse(x.reshape(-1, x.shape[-1]))
            y = self.decode_sparse(values, indices).reshape(*x.shape[:-1], self.config.out)
        else:
            y = self.decode(self.encode(x))
        return y + self.skipped(x) if self.config.skip_connection else y

    def skipped(self, x: Tensor) -> Tensor:
        """What the skip connection adds, [..., d_out] raw; Paulo et al. 2025 (arXiv 2501.18823)."""
        return (x.to(self.W_skip.dtype) * self.scale_in) @ self.W_skip.T / self.scale_out

    # -- what training does besides gradients --------------------------------------------------------------

    @torch.no_grad()
    def project_gradient(self) -> None:
        """Take from ``W_dec``'s gradient what would change the norm of its rows (Bricken et al. 2023)."""
        gradient = self.W_dec.grad
        if gradient is None or not self.config.normalize_decoder:
            return
        along = torch.linalg.vecdot(gradient, self.W_dec) / self.W_dec.square().sum(1).clamp(min=1e-12)
        gradient.addcmul_(self.W_dec, along[:, None], value=-1)

    @torch.no_grad()
    def constrain(self) -> None:
        """After an update: rows of ``W_dec`` back to norm 1, thresholds of JumpReLU not below zero."""
        if self.config.normalize_decoder:
            self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True).clamp(min=1e-12))
        if self.config.architecture == "jumprelu":
            self.threshold.clamp_(min=0.0)

    def dead(self) -> Tensor:
        """Features bool [d_sae] that have not fired for ``dead_after`` activations."""
        return self.since_fired >= self.config.dead_after

    # -- going elsewhere -----------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.W_dec.device

    @torch.no_grad()
    def folded(self) -> Dictionary:
        """An equal dictionary whose scales are 1: features come in units of raw activations.

        Rows of ``W_dec`` keep their norms unless a transcoder scales its two sides differently.
        """
        config = self.config.model_copy(update={"normalize_activations": "none"})
        other = Dictionary(config).to(self.device)
        tensors = {name: t.detach().clone() for name, t in self.state_dict().items()}
        shrink = 1 / self.scale_in  # features are positively homogeneous in everything that has their unit
        for name in ("b_enc", "b_gate", "b_mag", "threshold", "topk_threshold"):
            if name in tensors:
                tensors[name] *= shrink
        ratio = self.scale_in / self.scale_out
        tensors["W_dec"] *= ratio
        tensors["b_dec"] /= self.scale_out
        if "W_skip" in tensors:
            tensors["W_skip"] *= ratio
        tensors["scale_in"], tensors["scale_out"] = torch.ones(()), torch.ones(())
        other.load_state_dict(tensors)
        return other

    def weights(self) -> dict[str, Tensor]:
        """Contiguous copies of what it computes with, by name: parameters, and ``topk_threshold``."""
        kept: dict[str, Tensor] = dict(self.named_parameters())
        if "topk_threshold" in self._buffers:
            kept["topk_threshold"] = self.topk_threshold
        return {name: t.detach().clone().contiguous() for name, t in kept.items()}

    @classmethod
    def from_weights(
        cls, config: DictionaryConfig, tensors: Mapping[str, Tensor], where: str = "weights"
    ) -> Dictionary:
        """A dictionary of ``config`` with `weights` in it. ``where`` is what a person calls their source.

        Raises DataError when a name is missing or not known, a shape differs, or a number is not finite.
        """
        made = cls(config)
        expected = made.weights()
        problems = [f"'{name}' is missing" for name in expected.keys() - tensors.keys()]
        problems += [f"'{name}' is not part of it" for name in tensors.keys() - expected.keys()]
        for name in sorted(expected.keys() & tensors.keys()):
            want, got = tuple(expected[name].shape), tuple(tensors[name].shape)
            if want != got:
                problems.append(f"'{name}' has shape {list(got)}, not {list(want)}")
            elif not tensors[name].isfinite().all():
                problems.append(f"'{name}' has numbers that are not finite")
        if problems:
            raise DataError(
                f"{where}: {'; '.join(sorted(problems))}: not the weights of a {config.architecture} "
                f"dictionary with d_in {config.d_in}, d_sae {config.d_sae}, d_out {config.out}"
            )
        made.load_state_dict({name: t.float() for name, t in tensors.items()}, strict=False)
        return made

    def _repr_html_(self) -> str:
        c = self.config
        kind = "transcoder" if c.is_transcoder else "sparse autoencoder"
        rows = [
            ("architecture", f"{c.architecture} {kind}"),
            ("width", f"{c.d_in} to {c.d_sae} features to {c.out}"),
            ("active features", str(c.k) if c.k else "not fixed"),
            ("site", c.site or "not recorded"),
            ("dead features", f"{int(self.dead().sum())} of {c.d_sae}"),
        ]
        return str(table(("dictionary", ""), rows, "dictionary"))


def refuse_not_finite(x: Tensor, shards: tuple[str, ...] = ()) -> None:
    """Raise DataError, with the number of rows, when an activation is not finite."""
    if x.isfinite().all():
        return
    bad = (~x.isfinite()).reshape(-1, x.shape[-1]).any(dim=1)
    source = f" from {', '.join(shards)}" if shards else ""
    raise DataError(
        f"{int(bad.sum())} of {len(bad)} activations{source} are not finite (first: row "
        f"{int(bad.nonzero()[0])}): the model that made them overflowed; leave those rows out, or read it in "
        "fp32"
    )
