"""Activations whose truth is known: a concept along one direction, in rows of several meanings."""

from __future__ import annotations

import numpy as np


def rows(
    n: int = 240, d: int = 12, gap: float = 2.0, meanings: int = 60, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, list[str], np.ndarray]:
    """x [n, d], y [n], the meaning of each row, and the unit direction [d] that carries the concept.

    Meanings have offsets of their own, so that rows of one resemble each other, as prompts do.
    """
    rng = np.random.default_rng(seed)
    unit = rng.standard_normal(d)
    unit /= np.linalg.norm(unit)
    key = np.arange(n) % meanings
    y = key % 2 == 0
    own = rng.standard_normal((meanings, d)) * 0.7
    x = rng.standard_normal((n, d)) + own[key] + np.outer(np.where(y, gap, -gap) / 2, unit) + 3.0
    return x, y, [f"m{k}" for k in key], unit
