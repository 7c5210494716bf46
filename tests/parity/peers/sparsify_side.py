"""sparsify's side: random coders saved by it, and ours loaded by ``SparseCoder.load_from_disk``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
from exchange import D_IN, D_SAE, K, Pair, inputs, keep, main, randomise
from sparsify import SparseCoder, SparseCoderConfig
from torch import Tensor

CASES: dict[str, dict[str, Any]] = {
    "topk": {"num_latents": D_SAE},
    "topk_by_expansion": {"expansion_factor": 2},
    "transcoder": {"num_latents": D_SAE, "transcode": True},
    "skip_transcoder": {"num_latents": D_SAE, "transcode": True, "skip_connection": True},
}


@torch.no_grad()
def write(root: Path) -> None:
    for seed, (name, more) in enumerate(CASES.items()):
        coder, x = SparseCoder(D_IN, SparseCoderConfig(k=K, **more)), inputs(seed)
        randomise(coder, seed)
        coder.save_to_disk(root / name)
        keep(root / name, x, *load(root / name)(x))


def load(folder: Path) -> Callable[[Tensor], Pair]:
    coder = SparseCoder.load_from_disk(folder)

    def both(x: Tensor) -> Pair:
        made = coder(x)
        dense = torch.zeros(len(x), coder.num_latents)
        return dense.scatter_(1, made.latent_indices, made.latent_acts.float()), made.sae_out

    return both


if __name__ == "__main__":
    main(["eai-sparsify"], write, load)
