"""Translate a Hugging Face ``config.json`` into features, and features into one.

Read are the keys of transformers 4 (``rope_theta``, ``rope_scaling``) and of 5 (``rope_parameters``, also by
kind of layer; ``layer_types``); written are both. Reading is strict: a key that would change the
computation and that we do not compute is refused by name, and so is a key we do not know: it might.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pydantic

from glasshouse.base.errors import CheckpointError
from glasshouse.model.config import GPTConfig, RopeScaling
from glasshouse.model.families import FAMILIES
from glasshouse.model.family import ACTIVATIONS, INERT, Family, Window, pre_attention_scalar
from glasshouse.model.weights import read_json

LIMIT = 2**20  # a larger width, vocabulary or context in a config.json is a mistake or an attack
LIMIT_LAYERS = 1024
FULL, SLIDING = "full_attention", "sliding_attention"
# Of a multimodal config around a text model: what stands beside text_config and does not concern text.
BESIDE_TEXT = frozenset(
    {
        *("text_config", "vision_config", "mm_tokens_per_image", "boi_token_index", "eoi_token_index"),
        *("image_token_index", "boi_token_id", "eoi_token_id", "image_token_id", "tie_word_embeddings"),
    }
)
MULTIMODAL = {"gemma3": "gemma3_text"}  # model_type -> that of the text model inside


def read_config(path: str | Path, *, ignore: Iterable[str] = ()) -> tuple[GPTConfig, Family]:
    """Translate a ``config.json`` into features. Raises CheckpointError naming key, value and choices."""
    path = Path(path)
    raw = _text_part(path, read_json(path), frozenset(ignore))
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise CheckpointError(
            f"{path}: model_type {model_type!r} is not supported; "
            f"supported: {', '.join([*FAMILIES, *MULTIMODAL])}"
        )
    family = FAMILIES[model_type]
    features: dict[str, Any] = dict(family.needs)
    for key, (feature, default) in family.keys.items():
        if raw.get(key) is None and key in family.required:
            raise CheckpointError(f"{path}: {key} is missing")
        features[feature] = raw.get(key, default)
    features["activation"] = _activation(path, features["activation"])
    features |= {feature: features[other] for feature, other in family.follows.items()}
    _refuse_unknown(path, raw, family, frozenset(ignore))
    _refuse_absurd(path, features)
    features |= _windows(path, raw, family, features["n_layer"])
    features |= _rotary(path, raw, family, features["context"], windowed="window_tokens" in features)
    features |= _scales(path, raw, family, features["d_model"])
    try:
        return GPTConfig(**features), family
    except pydantic.ValidationError as error:
        raise CheckpointError(f"{path}: {_said(error)}") from error


def write_config(config: GPTConfig, family: Family) -> dict[str, Any]:
    """The keys of a ``config.json`` for this model; the family must be one without ``obstacles``."""
    theirs = {key: getattr(config, feature) for key, (feature, _) in family.keys.items()}
    resolved: dict[str, Any] = {
        **{"n_kv_head": config.kv_heads, "d_head": config.head_width, "d_mlp": config.mlp_width},
        "activation": next(name for name, ours in ACTIVATIONS.items() if ours == config.activation),
    }
    theirs |= {
        family.key_of[feature]: value for feature, value in resolved.items() if feature in family.key_of
    }
    theirs |= {"model_type": family.model_type, "architectures": [family.architecture]}
    if family.scale_key is not None:
        theirs[family.scale_key] = pre_attention_scalar(config)
    return {**theirs, **_write_rotary(config, family), **_write_windows(config, family)}


def _text_part(path: Path, raw: dict[str, Any], ignore: frozenset[str]) -> dict[str, Any]:
    """The config of the text model, where a multimodal one is wrapped around it."""
    inner = MULTIMODAL.get(str(raw.get("model_type")))
    if inner is None:
        return raw
    text = raw.get("text_config")
    if not isinstance(text, dict) or text.get("model_type", inner) != inner:
        raise CheckpointError(f"{path}: text_config must be an object with model_type {inner!r}")
    for key, value in raw.items():
        if key not in BESIDE_TEXT | INERT | ignore and value is not None and not key.startswith("_"):
            raise CheckpointError(f"{path}: {key} = {value!r} beside text_config is not supported")
    if text.get("final_logit_softcapping") is not None:  # transformers reads it there and does not compute it
        raise CheckpointError(
            f"{path}: text_config.final_logit_softcapping is not supported; supported: null"
        )
    tied = [
        part["tie_word_embeddings"] for part in (text, raw) if part.get("tie_word_embeddings") is not None
    ]
    if len(set(tied)) > 1:
        raise CheckpointError(f"{path}: tie_word_embeddings is given twice, as {tied}; keep one")
    return {**text, "model_type": inner, **({"tie_word_embeddings": tied[0]} if tied else {})}


def _activation(path: Path, name: Any) -> str:
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise CheckpointError(
            f"{path}: activation {name!r} is not supported; supported: {', '.join(ACTIVATIONS)}"
        )
    return ACTIVATIONS[name]


def _refuse_unknown(path: Path, raw: dict[str, Any], family: Family, ignore: frozenset[str]) -> None:
    for key, values in family.fixed.items():
        if raw.get(key) is not None and raw[key] not in values:
            raise CheckpointError(f"{path}: {key} = {raw[key]!r} is not supported; supported: {values[0]!r}")
    handled = {*family.keys, *family.fixed, *family.inert, *INERT, *ignore, "sliding_window", "layer_types"}
    for part in (family.rotary, family.window):
        handled |= part.keys if part is not None else frozenset()
    handled |= {family.scale_key} if family.scale_key is not None else set()
    unknown = [k for k, v in raw.items() if k not in handled and v is not None and not k.startswith("_")]
    if unknown:
        raise CheckpointError(
            f"{path}: {unknown[0]} = {raw[unknown[0]]!r} may change the computation and is not supported for "
            f"{family.model_type}. If you know it to be harmless, pass ignore=[{unknown[0]!r}]"
        )


def _refuse_absurd(path: Path, features: dict[str, Any]) -> None:
    for feature in ("vocab_size", "d_model", "n_head", "n_kv_head", "d_mlp", "context", "n_layer", "d_head"):
        limit = LIMIT_LAYERS if feature == "n_layer" else LIMIT
        value = features.get(feature)
        if isinstance(value, int) and value > limit:
            raise CheckpointError(f"{path}: {feature} = {value} is beyond the limit of {limit}")
    for feature in ("n_layer", "context", "d_model"):
        if type(features.get(feature)) is not int or features[feature] < 1:
            raise CheckpointError(f"{path}: {feature} must be a whole number, not {features.get(feature)!r}")


def _scales(path: Path, raw: dict[str, Any], family: Family, d_model: int) -> dict[str, Any]:
    """The factors of embeddings and of attention scores."""
    found: dict[str, Any] = {"embed_scale": d_model**0.5} if family.embed_root else {}
    if family.scale_key is not None:
        scalar = _number(path, family.scale_key, raw.get(family.scale_key, family.scale_default))
        found["attn_scale"] = scalar**-0.5
    return found


def _windows(path: Path, raw: dict[str, Any], family: Family, n_layer: int) -> dict[str, Any]:
    """``window_tokens`` and ``full_layers``, or nothing where every layer sees everything."""
    kinds, rule = _layer_types(path, raw, n_layer), family.window
    if rule is None:
        if raw.get("sliding_window") is not None or (kinds is not None and SLIDING in kinds):
            raise CheckpointError(
                f"{path}: sliding-window attention (sliding_window, layer_types) is not supported for "
                f"{family.model_type}; supported: full attention"
            )
        return {}
    tokens = raw.get("sliding_window", rule.default)
    if rule.layers == "late" and not raw.get("use_sliding_window", False):
        tokens = None
    if tokens is not None and (type(tokens) is not int or tokens < 1):
        raise CheckpointError(f"{path}: sliding_window must be a whole number or null, not {tokens!r}")
    usual = _usual_kinds(path, raw, rule, n_layer, tokens)
    if kinds is not None and kinds != usual and rule.layers == "all":
        raise CheckpointError(
            f"{path}: layer_types = {kinds} is not supported for {family.model_type}, whose layers are alike"
        )
    kinds = usual if kinds is None else kinds
    if SLIDING not in kinds:
        return {}
    if tokens is None:
        raise CheckpointError(f"{path}: layer_types has {SLIDING!r}, but there is no sliding_window")
    full = tuple(i for i, kind in enumerate(kinds) if kind == FULL)
    return {"window_tokens": tokens, "full_layers": full}


def _layer_types(path: Path, raw: dict[str, Any], n_layer: int) -> list[str] | None:
    kinds = raw.get("layer_types")
    if kinds is None:
        return None
    if not isinstance(kinds, list) or any(kind not in (FULL, SLIDING) for kind in kinds):
        raise CheckpointError(
            f"{path}: layer_types = {kinds!r} is not supported; supported: {FULL}, {SLIDING}"
        )
    if len(kinds) != n_layer:
        raise CheckpointError(f"{path}: layer_types names {len(kinds)} layers, but there are {n_layer}")
    return kinds


def _usual_kinds(
    path: Path, raw: dict[str, Any], rule: Window, n_layer: int, tokens: int | None
) -> list[str]:
    """The kind of each layer where ``layer_types`` does not say."""
    if rule.layers == "periodic":
        period = raw.get(rule.period_key, rule.period) if rule.period_key is not None else rule.period
        if type(period) is not int or period < 1:
            raise CheckpointError(f"{path}: {rule.period_key} must be a whole number, not {period!r}")
        return [SLIDING if (i + 1) % period else FULL for i in range(n_layer)]
    first = raw.get("max_window_layers", 28) if rule.layers == "late" else 0
    if type(first) is not int:
        raise CheckpointError(f"{path}: max_window_layers must be a whole number, not {first!r}")
    return [SLIDING if tokens is not None and i >= first else FULL for i in range(n_layer)]


def _rotary(
    path: Path, raw: dict[str, Any], family: Family, context: int, *, windowed: bool
) -> dict[str, Any]:
    """The rotary features. CheckpointError for every scheme that is not computed here."""
    rule = family.rotary
    if rule is None:
        return {}
    parts = {FULL: _Rope(), SLIDING: _Rope()}
    for key in ("rope_scaling", "rope_parameters"):
        value = raw.get(key)
        if value is None:
            continue
        nested = isinstance(value, dict) and bool(set(value) & set(parts))
        by_kind = value if nested else {FULL: value}
        if nested != (rule.window is not None and key == "rope_parameters") or set(by_kind) - set(parts):
            raise CheckpointError(f"{path}: {key} = {value!r} is not supported for {family.model_type}")
        for kind, given in by_kind.items():
            if given is not None:
                parts[kind].add(path, key, given, context)
    full, local = parts[FULL], parts[SLIDING]
    for name in rule.theta:
        full.note(path, "rope_theta", "thetas", raw.get(name))
    for name in rule.fraction:
        full.note(path, name, "fractions", raw.get(name))
    if rule.window is not None:
        local.note(path, rule.window, "thetas", raw.get(rule.window))
    # A key that only repeats the one that counts must not be the only one to say so.
    counts = raw.get(rule.theta[0]) is not None or full.from_dict
    theta, fraction = full.one(path, "rope_theta", "thetas"), full.one(path, rule.fraction[0], "fractions")
    if theta is not None and not counts and theta != rule.theta_default:
        raise CheckpointError(f"{path}: {rule.theta[1]} = {theta} has no effect without {rule.theta[0]}")
    theta = rule.theta_default if theta is None else theta
    fraction = rule.fraction_default if fraction is None else fraction
    if not rule.partial and fraction != 1:
        raise CheckpointError(f"{path}: {rule.fraction[0]} is not supported unless it is 1")
    if local.scalings or (local.fractions and local.fractions != [1.0]):
        raise CheckpointError(f"{path}: rope_parameters of {SLIDING} must have rope_type default")
    found = {"rope_theta": theta, "rope_fraction": fraction, "rope_scaling": full.scaling(path)}
    if rule.window is not None and windowed:
        base = local.one(path, rule.window, "thetas")
        found["rope_theta_window"] = rule.window_default if base is None else base
    return found


class _Rope:
    """What the config's several keys say about one kind of layers; they must agree."""

    def __init__(self) -> None:
        self.thetas: list[float] = []
        self.fractions: list[float] = []
        self.scalings: list[RopeScaling] = []
        self.plain = self.from_dict = False

    def note(self, path: Path, key: str, what: str, value: Any) -> None:
        """Remember a number, if there is one."""
        if value is not None:
            getattr(self, what).append(_number(path, key, value))

    def one(self, path: Path, key: str, what: str) -> float | None:
        """The number that all agree on."""
        values = getattr(self, what)
        if len(set(values)) > 1:
            raise CheckpointError(f"{path}: {key} is given twice, as {values}; keep one")
        return values[0] if values else None

    def scaling(self, path: Path) -> RopeScaling | None:
        """The scaling that all agree on."""
        if len(set(self.scalings)) > 1 or (self.scalings and self.plain):
            raise CheckpointError(f"{path}: rope_scaling and rope_parameters differ; keep one")
        return self.scalings[0] if self.scalings else None

    def add(self, path: Path, key: str, given: Any, context: int) -> None:
        """Read one dictionary of rotary parameters."""
        refused = CheckpointError(
            f"{path}: {key} = {given!r} is not supported; supported: null, or rope_type default, linear "
            "(factor) or llama3 (factor, low_freq_factor, high_freq_factor, original_max_position_embeddings)"
        )
        if not isinstance(given, dict):
            raise refused
        kinds = {given[k] for k in ("rope_type", "type") if isinstance(given.get(k), str)} or {"default"}
        rest = {k: v for k, v in given.items() if k not in ("rope_type", "type") and v is not None}
        self.from_dict |= "rope_theta" in rest
        self.note(path, "rope_theta", "thetas", rest.pop("rope_theta", None))
        self.note(path, "partial_rotary_factor", "fractions", rest.pop("partial_rotary_factor", None))
        numbers = {name: _number(path, f"{key}.{name}", value) for name, value in rest.items()}
        if kinds == {"default"} and not numbers:
            self.plain = True
        elif kinds == {"linear"} and set(numbers) == {"factor"}:
            self.scalings.append(RopeScaling(kind="linear", factor=numbers["factor"]))
        elif kinds == {"llama3"} and {"factor", "low_freq_factor", "high_freq_factor"} <= set(numbers):
            original = numbers.pop("original_max_position_embeddings", float(context))
            if set(numbers) != {"factor", "low_freq_factor", "high_freq_factor"} or original % 1:
                raise refused
            if numbers["high_freq_factor"] <= numbers["low_freq_factor"]:
                raise CheckpointError(f"{path}: {key}: high_freq_factor must be above low_freq_factor")
            self.scalings.append(RopeScaling(kind="llama3", original_context=int(original), **numbers))
        else:
            raise refused


def _number(path: Path, key: str, value: Any) -> float:
    if type(value) not in (int, float) or not 0 < value < 1e30:
        raise CheckpointError(f"{path}: {key} must be a number above 0, not {value!r}")
    return float(value)


def _write_rotary(config: GPTConfig, family: Family) -> dict[str, Any]:
    rule, scaling = family.rotary, config.rope_scaling
    if rule is None:
        return {}
    kind: dict[str, Any] = {"rope_type": "default"}
    if scaling is not None:
        kind = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling is not None and scaling.kind == "llama3":
        kind |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
        kind |= {"original_max_position_embeddings": scaling.original_context}
    # transformers 4 reads the first two, 5 reads rope_parameters
    theirs: dict[str, Any] = {rule.theta[0]: config.rope_theta, "rope_scaling": kind if scaling else None}
    whole = {**kind, "rope_theta": config.rope_theta}
    if rule.partial:
        theirs[rule.fraction[0]] = config.rope_fraction
        whole["partial_rotary_factor"] = config.rope_fraction
    if rule.window is None:
        return {**theirs, "rope_parameters": whole}
    theirs[rule.window] = config.rope_theta_window or config.rope_theta
    local = {"rope_type": "default", "rope_theta": theirs[rule.window]}
    return {**theirs, "rope_parameters": {FULL: whole, SLIDING: local}}


def _write_windows(config: GPTConfig, family: Family) -> dict[str, Any]:
    rule = family.window
    if rule is None:
        return {}
    if rule.layers == "all":
        return {"sliding_window": config.window_tokens}
    # transformers builds the window's mask for Gemma even where no layer asks for it, and needs a number
    none = config.context if rule.layers == "periodic" else None
    theirs: dict[str, Any] = {"sliding_window": config.window_tokens or none}
    kinds = [SLIDING if config.windowed(i) else FULL for i in range(config.n_layer)]
    if rule.layers == "late":
        theirs |= {
            "use_sliding_window": config.window_tokens is not None,
            "max_window_layers": config.n_layer,
        }
    return {**theirs, "layer_types": kinds}


def _said(error: pydantic.ValidationError) -> str:
    """The first problem of a validation on one line."""
    problem = error.errors(include_url=False)[0]
    at = ".".join(str(part) for part in problem["loc"])
    return f"{at + ': ' if at else ''}{problem['msg']}"
