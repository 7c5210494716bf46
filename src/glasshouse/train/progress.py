"""What a person sees while a run trains: a live line on a terminal, plain lines now and then otherwise."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from glasshouse.train.config import StageConfig


class Progress:
    """Shows nothing: the quiet mode, and the interface that the loop calls."""

    def stage(self, index: int, n_stages: int, config: StageConfig, step: int) -> None:
        """Training of a stage goes on from ``step``."""

    def row(self, row: dict[str, Any]) -> None:
        """A row of metrics.jsonl was written."""

    def gate(self, checkpoint: str, gate: int) -> None:
        """Gate number ``gate`` is being asked about a checkpoint."""

    def note(self, text: str) -> None:
        """Something a person may like to know."""

    def close(self) -> None:
        """The run ended or was left."""


def make_progress(console: Console | None = None, quiet: bool = False, every_s: float = 5.0) -> Progress:
    """Live on a terminal, plain lines every ``every_s`` seconds elsewhere, nothing if ``quiet``."""
    if quiet:
        return Progress()
    console = console or Console(stderr=True)
    return LiveProgress(console) if console.is_terminal else PlainProgress(console, every_s)


class PlainProgress(Progress):
    """One line every few seconds, and one for every validation, gate and note."""

    def __init__(self, console: Console, every_s: float = 5.0):
        self.console, self.every_s = console, every_s
        self.config: StageConfig | None = None
        self.place = ""
        self.step = 0
        self.train: dict[str, Any] = {}
        self.val: dict[str, Any] = {}
        self.shown = -float("inf")

    def stage(self, index: int, n_stages: int, config: StageConfig, step: int) -> None:
        self.config, self.step = config, step
        self.place = f"stage {index + 1}/{n_stages} {config.name}"

    def row(self, row: dict[str, Any]) -> None:
        self.step = row["step"]
        if row["kind"] == "train":
            self.train = row
            if time.monotonic() - self.shown >= self.every_s:
                self.shown = time.monotonic()
                self.say(self.line())
        elif row["kind"] == "val":
            self.val = row
            numbers = ", ".join(
                f"{key} {row[key]:.3f}" for key in ("loss", "bpb") if row.get(key) is not None
            )
            self.say(
                f"{self.place} step {row['step']}: validation {row.get('set', '')} {numbers}".replace(
                    "  ", " "
                )
            )
        elif row["kind"] == "spike":
            self.say(f"{self.place} step {row['step']}: {told(row)}")
        elif row["kind"] == "gate":
            said = f"{row['decision']} ({row['reason']}) {row['seconds']:.1f} s"
            self.say(f"gate {row['gate']} on {row['checkpoint']}: {said}")

    def gate(self, checkpoint: str, gate: int) -> None:
        self.say(f"gate {gate}: checking {checkpoint}")

    def note(self, text: str) -> None:
        self.say(text)

    def say(self, text: str) -> None:
        """Write one line as it is: names from data must not be read as markup."""
        self.console.print(Text(text), soft_wrap=True)

    def line(self) -> str:
        """stage, step, loss, bits per byte, tokens/s, time left, next gate."""
        if self.config is None:
            return ""
        parts = [f"{self.place} step {self.step}/{self.config.steps}"]
        if self.train.get("loss") is not None and self.train.get("stage") == self.config.name:
            parts.append(f"loss {self.train['loss']:.3f}")
            if self.train.get("bpb") is not None:
                parts.append(f"bpb {self.train['bpb']:.3f}")
            parts.append(f"{self.train['tokens_per_s']:,.0f} tokens/s")
            parts.append(f"{duration(self.left_s())} left in stage")
        every = self.config.gate_every
        if every:
            parts.append(f"next gate at {min(self.config.steps, self.step - self.step % every + every)}")
        return " · ".join(parts)

    def left_s(self) -> float:
        """Seconds left in this stage at the speed of the last rows; gates not counted."""
        assert self.config is not None
        per_step = self.train.get("seconds_per_step") or 0.0
        return per_step * (self.config.steps - self.step)


class LiveProgress(PlainProgress):
    """A line that is redrawn in place; gates and validations scroll by above it."""

    def __init__(self, console: Console):
        super().__init__(console, every_s=float("inf"))
        self.live = Live(Text(""), console=console, refresh_per_second=4, transient=True)
        self.live.start()

    def stage(self, index: int, n_stages: int, config: StageConfig, step: int) -> None:
        super().stage(index, n_stages, config, step)
        self.live.update(Text(self.line()))

    def row(self, row: dict[str, Any]) -> None:
        super().row(row)
        self.live.update(Text(self.line()))

    def gate(self, checkpoint: str, gate: int) -> None:
        self.live.update(Text(f"gate {gate}: checking {checkpoint}"))

    def close(self) -> None:
        self.live.stop()


def duration(seconds: float) -> str:
    """ "1:02:03" or "2:03"."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"


def told(spike: dict[str, Any]) -> str:
    """A spike's row in words: what was seen, and what is done about it."""
    done = {"apply": "applied all the same", "skip": "skipped", "rewind": "going back", "stop": "stopping"}
    value, limit = spike["value"], spike["limit"]
    shown = f"{value:.4g}" if isinstance(value, float) else value
    usual = f" (usual: up to {limit:.4g})" if limit is not None else ""
    return f"{spike['what']} {shown}{usual}: {done[spike['action']]}"
