# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The readings of a description: the one that a layer computes is chosen, and a description that it contradicts is
refused. What was found out is kept for all layers of one class, shapes and settings."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from numbers import Number
from types import BuiltinFunctionType, FunctionType
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from ..modules.calls import modules_of
from .coefficients import CoefficientTensor, Described
from .probe import Probe, Verdict


Reading = tuple[tuple[Described, ...], "Described | None"]

_SETTINGS = (str, FunctionType, BuiltinFunctionType, Number)  # Number: of numpy too

# By class, and by what decides how a layer of it runs: the place of the chosen reading, and the verdict on it; layers
# that passed.
_CHOSEN: WeakKeyDictionary[type, dict[Any, tuple[int, Verdict]]] = WeakKeyDictionary()
_PASSED: WeakKeyDictionary[type, set[Any]] = WeakKeyDictionary()


def choose_reading(
    layer: nn.Module, grid: Mapping[str, Any], readings: Sequence[Reading], locate: Callable[..., CoefficientTensor]
) -> CoefficientTensor:
    """The first reading of the coefficients of a layer, unless it is not verified and a later one is.

    Args:
        layer: The layer.
        grid: The state that gives the coefficients their meaning.
        readings: Parts and residual branch of each reading.
        locate: Finds the coefficients by them, or raises a `ValueError` if the patterns do not fit.

    Raises:
        ValueError: The patterns of the first reading do not fit.
    """
    known, key = _CHOSEN.setdefault(type(layer), {}), _reading_key(layer, readings)
    if key in known:
        return locate(*readings[known[key][0]])
    probe, first = Probe(layer, grid), locate(*readings[0])
    if not probe.can_run(first):
        return first
    verdicts: list[Verdict] = []
    for place, reading in enumerate(readings):
        try:
            tensor = locate(*reading) if place else first
        except ValueError:
            continue
        verdicts.append(probe.axes(tensor))
        if verdicts[-1].is_verified:
            known[key] = place, verdicts[-1]
            return tensor
    if verdicts[0][:2] != (None, None):  # another layer of these shapes may say more
        known[key] = 0, verdicts[0]
    return first


def _reading_key(layer: nn.Module, readings: Sequence[Reading]) -> tuple[Any, ...]:
    return (tuple(readings), *settings_of(layer))


def _check_key(layer: nn.Module, tensor: CoefficientTensor, linear: bool) -> tuple[Any, ...]:
    return (tensor.family, tuple(tensor.parameters.values()), linear, *settings_of(layer))


def note_verified(layer: nn.Module, readings: Sequence[Reading], tensor: CoefficientTensor, linear: bool) -> None:
    """Takes the first reading of a layer as verified, and the layer as checked, from now on."""
    _CHOSEN.setdefault(type(layer), {})[_reading_key(layer, readings)] = 0, Verdict(True)
    _PASSED.setdefault(type(layer), set()).add(_check_key(layer, tensor, linear))


def check_description(
    name: str,
    layer: nn.Module,
    grid: Mapping[str, Any],
    readings: Sequence[Reading],
    tensor: CoefficientTensor,
    variants: Callable[[], Mapping[str, Callable[[], CoefficientTensor]]],
    linear: bool,
) -> None:
    """Compares the axes of a layer, whether it uses its coefficients, and is linear in them, with its description.

    Args:
        name: The name of the layer in its model.
        layer: The layer.
        grid: The state that gives the coefficients their meaning.
        readings: Those that `choose_reading` chose from.
        tensor: Where its coefficients are.
        variants: Returns other patterns of the first parameter; each locates the coefficients by it.
        linear: Whether the description says that the output is linear in the coefficients.

    Raises:
        ValueError: The gradients contradict the pattern, the output does not depend on one of the parameters, or it
            is not linear.
    """
    passed, key = _PASSED.setdefault(type(layer), set()), _check_key(layer, tensor, linear)
    if key in passed:
        return
    layer_name = f"The layer `{name}` ({type(layer).__name__}, of the KAN family {tensor.family!r})"
    probe = Probe(layer, grid)
    _, verdict = _CHOSEN.get(type(layer), {}).get(_reading_key(layer, readings)) or (0, probe.axes(tensor))
    if False in verdict[:2] or verdict.has_raised:
        pattern = tensor.parameters[tensor.name].pattern
        fitting = [other for other, locate in variants().items() if _is_verified(probe, locate)]
        if fitting or verdict.contradicted:
            remedy = f"{' or '.join(map(repr, fitting))} would fit." if fitting else "Correct it."
            slices = "an output, or an input, does not belong to its own slice of the coefficients"
            raise ValueError(
                f"{layer_name} does not compute what its description says. By its gradients `{tensor.name}` "
                f"{tuple(tensor.get_parameter(layer).shape)} is not laid out as {pattern!r}: "
                f"{verdict.reason if verdict.has_raised else slices}. {remedy}"
            )
    if unused := probe.unused(tensor):
        raise ValueError(
            f"{layer_name} does not use {', '.join(f'`{parameter}`' for parameter in unused)}: its output does not "
            "depend on it, and an adapter there would do nothing. Describe the family without it "
            "(`register_kan_layer`), or leave the layer out of `target_modules`."
        )
    if linear and not probe.is_linear(tensor):
        names = ", ".join(f"`{parameter}`" for parameter in tensor.parameters)
        raise ValueError(
            f"{layer_name} has an output that is not linear in {names}: a normalization may "
            "follow, or the parameters shape the basis functions. Describe the family by `register_kan_layer(..., "
            "linear=False)`: without a fast path, everything else works."
        )
    passed.add(key)


def _is_verified(probe: Probe, locate: Callable[[], CoefficientTensor]) -> bool:
    try:
        return probe.axes(locate()).is_verified
    except ValueError:
        return False


def settings_of(layer: nn.Module) -> tuple[Any, ...]:
    """What decides how a layer of its class runs: shapes, settings, and the modules inside."""
    key: list[Any] = []
    for module in modules_of(layer):
        key += [type(module)] if module is not layer else []
        key += [(name, value.shape, value.dtype) for name, value in module._parameters.items() if value is not None]
        key += [
            (name, getattr(value, "__qualname__", value))  # of a function its name
            for name, value in vars(module).items()
            if isinstance(value, _SETTINGS) and name != "training"
        ]
    return tuple(key)


def pattern_variants(pattern: str) -> list[str]:
    """The patterns that exchange two axes of this one, or the order within parentheses; `o` and `i` exchanged first.

    Example:
        >>> pattern_variants("o (i k)")
        ['i (o k)', 'k (i o)', 'o (k i)']
    """
    axes = re.findall(r"\w+", re.sub(r":\d", "", pattern))
    pairs = sorted(combinations(axes, 2), key=lambda pair: set(pair) != {"o", "i"})
    return [re.sub(r"\b[^\W\d]\w*", lambda m, pair=pair: _other(m[0], pair), pattern) for pair in pairs]


def exchange_axes(pattern: str) -> str:
    """The pattern with outputs and inputs exchanged.

    Example:
        >>> exchange_axes("i o k"), exchange_axes("i k")
        ('o i k', 'o k')
    """
    return re.sub(r"\b[oi]\b", lambda m: _other(m[0], ("o", "i")), pattern)


def _other(axis: str, pair: tuple[str, str]) -> str:
    return pair[1 - pair.index(axis)] if axis in pair else axis
