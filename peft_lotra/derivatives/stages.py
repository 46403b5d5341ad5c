# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""A network as a chain of stages: its KAN layers and normalizations, each with the coefficients in force."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ..kan.basis import UniformGrid
from ..kan.input_map import InputMap
from ..kan.layer import KANLinear, SplineLayer
from ..kan.modeling_kan import KANModel
from ..kan.network import LayerStack, is_norm
from ..kan.slim_kan import SlimKANLinear
from ..tucker import Update
from .bases import Basis, FunctionBasis
from .norms import Norm, norm_size


# modules that map each number by itself
ACTIVATIONS = (nn.Identity, nn.Tanh, nn.Sigmoid, nn.SiLU, nn.GELU, nn.Softplus, nn.ELU, nn.Mish)


class Branch(NamedTuple):
    """A part of a layer of another library, sum_{i,k} weight[o,i,k] basis_k(x[i]), for normalized x if with a norm."""

    basis: Basis
    weight: Tensor  # (O, I, K) in force, with adapters and scales
    norm: Norm | None = None


class Stage(NamedTuple):
    """One layer of a chain: a KAN layer with coefficients `dense` plus `updates`, or one of another library, the sum
    of `branches` and `bias`; a normalization, an `InputMap`, or an activation.

    Attributes:
        dense: spline_weight (O, I, K) and base_weight (O, I), adapters on them included. None for a Slim layer, whose
            components are the first of `updates`, and where there is no KAN layer.
        updates: Tensors (O, I, K or K + 1), those of the adapters that a forward pass uses, without dropout.
    """

    module: nn.Module
    dense: tuple[Tensor, Tensor] | None = None
    updates: tuple[Update, ...] = ()
    branches: tuple[Branch, ...] = ()
    bias: Tensor | None = None

    @property
    def is_kan(self) -> bool:
        """Whether the stage is a KAN layer."""
        return isinstance(self.module, SplineLayer) or len(self.branches) > 0

    @property
    def layer(self) -> SplineLayer:
        """The KAN layer of a stage that is one."""
        assert isinstance(self.module, SplineLayer)
        return self.module

    @property
    def between(self) -> Norm | InputMap:
        """The module of a stage that is no KAN layer, nor an activation."""
        assert isinstance(self.module, Norm | InputMap)
        return self.module

    @property
    def is_activation(self) -> bool:
        """Whether the stage maps each number by itself."""
        return isinstance(self.module, ACTIVATIONS)

    @property
    def in_features(self) -> int | None:
        """The size I of the last dimension of the inputs; None for any."""
        if self.branches:
            return self.branches[0].weight.shape[1]
        if self.is_activation:
            return None
        module = self.module if self.is_kan else self.between
        return norm_size(module) if isinstance(module, Norm) else cast(int, module.in_features)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(O, I, K + 1), with the residual branch as the last slice."""
        if self.branches:
            outputs, inputs, _ = self.branches[0].weight.shape
            return outputs, inputs, sum(branch.weight.shape[2] for branch in self.branches)
        return self.layer.out_features, self.layer.in_features, self.layer.grid_size + self.layer.spline_order + 1

    @property
    def grid(self) -> UniformGrid:
        """The grid that the KAN layer has now."""
        return self.layer.grid


# `functools.singledispatch` would do this, but `torch.compile` cannot trace it for abstract classes (PEFT's tuners).
_finders: dict[type, Callable[[Any], list[Stage] | None]] = {}
_others: list[Callable[[nn.Module], list[Stage] | None]] = []
_inner: dict[type, Callable[[Any], nn.Module | None]] = {}  # of wrappers


def stages_of(model: nn.Module) -> list[Stage] | None:
    """The stages that `model` is the composition of; None if it has forward hooks, or is not known to be a chain."""
    if model._forward_hooks or model._forward_pre_hooks:
        return None
    if (finder := entry_of(_finders, type(model))) is not None:
        return finder(model)
    if isinstance(original := getattr(model, "_orig_mod", None), nn.Module):  # what `torch.compile` returns
        return stages_of(original)
    if is_norm(model):
        return [Stage(model)]
    for find in _others:
        if (found := find(model)) is not None:
            return found
    return None


def is_known(model: nn.Module) -> bool:
    """Whether the class of a model is one whose stages are known."""
    return any(cls in _finders for cls in type(model).__mro__)


def register_finder(finder: Callable[[nn.Module], list[Stage] | None]) -> None:
    """Makes `stages_of` ask `finder` about modules of classes that it does not know."""
    _others.append(finder)


def register_stages(cls: type[nn.Module], finder: Callable[[Any], list[Stage] | None]) -> None:
    """Teaches `stages_of` a class: `finder` returns the stages of a module without hooks, or None; it must check
    `type(module).forward` if subclasses may compute something else."""
    _finders[cls] = finder


def register_wrapper(cls: type[nn.Module], inner: Callable[[Any], nn.Module | None]) -> None:
    """Teaches `stages_of` a class of modules that return what `inner(module)`, if not None, makes of their input."""
    register_stages(cls, lambda module: None if (wrapped := inner(module)) is None else stages_of(wrapped))
    _inner[cls] = inner


def entry_of(registry: Mapping[type, Any], cls: type) -> Any:
    """The entry of a class, or of the nearest class that it is derived from; None if there is none."""
    for known in cls.__mro__:  # `next(..., None)` cannot be compiled before torch 2.10
        if known in registry:
            return registry[known]
    return None


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside of wrappers that return what it returns, down to the first module with forward hooks."""
    while not (model._forward_hooks or model._forward_pre_hooks):
        find = entry_of(_inner, type(model))
        inner = None if find is None else find(model)
        inner = getattr(model, "_orig_mod", None) if inner is None else inner  # of `torch.compile`
        if not isinstance(inner, nn.Module):
            break
        model = inner
    return model


def _dense_layer(layer: KANLinear) -> list[Stage] | None:
    plain = type(layer).forward is KANLinear.forward
    return [Stage(layer, (layer.spline_weight, layer.base_weight))] if plain else None


def _slim_layer(layer: SlimKANLinear) -> list[Stage] | None:
    plain = type(layer).forward is SlimKANLinear.forward
    return [Stage(layer, updates=(Update(1.0, layer.components),))] if plain else None


def _join(modules: Iterable[nn.Module]) -> list[Stage] | None:
    found = [stages_of(module) for module in modules]
    return None if None in found else [stage for stages in found for stage in stages or ()] or None


def _map(module: InputMap) -> list[Stage] | None:
    return [Stage(module)] if type(module).forward is InputMap.forward else None


def _linear(module: nn.Linear) -> list[Stage] | None:
    if type(module) is not nn.Linear or "weight" not in module._parameters or module.weight is None:
        return None  # a subclass, or one whose weight something else computes (a Slim layer, a parametrization)
    branch = Branch(FunctionBasis(1, _identity), module.weight.unsqueeze(-1))
    return [Stage(module, branches=(branch,), bias=module.bias)]


def _identity(z: Tensor, highest: int) -> list[Tensor]:
    parts = [z, torch.ones_like(z), torch.zeros_like(z), torch.zeros_like(z)]
    return [part.unsqueeze(-1) for part in parts[: highest + 1]]


register_stages(InputMap, _map)
register_stages(nn.Linear, _linear)
for activation in ACTIVATIONS:
    register_stages(activation, lambda module: [Stage(module)] if type(module) in ACTIVATIONS else None)
register_stages(KANLinear, _dense_layer)
register_stages(SlimKANLinear, _slim_layer)
register_stages(LayerStack, lambda net: _join(net.layers) if type(net).forward is LayerStack.forward else None)
register_stages(nn.Sequential, lambda net: _join(net) if type(net) is nn.Sequential else None)
register_wrapper(nn.parallel.DistributedDataParallel, lambda wrapper: wrapper.module)
register_wrapper(nn.DataParallel, lambda wrapper: wrapper.module)


register_wrapper(KANModel, lambda model: model.kan if type(model).forward is KANModel.forward else None)
