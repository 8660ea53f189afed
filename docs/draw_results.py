"""Draws docs/pictures/results.svg: precision against the time of training, from docs/results.csv.

    pip install -r requirements-docs.txt
    python docs/draw_results.py [RESULTS_CSV [DRAWING_SVG]]

The file has the columns run, step, seconds and precision, and a row per evaluated checkpoint.
"""

import collections
import csv
import pathlib
import sys

import matplotlib
from matplotlib import pyplot

DOCS = pathlib.Path(__file__).parent
COLORS = ["#0969da", "#bc4c00", "#1a7f37", "#8250df", "#57606a"]
LABEL_HEIGHT = 0.02  # in units of precision: labels of close lines are moved apart
STYLE = {
    "svg.hashsalt": "results",  # the same identifiers every time
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.prop_cycle": matplotlib.cycler(color=COLORS),
}


def main(results=DOCS / "results.csv", drawing=DOCS / "pictures" / "results.svg"):
    """Draws one line per run, with its name at the end."""
    points = collections.defaultdict(list)
    with open(results, newline="") as file:
        for row in csv.DictReader(file):
            points[row["run"]].append((float(row["seconds"]) / 60, float(row["precision"])))

    with matplotlib.rc_context(STYLE):
        figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
        height = 0
        for name, line in sorted(points.items(), key=lambda item: max(item[1])[1]):
            line.sort()
            (drawn,) = axes.plot(*zip(*line, strict=True), marker="o", markersize=3)
            minutes, precision = line[-1]
            height = max(precision, height + LABEL_HEIGHT)
            label = f"  {name}: {precision:.3f}"
            axes.text(minutes, height, label, va="center", color=drawn.get_color())
        axes.set(xlabel="minutes of training", ylabel="precision @ 1", xlim=(0, None))
        axes.set_ylim(bottom=0.5)
        axes.grid(color="#d0d7de")
        drawing.parent.mkdir(exist_ok=True)
        figure.savefig(drawing, metadata={"Date": None})


if __name__ == "__main__":
    main(*map(pathlib.Path, sys.argv[1:]))
