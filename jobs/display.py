"""Showing what a job does: a live display on terminals, plain lines in logs, JSON lines on request."""

import contextlib
import json
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, Protocol, TypeVar

from rich.console import Console, RenderableType
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

LINE_EVERY_S = 10.0
Item = TypeVar("Item")


class Display(Protocol):
    """Takes events: a name and plain values."""

    def event(self, name: str, **values: Any) -> None:
        """Something that happened once."""
        ...

    def progress(self, phase: str, done: int, total: int, counts: dict[str, float]) -> None:
        """How far a phase has come; called often."""
        ...

    def close(self) -> None:
        """Nothing more will be shown."""
        ...


class JsonDisplay:
    """One JSON object per line on standard output."""

    def __init__(self) -> None:
        self._stream, self._last_s = sys.stdout, 0.0

    def event(self, name: str, **values: Any) -> None:
        print(json.dumps({"event": name, "time": round(time.time(), 3), **values}), file=self._stream, flush=True)

    def progress(self, phase: str, done: int, total: int, counts: dict[str, float]) -> None:
        now_s = time.monotonic()
        if done >= total or now_s - self._last_s >= 1.0:
            self._last_s = now_s
            self.event("progress", phase=phase, done=done, total=total, **counts)

    def close(self) -> None:
        pass


class LineDisplay:
    """Plain lines on standard error, every ten seconds while a phase goes on."""

    def __init__(self) -> None:
        self._next_s = time.monotonic() + LINE_EVERY_S

    def event(self, name: str, **values: Any) -> None:
        print(
            " ".join([name, *(f"{key}={_word(value)}" for key, value in values.items())]),
            file=sys.stderr,
            flush=True,
        )

    def progress(self, phase: str, done: int, total: int, counts: dict[str, float]) -> None:
        now_s = time.monotonic()
        if now_s >= self._next_s:
            self._next_s = now_s + LINE_EVERY_S
            self.event(phase, done=f"{done}/{total}", **counts)

    def close(self) -> None:
        pass


def _word(value: object) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if " " in text else text


class _Bars(Progress):
    """A bar per phase, and below them the counts of the last one, in full on narrow terminals too."""

    counts = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        yield Text(self.counts)


class RichDisplay:
    """Bars and counts on a terminal, events above them."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        self._bars = _Bars(*columns, TimeRemainingColumn(), console=self._console)
        self._tasks: dict[str, Any] = {}
        self._bars.start()

    def event(self, name: str, **values: Any) -> None:
        words = " ".join(f"{key}={_word(value)}" for key, value in values.items())
        self._console.print(f"[bold]{name}[/] {escape(words)}", highlight=False, soft_wrap=True)

    def progress(self, phase: str, done: int, total: int, counts: dict[str, float]) -> None:
        if phase not in self._tasks:
            self._tasks[phase] = self._bars.add_task(phase, total=total)
        self._bars.counts = "  ".join(f"{value:,.0f} {key.replace('_per_s', '/s')}" for key, value in counts.items())
        self._bars.update(self._tasks[phase], completed=done, total=total)

    def close(self) -> None:
        self._bars.stop()


@contextlib.contextmanager
def showing(*, log_json: bool) -> Iterator[Display]:
    """The display that fits where the output goes, closed at the end.

    What libraries print meanwhile (Ray does) goes to standard error, so that standard output holds results only.
    """
    display = JsonDisplay() if log_json else RichDisplay() if sys.stderr.isatty() else LineDisplay()
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield display
    finally:
        display.close()


def tracked(items: Iterable[Item], phase: str, total: int, display: Display) -> Iterator[Item]:
    """The same items, counted on the display as they pass."""
    display.progress(phase, 0, total, {})
    for done, item in enumerate(items, start=1):
        yield item
        display.progress(phase, done, total, {})


class Meter:
    """Counts of a running job, the rates they imply, and what its workers wait for."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._busy_s: dict[str, float] = {}
        self._start_s = time.monotonic()

    def add(self, **counts: int) -> None:
        """Count what has happened."""
        self.counts.update(counts)

    def add_s(self, **seconds: float) -> None:
        """Add to the time that workers spent on each step."""
        for step, spent_s in seconds.items():
            self._busy_s[step] = self._busy_s.get(step, 0.0) + spent_s

    def shown(self) -> dict[str, float]:
        """The counts with clips and frames per second, and the share of each step in the workers' time."""
        elapsed_s = max(time.monotonic() - self._start_s, 1e-9)
        busy_s = max(sum(self._busy_s.values()), 1e-9)
        return {
            **{name: count for name, count in self.counts.items() if count},
            "clips_per_s": round(self.counts["clips"] / elapsed_s, 1),
            "frames_per_s": round(self.counts["frames"] / elapsed_s, 1),
            **{f"{step}_pct": round(100 * spent_s / busy_s) for step, spent_s in self._busy_s.items()},
        }
