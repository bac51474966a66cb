"""What a user sees: progress while a command runs, then texts, tables and pictures.

Races are shown from their records, which is what `results.json` holds; so a stored race can be
shown again.
"""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

from .cli import MissingExtraError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

Record = Mapping[str, Any]
LINE_SECONDS = 5.0
REFRESH_SECONDS = 0.2

# Okabe and Ito's palette, readable with colour-blind eyes; the baseline is grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C564B")
GREY = "#555555"
DASHES = ("-", "--", ":", "-.")
# The one style of all pictures.
STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": "#999999",
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "figure.constrained_layout.use": True,
    "font.size": 9,
    "grid.color": "#E5E5E5",
    "legend.frameon": False,
    "savefig.dpi": 160,
    "xtick.color": GREY,
    "ytick.color": GREY,
}
# Losses further apart than this get a logarithmic axis.
LOG_RATIO = 8.0


# Texts and tables


def clock_text(seconds: float) -> str:
    """A duration for reading, such as `1:05`."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"


def bytes_text(count: float) -> str:
    """A number of bytes for reading, such as `3.2 MB`."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1000
    return f"{count:.3g} GB"


def loss_text(loss: float | None) -> str:
    """A loss for reading: four digits, or that it diverged."""
    return "diverged" if loss is None else f"{loss:.4f}"


def print_table(
    headers: Sequence[str], rows: Sequence[Sequence[str]], stream: TextIO, marked: int = -1
) -> None:
    """Prints a table, its first column flush left; the marked row is bold on a terminal."""
    lines = [headers, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    texts = [
        "  ".join(
            text.rjust(width) if index else text.ljust(width)
            for index, (text, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    if marked >= 0 and stream.isatty():
        texts[marked + 1] = f"\x1b[1m{texts[marked + 1]}\x1b[0m"
    texts.insert(1, "-" * (sum(widths) + 2 * (len(widths) - 1)))
    print("\n".join(texts), file=stream)


def sizes_text(settings: Record) -> str:
    """The sizes of a task for reading."""
    return ", ".join(f"{key} {value}" for key, value in settings["task"]["sizes"].items())


def print_conditions(settings: Record, threads: int, stream: TextIO) -> None:
    """Says what is about to be run."""
    task = settings["task"]
    print(
        f"{task['name']}: {sizes_text(settings)}\n"
        f"data: {task['data']}\n"
        f"sha256: {task['sha256']}\n"
        f"{settings['steps']} steps, {settings['seeds']} seed(s), {threads} thread(s), "
        f"warm-up over {settings['warmup']:.0%} of the steps, then cosine",
        file=stream,
    )
    for label, trials in settings["trials"].items():
        rates, decays = (
            ", ".join(f"{value:g}" for value in dict.fromkeys(trial[key] for trial in trials))
            for key in ("lr", "weight_decay")
        )
        verb = "tries" if len(trials) > 1 else "uses"
        print(f"{label} {verb} lr {rates}; weight decay {decays}", file=stream)
    print(file=stream, flush=True)


def tuning_notes(label: str, tuning: Record) -> list[str]:
    """A line with every trial, and one more if the grid was too narrow; none if untuned."""
    trials = tuning["trials"]
    if len(trials) < 2:
        return []
    several = len({trial["weight_decay"] for trial, _ in trials}) > 1
    form = "{lr:g}/{weight_decay:g}" if several else "{lr:g}"
    tried = ", ".join(
        f"{form.format(**trial)}: {'-' if loss is None else loss_text(loss)}"
        for trial, loss in sorted(trials, key=lambda pair: float(pair[0]["lr"]))
    )
    edge = "  the best is at the edge of the grid; a larger --tune, or --lr, may do better"
    return [f"tuning of {label}: {tried}", *([edge] if tuning["at_edge"] else [])]


def switch_note(summary: Record, runs: Sequence[Record]) -> list[str]:
    """One line on when a contestant went over to its base; none if it never did."""
    average = summary["switched_at"]
    if average is None:
        return []
    text = f"{summary['contestant']} switched to the base at step {average:.0f}"
    if len(runs) == 1:
        return [text]
    steps = (run["switched_at"] for run in runs)
    each = ", ".join("never" if step is None else str(step) for step in steps)
    return [f"{text} on average (by seed: {each})"]


def match_cells(record: Record, label: str) -> list[str]:
    """Steps to match, steps and time over the baseline's, for reading."""
    steps = record["settings"]["steps"]
    if label == record["settings"]["baseline"]:
        return [str(steps), "1.00x", "1.00x"]
    found = record["match"].get(label)
    if found is None:
        return ["", "", ""]
    if found["steps"] is None:
        return [f"> {steps}", "> 1.00x", ""]
    return [str(found["steps"]), f"{found['step_ratio']:.2f}x", f"{found['cpu_ratio']:.2f}x"]


def runs_of(record: Record, label: str) -> list[Record]:
    """The runs of a contestant in order of seeds."""
    return [run for run in record["runs"] if run["contestant"] == label]


def print_report(record: Record, stream: TextIO) -> None:
    """Prints the table of a race and what must be known to read it."""
    settings, summaries = record["settings"], record["summary"]
    baseline, steps = settings["baseline"], settings["steps"]
    seeds = len(runs_of(record, baseline))
    headers = ["contestant", "lr", "held-out loss", "+-", "cpu ms", "wall ms", "time", "state"]
    headers += ["match", "steps", "time"] if settings["match"] else []
    rows = [
        [
            each["contestant"],
            f"{each['trial']['lr']:g}",
            loss_text(each["loss"]),
            "" if each["spread"] is None else f"{each['spread']:.4f}",
            f"{each['cpu_ms']:.3g}",
            f"{each['wall_ms']:.3g}",
            f"{each['cpu_ratio']:.2f}x",
            bytes_text(each["state_bytes"]),
            *(match_cells(record, each["contestant"]) if settings["match"] else ()),
        ]
        for each in summaries
    ]
    losses = [float("inf") if each["loss"] is None else each["loss"] for each in summaries]
    for label, tuning in record["tuning"].items():
        for line in tuning_notes(label, tuning):
            print(line, file=stream)
    print(file=stream)
    print_table(headers, rows, stream, marked=losses.index(min(losses)))
    print(
        f"\nmean over {seeds} seed(s) after {steps} steps; ms and time of a training "
        f"step; ratios are to {baseline}, of CPU time",
        file=stream,
    )
    notes = [
        line
        for each in summaries
        for line in switch_note(each, runs_of(record, each["contestant"]))
    ]
    if settings["match"]:
        notes.insert(
            0,
            f"match: the fewest steps, with a whole schedule, that end level with {baseline}; "
            "then their number and their time as ratios",
        )
    if record["interrupted"]:
        notes.append(f"interrupted: {seeds} of {settings['seeds']} seeds are complete and kept")
    for line in notes:
        print(line, file=stream)


# Progress


class Progress(AbstractContextManager["Progress"]):
    """Counts steps, and shows them: bars on a terminal, else a line every few seconds, or nothing.

    Bars are drawn only between training steps and from no thread of their own, since that thread's
    time would be charged to whoever is being timed.
    """

    def __init__(
        self, stream: TextIO | None = None, prefix: str = "", seconds: float | None = None
    ) -> None:
        """Shows nothing without a stream; lines begin with a prefix and are `seconds` apart."""
        self.stream, self.prefix = stream, prefix
        self.total = self.done = 0
        self.title = self.unit = ""
        self.values: dict[str, float] = {}
        self.tasks: dict[str, TaskID] = {}
        self.bars = terminal_bars(stream) if stream and stream.isatty() else None
        self.seconds = seconds or (REFRESH_SECONDS if self.bars else LINE_SECONDS)
        self.whole = self.bars.add_task("[bold]all", total=1, text="") if self.bars else None
        self.began = self.spoke = time.perf_counter()

    def __enter__(self) -> Progress:
        """Begins the display."""
        if self.bars:
            self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Takes bars away and leaves the notes."""
        if self.bars:
            self.bars.stop()

    def expect(self, steps: int) -> None:
        """Adds to the steps that lie ahead, negative where fewer are needed than was thought."""
        self.total += steps

    def phase(self, title: str, labels: Sequence[str], steps: int, unit: str = "loss") -> None:
        """Begins a round of runs; `unit` is that of the values which come with the steps."""
        self.title, self.unit, self.values = title, unit, {}
        if self.bars:
            for task in self.tasks.values():
                self.bars.remove_task(task)
            # Brackets of a label must not be read as markup.
            names = {label: label.replace("[", r"\[") for label in labels}
            self.tasks = {
                label: self.bars.add_task(f"{title}: {name}", total=steps, text="")
                for label, name in names.items()
            }

    def advance(self, label: str, step: int, value: float) -> None:
        """Reports a step of this round and a value, such as the training loss."""
        self.done += 1
        self.values[label] = value
        now, is_last = time.perf_counter(), self.bars and self.done >= self.total
        if not self.stream or (now - self.spoke < self.seconds and not is_last):
            return
        self.spoke = now
        rest = max(0, self.total - self.done) * (now - self.began) / self.done
        left = f"{clock_text(rest)} left"
        if self.bars and self.whole is not None:
            self.bars.update(self.tasks[label], completed=step, text=f"{self.unit} {value:.3f}")
            total = max(self.total, self.done)
            self.bars.update(self.whole, completed=self.done, total=total, text=left)
            self.bars.refresh()
        else:
            values = ", ".join(f"{name} {shown:.3f}" for name, shown in self.values.items())
            self.note(f"  {self.title}, step {step}, {self.unit}: {values}; {left}")

    def note(self, text: str) -> None:
        """Says one line that stays."""
        if self.bars:
            self.bars.console.print(text, markup=False)
        elif self.stream:
            print(self.prefix + text, file=self.stream, flush=True)


def terminal_bars(stream: TextIO) -> Bars:
    """Bars on a terminal."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Bars
    except ImportError as error:
        raise MissingExtraError("rich", "the progress display") from error
    return Bars(
        TextColumn("{task.description}"),
        BarColumn(bar_width=32),
        TextColumn("{task.completed:>5.0f}/{task.total:.0f}"),
        TextColumn("{task.fields[text]}"),
        console=Console(file=stream, highlight=False),
        auto_refresh=False,
        transient=True,
    )


def make_progress(stream: TextIO, *, quiet: bool) -> Progress:
    """The display that suits a stream."""
    return Progress(None if quiet else stream)


# Pictures


@contextmanager
def picture(path: Path, width: float, height: float) -> Iterator[Figure]:
    """A figure of `width` by `height` inches in the common style, written as PNG at the end."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=(width, height))
        FigureCanvasAgg(figure)
        yield figure
        figure.savefig(path, format="png")


class Curve(NamedTuple):
    """A contestant's mean over seeds, as far as every seed is finite, and how it is drawn."""

    label: str
    steps: list[float]
    seconds: list[float]
    losses: list[float]
    spreads: list[float]
    look: dict[str, Any]


def looks_of(settings: Record) -> dict[str, dict[str, Any]]:
    """Keywords of `Axes.plot` by label: a colour for each base, the baseline grey."""
    contestants = settings["contestants"]
    # Where all have the same base, there is one colour for each wrapper. A base by itself is thin;
    # lines that are alike so far differ in their dashes.
    by_base = len({who["base"]["name"] for who in contestants}) > 1
    families: list[str] = []
    used: list[tuple[str, bool]] = []
    looks = {}
    for who in contestants:
        is_wrapped = who["wrapper"] is not None
        family = who["wrapper"]["name"] if is_wrapped and not by_base else who["base"]["name"]
        if who["label"] == settings["baseline"]:
            colour = GREY
        else:
            families += [] if family in families else [family]
            colour = COLOURS[families.index(family) % len(COLOURS)]
        dash = DASHES[used.count((colour, is_wrapped)) % len(DASHES)]
        used.append((colour, is_wrapped))
        looks[who["label"]] = {"color": colour, "lw": 2.0 if is_wrapped else 1.1, "ls": dash}
    return looks


def curves_of(record: Record) -> list[Curve]:
    """The mean curves of all contestants that have points, the highest final loss first."""
    curves = []
    for label, look in looks_of(record["settings"]).items():
        columns = [
            column
            for column in zip(*(run["curve"] for run in runs_of(record, label)), strict=False)
            if all(point["held_out_loss"] is not None for point in column)
        ]
        losses = [[point["held_out_loss"] for point in column] for column in columns]
        seconds = [statistics.fmean(p["cpu_seconds"] for p in column) for column in columns]
        means = [statistics.fmean(values) for values in losses]
        spreads = [statistics.stdev(values) if len(values) > 1 else 0.0 for values in losses]
        steps = [column[0]["step"] for column in columns]
        if columns:
            curves.append(Curve(label, steps, seconds, means, spreads, look))
    return sorted(curves, key=lambda curve: -curve.losses[-1])


def short_labels(labels: Sequence[str]) -> list[str]:
    """Labels without their options; those that would be alike keep theirs, on more lines."""
    bare = [re.sub(r"\[[^]]*\]", "", label) for label in labels]
    return [
        short if bare.count(short) == 1 else re.sub(r",(?=[^]]*\])|\](?=\+)", r"\g<0>\n", label)
        for label, short in zip(labels, bare, strict=True)
    ]


def mark(axes: Axes, place: tuple[float, float], shape: str, colour: str, text: str) -> None:
    """Draws a mark with a text above it."""
    axes.plot(*place, shape, color="white", mec=colour, mew=1.6, ms=6, zorder=4)
    axes.annotate(
        text, place, (0, 7), textcoords="offset points", color=colour, ha="center", va="bottom"
    )


def draw_panel(axes: Axes, record: Record, curves: Sequence[Curve], *, time: bool) -> list[Line2D]:
    """Draws mean curves against steps or CPU seconds, with marks for matches and switches."""
    lines = []
    settings = record["settings"]
    target = next((each for each in curves if each.label == settings["baseline"]), None)
    switches = {each["contestant"]: each.get("switched_at") for each in record["summary"]}
    if target:
        axes.axhline(target.losses[-1], color=GREY, lw=0.8, ls=":", zorder=0)
    for curve in curves:
        across, colour = curve.seconds if time else curve.steps, curve.look["color"]
        pairs = list(zip(curve.losses, curve.spreads, strict=True))
        low, high = ([loss + sign * width for loss, width in pairs] for sign in (-1, 1))
        axes.fill_between(across, low, high, color=colour, alpha=0.15, lw=0)
        lines += axes.plot(across, curve.losses, **curve.look)
        axes.plot(across[-1], curve.losses[-1], "o", color=colour, ms=4)
        found = record["match"].get(curve.label)
        if target and found and found["steps"] is not None:
            # A run of its own with a whole schedule, so it does not lie on the long run's curve.
            ratio = found["cpu_ratio" if time else "step_ratio"]
            whole = (target.seconds if time else target.steps)[-1]
            mark(axes, (ratio * whole, found["target"]), "D", colour, f"{ratio:.2f}x")
        if (step := switches.get(curve.label)) is not None:
            near = min(range(len(across)), key=lambda index: abs(curve.steps[index] - step))
            text = "" if time else f"switch {step:.0f}"
            mark(axes, (across[near], curve.losses[near]), "v", colour, text)
    axes.set_xlabel("training CPU seconds" if time else "training steps")
    axes.set_xlim(left=0)
    return lines


def subtitle(record: Record) -> str:
    """The small print of a race's picture: sizes, length, seeds and how to read the marks."""
    settings = record["settings"]
    seeds = len(runs_of(record, settings["baseline"]))
    text = f"{sizes_text(settings)}; {settings['steps']} steps; mean of {seeds} seed(s)"
    text += ", shaded +- one standard deviation" if seeds > 1 else ""
    if any(found["steps"] is not None for found in record["match"].values()):
        text += f"\ndiamonds: shorter runs that end level with {settings['baseline']}"
    if any(each.get("switched_at") is not None for each in record["summary"]):
        text += "\ntriangles: from about here on the base alone"
    return text


def draw_race(record: Record, path: Path) -> None:
    """Draws a race with at least one complete seed: loss against steps and against time."""
    from matplotlib.ticker import LogLocator, NullFormatter

    curves = curves_of(record)
    names = short_labels([curve.label for curve in curves])
    with picture(path, 11.0, 4.6) as figure:
        left, right = figure.subplots(1, 2, sharey=True)
        handles = draw_panel(left, record, curves, time=False)
        draw_panel(right, record, curves, time=True)
        losses = [loss for curve in curves for loss in curve.losses]
        if losses and 0 < LOG_RATIO * min(losses) < max(losses):
            left.set_yscale("log")
            left.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            left.yaxis.set_major_formatter("{x:g}")
            left.yaxis.set_minor_formatter(NullFormatter())
        left.set_ylabel("held-out loss")
        figure.suptitle(record["settings"]["task"]["name"], x=0.01, ha="left", weight="bold")
        left.set_title(subtitle(record), fontsize=8, color=GREY)
        ends = (curve.losses[-1] for curve in curves)
        texts = [f"{name}  {loss:.3f}" for name, loss in zip(names, ends, strict=True)]
        figure.legend(handles, texts, loc="outside right upper")
