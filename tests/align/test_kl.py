"""KL estimators against the exact distance of random categorical policies."""

from __future__ import annotations

import pytest
import torch

from glasshouse.align.kl import kl_exact, kl_k1, kl_k2, kl_k3

SAMPLES = 40_000


def policies(seed: int, apart: float = 0.5) -> tuple[torch.Tensor, torch.Tensor, torch.Generator]:
    random = torch.Generator().manual_seed(seed)
    logits = torch.randn(12, generator=random).double()
    return logits, logits + apart * torch.randn(12, generator=random).double(), random


def drawn(seed: int, apart: float = 0.5) -> tuple[torch.Tensor, torch.Tensor, float]:
    """log p and log p_ref of samples from p, and the exact KL by the sum over all words."""
    logits, ref, random = policies(seed, apart)
    p, q = logits.softmax(-1), ref.softmax(-1)
    exact = sum(float(p[i]) * float((p[i] / q[i]).log()) for i in range(len(p)))
    at = torch.multinomial(p, SAMPLES, replacement=True, generator=random)
    return p.log()[at], q.log()[at], exact


@pytest.mark.parametrize("estimator", [kl_k1, kl_k3])
def test_k1_and_k3_are_unbiased(estimator) -> None:  # type: ignore[no-untyped-def]
    """z-values of 30 policies: none beyond 4 (2e-3 in 30), their squares chi-square with 30 degrees."""
    z = []
    for seed in range(30):
        logp, ref, exact = drawn(seed)
        each = estimator(logp, ref)
        z.append(float((each.mean() - exact) / (each.std() / SAMPLES**0.5)))
    assert max(map(abs, z)) < 4
    assert sum(x * x for x in z) < 59.7  # the 0.1% point of chi-square with 30 degrees of freedom


def test_k3_is_never_negative_and_varies_less_than_k1_where_policies_are_close() -> None:
    logp, ref, _ = drawn(1, apart=0.1)
    assert float(kl_k3(logp, ref).min()) >= 0 > float(kl_k1(logp, ref).min())
    assert float(kl_k3(logp, ref).std()) < float(kl_k1(logp, ref).std())


def test_k2_is_biased() -> None:
    """So a test of bias at this number of samples can fail."""
    biased = 0
    for seed in range(30):
        logp, ref, exact = drawn(seed)
        each = kl_k2(logp, ref)
        biased += abs(float((each.mean() - exact) / (each.std() / SAMPLES**0.5))) > 4
    assert biased > 5


def test_the_exact_distance_is_the_sum_over_all_words() -> None:
    for seed in range(5):
        logits, ref, _ = policies(seed)
        assert float(kl_exact(logits, ref)) == pytest.approx(drawn(seed)[2], abs=1e-9)
