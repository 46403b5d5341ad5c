# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Compression of trained KANs: `slim` brings the coefficient tensors of any KAN into Tucker form."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..kan.layer import KANLinear
from ..kan.slim_kan import SlimKANLinear, copy_with_parameters
from ..layers.kinds import known_kinds
from ..layers.search import find_kan_layers
from ..layers.slim import SlimLayer
from ..modules.calls import places, share_hooks, unwrap
from ..modules.report import Report, TextTable
from ..tucker import Ranks, Tucker, count_parameters, relative_energy
from ..tuner.targets import locate_target
from .data_weights import Inputs, gather_weights, model_outputs
from .extract import decompose_updates
from .spectra import LayerSpectrum, check_one_given, choose_ranks, ranks_by_layer, weighted_spectra
from .updates import CoefficientUpdate, LayerRanks, check_without_adapters, error_table, read_coefficients


BISECTIONS = 8  # for the smallest budget up to 2 %, if the dense tensors are up to 300 times ranks 1

LayerMap = dict[nn.Module, nn.Module]  # layers, and what replaces them


@dataclass(eq=False)
class SlimReport(Report):
    """The result of `slim`; prints as a table. Errors are of the factors as stored.

    Attributes:
        errors: By layer, ||coefficients - factors|| / ||coefficients||, with the residual weights.
        ranks: By layer, (ro, ri, rb).
        dense: The layers that stay dense, since factors would take more parameters.
        parameters: The number of coefficients of the KAN layers, before and after.
        output_errors: With `inputs`, by layer, the error of the outputs as a share of the deviations from their mean.
        model_error: With `inputs`, the same of the whole model, its square at most 1 - `energy`.
    """

    errors: dict[str, float]
    ranks: LayerRanks
    dense: list[str]
    parameters: tuple[int, int]
    output_errors: dict[str, float] = field(default_factory=dict)
    model_error: float | None = None

    def _table(self) -> TextTable:
        dense_size, size = self.parameters
        notes = [f"{name} stays dense: no ranks given, or no fewer parameters by them" for name in self.dense]
        notes.append(f"coefficients: {dense_size:,} before, {size:,} now ({dense_size / size:.1f} times fewer)")
        if self.model_error is not None:
            notes.append(f"error of the model's outputs: {self.model_error:.2%} of their deviations from the mean")
        return TextTable(*error_table(self.errors, self.ranks, self.output_errors), notes)


def slim(
    model: nn.Module,
    ranks: Ranks | Mapping[str, Ranks] | None = None,
    *,
    energy: float | None = None,
    budget: int | None = None,
    inputs: Inputs | None = None,
    inplace: bool = False,
) -> nn.Module:
    """Compress a trained KAN: the coefficient tensor of each layer becomes a core and three factors.

        A (out, in, basis)  ~  core x1 factor_out x2 factor_in x3 factor_basis

    The factors come from higher-order orthogonal iteration (HOOI); residual weights are a slice of the tensor. A
    `KANLinear` becomes a `SlimKANLinear`, the layer of another library a `SlimLayer` around the rest of the layer.

    Pass `inputs`, some of the training data, wherever you can. The error that counts is then that of the model's
    outputs on these inputs: trained coefficient tensors are far from low rank, but the functions that they compute on
    data mostly are not. The coefficients are then weighted by the second moments of the basis functions, and by J^T J
    of the outputs as in the Gauss-Newton matrix.

    Where a library multiplies the splines of each edge by a scale (efficient-kan, pykan), coefficient times scale is
    compressed, and the scale is 1 from then on.

    Args:
        model: A network with KAN layers, or one layer, without adapters; it stays unchanged if not `inplace`.
        ranks: (ro, ri, rb) for each layer, capped by the sizes of its modes, "full" for a mode without a factor; or by
            layer, as in the `rank_pattern` of [`LoTRAConfig`]: other layers stay dense;
        energy: Or the share of the squared norm to keep, above 0 and up to 1: of each layer's coefficients, or with
            `inputs` of the deviations of the model's outputs from their mean;
        budget: Or the number of parameters for the coefficients of all layers together.
        inputs: Samples of the model's input, a thousand or so: a tensor, a tuple of arguments, a dict of named ones,
            or a function of the model that runs it and returns its output. The basis functions of all layers at these
            samples are kept in memory in float64.
        inplace: Whether to exchange the layers of the model, and not of a copy. A model that keeps functions which
            call its layers (`self.mlp = lambda x: ...`) cannot be copied. After an error the model is as it was.

    Returns:
        The model, or a copy of it, of the same class, with Slim layers, a [`SlimReport`] as `slim_report`, and
        `to_dense()`, which returns a copy of the original class. A layer whose factors would take more parameters
        than the tensor is left dense; the report and a warning name the layer.

    Raises:
        ValueError: Not one of `ranks`, `energy` and `budget` is given, or one that cannot be; the model has adapters
            (merge them first), no KAN layer, convolutions, or coefficients that are not finite; a copy would keep
            functions which call its layers; no input reaches a layer; `inputs` are not finite, or all have the same
            output.
        TypeError: `model` is no module; or, with `inputs`, it returns no tensor, nor a tuple or dict with one.

    Example:
        >>> from peft_lotra.kan import KAN
        >>> small = slim(KAN([20, 16]), (4, 4, 3), inputs=torch.rand(100, 20))
        >>> small.slim_report.parameters
        (2880, 219)
        >>> dense = small.to_dense()
    """
    check_one_given(ranks=ranks, energy=energy, budget=budget)
    model = unwrap(model)
    check_without_adapters(model, "model")
    if not inplace:
        model = _copy(model)
    compression = _Compression(model, inputs)

    tensors = compression.tensors
    if isinstance(ranks, Mapping):
        chosen = ranks_by_layer(tensors, ranks, None, "ranks")
    elif ranks is not None:
        chosen = ranks_by_layer(tensors, {}, ranks, "ranks")
    elif energy is not None and inputs is not None:
        chosen = compression.ranks_for(energy)
    else:
        chosen = choose_ranks(compression.spectra, energy, budget)
    if not chosen:
        raise ValueError(f"`ranks` names none of the KAN layers {list(tensors)}: {ranks}.")

    layers, report = compression.compress(chosen)
    grown = [name for name in report.dense if name in chosen]
    if grown:
        hint = ""
        if energy is not None and inputs is None:
            hint = " Pass `inputs`: on data there is mostly less to keep."
        warnings.warn(
            f"Left dense, since their factors would take more parameters: {', '.join(grown)}.{hint}", stacklevel=2
        )

    small = _exchange(compression.model, layers)
    small.__dict__["slim_report"] = report
    if not isinstance(small, (SlimKANLinear, SlimLayer)):  # they have the method
        small.__dict__["to_dense"] = partial(to_dense, small)
    return small


@torch.inference_mode(False)  # parameters made in that mode could not be trained
def to_dense(model: nn.Module, inplace: bool = False) -> nn.Module:
    """Replace every Slim layer by a dense one of its original class that computes the same, up to rounding.

    Args:
        model: A model with Slim layers, without adapters.
        inplace: Whether to exchange the layers of the model, and not of a copy.

    Returns:
        The model with dense layers.

    Raises:
        ValueError: The model has adapters, or cannot be copied, as for `slim`.

    Example:
        >>> from peft_lotra.kan import SlimKAN
        >>> type(to_dense(SlimKAN([8, 4], ranks=2)).layers[0]).__name__
        'KANLinear'
    """
    model = unwrap(model)
    check_without_adapters(model, "model")
    if not inplace:
        model = _copy(model)
    dense = {}
    for module in model.modules():
        if isinstance(module, (SlimKANLinear, SlimLayer)):
            dense[module] = module.to_dense()
            share_hooks(module, dense[module])
    model = _exchange(model, dense)
    for attribute in ("slim_report", "to_dense"):
        model.__dict__.pop(attribute, None)
    return model


class _Compression:
    """The compression of a model by several ranks, which are compared.

    Attributes:
        model: The model, whose layers are exchanged.
        layers: The dense layers, by name.
        tensors: Their coefficients times the scales of the edges, (out, in, basis [+ 1]).
        weights: With `inputs`, the data weights of each layer.
    """

    def __init__(self, model: nn.Module, inputs: Inputs | None) -> None:
        self.model = model
        self.inputs = inputs
        self.layers = {}
        self.tensors = {}
        for name, _, shape, *_ in find_kan_layers(model):
            layer = model.get_submodule(name)
            if len(shape) > 3:
                raise ValueError(f"`{name}` is a convolution: compress the part of the model without them.")
            if isinstance(layer, (SlimKANLinear, SlimLayer)):
                continue
            tensor, scale = read_coefficients(name, layer)
            if scale is not None:
                tensor = tensor * scale
            self.layers[name] = layer
            self.tensors[name] = tensor.detach()

        if not self.layers:
            raise ValueError(
                "No KAN layer that could be compressed was found in the model. The known kinds of layers are "
                f"{', '.join(known_kinds())}; describe another one with `peft_lotra.register_kan_layer`."
            )

        self.weights = {}
        if inputs is not None:
            self.weights = gather_weights(model, self.tensors, inputs)
            with torch.no_grad():
                self.outputs = model_outputs(model, inputs).double()
            deviations = self.outputs - self.outputs.mean(0)
            if relative_energy(deviations, self.outputs) < 1e-12:
                raise ValueError("The output is the same for all `inputs`: pass samples that differ.")

    @cached_property
    def spectra(self) -> dict[str, LayerSpectrum]:
        return weighted_spectra(self.tensors, self.weights)

    def ranks_for(self, energy: float) -> LayerRanks:
        """Find the ranks for the smallest budget that keeps this share of the model's outputs, by bisection."""
        best = {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}  # leaves all layers dense
        low = sum(1 + sum(shape) for shape in best.values())
        high = sum(map(math.prod, best.values()))
        if low >= high:  # no ranks save parameters in the smallest layers
            return best
        largest_error = math.sqrt(1 - energy) + 1e-8  # rounding, for an energy of 1
        for _ in range(BISECTIONS):
            middle = round(math.sqrt(low * high))
            ranks = choose_ranks(self.spectra, budget=middle)
            _, report = self.compress(ranks)
            if (report.model_error or 0.0) > largest_error:
                low = middle
            else:
                high = middle
                best = ranks
        return best

    @torch.no_grad()
    def compress(self, ranks: LayerRanks) -> tuple[LayerMap, SlimReport]:
        """Return Slim layers by the dense ones that they replace, where they save parameters, and their report."""
        dense_size = sum(tensor.numel() for tensor in self.tensors.values())
        report = SlimReport({}, {}, [], (dense_size, dense_size))
        updates = {}
        for name, tensor in self.tensors.items():
            if name in ranks and count_parameters(ranks[name], tensor.shape) < tensor.numel():
                updates[name] = CoefficientUpdate(tensor)
            else:
                report.dense.append(name)
        size = dense_size
        slim_layers = {}
        for name, components in decompose_updates(updates, self.weights, ranks).items():
            layer = self.layers[name]
            slim_layer = _make_slim(name, layer, components)
            slim_layers[layer] = slim_layer
            tensor = self.tensors[name]
            size += components.numel() - tensor.numel()

            stored = slim_layer.components.map(Tensor.double).dense()
            report.ranks[name] = ranks[name]
            report.errors[name] = relative_energy(tensor - stored, tensor).sqrt().item()
            if name in self.weights:
                outputs = self.weights[name].outputs
                report.output_errors[name] = _relative_error(outputs(tensor), outputs(stored))

        report.parameters = dense_size, size
        if self.inputs is not None:
            model = _exchange(self.model, slim_layers)
            try:
                outputs = model_outputs(model, self.inputs)
            finally:
                _exchange(self.model, {slim_layer: layer for layer, slim_layer in slim_layers.items()})
            report.model_error = _relative_error(self.outputs, outputs)
        return slim_layers, report


def _make_slim(name: str, layer: nn.Module, components: Tucker) -> Any:
    """Return a Slim layer with these components; the dense layer stays unchanged."""
    if type(layer) is KANLinear:
        slim_layer = copy_with_parameters(layer, components._asdict())
        share_hooks(layer, slim_layer)
        return slim_layer
    # a SlimLayer takes the parameters out of a layer: here out of a copy that shares them
    shared = copy.deepcopy(layer, {id(parameter): parameter for parameter in layer.parameters()})
    return SlimLayer(shared, locate_target(name, layer).spec, components)


def _relative_error(y: Tensor, approximation: Tensor) -> float:
    """Compute ||y - approximation|| / ||y - mean(y)|| of outputs (..., out); a large mean would hide any error."""
    y = y.double().flatten(0, -2)
    error = approximation.double().flatten(0, -2) - y
    deviations = y - y.mean(0)
    return relative_energy(error, deviations).sqrt().item()


def _exchange(model: nn.Module, layers: LayerMap) -> nn.Module:
    """Replace layers everywhere in the model, and return it; if the model is such a layer, what replaces it."""
    for parent, name, module in places(model):
        parent._modules[name] = layers.get(module, module)
    return layers.get(model, model)


def _copy(model: nn.Module) -> nn.Module:
    """Copy a model deeply, also one that keeps activations of its last pass (pykan), which deepcopy refuses."""
    memo = {}
    for value in tree_leaves([vars(module) for module in model.modules()]):
        if isinstance(value, Tensor) and value.grad_fn is not None:
            memo[id(value)] = value.detach().clone()
        elif isinstance(value, FunctionType) and any(map(_has_kan_layers, value.__closure__ or ())):
            raise ValueError(
                "The model keeps a function that holds KAN layers (`self.mlp = lambda x: ...`): a copy of the model "
                "would go on calling the original layers. Pass `inplace=True`, or make the function a method."
            )
    return copy.deepcopy(model, memo)


def _has_kan_layers(cell: Any) -> bool:
    value = cell.cell_contents
    return isinstance(value, nn.Module) and bool(find_kan_layers(value))
