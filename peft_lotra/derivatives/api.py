# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Derivatives of a KAN with respect to its inputs, pushed through the layers together with the value (jets)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..kan.input_map import InputMap
from ..kan.recording_hook import current_hook
from ..modules.calls import check_module, is_tracing
from ..modules.checks import check_count
from .chain_rule import Jet, compose, row_counts
from .layers import evaluate_layer
from .norms import NormLayer, check_rows_apart, through_norm
from .stages import Stage, composed_jet, stages_of
from .torch_fallback import activation_derivatives, jet_by_transforms


_warned: set[Any] = set()
HIGHEST_ORDER = 4


def jet(
    model: nn.Module,
    x: Tensor,
    directions: Tensor | None = None,
    *,
    order: int = 2,
    collapse: bool | Sequence[float] | Tensor = False,
) -> tuple[Tensor, ...]:
    r"""The value of a KAN and its derivatives along straight lines up to an order, in one forward pass.

    With u(t) = model(x + t v) for each direction v, each layer takes (u, u', u'', ...) to that of its output by

        y = A b(z),   y' = A [b'(z) z'],   y'' = A [b''(z) z'^2 + b'(z) z''],   ...

    where b are the basis functions and the residual function, whose derivatives are known in closed form. The result
    is differentiable in parameters and inputs, and runs under `torch.func` and `torch.compile(fullgraph=True)`.

    Fast for `KAN`, `KANModel`, `SlimKAN`, single layers, `nn.Sequential` of them, normalizations between them
    (`nn.LayerNorm` of the last dimension, batch normalization in evaluation mode), `nn.Linear` and activations, these
    with adapters (LoTRA, or LoRA on `target_parameters`) without dropout, and what `peft_lotra.pde` composes of
    them. So are networks of other libraries whose layers are described with `derivatives` and run one
    after the other (efficient-kan, FastKAN, ChebyKAN, FourierKAN, PINA), once layers and network have been compared
    with what is described. Any other module (a class of your own that computes more, modules with hooks) is
    differentiated by transforms, with a warning for each class.

    Args:
        model: Maps (..., I) to (..., O), each row by itself.
        x: Points, shape (..., I), usually (N, I).
        directions: The D directions v, shape (D, I), of any length; by default the I coordinate axes. Derivatives are
            in the parameter t.
        order: The highest derivative, 1 to 4. It is continuous for splines of degree `order + 1`; those of a degree
            below `order` do not have it, of which there is a warning.
        collapse: Whether to return the sum of the derivatives of the highest order over the directions instead of each
            of them, which is faster (collapsed Taylor mode). D numbers make it a weighted sum: (1, 0) for u_xx and no
            u_tt.

    Returns:
        u (..., O), du (D, ..., O), d2u (D, ..., O) and so on, the last (..., O) with `collapse`.

    Raises:
        ValueError: `x`, `directions` or `collapse` has a wrong shape, or the outputs have, or batch normalization in
            training mode makes each row depend on the others. `order` is out of range.
        TypeError: `model` is no module, `x` no floating point tensor, `directions` are no tensor, or `collapse` no
            weights.

    Source: A. Griewank and A. Walther, "Evaluating Derivatives" (2008), chapter 13; collapsed Taylor mode, arXiv
    2505.13644.

    Example:
        >>> import torch
        >>> from peft_lotra.kan import KAN, jet
        >>> u, du, d2u = jet(KAN([2, 5, 1]), torch.rand(100, 2))
        >>> tuple(d2u.shape)  # d2u[0] is d^2 u / d x_0^2
        (2, 100, 1)
        >>> u, (u_x, u_t), _, u_xxx = jet(KAN([2, 5, 1]), torch.rand(100, 2), order=3, collapse=(1, 0))
    """
    return tuple(_jet(model, x, directions, order, collapse))  # a list `torch.func.vmap` would want in `out_dims`


def _jet(model: nn.Module, x: Tensor, directions: Tensor | None, order: int, collapse: Any) -> Jet:
    directions = _checked_directions(x, directions)
    order = check_count(order, "order")
    if order > HIGHEST_ORDER:
        raise ValueError(f"`order` is {order}, but must be 1 to {HIGHEST_ORDER}: nest `torch.func.jvp` for more.")
    check_module(model)
    composed = composed_jet(model)
    stages = None if composed else stages_of(model)
    if not composed and (stages is None or not any(stage.formula for stage in stages)):
        stages = None
        check_rows_apart(model)
        _warn(
            type(model),
            f"`jet` knows no closed form for a {type(model).__name__}, and differentiates it by transforms of "
            "`torch.func`, which are exact but slower.",
        )
    for module in model.modules() if stages is None else [stage.module for stage in stages]:
        degree = getattr(module, "spline_order", order)
        if isinstance(degree, int) and degree < order:
            _warn(
                (order, degree),
                f"Splines of degree {degree} have no derivative of order {order}: it is zero between the knots, and a "
                f"residual does not see its jumps there. Make the layers with `spline_order={order + 1}`.",
            )
    parameter = next(model.parameters(), None)
    if stages and parameter is not None and torch.promote_types(x.dtype, parameter.dtype) != parameter.dtype:
        raise ValueError(f"`x` is of {x.dtype}, but the model of {parameter.dtype}: cast one of them.")
    size = next((stage.in_features for stage in stages or () if stage.in_features is not None), None)
    if size not in (None, x.shape[-1]):
        raise ValueError(f"`x` has shape {tuple(x.shape)}, but its last dimension must be {size}.")
    weights = None
    if collapse is not False:
        try:
            given = [1.0] * len(directions) if collapse is True else collapse
            weights = torch.as_tensor(given, dtype=x.dtype, device=x.device)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"`collapse` must be a bool or a weight of each direction, got {collapse!r}.") from error
        if weights.shape != (len(directions),):
            raise ValueError(f"`collapse` has {weights.numel()} weights, but there are {len(directions)} directions.")
        if order == 1:
            raise ValueError("`collapse` is for order 2 and higher: for a sum of slopes, give one direction.")
    if composed:
        return composed(x, directions, order, weights)
    if stages is None:
        return jet_by_transforms(model, x, directions, order, weights)

    through, hook = partial(through_stages, stages, order), current_hook()
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    found = None if hook is None else hook.jet(through, rows, directions, weights)
    if found is None:
        found = through(evaluate_layer, rows, directions, weights)
    return found if x.dim() == 2 else [part.reshape(*part.shape[:-2], *x.shape[:-1], part.shape[-1]) for part in found]


def _checked_directions(x: Tensor, directions: Tensor | None) -> Tensor:
    """The directions (D, I) in the space of inputs x (..., I), by default its axes; raises as `jet`."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        given = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"`x` must be a floating point tensor, but is {given}.")
    if x.dim() == 0:
        raise ValueError("`x` has shape (), but its last dimension must be the model's number of inputs.")
    if directions is None:
        return torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    if not isinstance(directions, Tensor):
        raise TypeError(f"`directions` must be a tensor or None, but is of type {type(directions).__name__}.")
    if directions.dim() != 2 or directions.shape[1] != x.shape[-1] or len(directions) == 0:
        raise ValueError(
            f"`directions` has shape {tuple(directions.shape)}, but must be (D, {x.shape[-1]}): one direction in the "
            "space of inputs in each row, at least one."
        )
    return directions.to(x)


def _warn(kind: Any, message: str) -> None:
    """Warns once for each kind."""
    if not is_tracing() and kind not in _warned:
        _warned.add(kind)
        warnings.warn(message, stacklevel=4)


def through_stages(
    stages: list[Stage],
    order: int,
    evaluate: Callable[..., Jet],
    x: Tensor,
    directions: Tensor | None,
    weights: Tensor | None,
) -> Jet:
    """The jet of a chain at x (N, I), whose layers `evaluate` evaluates as `evaluate_layer` does."""
    jet = [x] if directions is None else [x, directions.unsqueeze(1)]  # straight lines
    for stage in stages:
        if stage.formula is not None:
            jet = evaluate(stage.formula, jet, order, weights)
        elif isinstance(stage.module, NormLayer):
            jet = through_norm(stage.module, jet, order, weights)
        else:
            jet = _through_functions(stage.module, jet, order, weights)
    for count in row_counts(jet, order, weights)[len(jet) :]:
        jet.append(torch.zeros_like(jet[1][:count]))
    return jet if weights is None else [*jet[:-1], jet[-1][0]]


def _through_functions(module: nn.Module, jet: Jet, order: int, weights: Tensor | None) -> Jet:
    """The jet of an activation or an `InputMap`: each output is a function of one input."""
    if isinstance(module, InputMap):
        jet = [module.select(part) for part in jet]
        functions = module.evaluate(jet[0], order)
    else:
        functions = activation_derivatives(module, jet[0], order)
    return compose(functions, jet[1:], order, weights)


def laplacian(model: nn.Module, x: Tensor) -> Tensor:
    """The sum of the second derivatives along the coordinate axes, as in `jet(model, x, collapse=True)`.

    Args:
        model, x: As for `jet`, x (..., I).

    Returns:
        Tensor (..., O).

    Raises:
        ValueError, TypeError: As `jet`.

    Example:
        >>> import torch
        >>> from peft_lotra.kan import KAN, laplacian
        >>> tuple(laplacian(KAN([3, 5, 1]), torch.rand(100, 3)).shape)
        (100, 1)
    """
    return jet(model, x, collapse=True)[2]


def divergence(model: nn.Module, x: Tensor, dims: int | None = None) -> Tensor:
    """The divergence sum_i d u_i / d x_i of a vector field.

    Args:
        model, x: As for `jet`, x (..., I).
        dims: The number n of coordinates, the first of `x`, and of components, the first outputs: 2 for a velocity
            (u, v) and a pressure that depend on (x, y, t). By default all, of which there must be as many.

    Returns:
        Tensor (..., 1).

    Raises:
        ValueError, TypeError: As `jet`. The field has not as many components as coordinates.

    Example:
        >>> import torch
        >>> from peft_lotra.kan import KAN, divergence
        >>> tuple(divergence(KAN([3, 5, 3]), torch.rand(100, 3)).shape)
        (100, 1)
    """
    return _slopes(model, x, dims).diagonal(dim1=0, dim2=-1).sum(-1, keepdim=True)


def curl(model: nn.Module, x: Tensor, dims: int | None = None) -> Tensor:
    """The curl (d_1 u_2 - d_2 u_1, d_2 u_0 - d_0 u_2, d_0 u_1 - d_1 u_0) of a field; of two coordinates the last.

    Args:
        model, x, dims: As for `divergence`, with 2 or 3 coordinates.

    Returns:
        Tensor (..., 3), or (..., 1) in two dimensions.

    Raises:
        ValueError, TypeError: As `divergence`, and for other dimensions.

    Example:
        >>> import torch
        >>> from peft_lotra.kan import KAN, curl
        >>> tuple(curl(KAN([3, 5, 3]), torch.rand(100, 3)).shape)
        (100, 3)
    """
    du = _slopes(model, x, dims)
    if len(du) not in (2, 3):
        raise ValueError(f"The curl needs 2 or 3 coordinates, but there are {len(du)}: give `dims`.")
    pairs = [(1, 2), (2, 0), (0, 1)][-1 if len(du) == 2 else 0 :]
    return torch.stack([du[i, ..., j] - du[j, ..., i] for i, j in pairs], -1)


def _slopes(model: nn.Module, x: Tensor, dims: int | None) -> Tensor:
    """The derivatives of the first n outputs in the first n coordinates, (n, ..., n)."""
    directions = None if dims is None else _checked_directions(x, None)[: check_count(dims, "dims")]
    _, du = jet(model, x, directions, order=1)
    found = du.shape[-1] if dims is None else min(len(du), du.shape[-1])
    if found != (dims or len(du)):
        raise ValueError(
            f"The field has {du.shape[-1]} components of {x.shape[-1]} coordinates, and `dims` is {dims}: give how "
            "many of both to take, the first ones."
        )
    return du[..., :found]


def hessian(model: nn.Module, x: Tensor, directions: Tensor | None = None) -> tuple[Tensor, ...]:
    """As `jet`, with all mixed second derivatives, by polarization: 2 u_vw = D^2_{v+w} u - D^2_v u - D^2_w u.

    Args:
        model, x, directions: As for `jet`. It costs a jet of D (D + 1) / 2 directions.

    Returns:
        u (..., O), du (D, ..., O) and d2u (D, D, ..., O), which is symmetric; d2u[a, b] is the second derivative along
        directions a and b.

    Raises:
        ValueError, TypeError: As `jet`.

    Example:
        >>> import torch
        >>> from peft_lotra.kan import KAN, hessian
        >>> tuple(hessian(KAN([3, 5, 1]), torch.rand(100, 3))[2].shape)
        (3, 3, 100, 1)
    """
    directions = _checked_directions(x, directions)
    count = len(directions)
    first, second = torch.tril_indices(count, count, -1, device=x.device)
    u, du, d2u = jet(model, x, torch.cat([directions, directions[first] + directions[second]]))
    mixed = (d2u[count:] - d2u[first] - d2u[second]) / 2
    # where each entry of the matrix stands among the second derivatives, the mixed ones last
    places = torch.arange(count, device=x.device).diag()
    places[first, second] = places[second, first] = torch.arange(count, len(d2u), device=x.device)
    return u, du[:count], torch.cat([d2u[:count], mixed])[places]
