# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Descriptions compared with layers: those of users must be right, those of known kinds follow what a copy computes.

Most KAN layers are copied files. Whoever drops the residual branch, or the scales of the edges, from the forward pass
often leaves the parameter behind; some let a normalization or an activation follow, or store (out, in) the other way.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import nn

from .coefficients import CoefficientTensor
from .description import KANLayerSpec, spec_from_file
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
    """The description of a layer of a known kind, corrected by what the layer computes.

    Outputs and inputs are exchanged if only that agrees with the gradients. Parameters without effect are left out,
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
    probe = Probe(layer, spec.read_grid(layer))
    probe.values(spec.locate(layer))  # or Undecided
    spec = next((other for other in _orders(spec, layer) if probe.axes(other.locate(layer)).is_verified), spec)
    tensor = spec.locate(layer)
    unused = probe.unused(tensor) if tensor.separate_residual or len(spec.parts) > 1 else []
    if unused and (used := [list(part) for part in spec.parts if part[0] not in unused]):
        others = {name: getattr(spec, name) for name in ("residual", "edge_scale")}
        changes = {name: None for name, described in others.items() if described and described[0] in unused}
        spec = _changed(spec, layer, coefficients=used, **changes)
        tensor = spec.locate(layer)
    return _changed(spec, layer, linear=False) if spec.linear and probe.is_linear(tensor) is False else spec


def _orders(spec: KANLayerSpec, layer: nn.Module) -> Iterator[KANLayerSpec]:
    """The description, and those with outputs and inputs exchanged in coefficients and residual weights."""
    yield spec
    parts = [[name, _exchanged(pattern)] for name, pattern in spec.parts]
    yield _changed(spec, layer, coefficients=parts)
    if spec.residual is not None:
        residual = [spec.residual[0], _exchanged(spec.residual[1])]
        yield _changed(spec, layer, coefficients=parts, residual=residual)
        yield _changed(spec, layer, residual=residual)


def _exchanged(pattern: str) -> str:
    return re.sub(r"\b[oi]\b", lambda match: "i" if match[0] == "o" else "o", pattern)


def _changed(spec: KANLayerSpec, layer: nn.Module, **changes: Any) -> KANLayerSpec:
    description = spec.describe(layer) | changes
    return spec_from_file(spec.family, {name: value for name, value in description.items() if value is not None})
