"""SAELens' side: random dictionaries saved by it, and ours loaded by ``SAE.load_from_disk``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
from exchange import D_IN, D_OUT, D_SAE, K, Pair, inputs, keep, main, randomise
from sae_lens import SAE
from sae_lens.registry import get_sae_class, get_sae_training_class
from sae_lens.saes.sae import SAEMetadata
from sae_lens.training.activation_scaler import ActivationScaler
from torch import Tensor

SCALE = 1.75


def metadata(hook: str = "blocks.1.hook_resid_post") -> SAEMetadata:
    return SAEMetadata(model_name="tiny", hook_name=hook)


def build(architecture: str, training: bool = False, **more: Any) -> Any:
    cls, config = (get_sae_training_class if training else get_sae_class)(architecture)
    return cls(
        config(d_in=D_IN, d_sae=D_SAE, metadata=metadata(more.pop("hook", metadata().hook_name)), **more)
    )


TRANSCODER = {"d_out": D_OUT, "apply_b_dec_to_input": False}
CASES: dict[str, tuple[str, bool, dict[str, Any]]] = {
    "standard": ("standard", False, {}),
    "standard_no_b_dec": ("standard", False, {"apply_b_dec_to_input": False}),
    "standard_bfloat16": ("standard", False, {"dtype": "bfloat16"}),
    "gated": ("gated", False, {}),
    "topk": ("topk", False, {"k": K}),
    "topk_by_decoder_norm": ("topk", False, {"k": K, "rescale_acts_by_decoder_norm": True}),
    "topk_trained": ("topk", True, {"k": K}),
    "topk_heads": ("topk", False, {"k": K, "reshape_activations": "hook_z", "hook": "blocks.1.attn.hook_z"}),
    "jumprelu": ("jumprelu", False, {}),
    "jumprelu_scaled": ("jumprelu", False, {"normalize_activations": "expected_average_only_in"}),
    "batchtopk": ("batchtopk", True, {"k": K}),
    "matryoshka": ("matryoshka_batchtopk", True, {"k": K, "matryoshka_widths": [4, 16]}),
    "transcoder": ("transcoder", False, TRANSCODER),
    "skip_transcoder": ("skip_transcoder", False, TRANSCODER),
    "jumprelu_transcoder": ("jumprelu_transcoder", False, TRANSCODER),
    "jumprelu_skip_transcoder": ("jumprelu_skip_transcoder", False, TRANSCODER),
}


@torch.no_grad()
def write(root: Path) -> None:
    for seed, (name, (architecture, training, more)) in enumerate(CASES.items()):
        sae, folder, x = build(architecture, training, **dict(more)), root / name, inputs(seed)
        randomise(sae, seed)
        if hasattr(sae, "topk_threshold"):
            sae.topk_threshold.fill_(0.6)
        (sae.save_inference_model if training else sae.save_model)(folder)
        if name == "jumprelu_scaled":
            ActivationScaler(scaling_factor=SCALE).save(str(folder / "activation_scaler.json"))
        keep(folder, x, *computed(folder, name)(x))


def computed(folder: Path, name: str) -> Callable[[Tensor], Pair]:
    """What SAELens computes from a folder it loads."""
    sae = SAE.load_from_disk(folder, dtype="float32")
    scale = SCALE if name == "jumprelu_scaled" else 1.0

    def both(x: Tensor) -> Pair:
        x = x * scale
        if sae.cfg.reshape_activations == "hook_z":
            x = x.unflatten(-1, (2, -1))
        features, out = sae.encode(x), sae(x)
        return features, (out.flatten(-2) if out.ndim == 3 else out) / scale

    return both


def load(folder: Path) -> Callable[[Tensor], Pair]:
    return computed(folder, "ours")


if __name__ == "__main__":
    main(["sae-lens", "transformer-lens"], write, load)
