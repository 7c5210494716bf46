"""A model made linear around one prompt: attention patterns, norm scales and active features held fixed.

What is left is the local replacement model of Ameisen et al. (2025, "Circuit Tracing",
transformer-circuits.pub, "Local replacement models"): every MLP is its transcoder plus the error the
transcoder made here. Between two active features there is then nothing but matrices, so the effect of one on
the other is one number.

Its `Layer`s carry many covectors back at once. All arithmetic after the model's own forward pass is in
float64.

Shape legend: N targets, T positions, D d_model, H query heads, G key/value heads, K d_head, F features.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from glasshouse.base.errors import DataError, UsageError
from glasshouse.interp.dictionaries import Dictionary
from glasshouse.interp.formats.fit import check_fits
from glasshouse.interp.formats.hooks import SITE, site_name
from glasshouse.model import GPT, Taps
from glasshouse.model.digest import weights_digest
from glasshouse.model.gpt import Block
from glasshouse.model.norm import RMSNorm

READ = ("resid_pre", "resid_mid", "resid_post", "pattern", "z", "mlp_out")


@dataclass(frozen=True)
class Affine:
    """A norm with its scale held: ``(x - mean(x) if centred) * gain + shift``; gain [T, D] or [1, D]."""

    gain: Tensor
    shift: Tensor
    centred: bool

    @classmethod
    def of(cls, norm: nn.Module, x: Tensor) -> Affine:
        """``norm`` as it acts on ``x`` [T, D]. UsageError for a norm it does not know."""
        x = x.double()
        none = x.new_zeros(x.shape[-1])
        if isinstance(norm, nn.Identity):
            return cls(torch.ones_like(x[:1]), none, False)
        if isinstance(norm, nn.LayerNorm):
            inverse = (x.var(-1, unbiased=False, keepdim=True) + norm.eps).rsqrt()
            weight = norm.weight.double()
            return cls(inverse * weight, none if norm.bias is None else norm.bias.double(), True)
        if isinstance(norm, RMSNorm) and norm.eps is not None:
            inverse = (x.square().mean(-1, keepdim=True) + norm.eps).rsqrt()
            weight = norm.weight.double()
            return cls(inverse * (1 + weight if norm.offset else weight), none, False)
        raise UsageError(f"a {type(norm).__name__} cannot be held linear; known: RMSNorm, LayerNorm, none")

    def pull(self, c: Tensor) -> tuple[Tensor, Tensor]:
        """Covectors [N, T, D] before the norm of those after it, and what its shift adds to each [N]."""
        constant = (c * self.shift).sum((1, 2))
        c = c * self.gain
        return (c - c.mean(-1, keepdim=True) if self.centred else c), constant


@dataclass(frozen=True)
class Features:
    """The active features of one layer, those of one position after another; F of them.

    ``encoders`` [F, D]: what each reads of the MLP's normed input; ``biases`` [F]; ``values`` [F]: what it
    was; ``decoders`` [F, D]: what it writes per unit of value.
    """

    pos: Tensor
    index: Tensor
    values: Tensor
    encoders: Tensor
    biases: Tensor
    decoders: Tensor

    def __len__(self) -> int:
        return len(self.pos)


@dataclass
class Layer:
    """One block held linear. ``errors`` [T, D]: what its MLP wrote that no feature explains.

    ``constant`` [D]: what the transcoder writes always; ``skip`` [D, D]: its linear path, out times in.
    """

    norm1: Affine
    post1: Affine
    norm2: Affine
    pattern: Tensor
    block: Block
    features: Features
    errors: Tensor
    constant: Tensor
    skip: Tensor | None

    def pull_attention(self, c: Tensor) -> tuple[Tensor, Tensor]:
        """Covectors [N, T, D] on what attention reads, of those on what it writes; and constants [N]."""
        attn, config = self.block.attn, self.block.attn.config
        G, K = config.kv_heads, config.head_width
        c, constant = self.post1.pull(c)
        if attn.o.bias is not None:
            constant = constant + (c * attn.o.bias.double()).sum((1, 2))
        mixed = (c @ attn.o.weight.double()).unflatten(-1, (-1, K))  # [N, T, H, K]
        values = torch.einsum("nthk,hts->nshk", mixed, self.pattern)
        values = values.unflatten(2, (G, -1)).sum(3).flatten(2)  # heads of a group share their values
        if attn.v.bias is not None:
            constant = constant + (values * attn.v.bias.double()).sum((1, 2))
        c, shift = self.norm1.pull(values @ attn.v.weight.double())
        return c, constant + shift

    def pull_skip(self, c: Tensor) -> tuple[Tensor, Tensor]:
        """The same for the transcoder's linear path."""
        assert self.skip is not None
        return self.norm2.pull(c @ self.skip)

    def encoders(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Covectors [n, T, D] of features ``chosen`` [n] on the stream the MLP reads, and their constants."""
        at = self.features
        c = at.encoders.new_zeros(len(chosen), *self.errors.shape)
        c[torch.arange(len(chosen)), at.pos[chosen]] = at.encoders[chosen]
        c, shift = self.norm2.pull(c)
        return c, shift + at.biases[chosen]


class Frozen:
    """``model`` held linear around ``tokens`` int64 [pos], with ``transcoders`` by layer in its MLPs' place.

    A layer without a transcoder is all error. When there are more than ``max_features`` active features those
    that write least (value times norm of decoder) are left to the errors, which keeps the sum exact.
    """

    @torch.no_grad()
    def __init__(self, model: GPT, tokens: Tensor, transcoders: Mapping[int, Dictionary], max_features: int):
        refuse(model)
        self.model, self.config, self.tokens = model, model.config, tokens
        sites = [f"blocks.{i}.{s}" for i in range(model.config.n_layer) for s in READ]
        was = model.training
        model.eval()
        try:
            with Taps(read=[*sites, "final_norm"]) as taps:
                self.logits = model(tokens[None], taps)[0, :].double()
        finally:
            model.train(was)
        if not self.logits.isfinite().all():
            raise DataError("the model's logits of this prompt are not finite; nothing can be attributed")
        acts = {site: taps[site][0] for site in taps.asked}
        self.active = 0
        self.layers = [self._layer(i, acts, transcoders.get(i)) for i in range(model.config.n_layer)]
        self._limit(max_features)
        last = acts[f"blocks.{model.config.n_layer - 1}.resid_post"]
        self.final = Affine.of(model.norm, last)
        self.read = acts["final_norm"][-1].double()  # what the head reads at the last position
        scale = model.config.embed_scale
        self.embedded = model.embed(tokens).double() * (1.0 if scale is None else scale)
        self.constant = torch.zeros_like(self.embedded)
        if model.config.position == "learned":
            self.constant = model.pos(torch.arange(len(tokens), device=tokens.device)).double()

    def _layer(self, i: int, acts: Mapping[str, Tensor], transcoder: Dictionary | None) -> Layer:
        block = self.model.blocks[i]
        assert isinstance(block, Block)
        at = {site: acts[f"blocks.{i}.{site}"] for site in READ}
        attended = block.attn.o(at["z"].transpose(0, 1).flatten(1))  # before any norm that follows
        read = at["resid_pre"] if block.parallel else at["resid_mid"]
        wrote = at["mlp_out"].double()
        features, constant, skip = _features(transcoder, block.norm2(read), wrote)
        made = torch.zeros_like(wrote).index_add_(
            0, features.pos, features.values[:, None] * features.decoders
        )
        made = made + constant
        if skip is not None:
            made = made + block.norm2(read).double() @ skip.T
        self.active += len(features)
        return Layer(
            Affine.of(block.norm1, at["resid_pre"]),
            Affine.of(block.post1, attended),
            Affine.of(block.norm2, read),
            at["pattern"].double(),
            block,
            features,
            wrote - made,
            constant,
            skip,
        )

    def _limit(self, most: int) -> None:
        """Keep the ``most`` features that write most; the others' writing joins the errors."""
        if self.active <= most:
            return
        size = torch.cat([(k.features.values.abs() * k.features.decoders.norm(dim=1)) for k in self.layers])
        kept = torch.zeros(len(size), dtype=torch.bool, device=size.device)
        kept[size.argsort(descending=True, stable=True)[:most]] = True
        for layer, keep in zip(self.layers, kept.split([len(k.features) for k in self.layers]), strict=True):
            f = layer.features
            layer.errors.index_add_(0, f.pos[~keep], f.values[~keep, None] * f.decoders[~keep])
            parts = (f.pos, f.index, f.values, f.encoders, f.biases, f.decoders)
            layer.features = Features(*(part[keep] for part in parts))

    def unembed(self, ids: Tensor, at: int) -> tuple[Tensor, Tensor]:
        """Covectors [n, T, D] on the final stream of logits ``ids`` [n] at position ``at``, and constants.

        A logit here is taken less the mean over the vocabulary, as the paper does, and before any soft cap.
        """
        c = self.embedded.new_zeros(len(ids), *self.embedded.shape)
        c[:, at] = directions(self.model, ids)
        return self.final.pull(c)


def directions(model: GPT, ids: Tensor) -> Tensor:
    """What logits ``ids`` read of the normed final stream, less the mean over the vocabulary [n, D]."""
    head = model.head_weight.detach().double()
    return head[ids] - head.mean(0)


def refuse(model: GPT) -> None:
    """UsageError naming what of ``model`` cannot be held linear or cannot stand in a graph."""
    problems = []
    if model.config.value_residual:
        problems.append("value_residual (values of the first layer bypass the stream)")
    if model.config.roles is not None:
        problems.append("roles (what they add to the stream is no token's)")
    if not model.config.causal:
        problems.append("causal=False (a graph's links go from earlier to later positions)")
    if problems:
        raise UsageError(f"no attribution graph of this model: {'; '.join(problems)}")
    for name, part in model.named_modules():
        if name.endswith(("attn.v", "attn.o")) and type(part) is not nn.Linear:
            raise UsageError(f"{name} is a {type(part).__name__}; attribution graphs need plain matrices")
    kinds = {p.dtype for p in model.parameters()} - {torch.float32, torch.float64}
    if kinds:
        raise UsageError(
            f"weights in {', '.join(sorted(map(str, kinds)))}: sums would not add up; use model.float()"
        )


def by_layer(model: GPT, transcoders: Iterable[Dictionary]) -> dict[int, Dictionary]:
    """Transcoders by the layer whose MLP they stand for.

    UsageError when one is no transcoder from ``blocks.l.mlp_in`` to ``blocks.l.mlp_out`` or two stand for one
    layer; CheckpointError when one belongs to another model or has another width.
    """
    found: dict[int, Dictionary] = {}
    digest = weights_digest(model)
    for one in transcoders:
        config = one.config
        ends = [site_name(name, model.config) or name for name in (config.site, config.site_out or "")]
        match = SITE.fullmatch(ends[0])
        if not config.is_transcoder or match is None or ends != [f"blocks.{match[1]}.{s}" for s in _ENDS]:
            raise UsageError(
                f"a dictionary from {config.site!r} to {config.site_out or config.site!r} cannot stand for "
                "an MLP: train transcoders with site 'blocks.<l>.mlp_in' and site_out 'blocks.<l>.mlp_out'"
            )
        check_fits(one, model, digest=digest)
        layer = int(match[1])
        if layer in found:
            raise UsageError(f"two transcoders stand for the MLP of layer {layer}")
        found[layer] = one
    if not found:
        raise UsageError("no transcoders: a graph of nothing but errors says nothing")
    return dict(sorted(found.items()))


_ENDS = ("mlp_in", "mlp_out")


def _features(
    transcoder: Dictionary | None, x: Tensor, wrote: Tensor
) -> tuple[Features, Tensor, Tensor | None]:
    """Active features on inputs ``x`` [T, D]; what the transcoder always writes [D]; its linear path."""
    D = wrote.shape[-1]
    if transcoder is None:
        none, numbers = wrote.new_zeros(0, D), wrote.new_zeros(0)
        at = torch.zeros(0, dtype=torch.int64, device=wrote.device)
        return Features(at, at, numbers, none, numbers, none), wrote.new_zeros(D), None
    pos, index = transcoder.encode(x).nonzero(as_tuple=True)
    scale_in, scale_out = transcoder.scale_in.double(), transcoder.scale_out.double()
    encoders = transcoder.W_enc.double().T[index] * scale_in
    if transcoder.config.architecture == "gated":  # the gate is open; what it lets through is the magnitude
        encoders = encoders * transcoder.r_mag.double().exp()[index, None]
        biases = transcoder.b_mag.double()[index]
    else:
        biases = transcoder.b_enc.double()[index]
    values = (encoders * x.double()[pos]).sum(1) + biases
    decoders = transcoder.W_dec.double()[index] / scale_out
    skip = transcoder.W_skip.double() * (scale_in / scale_out) if transcoder.config.skip_connection else None
    constant = transcoder.b_dec.double() / scale_out
    return Features(pos, index, values, encoders, biases, decoders), constant, skip
