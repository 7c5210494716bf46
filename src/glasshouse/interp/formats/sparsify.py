"""sparsify folders: ``cfg.json`` and ``sae.safetensors``, read and written.

Keys from eai-sparsify 1.3.3 (``sparsify/sparse_coder.py``, ``config.py``). It knows one architecture, the k
largest, as an autoencoder or as a transcoder between sites of equal width. Its loader ignores keys of
``cfg.json`` that it does not know, where ours stand.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glasshouse.base.atomic import atomic_dir, write_json
from glasshouse.base.errors import CheckpointError, DataError, UsageError
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
from glasshouse.model import GPT
from glasshouse.model.weights import read_json, read_safetensors, write_safetensors

CFG, WEIGHTS = "cfg.json", "sae.safetensors"


def write_sparsify(
    folder: str | Path, dictionary: Dictionary, *, training: Mapping[str, Any] | None = None
) -> None:
    """Write a new sparsify folder, whole or not at all. UsageError for what sparsify cannot hold."""
    folded = dictionary.folded()
    config = folded.config
    if config.architecture != "topk":
        raise UsageError(f"sparsify knows topk only, not {config.architecture}; write_saelens holds it")
    if config.out != config.d_in:
        raise UsageError(
            f"sparsify's transcoders keep the width; this one goes from {config.d_in} to {config.out}"
        )
    if not config.is_transcoder and not config.apply_b_dec_to_input:
        raise UsageError("sparsify's autoencoders subtract b_dec from their input; this one does not")
    weights = folded.weights()
    tensors: dict[str, Tensor] = {
        name: weights[name] for name in ("W_dec", "b_dec", "W_skip") if name in weights
    }
    tensors["encoder.weight"] = weights["W_enc"].T.contiguous()
    tensors["encoder.bias"] = weights["b_enc"]
    cfg = {
        "activation": "topk",
        "expansion_factor": max(1, config.d_sae // config.d_in),
        "normalize_decoder": config.normalize_decoder,
        "num_latents": config.d_sae,
        "k": config.k,
        "multi_topk": False,
        "skip_connection": config.skip_connection,
        "transcode": config.is_transcoder,
        "d_in": config.d_in,
        "glasshouse": our_facts(config, training),
    }
    with atomic_dir(folder) as making:
        write_safetensors(making / WEIGHTS, tensors)
        write_json(making / CFG, cfg)


def read_sparsify(
    folder: str | Path,
    *,
    model: GPT | None = None,
    site: str | None = None,
    site_out: str | None = None,
) -> Dictionary:
    """Read a sparsify folder, ours or theirs, as a dictionary in fp32.

    ``site``, ``site_out``: sparsify's own files do not say where they belong. ``model``: refuse a dictionary
    that does not belong to it. Raises CheckpointError naming file and key, as `read_saelens` does.
    """
    folder = Path(folder)
    where = str(folder / CFG)
    cfg = read_json(folder / CFG)
    config = placed(_config(cfg, where), where, site, site_out)
    d_in, d_sae = config.d_in, config.d_sae
    shapes: dict[str, tuple[int, ...]] = {
        "encoder.weight": (d_sae, d_in),
        "encoder.bias": (d_sae,),
        "W_dec": (d_sae, d_in),
        "b_dec": (d_in,),
    }
    if config.skip_connection:
        shapes["W_skip"] = (d_in, d_in)
    tensors = read_safetensors(folder / WEIGHTS, shapes, dtype=torch.float32)
    tensors["W_enc"] = tensors.pop("encoder.weight").T
    tensors["b_enc"] = tensors.pop("encoder.bias")
    try:
        dictionary = Dictionary.from_weights(config, tensors, where)
    except DataError as error:
        raise CheckpointError(str(error)) from error
    if model is not None:
        check_fits(dictionary, model)
    return dictionary


def _config(cfg: Mapping[str, Any], where: str) -> DictionaryConfig:
    if cfg.get("activation", "topk") != "topk":
        raise CheckpointError(f"{where}: activation {cfg['activation']!r} is not read; only topk is")
    transcode = flag(cfg, "transcode", False, where)
    skip = flag(cfg, "skip_connection", False, where)
    if skip and not transcode:
        raise CheckpointError(f"{where}: an autoencoder with a skip connection copies its input; not read")
    d_in = number(cfg, "d_in", where)
    d_sae = number(cfg, "num_latents", where) if cfg.get("num_latents") else (
        d_in * number({"expansion_factor": 32, **cfg}, "expansion_factor", where)
    )  # fmt: skip
    claimed: dict[str, Any] = {
        "d_in": d_in,
        "d_sae": d_sae,
        "d_out": d_in if transcode else None,
        "k": number({"k": 32, **cfg}, "k", where),
        "skip_connection": skip,
        "architecture": "topk",
        "apply_b_dec_to_input": not transcode,
    }
    ours = read_facts(cfg.get("glasshouse"), claimed, where)
    normalize = flag(cfg, "normalize_decoder", True, where)
    return ours or make_config(where, **claimed, normalize_decoder=normalize)
