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

from torch import nn

from .coefficients import CoefficientTensor
from .description import KANLayerSpec
from .inference import infer_spec
from .probe import Probe, Undecided, remembered


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
