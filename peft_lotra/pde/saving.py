# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The model of a solution as one file: tensors in safetensors, the structure and settings as JSON in its header."""

from __future__ import annotations

import ast
import json
import os
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..modules.calls import own_attributes, runs_more_than_its_class
from ..modules.folders import naming_damage, replacing_files
from .constraints import HardConstraint


FILE = "solution.safetensors"
PACKAGES = ("torch.nn.modules.", "peft_lotra.kan", "peft_lotra.pde")  # whose classes a file may name
ARGUMENTS = {"kan": "network", "distance": "distance", "lift": "lift"}  # that replace children of a `HardConstraint`
POINTS = 64  # at which a loaded model is compared with the saved one
TOLERANCE = 1e-8  # of the largest value there

Node = dict[str, Any] | None  # the description of a module; None if it cannot be described


def save_model(
    folder: str | os.PathLike,
    model: nn.Module,
    points: Tensor,
    settings: dict[str, Any],
) -> None:
    """Write a model, its values at some points, and settings for JSON into a folder."""
    tensors = _named_tensors(model)
    for name, values in _evaluate(model, points).items():
        tensors[f"values.{name}"] = values
    copies = {}
    for name, tensor in tensors.items():
        # clones, since safetensors refuses shared memory
        copies[name] = tensor.detach().cpu().contiguous().clone()
    text = json.dumps({**settings, "model": _describe(model)}, allow_nan=False)
    with replacing_files(folder) as draft:
        save_file(copies, os.path.join(draft, FILE), {"solution": text})


def read_file(folder: str | os.PathLike) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the settings and the tensors of a folder; raise a `ValueError` if it holds no solution."""
    path = os.path.join(folder, FILE)
    if not os.path.isfile(path):
        raise ValueError(f"{folder} has no {FILE}. Write one by `solution.save(folder)`.")
    with naming_damage(path), safe_open(path, "pt") as file:
        settings = json.loads(file.metadata()["solution"])
        # clones, since matrix products choose their instructions by the address, which the file would decide
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (no dict)
    return settings, tensors


def build_model(
    node: Node,
    tensors: dict[str, Tensor],
    points: Tensor,
    replacements: dict[str, Any],
) -> Any:
    """Build a model from its description.

    Raises:
        ValueError: A replacement is missing, or its tensors or values differ from the saved ones.
    """

    def build(node: Node, place: str, argument: str) -> Any:
        """Build the module at a place of the model, or return what replaces it."""
        if argument in replacements:
            return _fill(replacements[argument], place, argument, tensors)
        cls = None if node is None else _classes().get(node["class"])
        if node is None or cls is None:
            raise ValueError(
                f"The file does not hold `{argument}`, which is no number and of no class that can be saved. Pass it "
                f"again: `Solution.load(folder, {argument}=...)`."
            )
        module = cls.__new__(cls)  # its own `__init__` would need arguments
        nn.Module.__init__(module)
        vars(module).update(ast.literal_eval(node["attributes"]))
        for name, requires_grad in node["parameters"].items():
            tensor = tensors.get(place + name)
            parameter = None if tensor is None else nn.Parameter(tensor, requires_grad)
            module.register_parameter(name, parameter)
        for name, is_persistent in node["buffers"].items():
            module.register_buffer(name, tensors.get(place + name), is_persistent)
        for name, child in node["children"].items():
            role = ARGUMENTS[name] if cls is HardConstraint else argument
            setattr(module, name, build(child, f"{place}{name}.", role))
        return module

    model = build(node, "", "model").eval()
    for name, values in _evaluate(model, points).items():
        saved = tensors[f"values.{name}"]
        tolerance = TOLERANCE * saved.abs().max()
        if saved.shape != values.shape or (saved - values).abs().max() > tolerance:
            raise ValueError(f"`{name}` has other values than when the solution was saved. Pass the same `{name}`.")
    return model


def _named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return all parameters and buffers, also buffers that a state dict leaves out."""
    tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    tensors.update(model.named_buffers(remove_duplicate=False))
    return tensors


@torch.no_grad()
def _evaluate(model: nn.Module, points: Tensor) -> dict[str, Tensor]:
    """Return the values of distance, lift and model at some points, the model last, which depends on the others."""
    values = {}
    for name in ("distance", "lift"):
        function = getattr(model, name, None)
        if callable(function):
            values[name] = function(points)
    values["network"] = model(points)
    return values


def _describe(module: Any) -> Node:
    """Describe a module by classes and plain attributes; None if they do not tell all."""
    name_of_class = _name_of_class(type(module))
    if name_of_class not in _classes() or runs_more_than_its_class(module):
        return None
    attributes = own_attributes(module)
    children = {name: _describe(child) for name, child in module._modules.items()}
    if isinstance(module, HardConstraint):
        for name in ("distance", "lift"):
            if callable(attributes.get(name)):
                del attributes[name]
                children[name] = None
    elif None in children.values():
        return None
    text = repr(attributes)
    try:
        is_literal = ast.literal_eval(text) == attributes
    except (ValueError, SyntaxError):  # not only numbers, strings, tuples, lists and dicts
        return None
    if not is_literal:
        return None
    parameters = {}
    for name, parameter in module._parameters.items():
        parameters[name] = parameter is not None and parameter.requires_grad
    buffers = {name: name not in module._non_persistent_buffers_set for name in module._buffers}
    return {
        "class": name_of_class,
        "attributes": text,
        "parameters": parameters,
        "buffers": buffers,
        "children": children,
    }


def _classes() -> dict[str, type[nn.Module]]:
    """Return the classes that a file may name. Nothing is imported for it."""
    classes = {}
    pending = [nn.Module]
    while pending:
        cls = pending.pop()
        pending += cls.__subclasses__()
        if cls.__module__.startswith(PACKAGES):
            classes[_name_of_class(cls)] = cls
    return classes


def _name_of_class(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _fill(
    replacement: Any,
    place: str,
    argument: str,
    tensors: dict[str, Tensor],
) -> Any:
    """Copy the tensors of a place into the module that replaces it. Nothing is changed if it has others."""
    present = _named_tensors(replacement) if isinstance(replacement, nn.Module) else {}
    saved = {}
    for name, tensor in tensors.items():
        if name.startswith(place):
            saved[name.removeprefix(place)] = tensor
    shapes = {name: tuple(tensor.shape) for name, tensor in present.items()}
    saved_shapes = {name: tuple(tensor.shape) for name, tensor in saved.items()}
    for name in sorted(present | saved):
        if shapes.get(name) != saved_shapes.get(name):
            raise ValueError(
                f"`{argument}` has {name} of shape {shapes.get(name)}, but {saved_shapes.get(name)} was saved. Build "
                "it as before, with the same adapters and grids."
            )
    if present:
        replacement.double()
        with torch.no_grad():
            for name, tensor in _named_tensors(replacement).items():
                tensor.copy_(saved[name])
    return replacement
