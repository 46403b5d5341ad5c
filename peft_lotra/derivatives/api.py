# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Derivatives of a KAN with respect to its inputs, pushed through the layers together with the value (jets)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..kan.input_map import FirstMap, InputMap
from ..kan.recording_hook import current_hook
from ..modules.calls import check_module, is_tracing
from ..modules.checks import check_count
from .chain_rule import Jet, compose, row_counts
from .layers import evaluate_layer
from .norms import NORMS, check_rows_apart, through_norm
from .stages import Stage, composed_jet, entry_of, stages_of
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
    r"""Compute the value of a KAN and its derivatives along straight lines, in one forward pass.

    With u(t) = model(x + t v) for each direction v, each layer maps (u, u', u'', ...) of its input to

        y = A b(z),   y' = A [b'(z) z'],   y'' = A [b''(z) z'^2 + b'(z) z''],   ...

    where b are the basis functions and the residual function, whose derivatives are known in closed form. The result
    is differentiable in parameters and inputs, and runs under `torch.func` and `torch.compile(fullgraph=True)`.

    Fast for `KAN`, `SlimKAN`, single layers, `nn.Sequential` of them, normalizations between them
    (`nn.LayerNorm` of the last dimension, batch normalization in evaluation mode), `nn.Linear` and activations, these
    with adapters (LoTRA, or LoRA on `target_parameters`), and what `peft_lotra.pde` composes of
    them. Networks of other libraries are fast too, if their layers are described with `derivatives` and run one
    after the other (efficient-kan, FastKAN, ChebyKAN, FourierKAN, PINA). Layers and network are first compared with
    the description. Any other module is differentiated by transforms, with a warning for each class.

    Args:
        model: Maps (..., I) to (..., O), each row separately.
        x: Points, shape (..., I), usually (N, I).
        directions: The D directions v, shape (D, I), of any length; by default the I coordinate axes. Derivatives are
            in the parameter t.
        order: The highest derivative, 1 to 4. It is continuous for splines of degree `order + 1`. Splines of a degree
            below `order` do not have it, and a warning says so.
        collapse: Whether to return the sum of the derivatives of the highest order over the directions instead of each
            of them, which is faster (collapsed Taylor mode). D numbers make it a weighted sum: (1, 0) for u_xx and no
            u_tt.

    Returns:
        u (..., O), du (D, ..., O), d2u (D, ..., O) and so on, the last (..., O) with `collapse`.

    Raises:
        ValueError: `directions`, `collapse` or the outputs have a wrong shape, `order` is out of range, or batch
            normalization in training mode makes each row depend on the others.
        TypeError: `model` is no module, or `x` no floating point tensor with a dimension.

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
    check_module(model)
    if not isinstance(x, Tensor) or not x.dim():
        raise TypeError(f"`x` is {x!r:.100}, but must be a tensor with coordinates in its last dimension.")
    if not x.is_floating_point():
        raise TypeError(f"`x` is a tensor of {x.dtype}, but must be floating point.")
    if check_count(order, "order") > HIGHEST_ORDER:
        raise ValueError(f"`order` is {order}, but must be 1 to {HIGHEST_ORDER}: nest `torch.func.jvp` for more.")
    directions = _check_directions(x, directions)

    weights = None
    if collapse is not False:
        count = len(directions)
        numbers = [1.0] * count if collapse is True else collapse
        weights = torch.as_tensor(numbers, dtype=x.dtype, device=x.device)
        if weights.shape != (count,) or order == 1:
            raise ValueError(
                f"`collapse` has {weights.numel()} weights for {count} directions and order {order}. It must have "
                "one for each direction, and order 2 or more. For a sum of slopes, give one direction."
            )
    derivatives = _compute(model, x, directions, order, weights)
    return tuple(derivatives)  # `torch.func.vmap` has tuples of `out_dims`


def _compute(
    model: nn.Module,
    x: Tensor,
    directions: Tensor,
    order: int,
    weights: Tensor | None,
) -> Jet:
    composed = composed_jet(model)
    if composed is not None:
        *lower, highest = composed(x, directions, order, weights)
        if weights is not None:  # (1, ..., O) or (..., O)
            highest = highest.reshape(lower[0].shape)
        return [*lower, highest]

    stages = stages_of(model)
    if stages is None or not any(stage.formula for stage in stages):
        check_rows_apart(model)
        kind = type(model)
        if entry_of(kind).jet is None:  # else hooks, which `solve` uses too, prevent the closed form
            _warn(
                kind,
                f"`jet` knows no closed form for a {kind.__name__}, and differentiates it by transforms of "
                "`torch.func`, which are exact but slower.",
            )
        _warn_of_low_degree(model.modules(), order)
        return jet_by_transforms(model, x, directions, order, weights)

    _warn_of_low_degree([stage.module for stage in stages], order)
    *batch, width = x.shape
    sizes = [stage.in_features for stage in stages if stage.in_features is not None]
    if sizes and sizes[0] != width:
        raise ValueError(f"`x` has shape {tuple(x.shape)}, but its last dimension must be {sizes[0]}.")

    rows = x if x.dim() == 2 else x.reshape(-1, width)
    through = partial(through_stages, stages, order)
    hook = current_hook()
    derivatives = None
    if hook is not None:
        derivatives = hook.jet(through, rows, directions, weights)
    if derivatives is None:
        derivatives = through(evaluate_layer, rows, directions, weights)

    if x.dim() == 2:
        return derivatives
    reshaped = []
    for derivative in derivatives:
        *leading, _, outputs = derivative.shape
        reshaped.append(derivative.reshape(*leading, *batch, outputs))
    return reshaped


def _check_directions(x: Tensor, directions: Tensor | None) -> Tensor:
    """Return the directions (D, I) in the space of inputs x (..., I), by default its axes."""
    width = x.shape[-1]
    if directions is None:
        return torch.eye(width, dtype=x.dtype, device=x.device)
    directions = torch.as_tensor(directions).to(x)
    if directions.dim() != 2 or directions.shape[1] != width or not len(directions):
        raise ValueError(
            f"`directions` has shape {tuple(directions.shape)}, but must be (D, {width}): one direction in the "
            "space of inputs in each row, at least one."
        )
    return directions


def _warn_of_low_degree(modules: Iterable[nn.Module], order: int) -> None:
    for module in modules:
        degree = getattr(module, "spline_order", order)
        if isinstance(degree, int) and degree < order:
            _warn(
                (order, degree),
                f"Splines of degree {degree} have no derivative of order {order}: it is zero between the knots, and a "
                f"residual does not see its jumps there. Make the layers with `spline_order={order + 1}`.",
                stacklevel=5,
            )


def _warn(key: Any, message: str, stacklevel: int = 4) -> None:
    """Warn once for each key."""
    if not is_tracing() and key not in _warned:
        _warned.add(key)
        warnings.warn(message, stacklevel=stacklevel)


def through_stages(
    stages: list[Stage],
    order: int,
    evaluate: Callable[..., Jet],
    x: Tensor,
    directions: Tensor | None,
    weights: Tensor | None,
) -> Jet:
    """Compute the jet of a chain at x (N, I). `evaluate` does for its layers what `evaluate_layer` does."""
    jet = [x] if directions is None else [x, directions.unsqueeze(1)]  # straight lines
    for stage in stages:
        module = stage.module
        if stage.formula is not None:
            jet = evaluate(stage.formula, jet, order, weights)
        elif isinstance(module, FirstMap):
            jet = module.jet(x, directions, order, weights)
        elif isinstance(module, NORMS):
            jet = through_norm(module, jet, order, weights)
        else:
            # each output is a function of one input
            if isinstance(module, InputMap):
                jet = [module.select(derivative) for derivative in jet]
                functions = module.evaluate(jet[0], order)
            else:
                functions = activation_derivatives(module, jet[0], order)
            jet = compose(functions, jet[1:], order, weights)

    # the derivatives of high orders that are zero
    counts = row_counts(jet, order, weights)
    for count in counts[len(jet) :]:
        jet.append(torch.zeros_like(jet[1][:count]))
    if weights is None:
        return jet
    *lower, highest = jet
    return [*lower, highest[0]]


def laplacian(model: nn.Module, x: Tensor) -> Tensor:
    """Compute the sum of the second derivatives along the coordinate axes, as in `jet(model, x, collapse=True)`.

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


def hessian(
    model: nn.Module,
    x: Tensor,
    directions: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Compute all second derivatives, by polarization: u_vw = 2 D^2_{(v+w)/2} u - (D^2_v u + D^2_w u) / 2.

    Args:
        model, x, directions: As for `jet`. It costs a jet of D (D + 1) / 2 directions.

    Returns:
        u (..., O), du (D, ..., O) and d2u (D, D, ..., O), which is symmetric: d2u[a, b] is the second derivative along
        directions a and b.

    Raises:
        ValueError, TypeError: As `jet`.

    Example:
        >>> import torch
        >>> from peft_lotra.kan import KAN, hessian
        >>> tuple(hessian(KAN([3, 5, 1]), torch.rand(100, 3))[2].shape)
        (3, 3, 100, 1)
    """
    directions = _check_directions(x, directions)
    count = len(directions)
    first, second = torch.triu_indices(count, count, device=x.device)
    middles = (directions[first] + directions[second]) / 2
    u, du, d2u = jet(model, x, middles)

    index = first.new_empty(count, count)
    index[first, second] = index[second, first] = torch.arange(len(first), device=x.device)
    on_axes = index.diagonal()
    pure = d2u[on_axes]
    entries = 2 * d2u - (pure[first] + pure[second]) / 2
    is_pure = (first == second).view(-1, *[1] * u.dim())
    entries = torch.where(is_pure, d2u, entries)  # as it is, also where it is infinite
    return u, du[on_axes], entries[index]
