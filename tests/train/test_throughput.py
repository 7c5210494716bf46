from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from glasshouse.model import GPT
from glasshouse.train.throughput import flops_per_token, gemm_peak
from train.tiny import CONFIG


def test_operations_are_those_that_torch_counts() -> None:
    for tied in (True, False):
        model = GPT(CONFIG.model_copy(update={"tied": tied, "d_model": 32, "n_head": 4, "n_layer": 2}))
        tokens = torch.zeros(3, 8, dtype=torch.long)
        with (
            FlopCounterMode(display=False) as counter,
            torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
        ):
            model(tokens).sum().backward()
        assert abs(counter.get_total_flops() / tokens.numel() / flops_per_token(model, 8) - 1) < 0.05


def test_a_peak_is_a_rate() -> None:
    assert gemm_peak(size=64, seconds=0.01) > 1e6
