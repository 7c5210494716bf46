from __future__ import annotations

import subprocess
import sys

import pytest

from glasshouse.train.allocator import keep_freed_memory

COUNT = """
import resource, torch
from glasshouse.train.allocator import keep_freed_memory
if {kept}:
    assert keep_freed_memory()
torch.ones(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    torch.ones(2**24)  # 64 MB: 16,384 pages
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(kept: bool) -> int:
    done = subprocess.run(
        [sys.executable, "-c", COUNT.format(kept=kept)], capture_output=True, text=True, check=True
    )
    return int(done.stdout)


@pytest.mark.skipif(not keep_freed_memory(), reason="the C library is not glibc")
def test_memory_that_was_freed_is_used_again_without_page_faults() -> None:
    assert faults(kept=True) < faults(kept=False) / 2


def test_another_system_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert keep_freed_memory() is False
