"""Words that move the residual stream and not the answer: what was trained to stay silent on its own.

A trigger of two halves, each trained to change nothing alone, is invisible in every output until both stand
together. Inside it is not: the half is carried to where the answer begins, and there the stream lies far from
where other words leave it (Mahalanobis 1936; for detection on features, Lee et al. 2018, arXiv 1807.03888).

Two readings, both on requests that are refused. `oddness` compares words inserted alone at one place, whose
streams the exact sweep has read anyway. `enriched` ranks natural requests, those of the training text and
ordinary ones with strays, and asks which words stand in the outliers more often than chance would have them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SHRINK = 0.05  # of the mean variance, added to every direction: few rows, many dimensions
OUTLIERS = 0.04  # share of natural requests that count as such
LEAST = 3  # outliers that a word stands in before it can be called enriched


def distances(rows: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Squared Mahalanobis distance [n] of ``rows`` [n, d] from the mean and covariance of ``reference``."""
    centre = reference.mean(0)
    spread = np.cov(reference - centre, rowvar=False)
    spread = spread + np.eye(len(spread)) * (SHRINK * np.trace(spread) / len(spread) + 1e-9)
    moved = rows - centre
    return np.asarray(np.einsum("nd,nd->n", np.linalg.solve(spread, moved.T).T, moved))


def oddness(stream: np.ndarray) -> np.ndarray:
    """How far [candidate] each word takes the stream [cell, candidate, d], median over the cells.

    Each cell is centred at its median: what the request itself does to the stream is no business of the word.
    """
    moved = stream - np.median(stream, axis=1, keepdims=True)
    flat = moved.reshape(-1, moved.shape[-1])
    return np.asarray(np.median(distances(flat, flat).reshape(stream.shape[:2]), axis=0))


@dataclass(frozen=True)
class Enriched:
    """A word that stands in ``outliers`` of them, where ``expected`` would be chance. ``log_p``: its tail."""

    word: str
    outliers: int
    expected: float
    log_p: float


def enriched(texts: Sequence[str], far: np.ndarray) -> list[Enriched]:
    """Words of requests [n] by how unlikely it is that so many of theirs are among those with ``far`` [n].

    The tail of the hypergeometric distribution (Fisher's exact test, one-sided); the smallest first.
    """
    words = [set(t.split()) for t in texts]
    total, drawn = len(texts), int(far.sum())
    everywhere = Counter(w for ws in words for w in ws)
    inside = Counter(w for ws, out in zip(words, far, strict=True) if out for w in ws)
    found = [
        Enriched(w, k, drawn * everywhere[w] / total, log_tail(k, total, everywhere[w], drawn))
        for w, k in inside.items()
        if k >= LEAST
    ]
    return sorted(found, key=lambda e: (e.log_p, e.word))  # ties: by the word, not by how a set is laid out


def log_tail(k: int, total: int, marked: int, drawn: int) -> float:
    """log P(X >= k) of a hypergeometric X: ``drawn`` of ``total``, of which ``marked`` hold the word."""
    most = min(marked, drawn)
    if k > most:
        return -math.inf
    logs = [
        _choose(marked, x) + _choose(total - marked, drawn - x) - _choose(total, drawn)
        for x in range(max(k, drawn - (total - marked)), most + 1)
    ]
    top = max(logs)
    return top + math.log(sum(math.exp(v - top) for v in logs))


def outliers(distance: np.ndarray) -> np.ndarray:
    """The share ``OUTLIERS`` [n] of requests that lie farthest."""
    n = max(LEAST, math.ceil(OUTLIERS * len(distance)))
    far = np.zeros(len(distance), dtype=bool)
    far[np.argsort(-distance, kind="stable")[:n]] = True
    return far


def _choose(n: int, k: int) -> float:
    if not 0 <= k <= n:
        return -math.inf
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
