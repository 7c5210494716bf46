"""Compiled blocks: one graph for all layers, the plain blocks whenever somebody looks.

A block is compiled, not the model: all blocks share one graph, so that compiling costs seconds and does not
grow with depth. The compiled path serves training steps. Taps, caches and evaluation run the plain block:
it is the definition, and a graph for each set of sites would cost more than it saves.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from glasshouse.base.errors import UsageError
from glasshouse.model.cache import KVCache
from glasshouse.model.gpt import GPT, Block, Where
from glasshouse.model.taps import Taps


def compile_blocks(model: GPT, *, backend: str = "inductor") -> None:
    """Let ``model`` run its training steps through compiled blocks, until `plain_blocks`.

    Call it after ``torch.set_num_threads``: the thread count is built in. If compiling fails, a
    RuntimeWarning says why and the plain blocks go on: slower, and equal up to rounding.
    Raises UsageError when no C++ compiler is found, where one is needed.
    """
    if backend == "inductor":
        if model.embed.weight.device.type == "cpu" and cpp_compiler() is None:
            raise UsageError(
                "compiling needs a C++ compiler (g++ or clang++); install one, or use compile = 'off'"
            )
        _keep_cache()
    compiled: Callable[..., Tensor] = torch.compile(Block.forward, backend=backend)

    def run(block: Block, x: Tensor, where: Where, taps: Taps | None, cache: KVCache | None) -> Tensor:
        if taps is not None or cache is not None or not torch.is_grad_enabled():
            return block(x, where, taps, cache)
        try:
            with warnings.catch_warnings():  # dynamo looks at .grad of activations, and torch warns of it
                warnings.filterwarnings("ignore", message="The .grad attribute")
                return compiled(block, x, where)
        except torch._dynamo.exc.TorchDynamoException as problem:
            reason = " ".join(str(problem).split())[:200] or type(problem).__name__
            warnings.warn(
                f"compiling a block failed ({reason}); the plain blocks go on, slower",
                RuntimeWarning,
                stacklevel=2,
            )
            plain_blocks(model)
            return block(x, where)

    model.run_block = run


def plain_blocks(model: GPT) -> None:
    """Undo `compile_blocks`."""
    model.run_block = Block.__call__


def is_compiled(model: GPT) -> bool:
    """Whether training steps go through compiled blocks."""
    return model.run_block is not Block.__call__


def cpp_compiler() -> str | None:
    """The C++ compiler that would be used, or None."""
    return next((c for c in (os.environ.get("CXX"), "g++", "clang++") if c and shutil.which(c)), None)


def _keep_cache() -> None:
    """Keep compiled graphs between runs, in a folder that only this user can write: what is compiled once
    is loaded in a second later, and what is loaded is run. The default is a shared temporary folder.
    """
    if "TORCHINDUCTOR_CACHE_DIR" in os.environ:
        return
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = base / "glasshouse" / "compiled"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder.chmod(0o700)
    except OSError:
        return  # torch's own place serves, and only time is lost
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
