"""The roofline picture: what part of a copy's bandwidth each contender reaches, over the bytes that it moves."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from fusionpasses.probes import Verdict

#: Ours are strong, the rest recedes; whoever is not listed gets a colour in order of appearance.
STYLES: dict[str, tuple[str, str]] = {
    "our-triton": ("#0b5fa5", "o"),
    "our-reference": ("#8db4d8", "o"),
    "eager": ("#9a9a9a", "v"),
    "inductor": ("#d1691c", "s"),
    "inductor-default-casts": ("#e8b27d", "s"),
    "inductor-norm,our-quant": ("#7a4fa3", "D"),
    "aiter": ("#2e8b57", "^"),
}
OTHERS = ("#b03060", "#4a4a4a", "#008b8b", "#808000")


def probe_matplotlib() -> Verdict:
    """Can the picture be drawn?"""
    import importlib.util

    if importlib.util.find_spec("matplotlib") is None:
        return Verdict(False, "matplotlib is not installed; `pip install 'fusionpasses[bench]'` brings it")
    return Verdict(True, "matplotlib")


def roofline(rows: Sequence[Mapping[str, Any]], title: str, file: pathlib.Path) -> None:
    """Draw the timed ``rows`` of a run: a column for each chain, a line of panels for each width."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    timed = [row for row in rows if row.get("of_copy")]
    chains = list(dict.fromkeys(row["chain"] for row in timed))
    widths = sorted({row["n"] for row in timed})
    names = list(dict.fromkeys(row["who"] for row in timed))
    elsewhere = {row["who"] for row in timed if row["result"] == "other rounding"}
    spare = iter(OTHERS * len(names))
    styles = {name: STYLES[name] if name in STYLES else (next(spare), "x") for name in names}
    size = (2.0 + 3.2 * max(len(chains), 1), 1.6 + 2.7 * max(len(widths), 1))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(max(len(widths), 1), max(len(chains), 1), sharey=True, squeeze=False)
    for line, width in enumerate(widths):
        for column, chain in enumerate(chains):
            panel = grid[line][column]
            here = [row for row in timed if row["chain"] == chain and row["n"] == width]
            for name, (colour, marker) in styles.items():
                points = sorted((row["bytes"], row["of_copy"]) for row in here if row["who"] == name)
                ours = name.startswith("our-")
                panel.plot(
                    [x for x, _ in points],
                    [y for _, y in points],
                    color=colour,
                    marker=marker,
                    markersize=4,
                    linewidth=2 if ours else 1.2,
                    zorder=3 if ours else 2,
                )
            panel.axhline(1.0, color="black", linewidth=0.8, linestyle="--", zorder=1)
            panel.set_xscale("log")
            panel.set_ylim(0, max(1.1, 1.05 * max((row["of_copy"] for row in timed), default=1.0)))
            panel.grid(True, color="#e6e6e6", linewidth=0.6)
            panel.set_axisbelow(True)
            panel.set_title(f"{chain}, N = {width}", fontsize=9)
            panel.tick_params(labelsize=8)
            if column == 0:
                panel.set_ylabel("part of a copy's bandwidth", fontsize=8)
            if line == len(widths) - 1:
                panel.set_xlabel("bytes moved", fontsize=8)
    marks = [
        Line2D([], [], color=colour, marker=marker, markersize=5, label=f"~ {name}" if name in elsewhere else name)
        for name, (colour, marker) in styles.items()
    ]
    marks.append(Line2D([], [], color="black", linestyle="--", linewidth=0.8, label="copy of as many bytes"))
    figure.legend(handles=marks, loc="outside lower center", ncols=min(len(marks), 4), fontsize=8, frameon=False)
    figure.suptitle(title + ("   (~ rounds elsewhere than the model)" if elsewhere else ""), fontsize=10)
    figure.savefig(file, dpi=130)
