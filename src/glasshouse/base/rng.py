"""Randomness named by what it is for: equal names, equal numbers, on every machine.

A seed is SHA-256 over the canonical JSON of its parts, so neighbouring seeds and steps share nothing.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from glasshouse.base.digest import digest_of


def seed_from(*parts: Any) -> int:
    """Return an int in [0, 2**63) that depends on every part (None, bool, int, float, str, lists, dicts)."""
    return int(digest_of(list(parts))[:16], 16) >> 1


def generator(*parts: Any) -> np.random.Generator:
    """Return a fresh numpy Generator (PCG64) seeded from `parts`."""
    # PCG64 by name: `default_rng` may change its algorithm between numpy versions.
    return np.random.Generator(np.random.PCG64(seed_from(*parts)))
