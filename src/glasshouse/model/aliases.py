"""TransformerLens hook names for the sites that hold the same tensor, and why the others have none.

A name is accepted where ``HookedTransformer`` without weight processing (``from_pretrained_no_processing``)
and our model hold the same numbers there. What may differ, and is never converted silently:

- Residuals are raw. TransformerLens by default centres what is written to the stream, folds norms into the
  next weights and centres the unembedding; we change no weight, so its processed activations differ.
- ``q, k, v, z`` are [batch, head, pos, d_head] here, [batch, pos, head, d_head] there; keys and values have
  as many heads as the model has key/value heads. ``pattern`` is [batch, head, query, key] in both.
- ``q`` and ``k`` are what meets in the dot product: after rotary positions and QK-norm.
- ``embed`` is what enters the first block, learned positions included.

Names and places are those of TransformerLens 3, and pinned to activations that it wrote. A name
whose tensor we do not form is refused with the nearest of our sites and the difference.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache

from glasshouse.base.errors import UsageError
from glasshouse.model.config import GPTConfig

# Same tensor in every family, but for the order of axes.
SAME = {
    **{f"hook_{s}": s for s in ("resid_pre", "resid_post", "attn_out", "mlp_out")},
    **{"attn.hook_v": "v", "attn.hook_z": "z", "attn.hook_pattern": "pattern"},
    **{"mlp.hook_pre": "mlp_pre", "mlp.hook_post": "mlp_post"},
}
# Nearest site, and how theirs differs from it.
OTHER = {
    **{f"hook_{x}_input": ("resid_pre", "one copy of resid_pre per head") for x in "qkv"},
    "hook_attn_in": ("resid_pre", "one copy of resid_pre per head"),
    "hook_mlp_in": ("resid_mid", "a copy of the stream that only the MLP reads, before its norm"),
    "ln1.hook_scale": ("resid_pre", "the norm's divisor, computed from resid_pre"),
    "ln1.hook_normalized": ("resid_pre", "resid_pre after the norm that attention reads"),
    "ln2.hook_scale": ("resid_mid", "the norm's divisor, computed from resid_mid"),
    "ln2.hook_normalized": ("resid_mid", "resid_mid after the norm that the MLP reads"),
    "attn.hook_attn_scores": ("pattern", "the scores before the softmax; pattern is after it"),
    "attn.hook_result": ("z", "each head's output in the stream: z through that head's slice of attn.o"),
    "mlp.hook_pre_linear": ("mlp_post", "the linear branch of a gated MLP, a factor of mlp_post"),
}
OTHER_GLOBAL = {
    "ln_final.hook_scale": ("final_norm", "the norm's divisor, not what it gives"),
    "unembed.hook_out": ("final_norm", "the logits, which the model returns"),
}


@dataclass(frozen=True)
class Aliases:
    """``exact``: hook name -> our site. ``near``: hook name -> (nearest site, what theirs is instead)."""

    exact: Mapping[str, str]
    near: Mapping[str, tuple[str, str]]

    def find(self, pattern: str) -> list[str]:
        """Our sites for a hook name or glob. UsageError when it asks for a tensor that we do not form."""
        for name, (site, theirs) in self.near.items():
            if name == pattern or fnmatchcase(name, pattern):
                among = "" if name == pattern else f" (asked for by {pattern!r})"
                raise UsageError(
                    f"{name!r}{among} has no counterpart here: in TransformerLens it is {theirs}. "
                    f"The nearest site is {site!r}; ask for it by that name if it serves"
                )
        return [site for name, site in self.exact.items() if name == pattern or fnmatchcase(name, pattern)]


@lru_cache(maxsize=16)
def aliases(config: GPTConfig) -> Aliases:
    """The hook names of a model of this shape."""
    rotary = config.position == "rotary"
    exact: dict[str, str] = {}
    near: dict[str, tuple[str, str]] = {}
    if rotary:
        exact["hook_embed"] = "embed"
        near["hook_pos_embed"] = ("embed", "the embedding of positions, of which a rotary model has none")
    else:
        near["hook_embed"] = ("embed", "the token embedding alone; our 'embed' contains the positions")
        near["hook_pos_embed"] = ("embed", "the positions alone; our 'embed' contains the tokens too")
    for i in range(config.n_layer):
        block = f"blocks.{i}."
        exact |= {block + theirs: block + ours for theirs, ours in SAME.items()}
        near |= {block + theirs: (block + ours, why) for theirs, (ours, why) in OTHER.items()}
        for x in "qk":
            turned, plain = f"{block}attn.hook_rot_{x}", f"{block}attn.hook_{x}"
            if rotary:
                exact[turned] = block + x
                why = f"before rotary positions{' and QK-norm' if config.qk_norm else ''}; ours is after"
                near[plain] = (block + x, f"{x} {why} (their 'attn.hook_rot_{x}' is ours)")
            elif config.qk_norm:
                near[plain] = (block + x, f"{x} before QK-norm; ours is after")
            else:
                exact[plain] = block + x
        if config.parallel:
            why = "not formed in parallel blocks; ours is resid_pre + attn_out, which the MLP does not read"
            near[block + "hook_resid_mid"] = (block + "resid_mid", why)
        else:
            exact[block + "hook_resid_mid"] = block + "resid_mid"
    exact["unembed.hook_in"] = "final_norm"
    if config.norm != "none":
        why = "before the norm's gain and bias; ours is after them (the bridge's 'unembed.hook_in' is ours)"
        near["ln_final.hook_normalized"] = ("final_norm", why)
    else:
        exact["ln_final.hook_normalized"] = "final_norm"
    return Aliases(exact, near | OTHER_GLOBAL)


def stream_aliases(sites: Iterable[str]) -> Aliases:
    """The hook names of a model of which only ``sites`` at module boundaries are known.

    How such a model adds positions or norms its output is not known, so only the stream has aliases.
    """
    exact = {}
    for site in sites:
        block, _, name = site.rpartition(".")
        if f"hook_{name}" in SAME:
            exact[f"{block}.hook_{name}"] = site
    return Aliases(exact, {"hook_embed": ("embed", "the token embedding alone")})
