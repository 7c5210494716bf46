"""Which precision and how many threads: measured once, on the real model and batch, then part of the run's
identity.

bf16 pays on CPUs with bf16 instructions and large matrices; a small model can be slower in it, and slower
with more threads. No table knows; a second of measuring does.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from glasshouse.base.batch import Batch
from glasshouse.base.errors import UsageError
from glasshouse.model import GPT
from glasshouse.model.compiled import compile_blocks, cpp_compiler, is_compiled, plain_blocks
from glasshouse.model.float8 import has_float8
from glasshouse.train.objective import Objective, autocast, next_token, tensors

# Compiling takes half a minute the first time, and saves an eighth to a quarter of a step: shorter runs lose.
COMPILE_PAYS_AFTER_S = 300.0
# bf16 loses bits and a second thread takes a core from others: either has to be clearly faster.
WORTHWHILE = 1.05


@dataclass(frozen=True)
class Choice:
    """A choice, why it was made, and the numbers it rests on (seconds a step by candidate); goes into the
    ledger.
    """

    value: str | int
    why: str
    seconds: dict[str, float] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return {"value": self.value, "why": self.why, "seconds": self.seconds}


def bf16_instructions() -> str | None:
    """The instruction set with which this CPU multiplies bf16 matrices, or None (then bf16 is emulated,
    slowly).
    """
    cpuinfo = Path("/proc/cpuinfo")
    flags: set[str] = set()
    if cpuinfo.exists():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith(("flags", "Features")):
                flags = set(line.partition(":")[2].split())
                break
    # "bf16" is Arm's name for it.
    return next((name for name in ("amx_bf16", "avx512_bf16", "bf16") if name in flags), None)


def choose_device(setting: str) -> str:
    """ "cpu" or "cuda" for ``setting`` "auto", "cpu" or "cuda"; "auto" takes a GPU that torch can use.

    Raises UsageError for another setting, or "cuda" where there is none.
    """
    if setting not in ("auto", "cpu", "cuda"):
        raise UsageError(f"device is {setting!r}: use 'auto', 'cpu' or 'cuda'")
    if setting == "cuda" and not torch.cuda.is_available():
        raise UsageError("device is 'cuda', but this torch finds no GPU; use device = 'cpu' or 'auto'")
    return "cuda" if setting != "cpu" and torch.cuda.is_available() else "cpu"


def muon_dtype(device: str = "cpu") -> str:
    """bf16 where the device multiplies it, else fp32: emulated bf16 makes Muon take seconds a step."""
    if device == "cuda":
        return "bf16"
    usable = bf16_instructions() and torch.backends.cpu.get_cpu_capability() != "AVX2"
    return "bf16" if usable else "fp32"


def choose_dtype(
    setting: str, model: GPT, batch: Batch, objective: Objective = next_token, repeats: int = 3
) -> Choice:
    """Choose a precision for ``setting`` "auto", "fp32", "bf16" or "fp8". Leaves the model as it was.

    "auto" takes bf16 only if the CPU has instructions for it *and* the median of ``repeats`` interleaved
    steps is at least 5 % faster; on a GPU it takes bf16. "fp8" is taken only when asked for. Raises
    UsageError for any other setting, and for "fp8" on a device without it.
    """
    if setting == "fp16":
        raise UsageError(
            "precision is 'fp16', which overflows above 65,504 and is not supported: use 'bf16', which has "
            "the range of fp32"
        )
    if setting == "fp8" and not has_float8(model.device):
        raise UsageError(
            "precision is 'fp8', but this device does not multiply FP8: use 'bf16' (FP8 needs an NVIDIA GPU "
            "of compute capability 8.9 or later)"
        )
    if setting in ("fp32", "bf16", "fp8"):
        return Choice(setting, "asked for")
    if setting != "auto":
        raise UsageError(f"precision is {setting!r}: use 'auto', 'fp32', 'bf16' or 'fp8'")
    if model.device.type == "cuda":
        return Choice("bf16", "a GPU")
    instructions = bf16_instructions()
    if instructions is None:
        return Choice("fp32", "this CPU has no bf16 instructions")
    took = interleaved(
        {dtype: functools.partial(gradient, model, batch, objective, dtype) for dtype in ("fp32", "bf16")},
        repeats,
    )
    ratio = took["fp32"] / took["bf16"]
    value = "bf16" if ratio >= WORTHWHILE else "fp32"
    return Choice(value, f"bf16 ({instructions}) is {ratio:.2f} times as fast as fp32", took)


def choose_threads(
    setting: str | int,
    model: GPT,
    batch: Batch,
    objective: Objective = next_token,
    dtype: str = "fp32",
    repeats: int = 3,
) -> Choice:
    """Choose the number of threads for ``setting`` "auto" or a number; torch's own setting is put back.

    "auto" compares one thread with all that torch would use: threads of a tiny model, or on a busy machine,
    wait for each other. Raises UsageError for a number below 1.
    """
    available = torch.get_num_threads()
    if setting != "auto":
        if not isinstance(setting, int) or setting < 1:
            raise UsageError(f"threads is {setting!r}: use 'auto' or a number from 1")
        return Choice(setting, "asked for")
    if available == 1:
        return Choice(1, "one core")

    def measured(threads: int) -> Callable[[], None]:
        def run() -> None:
            torch.set_num_threads(threads)
            gradient(model, batch, objective, dtype)

        return run

    try:
        took = interleaved({str(n): measured(n) for n in (1, available)}, repeats)
    finally:
        torch.set_num_threads(available)
    ratio = took["1"] / took[str(available)]
    value = available if ratio >= WORTHWHILE else 1
    return Choice(value, f"{available} threads are {ratio:.2f} times as fast as one", took)


def choose_compile(
    setting: str,
    model: GPT,
    batch: Batch,
    objective: Objective = next_token,
    dtype: str = "fp32",
    *,
    steps: int,
    repeats: int = 3,
) -> Choice:
    """Choose "on" or "off" for ``setting`` "auto", "on" or "off": are blocks compiled in training?

    "auto" compiles only if ``steps`` steps like this one would take longer than compiling can cost, and keeps
    it if the median compiled step is at least 5 % faster. Call it with the run's threads set. The model is
    left with plain blocks. Raises UsageError for another setting, or "on" without a C++ compiler.
    """
    if setting == "off":
        return Choice("off", "asked for")
    if setting == "on":
        compile_blocks(model)
        plain_blocks(model)
        return Choice("on", "asked for")
    if setting != "auto":
        raise UsageError(f"compile is {setting!r}: use 'auto', 'on' or 'off'")
    plain = functools.partial(gradient, model, batch, objective, dtype)
    took = interleaved({"off": plain}, repeats)
    expected = took["off"] * steps
    if expected < COMPILE_PAYS_AFTER_S:
        return Choice(
            "off",
            f"about {expected:.0f} s of steps in this run: compiling would cost more than it saves",
            took,
        )
    if model.embed.weight.device.type == "cpu" and cpp_compiler() is None:
        return Choice("off", "there is no C++ compiler (g++ or clang++)", took)

    def fast() -> None:
        compile_blocks(model)
        plain()

    def slow() -> None:
        plain_blocks(model)
        plain()

    try:
        fast()
        if not is_compiled(model):
            return Choice("off", "compiling a block failed", took)
        took = interleaved({"off": slow, "on": fast}, repeats)
    finally:
        plain_blocks(model)
    ratio = took["off"] / took["on"]
    value = "on" if ratio >= WORTHWHILE else "off"
    return Choice(value, f"compiled blocks are {ratio:.2f} times as fast as plain ones", took)


def gradient(model: GPT, batch: Batch, objective: Objective, dtype: str) -> None:
    """One forward and backward pass whose gradients are thrown away: the model, ``.grad`` included, stays
    as it is.
    """
    with autocast(dtype, model.device):
        loss = objective(model, tensors(batch, model.device)).total
    torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)


def interleaved(candidates: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """Median seconds of each candidate. One unmeasured round first; then turn by turn, so that a busy
    moment of the machine falls on all of them alike.
    """
    took: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(repeats + 1):
        for name, run in candidates.items():
            began = time.perf_counter()
            run()
            if turn > 0:
                took[name].append(time.perf_counter() - began)
    return {name: round(statistics.median(values), 6) for name, values in took.items()}
