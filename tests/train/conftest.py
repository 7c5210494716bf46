"""Every test has a home of its own and one thread: no key or head of the person's is touched."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from glasshouse.model import GPT
from stirred import stirred
from train.tiny import new_model


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLASSHOUSE_HOME", str(tmp_path / "home"))
    torch.set_num_threads(1)


@pytest.fixture
def model() -> GPT:
    """One block with weights that write to the stream (at initialisation they are zero)."""
    return stirred(new_model(), 0)
