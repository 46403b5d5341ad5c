# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Pictures of spectra, edge functions, changes of a network and trainings; they need matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..compress.data_weights import Inputs, first_output, run_recorded
from ..compress.spectra import Spectrum
from ..layers.coefficients import CoefficientTensor
from ..layers.registry import Grid, find_layer
from ..layers.slim import call_with_coefficients
from ..least_squares.levenberg_marquardt import LevenbergMarquardtStep
from ..modules.calls import unwrap
from ..modules.checks import check_count
from ..tuner.layer import LoTRALayer, lotra_layers
from ..tuner.targets import locate_target
from .edges import grid_range, layer_changes, measure_layer


if TYPE_CHECKING:
    from matplotlib.figure import Figure, SubFigure


MARKS = 300  # values of an input that are marked


def plot_spectra(spectrum: Spectrum, figure: Figure | SubFigure | None = None) -> Figure | SubFigure:
    """Draws the singular values of each layer that changed, as shares of its norm, mode by mode; returns the figure.

    Args:
        spectrum: From `update_spectrum`.
        figure: Where to draw; a new one by default.

    Raises:
        ImportError: Matplotlib is not installed.

    Example:
        >>> from peft_lotra.kan import KAN
        >>> figure = plot_spectra(update_spectrum(KAN([3, 5, 4]), KAN([3, 5, 4])))
    """
    changed = {name: layer for name, layer in spectrum.layers.items() if layer.norm > 0}
    modes = max((len(layer.shape) for layer in changed.values()), default=3)
    figure = new_figure((3 * modes, 3)) if figure is None else figure
    axes = figure.subplots(1, modes, sharey=True)
    for mode, axis in enumerate(axes):
        for name, layer in changed.items():
            if mode < len(layer.shape):  # dense layers have no kernel
                values = (layer.singular_values[mode] / layer.norm).cpu()
                axis.plot(range(1, len(values) + 1), values, marker=".", label=name or "layer")
        axis.set(title=f"{('out', 'in', 'basis', 'kernel')[mode]} mode", xlabel="index", yscale="log")
        axis.grid(alpha=0.25)
    # values that are zero to rounding would press all others together
    axes[0].set(ylim=(max(axes[0].get_ylim()[0], 1e-4), 1.2), ylabel="singular value / norm")
    if changed:
        axes[2].legend(fontsize=8)  # all layers have this mode
    return figure


@torch.no_grad()
def plot_edge_functions(
    model: nn.Module,
    layer_name: str,
    edges: int | Sequence[tuple[int, int]] = 6,
    x: Inputs | None = None,
    inputs: Sequence[str] | None = None,
    outputs: Sequence[str] | None = None,
    figure: Figure | SubFigure | None = None,
) -> Figure | SubFigure:
    """Draws functions on edges of a KAN layer, of the base and with the active adapters; returns the figure.

    The color of an adapted function says how much its change adds to the output of the network, or without `x` of the
    layer, as a share of that of the largest change. A layer of any kind is evaluated, with the coefficients of all
    other inputs at zero.

    Args:
        model: The model, adapted or not; it stays unchanged.
        layer_name: The name of the layer, as `find_kan_layers` or PEFT gives it.
        edges: Pairs (output, input); or the number of edges, one for each input: those with the largest effect,
            see `edge_changes`, or with the largest coefficients without adapters.
        x: Inputs of the model, as for `edge_changes`. The functions are drawn over the range of what reaches the
            layer, with a mark at each value; by default over its grids, or from -1 to 1.
        inputs, outputs: The names of the layer's inputs and outputs.
        figure: Where to draw; a new one by default.

    Raises:
        ValueError: There is no such KAN layer or edge, the layer is a convolution, it normalizes its inputs
            together, or there are not as many names.
        ImportError: Matplotlib is not installed.

    Example:
        >>> from peft_lotra.kan import KAN
        >>> kan = KAN([3, 5, 4])
        >>> figure = plot_edge_functions(kan, "layers.0", edges=[(0, 1), (4, 2)], inputs=["x", "y", "z"])
    """
    module = find_layer(model, layer_name)
    layer, spec, tensor = locate_target(layer_name, module)
    if len(tensor.shape) > 3:
        raise ValueError(
            f"`{layer_name}` is a convolution, whose edges have a function for each position of the kernel. "
            "`plot_spectra` draws such layers."
        )
    before = after = tensor.read(layer)
    count_out, count_in = before.shape[:2]
    inputs = _names("inputs", inputs, count_in, "input {}")
    outputs = _names("outputs", outputs, count_out, "unit {}")
    sizes = before.float().norm(dim=2)
    is_adapted = isinstance(module, LoTRALayer) and bool(module.applied_updates())
    z = None
    if isinstance(module, LoTRALayer) and is_adapted:
        after = module.effective_coefficients()
        change = measure_layer(layer_name, module)
        if x is not None:
            names = {adapted: name for name, adapted in lotra_layers(unwrap(model))}
            change = layer_changes(model, x).get(names[module], change)
            z = change.inputs
        sizes = change.layer_effect if x is None else change.effect
    elif x is not None:
        z = run_recorded(model, {layer_name: module}, x)[1][layer_name]
    low, high = _range_of(spec.read_grid(layer), tensor.shape, z)
    edges = _choose_edges(edges, sizes)
    columns = min(len(edges), 3)
    rows = -(-len(edges) // columns)
    figure = new_figure((3 * columns, 2.3 * rows + 0.3 * is_adapted)) if figure is None else figure
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for axis, (o, i) in zip(axes, edges, strict=False):
        points = torch.linspace(low[i].item(), high[i].item(), 101).to(before)
        curves = [(before, {"label": "base", "color": "0.5", "ls": "--"})]
        if is_adapted:
            color = _color_of(sizes[o, i] / sizes.max().clamp(min=1e-30))
            curves.append((after, {"label": "adapted, darker for a larger effect", "color": color}))
        for coefficients, style in curves:
            y = _functions_of(layer, tensor, coefficients, i, points)[:, o]
            axis.plot(points.float().cpu(), y.float().cpu(), **style)
        if z is not None:
            marks = z[:MARKS, i].float().cpu()
            axis.plot(marks, torch.zeros_like(marks), "|", color="0.3", transform=axis.get_xaxis_transform())
        axis.set_title(f"{inputs[i]} to {outputs[o]}", fontsize=9)
        axis.tick_params(labelsize=8)
        axis.locator_params(axis="x", nbins=5)
        axis.grid(alpha=0.25)
    for axis in axes[len(edges) :]:
        axis.remove()
    figure.supxlabel("input of the edge", fontsize=8)
    figure.supylabel("edge function", fontsize=8)
    if is_adapted:
        lines, labels = axes[0].get_legend_handles_labels()
        figure.legend(lines, labels, loc="outside upper center", ncols=2, fontsize=8)
    return figure


def _names(argument: str, names: Sequence[str] | None, count: int, pattern: str) -> list[str]:
    """Return the names of units, by default made from their numbers."""
    if names is None:
        return [pattern.format(number) for number in range(count)]
    if isinstance(names, str) or len(names) != count:
        raise ValueError(f"`{argument}` is {names!r:.100}, but must be {count} names.")
    return list(names)


def _range_of(grid: Grid, shape: Sequence[int], z: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the ends (in,) of what reaches a layer, or of its grid."""
    low, high = grid_range(grid, shape) if z is None else z.aminmax(dim=0)
    return low, torch.where(high > low, high, low + 1e-6)  # a unit may be constant


def _color_of(share: torch.Tensor) -> Any:
    """Return the color of a share from 0 to 1."""
    from matplotlib import colormaps

    return colormaps["viridis_r"](0.15 + 0.85 * share.item())  # the palest colors are hard to see


@torch.no_grad()
def plot_network_change(
    model: nn.Module,
    x: Inputs | None = None,
    most: int = 400,
    inputs: Sequence[str] | None = None,
    outputs: Sequence[str] | None = None,
    figure: Figure | SubFigure | None = None,
) -> Figure | SubFigure:
    """Draws a network as a diagram: each edge in the color of what its change adds to the outputs of the network.

    A column of units for the inputs of each KAN layer, and one for the outputs of the last. The color of an edge is
    its `share`, as `edge_changes` computes it. Layers that do not follow each other (other sizes) have columns of
    their own. Of many edges those with the largest effects are drawn.

    Args:
        model: The adapted model; it stays unchanged.
        x: Inputs of the model, as for `edge_changes`.
        most: The number of edges that are drawn in each layer, at most.
        inputs, outputs: The names of the units in the first and the last column.
        figure: Where to draw; a new one by default.

    Raises:
        ValueError: As `edge_changes`; `most` is no integer of at least 1, or there are not as many names.
        ImportError: Matplotlib is not installed.

    Example:
        >>> from peft import get_peft_model
        >>> from peft_lotra import LoTRAConfig
        >>> from peft_lotra.kan import KAN
        >>> config = LoTRAConfig(r=2, init_weights=False)
        >>> model = get_peft_model(KAN([2, 5, 3]), config)
        >>> figure = plot_network_change(model, torch.rand(100, 2), inputs=["x", "t"])
    """
    most = check_count(most, "most")
    layers = {name: layer.effect.square() for name, layer in layer_changes(model, x).items()}
    total = sum(effect.sum().item() for effect in layers.values()) or 1.0
    shares = {name: effect / total for name, effect in layers.items()}
    first, *_, last = [*shares.values(), *shares.values()]
    ends = [
        _names("inputs", inputs, first.shape[1], "{}") if inputs else [],
        _names("outputs", outputs, last.shape[0], "{}") if outputs else [],
    ]
    figure = new_figure((1.5 + 2.2 * len(shares), 4)) if figure is None else figure
    axis = figure.subplots()
    top = max(float(share.max()) for share in shares.values()) or 1.0
    from matplotlib.collections import LineCollection  # beside Figure, which is there

    place, units = 0.0, None
    for name, share in shares.items():
        count_out, count_in = share.shape
        if units not in (None, count_in):  # does not follow the layer before
            place += 0.6
        left, right = _heights(count_in), _heights(count_out)
        order = share.flatten().argsort()[-most:]  # the largest above the others
        segments = [[(place, left[int(e) % count_in]), (place + 1, right[int(e) // count_in])] for e in order]
        lines = LineCollection(segments, cmap="viridis_r", linewidths=1.4)
        lines.set_array(share.flatten()[order].numpy())
        lines.set_clim(0, top)
        axis.add_collection(lines)
        for column, heights in ((place, left), (place + 1, right)):
            axis.plot([column] * len(heights), heights, "o", color="0.25", markersize=4, zorder=3)
        cut = f", {len(order)} of {share.numel()} edges" if len(order) < share.numel() else ""
        axis.text(place + 0.5, 1.06, f"{name}\n{count_in} to {count_out}{cut}", ha="center", va="bottom", fontsize=8)
        place, units = place + 1, count_out
    for names, column, side in zip(ends, (-0.05, place + 0.05), ("right", "left"), strict=True):
        for text, height in zip(names, _heights(len(names)) if names else [], strict=True):
            axis.text(column, height, text, ha=side, va="center", fontsize=8)
    axis.set(xlim=(-0.1, place + 0.1), ylim=(-0.05, 1.05))
    axis.set_axis_off()
    figure.colorbar(axis.collections[-1], ax=axis, label="share of the change", format="{x:.0%}")
    return figure


def _heights(units: int) -> list[float]:
    """The places of the units of a column, from 1 down to 0."""
    return [0.5] if units == 1 else torch.linspace(1, 0, units, device="cpu").tolist()


def plot_history(
    history: Sequence[LevenbergMarquardtStep], names: Sequence[str] = (), figure: Figure | SubFigure | None = None
) -> Figure | SubFigure:
    """Draws the history of `LevenbergMarquardt.fit`: the loss, its terms, and the damping, step by step.

    Args:
        history: What `fit` returned.
        names: The names of the terms, in their order.
        figure: Where to draw; a new one by default.

    Raises:
        ValueError: `history` has another number of terms than `names`.
        ImportError: Matplotlib is not installed.

    Example:
        >>> from peft_lotra.kan import KAN
        >>> from peft_lotra.optim import LevenbergMarquardt
        >>> x = torch.rand(50, 1)
        >>> terms = [(lambda model, x, y: model(x) - y, (x, x.sin()), 1.0)]
        >>> optimizer = LevenbergMarquardt(KAN([1, 4, 1]))
        >>> history = optimizer.fit(terms, steps=3, progress=False)
        >>> figure = plot_history(history, ["data"])
    """
    terms = list(zip(*(step.losses for step in history), strict=False))
    if names and len(names) != len(terms):
        raise ValueError(f"`names` are {list(names)}, but the history has {len(terms)} terms.")
    figure = new_figure((7, 3)) if figure is None else figure
    left, right = figure.subplots(1, 2)
    steps = range(1, len(history) + 1)
    left.plot(steps, [step.loss for step in history], color="black", label="loss")
    labels = names or [f"term {index}" for index in range(len(terms))]
    for index, values in enumerate(terms if len(terms) > 1 else []):
        left.plot(steps, values, ("--", ":", "-.")[index % 3], label=labels[index])
    held = [step.held_loss for step in history]
    if any(value == value for value in held):
        left.plot(steps, held, color="tab:red", marker=".", label="held out")
    refused = [(step, entry.loss) for step, entry in zip(steps, history, strict=True) if not entry.accepted]
    if refused:
        left.plot(*zip(*refused, strict=True), "x", color="tab:red", label="step refused")
    left.set(title="The loss", xlabel="step", ylabel="weighted mean square", yscale="log")
    left.legend(fontsize=8)
    right.plot(steps, [step.damping for step in history], color="0.4")
    right.set(title="Low damping: trusted steps", xlabel="step", ylabel="damping", yscale="log")
    for axis in (left, right):
        axis.grid(alpha=0.25)
    return figure


def _choose_edges(edges: int | Sequence[tuple[int, int]], change: torch.Tensor) -> list[tuple[int, int]]:
    """The pairs (output, input) to draw, by how much each edge changed (out, in)."""
    if isinstance(edges, int):
        count = min(check_count(edges, "edges"), change.shape[1])
        inputs = change.amax(0).topk(count).indices.tolist()
        return [(int(change[:, i].argmax()), i) for i in inputs]
    outputs, inputs = change.shape
    if not edges or not all(0 <= o < outputs and 0 <= i < inputs for o, i in edges):
        raise ValueError(f"`edges` must be pairs (output, input) below {tuple(change.shape)}, got {edges}.")
    return list(edges)


def _functions_of(
    layer: nn.Module, tensor: CoefficientTensor, coefficients: torch.Tensor, index: int, x: torch.Tensor
) -> torch.Tensor:
    """The functions of one input, (points, out): the outputs with coefficients of this input alone, less the bias."""
    alone = torch.zeros_like(coefficients)
    alone[:, index] = coefficients[:, index]

    def run(inputs: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return first_output(call_with_coefficients(layer, tensor, values, inputs))

    inputs = x[:, None].expand(-1, coefficients.shape[1])
    others = inputs.flip(0).clone()
    others[:, index] = x
    zero = torch.zeros_like(coefficients)
    functions = run(inputs, alone) - run(inputs, zero)
    if not torch.allclose(functions, run(others, alone) - run(others, zero), rtol=1e-3, atol=1e-5):
        raise ValueError(
            f"This {tensor.family} layer has no functions of one input to draw: it normalizes its inputs together."
        )
    return functions


def new_figure(size: tuple[float, float]) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Pictures need matplotlib: `pip install peft-lotra[examples]`.") from error

    class NotebookFigure(Figure):
        """A figure that notebooks show, without pyplot and its magic."""

        def _repr_png_(self) -> bytes:
            picture = BytesIO()
            self.savefig(picture, format="png", dpi=110)
            return picture.getvalue()

    return NotebookFigure(figsize=size, layout="constrained")  # no pyplot: nothing to close, no window
