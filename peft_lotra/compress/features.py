# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Layer inputs and output sensitivities, used by `slim` and `extract_lotra` to weight coefficients."""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from ..layers.registry import KANLayerSpec
from ..layers.slim import call_with_coefficients
from ..modules.calls import call_with_parameters
from ..tucker import Tucker, tucker, tucker_of
from ..tuner.targets import locate_target
from .inputs import Inputs, check_inputs, model_outputs, observed


# The weight of a direction without samples, as a share of the mean over all directions.
_RIDGE = 1e-3  # of the features
_RIDGE_OUT = 1e-2  # of the outputs of a layer

_PROBES = 16  # random directions of the model's outputs that are traced back to the layers


class Features:
    """The features (basis functions of inputs) of one layer for inputs x, and the weights of its outputs.

    Inputs are (..., in), or (N, in, ...) for a convolution, where each position of the output is a sample and the
    features are those of all positions of the kernel. The metric (out, out) is the mean of J^T J, where J are the
    derivatives of the model's outputs with respect to the layer's; by default all outputs count alike.
    """

    values: torch.Tensor  # (samples, in, basis [, kernel]), with the residual function last, in float64
    metrics: list[torch.Tensor]  # for in, basis [and kernel], square roots of the features' second moments
    metric_out: torch.Tensor  # (out, out), the square root of the metric

    @torch.no_grad()
    def __init__(
        self, layer: nn.Module, spec: KANLayerSpec, x: torch.Tensor, metric: torch.Tensor | None = None
    ) -> None:
        location = spec.locate(layer)
        out, in_features, basis, *kernel = location.shape
        shape = (in_features, basis + location.has_residual, *kernel)
        size = math.prod(shape)
        if not kernel:
            x = x.reshape(-1, in_features)
        scale = spec.find_edge_scale(layer)

        def run(tensor: torch.Tensor) -> torch.Tensor:
            coefficients = tensor.view(out, *shape)
            if scale is None:
                y = call_with_coefficients(layer, location, coefficients, x)
            else:
                parameters = {**location.split(coefficients), scale: torch.ones_like(getattr(layer, scale))}
                y = call_with_parameters(layer, parameters, layer, (x,), {})
            return as_rows(first_output(y), bool(kernel))

        # A layer is linear in its coefficients: unit tensors give the features, one for each output at a time.
        columns = []
        zeros = location.get_parameter(layer).new_zeros(out, size)
        constant = run(zeros)
        for start in range(0, size, out):
            unit = zeros.clone()
            index = torch.arange(min(out, size - start), device=unit.device)
            unit[index, start + index] = 1
            columns.append((run(unit) - constant)[:, : len(index)])
        self.values = torch.cat(columns, dim=1).double().unflatten(1, shape)
        by_mode = [self.values.movedim(mode + 1, -1).flatten(0, -2) for mode in range(len(shape))]
        self.metrics = [_square_root(rows.T @ rows, _RIDGE) for rows in by_mode]
        self.metric_out = torch.eye(out, device="cpu").to(self.values)
        if metric is not None:
            self.metric_out = _square_root(metric.to(self.values), _RIDGE_OUT)

    def weigh(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor (out, in, basis [, kernel]) times the metrics of its modes, of norm 1: layers count alike."""
        equation = "po,oiks,ij,kl,st->pjlt" if tensor.dim() == 4 else "po,oik,ij,kl->pjl"
        weighted = torch.einsum(equation, self.metric_out, tensor, *self.metrics)
        return weighted / weighted.norm().clamp(min=1e-300)

    def fit(self, tensor: torch.Tensor, ranks: tuple[int, ...]) -> Tucker:
        """A Tucker tensor, with orthonormal factors, that comes close to the layer's outputs by `tensor`.

        All factors but factor_out are those of the weighted tensor. The core and factor_out are the best ones beside
        these, by reduced rank regression in the metric of the outputs.
        """
        _, _, *weighted = tucker(self.weigh(tensor), ranks)
        factors = [
            torch.linalg.qr(torch.linalg.solve(metric, factor)).Q
            for metric, factor in zip(self.metrics, weighted, strict=True)
        ]
        equation = "niks,ib,kc,sd->nbcd" if len(factors) == 3 else "nik,ib,kc->nbc"
        z = torch.einsum(equation, self.values, *factors).flatten(1)
        # As if each of the features had been seen a little on its own: their number may exceed that of the samples.
        start = torch.einsum(equation, tensor, *factors).flatten(1).T
        gram = z.T @ z
        ridge = (
            _RIDGE
            * gram.diagonal().mean().clamp(min=1e-200)
            * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        )
        weights = torch.linalg.solve(gram + ridge, z.T @ self.outputs(tensor) + ridge @ start)  # (ri rb [rk], out)
        weights = weights @ self.metric_out  # symmetric
        leading = torch.linalg.svd(z @ weights, full_matrices=False).Vh[: ranks[0]].T
        core = (weights @ leading).T.reshape(-1, *ranks[1:])
        return tucker_of(core, torch.linalg.solve(self.metric_out, leading), *factors).orthogonal()

    def outputs(self, tensor: torch.Tensor) -> torch.Tensor:
        """(samples, out), the layer's outputs for the samples with these coefficients, without its bias."""
        return self.values.flatten(1) @ tensor.flatten(1).T


def relative_error(y: torch.Tensor, other: torch.Tensor) -> float:
    """||y - other|| / ||y - mean(y)|| of outputs (..., out); a large mean would make any error look small."""
    y, other = y.double().flatten(0, -2), other.double().flatten(0, -2)
    return ((y - other).norm() / (y - y.mean(0)).norm().clamp(min=1e-300)).item()


def as_rows(y: torch.Tensor, channels_second: bool) -> torch.Tensor:
    """(rows, features) of a tensor (..., features), or (N, features, ...) of a convolution."""
    return (y.movedim(1, -1) if channels_second else y).flatten(0, -2)


def first_output(y: Any) -> torch.Tensor:
    """The output of a layer; pykan's layers return (y, preacts, postacts, postspline)."""
    return y[0] if isinstance(y, tuple) else y


def _square_root(moments: torch.Tensor, ridge: float) -> torch.Tensor:
    """The symmetric square root of second moments, with a share of their mean added in every direction."""
    values, vectors = torch.linalg.eigh(moments)
    values = values.clamp(min=0) + ridge * values.clamp(min=0).mean().clamp(min=1e-300)
    return vectors * values.sqrt() @ vectors.T


def gather_features(
    model: nn.Module, layers: Mapping[str, tuple[nn.Module, KANLayerSpec]], inputs: Inputs
) -> dict[str, Features]:
    """The features of each layer for inputs of the model; a ValueError if no input reaches one of the layers.

    Layers whose output is not linear in their coefficients have none, nor have convolutions of several groups, each
    of which has inputs of its own.
    """
    layers = {name: (layer, spec) for name, (layer, spec) in layers.items() if spec.linear}
    if not layers:
        return {}
    shapes = {name: spec.locate(layer).shape for name, (layer, spec) in layers.items()}
    grouped: set[str] = set()
    received: dict[str, list[torch.Tensor]] = {name: [] for name in layers}
    returned: dict[str, list[torch.Tensor]] = {name: [] for name in layers}

    def note(name: str, x: torch.Tensor, y: Any) -> None:
        if x.dim() < 2:
            raise ValueError(
                f"`inputs` reach the layer {name!r} as one sample of the shape {tuple(x.shape)}. Pass a batch."
            )
        x, is_convolution = x.detach(), len(shapes[name]) > 3
        if is_convolution and x.shape[1] != shapes[name][1]:
            grouped.add(name)
            return
        received[name].append(x if is_convolution else x.flatten(0, -2))
        y = first_output(y)
        returned[name].append(y if y.requires_grad else y.requires_grad_())  # the model may be frozen

    with observed({name: layer for name, (layer, _) in layers.items()}, note), torch.enable_grad():
        result = model_outputs(model, inputs)
    if missed := [name for name, xs in received.items() if not xs and name not in grouped]:
        raise ValueError(
            f"None of `inputs` reaches {missed}: the model's forward pass does not call these layers, or it calls "
            "others in their place, through references that no copy of the model has."
        )
    metrics = _metrics(result, returned, {name for name, shape in shapes.items() if len(shape) > 3})
    return {name: Features(*layers[name], torch.cat(xs), metrics.get(name)) for name, xs in received.items() if xs}


def features_of(tuned: nn.Module, names: Iterable[str], inputs: Inputs) -> dict[str, Features]:
    """The features of layers of a fine-tuned model, adapted or not, for inputs that are checked."""
    check_inputs(inputs)
    if isinstance(tuned, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        tuned = tuned.module
    if isinstance(tuned, PeftModel):
        tuned = copy.deepcopy(tuned).merge_and_unload()
    layers = {name: locate_target(name, tuned.get_submodule(name))[:2] for name in names}
    return gather_features(tuned, layers, inputs)


def _metrics(
    result: torch.Tensor, returned: Mapping[str, list[torch.Tensor]], convolutions: Collection[str]
) -> dict[str, torch.Tensor]:
    """Estimates of the sums of J^T J by layer, (out, out), where J are the derivatives of the result in the layer's
    outputs: s^T J has the second moment J^T J for random signs s. Layers without derivatives are left out."""
    metrics: dict[str, torch.Tensor] = {}
    if not result.requires_grad or not any(returned.values()):
        return metrics
    names, outputs = zip(*((name, y) for name, ys in returned.items() for y in ys), strict=True)
    generator = torch.Generator().manual_seed(0)
    for _ in range(_PROBES):
        signs = torch.randint(0, 2, result.shape, generator=generator, device="cpu").to(result) * 2 - 1
        gradients = torch.autograd.grad(result, outputs, signs, retain_graph=True, allow_unused=True)
        for name, gradient in zip(names, gradients, strict=True):
            if gradient is not None:
                gradient = as_rows(gradient, name in convolutions).double()
                metrics[name] = metrics.get(name, 0) + gradient.T @ gradient
    return {name: metric for name, metric in metrics.items() if metric.isfinite().all() and metric.any()}
