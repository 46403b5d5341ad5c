# Copyright 2026 the peft-lotra authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""What reaches the KAN layers of a model, and how its outputs depend on theirs: by that `slim` weighs coefficients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..families.registry import KANLayerSpec
from ..functional import call_with_parameters, modes_kept
from ..tucker import Tucker, tucker


# How much a direction that the samples do not show counts, as a share of the mean over all directions: of the
# features, and of the outputs of a layer. On digits and MNIST, shares of 0.1 and 1 for the outputs lose up to a
# tenth and a quarter of the model's outputs.
_RIDGE = 1e-3
_RIDGE_OUT = 1e-2

# Random directions of the model's outputs that are traced back to the layers.
_PROBES = 16


class Features:
    """What a layer's coefficients multiply, for samples of its input, and how much its outputs matter.

    Args:
        layer, spec: The layer and its family.
        x (`torch.Tensor`): (..., in), what reaches it.
        metric (`torch.Tensor`, *optional*): (out, out), the mean of J^T J over the samples, J being the derivatives of
            the model's outputs with respect to the layer's; by default all outputs count alike.
    """

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
            y = call_with_parameters(layer, parameters, layer, (x,), {})
            return y[0] if isinstance(y, tuple) else y

        # A layer is linear in its coefficients, whatever its basis: unit tensors bring the features out, one for each
        # output at a time.
        columns = []
        zeros = location.get_parameter(layer).new_zeros(out, in_features * basis)
        constant = run(zeros)
        for start in range(0, in_features * basis, out):
            unit = zeros.clone()
            index = torch.arange(min(out, in_features * basis - start), device=unit.device)
            unit[index, start + index] = 1
            columns.append((run(unit) - constant)[:, : len(index)])
        self.values = torch.cat(columns, dim=1).double().unflatten(1, (in_features, basis))  # (samples, in, basis)
        self.roots = [_root(torch.tensordot(self.values, self.values, ([0, 3 - m], [0, 3 - m]))) for m in (1, 2)]
        self.root_out = torch.eye(out).to(self.values) if metric is None else _root(metric.to(self.values), _RIDGE_OUT)

    def weigh(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor, its modes in and basis weighted by the second moments of the features in each, its mode out by
        the metric. Of norm 1, so that all layers count alike whatever the size of their outputs."""
        weighted = torch.einsum("po,oik,ij,kl->pjl", self.root_out, tensor, *self.roots)
        return weighted / weighted.norm().clamp(min=1e-300)

    def fit(self, tensor: torch.Tensor, ranks: tuple[int, int, int]) -> Tucker:
        """A tensor of these ranks, with orthonormal factors, that comes close to the layer's outputs in its metric."""
        _, _, *factors = tucker(self.weigh(tensor), ranks)
        factors = [
            torch.linalg.qr(torch.linalg.solve(root, factor)).Q
            for root, factor in zip(self.roots, factors, strict=True)
        ]
        z = torch.einsum("nik,ib,kc->nbc", self.values, *factors).flatten(1)
        target = self.outputs(tensor)
        # As if each of the features had been seen a little on its own: their number may exceed that of the samples.
        start = torch.einsum("oik,ib,kc->obc", tensor, *factors).flatten(1).T
        gram = z.T @ z
        ridge = _RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        weights = torch.linalg.solve(gram + ridge, z.T @ target + ridge @ start)  # (ri rb, out)
        weights = weights @ self.root_out  # symmetric
        leading = torch.linalg.svd(z @ weights, full_matrices=False).Vh[: ranks[0]].T
        core = (weights @ leading).T.reshape(-1, *ranks[1:])
        return Tucker(core, torch.linalg.solve(self.root_out, leading), *factors).orthogonal()

    def outputs(self, tensor: torch.Tensor) -> torch.Tensor:
        """(samples, out), what the layer makes of the samples with these coefficients, without its bias."""
        return self.values.flatten(1) @ tensor.flatten(1).T

    def error(self, tensor: torch.Tensor, other: torch.Tensor) -> float:
        """`relative_error` of the outputs by another tensor."""
        return relative_error(self.outputs(tensor), self.outputs(other))


def relative_error(y: torch.Tensor, other: torch.Tensor) -> float:
    """The norm of the difference of two outputs (..., out), as a share of how far the first vary about their mean. A
    large mean carries nothing, and would make any error look small (MNIST's background)."""
    y, other = y.double().flatten(0, -2), other.double().flatten(0, -2)
    return ((y - other).norm() / (y - y.mean(0)).norm().clamp(min=1e-300)).item()


def _root(moments: torch.Tensor, ridge: float = _RIDGE) -> torch.Tensor:
    """The symmetric square root, of moments that no direction is quite without."""
    values, vectors = torch.linalg.eigh(moments)
    values = values.clamp(min=0) + ridge * values.clamp(min=0).mean().clamp(min=1e-300)
    return vectors * values.sqrt() @ vectors.T


def model_outputs(model: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """What the model returns in evaluation mode; of a tuple or a dict (`ModelOutput`) the first entry.

    Raises:
        TypeError: That is no tensor of floating point numbers.
    """
    with modes_kept(model):
        result = model.eval()(inputs)
    first = next(iter(result.values())) if isinstance(result, Mapping) else result
    first = first[0] if isinstance(first, (tuple, list)) and first else first
    if not isinstance(first, torch.Tensor) or not first.is_floating_point():
        raise TypeError(
            f"With `inputs`, the model must return a tensor of floating point numbers, or a tuple or dict that begins "
            f"with one, but it returned {type(result).__name__}. Wrap it in a module that does."
        )
    return first


def gather_features(
    model: nn.Module, layers: Mapping[str, tuple[nn.Module, KANLayerSpec]], inputs: torch.Tensor
) -> dict[str, Features]:
    """The features of each layer for these inputs of the model, and the metric of its outputs.

    Raises:
        ValueError: Nothing reaches one of the layers.
        TypeError: As `model_outputs`.
    """
    reached: dict[str, list[torch.Tensor]] = {name: [] for name in layers}
    made: dict[str, list[torch.Tensor]] = {name: [] for name in layers}

    def note(name: str, args: tuple[Any, ...], y: Any) -> None:
        reached[name].append(args[0].detach().flatten(0, -2))
        y = y[0] if isinstance(y, tuple) else y
        made[name].append(y if y.requires_grad else y.requires_grad_())  # the model may be frozen

    handles = [
        layer.register_forward_hook(lambda _, args, y, name=name: note(name, args, y))
        for name, (layer, _) in layers.items()
    ]
    try:
        with torch.enable_grad():
            result = model_outputs(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    missed = [name for name, xs in reached.items() if not xs]
    if missed:
        raise ValueError(f"None of `inputs` reaches {missed}: the model's forward pass does not call these layers.")
    metrics = _metrics(result, made)
    return {name: Features(*layers[name], torch.cat(xs), metrics.get(name)) for name, xs in reached.items()}


def _metrics(result: torch.Tensor, made: Mapping[str, list[torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The sums of J^T J by layer, (out, out), J being the derivatives of the result with respect to what the layer
    made, from random signs s: s^T J has the second moment J^T J. Layers on which the result does not depend by
    autograd have none."""
    metrics: dict[str, torch.Tensor] = {}
    if not result.requires_grad:
        return metrics
    names, outputs = zip(*((name, y) for name, ys in made.items() for y in ys), strict=True)
    generator = torch.Generator().manual_seed(0)
    for _ in range(_PROBES):
        signs = torch.randint(0, 2, result.shape, generator=generator).to(result) * 2 - 1
        gradients = torch.autograd.grad(result, outputs, signs, retain_graph=True, allow_unused=True)
        for name, gradient in zip(names, gradients, strict=True):
            if gradient is not None:
                gradient = gradient.flatten(0, -2).double()
                metrics[name] = metrics.get(name, 0) + gradient.T @ gradient
    return {name: metric for name, metric in metrics.items() if metric.isfinite().all() and metric.any()}
