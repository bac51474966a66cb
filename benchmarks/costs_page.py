"""The page of `costs.py`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TextIO

from costs_figures import Costs, against_eva, is_cheapest, ratio_in, value_of
from costs_rows import BARS, BASE, EVA, EVERY_STEP, MKOR, RARELY, ROWS, SOAP_PERIOD, Bar
from costs_runs import Record, overhead_words, quietness

from mkor.bench.tables import bytes_text, print_table
from mkor.bench.worker import Worker

NOT_MEASURED = "not measured"
WHAT = {"ratio": "time", "extra_memory": "memory"}
"""What a bar's figure is about."""


def table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(value: float | None, text: str = ".3f") -> str:
    return "" if value is None else format(value, text)


def milliseconds(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def verdict(value: float | None, most: float) -> str:
    if value is None:
        return NOT_MEASURED
    return "met" if value <= most else "**not met**"


def exact(value: float, most: float, percent: bool) -> str:
    """So many digits that a figure just above its bar does not look like it."""
    for digits in range(1 if percent else 3, 7):
        text = format(value, f".{digits}{'%' if percent else 'f'}")
        limit = format(most, f".{digits}{'%' if percent else 'f'}")
        if text != limit or value <= most:
            break
    return text


def subject_of(bar: Bar) -> str:
    row = ROWS[bar.row]
    return f"{WHAT[bar.figure]}, {row.title}"


def bar_rows(everything: Sequence[Costs]) -> list[tuple[str, ...]]:
    """What, who, bar, floor, measured, verdict."""
    rows = []
    for bar in BARS:
        value, found = value_of(bar, everything)
        percent = bar.figure == "extra_memory"
        shown = "" if value is None else exact(value, bar.most, percent)
        if found and not percent:
            shown += f" ({found.timing['low']:.3f}-{found.timing['high']:.3f})"
        limit = f"{bar.most:.1%}" if percent else f"{bar.most:g}"
        floor = number(bar.floor, "g")
        rows.append(
            (subject_of(bar), f"`{bar.contestant}`", limit, floor, shown, verdict(value, bar.most))
        )
    return [*rows, cheapest_row(everything)]


def cheapest_row(everything: Sequence[Costs]) -> tuple[str, ...]:
    """MKOR against those that update at every step, over all rows."""
    found = {costs.row.name: is_cheapest(costs) for costs in everything if len(costs.records) > 1}
    lost = [name for name, cheapest in found.items() if cheapest is False]
    unknown = [name for name, cheapest in found.items() if cheapest is None]
    shown = f"in {sum(map(bool, found.values()))} of {len(found)} rows"
    shown += f"; not in {', '.join(lost)}" if lost else ""
    shown += f"; {NOT_MEASURED}: {', '.join(unknown)}" if unknown else ""
    told = "**not met**" if lost else NOT_MEASURED if unknown else "met"
    who = f"cheaper than {', '.join(EVERY_STEP)} at every step"
    return (who, f"`{MKOR}`", "every row", "", shown, told)


def show(everything: Sequence[Costs], stream: TextIO) -> None:
    """The bars, briefly."""
    *bars, all_rows = [[re.sub("[`*]", "", cell) for cell in row] for row in bar_rows(everything)]
    lines = [(bar.row, *cells[1:]) for bar, cells in zip(BARS, bars, strict=True)]
    print_table(("row", "who", "bar", "arithmetic", "measured", ""), lines, stream)
    print(f"\n{all_rows[1]} {all_rows[0]}: {all_rows[4]}: {all_rows[5]}", file=stream)


def rivals_table(everything: Sequence[Costs]) -> str:
    """The comparisons, each within the run with everyone."""
    rows = []
    for costs in everything:
        if len(costs.records) < 2:
            continue
        beside, eva = costs.beside, against_eva(costs)
        cheapest = {True: "yes", False: "**no**", None: NOT_MEASURED}[is_cheapest(costs)]
        rows.append(
            (
                costs.row.name,
                number(ratio_in(beside, MKOR)),
                *(number(ratio_in(beside, label)) for label in EVERY_STEP.values()),
                cheapest,
                *(number(ratio_in(beside, label)) for label in RARELY.values()),
                number(ratio_in(beside, EVA)),
                f"{eva[1]:.3f} ({eva[0]:.3f}-{eva[2]:.3f})" if eva else "",
            )
        )
    headers = ("row", "MKOR", *EVERY_STEP, "MKOR is cheaper", *RARELY, "Eva", "MKOR over Eva")
    return table(headers, rows)


def costs_table(costs: Costs) -> str:
    """All contestants of a row."""
    rows = []
    for label, found in costs.found.items():
        timing_, counts = found.timing, found.timing["counts"]
        measured = not found.source
        mean = "" if found.cycle == 1 else number(found.ratio) or "not seen"
        quarter = f" ({timing_['low']:.3f}-{timing_['high']:.3f})" if label != BASE else ""
        rows.append(
            (
                f"`{label}`" if measured else f"`{label}`, computed",
                str(found.record["rounds"]) if measured else "",
                milliseconds(timing_["cpu_ms"]) if measured else "",
                f"{timing_['ratio']:.3f}{quarter}" if measured else "",
                mean if found.cycle > 1 or measured else number(found.ratio),
                number(timing_["wall_ratio"]) if measured else "",
                bytes_text(timing_["state_bytes"]),
                f"{timing_['extra_memory']:.2%}",
                bytes_text(timing_["buffer_bytes"]),
                bytes_text(counts["peak_bytes"]) if measured else "",
                f"{counts['operators']:,.0f}" if measured else "",
                f"{counts['own_calls']:,.0f}" if measured else "",
                f"{counts['allocations']:,.0f}" if measured else "",
            )
        )
    headers = (
        "contestant", "rounds", "CPU ms", "ratio (quartiles)", "over a cycle", "wall ratio",
        "state", "extra memory", "buffers", "peak memory", "calls", "own kernels", "allocations",
    )  # fmt: skip
    return table(headers, rows)


def limits_text(record: Record) -> str:
    """The bounds of MKOR's parts beside what was measured."""
    rows = [
        (
            limit["part"].removeprefix("mkor."),
            bytes_text(limit["bytes"]),
            f"{limit['bytes_ms']:.3g}",
            f"{1e-6 * limit['operations']:.3g}" if limit["operations"] else "",
            f"{limit['operations_ms']:.3g}" if limit["operations"] else "",
            f"{limit['calls']:.0f}",
            f"{limit['calls_ms']:.3g}",
            f"{limit['measured_ms']:.3g}",
            f"{limit['near']:.0%}",
        )
        for limit in record["limits"][MKOR]
    ]
    headers = ("part", "moves", "ms", "Mflop", "ms", "calls", "ms", "measured ms", "near")
    machine = record["machine"]
    speeds = [1e-9 * speed for speed in machine["bandwidth"].values()]
    return (
        f"Limits of `{MKOR}`:\n\n{table(headers, rows)}\n\n"
        f"Bytes at {min(speeds):.3g} to {max(speeds):.3g} GB/s by size, operations at "
        f"{1e-9 * machine['operations']:.3g} Gflop/s, calls at {1e6 * machine['call']:.2g} us."
    )


def section(costs: Costs) -> str:
    """A row of the page."""
    parts = [f"### {costs.row.name}", f"{costs.row.title}."]
    if costs.missing:
        parts.append(f"**{NOT_MEASURED.capitalize()}**: {', '.join(costs.missing)}.")
    if costs.found:
        parts.append(costs_table(costs))
    told = [
        f"`mkor overhead {quoted(overhead_words(costs.row, replace(run, rounds=rounds_of(r))))}`: "
        f"profiled iterations {r.get('profiled', Worker.profiled_rounds)}; AdamW's wall time over "
        f"its CPU time {quietness(r):.2f}"
        for run, r in zip(costs.row.runs, costs.records, strict=True)
        if r
    ]
    again = costs.beside.get(MKOR)
    if again and costs.records[0]:
        low, high = again.timing["low"], again.timing["high"]
        told[-1] += f"; there `{MKOR}` took {again.ratio:.3f} ({low:.3f}-{high:.3f})"
    parts.append("\n".join(f"- {line}" for line in told))
    first = costs.records[0]
    if first and MKOR in first.get("limits", {}):
        parts.append(limits_text(first))
    return "\n\n".join(filter(None, parts))


def rounds_of(record: Record) -> int:
    return int(record["rounds"])


def quoted(words: Sequence[str]) -> str:
    return " ".join(f"'{word}'" if re.search(r"[\[,]", word) else word for word in words)


def environments(everything: Sequence[Costs]) -> list[str]:
    """Where the figures come from, each place once, with its dates."""
    dates: dict[str, set[str]] = {}
    for costs in everything:
        for record in filter(None, costs.records):
            place = record["environment"]
            packages = place["packages"]
            versions = ", ".join(f"{each} {packages[each]}" for each in packages if packages[each])
            text = (
                f"{place['cpu']}, {place['cores']} cores, {place['threads']} thread(s) in use, "
                f"{place['platform']}; Python {place['python']}, {versions}"
            )
            dates.setdefault(text, set()).add(place["date"])
    return [f"{text}; {', '.join(sorted(days))}" for text, days in dates.items()]


EXPLANATION = f"""CPU time of whole training iterations over AdamW's in the same round: the median
of the rounds (quartiles). *Over a cycle*: the average for those who do some of their work only
every so many steps, made of the medians of the rounds with that work and of those without it;
*computed* contestants were not run, they are other weights of the same two medians. SOAP decomposes
every {SOAP_PERIOD} steps, as it does by default, and is compared so; *SOAP at every step* would do
so in each. *Extra memory*: state beyond
AdamW's over weights, gradients and AdamW's state; *buffers*: what else stays, where a step's
statistics are summed. *Peak memory*: activations, gradients and
temporaries of an iteration. *Calls*: of operators, from Python and the backward pass; *own
kernels*: calls of the package's kernels, which are no operators; *allocations*: pieces of memory
taken, but for what a kernel takes and gives back within its call; all in the profiled iterations,
which may be none of those with rare work. *Near*: the larger bound, of bytes or operations, over
the measured time. The bars are about each row's first run, of AdamW and MKOR over it alone;
comparisons are made within the second. The C library is asked to keep memory that is freed, which
saves all contestants from asking the system for it in every iteration."""


def page(everything: Sequence[Costs], command: str, *, tiny: bool) -> str:
    parts = ["# What MKOR costs", f"Made by `{command}` from the JSON files beside it."]
    if tiny:
        parts.append("**A trial at tiny sizes: none of these figures means anything.**")
    parts += [f"On {text}." for text in environments(everything)]
    parts.append("![Ratios of CPU time, by row](costs.png)")
    headers = ("what", "who", "bar", "arithmetic alone", "measured", "")
    parts += ["## The bars", table(headers, bar_rows(everything))]
    missing = [file for costs in everything for file in costs.missing]
    if missing:
        parts.append(f"{NOT_MEASURED.capitalize()}: {', '.join(missing)}.")
    parts += ["## Against the others", rivals_table(everything)]
    parts += ["## How to read it", EXPLANATION, "## By row", *map(section, everything)]
    return "\n\n".join(parts) + "\n"
