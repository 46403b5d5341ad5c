# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""A network as a chain of stages: KAN layers with their coefficients, normalizations, activations, input maps."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor, nn

from ..kan.basis import in_transform
from ..kan.formula import LayerFormula
from ..kan.input_map import FirstMap, InputMap
from ..kan.layer import KANLinear
from ..kan.network import LayerStack, is_norm
from ..kan.slim_kan import SlimKANLinear
from ..modules.calls import is_tracing
from .norms import NORMS


# Modules that map each number separately.
ACTIVATIONS = (
    nn.Identity,
    nn.Tanh,
    nn.Sigmoid,
    nn.SiLU,
    nn.GELU,
    nn.Softplus,
    nn.ELU,
    nn.Mish,
)


class Stage(NamedTuple):
    """One step of a chain: a layer with its formula, or a normalization, an input map, an activation.

    Attributes:
        module: The module.
        formula: The formula of an `nn.Linear` or a KAN layer, with the updates of applied adapters.
    """

    module: Any
    formula: LayerFormula | None = None

    @property
    def in_features(self) -> int | None:
        """The size I of the last dimension of the inputs. None for any size."""
        coefficients = None if self.formula is None else self.formula.coefficients
        if coefficients is not None:
            return coefficients.shape[1]
        if isinstance(self.module, nn.LayerNorm):
            return self.module.normalized_shape[0]
        return getattr(self.module, "in_features", None)


class Entry(NamedTuple):
    """How `jet` treats the modules of a class.

    Attributes:
        stages: Returns the stages that a module without hooks is the composition of, or None. It must check
            `type(module).forward` if derived classes may compute something else.
        inner: For wrappers: the module that computes the wrapper's outputs, or None.
        jet: `jet(module, x, directions, order, weights)` returns the jet of a module that is no chain of stages. With
            weights (D,), the derivative of the highest order is (1, ..., O) or (..., O).
    """

    stages: Callable[[Any], list[Stage] | None] | None = None
    inner: Callable[[Any], nn.Module | None] | None = None
    jet: Callable[[Any, Tensor, Tensor, int, Tensor | None], Any] | None = None


# `functools.singledispatch` would do this, but `torch.compile` cannot trace it for abstract classes (PEFT's tuners).
_entries: dict[type, Entry] = {}
_elementwise: WeakSet[nn.Module] = WeakSet()


def register(cls: type[nn.Module], entry: Entry) -> None:
    """Teach `jet` a class of modules, and the derived classes that are not registered.

    The entry of `nn.Module` is for all other classes.
    """
    _entries[cls] = entry


def entry_of(cls: type) -> Entry:
    """Return the entry of the class, or of the nearest base class that is registered."""
    for base in cls.__mro__:
        if base in _entries:
            return _entries[base]
    return Entry()


def is_known(model: nn.Module) -> bool:
    """Return whether the class of the model, or a base class, is registered."""
    return entry_of(type(model)) is not _entries.get(nn.Module)


def _unwrap(model: nn.Module) -> tuple[nn.Module, Entry]:
    """Return the model inside of wrappers that return its outputs, and its entry, which is empty if it has hooks."""
    while not _is_changed(model):
        entry = entry_of(type(model))
        inner = getattr(model, "_orig_mod", None)  # of `torch.compile`
        if entry.inner is not None:
            inner = entry.inner(model)
        if not isinstance(inner, nn.Module):
            return model, entry
        model = inner
    return model, Entry()


def stages_of(model: nn.Module) -> list[Stage] | None:
    """Return the stages of a model that is their composition. None if it has forward hooks, or is no such model."""
    model, entry = _unwrap(model)
    return None if entry.stages is None else entry.stages(model)


def composed_jet(model: nn.Module) -> Callable[[Tensor, Tensor, int, Tensor | None], Any] | None:
    """Return the `jet` that the model is registered with, as a function of the other arguments."""
    model, entry = _unwrap(model)
    return None if entry.jet is None else partial(entry.jet, model)


def join_stages(modules: Iterable[nn.Module]) -> list[Stage] | None:
    """Return the stages of modules that run one after the other. None without modules, or if one is unknown.

    A `FirstMap` is known as the first one only.
    """
    joined: list[Stage] = []
    for module in modules:
        stages = [Stage(module)] if _is_elementwise(module) else stages_of(module)
        if stages is None:
            return None
        joined += stages
    if any(isinstance(stage.module, FirstMap) for stage in joined[1:]):
        return None
    return joined or None


def _is_elementwise(module: nn.Module) -> bool:
    """Return whether a module of the user has no state and maps each number separately, such as a sine."""
    has_state = module._parameters or module._buffers or module._modules
    if has_state or _is_changed(module) or type(module).__module__.startswith("torch."):
        return False
    if module not in _elementwise and not is_tracing() and not in_transform():
        z = torch.tensor([-1.7, 0.3, 2.1, -0.4, 1.1])
        try:
            together = module(z)
            separate = [module(number.view(1, 1)).view(1) for number in z]
        except Exception:  # the module may need another shape
            return False
        if together.shape == z.shape and torch.allclose(together, torch.cat(separate)):
            _elementwise.add(module)
    return module in _elementwise


def _is_changed(model: nn.Module) -> bool:
    """Return whether a module has forward hooks, or a `forward` that is not defined by its class."""
    has_hooks = model._forward_hooks or model._forward_pre_hooks
    return bool(has_hooks) or "forward" in vars(model)


def _linear(module: nn.Linear) -> list[Stage] | None:
    # a subclass may do more, and a Slim layer or a parametrization computes the weight
    if type(module) is not nn.Linear or "weight" not in module._parameters:
        return None
    formula = LayerFormula(None, None, module.weight, bias=module.bias)
    return [Stage(module, formula)]


def _norm(module: nn.Module) -> list[Stage] | None:
    return [Stage(module)] if is_norm(module) else None


def _register_exact(
    cls: type[nn.Module],
    stages: Callable[[Any], list[Stage] | None],
) -> None:
    """Register a class, but not the derived classes with another `forward`."""

    def stages_or_none(module: nn.Module) -> list[Stage] | None:
        return stages(module) if type(module).forward is cls.forward else None

    register(cls, Entry(stages_or_none))


for cls in (KANLinear, SlimKANLinear):
    _register_exact(cls, lambda layer: [Stage(layer, layer.formula)])
_register_exact(LayerStack, lambda net: join_stages(net.layers))
_register_exact(nn.Sequential, join_stages)
for cls in (FirstMap, InputMap, *ACTIVATIONS):
    _register_exact(cls, lambda module: [Stage(module)])
register(nn.Linear, Entry(_linear))
for cls in NORMS:
    register(cls, Entry(_norm))
