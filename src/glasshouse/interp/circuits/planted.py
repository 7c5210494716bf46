"""Random transformers whose circuit is known, because their weights were written by hand.

The stream is cut into subspaces (rotated at random, so that no axis means anything): one for tokens, one for
positions, one for what each component writes. A random program puts operations into components:

| operation | where | what it writes                                                          |
|-----------|-------|-------------------------------------------------------------------------|
| move      | head  | what stood at one fixed position                                        |
| previous  | head  | what stood one position before                                          |
| match     | head  | a value from where a key equals a query: reads through q, k and v       |
| map       | MLP   | another name for each symbol                                            |
| join      | MLP   | a symbol that depends on two                                            |

The logits read what one of them wrote. Operations that the answer does not depend on are decoys: they run,
on real data, and matter to nobody; components without operation are inert. The true circuit is the set of
edges along which the answer's ancestors are read. Nothing here is fitted, and no method was tuned on it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from glasshouse.base.errors import UsageError
from glasshouse.base.rng import generator, seed_from
from glasshouse.interp.metric import Contrast, LogitDifference
from glasshouse.model import GPT, GPTConfig
from glasshouse.model.gpt import MLP, Attention

GAIN = 6.0  # of attention scores and logits: sharp, not saturated
LEAST = 3  # components of a circuit
SURE = 0.8  # chance of its best symbol from which a row's answer counts as one


@dataclass(frozen=True)
class Op:
    """An operation in a component: what it does, what it reads (names of writers), where it looks."""

    kind: str
    reads: tuple[str, ...]
    at: int = 0


@dataclass(frozen=True)
class Shape:
    """How large, and which features: ``norm`` none or rms, ``parallel`` blocks."""

    n_layer: int = 3
    n_head: int = 4
    symbols: int = 6
    length: int = 8
    norm: str = "none"
    parallel: bool = False

    @property
    def config(self) -> GPTConfig:
        """The model's config: its stream has room for every component's own subspace."""
        m, T, components = self.symbols, self.length, self.n_layer * (self.n_head + 1)
        return GPTConfig(
            vocab_size=m,
            context=T,
            d_model=m * (1 + components) + T,
            n_layer=self.n_layer,
            n_head=self.n_head,
            d_head=max(m, T),
            d_mlp=m * m,
            norm="rms" if self.norm == "rms" else "none",
            parallel=self.parallel,
            position="learned",
            activation="relu",
            mlp_bias=True,
            attn_scale=1.0,
            tied=False,
        )


@dataclass(frozen=True)
class Planted:
    """A model with a known circuit.

    ``edges``: the circuit, under ablation by the corrupted twin (positions do not change between twins, so
    edges that only carry positions are none). ``program``: component -> operation; ``answer``: the component
    whose output the logits read. ``active``: how many operations are decoys.
    """

    model: GPT
    edges: frozenset[str]
    program: dict[str, Op]
    answer: str
    shape: Shape
    seed: int

    @property
    def decoys(self) -> int:
        """Operations that run and do not matter."""
        return len(self.program) - len(ancestors(self.program, self.answer))

    def contrast(self, n: int, seed: int = 0) -> Contrast:
        """``n`` rows whose answer is clear, and twins of other random symbols with another clear answer."""
        rng = generator("planted rows", self.seed, seed)
        found: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        count = 0
        for _ in range(200):
            clean, corrupt = (
                torch.from_numpy(rng.integers(self.shape.symbols, size=(4 * n, self.shape.length)))
                for _ in range(2)
            )
            (right, sure), (wrong, also) = self._answers(clean), self._answers(corrupt)
            good = (sure & also & (right != wrong)).nonzero()[:, 0]
            found.append((clean[good], corrupt[good], right[good], wrong[good]))
            count += len(good)
            if count >= n:
                clean, corrupt, right, wrong = (torch.cat(x)[:n] for x in zip(*found, strict=True))
                at = torch.full((n,), self.shape.length - 1)
                return Contrast(clean, corrupt, LogitDifference(right, wrong, at))
        raise UsageError(f"this program's answer is clear on {count} rows only, not {n}")

    @torch.no_grad()
    def _answers(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        chance = self.model(rows)[:, -1].softmax(-1)
        return chance.argmax(-1), chance.amax(-1) > SURE

    def scrambled(self) -> GPT:
        """A twin whose components write where another's readers look: same parts, no circuit."""
        rng = generator("scrambled", self.seed)
        names = _components(self.shape)
        order = rng.permutation(len(names))
        after = {names[a]: names[b] for a, b in zip(order, np.roll(order, 1), strict=True)}
        return _write(self.shape, self.program, self.answer, self.seed, writes_as=after)


def planted_transformer(seed: int, shape: Shape | None = None) -> Planted:
    """A random program in a random basis. Programs that answer nothing are drawn again (of the same seed)."""
    shape = shape or Shape()
    for attempt in range(200):
        rng = generator("planted", seed, attempt)
        program, answer = _program(shape, rng)
        own = ancestors(program, answer)
        if len(own) < LEAST or not any(name.startswith("a") for name in own):
            continue
        drawn = seed_from("planted", seed, attempt)
        made = Planted(
            _write(shape, program, answer, drawn), _edges(program, answer), program, answer, shape, drawn
        )
        try:
            made.contrast(16)
        except UsageError:
            continue
        return made
    raise UsageError(f"no program of seed {seed} answers anything in this shape; make it larger")


def ancestors(program: dict[str, Op], answer: str) -> set[str]:
    """The components that the answer depends on, itself included."""
    found, ahead = set(), [answer]
    while ahead:
        name = ahead.pop()
        if name in program and name not in found:
            found.add(name)
            ahead += program[name].reads
    return found


def _edges(program: dict[str, Op], answer: str) -> frozenset[str]:
    edges = {f"{answer}->logits"}
    for name in ancestors(program, answer):
        op = program[name]
        parts = {"match": ("<q>", "<k>", "<v>"), "move": ("<v>",), "previous": ("<v>",)}
        for i, source in enumerate(op.reads):
            edges.add(f"{source}->{name}{parts[op.kind][i] if op.kind in parts else ''}")
    return frozenset(edges)


def _components(shape: Shape) -> list[str]:
    return [
        name for i in range(shape.n_layer) for name in [*(f"a{i}.h{h}" for h in range(shape.n_head)), f"m{i}"]
    ]


def _program(shape: Shape, rng: np.random.Generator) -> tuple[dict[str, Op], str]:
    """Random operations, layer by layer, each reading what is there already; and whose output is the answer.

    ``clear[name]``: from which position on a writer's output is one symbol and not a blur of several.
    """
    program: dict[str, Op] = {}
    clear = {"input": 0}
    last = shape.length - 1
    for layer in range(shape.n_layer):
        before = dict(clear)
        for h in range(shape.n_head):
            op, start = _head_op(before, last, rng)
            if op is not None:
                program[f"a{layer}.h{h}"] = op
                clear[f"a{layer}.h{h}"] = start
        readable = before if shape.parallel else clear
        kind = rng.choice(["map", "join", "none"], p=[0.4, 0.4, 0.2])
        wanted = {"map": 1, "join": 2, "none": 0}[kind]
        if wanted and len(readable) >= wanted:
            reads = tuple(rng.choice(sorted(readable), size=wanted, replace=False).tolist())
            start = max(readable[r] for r in reads)
            program[f"m{layer}"] = Op(kind, reads)
            clear[f"m{layer}"] = start
    late = [n for n in program if int(n[1]) >= shape.n_layer - 2] or ["input"]
    return program, str(rng.choice(sorted(late)))


def _head_op(clear: dict[str, int], last: int, rng: np.random.Generator) -> tuple[Op | None, int]:
    kind = rng.choice(["move", "previous", "match", "none"], p=[0.3, 0.2, 0.25, 0.25])
    early = sorted(name for name, start in clear.items() if start < last)
    everywhere = sorted(name for name, start in clear.items() if start <= 1)
    if kind == "none":
        return None, 0
    if kind == "match":
        q, k, v = rng.choice(sorted(clear)), rng.choice(everywhere), rng.choice(everywhere)
        return Op("match", (str(q), str(k), str(v))), last
    source = str(rng.choice(early))
    if kind == "previous":
        return Op("previous", (source,)), clear[source] + 1
    at = int(rng.integers(clear[source], last))
    return Op("move", (source,), at), at


@torch.no_grad()
def _write(
    shape: Shape, program: dict[str, Op], answer: str, seed: int, writes_as: dict[str, str] | None = None
) -> GPT:
    """The model that runs a program. ``writes_as``: whose subspace a component writes into (its own)."""
    rng = generator("planted weights", seed)
    config = shape.config
    model = GPT(config).eval()
    for p in model.parameters():
        p.zero_()
    m, T = shape.symbols, shape.length
    basis = torch.from_numpy(np.linalg.qr(rng.standard_normal((config.d_model, config.d_model)))[0]).float()
    names = ["input", *_components(shape)]
    space = {name: basis[i * m : (i + 1) * m] for i, name in enumerate(names)}  # [symbols, D]
    places = basis[len(names) * m :]  # [T, D]
    model.embed.weight.copy_(space["input"])
    model.pos.weight.copy_(places)
    model.head.weight.copy_(GAIN * space[answer])
    for name in names[1:]:
        rename = torch.from_numpy(rng.permutation(m))
        if name not in program:
            continue
        into = space[(writes_as or {}).get(name, name)][rename]
        block: Any = model.blocks[int(name[1])]
        if name.startswith("a"):
            _write_head(block.attn, int(name.partition(".h")[2]), program[name], space, places, into)
        else:
            _write_mlp(block.mlp, program[name], space, into, m)
    if shape.norm == "rms":
        _calibrate(model, rng, m, T)
    return model


def _write_head(
    attn: Attention, head: int, op: Op, space: dict[str, Tensor], places: Tensor, into: Tensor
) -> None:
    K, (m, T) = attn.config.head_width, (len(into), len(places))
    rows = slice(head * K, (head + 1) * K)
    q, k, v, o = (getattr(attn, n).weight for n in "qkvo")
    if op.kind == "match":
        q[rows][:m], k[rows][:m] = GAIN * space[op.reads[0]], space[op.reads[1]]
    elif op.kind == "move":
        q[rows][0], k[rows][0] = GAIN * places.sum(0), places[op.at]
    else:
        q[rows][: T - 1], k[rows][: T - 1] = GAIN * places[1:], places[:-1]
    v[rows][:m] = space[op.reads[-1]]
    o[:, rows][:, :m] = into.T


def _write_mlp(mlp: MLP, op: Op, space: dict[str, Tensor], into: Tensor, m: int) -> None:
    up, down = mlp.up, mlp.down
    if op.kind == "map":
        up.weight[:m] = space[op.reads[0]]
        down.weight[:, :m] = into.T
        return
    a, b = (space[r] for r in op.reads)
    i, j = (x.flatten() for x in torch.meshgrid(torch.arange(m), torch.arange(m), indexing="ij"))
    up.weight.copy_(a[i] + b[j])
    up.bias.fill_(-1.0)  # one symbol alone is not enough
    down.weight.copy_(into[(i + j) % m].T)


@torch.no_grad()
def _calibrate(model: GPT, rng: np.random.Generator, symbols: int, length: int) -> None:
    """Give each norm the gain that undoes, on average, its division: readers see symbols at size 1."""
    rows = torch.from_numpy(rng.integers(symbols, size=(64, length)))
    where, _ = model.where(length)
    x = model.embed(rows) + model.pos.weight

    def gain(norm: Any, seen: Tensor) -> None:
        norm.weight.fill_(float(seen.square().mean(-1).sqrt().mean()))

    block: Any
    for block in model.blocks:
        gain(block.norm1, x)
        mid = x + block.attn(block.norm1(x), where)
        read = x if block.parallel else mid
        gain(block.norm2, read)
        x = mid + block.mlp(block.norm2(read))
    gain(model.norm, x)
