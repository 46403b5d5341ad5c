# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The animation of quickstart.py, light and dark."""

import copy

import matplotlib.pyplot as plt
import numpy as np
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from PIL import Image

from peft_lotra.plotting import plot_edge_functions


DARK = {"figure.facecolor": "#0d1117", "axes.facecolor": "#0d1117"}
STYLES = {"": "default", "_dark": ["dark_background", DARK]}
COLORS = {True: "tab:green", False: "tab:red"}


class Recorder:
    """Keep the adapter at some of its training steps."""

    def __init__(self, steps, frames=36):
        self.between = max(1, steps // frames)
        self.states = []

    def __call__(self, model, step):
        if step % self.between == 0:
            state = copy.deepcopy(get_peft_model_state_dict(model))
            self.states.append((step, state))


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


def draw_digits(axes, images, read):
    """Draw scans of the digits 0 to 4, with what a model reads."""
    for digit, axis in enumerate(axes):
        axis.imshow(images[digit].view(8, 8), cmap="Greys")
        axis.set(xticks=[], yticks=[])
        color = COLORS[read[digit] == digit]
        axis.set_title(f"reads {read[digit]}", color=color, size=10)


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
        read = lotra(new).argmax(1).tolist()
        title = f"step {step}: reads {percent_right():.0f} % of the new scans"
        frames.append((title, read, edge_curves(lotra, x, edges)))
    drawn = np.array([[curve[3:] for curve in frame[2]] for frame in frames])
    low, high = drawn.min((0, 2, 3)) - 0.05, drawn.max((0, 2, 3)) + 0.05

    for suffix, style in STYLES.items():
        with plt.style.context(style):
            images = [draw_frame(frame, low, high, new) for frame in frames]
        # one palette with all colors, so that they do not flicker
        both = Image.fromarray(np.vstack([images[0], images[-1]]))
        palette = both.quantize(96, Image.Quantize.MAXCOVERAGE)
        pictures = [
            Image.fromarray(image).quantize(palette=palette, dither=0)
            for image in images
        ]
        pictures[0].save(
            folder / f"training{suffix}.gif",
            save_all=True,
            append_images=pictures[1:],
            duration=[120] * (len(pictures) - 1) + [3000],
            loop=0,
        )


def draw_frame(frame, low, high, new):
    """Return the pixels (height, width, 3) of a frame."""
    title, read, curves = frame
    figure = plt.figure(figsize=(6.8, 3.6))
    top = {"top": 0.84, "bottom": 0.5, "left": 0.03, "right": 0.97}
    draw_digits(figure.subplots(1, 5, gridspec_kw=top), new, read)
    bottom = {"top": 0.38, "bottom": 0.07, "left": 0.07, "right": 0.89}
    axes = figure.subplots(1, 3, gridspec_kw={"wspace": 0.8, **bottom})
    for place, axis in enumerate(axes):
        draw_edge(axis, curves[place], new[3])
        axis.set_ylim(low[place], high[place])
    figure.suptitle(title, size=11)
    figure.canvas.draw()
    image = np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()
    plt.close(figure)
    return image
