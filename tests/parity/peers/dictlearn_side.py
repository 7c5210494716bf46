"""dictionary_learning's side: random dictionaries, pickled by it and converted as our message says."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import safetensors.torch as s
import torch
from dictionary_learning.dictionary import AutoEncoder, AutoEncoderNew, GatedAutoEncoder, JumpReluAutoEncoder
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
from dictionary_learning.trainers.top_k import AutoEncoderTopK
from exchange import D_IN, D_SAE, K, inputs, keep, main, randomise

CASES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "AutoEncoder": (AutoEncoder, ()),
    "AutoEncoderNew": (AutoEncoderNew, ()),
    "GatedAutoEncoder": (GatedAutoEncoder, ()),
    "JumpReluAutoEncoder": (JumpReluAutoEncoder, ()),
    "AutoEncoderTopK": (AutoEncoderTopK, (K,)),
    "BatchTopKSAE": (BatchTopKSAE, (K,)),
    "MatryoshkaBatchTopKSAE": (MatryoshkaBatchTopKSAE, (K, [4, 12])),
}


@torch.no_grad()
def write(root: Path) -> None:
    for seed, (name, (cls, more)) in enumerate(CASES.items()):
        made, folder, x = cls(D_IN, D_SAE, *more), root / name, inputs(seed)
        randomise(made, seed)
        if name in ("BatchTopKSAE", "MatryoshkaBatchTopKSAE"):
            made.threshold.fill_(0.6)
        folder.mkdir(parents=True)
        torch.save(made.state_dict(), folder / "ae.pt")
        state = torch.load(folder / "ae.pt", weights_only=True)
        s.save_file({k: v.contiguous() for k, v in state.items()}, folder / "ae.safetensors")
        (folder / "ae.pt").unlink()
        (folder / "config.json").write_text(json.dumps({"trainer": {"dict_class": name}}))
        features = made.encode(x)
        keep(folder, x, features, made.decode(features))


if __name__ == "__main__":
    main(["dictionary-learning"], write, None)
