"""Estimators of KL(policy || reference) from log-probabilities of what the policy sampled, all [...].

With x = log p_ref(a) - log p(a) at a ~ p (Schulman 2020, "Approximating KL divergence"):

| name | estimate       | expectation           | note                                          |
|------|----------------|-----------------------|-----------------------------------------------|
| k1   | -x             | KL                    | unbiased, signed, varies most                 |
| k2   | x^2 / 2        | not KL, close near it | biased; its gradient is that of KL            |
| k3   | exp(x) - 1 - x | KL                    | unbiased where p covers p_ref; never negative |

As a *loss*, the mean of k3 over sampled tokens has not the gradient of KL(p || ref) but that of
KL(ref || p): the sample is held fixed. Put the KL into the reward (k1) to climb E[r] - beta KL.
"""

from __future__ import annotations

from torch import Tensor


def kl_k1(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """log p - log p_ref."""
    return logp - ref_logp


def kl_k2(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """Half the square of the log-ratio."""
    return 0.5 * (logp - ref_logp).square()


def kl_k3(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """exp(x) - 1 - x with x = log p_ref - log p."""
    x = ref_logp - logp
    return x.expm1() - x


def kl_exact(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """KL(policy || reference) [...] of categorical distributions with logits [..., V]."""
    logp = logits.log_softmax(-1)
    return (logp.exp() * (logp - ref_logits.log_softmax(-1))).sum(-1)
