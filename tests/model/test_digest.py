"""A model's digest is a function of its weights alone."""

from __future__ import annotations

import torch

from glasshouse.model import GPT, GPTConfig
from glasshouse.model.digest import weights_digest


def test_equal_weights_have_one_digest_and_any_changed_bit_another() -> None:
    config = GPTConfig(vocab_size=11, context=8, d_model=8, n_layer=1, n_head=2)
    a, b = GPT(config).init_weights(0), GPT(config).init_weights(0)
    assert weights_digest(a) == weights_digest(b) != weights_digest(GPT(config).init_weights(1))
    with torch.no_grad():
        b.blocks[0].mlp.down.weight[0, 0] += 1e-7
    assert weights_digest(a) != weights_digest(b)
    assert weights_digest(a) != weights_digest(a.double())
