"""Our sites under the names TransformerLens gives them, for files whose readers know only those.

Which names mean the same tensor is `model.aliases`' to say. Some depend on the model (``hook_embed`` is ours
only without learned positions), so those are understood only when the model is known. A site without a name
there keeps ours.
"""

from __future__ import annotations

import re

from glasshouse.model import GPTConfig
from glasshouse.model.aliases import SAME, aliases
from glasshouse.model.gpt import BLOCK_SITES

SITE = re.compile(r"blocks\.(0|[1-9][0-9]{0,5})\.(.+)")
THEIRS = {site: hook for hook, site in SAME.items()} | {"resid_mid": "hook_resid_mid"}
OURS = {hook: site for site, hook in THEIRS.items()}
IN_BLOCK, WHOLE = (*BLOCK_SITES, "mlp_in"), ("embed", "final_norm")


def hook_name(site: str) -> str:
    """TransformerLens' name of ``site`` where it has one whatever the model; else ``site`` itself."""
    found = SITE.fullmatch(site)
    if found is not None and found[2] in THEIRS:
        return f"blocks.{found[1]}.{THEIRS[found[2]]}"
    return "unembed.hook_in" if site == "final_norm" else site


def site_name(name: str, config: GPTConfig | None = None) -> str | None:
    """The site that a hook's name or our own means; None for what is no site of ours.

    ``config``: of the model it belongs to, for names whose meaning depends on it.
    """
    if config is not None and name in (exact := aliases(config).exact):
        return exact[name]
    found = SITE.fullmatch(name)
    if found is None:
        return "final_norm" if name == "unembed.hook_in" else name if name in WHOLE else None
    site = OURS.get(found[2], found[2])
    return f"blocks.{found[1]}.{site}" if site in IN_BLOCK else None


def layer_of(site: str) -> int | None:
    """The block a site is in; None for ``embed``, ``final_norm`` and names that are no sites."""
    found = SITE.fullmatch(site)
    return int(found[1]) if found else None
