"""The graph's forward pass by hand: one reader at a time, with the model's own blocks and Taps.

Slow and simple: nothing here is shared with the code under test but the names of nodes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from glasshouse.interp.circuits import Graph
from glasshouse.interp.metric import Contrast, Distance, KLDivergence, LogitDifference
from glasshouse.model import GPT, GPTConfig, Taps

BASE: dict[str, Any] = {"vocab_size": 17, "context": 12, "d_model": 24, "n_layer": 2, "n_head": 4}
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "llama": {"qk_norm": True, "mlp": "gated", "activation": "silu", "n_kv_head": 2, "tied": False},
    "gpt2": {
        **{"norm": "layer", "position": "learned", "activation": "gelu"},
        **{"attn_bias": True, "attn_out_bias": True, "mlp_bias": True},
    },
    "parallel": {"norm": "layer", "parallel": True, "attn_out_bias": True, "rope_fraction": 0.67},
    "olmo2": {"norm_place": "post", "qk_norm": True, "qk_norm_span": "all", "n_kv_head": 2},
    "gemma2": {
        **{"norm_place": "both", "norm_offset": True, "attn_softcap": 5.0, "logit_softcap": 10.0},
        **{"embed_scale": 3.0, "window_tokens": 3, "full_layers": (1,), "n_kv_head": 1},
    },
    "post layer norm": {"norm_place": "post", "norm": "layer", "attn_out_bias": True},
    "both ways": {"causal": False, "norm": "none", "position": "learned"},
}


def noisy(seed: int = 0, **features: Any) -> GPT:
    """A model in which every component does something: all parameters are moved from where they start."""
    model = GPT(GPTConfig(**{**BASE, **features})).init_weights(seed).eval()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(
                torch.randn(p.shape, generator=generator)
                * (0.2 if p.ndim == 1 else 0.7 * p.shape[-1] ** -0.5)
            )
    return model


def twins(n: int = 3, length: int = 9, seed: int = 0, vocab: int = 17) -> tuple[Tensor, Tensor]:
    """Rows and twins that differ at position 4, the first one also at 7."""
    generator = torch.Generator().manual_seed(seed)
    clean = torch.randint(vocab, (n, length), generator=generator)
    corrupt = clean.clone()
    corrupt[:, 4] = (corrupt[:, 4] + 1) % vocab
    corrupt[0, 7] = (corrupt[0, 7] + 3) % vocab
    return clean, corrupt


def contrast(model: GPT, kind: str = "difference", n: int = 3, seed: int = 0) -> Contrast:
    """A contrast with each kind of metric."""
    clean, corrupt = twins(n, seed=seed, vocab=model.config.vocab_size)
    with torch.no_grad():
        logits = model(clean)
    if kind == "distance":
        return Contrast(clean, corrupt, Distance(logits))
    at = torch.tensor([8, 7, 6] * n)[:n]
    if kind == "kl":
        return Contrast(clean, corrupt, KLDivergence(logits[torch.arange(n), at], at))
    return Contrast(clean, corrupt, LogitDifference(torch.arange(n) + 1, torch.arange(n) + 5, at))


@torch.no_grad()
def writers(model: GPT, graph: Graph, tokens: Tensor) -> dict[str, Tensor]:
    """What every node writes in the model's own run."""
    return _pass(model, graph, tokens, None, None)[0]


@torch.no_grad()
def logits(model: GPT, graph: Graph, tokens: Tensor, kept: set[str], other: dict[str, Tensor]) -> Tensor:
    """Logits with edges outside ``kept`` carrying ``other`` [node -> [n, pos, d_model]]."""
    return _pass(model, graph, tokens, kept, other)[1]


def _pass(
    model: GPT, graph: Graph, tokens: Tensor, kept: set[str] | None, other: dict[str, Tensor] | None
) -> tuple[dict[str, Tensor], Tensor]:
    config = model.config
    x = model.embed(tokens) * (config.embed_scale or 1.0)
    places = model.pos(torch.arange(tokens.shape[1])).expand_as(x) if config.position == "learned" else None
    rest = torch.zeros_like(x)
    wrote = {"embed" if graph.split_input else "input": x}
    if places is not None and graph.split_input:
        wrote["pos_embed"] = places
    elif places is not None:
        rest = rest + places
    full, local = model.where(tokens.shape[1])

    def seen(reader: str, names: list[str]) -> Tensor:
        def one(name: str) -> Tensor:
            if kept is None or other is None or f"{name}->{reader}" in kept:
                return wrote[name]
            return other[name]

        return sum((one(n) for n in names), torch.zeros_like(x)) + rest

    for i, block in enumerate(model.blocks):
        where, names = local if block.windowed else full, list(wrote)
        made = [
            _head(block, i, h, [seen(f"a{i}.h{h}<{p}>", names) for p in "qkv"], where)
            for h in range(config.n_head)
        ]
        beside = seen(f"m{i}", names)
        total = torch.stack(made).sum(0) + (0 if block.attn.o.bias is None else block.attn.o.bias)
        shares = [_share(block.post1, m, total) for m in made]
        rest = rest + block.post1(total) - torch.stack(shares).sum(0)
        wrote |= {f"a{i}.h{h}": share for h, share in enumerate(shares)}
        read = beside if block.parallel else seen(f"m{i}", list(wrote))
        wrote[f"m{i}"] = block.post2(block.mlp(block.norm2(read)))
    return wrote, model.unembed(model.norm(seen("logits", list(wrote))))


def _head(block: Any, layer: int, head: int, inputs: list[Tensor], where: Any) -> Tensor:
    """One head's output: queries, keys and values read from three runs, put into a fourth."""
    parts = {}
    for site, x in zip("qkv", inputs, strict=True):
        taps = Taps(read=[f"blocks.{layer}.{site}"])
        taps.check([f"blocks.{layer}.{s}" for s in ("q", "k", "v", "z")])
        block.attn(block.norm1(x), where, taps)
        parts[site] = taps[f"blocks.{layer}.{site}"]

    def put(value: Tensor) -> Any:
        return lambda x: value

    edit = {f"blocks.{layer}.{site}": put(value) for site, value in parts.items()}
    taps = Taps(read=[f"blocks.{layer}.z"], edit=edit)
    taps.check([f"blocks.{layer}.{s}" for s in ("q", "k", "v", "z")])
    block.attn(block.norm1(inputs[0]), where, taps)
    z = taps[f"blocks.{layer}.z"][:, head]
    K = z.shape[-1]
    return z @ block.attn.o.weight[:, head * K : (head + 1) * K].T


def _share(norm: nn.Module, one: Tensor, total: Tensor) -> Tensor:
    """One head's part of a normed sum, from the norm's own output."""
    if isinstance(norm, nn.Identity):
        return one
    if isinstance(norm, nn.LayerNorm):
        centred = total - total.mean(-1, keepdim=True)
        return (one - one.mean(-1, keepdim=True)) * (norm(total) - norm.bias) / centred
    return one * norm(total) / total
