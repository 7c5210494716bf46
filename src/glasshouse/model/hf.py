"""Load and save Hugging Face folders of the families GPT-2, Llama and Qwen3.

What a family is stands in the tables of ``families.py``. Reading is strict: a key that would change the
computation and that we do not compute is refused by name, and so is a key we do not know: it might.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import pydantic
import torch
from torch import Tensor

from glasshouse.base.atomic import write_text
from glasshouse.base.errors import CheckpointError, UsageError
from glasshouse.model.families import ACTIVATIONS, FAMILIES, GPT2, INERT, Family, Place, family_for
from glasshouse.model.gpt import GPT, GPTConfig
from glasshouse.model.weights import INDEX, SINGLE, Shapes, read_folder, read_json, write_safetensors

LIMIT = 2**20  # a larger width, vocabulary or context in a config.json is a mistake or an attack
LIMIT_LAYERS = 1024


def load_hf(
    folder: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    context: int | None = None,
    ignore: Iterable[str] = (),
) -> GPT:
    """Load a Hugging Face folder (config.json + safetensors) as a GPT with the same logits.

    Stored bf16/fp16 weights become ``dtype``. ``context`` shortens the longest sequence. ``ignore``
    names unknown config keys that the caller knows to be harmless. Raises CheckpointError for what
    cannot be computed here, and for damaged or hostile files.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; give one that holds config.json and {SINGLE}")
    config, family = read_config(folder / "config.json", ignore=ignore)
    if context is not None:
        if not 1 <= context <= config.context:
            raise UsageError(f"context must lie in 1..{config.context}, not {context}")
        if config.position == "rotary":  # learned positions are weights, and are cut below
            config = config.model_copy(update={"context": context})
    with torch.device("meta"):  # shapes only: the file's tensors become the parameters
        model = GPT(config)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    theirs = _theirs(family, shapes)

    def expected(found: Shapes) -> Shapes:
        bare = not any(name.startswith("transformer.") for name in found) and family is GPT2
        wanted = {(n.removeprefix("transformer.") if bare else n): s for n, s in theirs.items()}
        surplus = {n: s for n, s in found.items() if n not in wanted and n.endswith(family.skipped)}
        if config.tied and "lm_head.weight" in found:
            wanted["lm_head.weight"] = (config.vocab_size, config.d_model)
        return {**wanted, **surplus}

    tensors = read_folder(folder, expected, dtype=dtype)
    model.load_state_dict(_ours(folder, family, config, shapes, tensors), assign=True)
    if config.position == "rotary":
        model.make_tables()
    elif context is not None and context < config.context:
        model.pos.weight = torch.nn.Parameter(model.pos.weight.detach()[:context].clone())
        model.pos.num_embeddings = context
        model.config = config.model_copy(update={"context": context})
    return model.eval()


def read_config(path: str | Path, *, ignore: Iterable[str] = ()) -> tuple[GPTConfig, Family]:
    """Translate a ``config.json`` into features. Raises CheckpointError naming key, value and choices."""
    path = Path(path)
    raw = read_json(path)
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise CheckpointError(
            f"{path}: model_type {model_type!r} is not supported; supported: {', '.join(FAMILIES)}"
        )
    family = FAMILIES[model_type]
    features: dict[str, Any] = dict(family.needs)
    for key, (feature, default) in family.keys.items():
        if raw.get(key) is None and key in family.required:
            raise CheckpointError(f"{path}: {key} is missing")
        features[feature] = raw.get(key, default)
    act = features["activation"]
    if not isinstance(act, str) or act not in ACTIVATIONS:
        raise CheckpointError(
            f"{path}: activation {act!r} is not supported; supported: {', '.join(ACTIVATIONS)}"
        )
    features["activation"] = ACTIVATIONS[act]
    if family is not GPT2:
        features["attn_out_bias"] = features["attn_bias"]  # their one key sets q, k, v and o
        features["rope_theta"] = _rope_theta(path, raw)
        _refuse_windows(path, raw)
    _refuse_unknown(path, raw, family, frozenset(ignore))
    for feature in ("vocab_size", "d_model", "n_head", "d_mlp", "context", "n_layer", "d_head"):
        limit = LIMIT_LAYERS if feature == "n_layer" else LIMIT
        value = features.get(feature)
        if isinstance(value, int) and value > limit:
            raise CheckpointError(f"{path}: {feature} = {value} is beyond the limit of {limit}")
    try:
        return GPTConfig(**features), family
    except pydantic.ValidationError as error:
        problem = error.errors(include_url=False)[0]
        at = ".".join(str(part) for part in problem["loc"])
        raise CheckpointError(f"{path}: {at + ': ' if at else ''}{problem['msg']}") from error


def save_hf(
    model: GPT,
    folder: str | Path,
    family: Literal["auto", "llama", "qwen3", "gpt2"] = "auto",
    *,
    bos_id: int | None = None,
    eos_id: int | None = None,
    pad_id: int | None = None,
) -> str:
    """Write ``config.json`` and ``model.safetensors`` that ``transformers`` loads unchanged.

    Weights keep the dtype they have. Returns the family's name. Raises CheckpointError that lists which
    features stand in the way when no family (or not the one asked for) computes this model, and
    UsageError when the folder holds a model already.
    """
    folder, chosen = Path(folder), family_for(model.config, family)
    present = [n for n in (SINGLE, INDEX, "config.json") if (folder / n).exists()]
    if present:
        raise UsageError(f"{folder} holds {present[0]} already; choose another folder")
    ours = {name: p.detach() for name, p in model.named_parameters()}
    write_safetensors(folder / SINGLE, _export(chosen, ours))
    # The config comes last: a folder with one is complete.
    ids = {"bos_token_id": bos_id, "eos_token_id": eos_id, "pad_token_id": pad_id}
    dtype = str(model.embed.weight.dtype).removeprefix("torch.")
    config = {**_their_config(model.config, chosen), **ids, "dtype": dtype}
    write_text(folder / "config.json", json.dumps(config, indent=2, sort_keys=True, allow_nan=False) + "\n")
    return chosen.model_type


def _their_config(config: GPTConfig, family: Family) -> dict[str, Any]:
    theirs = {key: getattr(config, feature) for key, (feature, _) in family.keys.items()}
    activation = "hidden_act" if "hidden_act" in theirs else "activation_function"
    theirs[activation] = next(name for name, ours in ACTIVATIONS.items() if ours == config.activation)
    theirs |= {"model_type": family.model_type, "architectures": [family.architecture]}
    if family is GPT2:
        return {**theirs, "n_inner": config.mlp_width}
    widths = {"num_key_value_heads": config.kv_heads, "head_dim": config.head_width}
    # rope_theta is read by transformers 4, rope_parameters by 5
    rope = {"rope_theta": config.rope_theta, "rope_type": "default"}
    rotary = {"rope_theta": config.rope_theta, "rope_parameters": rope}
    return {**theirs, **widths, **rotary, "intermediate_size": config.mlp_width}


def _rope_theta(path: Path, raw: dict[str, Any]) -> float:
    """The rotary base; CheckpointError for every scheme beyond plain rotary over the whole head."""
    thetas = [raw["rope_theta"]] if raw.get("rope_theta") is not None else []
    for key in ("rope_scaling", "rope_parameters"):
        rope = raw.get(key)
        if rope is None:
            continue
        plain = isinstance(rope, dict) and not set(rope) - {"rope_type", "type", "rope_theta"}
        if not plain or any(rope.get(k, "default") != "default" for k in ("rope_type", "type")):
            raise CheckpointError(
                f"{path}: {key} = {rope!r} is not supported; "
                "supported: null, or rope_type default with a rope_theta"
            )
        thetas += [rope["rope_theta"]] if rope.get("rope_theta") is not None else []
    if raw.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise CheckpointError(f"{path}: partial_rotary_factor is not supported unless it is 1")
    if any(type(theta) not in (int, float) for theta in thetas):
        raise CheckpointError(f"{path}: rope_theta must be a number")
    if len(set(thetas)) > 1:
        raise CheckpointError(f"{path}: rope_theta is given twice, as {thetas}; keep one")
    return float(thetas[0]) if thetas else 10_000.0


def _refuse_windows(path: Path, raw: dict[str, Any]) -> None:
    layers = raw.get("layer_types")
    # Qwen3 writes a window size even where use_sliding_window is false and it has no effect.
    window = raw.get("sliding_window") if raw.get("use_sliding_window", True) else None
    full = layers is None or (isinstance(layers, list) and all(x == "full_attention" for x in layers))
    if window is not None or not full:
        raise CheckpointError(
            f"{path}: sliding-window attention (sliding_window, layer_types) is not supported; "
            "supported: full attention"
        )


def _refuse_unknown(path: Path, raw: dict[str, Any], family: Family, ignore: frozenset[str]) -> None:
    for key, values in family.fixed.items():
        if raw.get(key) is not None and raw[key] not in values:
            raise CheckpointError(f"{path}: {key} = {raw[key]!r} is not supported; supported: {values[0]!r}")
    handled = {*family.keys, *family.fixed, *INERT, *ignore}
    if family is not GPT2:
        handled |= {"rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor"}
        handled |= {"sliding_window", "layer_types", "max_window_layers"}
    unknown = [k for k, v in raw.items() if k not in handled and v is not None and not k.startswith("_")]
    if unknown:
        raise CheckpointError(
            f"{path}: {unknown[0]} = {raw[unknown[0]]!r} may change the computation and is not supported for "
            f"{family.model_type}. If you know it to be harmless, pass ignore=[{unknown[0]!r}]"
        )


def _place(family: Family, name: str) -> Place:
    """The place of our parameter, with its layer filled in."""
    parts = name.split(".")
    if parts[0] != "blocks":
        return family.tensors[name]
    place = family.tensors[".".join(["blocks", "{i}", *parts[2:]])]
    return Place(place.name.format(i=parts[1]), place.third, place.transposed)


def _theirs(family: Family, shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """Names and shapes of their tensors, given ours."""
    theirs: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        place = _place(family, name)
        full = shape if place.third is None else (3 * shape[0], *shape[1:])
        theirs[place.name] = full[::-1] if place.transposed else full
    return theirs


def _ours(
    folder: Path, family: Family, config: GPTConfig, shapes: Shapes, theirs: dict[str, Tensor]
) -> dict[str, Tensor]:
    ours: dict[str, Tensor] = {}
    for name in shapes:
        place = _place(family, name)
        x = theirs[place.name] if place.name in theirs else theirs[place.name.removeprefix("transformer.")]
        x = x.T if place.transposed else x
        ours[name] = (x if place.third is None else x.chunk(3)[place.third]).contiguous()
    head = theirs.get("lm_head.weight") if config.tied else None
    if head is not None and not torch.equal(head, ours["embed.weight"]):
        raise CheckpointError(
            f"{folder}: tie_word_embeddings is true, but lm_head.weight differs from the embedding; "
            "set tie_word_embeddings to false, or remove the tensor"
        )
    return ours


def _export(family: Family, ours: dict[str, Tensor]) -> dict[str, Tensor]:
    thirds: dict[str, list[Tensor]] = {}
    for name, x in ours.items():  # q, k, v follow each other in our order, as in theirs
        thirds.setdefault(_place(family, name).name, []).append(x)
    transposed = {p.name for p in (_place(family, n) for n in ours) if p.transposed}
    joined: dict[str, Tensor] = {name: torch.cat(parts) for name, parts in thirds.items()}
    return {name: x.T if name in transposed else x for name, x in joined.items()}
