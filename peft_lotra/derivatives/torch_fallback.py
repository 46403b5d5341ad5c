# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Jets of any module, by transforms of `torch.func`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import vjp
from torch.overrides import TorchFunctionMode

from ..kan.basis import in_transform, logistic_derivatives, silu_derivatives
from ..modules.calls import attributes_kept, is_tracing
from .chain_rule import Jet


Tensors = tuple[Tensor, ...]  # at least one


def jet_by_transforms(
    model: Callable[[Tensor], Any],
    x: Tensor,
    directions: Tensor,
    order: int,
    weights: Tensor | None,
) -> Jet:
    """Compute the jet of a module or a function that maps each row separately.

    All derivatives are computed in reverse mode, which is right for every operation that can be differentiated, and
    for custom functions (forward mode in forward mode is not). Gradients are always recorded, since some backward
    passes can be differentiated only then.
    """
    records_gradients = torch.is_grad_enabled()  # `inference_mode(False)` enables it
    if is_tracing():
        with torch.enable_grad():
            jet = _differentiate(model, x, directions, order, weights)
    else:
        # compiled code, such as flashkan's basis, has no second derivatives, and is run as it was written
        eager = torch.compiler.set_stance("force_eager")
        with torch.inference_mode(False), torch.enable_grad(), attributes_kept(model), eager:
            # a graph cannot hold tensors of the inference mode
            x = x + 0
            directions = directions + 0
            if weights is not None:
                weights = weights + 0
            jet = _differentiate(model, x, directions, order, weights)
    if not records_gradients:
        jet = [derivative.detach() for derivative in jet]
    return jet


def pull_back(
    function: Callable[[Tensor], Tensors],
    x: Tensor,
) -> tuple[Tensors, Callable[[Tensor], Tensor]]:
    """Return the values of a function, and the map from a gradient in the first of them to a gradient in x.

    Under transforms or a compiler, it is `torch.func.vjp`. Else it is autograd, under which hooks of saved tensors and
    all custom functions run.
    """
    if is_tracing() or in_transform():

        def first_and_all(point: Tensor) -> tuple[Tensor, Tensors]:
            values = function(point)
            return values[0], values

        _, pull, values = vjp(first_and_all, x, has_aux=True)  # pyright: ignore[reportAssignmentType] (by `has_aux`)
        return values, lambda gradient: pull(gradient)[0]

    x = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
    values = function(x)

    def pull_recorded(gradient: Tensor) -> Tensor:
        value = values[0]
        if not value.requires_grad:
            return torch.zeros_like(x)
        (grad_x,) = torch.autograd.grad(value, x, gradient, create_graph=True, materialize_grads=True)
        return grad_x

    return values, pull_recorded


def _differentiate(
    model: Callable[[Tensor], Any],
    x: Tensor,
    directions: Tensor,
    order: int,
    weights: Tensor | None,
) -> Jet:
    shape = torch.Size()  # of an output row

    def evaluate(point: Tensor) -> Tensors:
        """Return the outputs, (...), (..., O) or (..., *S) for inputs (..., I), as (..., O)."""
        nonlocal shape
        with ExactNorms():
            output = model(point)
        output = getattr(output, "logits", output)
        if isinstance(output, tuple):  # a layer of pykan
            output = output[0]

        batch = point.shape[:-1]
        is_tensor = isinstance(output, Tensor)
        if not is_tensor or output.shape[: len(batch)] != batch:
            returned = f"shape {tuple(output.shape)}" if is_tensor else type(output).__name__
            raise ValueError(
                f"The model returns {returned} for `x` of shape {tuple(point.shape)}, but must return (..., O) for "
                "(..., I): a row of outputs for each row of inputs."
            )
        shape = output.shape[len(batch) :]
        row = output.reshape(*batch, shape.numel())
        return (row,)

    # one gradient of the value serves all directions, but of each slope only its own: up to order 2 that pays
    groups = [directions] if order <= 2 else directions.split(1)
    jets = []
    for group in groups:
        function = evaluate
        for n in range(order):
            function = _slopes(function, group, of_value=n == 0)
        highest_first = function(x)
        jets.append(highest_first[::-1])

    values, *derivatives = zip(*jets, strict=True)
    jet = [values[0], *map(torch.cat, derivatives)]
    if weights is not None:
        jet[-1] = torch.tensordot(weights, jet[-1], 1)
    return [derivative.reshape(*derivative.shape[:-1], *shape) for derivative in jet]


def _slopes(
    function: Callable[[Tensor], Tensors],
    directions: Tensor,
    of_value: bool,
) -> Callable[[Tensor], Tensors]:
    """Return a function that puts one more derivative, (D, ..., O), in front of the values of a function.

    Args:
        function: Returns the value and its derivatives, highest first.
        directions: (D, I).
        of_value: Whether the function returns only the value (..., O), whose gradient serves all directions.
    """

    def slopes(point: Tensor) -> Tensors:
        values, pull = pull_back(function, point)
        y = values[0]
        count = len(directions)
        if y.shape[-1] > 1:
            # the map of a gradient in y to one in x is linear: this is its transpose
            _, push = pull_back(lambda gradient: (pull(gradient),), torch.zeros_like(y))
            pushed = [push(direction.expand_as(point)) for direction in directions]
            if not of_value:
                pushed = [derivatives[d] for d, derivatives in enumerate(pushed)]
            return torch.stack(pushed), *values

        # of one output the gradient costs less
        if of_value:
            gradients = [pull(torch.ones_like(y))] * count
        else:
            units = torch.eye(count, dtype=y.dtype, device=y.device)
            units = units.view(count, count, *[1] * (y.dim() - 1))
            gradients = [pull(unit.expand_as(y)) for unit in units]
        pairs = zip(gradients, directions, strict=True)
        derivatives = [gradient @ direction for gradient, direction in pairs]
        return torch.stack(derivatives).unsqueeze(-1), *values

    return slopes


def activation_derivatives(module: nn.Module, z: Tensor, highest: int) -> Sequence[Tensor]:
    """Return the values of an activation and its derivatives up to an order, in closed form for the usual ones."""
    kind = type(module)
    if kind is nn.Tanh:
        return logistic_derivatives(torch.tanh, z, highest)
    if kind is nn.SiLU:
        return silu_derivatives(z, highest)
    if kind is nn.Sigmoid:
        return logistic_derivatives(torch.sigmoid, z, highest)
    return elementwise_derivatives(module, z, highest)


def elementwise_derivatives(
    function: Callable[[Tensor], Tensor],
    z: Tensor,
    highest: int,
) -> list[Tensor]:
    """Return a function of each number, with one or several values, and its derivatives up to an order."""
    evaluate = lambda point: function(point.squeeze(-1))  # noqa: E731
    points = z.unsqueeze(-1)
    direction = z.new_ones(1, 1)
    value, *derivatives = jet_by_transforms(evaluate, points, direction, highest, None)
    return [value, *(derivative.squeeze(0) for derivative in derivatives)]


class ExactNorms(TorchFunctionMode):
    """Evaluates layer normalization by operations whose derivatives of any order are right.

    In torch 2.13, the fused one is wrong in second derivatives by forward mode in forward mode, and by any mode in
    third derivatives, which are the gradients of a second-order residual.
    """

    def __torch_function__(
        self,
        func,
        types,
        args=(),
        kwargs=None,
    ):
        exact = _layer_norm if func in (F.layer_norm, torch.layer_norm) else func
        return exact(*args, **(kwargs or {}))


def _layer_norm(
    input,
    normalized_shape,
    weight=None,
    bias=None,
    eps=1e-5,
    cudnn_enable=True,
):  # as torch names them
    axes = tuple(range(-len(normalized_shape), 0))
    centered = input - input.mean(axes, keepdim=True)
    variance = centered.square().mean(axes, keepdim=True)
    y = centered * torch.rsqrt(variance + eps)
    if weight is not None:
        y = y * weight
    return y if bias is None else y + bias
