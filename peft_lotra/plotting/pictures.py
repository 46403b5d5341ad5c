# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Pictures of spectra, edge functions and trainings; they need matplotlib."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..compress.data_weights import Inputs, edge_values, functions_at, sample_layers
from ..compress.edges import LayerChange, edge_coefficients, layer_changes, measure_change
from ..compress.spectra import Spectrum
from ..layers.recognize import is_linear
from ..layers.search import find_layer, short_name
from ..least_squares.levenberg_marquardt import LevenbergMarquardtStep
from ..tucker import full_shape
from ..tuner.grids import grid_ends
from ..tuner.layer import LoTRALayer, Target
from ..tuner.targets import locate_target


if TYPE_CHECKING:
    from matplotlib.figure import Figure, SubFigure


MODES = ("out", "in", "basis", "kernel")
POINTS = 101  # at which a function is drawn
MARKS = 300  # values of an input that are marked


def plot_spectra(spectrum: Spectrum) -> Figure:
    """Draw the singular values of each layer that changed, as shares of its norm, mode by mode.

    Args:
        spectrum: What `update_spectrum` returns.

    Raises:
        ImportError: Matplotlib is not installed.

    Example:
        >>> from peft_lotra import update_spectrum
        >>> from peft_lotra.kan import KAN
        >>> figure = plot_spectra(update_spectrum(KAN([3, 5, 4]), KAN([3, 5, 4])))
    """
    changed = {name: layer for name, layer in spectrum.layers.items() if layer.norm > 0}
    modes = max((len(layer.shape) for layer in changed.values()), default=3)
    figure = new_figure((3 * modes, 3))
    axes = figure.subplots(1, modes, sharey=True)
    for name, layer in changed.items():
        for axis, values in zip(axes, layer.singular_values, strict=False):  # dense layers have no kernel
            numbers = range(1, len(values) + 1)
            shares = values / layer.norm
            axis.plot(numbers, shares.cpu(), marker=".", label=name or "layer")
    for axis, mode in zip(axes, MODES, strict=False):
        axis.set(title=f"{mode} mode", xlabel="index", yscale="log")
        axis.grid(alpha=0.25)
    # values that are zero to rounding would press all others together
    bottom, _ = axes[0].get_ylim()
    axes[0].set(ylim=(max(bottom, 1e-4), 1.2), ylabel="singular value / norm")
    if changed:
        axes[2].legend(fontsize=8)  # all layers have this mode
    return figure


@torch.no_grad()
def plot_edge_functions(
    model: nn.Module,
    layer_name: str,
    edges: Sequence[tuple[int, int]] | None = None,
    x: Inputs | None = None,
    inputs: Sequence[str] | None = None,
    figure: Figure | SubFigure | None = None,
) -> Figure | SubFigure:
    """Draw functions on edges of a KAN layer, of the base and with the active adapters.

    The darker an adapted function, the more its change adds to the outputs of the network, or without `x` of the
    layer. The title has its share of the squared effects of all edges; a constant shift has no effect.

    Args:
        model: The model, adapted or not; it stays unchanged.
        layer_name: The name of the layer, as `find_kan_layers` or PEFT gives it.
        edges: Pairs (output, input). By default the six edges with the largest effects; without adapters, with the
            largest functions.
        x: Inputs of the model (rows, in), or what a call of it takes: a tuple, a dict, or a function that runs the
            model. Up to 1,000 rows count for the effects. The functions are drawn over the range of the inputs of
            the layer, with a mark at each value; by default over its grids, or from -1 to 1.
        inputs: The names of the layer's inputs.
        figure: Where to draw; a new one by default.

    Returns:
        The figure.

    Raises:
        ValueError: There is no such KAN layer, it is a convolution, or it normalizes its inputs together; or there is
            not a name for each input.
        IndexError: There is no such edge.
        ImportError: Matplotlib is not installed.

    Example:
        >>> from peft_lotra.kan import KAN
        >>> kan = KAN([3, 5, 4])
        >>> figure = plot_edge_functions(kan, "layers.0", edges=[(0, 1), (4, 2)], inputs=["x", "y", "z"])
    """
    layer_name = short_name(layer_name)
    module = find_layer(model, layer_name)
    target = locate_target(layer_name, module)
    width = target.tensor.shape[1]
    if len(target.tensor.shape) > 3 or not is_linear(*target):
        raise ValueError(
            f"`{layer_name}` is a convolution, or not linear in its coefficients: it has no functions of one input. "
            "`plot_spectra` draws such layers."
        )
    if inputs is not None and len(inputs) != width:
        raise ValueError(f"`inputs` has {len(inputs)} names, but `{layer_name}` has {width} inputs.")

    z = None
    if x is not None:
        samples = sample_layers(model, {layer_name: module}, x, torch.square, probes=0)
        z = samples[layer_name].inputs

    points = _spread_points(target, z)
    functions = _find_functions(target, points)
    coefficients, change = edge_coefficients(layer_name, module)
    is_adapted = isinstance(module, LoTRALayer) and bool(module.applied_updates())
    if is_adapted and x is not None:
        changes = layer_changes(model, x)
    else:
        measured = measure_change(target, points, functions, change if is_adapted else coefficients)
        changes = {layer_name: measured._replace(effect=measured.layer_effect)}
    all_shares, top = _shares(changes)
    shares = all_shares[layer_name]
    if edges is None:
        order = shares.flatten().argsort(descending=True)
        edges = [divmod(number, shares.shape[1]) for number in order[:6].tolist()]

    if not edges:
        raise ValueError("`edges` is empty: give at least one pair (output, input), or leave it out.")
    curves = _evaluate_edges(target, points, functions, coefficients, edges)
    moves = []
    if is_adapted:
        moves = _evaluate_edges(target, points, functions, change, edges)
    columns = min(len(edges), 3)
    rows = math.ceil(len(edges) / columns)
    if figure is None:
        legend_height = 0.3 * is_adapted
        figure = new_figure((3 * columns, 2.3 * rows + legend_height))
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for number, (output, index) in enumerate(edges):
        axis = axes[number]
        name = f"input {index}" if inputs is None else inputs[index]
        share = f": {shares[output, index]:.0%}" if is_adapted else ""
        axis.set_title(f"{name} to unit {output}{share}", fontsize=9)
        axis.tick_params(labelsize=8)
        axis.locator_params(axis="x", nbins=5)
        axis.grid(alpha=0.25)
        at = points[:, index].float().cpu()  # matplotlib knows no bfloat16
        curve = curves[number]
        axis.plot(at, curve.cpu(), label="base", color="0.5", ls="--")
        if is_adapted:
            curve = curve + moves[number]
            darkness = float(shares[output, index]) / top
            label = "adapted; % and darkness: share of the change, without constant shifts"
            axis.plot(at, curve.cpu(), label=label, color=_color_map()(darkness))
        if z is not None:
            marks = z[:MARKS, index].float().cpu()
            bottom = axis.get_xaxis_transform()
            axis.plot(marks, torch.zeros_like(marks), "|", color="0.3", alpha=0.3, transform=bottom)
    for axis in axes[len(edges) :]:
        axis.remove()

    xlabel = "input of the edge"
    if z is not None:
        xlabel += ", with marks at the data"
    if len(edges) < shares.numel():
        xlabel += f"; {len(edges)} of {shares.numel():,} edges"
    figure.supxlabel(xlabel, fontsize=8)
    figure.supylabel("edge function", fontsize=8)
    if is_adapted:
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=2, fontsize=8)
    return figure


def _shares(changes: Mapping[str, LayerChange]) -> tuple[dict[str, Tensor], float]:
    """Return the share of each edge in the squared effects of all layers, and the largest share."""
    squares = {name: change.effect.square() for name, change in changes.items()}
    total = sum(square.sum().item() for square in squares.values())
    shares = {name: square / (total or 1.0) for name, square in squares.items()}
    largest = max(share.max().item() for share in shares.values())
    return shares, largest or 1.0


def _spread_points(target: Target, z: Tensor | None) -> Tensor:
    """Return points (rows, in) over the range of the inputs of a layer, or of its grid."""
    layer, spec, tensor = target
    if z is not None:
        ends = z.aminmax(dim=0)
    else:
        ends = grid_ends(spec.read_grid(layer), tensor.shape)
    if ends is None:
        ones = torch.ones(tensor.shape[1])
        ends = -ones, ones
    low, high = ends
    high = high.clamp(min=low + 1e-6)  # a unit may be constant
    share = torch.linspace(0, 1, POINTS, device=low.device).unsqueeze(1)
    points = torch.lerp(low, high, share.to(low))
    return points.to(tensor.get_parameter(layer))


def _find_functions(target: Target, points: Tensor) -> Tensor | None:
    """Return the basis functions (rows, in, basis) of a layer at points; None if they differ between the outputs.

    Raises:
        ValueError: The function of one input depends on the others.
    """
    mixed = points.clone()
    mixed[:, ::2] = points[:, ::2].flip(0)
    functions = functions_at(target, points)
    values = functions
    mixed_values = functions_at(target, mixed)
    if values is None or mixed_values is None:
        generator = torch.Generator().manual_seed(0)
        random = torch.randn(full_shape(target.tensor), generator=generator, device="cpu")
        values = edge_values(target, random, points).transpose(1, 2)  # (rows, in, out)
        mixed_values = edge_values(target, random, mixed).transpose(1, 2)
    mixed_values[:, ::2] = mixed_values[:, ::2].flip(0)
    if not torch.allclose(values, mixed_values, rtol=1e-3, atol=1e-5):
        raise ValueError(
            f"This {target.tensor.kind} layer has no functions of one input to draw: each depends on the other "
            "inputs, by a norm or a gate."
        )
    return functions


def _evaluate_edges(
    target: Target,
    points: Tensor,
    functions: Tensor | None,
    coefficients: Tensor,
    edges: Sequence[tuple[int, int]],
) -> list[Tensor]:
    """Return the function on each of the edges (output, input) at the points, by coefficients (out, in, basis)."""
    if functions is None:
        values = edge_values(target, coefficients, points).double()
        return [values[:, output, index] for output, index in edges]
    functions = functions.double()
    return [functions[:, index] @ coefficients[output, index] for output, index in edges]


def _color_map() -> Any:
    """Return the colors of shares from 0 to 1, without the palest ones, which are hard to see."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    shares = torch.linspace(0.15, 1, 256).numpy()
    return ListedColormap(colormaps["viridis_r"](shares))


def plot_history(history: Sequence[LevenbergMarquardtStep], names: Sequence[str] = ()) -> Figure:
    """Draw the history of `LevenbergMarquardt.fit`: the loss, its terms, and the damping, step by step.

    Args:
        history: What `fit` returned.
        names: The names of the terms, in their order.

    Raises:
        ValueError: There are names, but not one for each term.
        ImportError: Matplotlib is not installed.

    Example:
        >>> from peft_lotra.kan import KAN
        >>> from peft_lotra.least_squares import LevenbergMarquardt
        >>> x = torch.rand(50, 1)
        >>> terms = [(lambda model, x, y: model(x) - y, (x, x.sin()), 1.0)]
        >>> optimizer = LevenbergMarquardt(KAN([1, 4, 1]))
        >>> history = optimizer.fit(terms, steps=3, progress=False)
        >>> figure = plot_history(history, ["data"])
    """
    terms = list(zip(*(step.losses for step in history), strict=True))
    if names and len(names) != len(terms):
        raise ValueError(f"`names` has {len(names)} entries, but the loss has {len(terms)} terms.")
    figure = new_figure((7, 3))
    left, right = figure.subplots(1, 2)
    steps = range(1, len(history) + 1)
    left.plot(steps, [step.loss for step in history], color="black", label="loss")
    if len(terms) > 1:
        styles = ("--", ":", "-.")
        for index, losses in enumerate(terms):
            name = names[index] if names else f"term {index}"
            left.plot(steps, losses, styles[index % 3], label=name)

    held_out = [step.held_loss for step in history]
    if not all(map(math.isnan, held_out)):
        left.plot(steps, held_out, color="tab:red", marker=".", label="held out")

    left.set(title="The loss", xlabel="step", ylabel="weighted mean square", yscale="log")
    left.legend(fontsize=8)
    right.plot(steps, [step.damping for step in history], color="0.4")
    right.set(title="Low damping: trusted steps", xlabel="step", ylabel="damping", yscale="log")
    for axis in (left, right):
        axis.grid(alpha=0.25)
    return figure


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
