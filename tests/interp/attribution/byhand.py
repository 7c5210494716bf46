"""A GPT computed from its equations, one row and one head at a time, with any part changed on the way.

Slow, and written without the model's own forward pass, its attention or its taps: what interventions are
compared with. ``change`` maps the name of a part to a function of its value:

``embed`` [T, D] | (``q``|``k``|``v``|``z``, layer, head) [T, K] | (``mlp_out``|``attn_out``|``resid_post``,
layer) [T, D] | (``reads_q``|``reads_k``|``reads_v``, layer, head) [T, D]: the stream that this query head
alone reads | (``reads_mlp``, layer) [T, D] | (``blocked``, layer, head) bool [T, T]. ``k`` and ``v`` are
named by query head: a change of one that is shared is made once for each sharer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from glasshouse.interp.metric import Contrast, LogitDifference
from glasshouse.model import GPT
from interp.dice import thrown

SHAPES: dict[str, dict[str, Any]] = {
    "pre-norm": {},
    "gpt2": {
        "position": "learned", "norm": "layer", "mlp": "plain", "activation": "gelu_tanh",
        "attn_bias": True, "attn_out_bias": True, "mlp_bias": True,
    },
    "parallel": {
        "parallel": True, "norm": "layer", "rope_fraction": 0.5, "mlp": "plain", "activation": "gelu",
        "attn_bias": True, "attn_out_bias": True, "mlp_bias": True, "tied": False,
    },
    "grouped, qk-norm": {"n_kv_head": 2, "qk_norm": True},
    "post-norm": {"norm_place": "post", "qk_norm": True, "qk_norm_span": "all"},
    "post-norm with biases": {
        "norm_place": "post", "norm": "layer", "attn_out_bias": True, "mlp_bias": True,
        "position": "learned",
    },
    "caps, window, both norms": {
        "norm_place": "both", "norm_offset": True, "attn_softcap": 2.0, "logit_softcap": 3.0,
        "embed_scale": 4.0, "window_tokens": 4, "full_layers": (1,), "n_kv_head": 2,
        "activation": "gelu_tanh",
    },
    "value residual, no norm": {
        "value_residual": True, "norm": "none", "mlp": "plain", "activation": "relu2",
    },
}  # fmt: skip
Change = dict[Any, Callable[[Tensor], Tensor]]


def make(shape: str, seed: int = 0) -> GPT:
    """A random model in fp64; two layers, four heads, six positions are enough to go wrong."""
    scale = 0.15 if SHAPES[shape].get("norm") == "none" else 0.3
    return thrown(seed, scale, **({"n_layer": 2} | SHAPES[shape])).double()


def contrast(n: int = 5, T: int = 6, seed: int = 1) -> Contrast:
    """Random rows of 24 tokens, differing at position 2, judged at positions of their own."""
    drawn = torch.Generator().manual_seed(seed)
    clean = torch.randint(0, 24, (n, T), generator=drawn)
    corrupt = clean.clone()
    corrupt[:, 2] = (corrupt[:, 2] + torch.randint(1, 24, (n,), generator=drawn)) % 24
    at = torch.randint(T - 2, T, (n,), generator=drawn)
    right, wrong = torch.randint(0, 24, (2, n), generator=drawn)
    return Contrast(clean, corrupt, LogitDifference(right, (wrong + (right == wrong)) % 24, at))


def measure(data: Contrast, i: int, logits: Tensor) -> float:
    """The logit difference of row i from its logits [T, vocab]."""
    metric = data.metric
    assert isinstance(metric, LogitDifference)
    at = int(metric.at[i])
    return float(logits[at, metric.right[i]] - logits[at, metric.wrong[i]])


def norm(p: Any, config: Any, x: Tensor) -> Tensor:
    """One of the model's norms, by its formula."""
    if isinstance(p, torch.nn.Identity):
        return x
    if config.norm == "layer" and hasattr(p, "bias"):
        mean = x.mean(-1, keepdim=True)
        spread = ((x - mean) ** 2).mean(-1, keepdim=True)
        return (x - mean) / (spread + config.norm_eps) ** 0.5 * p.weight + p.bias
    gain = p.weight + 1 if config.norm_offset else p.weight
    return x / ((x**2).mean(-1, keepdim=True) + config.norm_eps) ** 0.5 * gain


def turn(x: Tensor, config: Any) -> Tensor:
    """Rotary positions [T, K], as complex numbers."""
    if config.position != "rotary":
        return x
    half = config.rotated // 2
    angle = torch.arange(len(x))[:, None] * config.rope_theta ** (-torch.arange(half).double() / half)
    turned = torch.complex(x[:, :half], x[:, half : 2 * half]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([turned.real, turned.imag, x[:, 2 * half :]], 1)


@torch.no_grad()
def forward(model: GPT, tokens: Tensor, change: Change | None = None) -> dict[Any, Tensor]:
    """Every part by name, and ``logits`` [T, vocab], of one row int64 [T]."""
    c, put, found = model.config, change or {}, {}
    T, K = len(tokens), c.head_width

    def part(name: Any, x: Tensor) -> Tensor:
        found[name] = put[name](x) if name in put else x
        return found[name]

    x = model.embed.weight[tokens] * (c.embed_scale or 1.0)
    if c.position == "learned":
        x = x + model.pos.weight[:T]
    x = part("embed", x)
    first: dict[int, Tensor] = {}
    for layer in range(c.n_layer):
        b: Any = model.blocks[layer]
        total = torch.zeros_like(x) if b.attn.o.bias is None else b.attn.o.bias.expand_as(x).clone()
        for h in range(c.n_head):
            g = h * c.kv_heads // c.n_head

            def made(s: str, head: int, x: Tensor = x, layer: int = layer, b: Any = b, h: int = h) -> Tensor:
                seen = norm(b.norm1, c, part((f"reads_{s}", layer, h), x))
                linear = getattr(b.attn, s)
                whole = seen @ linear.weight.T + (0 if linear.bias is None else linear.bias)
                p = getattr(b.attn, f"{s}_norm", None)
                if p is not None and c.qk_norm_span == "all":
                    whole = whole / ((whole**2).mean(-1, keepdim=True) + c.norm_eps) ** 0.5 * p.weight
                mine = whole[:, head * K : (head + 1) * K]
                if p is not None and c.qk_norm_span == "head":
                    mine = mine / ((mine**2).mean(-1, keepdim=True) + c.norm_eps) ** 0.5 * p.weight
                return mine

            q, k, v = made("q", h), made("k", g), made("v", g)
            if c.value_residual:
                if layer == 0:
                    first[h] = v
                else:
                    v = b.attn.mix[0] * first[h] + b.attn.mix[1] * v
            q, k = part(("q", layer, h), turn(q, c)), part(("k", layer, h), turn(k, c))
            v = part(("v", layer, h), v)
            blocked = put[("blocked", layer, h)](q) if ("blocked", layer, h) in put else None
            rows = []
            for t in range(T):
                low = max(0, t - c.window_tokens + 1) if c.windowed(layer) else 0
                sees = [s for s in range(low, t + 1) if blocked is None or not blocked[t, s]]
                score = k[sees] @ q[t] * (c.attn_scale or K**-0.5)
                if c.attn_softcap is not None:
                    score = c.attn_softcap * torch.tanh(score / c.attn_softcap)
                rows.append(score.exp() / score.exp().sum() @ v[sees])
            z = torch.stack(rows)
            z = part(("z", layer, h), z)
            total = total + z @ b.attn.o.weight[:, h * K : (h + 1) * K].T
        attended = part(("attn_out", layer), norm(b.post1, c, total))
        mid = x + attended
        seen = norm(b.norm2, c, part(("reads_mlp", layer), x if c.parallel else mid))
        up = seen @ b.mlp.up.weight.T + (0 if b.mlp.up.bias is None else b.mlp.up.bias)
        act = {"gelu": F.gelu, "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"), "silu": F.silu,
               "relu": F.relu, "relu2": lambda y: F.relu(y) ** 2}[c.activation]  # fmt: skip
        if c.mlp == "gated":
            gate = seen @ b.mlp.gate.weight.T + (0 if b.mlp.gate.bias is None else b.mlp.gate.bias)
            inner = act(gate) * up
        else:
            inner = act(up)
        out = inner @ b.mlp.down.weight.T + (0 if b.mlp.down.bias is None else b.mlp.down.bias)
        x = part(("resid_post", layer), mid + part(("mlp_out", layer), norm(b.post2, c, out)))
    logits = norm(model.norm, c, x) @ model.head_weight.T
    if c.logit_softcap is not None:
        logits = c.logit_softcap * torch.tanh(logits / c.logit_softcap)
    found["logits"] = logits
    return found


def give(value: Tensor, pos: int | None = None) -> Callable[[Tensor], Tensor]:
    """A change that puts ``value`` [T, ...] in place, at one position or all."""

    def put(x: Tensor) -> Tensor:
        out = x.clone()
        at = slice(None) if pos is None else pos
        out[at] = value[at]
        return out

    return put
