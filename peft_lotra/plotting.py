# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Pictures of spectra, edge functions, changes of a network and trainings; they need matplotlib.

The numbers behind the picture of a network, `edge_changes`, do not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING

import torch
from torch import nn

from .compress.data_weights import first_output
from .compress.spectra import Spectrum
from .compress.updates import edge_scales
from .layers.coefficients import CoefficientTensor
from .layers.registry import find_layer
from .layers.slim import call_with_coefficients
from .least_squares.levenberg_marquardt import LevenbergMarquardtStep
from .modules.calls import unwrap
from .modules.checks import check_count
from .modules.report import Report, TextTable
from .tuner.layer import LoTRALayer, Target, grid_ends, lotra_layers
from .tuner.targets import locate_target


if TYPE_CHECKING:
    from matplotlib.figure import Figure, SubFigure


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
    x: torch.Tensor | None = None,
    title: Callable[[int, int], str] = "unit {0}, input {1}".format,
    figure: Figure | SubFigure | None = None,
) -> Figure | SubFigure:
    """Draws functions on edges of a KAN layer, of the base and with the active adapters; returns the figure.

    A layer of any kind is evaluated, with the coefficients of all other inputs at zero.

    Args:
        model: The model, adapted or not; it stays unchanged.
        layer_name: The name of the layer, as `find_kan_layers` or PEFT gives it.
        edges: Pairs (output, input); or the number of edges, one for each input: those whose coefficients the adapters
            changed most, or with the largest coefficients without adapters.
        x: (points,), where to evaluate; by default 101 points over the grids of these inputs, or from -1 to 1.
        title: `title(output, input)` is written above the picture of an edge.
        figure: Where to draw; a new one by default.

    Raises:
        ValueError: There is no such KAN layer or edge, the layer is a convolution, or it normalizes its inputs
            together.
        ImportError: Matplotlib is not installed.

    Example:
        >>> from peft_lotra.kan import KAN
        >>> kan = KAN([3, 5, 4])
        >>> figure = plot_edge_functions(kan, "layers.0", edges=[(0, 1), (4, 2)])
    """
    module = find_layer(model, layer_name)
    layer, spec, tensor = locate_target(layer_name, module)
    if len(tensor.shape) > 3:
        raise ValueError(
            f"`{layer_name}` is a convolution, whose edges have a function for each position of the kernel. "
            "`plot_spectra` draws such layers."
        )
    before = change = tensor.read(layer)
    curves = [(before, {"label": "base", "color": "0.5", "ls": "--"})]
    if isinstance(module, LoTRALayer) and module.applied_updates():
        after = module.effective_coefficients()
        change = after - before
        curves.append((after, {"label": "adapted", "color": "tab:green"}))
    edges = _choose_edges(edges, change.float().square().sum(-1))
    if x is None:
        low, high = -1.0, 1.0
        if (ends := grid_ends(spec.read_grid(layer), before.shape[1])) is not None:
            drawn = [i for _, i in edges]
            low, high = ends[0][drawn].min().item(), ends[1][drawn].max().item()
        x = torch.linspace(low, high, 101, device="cpu")
    x = x.flatten().to(before)
    columns = min(len(edges), 3)
    rows = -(-len(edges) // columns)
    figure = new_figure((3 * columns, 2.3 * rows)) if figure is None else figure
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for axis, (o, i) in zip(axes, edges, strict=False):
        for coefficients, style in curves:
            y = _functions_of(layer, tensor, coefficients, i, x)[:, o]
            axis.plot(x.float().cpu(), y.float().cpu(), **style)
        axis.set_title(title(o, i), fontsize=9)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25)
    for axis in axes[len(edges) :]:
        axis.remove()
    figure.supxlabel("input", fontsize=8)
    figure.supylabel("edge function", fontsize=8)
    if len(curves) == 2:
        axes[0].legend(fontsize=8)
    return figure


@dataclass(eq=False)
class EdgeChanges(Report):
    """The result of `edge_changes`; prints as a table of the ten edges that changed most.

    Attributes:
        change: |A' - A| of each edge, a tensor (out, in) on the CPU by the name of the layer.
        share: |A' - A| / |A|, laid out in the same way.
    """

    change: dict[str, torch.Tensor]
    share: dict[str, torch.Tensor]

    def _table(self) -> TextTable:
        edges = [(name, *divmod(n, it.shape[1])) for name, it in self.share.items() for n in range(it.numel())]
        shares, places = torch.cat([share.flatten() for share in self.share.values()]).topk(min(10, len(edges)))
        rows = []
        for share, place in zip(shares.tolist(), places.tolist(), strict=True):
            name, o, i = edges[place]
            rows.append([name, str(o), str(i), f"{self.change[name][o, i]:.3g}", f"{share:.1%}"])
        cut = [f"the {len(rows)} of {len(edges):,} edges that changed most"] * (len(rows) < len(edges))
        return TextTable(["layer", ">output", ">input", ">change (norm)", ">share of the norm before"], rows, cut)


@torch.no_grad()
def edge_changes(model: nn.Module) -> EdgeChanges:
    """How much the active adapters changed each edge, |A' - A| and |A' - A| / |A|: what `plot_network_change` draws.

    A are the edge's coefficients before, A[o, i, :] with the residual branch, and A' those with all active adapters,
    multiplied by what the kind of layer multiplies them by (pykan's `scale_sp`).
    For an edge that was almost zero, a thousandth of the layer's mean |A| takes the place of its |A|.

    Args:
        model: The adapted model; it stays unchanged.

    Returns:
        `change` and `share`, tensors (out, in) by layer, of the layers with an active adapter: merged and disabled
            adapters do not count, and convolutions have no such edges.

    Raises:
        ValueError: The model has no KAN layer with an active adapter, or all of them are convolutions.

    Example:
        >>> from peft import get_peft_model
        >>> from peft_lotra import LoTRAConfig
        >>> from peft_lotra.kan import KAN
        >>> config = LoTRAConfig(r=2, init_weights=False)
        >>> changes = edge_changes(get_peft_model(KAN([2, 5, 3]), config))
        >>> {name: tuple(share.shape) for name, share in changes.share.items()}
        {'layers.0': (5, 2), 'layers.1': (3, 5)}
    """
    changes = EdgeChanges({}, {})
    for name, layer in lotra_layers(unwrap(model)):
        if layer.applied_updates() and len(layer.lotra_tensor.shape) == 3:
            before = layer.get_base_weight()
            before = before.to(torch.promote_types(before.dtype, torch.float32))
            scale = edge_scales(Target(layer.get_base_layer(), layer.lotra_spec, layer.lotra_tensor), before)
            factors = 1.0 if scale is None else scale
            change = (layer.effective_coefficients(before.dtype) - before).mul(factors).norm(dim=-1)
            size = before.mul(factors).norm(dim=-1)
            changes.change[name] = change.cpu()
            changes.share[name] = (change / size.clamp_min(1e-3 * size.mean() + 1e-12)).cpu()
    if not changes.share:
        raise ValueError(
            "The model has no dense KAN layer with an active adapter. Adapters that are merged (`unmerge_adapter`), "
            "disabled (`enable_adapter_layers`) or not active (`set_adapter`) do not count, nor do convolutions."
        )
    return changes


@torch.no_grad()
def plot_network_change(
    model: nn.Module, most: int = 400, figure: Figure | SubFigure | None = None
) -> Figure | SubFigure:
    """Draws a network as a diagram: each edge in the color of how much the active adapters changed it.

    A column of units for the inputs of each KAN layer, and one for the outputs of the last. The change of an edge is
    its `share`, as `edge_changes` computes it. Layers that do not follow each other (other sizes) have columns of
    their own. Of many edges those that changed most are drawn.

    Args:
        model: The adapted model; it stays unchanged.
        most: The number of edges that are drawn in each layer, at most.
        figure: Where to draw; a new one by default.

    Raises:
        ValueError: As `edge_changes`; or `most` is no integer of at least 1.
        ImportError: Matplotlib is not installed.

    Example:
        >>> from peft import get_peft_model
        >>> from peft_lotra import LoTRAConfig
        >>> from peft_lotra.kan import KAN
        >>> config = LoTRAConfig(r=2, init_weights=False)
        >>> figure = plot_network_change(get_peft_model(KAN([2, 5, 3]), config))
    """
    most = check_count(most, "most")
    changes = edge_changes(model).share
    figure = new_figure((1.5 + 2.2 * len(changes), 4)) if figure is None else figure
    axis = figure.subplots()
    top = max(float(change.max()) for change in changes.values()) or 1.0
    from matplotlib.collections import LineCollection  # beside Figure, which is there

    place, units = 0.0, None
    for name, change in changes.items():
        outputs, inputs = change.shape
        if units not in (None, inputs):  # does not follow the layer before
            place += 0.6
        left, right = _heights(inputs), _heights(outputs)
        order = change.flatten().argsort()[-most:]  # the largest above the others
        segments = [[(place, left[int(e) % inputs]), (place + 1, right[int(e) // inputs])] for e in order]
        lines = LineCollection(segments, cmap="viridis_r", linewidths=1.4)
        lines.set_array(change.flatten()[order].numpy())
        lines.set_clim(0, top)
        axis.add_collection(lines)
        for x, heights in ((place, left), (place + 1, right)):
            axis.plot([x] * len(heights), heights, "o", color="0.25", markersize=4, zorder=3)
        cut = f", {len(order)} of {change.numel()} edges" if len(order) < change.numel() else ""
        axis.text(place + 0.5, 1.06, f"{name}\n{inputs} to {outputs}{cut}", ha="center", va="bottom", fontsize=8)
        place, units = place + 1, outputs
    axis.set(xlim=(-0.1, place + 0.1), ylim=(-0.05, 1.05))
    axis.set_axis_off()
    figure.colorbar(axis.collections[-1], ax=axis, label="change of an edge, as a share of its size")
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
