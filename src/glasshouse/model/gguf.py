"""Write GGUF, the format of llama.cpp, for the architectures that exist there.

Facts about what llama.cpp computes are from its ``src/models/*.cpp`` (2026) and from what its converter does
to Hugging Face tensors: norms with an offset are stored as 1 + weight; q, k, v of GPT-2 and GPT-NeoX are one
tensor, one after the other; the ``llama`` architecture rotates adjacent pairs, so its q and k rows are
permuted (``paired``) and Llama-3's stretched frequencies become a tensor of divisors. A model is refused
when no architecture computes it: what llama.cpp would ignore (a window in ``llama``, say) counts.

The ``gguf`` package writes the file; it is the extra ``glasshouse-lm[gguf]``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from glasshouse.base.atomic import atomic_file
from glasshouse.base.errors import CheckpointError, UsageError
from glasshouse.model.config import GPTConfig
from glasshouse.model.families import GEMMA2, GEMMA3, GPT2, GPT_NEOX, LLAMA, MISTRAL, OLMO2, QWEN2, QWEN3
from glasshouse.model.family import Family, attention_scale, obstacles
from glasshouse.model.gguf_tokenizer import read_vocabulary
from glasshouse.model.gpt import GPT, stretched

SUFFIXES = (".weight", ".bias")


@dataclass(frozen=True)
class Architecture:
    """One architecture of llama.cpp: what a Hugging Face family computes, and what it needs beyond that.

    ``name``: the member of ``gguf.MODEL_ARCH``. ``activations``: what it computes. ``needs``: features that
    it fixes. ``period``: every n-th layer is without the window. ``stretches``: it knows Llama-3's scaling.
    ``half_root_layers``: with this many layers, scores are scaled by d_model / n_head instead of d_head.
    ``own_head``: the head must be stored though it is tied.
    """

    name: str
    family: Family
    activations: tuple[str, ...]
    needs: Mapping[str, Any] = field(default_factory=dict)
    period: int | None = None
    stretches: bool = False
    half_root_layers: int | None = None
    own_head: bool = False


ARCHITECTURES = (
    Architecture("LLAMA", LLAMA, ("silu",), stretches=True),
    Architecture("LLAMA", MISTRAL, ("silu",), stretches=True),
    Architecture("QWEN2", QWEN2, ("silu",)),
    Architecture("QWEN3", QWEN3, ("silu",), {"attn_bias": False}),
    Architecture("GPT2", GPT2, ("gelu_tanh",)),
    # Its GELU is the tanh approximation; Pythia's exact GELU is converted to it everywhere (error < 5e-4).
    Architecture("GPTNEOX", GPT_NEOX, ("gelu", "gelu_tanh"), {"attn_bias": True}, own_head=True),
    Architecture(
        "GEMMA2", GEMMA2, ("gelu_tanh",), {"attn_bias": False, "tied": True}, period=2, half_root_layers=46
    ),
    Architecture(
        *("GEMMA3", GEMMA3, ("gelu_tanh",)),
        needs={"attn_bias": False, "logit_softcap": None},
        period=6,
        half_root_layers=62,
    ),
    Architecture("OLMO2", OLMO2, ("silu",), {"attn_bias": False}, own_head=True),
)


def save_gguf(
    model: GPT,
    path: str | Path,
    tokenizer: str | Path | None = None,
    *,
    name: str | None = None,
    bos_id: int | None = None,
    eos_id: int | list[int] | None = None,
    pad_id: int | None = None,
) -> str:
    """Write a ``.gguf`` file and return its ``general.architecture``.

    ``tokenizer``: a ``tokenizer.json`` or the folder that holds one; without it the file has weights only.
    The ids default to those of our own special tokens; of several ids that end a text the first is written.
    Weights keep the dtype they have, vectors become fp32 as llama.cpp wants them. Raises CheckpointError
    that lists what stands in the way when no architecture computes this model, UsageError when the file
    exists or ``gguf`` is not installed.
    """
    path, gguf = Path(path), _package()
    if path.exists():
        raise UsageError(f"{path} exists already; remove it or choose another name")
    arch = architecture_for(model.config)
    kind = getattr(gguf.MODEL_ARCH, arch.name)
    writer = gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[kind])
    writer.add_name(name or path.stem)
    dtype = model.embed.weight.dtype
    _hyperparameters(gguf, writer, model.config, arch, dtype)
    if tokenizer is not None:
        roles = {"bos": bos_id, "eos": eos_id[0] if isinstance(eos_id, list) else eos_id, "pad": pad_id}
        read_vocabulary(Path(tokenizer), model.config.vocab_size, roles).write(gguf, writer)
    for tensor_name, x in gguf_tensors(model, arch).items():
        _add(gguf, writer, tensor_name, x)
    _write(writer, path)
    return str(gguf.MODEL_ARCH_NAMES[kind])


def architecture_for(config: GPTConfig) -> Architecture:
    """The architecture that computes exactly this model; CheckpointError lists what stands in the way."""
    for arch in ARCHITECTURES:
        if not gguf_obstacles(config, arch):
            return arch
    reasons = "; ".join(
        f"{arch.name.lower()} ({arch.family.model_type}): {', '.join(gguf_obstacles(config, arch))}"
        for arch in ARCHITECTURES
    )
    raise CheckpointError(f"no GGUF architecture computes this model without changing it. {reasons}")


def gguf_obstacles(config: GPTConfig, arch: Architecture) -> list[str]:
    """Why llama.cpp's architecture cannot compute this model: empty when it can."""
    config = _without_idle_window(config)
    found = obstacles(config, arch.family)
    if config.activation not in arch.activations:
        found.append(f"activation is {config.activation!r} (needs {' or '.join(arch.activations)})")
    for feature, value in arch.needs.items():
        if getattr(config, feature) != value:
            found.append(f"{feature} is {getattr(config, feature)!r} (needs {value!r})")
    if arch.family is GEMMA2:
        found += [
            f"{feature} is None (needs a number)"
            for feature in ("attn_softcap", "logit_softcap")
            if getattr(config, feature) is None
        ]
    scaling = config.rope_scaling
    if scaling is not None and scaling.kind == "llama3" and not arch.stretches:
        found.append("rope_scaling is of kind 'llama3' (needs 'linear' or None)")
    if arch.family is OLMO2 and config.head_width * config.n_head != config.d_model:
        found.append(f"n_head * d_head is {config.head_width * config.n_head} (needs {config.d_model})")
    return found + _window_obstacles(config, arch) + _scale_obstacles(config, arch)


def _window_obstacles(config: GPTConfig, arch: Architecture) -> list[str]:
    if config.window_tokens is None:
        return []
    if arch.period is None:
        return [f"window_tokens is {config.window_tokens} (this architecture has none)"]
    usual = tuple(i for i in range(config.n_layer) if (i + 1) % arch.period == 0)
    if config.full_layers != usual:
        return [f"full_layers is {config.full_layers} (needs {usual}, every {arch.period}th)"]
    return []


def _scale_obstacles(config: GPTConfig, arch: Architecture) -> list[str]:
    width = config.head_width
    if arch.half_root_layers is not None and config.n_layer == arch.half_root_layers:
        width = config.d_model // config.n_head
    if arch.family.scale_key is not None and abs(attention_scale(config) * width**0.5 - 1) > 1e-6:
        return [f"attn_scale is {config.attn_scale} (needs {width**-0.5})"]
    return []


def _without_idle_window(config: GPTConfig) -> GPTConfig:
    """The same model without a window that is as long as its longest sequence."""
    if config.window_tokens is None or config.window_tokens < config.context:
        return config
    if config.rope_theta_window is not None:  # those layers differ in more than the window
        return config
    return config.model_copy(update={"window_tokens": None, "full_layers": ()})


def gguf_tensors(model: GPT, arch: Architecture) -> dict[str, Tensor]:
    """llama.cpp's tensors by name, [out, in] like ours."""
    gguf, config = _package(), model.config
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, arch.name), config.n_layer)
    parts: dict[str, list[Tensor]] = {}
    for ours, p in model.named_parameters():
        place = arch.family.place(ours)
        found = names.get_name(place.name, try_suffixes=SUFFIXES)
        if found is None:
            raise CheckpointError(f"the installed gguf package has no name for {place.name!r}; update it")
        parts.setdefault(found, []).append(_stored(p.detach().cpu(), ours, config, arch))
    tensors = {name: torch.cat(pieces) if len(pieces) > 1 else pieces[0] for name, pieces in parts.items()}
    if config.tied and arch.own_head:
        tensors["output.weight"] = model.embed.weight.detach().cpu()
    scaling = config.rope_scaling
    if scaling is not None and scaling.kind == "llama3":
        half = config.rotated // 2
        frequency = config.rope_theta ** (-torch.arange(half, dtype=torch.float32) / half)
        tensors["rope_freqs.weight"] = frequency / stretched(frequency, scaling)
    return tensors


def _stored(x: Tensor, name: str, config: GPTConfig, arch: Architecture) -> Tensor:
    """One parameter of ours as llama.cpp stores it, before q, k, v are joined."""
    part = name.split(".")[-2]
    if config.norm_offset and part in ("norm", "norm1", "norm2", "post1", "post2", "q_norm", "k_norm"):
        x = x.float() + 1
    if arch.name == "LLAMA" and part in ("q", "k"):
        x = paired(x, config.n_head if part == "q" else config.kv_heads)
    return x.float() if x.ndim == 1 else x


def paired(x: Tensor, heads: int) -> Tensor:
    """Rows [heads * K, ...] reordered so that rotary pairs half a head apart become neighbours."""
    return x.reshape(heads, 2, -1, *x.shape[1:]).transpose(1, 2).reshape(x.shape)


def unpaired(x: Tensor, heads: int) -> Tensor:
    """The inverse of ``paired``."""
    return x.reshape(heads, -1, 2, *x.shape[1:]).transpose(1, 2).reshape(x.shape)


def _hyperparameters(
    gguf: ModuleType, writer: Any, config: GPTConfig, arch: Architecture, dtype: torch.dtype
) -> None:
    """What llama.cpp reads about the shape."""
    kinds = {torch.float32: "ALL_F32", torch.float16: "MOSTLY_F16", torch.bfloat16: "MOSTLY_BF16"}
    writer.add_file_type(getattr(gguf.LlamaFileType, kinds[dtype]))
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.context)
    writer.add_embedding_length(config.d_model)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(config.mlp_width)
    writer.add_head_count(config.n_head)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_key_length(config.head_width)
    writer.add_value_length(config.head_width)
    if config.norm == "rms":
        writer.add_layer_norm_rms_eps(config.norm_eps)
    else:
        writer.add_layer_norm_eps(config.norm_eps)
    if arch.family is GPT_NEOX:
        writer.add_parallel_residual(config.parallel)
    if config.attn_softcap is not None:
        writer.add_attn_logit_softcapping(config.attn_softcap)
    if config.logit_softcap is not None:
        writer.add_final_logit_softcapping(config.logit_softcap)
    if arch.period is not None and config.window_tokens is not None:
        writer.add_sliding_window(config.window_tokens)
    elif arch.family is GEMMA2:  # without the key it would take 4096
        writer.add_sliding_window(config.context)
    if config.position == "rotary":
        _rotary(gguf, writer, config)


def _rotary(gguf: ModuleType, writer: Any, config: GPTConfig) -> None:
    writer.add_rope_dimension_count(config.rotated)
    writer.add_rope_freq_base(config.rope_theta)
    if config.rope_theta_window is not None:
        writer.add_rope_freq_base_swa(config.rope_theta_window)
    if config.rope_scaling is not None and config.rope_scaling.kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_scaling.factor)


def _add(gguf: ModuleType, writer: Any, name: str, x: Tensor) -> None:
    x = x.contiguous()
    if x.dtype == torch.bfloat16:  # numpy has no such type: the bytes are handed over
        bf16 = gguf.GGMLQuantizationType.BF16
        writer.add_tensor(name, x.view(torch.uint8).numpy(), raw_dtype=bf16)
    else:
        writer.add_tensor(name, x.numpy())


def _write(writer: Any, path: Path) -> None:
    """Write the file whole or not at all."""
    with atomic_file(path) as temporary:
        writer.write_header_to_file(temporary)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _package() -> ModuleType:
    try:
        import gguf
    except ImportError as error:
        raise UsageError("writing GGUF needs the gguf package: pip install 'glasshouse-lm[gguf]'") from error
    return gguf
