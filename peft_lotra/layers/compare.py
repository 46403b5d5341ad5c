# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Compares descriptions with what layers compute.

A user's description must be right. That of a built-in kind is corrected, since most KAN layers are copied files: some
copies drop the residual branch or the scales of the edges and keep the parameter, let a normalization or an activation
follow, or store (out, in) the other way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from .coefficients import CoefficientTensor
from .description import KANLayerSpec, spec_from_file
from .inference import infer_spec
from .probe import Probe, Undecided, Verdict, remembered


T = TypeVar("T")


def _asked(
    layer: nn.Module, spec: KANLayerSpec, tensor: CoefficientTensor, question: Callable[[Probe, CoefficientTensor], T]
) -> T:
    """The answer to a question about layers of this class and description; an `Undecided` if it cannot be run now."""

    def find() -> T:
        probe = Probe(layer, spec.read_grid(layer))
        probe.values(tensor)  # or Undecided
        return question(probe, tensor)

    return remembered(layer, (question.__name__, spec.family, *tensor.parameters.values()), find)


def _contradictions(probe: Probe, tensor: CoefficientTensor) -> tuple[Verdict, list[str]]:
    """The verdict on the axes, and the parameters without effect."""
    return probe.axes(tensor), probe.unused(tensor) if len(tensor.parameters) > 1 else []


def is_linear(layer: nn.Module, spec: KANLayerSpec, tensor: CoefficientTensor) -> bool:
    """Whether the output is an affine function of the coefficients, or that cannot be found out now."""
    try:
        return spec.is_of_this_package(layer) or _asked(layer, spec, tensor, Probe.is_linear) is not False
    except Undecided:
        return all(len(part) == 1 for part in tensor.parts)  # not several layers in one module


def check_layer(name: str, layer: nn.Module, spec: KANLayerSpec, tensor: CoefficientTensor) -> None:
    """Raises a `ValueError` if what a layer, of this name in its model, computes contradicts its description."""
    if spec.is_of_this_package(layer):
        return
    try:
        axes, unused = _asked(layer, spec, tensor, _contradictions)
    except Undecided:
        return
    if axes.contradiction:
        pattern, shape = tensor.parameters[tensor.name].pattern, tuple(tensor.get_parameter(layer).shape)
        problem = (
            f"does not compute what its description says: `{tensor.name}` {shape} is not laid out as {pattern!r}, "
            f"since {axes.contradiction}. `check_kan_layer(layer)` shows a description that fits."
        )
    elif unused:
        problem = (
            f"does not use {', '.join(f'`{parameter}`' for parameter in unused)}: its output does not depend on it. "
            "Describe the kind without it (`register_kan_layer`), or leave the layer out of `target_modules`."
        )
    else:
        return
    raise ValueError(f"The layer `{name}` ({type(layer).__name__}, of the kind {spec.family!r}) {problem}")


def as_computed(spec: KANLayerSpec, layer: nn.Module) -> KANLayerSpec:
    """The description of a layer of a built-in kind, corrected by what the layer computes.

    If the gradients agree with another description alone, it is that one. Parameters without effect are left out,
    unless none has any. A layer that cannot be run is as described.
    """
    if spec.is_of_this_package(layer):
        return spec
    try:
        return remembered(layer, ("computed", spec.family), lambda: _as_computed(spec, layer))
    except (Undecided, ValueError):  # it may be run later; a pattern does not fit
        return spec


def _as_computed(spec: KANLayerSpec, layer: nn.Module) -> KANLayerSpec:
    axes, unused = _asked(layer, spec, spec.locate(layer), _contradictions)
    if not axes.is_verified and (inferred := infer_spec(layer)):
        return inferred
    changes: dict[str, Any] = {}
    if used := [list(part) for part in spec.parts if part[0] not in unused]:
        described = {"residual": spec.residual, "edge_scale": spec.edge_scale}
        changes = {name: None for name, pair in described.items() if pair and pair[0] in unused}
        changes |= {"coefficients": used} if len(used) < len(spec.parts) else {}
    description = {name: value for name, value in (spec.describe(layer) | changes).items() if value is not None}
    return spec_from_file(spec.family, description) if changes else spec
