"""Glasshouse: grow language models under glass.

Train a model, look inside it, and check its declared safety constraints while it trains.
`import glasshouse` is light: torch is imported when the first name that needs it is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from glasshouse.model.gpt import GPT, GPTConfig
    from glasshouse.model.taps import Taps
    from glasshouse.recipes import lens
    from glasshouse.recipes.api import load
    from glasshouse.recipes.audit import audit
    from glasshouse.recipes.callback import GateCallback
    from glasshouse.recipes.diff import diff
    from glasshouse.recipes.envelope import make_envelope
    from glasshouse.recipes.watch import watch

_HOMES = {
    "GPT": "glasshouse.model",
    "GPTConfig": "glasshouse.model",
    "GateCallback": "glasshouse.recipes.callback",
    "Taps": "glasshouse.model",
    "audit": "glasshouse.recipes.audit",
    "diff": "glasshouse.recipes.diff",
    "lens": "glasshouse.recipes.lens",
    "load": "glasshouse.recipes.api",
    "make_envelope": "glasshouse.recipes.envelope",
    "watch": "glasshouse.recipes.watch",
}

__all__ = [
    "GPT",
    "GPTConfig",
    "GateCallback",
    "Taps",
    "__version__",
    "audit",
    "diff",
    "lens",
    "load",
    "make_envelope",
    "watch",
]


def __getattr__(name: str) -> Any:
    """Import a public name from its room on first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'glasshouse' has no attribute '{name}'")
    home = importlib.import_module(_HOMES[name])
    value = home if name == "lens" else getattr(home, name)  # that one is a module
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_HOMES))
