# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""How the pictures of the studies look: lines that differ in color, dash and marker, so that a print in gray and the
color-blind can tell them apart (colors of Okabe and Ito, 2008); fields whose sign is in lines too."""

from __future__ import annotations

from typing import Any

import matplotlib
import numpy as np
from contourpy import contour_generator
from matplotlib.collections import LineCollection
from matplotlib.colors import LinearSegmentedColormap
from scipy.ndimage import maximum_filter, minimum_filter


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

# blue below zero, red above, without the dark ends, on which black lines would be lost
FIELD_COLORS = LinearSegmentedColormap.from_list("field", matplotlib.colormaps["RdBu_r"](np.linspace(0.12, 0.88, 256)))
FIELD_LEVELS = (-0.6, -0.2, 0.0, 0.2, 0.6)  # of the lines, as shares of the limit of the colors
FIELD_LINES = "Lines: solid above zero, dashed below, heavy at zero"  # for the title of the picture


def draw_field(axis: Any, values: Any, extent: tuple[float, float, float, float], limit: float | None = None) -> Any:
    """Draw a field by colors, and its sign by lines, which a print in gray keeps; return what `field_bar` takes.

    Args:
        axis: Where to draw.
        values: (nx, ny), on a grid with both ends; the first index goes to the right.
        extent: left, right, bottom, top.
        limit: The value at which the colors end; the largest one by default.
    """
    field = np.asarray(values).T
    limit = float(abs(field).max()) if limit is None else limit
    x, y = (np.linspace(*ends, size) for ends, size in zip((extent[:2], extent[2:]), field.shape[::-1], strict=True))
    mesh = axis.pcolormesh(x, y, field, cmap=FIELD_COLORS, vmin=-limit, vmax=limit, shading="gouraud")
    for level in FIELD_LEVELS:
        if level and field.min() < level * limit < field.max():
            axis.contour(x, y, field, [level * limit], **_line_of(level))
    # zero lines that run between solid and dashed ones, not in noise; without the sides, where many fields are zero
    near = [size // 12 * 2 + 1 for size in field.shape]
    between = np.minimum(maximum_filter(field, near), -minimum_filter(field, near)) > 0.2 * limit
    lines = contour_generator(x[1:-1], y[1:-1], field[1:-1, 1:-1]).lines(0.0)
    places = [(np.searchsorted(y[1:], line[:, 1]), np.searchsorted(x[1:], line[:, 0])) for line in lines]
    kept = [line for line, place in zip(lines, places, strict=True) if between[place].mean() > 0.5]
    axis.add_collection(LineCollection(kept, **_line_of(0)))
    axis.grid(False)
    return mesh


def field_bar(figure: Any, mesh: Any, axes: Any) -> None:
    """The colors of `draw_field` with its lines, beside the axes that share them."""
    bar = figure.colorbar(mesh, ax=axes)
    bar.formatter.set_powerlimits((-2, 3))
    for level in FIELD_LEVELS:
        bar.ax.hlines(level * mesh.norm.vmax, 0, 1, transform=bar.ax.get_yaxis_transform(), **_line_of(level))
    bar.ax.grid(False)


def _line_of(level: float) -> dict[str, Any]:
    dash = "-" if level >= 0 else (0, (4, 2))
    return {"colors": "black", "linestyles": [dash], "linewidths": 0.8 if level else 1.8}
