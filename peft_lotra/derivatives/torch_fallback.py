# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Jets of any module, by transforms of `torch.func`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import vjp
from torch.overrides import TorchFunctionMode

from ..kan.basis import in_transform, logistic_derivatives, silu_derivatives, times_argument
from ..modules.calls import attributes_kept, is_tracing
from .chain_rule import Jet


Tensors = tuple[Tensor, ...]  # at least one


def jet_by_transforms(
    model: Callable[[Tensor], Any], x: Tensor, directions: Tensor, order: int, weights: Tensor | None
) -> Jet:
    """
    As `jet`, for a module or a function that maps each row by itself, whatever it consists of.

    All derivatives are taken in reverse mode, which is right for every operation that can be differentiated, and
    for custom functions (forward mode in forward mode is not). Gradients are recorded meanwhile, since some backward
    passes can be differentiated only then; if none is wanted, parameters enter as constants.
    """
    records_gradients = torch.is_grad_enabled()  # `inference_mode(False)` enables it
    if is_tracing():
        with torch.enable_grad():
            parts = _differentiate(model, x, directions, order, weights)
    else:
        # compiled code, such as flashkan's basis, has no second derivatives, and is run as it was written
        eager = torch.compiler.set_stance("force_eager")
        with torch.inference_mode(False), torch.enable_grad(), attributes_kept(model), eager:
            weights = None if weights is None else _recordable(weights)
            parts = _differentiate(model, _recordable(x), _recordable(directions), order, weights)
    return parts if records_gradients else [part.detach() for part in parts]


def _recordable(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of one that was made in inference mode, which no graph can hold."""
    return tensor.clone() if not in_transform() and tensor.is_inference() else tensor


def pull_back(function: Callable[[Tensor], Tensors], x: Tensor) -> tuple[Tensors, Callable[[Tensor], Tensor]]:
    """The values of a function, and the map of a gradient in the first of them to one in x.

    `torch.func.vjp` where transforms are at work, or a compiler; outside of them autograd, under which hooks of saved
    tensors and all custom functions run.
    """
    if in_transform() or is_tracing():

        def first_and_all(point: Tensor) -> tuple[Tensor, Tensors]:
            values = function(point)
            return values[0], values

        _, pull, values = vjp(first_and_all, x, has_aux=True)  # pyright: ignore[reportAssignmentType] (by `has_aux`)
        return values, lambda gradient: pull(gradient)[0]
    x = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
    values = function(x)

    def pull_recorded(gradient: Tensor) -> Tensor:
        if not values[0].requires_grad:
            return torch.zeros_like(x)
        return torch.autograd.grad(values[0], x, gradient, create_graph=True, materialize_grads=True)[0]

    return values, pull_recorded


def _differentiate(
    model: Callable[[Tensor], Any], x: Tensor, directions: Tensor, order: int, weights: Tensor | None
) -> Jet:
    shape = torch.Size()  # of an output row

    def rows(point: Tensor) -> Tensors:
        """The outputs, (...), (..., O) or (..., *S) for inputs (..., I), as (..., O)."""
        nonlocal shape
        with ExactNorms():
            output = model(point)
        output = getattr(output, "logits", output)
        if isinstance(output, tuple):  # a layer of pykan
            output = output[0]
        lead = point.shape[:-1]
        if not isinstance(output, Tensor) or output.shape[: len(lead)] != lead:
            given = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(
                f"The model returns {given} for `x` of shape {tuple(point.shape)}, but must return (..., O) for "
                "(..., I): a row of outputs for each row of inputs."
            )
        shape = output.shape[len(lead) :]
        return (output.reshape(*lead, shape.numel()),)

    jets = []
    # one gradient serves all directions, but those of slopes do not: up to order 2 that pays
    for group in [directions] if order <= 2 else directions.split(1):
        function = rows
        for n in range(order):
            function = _slopes(function, group, of_value=n == 0)
        jets.append(function(x)[::-1])
    value, *derivatives = zip(*jets, strict=True)
    jet = [value[0], *map(torch.cat, derivatives)]
    if weights is not None:
        jet[-1] = torch.tensordot(weights, jet[-1], 1)
    return [part.reshape(*part.shape[:-1], *shape) for part in jet]


def _slopes(function: Callable[[Tensor], Tensors], directions: Tensor, of_value: bool) -> Callable[[Tensor], Tensors]:
    """The function that returns one more derivative, (D, ..., O), in front of what a function returns, highest first.

    That function is `of_value` (..., O) alone, whose gradient serves all directions.
    """

    def slopes(point: Tensor) -> Tensors:
        values, pull = pull_back(function, point)
        y, count = values[0], len(directions)
        if y.shape[-1] > 1:
            # the map of a gradient in y to one in x is linear: this is its transpose
            _, push = pull_back(lambda gradient: (pull(gradient),), torch.zeros_like(y))
            parts = [push(v.expand_as(point)) for v in directions]
            return torch.stack(parts if of_value else [part[d] for d, part in enumerate(parts)]), *values
        # of one output the gradient itself costs less
        if of_value:
            gradients = [pull(torch.ones_like(y))] * count
        else:
            one_hot = torch.eye(count, dtype=y.dtype, device=y.device).view(count, count, *[1] * (y.dim() - 1))
            gradients = [pull(one.expand_as(y)) for one in one_hot]
        return torch.stack([g @ v for g, v in zip(gradients, directions, strict=True)]).unsqueeze(-1), *values

    return slopes


def activation_derivatives(module: nn.Module, z: Tensor, highest: int) -> Sequence[Tensor]:
    """A module that maps each number by itself, with derivatives up to an order, in closed form for the usual ones."""
    kind: Any = type(module)
    if kind is nn.Tanh:
        return logistic_derivatives(torch.tanh(z), highest, of_tanh=True)
    if kind is nn.SiLU:
        return silu_derivatives(z, highest)
    if kind is nn.Sigmoid:
        return logistic_derivatives(torch.sigmoid(z), highest)
    if kind is nn.Softplus:
        beta, threshold = cast(Any, module).beta, cast(Any, module).threshold
        slopes = logistic_derivatives(torch.sigmoid(beta * z), highest)
        linear = beta * z > threshold  # where torch leaves the logarithm out
        found = [(beta**d * slope).masked_fill(linear, float(d == 0)) for d, slope in enumerate(slopes)]
        return [module(z), *found[:highest]]
    if kind is nn.GELU and module.approximate == "none":
        shares = [(1 + torch.erf(z / math.sqrt(2))) / 2, torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)]
        for n in range(highest - 1):  # the normal density has f' = -z f
            shares.append(-z * shares[-1] - (n * shares[-2] if n else 0.0))
        return times_argument(z, shares[: highest + 1])
    return elementwise_derivatives(module, z, highest)


def elementwise_derivatives(function: Callable[[Tensor], Tensor], z: Tensor, highest: int) -> list[Tensor]:
    """A function that maps each number by itself, to one or several, and its derivatives up to an order."""
    of_rows = lambda point: function(point.squeeze(-1))  # noqa: E731
    value, *others = jet_by_transforms(of_rows, z.unsqueeze(-1), z.new_ones(1, 1), highest, None)
    return [value, *(part.squeeze(0) for part in others)]


class ExactNorms(TorchFunctionMode):
    """
    Evaluates layer normalization by operations whose derivatives of any order are right.

    In torch 2.13, the fused one is wrong in second derivatives by forward mode in forward mode, and by any mode in
    third derivatives, which are the gradients of a second-order residual.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        exact = _layer_norm if func in (F.layer_norm, torch.layer_norm) else func
        return exact(*args, **(kwargs or {}))


def _layer_norm(input, normalized_shape, weight=None, bias=None, eps=1e-5, cudnn_enable=True):  # as torch names them
    axes = tuple(range(-len(normalized_shape), 0))
    centered = input - input.mean(axes, keepdim=True)
    y = centered * torch.rsqrt(centered.square().mean(axes, keepdim=True) + eps)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias
