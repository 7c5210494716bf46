"""What a Hugging Face family is, and which family computes a given model exactly.

The families themselves are literal tables in ``families.py``: which features of ``GPTConfig`` their
config keys stand for, and where their tensors stand for ours. Loading and saving read the same tables, so
they cannot drift apart. A feature that a family's tables do not mention must have our default: a feature
added later is refused on export until a table says how the family writes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

from glasshouse.model.config import GPTConfig

# transformers' ACT2FN names -> ours; the first name of each is the one we write
ACTIVATIONS = {
    **{"silu": "silu", "swish": "silu", "gelu": "gelu", "relu": "relu", "relu2": "relu2"},
    **{"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"},
}
# Keys that do not change the forward pass in evaluation: dropout, initialisation, bookkeeping, generation.
INERT = frozenset(
    {
        *("architectures", "auto_map", "dtype", "is_llama_config", "model_type", "n_ctx", "name_or_path"),
        *("tokenizer_class", "torch_dtype", "torchscript", "transformers.js_config", "transformers_version"),
        *("initializer_range", "attention_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop"),
        *("hidden_dropout", "classifier_dropout", "hidden_dropout_prob", "attention_probs_dropout_prob"),
        *("summary_activation", "summary_first_dropout", "summary_proj_to_labels", "summary_type"),
        *("summary_use_proj", "id2label", "label2id", "num_labels", "problem_type", "task_specific_params"),
        *("is_decoder", "is_encoder_decoder", "output_attentions", "output_hidden_states", "output_past"),
        *("pretraining_tp", "reorder_and_upcast_attn", "return_dict", "use_cache", "cache_implementation"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "unk_token_id", "do_sample"),
        *("max_length", "min_length", "num_beams", "repetition_penalty", "temperature", "top_k", "top_p"),
    }
)


@dataclass(frozen=True)
class Place:
    """Where one of our parameters stands in a family's file.

    ``part``: which of q, k, v it is in a fused tensor, which holds them one after the other (``stacked``)
    or head by head, each head's q, k and v together (``heads``). ``transposed``: stored [in, out].
    """

    name: str
    part: int | None = None
    fused: Literal["stacked", "heads"] = "stacked"
    transposed: bool = False


@dataclass(frozen=True)
class Rotary:
    """How a family writes rotary positions.

    ``theta``, ``fraction``: the key that counts, then keys that may repeat its value. ``window``: the key
    for the base on windowed layers; a family with one writes ``rope_parameters`` by kind of layer.
    """

    theta: tuple[str, ...] = ("rope_theta",)
    theta_default: float = 10_000.0
    fraction: tuple[str, ...] = ("partial_rotary_factor",)
    fraction_default: float = 1.0
    partial: bool = False
    window: str | None = None
    window_default: float = 10_000.0

    @property
    def keys(self) -> frozenset[str]:
        """Every config key about rotary positions."""
        window = () if self.window is None else (self.window,)
        return frozenset({*self.theta, *self.fraction, *window, "rope_scaling", "rope_parameters"})


@dataclass(frozen=True)
class Window:
    """How a family writes sliding windows: ``default`` tokens, and on which layers without ``layer_types``.

    all: every layer, and ``layer_types`` is not a key of the family. late: those from
    ``max_window_layers`` on, where ``use_sliding_window`` says so. periodic: all but every n-th, n under
    ``period_key``.
    """

    layers: Literal["all", "late", "periodic"]
    default: int = 4096
    period: int = 0
    period_key: str | None = None

    @property
    def keys(self) -> frozenset[str]:
        """Every config key about windows."""
        late = {"use_sliding_window", "max_window_layers"} if self.layers == "late" else set()
        period = {self.period_key} if self.period_key is not None else set()
        return frozenset({"sliding_window", "layer_types", *late, *period})


@dataclass(frozen=True)
class Family:
    """One family of models.

    ``keys``: their config key -> (our feature, their default; None: derived or required).
    ``needs``: features that the family has by construction, where they are not our default.
    ``follows``: features that always equal another. ``fixed``: keys of which only these values are computed
    here. ``inert``: keys without effect in this family. ``tensors``: our parameter -> its place, with {i}
    for the layer. ``aliases``: other beginnings of tensor names, and what they stand for. ``skipped``:
    endings and ``elsewhere``: beginnings of names of tensors that belong to no parameter of ours.
    """

    model_type: str
    architecture: str
    keys: Mapping[str, tuple[str, Any]]
    required: frozenset[str]
    needs: Mapping[str, Any]
    tensors: Mapping[str, Place]
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    inert: frozenset[str] = frozenset()
    follows: Mapping[str, str] = field(default_factory=dict)
    rotary: Rotary | None = None
    window: Window | None = None
    scale_key: str | None = None  # the key whose value to the power -0.5 scales attention scores
    scale_default: int = 256
    embed_root: bool = False  # embeddings are multiplied by the root of d_model
    d_model_by_head: bool = False  # transformers refuses a d_model that n_head does not divide
    aliases: Mapping[str, str] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()
    elsewhere: tuple[str, ...] = ()

    @cached_property
    def free(self) -> frozenset[str]:
        """The features that this family can write whatever they are, or that ``obstacles`` looks at."""
        found = {feature for feature, _ in self.keys.values()} | set(self.follows)
        if self.rotary is not None:
            found |= {"rope_theta", "rope_scaling"}
            found |= {"rope_fraction"} if self.rotary.partial else set()
            found |= {"rope_theta_window"} if self.rotary.window is not None else set()
        if self.window is not None:
            found |= {"window_tokens", "full_layers"}
        found |= {"attn_scale"} if self.scale_key is not None else set()
        found |= {"embed_scale"} if self.embed_root else set()
        return frozenset(found | {"n_kv_head", "d_head"})

    def place(self, name: str) -> Place:
        """The place of our parameter ``name``, with its layer filled in."""
        parts = name.split(".")
        if parts[0] != "blocks":
            return self.tensors[name]
        place = self.tensors[".".join(["blocks", "{i}", *parts[2:]])]
        return replace(place, name=place.name.format(i=parts[1]))

    @cached_property
    def key_of(self) -> dict[str, str]:
        """Our feature -> the config key that holds it."""
        return {feature: key for key, (feature, _) in self.keys.items()}


def obstacles(config: GPTConfig, family: Family) -> list[str]:
    """Why this family cannot compute this model: empty when it can."""
    config = effective(config)
    found = []
    for feature, info in GPTConfig.model_fields.items():
        value, wanted = getattr(config, feature), family.needs.get(feature, info.default)
        if feature not in family.free and value != wanted:
            found.append(f"{feature} is {_shown(value)} (needs {wanted!r})")
    for feature, other in family.follows.items():
        if getattr(config, feature) != getattr(config, other):
            found.append(f"{other} is {getattr(config, other)} but {feature} is {getattr(config, feature)}")
    return found + _shape_obstacles(config, family) + _scale_obstacles(config, family)


def _shape_obstacles(config: GPTConfig, family: Family) -> list[str]:
    found, width = [], config.head_width * config.n_head
    if family.d_model_by_head and config.d_model % config.n_head:
        found.append(f"d_model {config.d_model} is not a multiple of n_head {config.n_head}")
    if "n_kv_head" not in family.key_of and config.kv_heads != config.n_head:
        found.append(f"n_kv_head is {config.kv_heads} (needs n_head, {config.n_head})")
    if "d_head" not in family.key_of and width != config.d_model:
        found.append(f"n_head * d_head is {width} (needs d_model, {config.d_model})")
    if family.window is not None and family.window.layers == "all" and config.full_layers:
        found.append(f"full_layers is {config.full_layers} (needs a window on every layer, or on none)")
    return found


def _scale_obstacles(config: GPTConfig, family: Family) -> list[str]:
    found = []
    if family.scale_key is not None and pre_attention_scalar(config) ** -0.5 != attention_scale(config):
        found.append(f"attn_scale is {config.attn_scale} (needs n ** -0.5 of a whole number n)")
    if family.embed_root and config.embed_scale != config.d_model**0.5:
        found.append(f"embed_scale is {config.embed_scale} (needs d_model ** 0.5, {config.d_model**0.5})")
    windows = family.rotary is not None and family.rotary.window is not None
    if windows and config.window_tokens is not None and config.rope_theta_window is None:
        scaled = config.rope_scaling is not None
        if scaled:  # without scaling the one base can be written for both kinds of layers
            found.append(
                "rope_theta_window is None but rope_scaling is set (windowed layers are never scaled)"
            )
    return found


def attention_scale(config: GPTConfig) -> float:
    """The factor of attention scores."""
    return config.attn_scale if config.attn_scale is not None else config.head_width**-0.5


def pre_attention_scalar(config: GPTConfig) -> int:
    """The whole number whose power -0.5 is nearest to the factor of attention scores (Gemma's key)."""
    return max(1, round(attention_scale(config) ** -2))


def effective(config: GPTConfig) -> GPTConfig:
    """The same model with every feature that has no effect in it at its default."""
    fields, update = GPTConfig.model_fields, {}
    if config.position == "learned":
        idle = ["rope_theta", "rope_fraction", "rope_scaling", "rope_theta_window"]
    else:
        idle = []
    idle += [] if config.qk_norm else ["qk_norm_span"]
    idle += ["norm_eps"] if config.norm == "none" and not config.qk_norm else []
    update = {feature: fields[feature].default for feature in idle}
    if config.attn_scale == config.head_width**-0.5:
        update["attn_scale"] = None
    return config.model_copy(update=update)


def _shown(value: Any) -> str:
    """A feature's value on one line."""
    return repr(value.model_dump() if hasattr(value, "model_dump") else value)
