"""dictionary_learning's state, read from safetensors.

Its own files are pickles (``ae.pt``), which can run code when opened, so they are refused; the message says
how to convert one where it is trusted. Names from dictionary-learning 0.1.0 (``dictionary.py``,
``trainers/top_k.py``, ``batch_top_k.py``, ``matryoshka_batch_top_k.py``), whose classes map to ours so:
AutoEncoder and AutoEncoderNew l1, GatedAutoEncoder gated, JumpReluAutoEncoder jumprelu, AutoEncoderTopK topk,
BatchTopKSAE batchtopk, MatryoshkaBatchTopKSAE matryoshka.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glasshouse.base.errors import CheckpointError, DataError, suggest
from glasshouse.interp.dictionaries import Dictionary
from glasshouse.interp.formats.fit import MAX_WIDTH, check_fits, make_config, placed
from glasshouse.model import GPT
from glasshouse.model.weights import WEIGHTS, Shapes, match_names, read_header, read_json, read_safetensors

LINEAR = ("encoder.weight", "encoder.bias", "decoder.weight")
PLAIN = ("W_enc", "b_enc", "W_dec", "b_dec")
# Class -> (architecture, names of its tensors, name of each as ours).
CLASSES: dict[str, tuple[str, tuple[str, ...]]] = {
    "AutoEncoder": ("l1", (*LINEAR, "bias")),
    "AutoEncoderNew": ("l1", (*LINEAR, "decoder.bias")),
    "GatedAutoEncoder": (
        "gated",
        ("encoder.weight", "decoder.weight", "decoder_bias", "r_mag", "gate_bias", "mag_bias"),
    ),
    "JumpReluAutoEncoder": ("jumprelu", (*PLAIN, "threshold")),
    "AutoEncoderTopK": ("topk", (*LINEAR, "b_dec", "k", "threshold")),
    "BatchTopKSAE": ("batchtopk", (*LINEAR, "b_dec", "k", "threshold")),
    "MatryoshkaBatchTopKSAE": ("matryoshka", (*PLAIN, "k", "threshold", "group_sizes")),
}
OURS = {
    **{"encoder.weight": "W_enc", "decoder.weight": "W_dec", "encoder.bias": "b_enc"},
    **{"bias": "b_dec", "decoder.bias": "b_dec", "decoder_bias": "b_dec"},
    **{"gate_bias": "b_gate", "mag_bias": "b_mag"},
}
CONVERT = (
    "a pickle can run code when it is opened. Where you trust it, convert it once: "
    "import torch, safetensors.torch as s; "
    'state = torch.load("ae.pt", weights_only=True); '
    's.save_file({k: v.contiguous() for k, v in state.items()}, "ae.safetensors")'
)


def read_dictionary_learning(
    path: str | Path,
    *,
    dict_class: str | None = None,
    model: GPT | None = None,
    site: str | None = None,
    site_out: str | None = None,
) -> Dictionary:
    """Read ``ae.safetensors``, or the folder with it, as a dictionary in fp32.

    ``dict_class``: dictionary_learning's name of the class; None: what ``config.json`` beside the file says,
    or what the tensors' names leave no doubt about. ``site``, ``site_out``: where it belongs, which its files
    do not say in our names. ``model``: refuse a dictionary that does not belong to it. Decoder rows keep
    their norms; their loader rescales those of an AutoEncoder to 1, which changes the unit of features and
    not what is reconstructed.
    Raises CheckpointError for a pickle, a class not known, and damage as `read_safetensors` finds it.
    """
    path = Path(path)
    if path.is_dir():
        path = _in_folder(path)
    if path.suffix != ".safetensors":
        raise CheckpointError(f"{path} is not read: {CONVERT}")
    header = {name: entry.shape for name, entry in read_header(path).items()}
    kind = dict_class or _said(path.parent / "config.json") or _guess(path, header)
    if kind not in CLASSES:
        raise CheckpointError(
            f"{path}: class {kind!r} is not read; known: {', '.join(CLASSES)}.{suggest(kind, CLASSES)}"
        )
    architecture, names = CLASSES[kind]
    d_in, d_sae = _widths(path, header)
    shapes = {name: _shape(name, d_in, d_sae, header) for name in names}
    match_names(str(path), header, shapes)
    raw = read_safetensors(path, shapes, dtype=torch.float32, allowed=(*WEIGHTS, "I64", "I32"))
    fields: dict[str, Any] = {"d_in": d_in, "d_sae": d_sae}
    fields |= _selection(raw, str(path))
    if kind in ("AutoEncoderNew", "JumpReluAutoEncoder"):
        fields["apply_b_dec_to_input"] = False
    config = placed(make_config(str(path), architecture=architecture, **fields), str(path), site, site_out)
    try:
        dictionary = Dictionary.from_weights(config, _ours(raw, architecture), str(path))
    except DataError as error:
        raise CheckpointError(str(error)) from error
    if model is not None:
        check_fits(dictionary, model)
    return dictionary


def _in_folder(folder: Path) -> Path:
    if (folder / "ae.safetensors").exists():
        return folder / "ae.safetensors"
    if (folder / "ae.pt").exists():
        return folder / "ae.pt"
    raise CheckpointError(f"{folder} holds no ae.safetensors")


def _said(path: Path) -> str | None:
    """The class that a training run's config.json names."""
    if not path.exists():
        return None
    trainer = read_json(path).get("trainer")
    said = trainer.get("dict_class") if isinstance(trainer, dict) else None
    if not isinstance(said, str):
        raise CheckpointError(f"{path}: trainer.dict_class is missing; give dict_class=")
    return said


def _guess(path: Path, header: Shapes) -> str:
    fitting = [kind for kind, (_, names) in CLASSES.items() if set(names) == header.keys()]
    if len(fitting) == 1:
        return fitting[0]
    which = (
        f"it could be {' or '.join(fitting)}" if fitting else f"its tensors are {', '.join(sorted(header))}"
    )
    raise CheckpointError(f"{path} does not say its class ({which}): give dict_class=")


def _widths(path: Path, header: Shapes) -> tuple[int, int]:
    """d_in and d_sae, from the header alone."""
    name = "W_enc" if "W_enc" in header else "encoder.weight"
    shape = header.get(name, ())
    if len(shape) != 2 or not all(1 <= n <= MAX_WIDTH for n in shape):
        raise CheckpointError(f"{path}: {name!r} is missing or has an absurd shape, {list(shape)}")
    return (shape[0], shape[1]) if name == "W_enc" else (shape[1], shape[0])


def _shape(name: str, d_in: int, d_sae: int, header: Shapes) -> tuple[int, ...]:
    match name:
        case "W_enc" | "decoder.weight":
            return (d_in, d_sae)
        case "W_dec" | "encoder.weight":
            return (d_sae, d_in)
        case "bias" | "decoder.bias" | "decoder_bias" | "b_dec":
            return (d_in,)
        case "k":
            return ()
        case "group_sizes":
            return tuple(header.get(name, ())[:1]) or (1,)
        case "threshold":  # one for all, or each feature its own (JumpReLU, the class without k)
            return () if "k" in header else (d_sae,)
    return (d_sae,)


def _selection(raw: dict[str, Tensor], where: str) -> dict[str, Any]:
    """k and the nested sizes, taken out of the tensors."""
    found: dict[str, Any] = {}
    if "k" in raw:
        found["k"] = int(raw.pop("k"))
    if "group_sizes" in raw:
        sizes = raw.pop("group_sizes")
        if sizes.is_floating_point() or int(sizes.min()) < 1:
            raise CheckpointError(f"{where}: 'group_sizes' must be whole numbers from 1")
        found["prefixes"] = sizes.cumsum(0).tolist()
    return found


def _ours(raw: dict[str, Tensor], architecture: str) -> dict[str, Tensor]:
    tensors = {}
    for name, x in raw.items():
        tensors[OURS.get(name, name)] = x.T if name in ("encoder.weight", "decoder.weight") else x
    if architecture in ("batchtopk", "matryoshka"):
        tensors["topk_threshold"] = tensors.pop("threshold")
    elif architecture == "topk":
        tensors.pop("threshold")  # used only when the k largest are not asked for
    return tensors
