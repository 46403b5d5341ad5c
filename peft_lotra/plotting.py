# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Pictures of the spectra of updates, and of edge functions before and after adaptation; they need matplotlib."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from .approximation.features import first_output
from .approximation.spectra import Spectrum
from .families.coefficients import CoefficientTensor
from .families.registry import find_kan_layers, find_layer, short_name
from .functional import call_with_parameters
from .tuner.layer import LoTRALayer
from .tuner.targets import locate_target


if TYPE_CHECKING:
    from matplotlib.figure import Figure, SubFigure


def plot_spectra(spectrum: Spectrum, figure: Figure | SubFigure | None = None) -> Figure | SubFigure:
    """Draws the singular values of each layer that changed, as shares of its norm, mode by mode; returns the figure.

    Args:
        spectrum: From `update_spectrum` or `gradient_spectrum`.
        figure: Where to draw; a new one by default.

    Raises:
        TypeError: `spectrum` is something else, such as a model.
        ImportError: Matplotlib is not installed.

    Example:
        >>> from peft_lotra.kan import KAN
        >>> figure = plot_spectra(update_spectrum(KAN([3, 5, 4]), KAN([3, 5, 4])))
    """
    if not isinstance(spectrum, Spectrum):
        raise TypeError(
            f"`spectrum` must be a Spectrum, got {type(spectrum).__name__}: pass `update_spectrum(base, tuned)` or "
            "`gradient_spectrum(model, config, train_step)`."
        )
    changed = {name: layer for name, layer in spectrum.layers.items() if layer.norm > 0}
    modes = max((len(layer.shape) for layer in changed.values()), default=3)
    figure = _new_figure((3 * modes, 3)) if figure is None else figure
    axes = figure.subplots(1, modes, sharey=True)
    for mode, axis in enumerate(axes):
        for name, layer in changed.items():
            if mode >= len(layer.shape):  # of convolutions alone
                continue
            values = (layer.singular_values[mode] / layer.norm).cpu()
            axis.plot(range(1, len(values) + 1), values, marker=".", label=name or "layer")
        axis.set(title=f"{('out', 'in', 'basis', 'kernel')[mode]} mode", xlabel="index", yscale="log")
        axis.grid(alpha=0.25)
    shares = [(values / layer.norm).min().item() for layer in changed.values() for values in layer.singular_values]
    # values that are zero to rounding would press all others together
    axes[0].set(ylim=(max(min(shares, default=0.1) / 1.5, 1e-4), 1.2), ylabel="singular value / norm")
    if changed:
        axes[2].legend(fontsize=8)  # where all layers are
    return figure


@torch.no_grad()
def plot_edge_functions(
    model: nn.Module,
    layer_name: str,
    edges: int | Sequence[tuple[int, int]] = 6,
    x: torch.Tensor | None = None,
    title: Callable[[int, int], str] = "unit {0}, input {1}".format,
    figure: Figure | SubFigure | None = None,
) -> Figure | SubFigure:
    """Draws functions on edges of a KAN layer, of the base and with the active adapters; returns the figure.

    The layer of any family is evaluated, with the coefficients of all other inputs at zero.

    Args:
        model: The model, adapted or not; it stays unchanged.
        layer_name: The name of the layer, as `find_kan_layers` or PEFT gives it.
        edges: Pairs (output, input); or the number of edges, one for each input: those whose coefficients the adapters
            changed most, or with the largest coefficients without adapters.
        x: (points,), where to evaluate; by default 101 points from -1 to 1.
        title: `title(output, input)` is written above the picture of an edge.
        figure: Where to draw; a new one by default.

    Raises:
        ValueError: There is no such KAN layer or edge, the layer is a convolution, or it normalizes its inputs
            together first.
        ImportError: Matplotlib is not installed.

    Example:
        >>> from peft_lotra.kan import KAN
        >>> figure = plot_edge_functions(KAN([3, 5, 4]), "layers.0", edges=[(0, 1), (4, 2)])
    """
    known = [layer.name for layer in find_kan_layers(model)]
    if short_name(layer_name) not in known:
        raise ValueError(f"There is no KAN layer `{layer_name}` in the model, it has {known}.")
    module = find_layer(model, layer_name)
    layer, _, tensor = locate_target(layer_name, module)
    if len(tensor.shape) > 3:
        raise ValueError(
            f"`{layer_name}` is a convolution: an edge has a function for each of {tensor.shape[3]} positions of the "
            "kernel, and outputs are sums over these. `plot_spectra` draws such layers too."
        )
    before = tensor.read(layer)
    curves = {"base": before}
    if isinstance(module, LoTRALayer) and module.adapters_in_force():
        curves["adapted"] = module.coefficients_in_force()
    change = (curves["adapted"] - before if len(curves) == 2 else before).float().square().sum(-1)
    edges = _choose_edges(edges, change)
    x = torch.linspace(-1, 1, 101) if x is None else x
    functions = {
        (label, i): _functions_of(layer, tensor, coefficients, i, x.to(before))
        for label, coefficients in curves.items()
        for i in {i for _, i in edges}
    }
    columns = min(len(edges), 3)
    rows = -(-len(edges) // columns)
    figure = _new_figure((3 * columns, 2.3 * rows)) if figure is None else figure
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for axis, (o, i) in zip(axes, edges, strict=False):
        for label, color in zip(curves, ("0.6", "tab:green"), strict=False):
            axis.plot(x.cpu(), functions[label, i][:, o].float().cpu(), color=color, label=label)
        axis.set_title(title(o, i), fontsize=9)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25)
    for axis in axes[len(edges) :]:
        axis.remove()
    if len(curves) == 2:
        axes[0].legend(fontsize=8)
    return figure


def _choose_edges(edges: int | Sequence[tuple[int, int]], change: torch.Tensor) -> list[tuple[int, int]]:
    """The pairs (output, input) to draw, by how much each edge changed (out, in)."""
    if isinstance(edges, int):
        if edges < 1:
            raise ValueError(f"`edges` must be at least 1, or a list of pairs (output, input), got {edges}.")
        inputs = change.amax(0).topk(min(edges, change.shape[1])).indices.tolist()
        return [(int(change[:, i].argmax()), i) for i in inputs]
    wrong = [edge for edge in edges if not all(0 <= index < size for index, size in zip(edge, change.shape))]  # noqa: B905
    if wrong or not edges:
        raise ValueError(f"`edges` must be pairs (output, input) below {tuple(change.shape)}, got {wrong or edges}.")
    return list(edges)


def _functions_of(
    layer: nn.Module, tensor: CoefficientTensor, coefficients: torch.Tensor, index: int, x: torch.Tensor
) -> torch.Tensor:
    """The functions of one input, (points, out): the outputs with coefficients of this input alone, less the bias."""
    alone = torch.zeros_like(coefficients)
    alone[:, index] = coefficients[:, index]

    def run(inputs: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return first_output(call_with_parameters(layer, tensor.split(values), layer, (inputs,), {}))

    inputs = x[:, None].expand(-1, coefficients.shape[1])
    others = inputs.flip(0).clone()
    others[:, index] = x
    zero = torch.zeros_like(coefficients)
    functions = run(inputs, alone) - run(inputs, zero)
    if not torch.allclose(functions, run(others, alone) - run(others, zero), rtol=1e-3, atol=1e-5):
        raise ValueError(
            f"The outputs of this {tensor.family} layer depend on its inputs together (it normalizes them first): "
            "there are no functions of one input to draw."
        )
    return functions


def _new_figure(size: tuple[float, float]) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Pictures need matplotlib: `pip install peft-lotra[examples]`.") from error
    return Figure(figsize=size, layout="constrained")  # no pyplot: nothing to close, no window
