# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Recognizes KAN layers of no registered kind by what they compute.

A KAN layer computes y[o] = f_o(sum_{i,k} A[o,i,k] phi_k(x[i])), where A are parameters of its own and the phi_k at
least two different functions of one input each. Modules with parameters of the same shapes do not: in a mixture of
experts, in attention and in a bilinear map the factor of A[o,i,k] depends on other inputs, or is the same function for
each k; embeddings do not depend on the input. Hypotheses on which parameters are A, and in which order of axes, come
from shapes; the gradients of a copy of the layer decide. Names do not count.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import chain, product
from typing import Any

import torch
from torch import nn

from .coefficients import Described, get_or_none, named_size
from .description import KANLayerSpec, matches_nothing, registered_spec
from .layout import axis_patterns
from .probe import Probe, Undecided, remembered


KIND = "generic"
_LARGEST = 2**26  # numbers of a parameter that is copied to be probed
_MOST_AXES = 4  # of a parameter; more have too many orders to be tried
_FUNCTIONS = 2  # that a layer must have at least
_CHANCE = math.log(1e5)  # random rows increase in one of so many tensors
_MOVES_GRID = "(update|refine|initialize|adapt|move|reset|set)_\\w*(grid|knots)"
_SMALL = 0.1  # factors of the edges below this share of the parameters are not adapted
_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)
# Modules that are no KAN layers, nor are classes that are derived from them.
_OTHERS = (
    *(nn.Linear, nn.Bilinear, nn.Embedding, nn.EmbeddingBag, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention),
    *(nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict, *_NORMS),
    *(nn.modules.conv._ConvNd, torch.jit.ScriptModule),
)
# Libraries whose modules with large parameters are attention, experts and the like.
_LIBRARIES = {"torch", "torchvision", "transformers", "timm", "diffusers", "peft"}

Tensors = Mapping[str, torch.Tensor]
_hypothesis = partial(KANLayerSpec, KIND, matches_nothing)


def infer_spec(module: nn.Module) -> KANLayerSpec | None:
    """The description of a module that is a KAN layer by what it computes, or `None`.

    Args:
        module: Any module. It is run, as a copy, if it has parameters that may be coefficients and no parts that may
            be layers of their own.
    """
    if is_other(module):
        return None
    tensors = _tensors(module)
    if not tensors or not _takes_one_argument(module):
        return None
    try:
        return remembered(module, (KIND,), lambda: _infer(module, tensors))
    except Undecided:  # it has no values now, and may have some later
        return None


def is_other(module: nn.Module) -> bool:
    """Whether a module is no KAN layer by its class, or stands for formulas beside one, as in pykan's networks."""
    is_of_library = type(module).__module__.partition(".")[0] in _LIBRARIES
    return is_of_library or isinstance(module, _OTHERS) or "funs_sympy" in vars(module)


def _tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters of a layer that may be coefficients; none if it has parts that may be layers of their own.

    They are its own, and those of linear layers: one, a list, or one with activations in a `Sequential`. A part of a
    user's class may make the functions, if its matrices are together no larger than the rest.
    """
    own = {name: value for name, value in module._parameters.items() if value is not None}
    inner: dict[str, torch.Tensor] = {}
    for name, child in module._modules.items():
        if child is None or isinstance(child, _NORMS):
            continue
        weights = {n: v for n, v in child.named_parameters() if v.dim() > 1 and "parametrizations" not in n}
        linears = [part for part in child.children() if isinstance(part, nn.Linear)]
        count = {nn.Sequential: 1, nn.ModuleList: len(child._modules)}.get(type(child))
        is_linear = isinstance(child, (nn.Linear, nn.ParameterList)) or count == len(linears) == len(weights)
        if any(registered_spec(part) is not None for part in (child, *(linears if is_linear else ()))):
            return {}
        trained = {f"{name}.{n}": value for n, value in weights.items() if is_linear or value.requires_grad}
        if is_linear:
            own |= trained
        elif trained and (
            type(child).__module__.startswith("torch.") or any("." in n or v.dim() > 2 for n, v in weights.items())
        ):
            return {}
        else:
            inner |= trained
    if sum(value.numel() for value in inner.values()) > sum(value.numel() for value in own.values()):
        return {}
    return {
        name: value
        for name, value in (own | inner).items()
        if value.dim() > 1 and value.is_floating_point() and 0 < value.numel() <= _LARGEST
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
    knots = {name for name, value in tensors.items() if _has_increasing_rows(value)}
    for trained in _subsets(module, tensors, knots):
        grid = fixed_tensors(module, trained, knots)
        for places in (grid, {}) if grid else ({},):
            probe = Probe(module, places)
            if spec := _find(probe, trained):
                spec = _extend(probe, spec, trained)
                return replace(spec, grid=tuple(grid), grid_methods=_grid_methods(module) if grid else ())
    return None


def _subsets(module: nn.Module, tensors: Tensors, knots: set[str]) -> Iterator[Tensors]:
    """Yield the tensors that may be coefficients: at first without those that are likely a grid.

    These are knots, and parameters that are frozen in a layer that trains others. They may be coefficients if nothing
    else is: of a layer of which only the norm is trained, or whose functions start as increasing ones.
    """
    trains = any(parameter.requires_grad for parameter in module.parameters())
    frozen = {name for name, value in tensors.items() if trains and not value.requires_grad}
    left_out = frozen.union(knots), knots, set()
    for place, names in enumerate(left_out):
        if names not in left_out[:place]:
            yield {name: value for name, value in tensors.items() if name not in names}


def _has_increasing_rows(value: torch.Tensor) -> bool:
    """Return whether a tensor has the form of knots: all rows increase, which is no chance."""
    first = value.detach()[(0,) * (value.dim() - 1)]
    if (first.diff() < 0).any():  # of most tensors
        return False
    rows = value.detach().flatten(0, -2)
    steps = rows.diff()
    if (steps < 0).any() or (rows[:, 0] >= rows[:, -1]).any():
        return False
    is_uniform = (steps - steps.mean()).abs().max() <= 0.01 * steps.mean()
    orders = len(rows) * math.lgamma(len(first) + 1)  # the logarithm of their number
    return orders >= _CHANCE or bool(is_uniform and steps.numel() >= 3)


def _grid_methods(module: nn.Module) -> tuple[str, ...]:
    """The methods that move the grid by their names, such as `update_grid_from_samples`."""
    return tuple(name for name in dir(type(module)) if re.match(_MOVES_GRID, name))


def fixed_tensors(module: nn.Module, trained: Mapping[str, Any], knots: Collection[str] = ()) -> dict[str, Any]:
    """The buffers, the knots and the frozen parameters of a layer, by name, which may be its grid."""
    buffers = [name for name, value in module.named_buffers() if value.is_floating_point() and "running" not in name]
    others = [(name, value) for name, value in module.named_parameters() if name not in trained]
    fixed = [name for name, value in others if name in knots or not value.requires_grad]
    return {name: get_or_none(module, name) for name in (*buffers, *fixed)}


def fits(probe: Probe, spec: KANLayerSpec, strict: bool = True) -> bool:
    """Whether a hypothesis fits the shapes of the parameters, and the gradients of the layer."""
    try:
        tensor = spec.locate(probe.layer)
    except ValueError:
        return False
    return tensor.shape[2] >= _FUNCTIONS and probe.axes(tensor, strict).is_verified


def _find(probe: Probe, tensors: Tensors) -> KANLayerSpec | None:
    """The coefficients alone."""
    found: KANLayerSpec | None = None
    sizes: tuple[int | None, int | None] = named_size(probe.layer, "o")[1], named_size(probe.layer, "i")[1]
    for name, value in tensors.items():
        if not 3 <= value.dim() <= _MOST_AXES:
            continue
        parts = found.parts if found else ()
        patterns = axis_patterns(value.shape, "kmnpqrst"[len(parts) % 8], sizes)
        specs = (_hypothesis((*parts, (name, pattern))) for pattern in patterns)
        if spec := next((spec for spec in specs if fits(probe, spec)), None):
            found, (out, in_, _) = spec, spec.locate(probe.layer).shape
            sizes = out, in_
    if found:
        return found
    specs = chain(_of_one_matrix(probe, tensors), _of_several_matrices(probe, tensors))
    return next((spec for spec in specs if fits(probe, spec)), None)


def _of_one_matrix(probe: Probe, tensors: Tensors) -> Iterator[KANLayerSpec]:
    """Coefficients in one matrix, the bulk of the layer, with two of their three axes flattened."""
    total = sum(value.numel() for value in tensors.values())
    large = {name: value for name, value in tensors.items() if value.dim() == 2 and 2 * value.numel() >= total}
    has_perceptron = any(isinstance(child, nn.Linear) and child.in_features == 1 for child in probe.layer.children())
    for (flat, rest), (name, value) in product(("ko", "ok"), large.items()):
        sizes = dict.fromkeys(_possible_inputs(probe.layer, name, value))
        if flat == "o" or has_perceptron:  # a perceptron of one input is such a sum too
            sizes.pop(1, None)
        for inputs, axis, inner in product(filter(None, sizes), (1, 0), (f"(i {flat})", f"({flat} i)")):
            count, remainder = divmod(value.shape[axis], inputs)
            if remainder == 0 and (count if flat == "k" else value.shape[1 - axis]) >= _FUNCTIONS:
                yield _hypothesis((name, f"{rest} {inner}" if axis else f"{inner} {rest}"), axes={"i": inputs})


def _possible_inputs(layer: nn.Module, name: str, value: torch.Tensor) -> Iterator[int | None]:
    yield named_size(layer, "i")[1]
    for other, tensor in (*layer.named_parameters(), *layer.named_buffers()):
        yield from tensor.shape if other != name else ()
        for size in filter(None, tensor.shape if tensor.dim() == 1 else ()):  # a grid of one point for each function
            yield from (length // size for length in value.shape if length % size == 0)


def _of_several_matrices(probe: Probe, tensors: Tensors) -> Iterator[KANLayerSpec]:
    """Coefficients in several matrices: one for each function, or scale, shift and weight of the wavelets of edges."""
    own = {name: value for name, value in tensors.items() if value.dim() == 2 and re.search(r"^[^.]*$|\.\d", name)}
    for shape in {value.shape: None for value in own.values()}:
        names = [name for name, value in own.items() if value.shape == shape]
        for pattern in ("o i", "i o") if len(names) >= _FUNCTIONS else ():
            spec = _hypothesis([(name, pattern) for name in names])
            reached = probe.reached(names, spec.locate(probe.layer))
            if any(reached.values()):
                yield _hypothesis([part for part in spec.parts if reached[part[0]]])


def _extend(probe: Probe, spec: KANLayerSpec, tensors: Tensors) -> KANLayerSpec:
    """With the residual branch, and with other parameters where they are together a large share of the layer.

    These are factors of the edges, and, shared by the outputs, places and widths of the functions of each input.
    """
    taken = {name for name, _ in spec.parts}
    factors: list[Described] = []
    for name, value in tensors.items():
        if name in taken or value.dim() != 2:
            continue
        for pattern in ("o i", "i o", "i z", "z i"):
            as_residual = replace(spec, residual=(name, pattern)) if "o" in pattern else None
            if not fits(probe, as_residual or replace(spec, coefficients=(*spec.parts, (name, pattern)))):
                continue
            if as_residual and spec.residual is None and probe.is_additive(as_residual.locate(probe.layer)):
                spec = as_residual
            else:
                factors.append((name, pattern))
            break
    total = sum(value.numel() for value in tensors.values())
    if sum(tensors[name].numel() for name, _ in factors) > _SMALL * total:
        spec = replace(spec, coefficients=(*spec.parts, *factors))
    return spec
