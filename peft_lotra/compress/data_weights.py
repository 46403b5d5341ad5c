# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Weights of coefficients by data: the basis functions at a layer's inputs, and how much each of its outputs counts.

`slim` and `extract_lotra` use them if they are given `inputs`, `start_from_training` takes those of the loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from ..layers.coefficients import CoefficientTensor
from ..layers.describe import is_linear
from ..layers.formula import find_formula
from ..layers.registry import KANLayerSpec
from ..layers.slim import call_with_coefficients
from ..modules.calls import call_with_parameters, modes_kept
from ..tucker import Tucker, full_shape, project, tucker
from ..tuner.layer import warn_of_far_inputs
from ..tuner.targets import locate_target


# a tensor, positional arguments, named ones, or a function that runs the model and returns its output
Inputs = torch.Tensor | tuple | list | Mapping[str, Any] | Callable[[nn.Module], Any]

# The weight of a direction without samples, as a share of the mean over all directions.
_RIDGE = 1e-3  # of the basis functions
_RIDGE_OUT = 1e-2  # of the outputs of a layer

_PROBES = 16  # random directions of the model's outputs whose gradients reach the layers


class DataWeights:
    """The basis functions of one layer at its inputs x, and the weights of its outputs.

    Args:
        layer: The layer, linear in its coefficients.
        spec: The description of its kind.
        x: The inputs (..., in).
        metric: (out, out), the sum of J^T J over the samples, where J are the derivatives of the model's outputs with
            respect to the layer's; by default all outputs of the layer count alike.
        residual: Whether the residual branch counts.
    """

    values: torch.Tensor  # (samples, in, basis), with the residual function last, in float64
    roots: list[torch.Tensor]  # for in and basis, square roots of the second moments of the values
    root_out: torch.Tensor  # (out, out), the square root of the metric

    @torch.no_grad()
    def __init__(
        self,
        layer: nn.Module,
        spec: KANLayerSpec,
        x: torch.Tensor,
        metric: torch.Tensor | None = None,
        residual: bool = True,
    ) -> None:
        location = spec.locate(layer)
        out, *shape = full_shape(location) if residual else location.shape
        values = functions_at(layer, spec, location, x.reshape(-1, shape[0]))
        self.values = values[..., : shape[1]].double()
        by_mode = [self.values.movedim(mode + 1, -1).flatten(0, -2) for mode in range(len(shape))]
        self.roots = [_square_root(rows.T @ rows, _RIDGE) for rows in by_mode]
        self.root_out = torch.eye(out, device="cpu").to(self.values)
        if metric is not None:
            self.root_out = _square_root(metric.to(self.values), _RIDGE_OUT)

    def weigh(self, tensor: torch.Tensor) -> torch.Tensor:
        """Multiply a tensor (out, in, basis) by the roots of its modes.

        The squared norm estimates the change of the model's outputs by this change of coefficients, summed over the
        samples, up to a factor of all layers: each of the roots has the energy of all values.
        """
        weighted = Tucker(tensor, self.root_out, *self.roots).dense()
        return weighted / (len(self.values) ** 0.5 * self.values.norm()).clamp(min=1e-300)

    def fit(self, tensor: torch.Tensor, ranks: tuple[int, ...]) -> Tucker:
        """Find a Tucker tensor, with orthonormal factors, that comes close to the layer's outputs by `tensor`.

        All factors but factor_out are those of the weighted tensor. The core and factor_out are the best ones beside
        these, by reduced rank regression in the metric of the outputs. Full modes have no factor.
        """
        _, _, *weighted = tucker(self.weigh(tensor), ranks)
        factors: list[torch.Tensor | None] = [None]
        for root, factor in zip(self.roots, weighted, strict=True):
            factors.append(None if factor is None else torch.linalg.qr(torch.linalg.solve(root, factor)).Q)
        z = project(self.values, factors).flatten(1)
        # As if each basis function had been seen a little on its own: there may be more of them than samples.
        start = project(tensor, factors).flatten(1).T
        gram = z.T @ z
        ridge = torch.eye(len(gram), device="cpu").to(gram) * _RIDGE * gram.diagonal().mean().clamp(min=1e-200)
        weights = torch.linalg.solve(gram + ridge, z.T @ self.outputs(tensor) + ridge @ start)  # (ri rb, out)
        if ranks[0] < len(self.root_out):
            weights = weights @ self.root_out  # symmetric
            leading = torch.linalg.svd(z @ weights, full_matrices=len(z) < ranks[0]).Vh[: ranks[0]].T
            weights = weights @ leading
            factors[0] = torch.linalg.solve(self.root_out, leading)
        return Tucker(weights.T.reshape(-1, *ranks[1:]), *factors).orthogonal()

    def measure(self, tensor: torch.Tensor) -> torch.Tensor:
        """Compute the layer's outputs (samples, out) in the metric of the model's outputs."""
        return self.outputs(tensor) @ self.root_out

    def outputs(self, tensor: torch.Tensor) -> torch.Tensor:
        """Compute the layer's outputs (samples, out) with these coefficients, without its bias."""
        return self.values.flatten(1) @ tensor.flatten(1).T


def functions_at(layer: nn.Module, spec: KANLayerSpec, tensor: CoefficientTensor, x: torch.Tensor) -> torch.Tensor:
    """Return the functions (samples, in, basis) that the coefficients of a layer multiply at x (samples, in)."""
    if reader := find_formula(layer, spec, tensor):
        return reader.read(layer).functions(x)
    out, *shape = full_shape(tensor)
    scale = spec.find_edge_scale(layer)

    def run(matrix: torch.Tensor) -> torch.Tensor:
        coefficients = matrix.view(out, *shape)
        if scale is None:
            y = call_with_coefficients(layer, tensor, coefficients, x)
        else:
            parameters = {**tensor.split(coefficients), scale: torch.ones_like(getattr(layer, scale))}
            y = call_with_parameters(layer, parameters, layer, (x,), {})
        return first_output(y).flatten(0, -2)

    # A layer is linear in its coefficients: unit tensors give the functions, one for each output at a time.
    columns = []
    zeros = tensor.get_parameter(layer).new_zeros(out, math.prod(shape))
    constant = run(zeros)
    for start in range(0, zeros.shape[1], out):
        unit = zeros.clone()
        unit[:, start : start + out].fill_diagonal_(1)
        columns.append((run(unit) - constant)[:, : zeros.shape[1] - start])
    return torch.cat(columns, dim=1).unflatten(1, shape)


def _square_root(moments: torch.Tensor, ridge: float) -> torch.Tensor:
    """Compute the symmetric square root of second moments, with a share of their mean added in every direction."""
    values, vectors = torch.linalg.eigh(moments)
    values = values.clamp(min=0) + ridge * values.clamp(min=0).mean().clamp(min=1e-300)
    return vectors * values.sqrt() @ vectors.T


def gather_weights(
    model: nn.Module, names: Iterable[str], inputs: Inputs, residual: bool = True
) -> dict[str, DataWeights]:
    """Compute the data weights of layers of a model without adapters, by name; with or without the residual branch.

    Layers whose output is not linear in their coefficients have none, nor have convolutions.

    Raises:
        ValueError: The inputs are not finite, or all the same, or none reaches one of the layers.
        TypeError: The model returns no tensor.
    """
    targets = {}
    for name in names:
        target = locate_target(name, model.get_submodule(name))
        if len(target.tensor.shape) == 3 and is_linear(*target):
            targets[name] = target
    result, received, returned = run_recorded(model, {name: target.layer for name, target in targets.items()}, inputs)
    metrics: dict[str, Any] = {}
    for name, gradient in probe_derivatives(result, returned):
        metrics[name] = metrics.get(name, 0) + gradient.T @ gradient
    metrics = {name: metric for name, metric in metrics.items() if metric.isfinite().all() and metric.any()}
    weights = {}
    for name, (layer, spec, tensor) in targets.items():
        x = received[name]
        warn_of_far_inputs(name, spec.read_grid(layer), tensor.shape, x)
        weights[name] = DataWeights(layer, spec, x, metrics.get(name), residual)
    return weights


@torch.inference_mode(False)
def run_recorded(
    model: nn.Module, layers: Mapping[str, nn.Module], inputs: Inputs
) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, list[torch.Tensor]]]:
    """Run a model in evaluation mode, and record the calls of layers.

    Returns:
        The output of the model, and by layer the inputs (rows, in) and the outputs of the calls, with their graph.

    Raises:
        ValueError: The inputs are not finite or all the same, do not reach one of the layers, or not as a batch.
    """
    if not callable(inputs):
        _check_inputs(inputs)
    if isinstance(inputs, torch.Tensor) and inputs.is_inference():
        inputs = inputs.clone()
    received: dict[str, list[torch.Tensor]] = {name: [] for name in layers}
    returned: dict[str, list[torch.Tensor]] = {name: [] for name in layers}

    def record(name: str, x: torch.Tensor, y: Any) -> None:
        if x.dim() < 2:
            raise ValueError(f"`inputs` reach `{name}` as one sample of shape {tuple(x.shape)}: pass a batch.")
        received[name].append(x.detach().flatten(0, -2))
        y = first_output(y)
        returned[name].append(y if y.requires_grad else y.requires_grad_())  # the model may be frozen

    with recorded_calls(layers, record), torch.enable_grad():
        result = model_outputs(model, inputs)
    if missed := [name for name, xs in received.items() if not xs]:
        raise ValueError(
            f"None of `inputs` reaches {missed}: the forward pass does not call these layers, or calls the layers of "
            "another model in their place (a function that holds them is not copied with a model)."
        )
    return result, {name: torch.cat(xs) for name, xs in received.items()}, returned


def probe_derivatives(
    result: torch.Tensor, returned: Mapping[str, list[torch.Tensor]], probes: int = _PROBES
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield derivatives s^T J (rows, out) of the result in the outputs of each layer, for random signs s.

    Their second moment is J^T J, the sum over all entries of the result. Layers without derivatives are left out.
    """
    if not result.requires_grad or not any(returned.values()):
        return
    names, outputs = zip(*((name, y) for name, ys in returned.items() for y in ys), strict=True)
    generator = torch.Generator().manual_seed(0)
    for _ in range(probes):
        signs = torch.randint(0, 2, result.shape, generator=generator, device="cpu").to(result) * 2 - 1
        gradients = torch.autograd.grad(result, outputs, signs, retain_graph=True, allow_unused=True)
        by_layer: dict[str, list[torch.Tensor]] = {}
        for name, y, gradient in zip(names, outputs, gradients, strict=True):
            gradient = torch.zeros_like(y) if gradient is None else gradient
            by_layer.setdefault(name, []).append(gradient.flatten(0, -2).double())
        for name, parts in by_layer.items():
            yield name, torch.cat(parts)


def _arguments(inputs: Any) -> tuple[Sequence[Any], Mapping[str, Any]]:
    """Return the positional and the named arguments of a call of the model."""
    if isinstance(inputs, Mapping):
        return (), inputs
    return (inputs if isinstance(inputs, (tuple, list)) else (inputs,)), {}


def _check_inputs(inputs: Any) -> None:
    """Raise a ValueError for inputs that are not finite, or all the same."""
    args, kwargs = _arguments(inputs)
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
    if not all(tensor.isfinite().all() for tensor in tensors):
        raise ValueError("`inputs` have NaN or infinite values.")
    samples = [tensor.flatten(0, -2) if tensor.dim() > 1 else tensor for tensor in tensors]
    if not any((rows != rows[:1]).any() for rows in samples):
        shapes = [tuple(tensor.shape) for tensor in tensors]
        raise ValueError(
            f"`inputs` must be samples that differ: a tensor, a tuple of arguments, a dict of named ones, or a "
            f"function that runs the model. Got {type(inputs).__name__} with tensors of shapes {shapes}."
        )


def model_outputs(model: nn.Module, inputs: Inputs) -> torch.Tensor:
    """Return the output of the model in evaluation mode.

    Of a tuple or a dict (`ModelOutput`) it is the first entry, or the one after a loss.
    """
    with modes_kept(model):
        model.eval()
        args, kwargs = _arguments(inputs)
        result = inputs(model) if callable(inputs) else model(*args, **kwargs)
    first = result
    while isinstance(first, (tuple, list, Mapping)) and first:
        entries = list(first.values()) if isinstance(first, Mapping) else first
        first = next((entry for entry in entries if getattr(entry, "shape", None) != ()), entries[0])
    if not isinstance(first, torch.Tensor) or not first.is_floating_point():
        raise TypeError(
            "With `inputs`, the model must return a floating point tensor, or a tuple or dict that begins with one, "
            f"but it returned {type(result).__name__}. Pass a function that runs the model and returns such a tensor."
        )
    return first.unsqueeze(-1) if first.dim() == 1 else first


@contextmanager
def recorded_calls(
    layers: Mapping[str, nn.Module], record: Callable[[str, torch.Tensor, Any], None]
) -> Iterator[None]:
    """Call `record(name, x, y)` with the first argument and the output of each call of a layer.

    Unlike a hook, it also sees calls of `layer.forward`, as Convolutional-KANs makes them.
    """

    def run(name: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        y = forward(*args, **kwargs)
        record(name, [*args, *kwargs.values()][0], y)
        return y

    before = [(vars(layer), vars(layer).get("forward")) for layer in layers.values()]
    try:
        for name, layer in layers.items():
            vars(layer)["forward"] = partial(run, name, layer.forward)
        yield
    finally:
        for attributes, forward in before:
            attributes.pop("forward") if forward is None else attributes.update(forward=forward)


def error_table(
    errors: Mapping[str, float], ranks: Mapping[str, tuple[int, ...]], output_errors: Mapping[str, float]
) -> tuple[list[str], list[list[str]]]:
    """Return the columns and rows of a report by layer: ranks, error, and with data the error of the outputs."""
    columns = ["layer", "ranks", ">error of the coefficients"]
    rows = [[name, str(ranks[name]), f"{error:.2%}"] for name, error in errors.items()]
    if output_errors:
        columns.append(">error of the outputs")
        for row in rows:
            row.append(f"{output_errors[row[0]]:.2%}" if row[0] in output_errors else "-")
    return columns, rows


def first_output(y: Any) -> torch.Tensor:
    """Return the output of a layer; pykan's layers return (y, preacts, postacts, postspline)."""
    return y[0] if isinstance(y, tuple) else y
