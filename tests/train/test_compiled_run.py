"""A run through blocks compiled by the real compiler: gates read what was trained, and resuming is exact."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from glasshouse.base.batch import Batch
from glasshouse.base.errors import Interrupted
from glasshouse.base.plan import DataPlan
from glasshouse.model.compiled import cpp_compiler
from glasshouse.train import Settings, Stage
from train.tiny import ReadsTheModel, batches, stages, train

COMPILED = Settings(threads=1, compile="on")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # of its own compiler
@pytest.mark.timeout(600)  # the compiler takes its time on a busy machine
@pytest.mark.skipif(cpp_compiler() is None, reason="there is no C++ compiler")
def test_a_compiled_run_cut_short_and_resumed_is_the_same_and_learns_what_a_plain_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    whole = train(tmp_path / "whole", ReadsTheModel(), settings=COMPILED)
    cut = []

    def interrupting(step: int, plan: DataPlan) -> Batch:
        if step == 5 and not cut:
            cut.append(step)
            raise KeyboardInterrupt
        return batches(step, plan)

    grow, chat = stages()
    broken = [Stage(grow.config, interrupting, grow.plan, grow.validate), chat]
    with pytest.raises(Interrupted):
        train(tmp_path / "cut", ReadsTheModel(), settings=COMPILED, stages=broken)
    resumed = train(tmp_path / "cut", ReadsTheModel(), settings=COMPILED, resume=True)
    assert resumed.checkpoint.artifacts == whole.checkpoint.artifacts
    plain = train(tmp_path / "plain", ReadsTheModel())
    assert (whole.promoted, whole.rollbacks, whole.gates) == (plain.promoted, plain.rollbacks, plain.gates)
    assert whole.checkpoint.artifacts != plain.checkpoint.artifacts  # it was another path
