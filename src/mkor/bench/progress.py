"""Progress: bars on a terminal, plain lines elsewhere, nothing when quiet."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

from .errors import MissingExtraError

if TYPE_CHECKING:
    from rich.progress import TaskID

LINE_SECONDS = 5.0
REFRESH_SECONDS = 0.2


def clock(seconds: float) -> str:
    """A duration for reading.

    Args:
        seconds: The duration.

    Returns:
        Such as `1:05`.
    """
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"


class Progress(AbstractContextManager["Progress"]):
    """Counts steps and shows nothing: the quiet display, and the base of the others' counting."""

    def __init__(self) -> None:
        """Starts with nothing to do."""
        self.total = 0
        self.done = 0
        self.began = time.perf_counter()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Ends the display.

        Args:
            kind: Class of an exception under way.
            value: The exception.
            traceback: Where it was raised.
        """

    def expect(self, steps: int) -> None:
        """Adds to the work that lies ahead.

        Args:
            steps: Training steps, negative where fewer are needed than was thought.
        """
        self.total += steps

    def phase(self, title: str, labels: Sequence[str], steps: int, unit: str = "loss") -> None:
        """Begins a round of runs.

        Args:
            title: What the round is for.
            labels: Who takes part.
            steps: How many steps each of them takes.
            unit: What the numbers are that come with the steps.
        """

    def advance(self, label: str, step: int, value: float) -> None:
        """Reports a step.

        Args:
            label: Who took it.
            step: Steps taken in this round.
            value: A number to show, such as the training loss.
        """
        self.done += 1

    def note(self, text: str) -> None:
        """Says something that stays.

        Args:
            text: One line.
        """

    @property
    def seconds_left(self) -> float:
        """Time to the end if the rest goes as fast as what was done."""
        elapsed = time.perf_counter() - self.began
        return max(0, self.total - self.done) * elapsed / max(1, self.done)


class PlainProgress(Progress):
    """A line every few seconds, without control characters."""

    def __init__(self, stream: TextIO, prefix: str = "", seconds: float | None = None) -> None:
        """Shows progress in a stream.

        Args:
            stream: Where the lines go.
            prefix: What each line begins with.
            seconds: Time between lines; None for the usual.
        """
        super().__init__()
        self.stream = stream
        self.prefix = prefix
        self.seconds = LINE_SECONDS if seconds is None else seconds
        self.title = ""
        self.unit = ""
        self.values: dict[str, float] = {}
        self.spoke = time.perf_counter()

    def phase(self, title: str, labels: Sequence[str], steps: int, unit: str = "loss") -> None:
        """Begins a round of runs.

        Args:
            title: What the round is for.
            labels: Who takes part.
            steps: How many steps each of them takes.
            unit: What the numbers are that come with the steps.
        """
        self.title, self.unit = title, unit
        self.values = {}

    def advance(self, label: str, step: int, value: float) -> None:
        """Reports a step, as a line if the last one is a while ago.

        Args:
            label: Who took it.
            step: Steps taken in this round.
            value: A number to show, such as the training loss.
        """
        super().advance(label, step, value)
        self.values[label] = value
        if time.perf_counter() - self.spoke < self.seconds:
            return
        self.spoke = time.perf_counter()
        values = ", ".join(f"{name} {shown:.3f}" for name, shown in self.values.items())
        self.note(
            f"  {self.title}, step {step}, {self.unit}: {values}; {clock(self.seconds_left)} left"
        )

    def note(self, text: str) -> None:
        """Says something that stays.

        Args:
            text: One line.
        """
        print(self.prefix + text, file=self.stream, flush=True)


class LiveProgress(Progress):
    """A bar for each contestant with its loss, and one for the whole with the time left.

    It draws only between training steps and from no thread of its own, since that thread's
    time would be charged to whoever is being timed.
    """

    def __init__(self, stream: TextIO) -> None:
        """Shows progress on a terminal.

        Args:
            stream: The terminal.

        Raises:
            MissingExtraError: If rich is missing.
        """
        super().__init__()
        try:
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn
            from rich.progress import Progress as Bars
        except ImportError as error:
            raise MissingExtraError("rich", "the progress display") from error
        self.console = Console(file=stream, highlight=False)
        self.bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(bar_width=32),
            TextColumn("{task.completed:>5.0f}/{task.total:.0f}"),
            TextColumn("{task.fields[text]}"),
            console=self.console,
            auto_refresh=False,
            transient=True,
        )
        self.whole = self.bars.add_task("[bold]all", total=1, text="")
        self.tasks: dict[str, TaskID] = {}
        self.unit = ""
        self.drawn = 0.0

    def __enter__(self) -> LiveProgress:
        """Begins the display.

        Returns:
            This object.
        """
        self.bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Takes the bars away and leaves the notes.

        Args:
            kind: Class of an exception under way.
            value: The exception.
            traceback: Where it was raised.
        """
        self.bars.stop()

    def phase(self, title: str, labels: Sequence[str], steps: int, unit: str = "loss") -> None:
        """Begins a round of runs.

        Args:
            title: What the round is for.
            labels: Who takes part.
            steps: How many steps each of them takes.
            unit: What the numbers are that come with the steps.
        """
        from rich.markup import escape

        self.unit = unit
        for task in self.tasks.values():
            self.bars.remove_task(task)
        self.tasks = {
            label: self.bars.add_task(f"{title}: {escape(label)}", total=steps, text="")
            for label in labels
        }

    def advance(self, label: str, step: int, value: float) -> None:
        """Reports a step.

        Args:
            label: Who took it.
            step: Steps taken in this round.
            value: A number to show, such as the training loss.
        """
        super().advance(label, step, value)
        if time.perf_counter() - self.drawn < REFRESH_SECONDS and self.done < self.total:
            return
        self.bars.update(self.tasks[label], completed=step, text=f"{self.unit} {value:.3f}")
        self.bars.update(
            self.whole,
            completed=self.done,
            total=max(self.total, self.done),
            text=f"{clock(self.seconds_left)} left",
        )
        self.bars.refresh()
        self.drawn = time.perf_counter()

    def note(self, text: str) -> None:
        """Says something that stays.

        Args:
            text: One line.
        """
        self.bars.console.print(text, markup=False)


def make_progress(stream: TextIO, *, quiet: bool) -> Progress:
    """The display that suits a stream.

    Args:
        stream: Where progress is shown.
        quiet: Whether to show none.

    Returns:
        The display, a context manager.
    """
    if quiet:
        return Progress()
    return LiveProgress(stream) if stream.isatty() else PlainProgress(stream)
