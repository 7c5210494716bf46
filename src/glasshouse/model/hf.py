"""Load and save Hugging Face folders: config.json and safetensors, nothing else.

What a family is stands in the tables of ``families.py``; ``hf_config.py`` translates configs. This file
moves tensors: names, fused and transposed layouts, and what to say when shapes and config disagree.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from glasshouse.base.atomic import write_text
from glasshouse.base.errors import CheckpointError, UsageError
from glasshouse.model.config import GPTConfig
from glasshouse.model.families import family_for
from glasshouse.model.family import Family, Place
from glasshouse.model.gpt import GPT
from glasshouse.model.hf_config import read_config, write_config
from glasshouse.model.weights import INDEX, SINGLE, Shapes, read_folder, write_safetensors

__all__ = ["load_hf", "read_config", "save_hf"]

# The features that the two dimensions of each of our tensors follow from.
WIDTHS: dict[str, tuple[str, ...]] = {
    **{"embed": ("vocab_size", "d_model"), "head": ("vocab_size", "d_model"), "pos": ("context", "d_model")},
    **{"q": ("n_head", "d_head", "d_model"), "k": ("n_kv_head", "d_head", "n_head", "d_model")},
    **{"v": ("n_kv_head", "d_head", "n_head", "d_model"), "o": ("n_head", "d_head", "d_model")},
    **{"gate": ("d_mlp", "d_model"), "up": ("d_mlp", "d_model"), "down": ("d_mlp", "d_model")},
    **{"q_norm": ("d_head", "n_head"), "k_norm": ("d_head", "n_kv_head")},
}


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
    stored = _read(folder, family, config, shapes, dtype)
    model.load_state_dict(_ours(folder, family, config, shapes, stored), assign=True)
    model.make_tables()
    if config.position == "learned" and context is not None and context < config.context:
        model.pos.weight = torch.nn.Parameter(model.pos.weight.detach()[:context].clone())
        model.pos.num_embeddings = context
        model.config = config.model_copy(update={"context": context})
    return model.eval()


def save_hf(
    model: GPT,
    folder: str | Path,
    family: str = "auto",
    *,
    bos_id: int | None = None,
    eos_id: int | list[int] | None = None,
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
    write_safetensors(folder / SINGLE, theirs_from(chosen, ours, model.config))
    # The config comes last: a folder with one is complete.
    ids = {"bos_token_id": bos_id, "eos_token_id": eos_id, "pad_token_id": pad_id}
    dtype = str(model.embed.weight.dtype).removeprefix("torch.")
    config = {**write_config(model.config, chosen), **ids, "dtype": dtype}
    write_text(folder / "config.json", json.dumps(config, indent=2, sort_keys=True, allow_nan=False) + "\n")
    return chosen.model_type


def theirs_from(family: Family, ours: Mapping[str, Tensor], config: GPTConfig) -> dict[str, Tensor]:
    """Their tensors from ours: fused and transposed as the family stores them."""
    parts: dict[str, list[Tensor]] = {}
    places: dict[str, Place] = {}
    for name, x in ours.items():  # q, k, v follow each other in our order, as in theirs
        place = family.place(name)
        parts.setdefault(place.name, []).append(x)
        places[place.name] = place
    theirs: dict[str, Tensor] = {}
    for name, pieces in parts.items():
        x = pieces[0] if len(pieces) == 1 else _fuse(pieces, places[name], config.n_head)
        theirs[name] = x.T if places[name].transposed else x
    return theirs


def _fuse(pieces: list[Tensor], place: Place, heads: int) -> Tensor:
    """q, k, v [H * K, ...] as one tensor [3 H K, ...]."""
    if place.fused == "stacked":
        return torch.cat(pieces)
    by_head = [x.reshape(heads, -1, *x.shape[1:]) for x in pieces]
    return torch.cat(by_head, dim=1).reshape(-1, *pieces[0].shape[1:])


def _unfuse(x: Tensor, place: Place, heads: int) -> Tensor:
    """One of q, k, v [H * K, ...] out of a fused tensor [3 H K, ...]."""
    assert place.part is not None
    if place.fused == "stacked":
        return x.chunk(3)[place.part]
    by_head = x.reshape(heads, 3, -1, *x.shape[1:])
    return by_head[:, place.part].reshape(-1, *x.shape[1:])


def _theirs(family: Family, shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """Names and shapes of their tensors, given ours."""
    theirs: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        place = family.place(name)
        full = shape if place.part is None else (3 * shape[0], *shape[1:])
        theirs[place.name] = full[::-1] if place.transposed else full
    return theirs


def _canonical(family: Family, name: str) -> str:
    """The family's own name for a tensor that a file names otherwise."""
    for beginning, meant in family.aliases.items():
        if name.startswith(beginning):
            return meant + name.removeprefix(beginning)
    return name


def _read(
    folder: Path, family: Family, config: GPTConfig, shapes: Shapes, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Their tensors under the family's own names; a file whose shapes contradict its config is refused."""
    wanted = _theirs(family, shapes)
    if config.tied:
        wanted[family.tensors["head.weight"].name] = (config.vocab_size, config.d_model)

    def expected(found: Shapes) -> Shapes:
        named: dict[str, str] = {}
        for name in found:
            if named.setdefault(_canonical(family, name), name) != name:
                raise CheckpointError(
                    f"{folder}: {name!r} and {named[_canonical(family, name)]!r} are the same tensor twice"
                )
        for name, shape in wanted.items():
            if name in named and found[named[name]] != shape:
                raise CheckpointError(_contradiction(folder, family, config, name, found[named[name]], shape))
        _count_layers(folder, family, config, wanted, named)
        optional = {family.tensors["head.weight"].name} if config.tied else set()
        surplus = {
            n: s for n, s in found.items() if _canonical(family, n) not in wanted and _is_buffer(family, n)
        }
        return {
            **{named.get(n, n): s for n, s in wanted.items() if n in named or n not in optional},
            **surplus,
        }

    stored = read_folder(folder, expected, dtype=dtype, elsewhere=family.elsewhere)
    return {_canonical(family, name): x for name, x in stored.items()}


def _is_buffer(family: Family, name: str) -> bool:
    """Whether a tensor is one that old files of this family carry and nothing reads."""
    return bool(family.skipped) and name.endswith(family.skipped)


def _contradiction(
    folder: Path,
    family: Family,
    config: GPTConfig,
    name: str,
    found: tuple[int, ...],
    wanted: tuple[int, ...],
) -> str:
    """Which tensor has which shape, and which config keys say otherwise."""
    features: dict[str, None] = {}
    for ours, place in family.tensors.items():
        pattern = place.name.split("{i}")
        if name.startswith(pattern[0]) and name.endswith(pattern[-1]):
            features |= dict.fromkeys(WIDTHS.get(ours.split(".")[-2], ("d_model",)))
    resolved = {"n_kv_head": config.kv_heads, "d_head": config.head_width, "d_mlp": config.mlp_width}
    said = [
        f"{family.key_of[feature]} = {resolved.get(feature, getattr(config, feature))}"
        for feature in features
        if feature in family.key_of
    ]
    return (
        f"{folder}: {name!r} has shape {list(found)}, not {list(wanted)} as config.json says "
        f"({', '.join(said)}); one of the two belongs to another model"
    )


def _count_layers(
    folder: Path, family: Family, config: GPTConfig, wanted: Shapes, named: Mapping[str, str]
) -> None:
    """Refuse a file that has more or fewer layers than its config says, by that key."""
    stem = family.tensors["blocks.{i}.mlp.up.weight"].name.split("{i}")[0]
    layers = {name.removeprefix(stem).split(".")[0] for name in named if name.startswith(stem)}
    if named.keys() & wanted.keys() and layers and len(layers) != config.n_layer:
        raise CheckpointError(
            f"{folder}: the weights have {len(layers)} layers, not {config.n_layer} as config.json says "
            f"({family.key_of['n_layer']} = {config.n_layer}); one of the two belongs to another model"
        )


def _ours(
    folder: Path, family: Family, config: GPTConfig, shapes: Shapes, theirs: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    ours: dict[str, Tensor] = {}
    for name in shapes:
        place = family.place(name)
        x = theirs[place.name].T if place.transposed else theirs[place.name]
        ours[name] = (x if place.part is None else _unfuse(x, place, config.n_head)).contiguous()
    head = theirs.get(family.tensors["head.weight"].name) if config.tied else None
    if head is not None and not torch.equal(head, ours["embed.weight"]):
        raise CheckpointError(
            f"{folder}: tie_word_embeddings is true, but {family.tensors['head.weight'].name} differs from "
            "the embedding; set tie_word_embeddings to false, or remove the tensor"
        )
    return ours
