# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The animation of quickstart.py, light and dark."""

import copy

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.animation import FuncAnimation
from peft import get_peft_model_state_dict, set_peft_model_state_dict

from peft_lotra.plotting import plot_edge_functions


DARK = {"figure.facecolor": "#0d1117", "axes.facecolor": "#0d1117"}
STYLES = {"": "default", "_dark": ["dark_background", DARK]}
TOP = {"top": 0.84, "bottom": 0.5, "left": 0.03, "right": 0.97}
BOTTOM = {
    "top": 0.38,
    "bottom": 0.07,
    "left": 0.07,
    "right": 0.89,
    "wspace": 0.8,
}
HOLD = 24  # times that the last frame is repeated
COLORS = {True: "tab:green", False: "tab:red"}


def record_into(states):
    """Return a function that keeps the adapter at each eleventh step."""

    def record(model, step):
        if step % 11 == 0:
            state = copy.deepcopy(get_peft_model_state_dict(model))
            states.append((step, state))

    return record


def edge_curves(lotra, x, edges=None):
    """Return output, input, points, base and adapted values of some edges."""
    figure = plt.figure()
    names = [str(index) for index in range(x.shape[1])]
    plot_edge_functions(lotra, "layers.0", edges, x, names, figure)
    curves = []
    for axis in figure.axes:
        index, _, _, unit = axis.get_title().partition(":")[0].split()
        base, adapted = axis.lines[:2]
        points = base.get_xdata()
        values = base.get_ydata(), adapted.get_ydata()
        curves.append((int(unit), int(index), points, *values))
    plt.close(figure)
    return curves


def draw_edge(axis, curve, image):
    """Draw an edge function, and the pixel that it reads on a digit."""
    unit, index, points, base, adapted = curve
    axis.plot(points, base, "--", color="0.5")
    axis.plot(points, adapted, color="tab:green")
    axis.set_title(f"marked pixel to unit {unit}", size=9)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.25)
    inset = axis.inset_axes([1.02, 0.5, 0.4, 0.5])
    inset.imshow(image.view(8, 8), cmap="Greys")
    inset.plot(index % 8, index // 8, "s", color="tab:orange", ms=5)
    inset.set(xticks=[], yticks=[])


def animate(lotra, states, new, x, percent_right, folder):
    """Write a GIF of the training: digits, answers, and three functions."""
    edges = [curve[:2] for curve in edge_curves(lotra, x)[:3]]
    frames = []
    for step, state in states:
        set_peft_model_state_dict(lotra, state)
        title = f"step {step}: reads {percent_right():.0f} % of the new scans"
        read = lotra(new).argmax(1).tolist()
        frames.append((title, read, edge_curves(lotra, x, edges)))
    drawn = np.array([[curve[3:] for curve in frame[2]] for frame in frames])
    ends = drawn.min((0, 2, 3)) - 0.05, drawn.max((0, 2, 3)) + 0.05

    def draw(frame):
        title, read, curves = frame
        figure.clear()
        figure.suptitle(title, size=11)
        axes = figure.subplots(1, 5, gridspec_kw=TOP)
        for digit, axis in enumerate(axes):
            axis.imshow(new[digit].view(8, 8), cmap="Greys")
            axis.set(xticks=[], yticks=[])
            color = COLORS[read[digit] == digit]
            axis.set_title(f"reads {read[digit]}", color=color, size=10)
        axes = figure.subplots(1, 3, gridspec_kw=BOTTOM)
        for axis, curve, *ylim in zip(axes, curves, *ends, strict=True):
            draw_edge(axis, curve, new[3])
            axis.set_ylim(ylim)

    frames += HOLD * frames[-1:]
    for suffix, style in STYLES.items():
        with plt.style.context(style):
            figure = plt.figure(figsize=(6.8, 3.6))
            path = folder / f"training{suffix}.gif"
            FuncAnimation(figure, draw, frames).save(path, "pillow", fps=8)
            plt.close(figure)
