"""SAELens folders: ``cfg.json`` and ``sae_weights.safetensors``, read and written.

Keys from SAELens 6.54.12 (``sae_lens/saes/*.py``); older files, whose facts lie beside the config and not
under ``metadata``, are read too. What SAELens computes from a file and what we compute are equal:

| SAELens architecture        | ours       | note                                                          |
|-----------------------------|------------|---------------------------------------------------------------|
| standard, [skip_]transcoder | l1         |                                                               |
| gated                       | gated      | SAELens has no transcoder of this kind                        |
| topk                        | topk       | nor of this; decoder norms that count are folded in           |
| jumprelu[_[skip_]transcoder]| jumprelu   |                                                               |
| jumprelu                    | batchtopk, | as SAELens stores them too: one threshold, repeated; what it  |
|                             | matryoshka | was stands in our part of the metadata                        |

A file holds the dictionary with its activation scale folded in, as SAELens' files do.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glasshouse.base.atomic import atomic_dir, write_json
from glasshouse.base.errors import CheckpointError, DataError, UsageError, suggest
from glasshouse.interp.dictionaries import Dictionary, DictionaryConfig
from glasshouse.interp.formats.fit import (
    check_fits,
    flag,
    make_config,
    number,
    our_facts,
    placed,
    read_facts,
)
from glasshouse.interp.formats.hooks import hook_name, site_name
from glasshouse.model import GPT
from glasshouse.model.weights import read_json, read_safetensors, write_safetensors

CFG, WEIGHTS, SPARSITY = "cfg.json", "sae_weights.safetensors", "sparsity.safetensors"
SCALER = "activation_scaler.json"
LAYOUT = "6.54.12"  # the version whose layout is written; SAELens reads older layouts differently
KINDS = {
    "standard": "l1",
    "gated": "gated",
    "topk": "topk",
    "jumprelu": "jumprelu",
    "transcoder": "l1",
    "skip_transcoder": "l1",
    "jumprelu_transcoder": "jumprelu",
    "jumprelu_skip_transcoder": "jumprelu",
}
THRESHOLDED = ("batchtopk", "matryoshka")
DTYPES = ("float32", "bfloat16", "float16", "torch.float32", "torch.bfloat16", "torch.float16")


def write_saelens(
    folder: str | Path,
    dictionary: Dictionary,
    *,
    model_name: str = "",
    sparsity: Tensor | None = None,
    training: Mapping[str, Any] | None = None,
) -> None:
    """Write a new SAELens folder, whole or not at all.

    ``model_name``: for people. ``sparsity`` [d_sae]: log10 of how often each feature fires. ``training``:
    facts worth keeping, as JSON values. UsageError for what SAELens cannot hold.
    """
    folded = dictionary.folded()
    config = folded.config
    tensors = folded.weights()
    if config.architecture in THRESHOLDED:
        threshold = tensors.pop("topk_threshold")
        tensors["threshold"] = threshold.expand(config.d_sae).contiguous()
    cfg = _cfg(config) | {"metadata": _metadata(config, model_name, training)}
    if sparsity is not None and tuple(sparsity.shape) != (config.d_sae,):
        raise UsageError(f"sparsity must be [{config.d_sae}], got {list(sparsity.shape)}")
    with atomic_dir(folder) as making:
        write_safetensors(making / WEIGHTS, tensors)
        if sparsity is not None:
            write_safetensors(making / SPARSITY, {"sparsity": sparsity.float()})
        write_json(making / CFG, cfg)


def _cfg(config: DictionaryConfig) -> dict[str, Any]:
    kind = {"l1": "standard", "batchtopk": "jumprelu", "matryoshka": "jumprelu"}.get(
        config.architecture, config.architecture
    )
    if config.is_transcoder:
        if kind not in ("standard", "jumprelu"):
            raise UsageError(
                f"SAELens has no {config.architecture} transcoder, only l1 and jumprelu"
                + ("; write_sparsify can hold a topk one" if config.architecture == "topk" else "")
            )
        kind = ("jumprelu_" if kind == "jumprelu" else "") + (
            "skip_transcoder" if config.skip_connection else "transcoder"
        )
    cfg: dict[str, Any] = {
        "architecture": kind,
        "d_in": config.d_in,
        "d_sae": config.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": config.apply_b_dec_to_input,
        "normalize_activations": "none",
        "reshape_activations": "hook_z" if config.site.endswith(".z") else "none",
    }
    if config.is_transcoder:
        cfg["d_out"] = config.out
    if kind == "topk":
        cfg |= {"k": config.k, "rescale_acts_by_decoder_norm": False}
    return cfg


def _metadata(
    config: DictionaryConfig, model_name: str, training: Mapping[str, Any] | None
) -> dict[str, Any]:
    metadata: dict[str, Any] = {
        "sae_lens_version": LAYOUT,
        "sae_lens_training_version": None,
        "model_name": model_name or None,
        "hook_name": hook_name(config.site) or None,
        "hook_head_index": None,
        "glasshouse": our_facts(config, training),
    }
    if config.site_out is not None:
        metadata["hook_name_out"] = hook_name(config.site_out)
    return metadata


def read_saelens(
    folder: str | Path,
    *,
    model: GPT | None = None,
    site: str | None = None,
    site_out: str | None = None,
    scale: float | None = None,
) -> Dictionary:
    """Read a SAELens folder, ours or theirs, as a dictionary in fp32.

    ``model``: refuse a dictionary that does not belong to it (`check_fits`). ``site``, ``site_out``: where it
    must belong, or does, if its file does not say. ``scale``: what activations were multiplied by, for a file
    that was trained so and does not say by what.
    Raises CheckpointError naming file and key: missing or contradictory keys, features of SAELens that a
    dictionary here does not have, weights truncated, of another shape or dtype, or not finite.
    """
    folder = Path(folder)
    where = str(folder / CFG)
    cfg = read_json(folder / CFG)
    metadata = cfg.get("metadata", {})
    if not isinstance(metadata, dict):
        raise CheckpointError(f"{where}: 'metadata' must be an object")
    if "metadata" not in cfg:
        cfg, metadata = _modern(cfg), cfg
    config, rescale = _config(cfg, metadata, where, model)
    config = placed(config, where, site, site_out)
    shapes = _shapes(config)
    tensors = read_safetensors(folder / WEIGHTS, shapes, dtype=torch.float32)
    if rescale:
        _fold_norms(tensors, where)
    if config.architecture in THRESHOLDED:
        config, tensors = _one_threshold(config, tensors)
    try:
        dictionary = Dictionary.from_weights(config, tensors, where)
    except DataError as error:
        raise CheckpointError(str(error)) from error
    dictionary = _scaled(dictionary, cfg, folder, scale)
    if model is not None:
        check_fits(dictionary, model)
    return dictionary


def read_sparsity(folder: str | Path, dictionary: Dictionary) -> Tensor | None:
    """log10 of how often each feature fires [d_sae], if the folder says so."""
    path = Path(folder) / SPARSITY
    if not path.exists():
        return None
    return read_safetensors(path, {"sparsity": (dictionary.config.d_sae,)}, dtype=torch.float32)["sparsity"]


def _modern(cfg: dict[str, Any]) -> dict[str, Any]:
    """The config of a file from before SAELens 6 under today's keys."""
    new = dict(cfg)
    activation = cfg.get("activation_fn", cfg.get("activation_fn_str", "relu"))
    arguments = cfg.get("activation_fn_kwargs") or {}
    if activation == "topk" and isinstance(arguments, dict):
        new["architecture"], new["k"] = "topk", arguments.get("k")
    elif activation != "relu":
        new["architecture"] = activation  # refused by its name
    new.setdefault("architecture", "standard")
    normalize = cfg.get("normalize_activations")
    if normalize is None or isinstance(normalize, bool):
        new["normalize_activations"] = "expected_average_only_in" if normalize else "none"
    if cfg.get("finetuning_scaling_factor"):
        new["finetuning_scaling_factor"] = True
    hook = cfg.get("hook_name", cfg.get("hook_point", ""))
    new.setdefault("reshape_activations", "hook_z" if "hook_z" in str(hook) else "none")
    return new


def _config(
    cfg: Mapping[str, Any], metadata: Mapping[str, Any], where: str, model: GPT | None
) -> tuple[DictionaryConfig, bool]:
    """The dictionary's config, and whether decoder norms count in choosing the k largest."""
    kind = _kind(cfg, where)
    _refuse_unlike(cfg, where)
    claimed: dict[str, Any] = {
        "d_in": number(cfg, "d_in", where),
        "d_sae": number(cfg, "d_sae", where),
        "apply_b_dec_to_input": flag(cfg, "apply_b_dec_to_input", True, where),
        "skip_connection": "skip" in kind,
        "d_out": number(cfg, "d_out", where) if "transcoder" in kind else None,
    }
    if kind == "topk":
        claimed["k"] = number(cfg, "k", where)
    rescale = flag(cfg, "rescale_acts_by_decoder_norm", False, where) and kind == "topk"
    hook = _hook(metadata, ("hook_name", "hook_point"), where, model)
    ours = read_facts(metadata.get("glasshouse"), claimed, where)
    if ours is not None:
        if ours.architecture != KINDS[kind] and not (kind == "jumprelu" and ours.architecture in THRESHOLDED):
            raise CheckpointError(
                f"{where} contradicts itself: {kind!r} here, {ours.architecture!r} under 'glasshouse'"
            )
        if hook != ours.site:
            raise CheckpointError(
                f"{where} contradicts itself: hook_name is {hook!r} here, {ours.site!r} under 'glasshouse'"
            )
        return ours, rescale
    out = _hook(metadata, ("hook_name_out",), where, model) if "transcoder" in kind else ""
    sites = {"site": hook, "site_out": out or None}
    return make_config(where, architecture=KINDS[kind], **claimed, **sites), rescale


def _kind(cfg: Mapping[str, Any], where: str) -> str:
    """SAELens' name of the architecture, one of those that are read."""
    kind = cfg.get("architecture")
    if isinstance(kind, str) and kind in KINDS:
        return kind
    if kind in ("batchtopk", "matryoshka_batchtopk"):
        raise CheckpointError(f"{where} is a training checkpoint: save it with save_inference_model")
    raise CheckpointError(
        f"{where}: architecture {kind!r} is not read; known: {', '.join(KINDS)}.{suggest(str(kind), KINDS)}"
    )


def _hook(metadata: Mapping[str, Any], keys: tuple[str, ...], where: str, model: GPT | None) -> str:
    """The site that a hook's name means; a name that is none of ours stays, and fits no model."""
    value = next((metadata[k] for k in keys if metadata.get(k) is not None), "")
    if not isinstance(value, str):
        raise CheckpointError(f"{where}: {keys[0]!r} must be text, found {value!r}")
    return site_name(value, model.config if model is not None else None) or value


def _refuse_unlike(cfg: Mapping[str, Any], where: str) -> None:
    """Refuse what SAELens computes and a dictionary here does not; reading on would give other numbers."""
    if cfg.get("dtype", "float32") not in DTYPES:
        raise CheckpointError(f"{where}: dtype {cfg.get('dtype')!r}; read here: {', '.join(DTYPES[:3])}")
    normalize = cfg.get("normalize_activations", "none")
    if normalize not in ("none", "expected_average_only_in"):
        raise CheckpointError(
            f"{where}: normalize_activations {normalize!r} changes each activation by itself, which no "
            "dictionary here does; fold it in SAELens, or train with 'expected_average_only_in'"
        )
    if cfg.get("reshape_activations", "none") not in ("none", "hook_z"):
        raise CheckpointError(f"{where}: reshape_activations {cfg['reshape_activations']!r} is not known")
    if cfg.get("finetuning_scaling_factor"):
        raise CheckpointError(
            f"{where}: finetuning_scaling_factor is not supported; fold it into W_dec first"
        )


def _shapes(config: DictionaryConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the file's tensors; nothing is allocated to find them."""
    d_in, d_sae, out = config.d_in, config.d_sae, config.out
    shapes: dict[str, tuple[int, ...]] = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, out), "b_dec": (out,)}
    biases = ("b_gate", "r_mag", "b_mag") if config.architecture == "gated" else ("b_enc",)
    if config.architecture in ("jumprelu", *THRESHOLDED):
        biases = (*biases, "threshold")
    shapes |= dict.fromkeys(biases, (d_sae,))
    return shapes | ({"W_skip": (out, d_in)} if config.skip_connection else {})


def _fold_norms(tensors: dict[str, Tensor], where: str) -> None:
    """Make a file whose k largest are chosen by value times decoder norm one where norms do not matter.

    Features p |w| chosen, written as f w / |w|: the same features and outputs come of W_enc |w| and w / |w|.
    """
    norms = tensors["W_dec"].norm(dim=1)
    if not bool((norms > 0).all()):
        raise CheckpointError(f"{where}: rows of W_dec are zero, by whose norm features would be divided")
    tensors["W_enc"] = tensors["W_enc"] * norms
    tensors["b_enc"] = tensors["b_enc"] * norms
    tensors["W_dec"] = tensors["W_dec"] / norms[:, None]


def _one_threshold(
    config: DictionaryConfig, tensors: dict[str, Tensor]
) -> tuple[DictionaryConfig, dict[str, Tensor]]:
    """A BatchTopK dictionary again, or JumpReLU if somebody gave its features thresholds of their own."""
    threshold = tensors.pop("threshold")
    if bool((threshold == threshold[0]).all()):
        return config, tensors | {"topk_threshold": threshold[0]}
    fields = {"architecture": "jumprelu", "k": None, "prefixes": ()}
    return config.model_copy(update=fields), tensors | {"threshold": threshold}


def _scaled(dictionary: Dictionary, cfg: Mapping[str, Any], folder: Path, scale: float | None) -> Dictionary:
    """The dictionary with the activation scale that its file or the caller names."""
    if cfg.get("normalize_activations", "none") == "none":
        if scale is not None:
            raise UsageError(f"{folder} says that activations are not scaled; a scale does not belong to it")
        return dictionary
    if scale is None and (folder / SCALER).exists():
        scale = read_json(folder / SCALER).get("scaling_factor")
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0 < scale < float("inf"):
        raise CheckpointError(
            f"{folder} was trained on scaled activations and does not say by what they were multiplied "
            f"(found {scale!r}): give scale=, or fold it in SAELens (fold_activation_norm_scaling_factor)"
        )
    made = Dictionary(
        dictionary.config.model_copy(update={"normalize_activations": "expected_average_only_in"})
    )
    made.load_state_dict(dictionary.state_dict())
    made.scale_in.fill_(scale)
    made.scale_out.fill_(scale)
    return made
