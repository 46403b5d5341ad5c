# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Parameters that a layer of a known family keeps, and no longer uses.

Most KAN layers are copied files. Whoever drops the residual branch, or the scales of the edges, from the forward pass
often leaves the parameter behind: the layer still looks like one of its family.
"""

from __future__ import annotations

from torch import nn

from .description import KANLayerSpec, spec_from_file
from .readings import unused_parameters


def without_unused(spec: KANLayerSpec, layer: nn.Module) -> KANLayerSpec:
    """The description of a layer without the parameters that its output is not computed from.

    It is the description itself if all of them are used, or none, or if the layer cannot be run.

    Args:
        spec: The family that the layer looks like.
        layer: The layer, a copy of which is run once for each class, shapes and settings.
    """
    if spec.is_of_this_package(layer) or (spec.residual is None and len(spec.parts) == 1):
        return spec
    try:
        unused = unused_parameters(layer, spec.read_grid(layer), spec.locate(layer))
    except ValueError:  # a pattern does not fit
        return spec
    parts = [list(part) for part in spec.parts if part[0] not in unused]
    if not unused or not parts:
        return spec
    description = spec.describe(layer) | {"coefficients": parts}
    for name in ("residual", "edge_scale"):
        if getattr(spec, name) is not None and getattr(spec, name)[0] in unused:
            del description[name]
    return spec_from_file(spec.family, description)
