"""Out of memory: recognised, explained, and answered with the setting that fits.

Activations are what grows with the batch. How much a row costs is not modelled but counted: one and two rows
go forward, and autograd is asked what it keeps for the backward pass. That holds for every architecture,
objective and attention path, and takes milliseconds.
"""

from __future__ import annotations

import resource
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from glasshouse.model import GPT
from glasshouse.train.objective import Objective, TensorBatch, autocast
from glasshouse.train.step import plain

# Kept activations are not all: backward makes gradients of what it frees, allocators round up, libraries have
# workspaces. Measured peaks of a step were 1.5 to 1.8 times what is kept, and some 80 MiB.
HEADROOM = 2.0
WORKSPACE = 96 * 2**20
# A setting is refused before it was tried only if it is hopeless: compiled blocks keep less than is counted.
HOPELESS = 0.6
SIGNS = ("can't allocate memory", "not enough memory", "out of memory", "cannot allocate memory", "bad alloc")
CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
    ),
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` is Python's, torch's or CUDA's way to say that memory ran out."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in SIGNS)


@dataclass(frozen=True)
class Need:
    """Bytes that autograd keeps for a backward pass: ``fixed + rows * per_row``."""

    fixed: float
    per_row: float

    def of(self, rows: int) -> float:
        """Bytes for a micro-batch of ``rows``."""
        return self.fixed + rows * self.per_row

    def rows(self, available: float) -> int:
        """Rows that surely fit into ``available`` bytes; 0: not even one."""
        return max(0, int(((available - WORKSPACE) / HEADROOM - self.fixed) // self.per_row))


def need(model: GPT, objective: Objective, batch: TensorBatch, dtype: str) -> Need:
    """What activations of rows like those of ``batch`` need. Changes nothing, runs at most two rows."""
    one = kept_bytes(lambda: _forward(model, objective, batch, dtype, 1))
    if batch.tokens.shape[0] == 1:
        return Need(0.0, max(one, 1))
    two = kept_bytes(lambda: _forward(model, objective, batch, dtype, 2))
    per_row = max(two - one, 1)
    return Need(max(one - per_row, 0), per_row)


def _forward(model: GPT, objective: Objective, batch: TensorBatch, dtype: str, rows: int) -> Tensor:
    part = TensorBatch(
        batch.tokens[:rows],
        batch.targets[:rows],
        torch.ones_like(batch.weight[:rows]),  # a row may count little here and all of it elsewhere
        batch.n_bytes,
        batch.shards,
        batch.rows[:rows],
    )
    with plain(model), autocast(dtype, model.device):
        return objective(model, part).total


def kept_bytes(forward: Callable[[], object]) -> int:
    """Bytes of memory that autograd keeps for the backward pass of what ``forward`` returns; each block of
    memory once. Parameters are kept anyway and count too, the same for any number of rows.
    """
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        held = forward()
    total = sum(kept.values())
    del held  # until here, so that no address was used twice
    return total


def available_bytes(device: torch.device | str = "cpu") -> int | None:
    """Bytes that this process can still take: the least of the machine's free memory, its control group's
    limit and its own (`ulimit -v`); on a GPU what the driver calls free. None where nobody says.
    """
    if torch.device(device).type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    found: list[int] = []
    meminfo = _words("/proc/meminfo")
    if "MemAvailable:" in meminfo:
        found.append(int(meminfo[meminfo.index("MemAvailable:") + 1]) * 1024)
    for limit, used in CGROUPS:
        most, now = _words(limit), _words(used)
        if most and now and most[0].isdigit() and now[0].isdigit():
            found.append(int(most[0]) - int(now[0]))
    most_virtual, pages = resource.getrlimit(resource.RLIMIT_AS)[0], _words("/proc/self/statm")
    if most_virtual != resource.RLIM_INFINITY and pages:
        found.append(most_virtual - int(pages[0]) * resource.getpagesize())
    return max(0, min(found)) if found else None


def _words(path: str) -> list[str]:
    try:
        return Path(path).read_text().split()
    except OSError:
        return []


def micro_batches(batch_size: int, rows: int) -> int | None:
    """The fewest micro-batches of at most ``rows`` rows that ``batch_size`` divides into; None for no row."""
    return next(
        (n for n in range(1, batch_size + 1) if batch_size % n == 0 and batch_size // n <= rows), None
    )


def advice(need: Need, stage: str, batch_size: int, accumulate: int, available: int | None) -> str:
    """What to set so that a stage whose present setting does not fit will: a sentence."""
    rows = batch_size // accumulate
    fits = rows // 2  # whatever the count says, so many rows did not fit
    if available is not None:
        fits = min(fits, need.rows(available))
    n = micro_batches(batch_size, fits)
    free = "" if available is None else f" of {_size(available)} available"
    if n is None:
        return (
            f"not even one row fits: its activations take {_size(need.of(1))} and more{free}. Set a smaller "
            "model.context or model, or use a machine with more memory"
        )
    return (
        f"activations of {rows} rows take {_size(need.of(rows))} and more{free}. Set accumulate = {n} in "
        f"stage '{stage}' ({n} micro-batches of {batch_size // n} rows, {_size(need.of(batch_size // n))}: "
        f"the same gradient in less memory), or batch_size = {batch_size // n}"
    )


def _size(n_bytes: float) -> str:
    return f"{n_bytes / 2**30:.1f} GiB" if n_bytes >= 2**30 else f"{n_bytes / 2**20:.0f} MiB"
