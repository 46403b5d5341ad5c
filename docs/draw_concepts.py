# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The pictures of docs/how_it_works.md.

python docs/draw_concepts.py  # a quarter of a minute
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Polygon, Rectangle
from peft import get_peft_model

from peft_lotra import (
    LoTRAConfig,
    create_lotra_optimizer,
    start_from_gradient,
)
from peft_lotra.kan import KAN


FOLDER = Path(__file__).resolve().parent / "assets" / "pages"
BLUE, ORANGE, GRAY = "tab:blue", "tab:orange", "0.6"
STYLE = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.constrained_layout.use": True,
}

x = torch.linspace(-1, 1, 201)


def new_figure(
    width: float = 6.4, height: float = 2.6, columns: int = 1
) -> tuple[Figure, list[Axes]]:
    figure, axes = pyplot.subplots(1, columns, figsize=(width, height))
    return figure, list(np.atleast_1d(axes))


def hide_frame(axis: Axes) -> None:
    axis.set_axis_off()
    axis.set_aspect("equal")


def draw_layer() -> Figure:
    """Three inputs and two outputs, with a function on each edge."""
    figure, (axis,) = new_figure(6.4, 3.4)
    hide_frame(axis)
    axis.set(xlim=(-1.2, 7.2), ylim=(-0.7, 4.7))
    curves = [
        lambda z: np.sin(3 * z),
        lambda z: z**2 - 0.5,
        np.tanh,
        lambda z: np.abs(z) - 0.5,
        lambda z: np.exp(-8 * z**2) - 0.3,
        lambda z: -z,
    ]
    inputs, outputs = [4.0, 2.0, 0.0], [4.0, 0.0]
    z = np.linspace(-1, 1, 60)
    for o, height in enumerate(outputs):
        for i, start in enumerate(inputs):
            axis.plot([0, 6], [start, height], color="0.8", zorder=0)
            at = 1.2  # where no two edges are close
            middle = start + (height - start) * at / 6
            frame = Rectangle((at - 0.45, middle - 0.33), 0.9, 0.66)
            frame.set(facecolor="white", edgecolor="0.7")
            axis.add_patch(frame)
            curve = curves[3 * o + i](z)
            axis.plot(at + 0.38 * z, middle + 0.28 * curve, color=BLUE)
    nodes = [(0, height, f"$x_{i}$") for i, height in enumerate(inputs, 1)]
    nodes += [(6, height, f"$y_{o}$") for o, height in enumerate(outputs, 1)]
    for at, height, name in nodes:
        node = Circle((at, height), 0.3, facecolor="white", edgecolor="black")
        axis.add_patch(node)
        axis.text(at, height, name, ha="center", va="center")
    axis.text(0, -0.65, "inputs", ha="center")
    axis.text(3.25, -0.65, "a learned function on each edge", ha="center")
    axis.text(6, -0.65, "sums", ha="center")
    return figure


def draw_edge_function() -> Figure:
    """The basis functions of a grid, and their weighted sum."""
    figure, (left, right) = new_figure(columns=2)
    kan = KAN([1, 1], grid_size=5)
    layer = kan.layers[0]
    basis = layer.basis(x.unsqueeze(1))[:, 0].detach()
    coefficients = torch.tensor([0.1, 0.8, -0.6, -1.0, 0.9, 0.4, -0.3, 0.2])
    for column in basis.t():
        left.plot(x, column)
    left.set(title="8 basis functions", xlabel="x", yticks=[0, 0.5])
    left.set_xticks([-1, -0.6, -0.2, 0.2, 0.6, 1])
    right.plot(x, basis * coefficients, color="0.8")
    right.plot(x, basis @ coefficients, color=BLUE, linewidth=2.5)
    right.set(title="8 coefficients make a function", xlabel="x", yticks=[0])
    return figure


def draw_box(
    axis: Axes, corner: tuple[float, float], color: str, size: float = 1.0
) -> None:
    """A box in perspective, out upwards, in to the right, basis to the back."""
    left, low = corner
    right, high, shift = left + 2.4 * size, low + 2 * size, 0.9 * size
    sides = (
        [(left, low), (right, low), (right, high), (left, high)],
        [
            (left, high),
            (right, high),
            (right + shift, high + shift),
            (left + shift, high + shift),
        ],
        [
            (right, low),
            (right + shift, low + shift),
            (right + shift, high + shift),
            (right, high),
        ],
    )
    for side, alpha in zip(sides, (0.25, 0.15, 0.4), strict=True):
        axis.add_patch(
            Polygon(side, facecolor=color, alpha=alpha, edgecolor="none")
        )
        axis.add_patch(Polygon(side, fill=False, edgecolor=color))


def draw_tensor() -> Figure:
    """The coefficient tensor, the coefficients of one edge, and a slice."""
    figure, (axis,) = new_figure(6.4, 3.0)
    hide_frame(axis)
    axis.set(xlim=(-1.6, 9.2), ylim=(-0.8, 3.6))
    draw_box(axis, (0, 0), BLUE)
    # one edge: a bar from the front to the back
    bar = [(1.0, 2.0), (1.3, 2.0), (2.2, 2.9), (1.9, 2.9)]
    axis.add_patch(Polygon(bar, facecolor=ORANGE))
    axis.annotate(
        "one edge:\nits coefficients",
        (2.0, 2.9),
        (4.0, 3.0),
        arrowprops={"arrowstyle": "-"},
        color=ORANGE,
        va="center",
    )
    # one slice: the last basis function of all edges
    back = [(2.4 + 0.75, 0.75), (3.3, 0.9), (3.3, 2.9), (2.4 + 0.75, 2.75)]
    axis.add_patch(Polygon(back, facecolor="tab:green", alpha=0.8))
    axis.annotate(
        "one slice: the coefficient of\none basis function on all edges",
        (3.25, 1.6),
        (4.0, 1.2),
        arrowprops={"arrowstyle": "-"},
        color="tab:green",
        va="center",
    )
    axis.text(-0.15, 1.0, "out", ha="right", va="center")
    axis.text(1.2, -0.3, "in", ha="center", va="center")
    axis.text(3.0, 0.25, "basis", ha="left", va="center")
    return figure


def draw_update_form() -> Figure:
    """The frozen tensor, plus a core with a thin factor for each mode."""
    figure, (axis,) = new_figure(6.4, 3.3)
    hide_frame(axis)
    axis.set(xlim=(-0.9, 10.6), ylim=(-1.5, 4.6))
    draw_box(axis, (0, 0), BLUE)
    axis.text(1.5, -0.7, "frozen A\n(out, in, basis)", ha="center", va="top")
    axis.text(4.1, 1.2, "+", fontsize=18, ha="center")
    draw_box(axis, (6.1, 0.6), ORANGE, 0.5)
    axis.text(6.8, 0.1, "core C\n(r1, r2, r3)", ha="center", va="top")
    factors = (
        (
            (5.1, 0.1, 0.5, 2.0),
            "tab:green",
            (5.0, 2.2),
            "U (out, r1)",
            "bottom",
        ),
        ((8.2, 0.7, 2.2, 0.5), "tab:red", (9.3, 0.5), "V (in, r2)", "top"),
    )
    for (left, low, width, height), color, place, label, side in factors:
        rectangle = Rectangle((left, low), width, height)
        rectangle.set(facecolor=color, alpha=0.3, edgecolor=color)
        axis.add_patch(rectangle)
        axis.text(*place, label, ha="center", va=side)
    slanted = [(6.9, 2.4), (7.4, 2.4), (8.4, 3.4), (7.9, 3.4)]
    polygon = Polygon(slanted, facecolor="tab:purple", alpha=0.3)
    axis.add_patch(polygon)
    axis.add_patch(Polygon(slanted, fill=False, edgecolor="tab:purple"))
    axis.text(8.2, 3.6, "W (basis, r3)", ha="center", va="bottom")
    return figure


def draw_base_branch() -> Figure:
    """A spline, the base branch, and their sum."""
    figure, axes = new_figure(columns=3)
    spline = 0.5 * torch.sin(4 * x)
    silu = 0.8 * torch.nn.functional.silu(x)
    curves = {
        "spline": spline,
        "+  weight · silu(x)": silu,
        "=  edge function": spline + silu,
    }
    for axis, (title, curve) in zip(axes, curves.items(), strict=True):
        color = ORANGE if "silu" in title else BLUE
        axis.plot(x, curve, color=color, linewidth=2.5)
        axis.set(title=title, xlabel="x", ylim=(-0.9, 1.2), yticks=[0])
    return figure


def draw_ranks() -> Figure:
    """With a basis rank of 1 all edges change by multiples of one shape; with rank 2, by mixtures of two."""
    figure, axes = new_figure(columns=2)
    shapes = torch.stack([torch.sin(3.5 * x), torch.exp(-6 * x.square()) - 0.4])
    weights = torch.tensor([[0.9, 0.3], [-0.6, 0.9], [0.4, -1.0], [-0.3, -0.5]])
    for rank, axis in enumerate(axes, 1):
        for row in weights[:, :rank]:
            axis.plot(x, row @ shapes[:rank], linewidth=2)
        axis.set(
            title=f"basis rank {rank}: {'one shape' if rank == 1 else 'mixtures of two'}",
            xlabel="x",
            yticks=[0],
            ylim=(-1.3, 1.3),
        )
    axes[0].set_ylabel("change of 4 edges")
    return figure


def train(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, data
) -> None:
    inputs, targets = data
    for _ in range(400):
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(model(inputs), targets).backward()
        optimizer.step()


def read_edges(layer: Callable[..., torch.Tensor]) -> torch.Tensor:
    """Return the functions (points, edges) of a layer with one output."""
    count = layer.in_features
    curves = []
    for i in range(count):
        inputs = torch.zeros(len(x), count)
        inputs[:, i] = x
        curve = layer(inputs)[:, 0].detach()
        curves.append(curve - curve.mean())
    return torch.stack(curves, 1)


def draw_update() -> Figure:
    """The edges of a small network before and after an adapter was trained."""
    torch.manual_seed(0)
    inputs = torch.rand(512, 3) * 2 - 1
    first, second, third = inputs.split(1, 1)
    old = torch.sin(3 * first) + second.square() + third.abs()
    new = torch.sin(3 * first) + 1.5 * second.square() - 0.5 * third.abs()
    kan = KAN([3, 1], grid_size=10)
    train(kan, torch.optim.Adam(kan.parameters(), lr=1e-2), (inputs, old))
    before = read_edges(kan.layers[0])

    model = get_peft_model(kan, LoTRAConfig(r=2))
    loss = torch.nn.functional.mse_loss
    start_from_gradient(model, lambda: loss(model(inputs), new))
    optimizer = create_lotra_optimizer(model, torch.optim.Adam, lr=3e-2)
    train(model, optimizer, (inputs, new))
    after = read_edges(kan.layers[0])

    figure, axes = new_figure(columns=3)
    for i, axis in enumerate(axes):
        axis.plot(x, before[:, i], color=GRAY, label="base")
        axis.plot(x, after[:, i], color=BLUE, linewidth=2, label="adapted")
        axis.set(title=f"$x_{i + 1}$", ylim=(-1.3, 1.3), yticks=[0])
    axes[0].legend(loc="upper left", frameon=False, fontsize=9)
    return figure


def draw_merge() -> Figure:
    """The frozen tensor plus the update is one tensor of the same shape."""
    figure, (axis,) = new_figure(6.4, 2.0)
    hide_frame(axis)
    axis.set(xlim=(-0.3, 12.2), ylim=(-0.9, 2.6))
    entries = (
        (0.0, BLUE, "frozen A"),
        (4.3, ORANGE, r"update $\Delta A$"),
        (8.6, "tab:purple", "merged: one tensor again"),
    )
    for left, color, label in entries:
        draw_box(axis, (left, 0), color, 0.85)
        axis.text(left + 1.4, -0.6, label, ha="center")
    axis.text(3.6, 1.1, "+", fontsize=18, ha="center")
    axis.text(7.9, 1.1, "=", fontsize=18, ha="center")
    return figure


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    pictures = {
        "layer": draw_layer,
        "edge_function": draw_edge_function,
        "tensor": draw_tensor,
        "update_form": draw_update_form,
        "base_branch": draw_base_branch,
        "ranks": draw_ranks,
        "update": draw_update,
        "merge": draw_merge,
    }
    with pyplot.rc_context(STYLE):
        for name, draw in pictures.items():
            figure = draw()
            figure.savefig(FOLDER / f"concept_{name}.png", dpi=130)
            pyplot.close(figure)


if __name__ == "__main__":
    main()
