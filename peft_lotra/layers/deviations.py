# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Layers that differ from the known kind that they look like.

Most KAN layers are copied files. Whoever drops the residual branch, or the scales of the edges, from the forward pass
often leaves the parameter behind, and some let a normalization or an activation follow.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from .description import KANLayerSpec, spec_from_file
from .probe import Probe
from .readings import settings_of


# by class, and by what decides how a layer of it runs
_COMPUTED: WeakKeyDictionary[type, dict[Any, KANLayerSpec]] = WeakKeyDictionary()


def as_computed(spec: KANLayerSpec, layer: nn.Module) -> KANLayerSpec:
    """The description of a layer of a known kind, corrected by what the layer computes.

    Without the parameters that the output does not depend on, unless these are all, and with `linear=False` if the
    output is not linear in the others. A layer that cannot be run is as described.
    """
    if spec.is_of_this_package(layer):
        return spec
    known, key = _COMPUTED.setdefault(type(layer), {}), (spec.family, *settings_of(layer))
    if key not in known:
        try:
            tensor = spec.locate(layer)
        except ValueError:  # a pattern does not fit
            return spec
        probe = Probe(layer, spec.read_grid(layer))
        if not probe.can_run(tensor):
            return spec  # it may be later
        unused = probe.unused(tensor) if tensor.separate_residual or len(spec.parts) > 1 else []
        changes: dict[str, Any] = {"coefficients": [list(part) for part in spec.parts if part[0] not in unused]}
        if unused and changes["coefficients"]:
            for name in ("residual", "edge_scale"):
                if (described := getattr(spec, name)) is not None and described[0] in unused:
                    changes[name] = None
            spec = _changed(spec, layer, changes)
            tensor = spec.locate(layer)
        if spec.linear and not probe.is_linear(tensor):
            spec = _changed(spec, layer, {"linear": False})
        known[key] = spec
    return known[key]


def _changed(spec: KANLayerSpec, layer: nn.Module, changes: dict[str, Any]) -> KANLayerSpec:
    description = spec.describe(layer) | changes
    return spec_from_file(spec.family, {name: value for name, value in description.items() if value is not None})
