# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Modules that may be KAN layers of an unknown kind, with a registration to paste."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import nn

from .coefficients import named_size
from .description import REGISTERED, KANLayerSpec
from .inference import fits, fixed_tensors, infer_spec, is_other
from .layout import axis_patterns
from .probe import Probe


class KANCandidate(NamedTuple):
    """A module that may be a KAN layer.

    Attributes:
        name (`str`): Its name in the model.
        cls (`str`): The name of its class.
        parameters (`dict[str, tuple[int, ...]]`): The shapes of its parameters of three axes or more.
        registration (`str`): The call that describes it, to be pasted.
        is_verified (`bool`): Whether the layer, run on a made-up input, computes what the call says.
    """

    name: str
    cls: str
    parameters: dict[str, tuple[int, ...]]
    registration: str
    is_verified: bool


def find_candidates(model: nn.Module, known: Collection[int]) -> list[KANCandidate]:
    """The modules that may be KAN layers of an unknown kind, one of each class and shape.

    Args:
        model: The model.
        known: The ids of the modules that are KAN layers, or parts of them.
    """
    found: dict[tuple[Any, ...], KANCandidate] = {}
    for name, module in model.named_modules():
        if id(module) in known or is_other(module):
            continue
        shapes = {n: tuple(value.shape) for n, value in _large_parameters(module).items()}
        key = (type(module), *shapes.items())
        if key not in found and (description := describe_layer(module)):
            found[key] = KANCandidate(name, type(module).__name__, shapes, *description)
    return list(found.values())


def describe_layer(module: nn.Module) -> tuple[str, bool] | None:
    """The call that registers the kind of a module, and whether gradients verify it; `None` if it is no KAN layer."""
    large = _large_parameters(module)
    if spec := infer_spec(module) or next(_convolutions(module, large), None):
        return _registration(module, spec), True
    if not large or not _may_be_kan(module):
        return None
    name, value = next(iter(large.items()))
    return _registration(module, KANLayerSpec("", nn.Module, (name, next(axis_patterns(value.shape))))), False


def _convolutions(module: nn.Module, kernels: Mapping[str, torch.Tensor]) -> Iterator[KANLayerSpec]:
    """The verified descriptions of a module whose coefficients are the kernel of a convolution."""
    (_, inputs), grid = named_size(module, "i"), fixed_tensors(module, kernels)
    probe = Probe(module, grid)
    for name in kernels if inputs else ():
        residuals = [(other, "o i ...") for other in kernels if other != name]
        for pattern, residual in product(("o (i k) ...", "o (k i) ...", "o i k ..."), [*residuals, None]):
            spec = KANLayerSpec("", nn.Module, (name, pattern), residual, axes={"i": inputs}, grid=tuple(grid))
            if fits(probe, spec, strict=False):
                yield spec


def _registration(module: nn.Module, spec: KANLayerSpec) -> str:
    cls, pairs = type(module).__name__, [_pair(part) for part in spec.parts]
    (axis, _), axes = named_size(module, "i"), spec.axes
    if axis and axes:
        axes = f'lambda m: {{"i": m.{axis}}}'
    lines = [
        f'"{cls}",',
        f'matches=lambda m: type(m).__name__ == "{cls}",',
        f"coefficients={pairs[0] if len(pairs) == 1 else '[' + ', '.join(pairs) + ']'},",
        f"residual={_pair(spec.residual)}," if spec.residual else "",
        f"axes={axes}," if axes else "",
        f"grid=({''.join(f'{json.dumps(name)}, ' for name in spec.grid).strip()})," if spec.grid else "",
    ]
    return "register_kan_layer(\n" + "".join(f"    {line}\n" for line in lines if line) + ")"


def _pair(described: tuple[str, str]) -> str:
    return f"({', '.join(map(json.dumps, described))})"


def _large_parameters(module: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters of three axes or more of a module and of its convolutions."""
    children = module._modules.items()
    kernels = {
        f"{name}.weight": child.weight for name, child in children if isinstance(child, nn.modules.conv._ConvNd)
    }
    return {n: v for n, v in {**module._parameters, **kernels}.items() if v is not None and v.dim() >= 3}


def _may_be_kan(module: nn.Module) -> bool:
    """Whether a module looks like a KAN layer; it is not run.

    It is then of a user's class, with own parameters of three axes, or with one that is named as in a known kind. An
    axis of length one in front is that of a batch: position embeddings and class tokens.
    """
    own = {name: value for name, value in module._parameters.items() if value is not None}
    if not own or is_other(module):
        return False
    names = {name for spec in REGISTERED.values() for name, _ in spec.parts} - {"weight", "scale", "coefficients"}
    return any(name in names or (value.dim() > 2 and len(value) > 1) for name, value in own.items())


def left_out(model: nn.Module, found_names: Collection[str]) -> list[str]:
    """The names of modules that look like KAN layers and are not among those found."""
    known = {id(inner) for name in found_names for inner in model.get_submodule(name).modules()}
    return [name for name, module in model.named_modules() if id(module) not in known and _may_be_kan(module)]


def no_layer_message(model: nn.Module) -> str:
    """Why there is nothing to adapt in a model without KAN layers, in less than 400 characters."""
    likely = [f"`{name[-30:]}` ({type(model.get_submodule(name)).__name__:.20})" for name in left_out(model, ())[:3]]
    others = "`find_kan_layers(model, candidates=True)` shows how" if likely else "Use `register_kan_layer`"
    return (
        f"No KAN layer was found in the model{'; candidates are ' if likely else ''}{', '.join(likely)}. "
        "Functions shared by all outputs (KAT, GR-KAN) take plain LoRA on their linear layers. "
        f"{others} to describe other layers."
    )
