# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Compares descriptions with what layers compute.

A description must be right. Where that of a built-in kind is not, since most KAN layers are copied files, the layer is
one of no registered kind: some copies drop the residual branch or the scales of the edges and keep the parameter, or
store (out, in) the other way.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from .coefficients import CoefficientTensor
from .description import KANLayerSpec
from .inference import infer_spec
from .probe import Probe, Undecided, remembered


# Rows at which a formula is compared with its layer: around the grid, and at each of two distances from it.
_NEAR, _FAR = 48, 8
_BLOCK = 8  # rows whose largest output is the measure of their differences


def _asked(layer: nn.Module, spec: KANLayerSpec, tensor: CoefficientTensor, question: Callable[..., Any]) -> Any:
    """The answer to a question about layers of this class and description; an `Undecided` if it cannot be run now."""

    def find() -> Any:
        probe = Probe(layer, spec.read_grid(layer))
        probe.values(tensor)  # or Undecided
        return question(probe, tensor)

    return remembered(layer, (question.__name__, spec.family, *tensor.parameters.values()), find)


def _comparison(probe: Probe, tensor: CoefficientTensor) -> tuple[bool, str]:
    """Whether a layer computes what its description says, as far as can be seen, and what contradicts it."""
    reached = probe.reached([*tensor.parameters], tensor) if len(tensor.parameters) > 1 else {}
    unused = ", ".join(f"`{name}`" for name, is_reached in reached.items() if is_reached is None)
    axes, problem = probe.axes(tensor), ""
    if axes.contradiction:
        pattern, shape = tensor.parameters[tensor.names[0]].pattern, tuple(tensor.get_parameter(probe.layer).shape)
        problem = (
            f"does not compute what its description says: `{tensor.names[0]}` {shape} is not laid out as {pattern!r}, "
            f"since {axes.contradiction}. `check_kan_layer(layer)` shows a description that fits."
        )
    elif unused:
        problem = (
            f"does not use {unused}: its output does not depend on it. "
            "Describe the kind without it (`register_kan_layer`), or leave the layer out of `target_modules`."
        )
    return axes.is_verified and not unused, problem


def is_linear(layer: nn.Module, spec: KANLayerSpec, tensor: CoefficientTensor) -> bool:
    """Whether the output is an affine function of the coefficients, or that cannot be found out now."""
    try:
        return spec.is_of_this_package(layer) or _asked(layer, spec, tensor, Probe.is_linear) is not False
    except Undecided:
        return all(len(part) == 1 for part in tensor.parts)  # not several layers in one module


def check_layer(name: str, layer: nn.Module, spec: KANLayerSpec, tensor: CoefficientTensor) -> None:
    """Raises a `ValueError` if what a layer, of this name in its model, computes contradicts its description."""
    problem = ""
    if not spec.is_of_this_package(layer):
        with suppress(Undecided):
            _, problem = _asked(layer, spec, tensor, _comparison)
    if problem:
        raise ValueError(f"The layer `{name}` ({type(layer).__name__}, of the kind {spec.family!r}) {problem}")


def as_computed(spec: KANLayerSpec, layer: nn.Module) -> KANLayerSpec:
    """The kind of a layer by what it computes, if its built-in kind says otherwise; else, or if unknown, that kind."""

    def find() -> KANLayerSpec | None:
        is_right, _ = _asked(layer, spec, spec.locate(layer), _comparison)
        return None if is_right else infer_spec(layer)

    try:
        return spec.is_of_this_package(layer) and spec or remembered(layer, ("computed", spec.family), find) or spec
    except (Undecided, ValueError):  # it may be run later; a pattern does not fit
        return spec


def points_around(low: Any, high: Any, width: int) -> Tensor:
    """Return points (64, width) in float64 on the CPU.

    48 rows cover the grid and its length on either side. The others lie far from it, so that a layer that clamps or
    squashes its inputs is noticed.

    Args:
        low, high: Both ends of the grid, each a number or a tensor (width,).
        width: Number of inputs.
    """
    low, high = (torch.as_tensor(end, dtype=torch.float64, device="cpu").expand(width) for end in (low, high))
    rows = _NEAR + 2 * _FAR
    # steps of the golden ratio, so that no input repeats another's points
    share = torch.arange(rows * width, dtype=torch.float64, device="cpu").mul(0.6180339887498949).frac()
    share = share.view(rows, width)
    points = torch.lerp(low, high, 3 * share - 1)

    sign = torch.tensor([-1.0, 1.0], dtype=torch.float64, device="cpu").repeat(_FAR).unsqueeze(1)
    lengths = torch.tensor([15.0, 500.0], dtype=torch.float64, device="cpu").repeat_interleave(_FAR).unsqueeze(1)
    points[_NEAR:] = (low + high) / 2 + sign * lengths * (1 + share[_NEAR:]) * (high - low).clamp(min=2)
    return points


def agree(result: Tensor, expected: Tensor, tolerance: float, floor: float = 0.0) -> bool:
    """Return whether two results (..., 64, out) at `points_around` agree, near the grid and far from it.

    Each difference is a share of the largest number among eight rows, or among those near the grid. Numbers that are
    not finite in `expected`, such as the slope of acos(tanh(1000)), are not compared.

    Args:
        result: What the formula gives.
        expected: What the layer gives.
        tolerance: The largest share.
        floor: The smallest number that a difference is a share of.
    """
    if result.shape != expected.shape:
        return False
    difference = torch.where(expected.isfinite(), result - expected, 0)
    parts = (difference, expected.nan_to_num(0, 0, 0))
    error, size = (part.movedim(-2, 0).unflatten(0, (-1, _BLOCK)).flatten(1).abs().amax(1) for part in parts)
    near = size[: _NEAR // _BLOCK].max().clamp(min=floor)
    return bool((error <= tolerance * size.clamp(min=near)).all())
