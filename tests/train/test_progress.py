from __future__ import annotations

import io

from rich.console import Console

from glasshouse.train.config import StageConfig
from glasshouse.train.progress import LiveProgress, PlainProgress, Progress, duration, make_progress

STAGE = StageConfig(name="grow", steps=100, batch_size=8, gate_every=40)
ROW = {
    "kind": "train",
    "stage": "grow",
    "step": 50,
    "loss": 1.25,
    "bpb": 0.5,
    "tokens_per_s": 12345.6,
    "seconds_per_step": 2.0,
}


def console(terminal: bool) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, force_terminal=terminal, width=200), out


def test_plain_lines_say_where_training_is_and_what_comes_next() -> None:
    where, out = console(terminal=False)
    shown = make_progress(where, every_s=0)
    shown.stage(0, 2, STAGE, 0)
    shown.row(ROW)
    assert out.getvalue() == (
        "stage 1/2 grow step 50/100 · loss 1.250 · bpb 0.500 · 12,346 tokens/s · 1:40 left in stage"
        " · next gate at 80\n"
    )


def test_plain_lines_are_few_but_gates_and_validations_are_all_there() -> None:
    where, out = console(terminal=False)
    shown = make_progress(where, every_s=1000)
    assert isinstance(shown, PlainProgress)
    shown.stage(0, 1, STAGE, 0)
    for step in range(5):
        shown.row(ROW | {"step": step})
    shown.row({"kind": "val", "stage": "grow", "step": 5, "set": "books", "loss": 1.0, "bpb": 0.5})
    shown.gate("grow-000040.0", 0)
    gate = {
        "gate": 0,
        "checkpoint": "grow-000040.0",
        "seconds": 1.0,
        "decision": "hold",
        "reason": "[red]why",
    }
    shown.row({"kind": "gate", "step": 40, **gate})
    shown.note("saved")
    lines = out.getvalue().splitlines()
    assert len(lines) == 5
    assert lines[1] == "stage 1/1 grow step 5: validation books loss 1.000, bpb 0.500"
    assert lines[3] == "gate 0 on grow-000040.0: hold ([red]why) 1.0 s"  # text is never read as markup


def test_every_spike_is_said_with_what_is_done_about_it() -> None:
    where, out = console(terminal=False)
    shown = make_progress(where, every_s=1000)
    shown.stage(0, 1, STAGE, 0)
    spike = {"kind": "spike", "step": 7, "what": "loss", "value": 9.5, "limit": 3.25, "action": "skip"}
    shown.row(spike)
    shown.row(
        spike | {"what": "gradient norm of embed.weight", "value": "nan", "limit": None, "action": "stop"}
    )
    assert out.getvalue().splitlines() == [
        "stage 1/1 grow step 7: loss 9.5 (usual: up to 3.25): skipped",
        "stage 1/1 grow step 7: gradient norm of embed.weight nan: stopping",
    ]


def test_a_terminal_gets_a_live_line_that_goes_away() -> None:
    where, out = console(terminal=True)
    shown = make_progress(where)
    assert isinstance(shown, LiveProgress)
    shown.stage(0, 1, STAGE, 0)
    shown.row(ROW)
    shown.gate("grow-000040.0", 0)
    shown.close()
    assert "checking grow-000040.0" in out.getvalue()


def test_quiet_is_quiet() -> None:
    where, out = console(terminal=True)
    shown = make_progress(where, quiet=True)
    assert type(shown) is Progress
    shown.stage(0, 1, STAGE, 0)
    shown.row(ROW)
    shown.close()
    assert out.getvalue() == ""


def test_durations_are_clock_times() -> None:
    assert [duration(s) for s in (5, 123, 3723)] == ["0:05", "2:03", "1:02:03"]
