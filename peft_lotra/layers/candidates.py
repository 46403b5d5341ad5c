# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Modules that may be KAN layers of a family that is not known, with a registration to paste."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from typing import NamedTuple

import torch
from torch import nn

from .coefficients import CoefficientTensor, Described, get_or_none, named_attribute
from .description import REGISTERED, KANLayerSpec
from .inference import OTHERS
from .layout import axis_patterns
from .probe import Probe


# whose modules with large parameters are attention, experts and the like
_LIBRARIES = {"torch", "torchvision", "transformers", "timm", "diffusers", "peft"}
_MOST_AXES = 6  # of a parameter, each of which may be that of the outputs or the inputs


class KANCandidate(NamedTuple):
    """A module that may be a KAN layer.

    Attributes:
        name (`str`): Its name in the model.
        cls (`str`): The name of its class.
        parameters (`dict[str, tuple[int, ...]]`): The shapes of its parameters of three axes or more.
        registration (`str`): The call that describes it, to be pasted.
        is_verified (`bool`): Whether the layer, run on an input of the probe's, computes what the call says.
    """

    name: str
    cls: str
    parameters: dict[str, tuple[int, ...]]
    registration: str
    is_verified: bool


def find_candidates(model: nn.Module, known: set[int]) -> list[KANCandidate]:
    """The modules with parameters of three axes or more that are no KAN layers, none of each class and shape twice.

    Args:
        model: The model.
        known: The ids of the modules that are KAN layers, or parts of them.
    """
    found = []
    for name, module in likely_layers(model, known):
        tensors = _tensors(module)
        large = {n: value for n, value in tensors.items() if value.dim() >= 3}
        shapes = {n: tuple(value.shape) for n, value in large.items()}
        registration, is_verified = _describe(module, tensors, large)
        found.append(KANCandidate(name, type(module).__name__, shapes, registration, is_verified))
    return found


def likely_layers(model: nn.Module, known: Collection[int] = ()) -> Iterator[tuple[str, nn.Module]]:
    """The modules that have parameters of three axes or more, with their names, one of each class and shape.

    They are not run. `known` are the ids of modules to leave out.
    """
    seen = set()
    for name, module in model.named_modules():
        if id(module) in known or type(module).__module__.startswith(("torch.nn", "torch.jit")):
            continue
        shapes = [(n, value.shape) for n, value in _tensors(module).items()]
        key = (type(module), *shapes)
        if any(len(shape) >= 3 for _, shape in shapes) and key not in seen:
            seen.add(key)
            yield name, module


def left_out(model: nn.Module, found_names: Collection[str]) -> list[str]:
    """The names of modules that look like KAN layers and are not among those found; nothing is run.

    These are modules of a user with own parameters of three axes, or with one that is named as in a known kind of
    layer. An axis of length one in front is that of a batch: position embeddings and class tokens.
    """
    known = {id(inner) for name in found_names for inner in model.get_submodule(name).modules()}
    names = {name for spec in REGISTERED.values() for name, _ in spec.parts} - {"weight", "scale", "coefficients"}
    return [
        name
        for name, module in model.named_modules()
        if id(module) not in known
        and not isinstance(module, (*OTHERS, torch.jit.ScriptModule))
        and type(module).__module__.partition(".")[0] not in _LIBRARIES
        and type(module).__name__ != "Symbolic_KANLayer"  # pykan's formulas beside each layer
        and any(
            value is not None and (key in names or (value.dim() > 2 and len(value) > 1))
            for key, value in module._parameters.items()
        )
    ]


def no_layer_message(model: nn.Module) -> str:
    """Why there is nothing to adapt in a model without KAN layers, in less than 400 characters."""
    likely = [f"`{name[-30:]}` ({type(model.get_submodule(name)).__name__:.20})" for name in left_out(model, ())[:3]]
    return (
        f"No KAN layer was found in the model{'; candidates are ' if likely else ''}{', '.join(likely)}. "
        "Functions shared by all outputs (KAT, GR-KAN) take plain LoRA on their linear layers. "
        "`find_kan_layers(model, candidates=True)` shows how to describe other layers."
    )


def _tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters of a module and of its layers of torch, the members of lists under one name."""
    found = dict(module._parameters)
    for name, child in module._modules.items():
        if isinstance(child, nn.ParameterList):
            found[f"{name}.*"] = next(iter(child), None)
        elif isinstance(child, nn.ModuleList):
            members = [member for member in child if type(member).__module__.startswith("torch.nn")]
            if members and len(members) == len(child):
                found[f"{name}.*.weight"] = getattr(members[0], "weight", None)
        elif child is not None and type(child).__module__.startswith("torch.nn"):
            found[f"{name}.weight"] = getattr(child, "weight", None)
    return {n: value for n, value in found.items() if isinstance(value, torch.Tensor) and value.is_floating_point()}


def _describe(module: nn.Module, tensors: dict[str, torch.Tensor], large: dict[str, torch.Tensor]) -> tuple[str, bool]:
    """The call that registers a module's family, and whether it was verified."""
    grid = [name for name, value in module.named_buffers(recurse=False) if value.is_floating_point()]
    grid += [name for name, value in tensors.items() if not value.requires_grad and value.dim() < 3]
    probe = Probe(module, {name: get_or_none(module, name) for name in grid})
    axis = named_attribute(module, "i")
    axes = {"i": int(getattr(module, axis))} if axis else {}
    parts, residual = _find(probe, tensors, large, axes)
    is_verified, is_linear = bool(parts), True
    if is_verified:
        is_linear = probe.is_linear(_locate(module, parts, residual, axes))
    else:
        name, value = next(iter(large.items()))
        parts = [(name, next(_patterns(value.shape, False), "o i ..."))]
    pairs = [_pair(part) for part in parts]
    names = "".join(f"{json.dumps(name)}, " for name in grid).strip()
    lines = [
        f'"{type(module).__name__}",',
        f'matches=lambda m: type(m).__name__ == "{type(module).__name__}",',
        f"coefficients={pairs[0] if len(pairs) == 1 else '[' + ', '.join(pairs) + ']'},",
        f"residual={_pair(residual)}," if residual else "",
        f'axes=lambda m: {{"i": m.{axis}}},' if any("(" in pattern for _, pattern in parts) else "",
        f"grid=({names})," if grid else "",
        "" if is_linear else "linear=False,",
    ]
    return "register_kan_layer(\n" + "".join(f"    {line}\n" for line in lines if line) + ")", is_verified


def _find(
    probe: Probe, tensors: dict[str, torch.Tensor], large: dict[str, torch.Tensor], axes: dict[str, int]
) -> tuple[list[Described], Described | None]:
    """The parts of the coefficients, and the residual branch, that the gradients of a layer verify."""
    parts: list[Described] = []
    bases: list[Described] = []
    for name, value in large.items():
        for pattern in _patterns(value.shape, bool(axes), letter="kmnpqrst"[len(parts) % 8]):
            if pattern == "o i ..." and _fits(probe, [(name, pattern)], None, axes):
                bases.append((name, pattern))  # a base convolution
                break
            if pattern != "o i ..." and _fits(probe, [*parts, (name, pattern)], None, axes):
                parts.append((name, pattern))
                break
    if not parts:
        return bases[:1], None
    taken = {name for name, _ in parts}
    if "..." not in parts[0][1]:
        small = [name for name, value in tensors.items() if value.dim() == 2 and value.requires_grad]
        bases = [(name, pattern) for name in small if name not in taken for pattern in ("o i", "i o")]
    return parts, next((base for base in bases if _fits(probe, parts, base, axes)), None)


def _pair(described: Described) -> str:
    return f"({', '.join(map(json.dumps, described))})"


def _locate(
    module: nn.Module, parts: list[Described], residual: Described | None, axes: dict[str, int]
) -> CoefficientTensor:
    known = axes if any("(" in pattern for _, pattern in parts) else {}
    return KANLayerSpec("", nn.Module, parts, residual, axes=known).locate_as_described(module)


def _fits(probe: Probe, parts: list[Described], residual: Described | None, axes: dict[str, int]) -> bool:
    """Whether the patterns fit the parameters, and the gradients of the layer."""
    try:
        tensor = _locate(probe.layer, parts, residual, axes)
    except ValueError:
        return False
    return probe.axes(tensor).is_verified


def _patterns(shape: torch.Size, knows_inputs: bool, letter: str = "k") -> Iterator[str]:
    """Layouts that a parameter of this shape may have, each axis on its own first."""
    if len(shape) <= _MOST_AXES:
        yield from axis_patterns(shape, letter)
    if knows_inputs:
        yield "o i ..."
        yield f"o i {letter} ..."
    for flat in (f"(i {letter})", f"({letter} i)") if knows_inputs else ():
        for words in (["o", flat], [flat, "o"]):
            yield " ".join([*words, "..."])
