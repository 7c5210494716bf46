"""Whether a dictionary belongs to a model: by digest, by site and by width."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from glasshouse.base.config import parse
from glasshouse.base.errors import CheckpointError, RecipeError, suggest
from glasshouse.interp.dictionaries import Dictionary, DictionaryConfig
from glasshouse.interp.formats.hooks import layer_of, site_name
from glasshouse.model import GPT, GPTConfig
from glasshouse.model.digest import weights_digest

VERSION = 1  # of what we add to other tools' files, under the key "glasshouse"
MAX_WIDTH = 2**24  # no layer is wider and no dictionary larger; beyond it a number is damage or an attack


def site_width(config: GPTConfig, site: str) -> int | None:
    """Width of the activations at ``site`` with heads side by side; None where it is no fixed number."""
    kind = site.rpartition(".")[2] if layer_of(site) is not None else site
    widths = {
        **{"q": config.n_head * config.head_width, "z": config.n_head * config.head_width},
        **{"k": config.kv_heads * config.head_width, "v": config.kv_heads * config.head_width},
        **{"mlp_pre": config.mlp_width, "mlp_post": config.mlp_width, "mlp_in": config.d_model},
        **dict.fromkeys(("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out"), config.d_model),
        **dict.fromkeys(("embed", "final_norm"), config.d_model),
    }
    return widths.get(kind)


def check_fits(
    dictionary: Dictionary, model: GPT, *, site: str | None = None, digest: str | None = None
) -> None:
    """Raise CheckpointError unless ``dictionary`` can be used on ``model``.

    It must have been trained on these weights, if it says which (``digest``: of the model, if it is known
    already), on ``site``, if one is asked for, and its sites must exist with its widths.
    """
    config = dictionary.config
    if config.model_digest:
        own = digest or weights_digest(model)
        if own != config.model_digest:
            raise CheckpointError(
                f"the dictionary was trained on model {config.model_digest[:12]}, this is {own[:12]}: "
                "load that model, or train a dictionary on this one"
            )
    if site is not None and config.site and site != config.site:
        raise CheckpointError(f"the dictionary was trained on site {config.site!r}, not on {site!r}")
    ends = [("reads", site or config.site, config.d_in)]
    if config.is_transcoder:
        ends.append(("writes", config.site_out or config.site, config.out))
    known = [*model.sites(), *(f"blocks.{i}.mlp_in" for i in range(model.config.n_layer))]
    for verb, name, width in ends:
        if not name:
            continue  # files of other tools need not say; their width is checked when they are used
        if name not in known:
            raise CheckpointError(
                f"the dictionary {verb} {name!r}, which this model does not have.{suggest(name, known)}"
            )
        there = site_width(model.config, name)
        if there != width:
            raise CheckpointError(
                f"the dictionary {verb} {width} numbers; {name!r} of this model has {there}"
            )


def placed(config: DictionaryConfig, where: str, site: str | None, site_out: str | None) -> DictionaryConfig:
    """The config at the sites that the caller names, where its file names none, or none that is ours.

    CheckpointError when file and caller name different sites.
    """
    update = {}
    for key, asked in (("site", site), ("site_out", site_out)):
        recorded = getattr(config, key)
        if not asked or asked == recorded:
            continue
        if recorded and site_name(recorded) is not None:
            raise CheckpointError(
                f"{where}: the dictionary was trained on site {recorded!r}, not on {asked!r}"
            )
        update[key] = asked
    return config.model_copy(update=update)


def our_facts(config: DictionaryConfig, training: Mapping[str, Any] | None) -> dict[str, Any]:
    """What other tools' files hold about us: the whole config, and facts about training as given."""
    facts: dict[str, Any] = {"version": VERSION, "config": config.model_dump(mode="json")}
    return facts | ({"training": dict(training)} if training else {})


def read_facts(raw: Any, claimed: Mapping[str, Any], where: str) -> DictionaryConfig | None:
    """The config in what ``our_facts`` wrote; None where there is none.

    ``claimed``: fields as the other tool's own keys say them. CheckpointError where the two contradict each
    other: somebody changed one of them, and which is true cannot be known.
    """
    if raw is None:
        return None
    if not isinstance(raw, dict) or raw.get("version") != VERSION or not isinstance(raw.get("config"), dict):
        raise CheckpointError(f"{where}: 'glasshouse' is damaged or from a newer version than {VERSION}")
    try:
        config = parse(DictionaryConfig, raw["config"], f"{where}: glasshouse.config")
    except RecipeError as error:
        raise CheckpointError(str(error)) from error
    for name, value in claimed.items():
        if getattr(config, name) != value:
            raise CheckpointError(
                f"{where} contradicts itself: {name} is {value!r} here and {getattr(config, name)!r} under "
                "'glasshouse'"
            )
    return config


def number(cfg: Mapping[str, Any], key: str, where: str) -> int:
    """A positive whole number of a config that is not absurd; CheckpointError otherwise."""
    value = cfg.get(key)
    if type(value) is not int or not 1 <= value <= MAX_WIDTH:
        raise CheckpointError(
            f"{where}: {key!r} must be a whole number from 1 to {MAX_WIDTH}, found {value!r}"
        )
    return value


def flag(cfg: Mapping[str, Any], key: str, default: bool, where: str) -> bool:
    """A yes or no of a config."""
    value = cfg.get(key, default)
    if not isinstance(value, bool):
        raise CheckpointError(f"{where}: {key!r} must be true or false, found {value!r}")
    return value


def make_config(where: str, **fields: Any) -> DictionaryConfig:
    """A config from a file's values; CheckpointError says which do not go together."""
    try:
        return parse(DictionaryConfig, fields, where)
    except RecipeError as error:
        raise CheckpointError(str(error)) from error
