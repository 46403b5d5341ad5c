# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Samples for `slim`, `extract_lotra` and `suggest_ranks`: a model's outputs for them, and those of its layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..modules.calls import modes_kept


# a tensor, positional arguments, named ones, or a function that runs the model and returns its output
Inputs = torch.Tensor | tuple | list | Mapping[str, Any] | Callable[[nn.Module], Any]
_EXPECTED = (
    "`inputs` must be samples that are finite and differ, as the model takes them: a tensor, a tuple of arguments, a "
    "dict of named ones, or a function that runs the model and returns its output, got "
)


def check_inputs(inputs: Any) -> None:
    """Raises a ValueError for inputs that are not finite, or that are all the same; a function is not looked into."""
    if not isinstance(inputs, (torch.Tensor, tuple, list, Mapping)) and callable(inputs):
        return
    tensors = list(_tensors(inputs))
    if any(tensor.is_meta or tensor.layout != torch.strided for tensor in tensors):
        raise ValueError(f"{_EXPECTED}a tensor that is not dense, or without values (on the meta device).")
    given = f"a {type(inputs).__name__}" + (
        f" of shape {tuple(inputs.shape)}" if isinstance(inputs, torch.Tensor) else f" of {len(tensors)} tensors"
    )
    if not all(tensor.isfinite().all() for tensor in tensors):
        raise ValueError(f"{_EXPECTED}{given} with NaN or infinite values.")
    if not any(_differ(tensor) for tensor in tensors):
        what = "with a single sample, or many that are equal" if any(map(torch.numel, tensors)) else "without samples"
        raise ValueError(f"{_EXPECTED}{given} {what}.")


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list, Mapping)):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(part)


def _differ(tensor: torch.Tensor) -> bool:
    rows = tensor.flatten(0, -2) if tensor.dim() > 1 else tensor
    return bool(rows.numel()) and rows.dim() > 0 and bool((rows != rows[:1]).any())


def model_outputs(model: nn.Module, inputs: Inputs) -> torch.Tensor:
    """The output of the model in evaluation mode; of a tuple or a dict (`ModelOutput`) the first entry."""
    with modes_kept(model):
        model.eval()
        if isinstance(inputs, torch.Tensor):
            result = model(inputs)
        elif isinstance(inputs, Mapping):
            result = model(**inputs)
        else:
            result = model(*inputs) if isinstance(inputs, (tuple, list)) else inputs(model)
    first = next(iter(result.values())) if isinstance(result, Mapping) else result
    first = first[0] if isinstance(first, (tuple, list)) and first else first
    if not isinstance(first, torch.Tensor) or not first.is_floating_point():
        raise TypeError(
            "With `inputs`, the model must return a tensor of floating point numbers, or a tuple or dict that begins "
            f"with one, but it returned {type(result).__name__}. Wrap it in a module that does, or pass a function "
            "that runs the model and returns such a tensor."
        )
    return first.unsqueeze(-1) if first.dim() == 1 else first


@contextmanager
def observed(layers: Mapping[str, nn.Module], note: Callable[[str, torch.Tensor, Any], None]) -> Iterator[None]:
    """Calls `note(name, x, y)` with the first argument and the output of each call of a layer.

    Unlike a hook, it also sees calls of `layer.forward`.
    """
    before = {name: vars(layer).get("forward") for name, layer in layers.items()}
    try:
        for name, layer in layers.items():
            vars(layer)["forward"] = _noting(name, layer.forward, note)
        yield
    finally:
        for name, forward in before.items():
            del vars(layers[name])["forward"]
            if forward is not None:
                vars(layers[name])["forward"] = forward


def _noting(name: str, run: Callable[..., Any], note: Callable[[str, torch.Tensor, Any], None]) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        y = run(*args, **kwargs)
        note(name, args[0] if args else next(iter(kwargs.values())), y)
        return y

    return forward
