"""Other models of `transformers` behind the same `Taps`, as far as module boundaries show them.

Our own model passes taps as an argument, because a hook added after a model was compiled is silently not
run. Here hooks are acceptable, because the code is not ours to change: they live for one pass, are removed
whatever happens in it, compiled models are refused, and a site asked for that was not reached raises.

What can be seen is found out, not assumed. A probing pass looks for the blocks of the residual stream, and
within each block for the two modules whose outputs add up, with what enters, to what leaves. Where no pair of
modules does so in every block (Mamba has one branch; some models scale what they add), ``attn_out`` and
``mlp_out`` are not sites. ``q, k, v, pattern, z, resid_mid, mlp_pre, mlp_post`` are no module boundaries.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from glasshouse.base.errors import UsageError
from glasshouse.interp.reading.boundaries import Boundary, find_boundaries, first_tensor, input_tensor
from glasshouse.model import GPT, Taps
from glasshouse.model.aliases import Aliases, stream_aliases


class _Stop(Exception):
    """Everything asked for has been seen; ``x`` is where the pass ended."""

    def __init__(self, x: Tensor):
        self.x = x


@dataclass(frozen=True)
class Shape:
    """What readers of activations need to know of a model's config."""

    vocab_size: int
    d_model: int
    n_layer: int
    context: int | None


class Adapter(nn.Module):
    """A causal language model of `transformers`, read and edited through `Taps` like ours.

    ``adapter(tokens, taps)`` gives logits [batch, pos, vocab]; ``adapter.sites()`` lists what can be seen.
    Residuals are raw. The model is put in evaluation mode, and a probing pass is run over it.
    UsageError for a compiled model, or one in which no stack of blocks carries a residual stream.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        if hasattr(model, "_orig_mod") or any(hasattr(m, "_orig_mod") for m in model.modules()):
            raise UsageError(
                "hooks in a compiled model are silently not run; adapt the model before compiling it"
            )
        self.model = model.eval()
        self._boundaries, width = find_boundaries(model)
        config: Any = model.config
        self.config = Shape(
            vocab_size=int(config.vocab_size),
            d_model=width,
            n_layer=sum(site.endswith("resid_post") for site in self._boundaries),
            context=_context(config),
        )

    def sites(self) -> list[str]:
        """Every site that can be read and edited, in the order of computation."""
        return list(self._boundaries)

    def hook_names(self) -> Aliases:
        """TransformerLens names of these sites."""
        return stream_aliases(self.sites())

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.model.parameters()).device

    def forward(self, tokens_BT: Tensor, taps: Taps | None = None) -> Tensor:
        """Logits [batch, pos, vocab]; with ``taps.stop_early`` and everything seen, the activation at which
        the pass ended. LookupError when a site asked for was not reached; UsageError for tokens beyond the
        context that the model's config names.
        """
        if self.config.context is not None and tokens_BT.shape[1] > self.config.context:
            raise UsageError(
                f"{tokens_BT.shape[1]} tokens exceed the model's context of {self.config.context}"
            )
        if taps is None:
            return self._logits(tokens_BT)
        taps.check(self.sites(), self.hook_names)
        with contextlib.ExitStack() as hooks:
            for site in taps.asked:
                handle = _attach(self._boundaries[site], site, taps, tuple(tokens_BT.shape))
                hooks.callback(handle.remove)
            try:
                logits = self._logits(tokens_BT)
            except _Stop as stop:
                return stop.x
        missed = sorted(set(taps.asked) - taps.seen)
        if missed:
            raise LookupError(f"sites never reached in this pass: {missed}; was the model changed since?")
        return logits

    def _logits(self, tokens_BT: Tensor) -> Tensor:
        # No cache: what a pass computes must not depend on the last one, and the stream is read whole.
        return self.model(input_ids=tokens_BT, use_cache=False).logits


Readable = GPT | Adapter


def context_of(model: Readable) -> int | None:
    """The longest sequence in tokens; None where the model names none."""
    return model.config.context


def adapt(model: nn.Module | str | Path) -> Adapter:
    """An `Adapter` around a `transformers` model, or around the one in a folder (loaded in float32).

    Only safetensors are read, and no code that comes with a model is run. UsageError without `transformers`,
    which is an extra.
    """
    if isinstance(model, nn.Module):
        return Adapter(model)
    try:
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise UsageError(
            "reading other models needs transformers: pip install 'glasshouse-lm[hf]'"
        ) from error
    if not Path(model).is_dir():
        raise UsageError(f"{model}: no such folder; download the model first")
    return Adapter(
        AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.float32, use_safetensors=True, trust_remote_code=False, local_files_only=True
        )
    )


def _attach(boundary: Boundary, site: str, taps: Taps, shape: tuple[int, ...]) -> Any:
    """Hook one boundary for one pass; returns the handle that removes it."""

    def see(x: Tensor) -> Tensor:
        wide = x.reshape(*shape, x.shape[-1])  # OPT flattens [batch * pos, d_model] inside a block
        out = taps(site, wide)
        if taps.done:
            raise _Stop(out)
        # Some models add into what a module returned; what was read must stay what it was.
        return (out.clone() if boundary.overwritten else out).reshape(x.shape)

    def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        x = see(first_tensor(output))
        if isinstance(output, Tensor):
            return x
        return type(output)([x, *output[1:]]) if isinstance(output, tuple | list) else output

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name, x = input_tensor(args, kwargs)
        if name is None:
            return (see(x), *args[1:]), kwargs
        return args, {**kwargs, name: see(x)}

    if boundary.side == "input":
        return boundary.module.register_forward_pre_hook(before, with_kwargs=True)
    return boundary.module.register_forward_hook(after, with_kwargs=True)


def _context(config: Any) -> int | None:
    """The longest sequence that a `transformers` config names."""
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None
