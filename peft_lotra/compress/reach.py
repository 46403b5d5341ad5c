# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Whether the layers that are exchanged are those that a model calls.

A model may call its layers through a function that holds them: `self.mlp = lambda x: m.c_proj(m.act(m.c_fc(x)))`, as
in minGPT. A deep copy of the model has the same function, which goes on calling the layers of the original.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import FunctionType
from typing import Any

import torch
from torch import nn

from ..layers.registry import walk_kan_layers
from .inputs import Inputs, model_outputs, observed


_IN_PLACE = (
    "Pass `inplace=True`: then the layers of the model itself are exchanged, and no copy is made. Or call the layers "
    "as attributes of the module, in a method instead of a function that is kept."
)


def check_copy(model: nn.Module) -> None:
    """Raises a ValueError if a copy of the model would call KAN layers of the original through a closure."""
    for name, held in _held(model):
        if any(True for _ in walk_kan_layers(held)):
            raise ValueError(
                f"`{name}` is a function that holds a {type(held).__name__} of the model with KAN layers, so that a "
                f"copy of the model would go on calling the layers of the original. {_IN_PLACE}"
            )


def check_exchange(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Raises a ValueError if a closure holds one of the layers itself, so that exchanging it has no effect."""
    names = {id(layer): name for name, layer in layers.items()}
    for name, held in _held(model):
        if id(held) in names:
            raise ValueError(
                f"`{name}` is a function that holds the layer `{names[id(held)]}` itself, and would go on calling it "
                "after it is exchanged. Let the function look the layer up in its module when it is called."
            )


def outputs_by(
    model: nn.Module, inputs: Inputs, exchanged: Mapping[str, nn.Module], originals: Mapping[str, nn.Module]
) -> torch.Tensor:
    """The model's output; a ValueError if it does not call the exchanged layers, or calls the originals."""
    called: set[str] = set()
    inside = {id(part) for layer in exchanged.values() for part in layer.modules()}
    watched = {f"new {name}": layer for name, layer in exchanged.items()}
    watched |= {f"old {n}": originals[n] for n in exchanged if n in originals and id(originals[n]) not in inside}
    error = None
    try:
        with observed(watched, lambda name, x, y: called.add(name)):
            y = model_outputs(model, inputs)
    except Exception as raised:  # e.g. of a layer whose parameters a `SlimLayer` has taken out
        y, error = None, raised
    wrong = [n for n in exchanged if f"old {n}" in called or f"new {n}" not in called]
    if wrong:
        raise ValueError(
            f"The model does not call the layers {wrong} that were exchanged, but others, through references that no "
            f"copy or exchange reaches (a closure, a list, a global). {_IN_PLACE}"
        ) from error
    if y is None:
        assert error is not None
        raise error
    return y


def _held(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of the model that functions among its attributes hold, with the names of the attributes."""
    own = {id(module) for module in model.modules()}
    for path, module in model.named_modules():
        for attribute, value in vars(module).items():
            for function in _functions(value):
                cells = [_content(cell) for cell in function.__closure__ or ()]
                for content in (*cells, *(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
                    if isinstance(content, nn.Module) and id(content) in own:
                        yield f"{path}.{attribute}".lstrip("."), content


def _functions(value: Any) -> Iterator[FunctionType]:
    if isinstance(value, FunctionType):
        yield value
    elif type(value) in (list, tuple, dict):
        for part in value.values() if isinstance(value, dict) else value:
            if isinstance(part, FunctionType):
                yield part


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not yet bound
        return None
