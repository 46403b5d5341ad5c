# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Layers of no registered kind that are KAN layers by what they compute.

A layer is taken if its output is y[o] = f_o(sum_{i,k} A[o,i,k] phi_k(x[i])) for a parameter A of its own, where the
phi_k are at least two different functions of one input each. That is what tells it from the modules that have
parameters of the same shapes: in a mixture of experts, in attention and in a bilinear map the factor of A[o,i,k]
depends on other inputs, or is the same function for each k; embeddings do not depend on the input at all. The
gradients of a copy of the layer say it, so nothing is taken on its name.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import nn

from .coefficients import CoefficientTensor, Described, get_or_none, locate_coefficients, named_size
from .description import KANLayerSpec, registered_spec, spec_from_file
from .layout import axis_patterns
from .probe import Probe, Undecided, remembered


KIND = "generic"
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

Tensors = Mapping[str, torch.Tensor]


class _Reading(NamedTuple):
    """A hypothesis: the parts of the coefficients, their residual branch, and the number of inputs if it is open."""

    parts: tuple[Described, ...]
    residual: Described | None = None
    inputs: int | None = None

    def locate(self, layer: nn.Module) -> CoefficientTensor:
        axes = {} if self.inputs is None else {"i": self.inputs}
        return locate_coefficients(layer, KIND, self.parts, self.residual, axes, ("", ""))

    def fits(self, probe: Probe) -> bool:
        """Whether the patterns fit the parameters, and the gradients of the layer."""
        try:
            tensor = self.locate(probe.layer)
        except ValueError:
            return False
        return tensor.shape[2] >= _FUNCTIONS and probe.axes(tensor, strict=True).is_verified


def infer_spec(module: nn.Module) -> KANLayerSpec | None:
    """The description of a module that is a KAN layer by what it computes, or `None`.

    Args:
        module: Any module. It is run, as a copy, if it has parameters that may be coefficients and no parts that may
            be layers of their own.
    """
    if isinstance(module, OTHERS) or type(module).__module__.partition(".")[0] in ("torch", "peft"):
        return None
    if "funs_sympy" in vars(module):  # formulas of pykan's networks, which stand in for the edges of a KAN layer
        return None
    tensors = _tensors(module)
    if not tensors or not _takes_one_argument(module):
        return None
    try:
        return remembered(module, (KIND,), lambda: _infer(module, tensors))
    except Undecided:  # it has no values now, and may have some later
        return None


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
            is_torch = type(child).__module__.startswith("torch.")
            if is_torch or any("." in n or value.dim() > 2 for n, value in trained.items()):
                return {}
            inner |= {f"{name}.{n}": value for n, value in trained.items()}
    own = {name: value for name, value in found.items() if value is not None}
    if sum(value.numel() for value in inner.values()) > sum(value.numel() for value in own.values()):
        return {}
    return {
        name: value
        for name, value in (own | inner).items()
        if value.dim() > 1 and value.is_floating_point() and value.numel() <= _LARGEST
    }


def _takes_one_argument(module: nn.Module) -> bool:
    try:
        given = inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError):
        return False
    return 1 == sum(p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in given)


def _infer(module: nn.Module, tensors: Tensors) -> KANLayerSpec | None:
    if any(value.is_meta or hasattr(value, "placements") for value in tensors.values()):
        raise Undecided("it has no values")
    grid = fixed_tensors(module, tensors)
    for places in (grid, {}):
        probe = Probe(module, places)
        reading = _find(probe, tensors)
        if reading is not None:
            parts, reading = reading.parts, _extend(probe, reading, tensors)
            # a product of parameters is not linear in both
            linear = reading.parts == parts and probe.is_linear(reading.locate(module))
            residual, axes = reading.residual and list(reading.residual), reading.inputs and {"i": reading.inputs}
            described = {"coefficients": [*map(list, reading.parts)], "residual": residual, "axes": axes}
            described |= {"grid": [*grid], "linear": linear}
            return spec_from_file(KIND, {name: value for name, value in described.items() if value not in (None, [])})
    return None


def fixed_tensors(module: nn.Module, trained: Mapping[str, Any]) -> dict[str, Any]:
    """The buffers and frozen parameters of a layer, by name, which may be its grid."""
    buffers = [name for name, value in module.named_buffers() if value.is_floating_point() and "running" not in name]
    frozen = [name for name, value in module.named_parameters() if not value.requires_grad and name not in trained]
    return {name: get_or_none(module, name) for name in (*buffers, *frozen)}


def _find(probe: Probe, tensors: Tensors) -> _Reading | None:
    """The coefficients alone."""
    found: _Reading | None = None
    sizes: tuple[int | None, int | None] = named_size(probe.layer, "o"), named_size(probe.layer, "i")
    for name, value in tensors.items():
        if not 3 <= value.dim() <= _MOST_AXES or "." in name:
            continue
        parts = found.parts if found else ()
        patterns = axis_patterns(value.shape, "kmnpqrst"[len(parts) % 8], sizes)
        readings = (_Reading((*parts, (name, pattern))) for pattern in patterns)
        if reading := next((reading for reading in readings if reading.fits(probe)), None):
            found = reading
            sizes = reading.locate(probe.layer).shape[:2]  # pyright: ignore[reportAssignmentType]
    if found:
        return found
    readings = chain(_flat_readings(probe, tensors), _matrix_readings(probe, tensors))
    return next((reading for reading in readings if reading.fits(probe)), None)


def _flat_readings(probe: Probe, tensors: Tensors) -> Iterator[_Reading]:
    """Coefficients that are a matrix with one axis of inputs and functions, and the bulk of the layer."""
    total = sum(value.numel() for value in tensors.values())
    for name, value in tensors.items():
        if value.dim() != 2 or 2 * value.numel() < total:
            continue
        sizes = dict.fromkeys(_possible_inputs(probe.layer, name, value))
        if any(isinstance(child, nn.Linear) and child.in_features == 1 for child in probe.layer.children()):
            sizes.pop(1, None)  # a perceptron of one input is such a sum too
        for inputs in filter(None, sizes):
            for axis, words in ((1, ("o (i k)", "o (k i)")), (0, ("(i k) o", "(k i) o"))):
                if value.shape[axis] % inputs == 0 and value.shape[axis] // inputs >= _FUNCTIONS:
                    yield from (_Reading(((name, pattern),), None, inputs) for pattern in words)


def _possible_inputs(layer: nn.Module, name: str, value: torch.Tensor) -> Iterator[int | None]:
    yield named_size(layer, "i")
    for other, tensor in (*layer.named_parameters(), *layer.named_buffers()):
        yield from tensor.shape if other != name else ()
        for size in filter(None, tensor.shape if tensor.dim() == 1 else ()):  # a grid of one point for each function
            yield from (length // size for length in value.shape if length % size == 0)


def _matrix_readings(probe: Probe, tensors: Tensors) -> Iterator[_Reading]:
    """Coefficients that are several matrices (out, in), e.g. the scale, shift and weight of a wavelet of each edge."""
    own = {name: value for name, value in tensors.items() if value.dim() == 2 and "." not in name}
    for shape in {value.shape: None for value in own.values()}:
        names = [name for name, value in own.items() if value.shape == shape]
        for pattern in ("o i", "i o") if len(names) >= _FUNCTIONS else ():
            reading = _Reading(tuple((name, pattern) for name in names))
            try:
                reached = probe.reached(names, reading.locate(probe.layer))
            except Exception:  # the layer's, which may want another input
                continue
            if any(reached.values()):
                yield _Reading(tuple(part for part in reading.parts if reached[part[0]]))


def _extend(probe: Probe, reading: _Reading, tensors: Tensors) -> _Reading:
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
            if not (as_part if "z" in pattern else as_residual).fits(probe):
                continue
            if "o" in pattern and reading.residual is None and probe.is_additive(as_residual.locate(probe.layer)):
                reading = as_residual
            else:
                factors.append((name, pattern))
            break
    total = sum(value.numel() for value in tensors.values())
    if sum(tensors[name].numel() for name, _ in factors) > _SMALL * total:
        reading = reading._replace(parts=(*reading.parts, *factors))
    return reading
