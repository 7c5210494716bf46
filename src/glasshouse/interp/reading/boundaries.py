"""Find the residual stream of a foreign model by running it: which modules it enters and leaves, and which
modules' outputs are added to it. What is not confirmed by numbers is not reported.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from glasshouse.base.errors import UsageError

ROWS, LENGTH = 2, 5  # of the probing batch
TOLERANCE = 1e-4  # of the largest value: sums in another order
# A pair of modules is named by its paths; where these say nothing, the first to run is called attention.
ATTENTION = ("attn", "attention")


@dataclass(frozen=True)
class Boundary:
    """One side of a module. ``overwritten``: the model writes into the tensor after passing it on."""

    module: nn.Module
    side: Literal["input", "output"]
    overwritten: bool = False


@dataclass
class Seen:
    """What a module was given and gave in the probing pass: references, and copies made at that moment."""

    calls: int = 0
    given: tuple[Tensor, Tensor] | None = None
    gave: tuple[Tensor, Tensor] | None = None
    order: int = 0


def first_tensor(output: Any) -> Any:
    """A module's output, or the first of several."""
    return output[0] if isinstance(output, tuple | list) and output else output


def input_tensor(args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[str | None, Any]:
    """A module's input, and its keyword if it has one."""
    if args:
        return None, args[0]
    return next(((name, x) for name, x in kwargs.items() if name in ("hidden_states", "x")), ("", None))


def find_boundaries(model: nn.Module) -> tuple[dict[str, Boundary], int]:
    """The sites of a model in order of computation, and the width of its stream.

    UsageError when no list of blocks carries a stream, or when several do (an encoder and a decoder).
    """
    seen = _probe(model)
    blocks, width = _blocks(model, seen)
    pairs = [_branches(block, seen) for block in blocks]
    sites = {"embed": _boundary(blocks[0], "input", seen)}
    for i, (block, pair) in enumerate(zip(blocks, pairs, strict=True)):
        sites[f"blocks.{i}.resid_pre"] = _boundary(block, "input", seen)
        if pair is not None and all(pairs):
            for name, module in sorted(pair.items(), key=lambda item: seen[item[1]].order):
                sites[f"blocks.{i}.{name}"] = _boundary(module, "output", seen)
        sites[f"blocks.{i}.resid_post"] = _boundary(block, "output", seen)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is not None and head in seen and _stream(seen[head].given, width) and seen[head].calls == 1:
        sites["final_norm"] = _boundary(head, "input", seen)
    return sites, width


@torch.no_grad()
def _probe(model: nn.Module) -> dict[nn.Module, Seen]:
    """Run a small batch and write down what every module was given and gave."""
    seen: dict[nn.Module, Seen] = {}
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None)
    if not isinstance(vocabulary, int):
        raise UsageError(
            "an adapter needs a causal language model of transformers; config.vocab_size is missing"
        )
    clock = itertools.count()

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        record = seen.setdefault(module, Seen())
        record.calls += 1
        x = input_tensor(args, kwargs)[1]
        record.given = (x, x.clone()) if isinstance(x, Tensor) else None

    def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        x = first_tensor(output)
        seen[module].gave = (x, x.clone()) if isinstance(x, Tensor) else None
        seen[module].order = next(clock)

    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, vocabulary, (ROWS, LENGTH), generator=generator)
    with contextlib.ExitStack() as hooks:
        for module in model.modules():
            for handle in (
                module.register_forward_pre_hook(before, with_kwargs=True),
                module.register_forward_hook(after, with_kwargs=True),
            ):
                hooks.callback(handle.remove)
        try:
            model(input_ids=tokens.to(next(model.parameters()).device), use_cache=False)
        except (TypeError, ValueError, RuntimeError) as error:
            raise UsageError(
                f"{type(model).__name__} does not run on token ids alone ({error}); "
                "an adapter needs a causal language model"
            ) from error
    return seen


def _blocks(model: nn.Module, seen: dict[nn.Module, Seen]) -> tuple[list[nn.Module], int]:
    """The blocks through which the stream goes, each once and in order, and its width."""
    found: list[tuple[str, list[nn.Module], int]] = []
    for path, modules in model.named_modules():
        inside = any(path.startswith(f"{outer}.") for outer, _, _ in found)
        if isinstance(modules, nn.ModuleList) and len(modules) and not inside:
            blocks = list(modules)
            width = _carries(blocks, seen)
            if width:
                found.append((path, blocks, width))
    if len(found) != 1:
        lists = ", ".join(repr(path) for path, _, _ in found) or "none"
        raise UsageError(
            f"{type(model).__name__}: expected one list of blocks that the residual stream goes through, "
            f"each block once and in order; found {lists}"
        )
    return found[0][1], found[0][2]


def _carries(blocks: list[nn.Module], seen: dict[nn.Module, Seen]) -> int:
    """The width of the stream that goes through ``blocks``; 0 if none does."""
    records = [seen.get(block) for block in blocks]
    for record in records:
        if record is None or record.calls != 1 or record.given is None or record.gave is None:
            return 0
    width = records[0].given[1].shape[-1] if records[0] and records[0].given else 0
    for record, later in itertools.pairwise([*records, None]):
        if record is None or not (_stream(record.given, width) and _stream(record.gave, width)):
            return 0
        # The next block takes up what this one left: a stream, and not a list of alternatives.
        if later is not None and not _equal(record.gave, later.given):
            return 0
    return width


def _branches(block: nn.Module, seen: dict[nn.Module, Seen]) -> dict[str, nn.Module] | None:
    """The two modules in ``block`` whose outputs make the difference between its input and its output."""
    record = seen[block]
    if record.given is None or record.gave is None:
        return None
    difference = record.gave[1] - record.given[1]
    scale = max(float(t.abs().max()) for t in (record.gave[1], record.given[1]))
    gave = {module: of.gave[1] for module, of in seen.items() if of.gave is not None}
    inner = [
        (path, module)
        for path, module in block.named_modules()
        if module is not block
        and module in seen
        and seen[module].calls == 1
        and _flat(seen[module], difference)
    ]
    # Outer modules first: an attention's output rather than that of the last matrix in it.
    inner.sort(key=lambda item: (not _is_attention(item[0]), -seen[item[1]].order))
    for (path, a), (other, b) in itertools.combinations(inner, 2):
        if _is_attention(path) == _is_attention(other) or _nested(path, other):
            continue
        total = gave[a].reshape(difference.shape) + gave[b].reshape(difference.shape)
        if float((total - difference).abs().max()) <= TOLERANCE * scale:
            return {"attn_out": a, "mlp_out": b}
    return None


def _is_attention(path: str) -> bool:
    return any(word in path.lower() for word in ATTENTION)


def _nested(path: str, other: str) -> bool:
    return f"{path}.".startswith(f"{other}.") or f"{other}.".startswith(f"{path}.")


def _flat(record: Seen, like: Tensor) -> bool:
    """Whether a module gave a vector for every token, in whatever shape."""
    return (
        record.gave is not None
        and record.gave[1].numel() == like.numel()
        and (record.gave[1].shape[-1] == like.shape[-1])
    )


def _boundary(module: nn.Module, side: Literal["input", "output"], seen: dict[nn.Module, Seen]) -> Boundary:
    kept = seen[module].given if side == "input" else seen[module].gave
    return Boundary(module, side, overwritten=kept is not None and not _same(*kept))


def _stream(kept: tuple[Tensor, Tensor] | None, width: int) -> bool:
    return kept is not None and kept[1].shape == (ROWS, LENGTH, width) and kept[1].is_floating_point()


def _equal(a: tuple[Tensor, Tensor] | None, b: tuple[Tensor, Tensor] | None) -> bool:
    return a is not None and b is not None and _same(a[1], b[1])


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)
