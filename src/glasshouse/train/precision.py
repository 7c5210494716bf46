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
from glasshouse.train.objective import Objective, autocast, next_token, tensors

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


def muon_dtype() -> str:
    """bf16 where the CPU multiplies it, else fp32: emulated bf16 makes Muon take seconds a step."""
    usable = bf16_instructions() and torch.backends.cpu.get_cpu_capability() != "AVX2"
    return "bf16" if usable else "fp32"


def choose_dtype(
    setting: str, model: GPT, batch: Batch, objective: Objective = next_token, repeats: int = 3
) -> Choice:
    """Choose "fp32" or "bf16" for ``setting`` "auto", "fp32" or "bf16". Leaves the model as it was.

    "auto" takes bf16 only if the CPU has instructions for it *and* the median of ``repeats`` interleaved
    steps is at least 5 % faster. Raises UsageError for any other setting.
    """
    if setting in ("fp32", "bf16"):
        return Choice(setting, "asked for")
    if setting != "auto":
        raise UsageError(f"precision is {setting!r}: use 'auto', 'fp32' or 'bf16'")
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


def gradient(model: GPT, batch: Batch, objective: Objective, dtype: str) -> None:
    """One forward and backward pass whose gradients are thrown away: the model, ``.grad`` included, stays
    as it is.
    """
    with autocast(dtype):
        loss = objective(model, tensors(batch)).total
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
