# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Descriptions compared with layers: those of users must be right, those of known kinds follow what a copy computes.

Most KAN layers are copied files. Whoever drops the residual branch, or the scales of the edges, from the forward pass
often leaves the parameter behind; some let a normalization or an activation follow, or store (out, in) the other way.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from .coefficients import CoefficientTensor
from .description import KANLayerSpec, spec_from_file
from .inference import infer_spec
from .probe import Probe, Undecided, remembered


def check_layer(name: str, layer: nn.Module, spec: KANLayerSpec, tensor: CoefficientTensor) -> None:
    """Raises a `ValueError` if what a layer, of this name in its model, computes contradicts its description."""
    if spec.is_of_this_package(layer):
        return
    question = ("problem", spec.family, *tensor.parameters.values(), spec.linear)
    if problem := remembered(layer, question, lambda: _find_problem(layer, spec, tensor)):
        raise ValueError(f"The layer `{name}` ({type(layer).__name__}, of the kind {spec.family!r}) {problem}")


def _find_problem(layer: nn.Module, spec: KANLayerSpec, tensor: CoefficientTensor) -> str:
    probe = Probe(layer, spec.read_grid(layer))
    if contradiction := probe.axes(tensor).contradiction:
        pattern, shape = tensor.parameters[tensor.name].pattern, tuple(tensor.get_parameter(layer).shape)
        return (
            f"does not compute what its description says: `{tensor.name}` {shape} is not laid out as {pattern!r}, "
            f"since {contradiction}. `check_kan_layer(layer)` shows a description that fits."
        )
    if unused := probe.unused(tensor):
        return (
            f"does not use {', '.join(f'`{parameter}`' for parameter in unused)}: its output does not depend on it. "
            "Describe the kind without it (`register_kan_layer`), or leave the layer out of `target_modules`."
        )
    if spec.linear and probe.is_linear(tensor) is False:
        return (
            f"has an output that is not linear in {', '.join(f'`{parameter}`' for parameter in tensor.parameters)}. "
            "Describe the kind by `register_kan_layer(..., linear=False)`: all but the fast path works."
        )
    return ""


def as_computed(spec: KANLayerSpec, layer: nn.Module) -> KANLayerSpec:
    """The description of a layer of a built-in kind, corrected by what the layer computes.

    If the gradients agree with another description alone, it is that one. Parameters without effect are left out,
    unless none has any. `linear` is false if the output is not linear in the others. A layer that cannot be run is as
    described.
    """
    if spec.is_of_this_package(layer):
        return spec
    try:
        return remembered(layer, ("computed", spec.family), lambda: _as_computed(spec, layer))
    except (Undecided, ValueError):  # it may be run later; a pattern does not fit
        return spec


def _as_computed(spec: KANLayerSpec, layer: nn.Module) -> KANLayerSpec:
    probe, tensor = Probe(layer, spec.read_grid(layer)), spec.locate(layer)
    probe.values(tensor)  # or Undecided
    if not probe.axes(tensor).is_verified and (inferred := infer_spec(layer)):
        return inferred
    changes: dict[str, Any] = {}
    unused = probe.unused(tensor) if tensor.separate_residual or len(spec.parts) > 1 else []
    if unused and (used := [list(part) for part in spec.parts if part[0] not in unused]):
        others = {name: getattr(spec, name) for name in ("residual", "edge_scale")}
        changes = {name: None for name, described in others.items() if described and described[0] in unused}
        changes["coefficients"] = used
        spec = _changed(spec, layer, changes)
    is_linear = not spec.linear or probe.is_linear(spec.locate(layer)) is not False
    return spec if is_linear else _changed(spec, layer, {"linear": False})


def _changed(spec: KANLayerSpec, layer: nn.Module, changes: dict[str, Any]) -> KANLayerSpec:
    description = spec.describe(layer) | changes
    return spec_from_file(spec.family, {name: value for name, value in description.items() if value is not None})
