"""What both sides of a comparison share; runs in the environment of the package compared with.

A case is a folder: the files of a format as one side wrote them, and ``expected.safetensors`` with inputs
``x`` and what that side computes from them, ``features`` and ``out``. Needs torch and safetensors alone.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

D_IN, D_SAE, D_OUT, K, N = 8, 16, 6, 3, 8
Pair = tuple[Tensor, Tensor]


def inputs(seed: int) -> Tensor:
    """Activations [N, D_IN]."""
    return torch.randn(N, D_IN, generator=torch.Generator().manual_seed(1000 + seed))


def randomise(module: nn.Module, seed: int) -> None:
    """Every parameter normal with std 0.5; thresholds positive."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in sorted(module.named_parameters()):
            x = torch.randn(p.shape, generator=generator) * 0.5
            p.copy_(x.abs() if "threshold" in name else x)


def keep(folder: Path, x: Tensor, features: Tensor, out: Tensor) -> None:
    """Write a case's expectation."""
    tensors = {"x": x, "features": features.detach().float(), "out": out.detach().float()}
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "expected.safetensors")


def distance(a: Tensor, b: Tensor) -> float:
    """Largest difference, relative to the largest number of ``b`` where that exceeds 1."""
    if a.shape != b.shape:
        return float("inf")
    return float((a.float() - b.float()).abs().max() / b.float().abs().max().clamp_min(1.0))


def compare(folder: Path, load: Callable[[Path], Callable[[Tensor], Pair]]) -> dict[str, float | str]:
    """How far what a loaded case computes is from its expectation; an error says its text."""
    expected = load_file(folder / "expected.safetensors")
    try:
        with torch.no_grad():
            features, out = load(folder)(expected["x"])
    except Exception as error:  # a loader that refuses is a result, to be shown with the others
        return {"error": f"{type(error).__name__}: {error}"}
    return {
        "features": distance(features, expected["features"]),
        "out": distance(out, expected["out"]),
    }


def main(
    packages: list[str],
    write: Callable[[Path], None],
    load: Callable[[Path], Callable[[Tensor], Pair]] | None,
) -> None:
    """``write FOLDER``: cases made by the package. ``check FOLDER``: what it makes of ours, report.json."""
    torch.set_num_threads(1)
    verb, folder = sys.argv[1], Path(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    if verb == "write":
        torch.manual_seed(0)
        write(folder)
        versions = {p: metadata.version(p) for p in ("torch", *packages)}
        licences = {p: metadata.metadata(p).get("License-Expression") or metadata.metadata(p).get("License")
                    for p in packages}  # fmt: skip
        (folder / "versions.json").write_text(json.dumps({"versions": versions, "licences": licences}))
    elif load is not None:
        cases = sorted(p for p in folder.iterdir() if p.is_dir())
        report = {case.name: compare(case, load) for case in cases}
        (folder / "report.json").write_text(json.dumps(report))
