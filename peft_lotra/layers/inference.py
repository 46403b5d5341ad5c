# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Layers of no registered family that are KAN layers by what they compute.

A layer is taken if its output is y[o] = f_o(sum_{i,k} A[o,i,k] phi_k(x[i])) for a parameter A of its own, where the
phi_k are at least two different functions of one input each. That is what tells it from the modules that have
parameters of the same shapes: in a mixture of experts, in attention and in a bilinear map the factor of A[o,i,k]
depends on other inputs, or is the same function for each k; embeddings do not depend on the input at all. The
gradients of a copy of the layer say it, so nothing is taken on its name.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn

from .coefficients import CoefficientTensor, Described, get_or_none, locate_coefficients, named_size
from .description import KANLayerSpec, registered_spec, spec_from_file
from .functions import FunctionProbe
from .layout import axis_patterns
from .readings import settings_of


FAMILY = "generic"
_LARGEST = 2**26  # numbers of a parameter that is copied to be probed
_MOST_AXES = 4  # of a parameter, each of which may be that of the outputs or the inputs
_FUNCTIONS = 2  # that a layer must have at least
_SMALL = 0.1  # share of the parameters below which factors of the edges are left alone
_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)
# Modules that are known to be something else; a class of a user that is derived from one of them is so too.
OTHERS = (
    *(nn.Linear, nn.Bilinear, nn.Embedding, nn.EmbeddingBag, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention),
    *(nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict, *_NORMS),
    nn.modules.conv._ConvNd,
)


class _Reading(NamedTuple):
    """A hypothesis: the parts of the coefficients, their residual branch, and the number of inputs if it is open."""

    parts: tuple[Described, ...]
    residual: Described | None = None
    inputs: int | None = None

    def locate(self, layer: nn.Module) -> CoefficientTensor:
        axes = {} if self.inputs is None else {"i": self.inputs}
        return locate_coefficients(layer, FAMILY, self.parts, self.residual, axes, ("", ""))

    def to_spec(self, grid: tuple[str, ...], linear: bool) -> KANLayerSpec:
        description = {"coefficients": [*map(list, self.parts)], "residual": self.residual and list(self.residual)}
        description |= {"grid": list(grid), "linear": linear, "axes": self.inputs and {"i": self.inputs}}
        return spec_from_file(FAMILY, {name: value for name, value in description.items() if value not in (None, [])})


# by class, and by what decides how a layer of it runs
_INFERRED: WeakKeyDictionary[type, dict[Any, KANLayerSpec | None]] = WeakKeyDictionary()


def infer_spec(module: nn.Module) -> KANLayerSpec | None:
    """The description of a module that is a KAN layer by what it computes, or `None`.

    Args:
        module: Any module. It is run, as a copy, if it has parameters that may be coefficients and no parts that may
            be layers of their own.
    """
    if isinstance(module, OTHERS) or _is_torch(module):
        return None
    if "funs_sympy" in vars(module):  # formulas of pykan's networks, which stand in for the edges of a KAN layer
        return None
    tensors = _tensors(module)
    if not tensors or not _takes_one_argument(module):
        return None
    known = _INFERRED.setdefault(type(module), {})
    key = settings_of(module)
    if key not in known:
        if any(value.is_meta or hasattr(value, "placements") for value in tensors.values()):
            return None  # it cannot be run now, and may be later
        known[key] = _infer(module, tensors)
    return known[key]


def _tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """The trained parameters of a layer; none if it has parts that may be layers of their own.

    A part of a user's class, with matrices that are together no larger than the rest, may make the functions.
    """
    found: dict[str, torch.Tensor | None] = dict(module._parameters)
    inner: dict[str, torch.Tensor] = {}
    for name, child in module._modules.items():
        if child is not None and registered_spec(child) is not None:
            return {}
        if isinstance(child, nn.Linear):
            found[f"{name}.weight"] = child._parameters.get("weight")
        elif child is None or isinstance(child, _NORMS):
            continue
        elif trained := {n: value for n, value in child.named_parameters() if value.requires_grad and value.dim() > 1}:
            if _is_torch(child) or any("." in n or value.dim() > 2 for n, value in trained.items()):
                return {}
            inner |= {f"{name}.{n}": value for n, value in trained.items()}
    if sum(value.numel() for value in inner.values()) > sum(
        value.numel() for value in found.values() if value is not None
    ):
        return {}
    return {
        name: value
        for name, value in (found | inner).items()
        if value is not None and value.dim() > 1 and value.is_floating_point() and value.numel() <= _LARGEST
    }


def _is_torch(module: nn.Module) -> bool:
    return type(module).__module__.partition(".")[0] in ("torch", "peft")


def _takes_one_argument(module: nn.Module) -> bool:
    try:
        given = inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError):
        return False
    needed = [p for p in given if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return len(needed) == 1


def _infer(module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> KANLayerSpec | None:
    total = sum(value.numel() for value in tensors.values())
    buffers = [name for name, value in module.named_buffers() if value.is_floating_point() and "running" not in name]
    frozen = [name for name, value in module.named_parameters() if not value.requires_grad and name not in tensors]
    grid = tuple(buffers + frozen)
    for places in ({name: get_or_none(module, name) for name in grid}, {}):
        probe = FunctionProbe(module, places)
        reading = _find(probe, tensors)
        if reading is not None:
            parts, reading = reading.parts, _extend(probe, reading, tensors, total)
            # a product of parameters is not linear in both
            linear = reading.parts == parts and probe.is_linear(reading.locate(module))
            spec = reading.to_spec(grid, linear)
            spec.note_verified(module)
            return spec
    return None


def _find(probe: FunctionProbe, tensors: Mapping[str, torch.Tensor]) -> _Reading | None:
    """The coefficients alone."""
    found: _Reading | None = None
    sizes: tuple[int | None, int | None] = named_size(probe.layer, "o"), named_size(probe.layer, "i")
    for name, value in tensors.items():
        if not 3 <= value.dim() <= _MOST_AXES or "." in name:
            continue
        letter = "kmnpqrst"[len(found.parts) % 8] if found else "k"
        for pattern in axis_patterns(value.shape, letter, sizes):
            reading = _Reading((*(found.parts if found else ()), (name, pattern)))
            if _fits(probe, reading):
                found = reading
                sizes = reading.locate(probe.layer).shape[:2]  # pyright: ignore[reportAssignmentType]
                break
    return found or _find_flat(probe, tensors) or _find_matrices(probe, tensors)


def _find_flat(probe: FunctionProbe, tensors: Mapping[str, torch.Tensor]) -> _Reading | None:
    """Coefficients that are a matrix with one axis of inputs and functions, and the bulk of the layer."""
    total = sum(value.numel() for value in tensors.values())
    for name, value in tensors.items():
        if value.dim() == 2 and 2 * value.numel() >= total and (found := _find_flat_of(probe, name, value)):
            return found
    return None


def _find_flat_of(probe: FunctionProbe, name: str, value: torch.Tensor) -> _Reading | None:
    sizes = {named_size(probe.layer, "i") or 0: None}
    for other, tensor in (*probe.layer.named_parameters(), *probe.layer.named_buffers()):
        sizes |= dict.fromkeys(tensor.shape if other != name else ())
        for size in filter(None, tensor.shape if tensor.dim() == 1 else ()):  # a grid of one point for each function
            sizes |= dict.fromkeys(length // size for length in value.shape if length % size == 0)
    if any(isinstance(child, nn.Linear) and child.in_features == 1 for child in probe.layer.children()):
        sizes.pop(1, None)  # a perceptron of one input is such a sum too
    for inputs in sizes:
        for axis in (1, 0) if inputs else ():
            if value.shape[axis] % inputs or value.shape[axis] // inputs < _FUNCTIONS:
                continue
            for flat in ("(i k)", "(k i)"):
                pattern = f"o {flat}" if axis else f"{flat} o"
                if _fits(probe, reading := _Reading(((name, pattern),), None, inputs)):
                    return reading
    return None


def _find_matrices(probe: FunctionProbe, tensors: Mapping[str, torch.Tensor]) -> _Reading | None:
    """Coefficients that are several matrices (out, in), e.g. the scale, shift and weight of a wavelet of each edge."""
    own = {name: value for name, value in tensors.items() if value.dim() == 2 and "." not in name}
    for shape in {value.shape: None for value in own.values()}:
        names = [name for name, value in own.items() if value.shape == shape]
        if len(names) < _FUNCTIONS:
            continue
        for pattern in ("o i", "i o"):
            parts: tuple[Described, ...] = tuple((name, pattern) for name in names)
            if _fits(probe, _Reading(parts)):
                reached = probe.reached(names, _Reading(parts).locate(probe.layer))
                return _Reading(tuple(part for part in parts if reached[part[0]]))
    return None


def _extend(probe: FunctionProbe, reading: _Reading, tensors: Mapping[str, torch.Tensor], total: int) -> _Reading:
    """With the residual branch, and with other parameters where they are together a large share of the layer.

    These are factors of the edges, and, shared by the outputs, places and widths of the functions of each input.
    """
    taken = {name for name, _ in reading.parts}
    factors: list[Described] = []
    for name, value in tensors.items():
        if name in taken or value.dim() != 2:
            continue
        for pattern in ("o i", "i o", "i z", "z i"):
            as_residual = reading._replace(residual=(name, pattern))
            as_part = reading._replace(parts=(*reading.parts, (name, pattern)))
            if not _fits(probe, as_part if "z" in pattern else as_residual):
                continue
            if "o" in pattern and reading.residual is None and probe.is_additive(as_residual.locate(probe.layer)):
                reading = as_residual
            else:
                factors.append((name, pattern))
            break
    if sum(tensors[name].numel() for name, _ in factors) > _SMALL * total:
        reading = reading._replace(parts=(*reading.parts, *factors))
    return reading


def _fits(probe: FunctionProbe, reading: _Reading) -> bool:
    try:
        tensor = reading.locate(probe.layer)
    except ValueError:
        return False
    return tensor.shape[2] >= _FUNCTIONS and probe.axes(tensor).is_verified and probe.is_sum_of_functions(tensor)
