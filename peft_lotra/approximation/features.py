# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Layer inputs and output sensitivities, used by `slim` and `extract_lotra` to weight coefficients."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import nn

from ..families.registry import KANLayerSpec
from ..functional import call_with_parameters, modes_kept
from ..tucker import Tucker, tucker


# The weight of a direction without samples, as a share of the mean over all directions.
_RIDGE = 1e-3  # of the features
_RIDGE_OUT = 1e-2  # of the outputs of a layer

_PROBES = 16  # random directions of the model's outputs that are traced back to the layers


class Features:
    """The features (basis functions of inputs) of one layer for inputs x (..., in), and the weights of its outputs.

    The metric (out, out) is the mean of J^T J, where J are the derivatives of the model's outputs with respect to the
    layer's; by default all outputs count alike.
    """

    values: torch.Tensor  # (samples, in, basis), with the residual function last, in float64
    metric_in_basis: list[torch.Tensor]  # (in, in) and (basis, basis), square roots of the features' second moments
    metric_out: torch.Tensor  # (out, out), the square root of the metric

    @torch.no_grad()
    def __init__(
        self, layer: nn.Module, spec: KANLayerSpec, x: torch.Tensor, metric: torch.Tensor | None = None
    ) -> None:
        location = spec.locate(layer)
        out, in_features, basis = location.shape
        basis += location.has_residual
        x = x.reshape(-1, in_features)
        scale = spec.find_edge_scale(layer)

        def run(tensor: torch.Tensor) -> torch.Tensor:
            parameters = location.split(tensor.view(out, in_features, basis))
            if scale is not None:
                parameters[scale] = torch.ones_like(getattr(layer, scale))
            return first_output(call_with_parameters(layer, parameters, layer, (x,), {}))

        # A layer is linear in its coefficients: unit tensors give the features, one for each output at a time.
        columns = []
        zeros = location.get_parameter(layer).new_zeros(out, in_features * basis)
        constant = run(zeros)
        for start in range(0, in_features * basis, out):
            unit = zeros.clone()
            index = torch.arange(min(out, in_features * basis - start), device=unit.device)
            unit[index, start + index] = 1
            columns.append((run(unit) - constant)[:, : len(index)])
        self.values = torch.cat(columns, dim=1).double().unflatten(1, (in_features, basis))
        by_mode = self.values.transpose(1, 2).flatten(0, 1), self.values.flatten(0, 1)
        self.metric_in_basis = [_square_root(rows.T @ rows, _RIDGE) for rows in by_mode]
        self.metric_out = torch.eye(out).to(self.values)
        if metric is not None:
            self.metric_out = _square_root(metric.to(self.values), _RIDGE_OUT)

    def weigh(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor (out, in, basis) times the metrics of its modes, of norm 1, so that layers count alike."""
        weighted = torch.einsum("po,oik,ij,kl->pjl", self.metric_out, tensor, *self.metric_in_basis)
        return weighted / weighted.norm().clamp(min=1e-300)

    def fit(self, tensor: torch.Tensor, ranks: tuple[int, ...]) -> Tucker:
        """A Tucker tensor, with orthonormal factors, that comes close to the layer's outputs by `tensor`.

        factor_in and factor_basis are those of the weighted tensor. The core and factor_out are the best ones beside
        these two, by reduced rank regression in the metric of the outputs.
        """
        _, _, *weighted = tucker(self.weigh(tensor), ranks)
        factors = [
            torch.linalg.qr(torch.linalg.solve(metric, factor)).Q
            for metric, factor in zip(self.metric_in_basis, weighted, strict=True)
        ]
        z = torch.einsum("nik,ib,kc->nbc", self.values, *factors).flatten(1)
        # As if each of the features had been seen a little on its own: their number may exceed that of the samples.
        start = torch.einsum("oik,ib,kc->obc", tensor, *factors).flatten(1).T
        gram = z.T @ z
        ridge = _RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        weights = torch.linalg.solve(gram + ridge, z.T @ self.outputs(tensor) + ridge @ start)  # (ri rb, out)
        weights = weights @ self.metric_out  # symmetric
        leading = torch.linalg.svd(z @ weights, full_matrices=False).Vh[: ranks[0]].T
        core = (weights @ leading).T.reshape(-1, *ranks[1:])
        return Tucker(core, torch.linalg.solve(self.metric_out, leading), *factors).orthogonal()

    def outputs(self, tensor: torch.Tensor) -> torch.Tensor:
        """(samples, out), the layer's outputs for the samples with these coefficients, without its bias."""
        return self.values.flatten(1) @ tensor.flatten(1).T


def relative_error(y: torch.Tensor, other: torch.Tensor) -> float:
    """||y - other|| / ||y - mean(y)|| of outputs (..., out); a large mean would make any error look small."""
    y, other = y.double().flatten(0, -2), other.double().flatten(0, -2)
    return ((y - other).norm() / (y - y.mean(0)).norm().clamp(min=1e-300)).item()


def first_output(y: Any) -> torch.Tensor:
    """The output of a layer; pykan's layers return (y, preacts, postacts, postspline)."""
    return y[0] if isinstance(y, tuple) else y


def _square_root(moments: torch.Tensor, ridge: float) -> torch.Tensor:
    """The symmetric square root of second moments, with a share of their mean added in every direction."""
    values, vectors = torch.linalg.eigh(moments)
    values = values.clamp(min=0) + ridge * values.clamp(min=0).mean().clamp(min=1e-300)
    return vectors * values.sqrt() @ vectors.T


def check_inputs(inputs: object) -> None:
    """Raises a ValueError for inputs that are not finite, or that are all the same."""
    given = f"a {type(inputs).__name__}"
    if isinstance(inputs, torch.Tensor):
        rows = inputs.flatten(0, -2) if inputs.dim() > 1 else inputs
        given = f"shape {tuple(inputs.shape)}"
        if inputs.numel() and inputs.isfinite().all():
            if (rows != rows[:1]).any():
                return
            given += " with a single sample, or many that are equal"
        elif inputs.numel():
            given += " with NaN or infinite values"
    raise ValueError(
        f"`inputs` must be a tensor of samples that are finite and differ, as the model takes them, got {given}."
    )


def model_outputs(model: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """The output of the model in evaluation mode; of a tuple or a dict (`ModelOutput`) the first entry."""
    with modes_kept(model):
        result = model.eval()(inputs)
    first = next(iter(result.values())) if isinstance(result, Mapping) else result
    first = first[0] if isinstance(first, (tuple, list)) and first else first
    if not isinstance(first, torch.Tensor) or not first.is_floating_point():
        raise TypeError(
            "With `inputs`, the model must return a tensor of floating point numbers, or a tuple or dict that begins "
            f"with one, but it returned {type(result).__name__}. Wrap it in a module that does."
        )
    return first


def gather_features(
    model: nn.Module, layers: Mapping[str, tuple[nn.Module, KANLayerSpec]], inputs: torch.Tensor
) -> dict[str, Features]:
    """The features of each layer for inputs of the model.

    Raises:
        ValueError: No input reaches one of the layers, or a layer is a convolution.
    """
    if convolutions := [name for name, (layer, spec) in layers.items() if len(spec.locate(layer).shape) > 3]:
        raise ValueError(
            f"`inputs` cannot weigh the coefficients of convolutions yet, such as {convolutions[0]!r}: leave `inputs` "
            "out, so that the coefficients count alike."
        )
    received: dict[str, list[torch.Tensor]] = {name: [] for name in layers}
    returned: dict[str, list[torch.Tensor]] = {name: [] for name in layers}

    def note(name: str, layer: nn.Module, args: tuple[Any, ...], y: Any) -> None:
        received[name].append(args[0].detach().flatten(0, -2))
        y = first_output(y)
        returned[name].append(y if y.requires_grad else y.requires_grad_())  # the model may be frozen

    with ExitStack() as hooks, torch.enable_grad():
        for name, (layer, _) in layers.items():
            hooks.enter_context(layer.register_forward_hook(partial(note, name)))
        result = model_outputs(model, inputs)
    if missed := [name for name, xs in received.items() if not xs]:
        raise ValueError(f"None of `inputs` reaches {missed}: the model's forward pass does not call these layers.")
    metrics = _metrics(result, returned)
    return {name: Features(*layers[name], torch.cat(xs), metrics.get(name)) for name, xs in received.items()}


def _metrics(result: torch.Tensor, returned: Mapping[str, list[torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Estimates of the sums of J^T J by layer, (out, out), where J are the derivatives of the result in the layer's
    outputs: s^T J has the second moment J^T J for random signs s. Layers without derivatives are left out."""
    metrics: dict[str, torch.Tensor] = {}
    if not result.requires_grad:
        return metrics
    names, outputs = zip(*((name, y) for name, ys in returned.items() for y in ys), strict=True)
    generator = torch.Generator().manual_seed(0)
    for _ in range(_PROBES):
        signs = torch.randint(0, 2, result.shape, generator=generator).to(result) * 2 - 1
        gradients = torch.autograd.grad(result, outputs, signs, retain_graph=True, allow_unused=True)
        for name, gradient in zip(names, gradients, strict=True):
            if gradient is not None:
                gradient = gradient.flatten(0, -2).double()
                metrics[name] = metrics.get(name, 0) + gradient.T @ gradient
    return {name: metric for name, metric in metrics.items() if metric.isfinite().all() and metric.any()}
