# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""How the pictures of the studies look: lines that differ in color, dash and marker, so that a print in gray and the
color-blind can tell them apart (colors of Okabe and Ito, 2008)."""

from __future__ import annotations

import matplotlib


BLUE, ORANGE, GREEN, RED, PURPLE, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
GRAY = "#7f7f7f"
STYLES = [
    {"color": color, "linestyle": dash, "marker": marker}
    for color, dash, marker in (
        (BLUE, "-", "o"),
        (RED, "--", "s"),
        (GREEN, "-.", "^"),
        (PURPLE, ":", "D"),
        (ORANGE, (0, (5, 1, 1, 1, 1, 1)), "v"),
        (SKY, (0, (1, 1)), "P"),
        ("black", (0, (8, 2)), "X"),
    )
]

# no window is opened, and all pictures have the same sizes
matplotlib.use("Agg")
matplotlib.rcParams |= {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "figure.titlesize": 11,
    "grid.alpha": 0.3,
    "legend.fontsize": 8,
    "lines.linewidth": 1.5,
    "lines.markersize": 5,
    "savefig.dpi": 120,
}
