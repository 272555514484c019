"""What was measured, as a Markdown table, a JSON file and a picture."""

from __future__ import annotations

import importlib
import json
import platform
import statistics
import time
from typing import Any, Dict, List, NamedTuple

from figures import FIGURES, Figure, Target
from peers import PEERS

#: the values of each run, by peer
Values = Dict[str, List[float]]


class Result(NamedTuple):
    """All that was measured"""

    command: str
    #: those that were asked, also where nothing could be measured
    peers: list[str]
    #: by figure, row and peer
    samples: dict[str, dict[str, Values]]
    #: what was left out, and why
    absent: list[str]
    #: what did not work, or gave a result that differs
    broken: list[str]


def number(value: float) -> str:
    """A number with three digits that say something"""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def cell(runs: list[float]) -> str:
    """The median, and how far the runs are apart; a dash where there are none"""
    if not runs:
        return "-"
    spread = f" ({number(min(runs))} to {number(max(runs))})" if len(runs) > 1 else ""
    return number(statistics.median(runs)) + spread


def wanted(target: Target) -> str:
    """What a target says"""
    bound = ("" if target.ours == "sheepsse" else f"{target.ours} ") + ("at least" if target.at_least else "at most")
    if target.how == "more":
        return f"{bound} {target.limit:g} more than {target.of}"
    if not target.of:
        return f"{bound} {target.limit:g}"
    times = f"1/{1 / target.limit:g}" if target.limit < 0.3 else f"{target.limit:g}"
    return f"{bound} {times} of " + ("the best of the other peers" if target.of == "others" else target.of)


def outcome(target: Target, values: Values) -> str:
    """What was measured of a target; values far below one as the part they are"""
    measured = target.measured(values)
    if measured is None:
        return "not measured"
    part = target.how == "times" and target.of and measured > 0 and target.limit < 0.3
    shown = f"1/{1 / measured:.1f}" if part else number(measured)
    return shown + ("" if target.is_met(measured) else " (missed)")


def columns(result: Result) -> list[str]:
    """The peers that were asked, in the usual order"""
    return [name for name in PEERS if name in result.peers]


def lines_of(figure: type[Figure], rows: dict[str, Values], peers: list[str]) -> list[str]:
    """A line a row; the title is in the first alone, and a row's name where there are several"""
    lines: list[str] = []
    for row, values in rows.items():
        targets = [target for target in figure.targets if target.row == row]
        cells = [
            "" if lines else figure.title,
            row if len(rows) > 1 else "",
            figure.unit,
            *(cell(values.get(peer, [])) for peer in peers),
            "<br>".join(map(wanted, targets)),
            "<br>".join(outcome(target, values) for target in targets),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def markdown(result: Result) -> str:
    """The table, and below it what it was made with and what is missing in it"""
    peers = columns(result)
    head = ["figure", "", "unit", *peers, "target", "measured"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for name, rows in result.samples.items():
        lines += lines_of(FIGURES[name], rows, peers)
    lines += ["", "Median of the runs, and in brackets the least and the most."]
    lines += ["", f"`{result.command}`, {time.strftime('%Y-%m-%d')}, {machine()}; {', '.join(versions(peers))}."]
    lines += [f"- {line}" for line in (*result.absent, *result.broken)]
    return "\n".join(lines)


def machine() -> str:
    return f"Python {platform.python_version()}, {platform.system()} {platform.machine()}"


def versions(peers: list[str]) -> list[str]:
    """The versions of what was measured"""
    from importlib import metadata

    owners: Any = getattr(metadata, "packages_distributions", dict)()  # since Python 3.10
    found = {}
    for module in sorted({module for peer in peers for module in PEERS[peer].modules}):
        try:
            own = getattr(importlib.import_module(module), "__version__", None)
        except Exception:
            continue  # the table says why
        for distribution in owners.get(module) or [module]:
            try:
                found[distribution] = own or metadata.version(distribution)
            except metadata.PackageNotFoundError:
                pass  # of the standard library
    return [f"{name} {version}" for name, version in found.items()]


def as_json(result: Result) -> str:
    """All runs of all figures, and what each target came to"""
    figures = {}
    for name, rows in result.samples.items():
        kind = FIGURES[name]
        targets = [
            {
                "row": target.row,
                "wanted": wanted(target),
                "limit": target.limit,
                "measured": target.measured(rows.get(target.row, {})),
            }
            for target in kind.targets
        ]
        figures[name] = {"title": kind.title, "unit": kind.unit, "runs": rows, "targets": targets}
    whole = {
        "command": result.command,
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "machine": machine(),
        "versions": versions(columns(result)),
        "figures": figures,
        "absent": result.absent,
        "broken": result.broken,
    }
    return json.dumps(whole, indent=1)


def draw(result: Result, path: str) -> None:
    """A panel for each row of the table: a bar a peer, as long as its median, with the spread of its runs

    A dotted line is how long ours should be at most, or at least.
    """
    from matplotlib.figure import Figure as Picture

    tables = [(FIGURES[name], table) for name, table in result.samples.items()]
    rows = [(figure, row, values) for figure, table in tables for row, values in table.items() if values]
    across = 3
    down = max(1, -(-len(rows) // across))
    picture = Picture(figsize=(6 * across, 2.4 * down), layout="constrained")
    panels = picture.subplots(down, across, squeeze=False).flat
    for (figure, row, values), panel in zip(rows, panels):
        is_alone = len(result.samples[figure.name]) == 1
        panel.set_title(figure.title if is_alone else f"{figure.title}\n{row}", fontsize=8)
        panel.set_xlabel(figure.unit, fontsize=7)
        limits = [limit_of(target, values) for target in figure.targets if target.row == row]
        draw_row(panel, values, [limit for limit in limits if limit is not None])
    for panel in panels:  # those that are left
        panel.set_visible(False)
    picture.savefig(path, dpi=110)


def limit_of(target: Target, values: Values) -> float | None:
    """Where a target puts the limit of ours, on the scale of the others"""
    if not target.of:
        return target.limit
    theirs = target.theirs(values)
    if not theirs:
        return None
    middle = statistics.median(theirs)
    return middle + target.limit if target.how == "more" else middle * target.limit


def draw_row(panel: Any, values: Values, limits: list[float]) -> None:
    from matplotlib.ticker import NullFormatter

    names = list(values)[::-1]
    medians = [statistics.median(values[name]) for name in names]
    spread = [[middle - min(values[name]), max(values[name]) - middle] for name, middle in zip(names, medians)]
    colours = ["tab:green" if name == "sheepsse" else "tab:gray" for name in names]
    panel.barh(names, medians, xerr=list(zip(*spread)), color=colours, ecolor="black", capsize=2)
    for limit in limits:
        panel.axvline(limit, color="tab:red", linestyle=":")
    if min(medians) > 0 and max(medians) > 20 * min(medians):
        panel.set_xscale("log")
        panel.xaxis.set_minor_formatter(NullFormatter())
    panel.tick_params(labelsize=7)
