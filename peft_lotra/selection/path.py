# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Fit the linear path of a network to labeled rows."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from ..derivatives.norms import check_rows_apart
from ..modules.calls import check_loaded, evaluating_without_trace, unwrap
from ..modules.checks import check_function
from ..tuner.gradients import NoGradientError, start_from_gradient
from ..tuner.linear_path import LinearPath
from .path_solver import PathFit, solve_paths
from .training import CHUNK, losses_of_rows


@torch.inference_mode(False)  # which enables gradients, too
def fit_path(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    loss: Callable[[Any, Tensor], Tensor],
    *,
    weights: Tensor | None = None,
) -> PathFit:
    r"""Fit the path of a [`LinearPath`], scale * network(x) + W x + b, in closed form: no rate, no steps, no seed.

    W and b minimize the loss plus a ridge penalty, in standardized inputs, whose mean and deviation are folded into W
    and b. The scale (0.05, 0.5, 1, or the one that fits best alone) and the strength of the penalty have the least
    loss of rows left out. With the leverage h_i of row i, the other rows predict it with the error

        e_i / (1 - h_i)    for squares,

    and by one Newton step for other losses. The derivatives of the loss tell which one it is:

    - Squares (`mse_loss`): ridge regression. b has no penalty.
    - `cross_entropy`, also with label smoothing, shares of classes as targets, or weights of classes: softmax.
    - Any other loss that is smooth and convex in the outputs: `huber_loss`, `poisson_nll_loss` for counts, or
      `binary_cross_entropy_with_logits` for several labels.

    In an adapted model, the path of the active adapter is fitted, next to the present update. The fitted path no
    longer requires gradients, so that training the adapter leaves it as it is. `model.set_adapter(name)` makes it
    trainable.

    Args:
        model: A `LinearPath`, or a model that `get_peft_model` has made of one.
        x: Inputs (rows, in). Of more dimensions, (batch, ..., in), each one before the last counts as rows.
        y: Targets of the shape of the outputs, or classes.
        loss: The loss of outputs and targets, a mean or a sum over the rows.
        weights: The weight of each row, at least 0.

    Returns:
        A `PathFit`: scale, weight, bias, strength, and the losses of the rows, each left out.

    Raises:
        TypeError: `loss` is no function.
        ValueError: `model` has no path; the active adapter has none; there are fewer than 3 rows; inputs are constant;
            targets have another shape; values are not finite; the network returns no tensor, or mixes rows; the loss
            is no mean or sum over rows, not convex, or has no second derivatives. The model is unchanged.

    Warns:
        UserWarning: A class has no row.

    Example:
        >>> from peft import get_peft_model
        >>> from peft_lotra import LinearPath, LoTRAConfig, fit_path
        >>> from peft_lotra.kan import KAN
        >>> model = get_peft_model(LinearPath(KAN([2, 4, 1])), LoTRAConfig())
        >>> x = torch.rand(40, 2)
        >>> y = 3 * x[:, :1] - x[:, 1:] + 5
        >>> fit = fit_path(model, x, y, torch.nn.functional.mse_loss)
        >>> fit.losses.mean().item() < 1e-2, model(x).isclose(y, atol=0.5).all().item()
        (True, True)
    """
    network = unwrap(model)
    if not isinstance(network, LinearPath):
        raise ValueError(f"`model` is a {type(network).__name__} without a path. Adapt `LinearPath(network)`.")
    check_loaded(network, "model")
    check_function(loss, "loss", 2)
    path = network.path
    wrapper: Any = network.linear_path
    if path is not wrapper and path is wrapper.original_module:
        raise ValueError("The active adapter has no path: it was saved without one, or no adapter is active.")
    if weights is None:
        weights = torch.ones(x.shape[:-1] if isinstance(x, Tensor) else ())
    _check_rows(network, x, y, weights)
    rows, outputs = _evaluate(network, x)
    y = y.clone().reshape(len(rows), *y.shape[x.dim() - 1 :])  # of inference mode, it could not be differentiated
    (fit,) = solve_paths(rows, outputs, y, loss, weights.flatten().unsqueeze(0))

    with torch.inference_mode(False):
        path.set(fit.scale, fit.weight, fit.bias)
    return fit


def _check_rows(network: LinearPath, x: Any, y: Any, weights: Any) -> None:
    """Raise a ValueError for rows that a path cannot be fitted to."""
    for name, tensor in {"x": x, "y": y, "weights": weights}.items():
        if not isinstance(tensor, Tensor) or not tensor.isfinite().all():
            raise ValueError(f"`{name}` is {tensor!r:.100}, but must be a tensor of finite numbers.")
    if not x.is_floating_point() or x.dim() < 2 or x.shape[-1] != network.in_features:
        raise ValueError(
            f"`x` is {tuple(x.shape)} of {x.dtype}, but must be (rows, {network.in_features}) of a floating type."
        )
    shape = x.shape[:-1]
    if y.shape[: len(shape)] != shape or weights.shape != shape:
        raise ValueError(
            f"`x` has the rows {tuple(shape)}, but `y` has the shape {tuple(y.shape)} and `weights` "
            f"{tuple(weights.shape)}. They must begin alike."
        )
    counted = (weights > 0).sum().item()
    if counted < 3 or weights.min() < 0:
        raise ValueError(
            f"There are {counted} rows of a weight above 0, but a path needs at least 3, and none below 0."
        )
    rows = x.flatten(0, -2)
    if (rows == rows[0]).all():
        raise ValueError("`x` has constant inputs: all rows are equal, and a linear function cannot tell them apart.")


def _evaluate(network: LinearPath, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return inputs (rows, in) and outputs (rows, out) of the network without its path.

    Raises:
        ValueError: The network mixes rows, or returns values that are not finite, or no tensor (batch, ..., out).
    """
    check_rows_apart(network)
    with evaluating_without_trace(network):
        chunks = [network.network(chunk) for chunk in x.split(CHUNK)]
        first = network.network(x[:1])
    network.check_shapes(x[:1], first)
    outputs = torch.cat(chunks)
    largest = outputs.abs().max()
    if not largest.isfinite():
        raise ValueError("The network returns values that are not finite for some rows of `x`. Remove these rows.")
    if (outputs[:1] - first).abs().max() > 0.01 * largest:
        raise ValueError("The network mixes rows: its output for the first row depends on the others.")
    return x.flatten(0, -2), outputs.flatten(0, -2)


def start_from_data(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    loss: Callable[[Any, Tensor], Tensor],
    *,
    weights: Tensor | None = None,
) -> PathFit:
    """Fit the path of an adapted [`LinearPath`] by [`fit_path`], and start the adapter from the gradient of the rest.

    Afterwards the path stays, the adapter has no update yet, and [`create_lotra_optimizer`] trains it at a rate of
    3e-3, the best one on a path.

    Args:
        model: A model that `get_peft_model` has made of a `LinearPath`, with one active adapter.
        x, y, loss, weights: See `fit_path`.

    Returns:
        The `PathFit`.

    Raises:
        ValueError: See `fit_path` and [`start_from_gradient`]. The model is unchanged.

    Example:
        >>> from peft import get_peft_model
        >>> from peft_lotra import LinearPath, LoTRAConfig, create_lotra_optimizer, start_from_data
        >>> from peft_lotra.kan import KAN
        >>> model = get_peft_model(LinearPath(KAN([2, 4, 1])), LoTRAConfig(r=("full", "full", 1)))
        >>> x = torch.rand(40, 2)
        >>> y = x.prod(dim=1, keepdim=True) + x.sum(dim=1, keepdim=True)
        >>> fit = start_from_data(model, x, y, torch.nn.functional.mse_loss)
        >>> optimizer = create_lotra_optimizer(model, torch.optim.Adam)
    """
    network: Any = unwrap(model)
    former = deepcopy(network.path) if isinstance(network, LinearPath) else None
    fit = fit_path(model, x, y, loss, weights=weights)

    def compute_loss(rows: Tensor) -> Tensor:
        outputs = model(x[rows])
        if weights is None:
            return loss(outputs, y[rows]) * (len(rows) / len(x))
        return weights[rows].to(outputs) @ losses_of_rows(loss, outputs, y[rows]) / weights.sum()

    try:
        start_from_gradient(model, compute_loss, torch.arange(len(x)).split(CHUNK))
    except NoGradientError:
        pass  # the path is all that the rows ask for
    except BaseException:
        assert former is not None
        network.path.load_state_dict(former.state_dict())
        for parameter, former_parameter in zip(network.path.parameters(), former.parameters(), strict=True):
            parameter.requires_grad_(former_parameter.requires_grad)
        raise
    return fit
