# Copyright 2026 the peft-lotra authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""A network as a chain of stages: its KAN layers and normalizations, each with the coefficients in force."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast

from torch import Tensor, nn

from ...tucker import Update
from ..basis import UniformGrid
from ..layer import KANLinear
from ..network import LayerStack
from ..slim_kan import SlimKANLinear
from .norms import is_norm, norm_size


_Finder = TypeVar("_Finder", bound=Callable)


class Stage(NamedTuple):
    """
    One layer of a chain. Its coefficient tensor is the sum of `dense` and `updates`.

    Attributes:
        module: a `KANLinear`, a `SlimKANLinear`, or a normalization that `is_norm` accepts.
        dense: spline_weight (O, I, K) and base_weight (O, I), adapters on them included. None for a normalization and
            for a Slim layer, whose components are the first of `updates`.
        updates: Tucker tensors (O, I, K or K + 1), those of the adapters that a forward pass uses, without dropout.
    """

    module: nn.Module
    dense: tuple[Tensor, Tensor] | None = None
    updates: tuple[Update, ...] = ()

    @property
    def is_norm(self) -> bool:
        """Whether the stage is a normalization."""
        return not isinstance(self.module, (KANLinear, SlimKANLinear))

    @property
    def layer(self) -> KANLinear | SlimKANLinear:
        """The KAN layer of a stage that is no normalization."""
        assert isinstance(self.module, (KANLinear, SlimKANLinear))
        return self.module

    @property
    def in_features(self) -> int:
        """The size I of the last dimension of the inputs."""
        return norm_size(self.module) if self.is_norm else self.layer.in_features

    @property
    def shape(self) -> tuple[int, int, int]:
        """(O, I, K + 1), with the residual branch as the last slice."""
        layer = self.layer
        return layer.out_features, layer.in_features, layer.grid_size + layer.spline_order + 1

    @property
    def grid(self) -> UniformGrid:
        """The grid that the KAN layer has now."""
        layer = self.layer
        low, high = cast(Tensor, layer.grid_bounds).unbind(-1)
        return UniformGrid(low, high, layer.grid_size, layer.spline_order)


# `functools.singledispatch` would do this, but `torch.compile` cannot trace it for abstract classes (PEFT's tuners).
_finders: dict[type, Callable[[Any], list[Stage] | None]] = {}


def stages_of(model: nn.Module) -> list[Stage] | None:
    """The stages that `model` is the composition of; None if it has forward hooks, or is not known to be a chain."""
    if model._forward_hooks or model._forward_pre_hooks:
        return None
    for cls in type(model).__mro__:
        if cls in _finders:
            return _finders[cls](model)
    if isinstance(original := getattr(model, "_orig_mod", None), nn.Module):  # what `torch.compile` returns
        return stages_of(original)
    return [Stage(model)] if is_norm(model) else None


def register_stages(cls: type[nn.Module]) -> Callable[[_Finder], _Finder]:
    """Decorates a function that returns the stages of a module of this class; see `stages_of`.

    If subclasses may compute something else, the function must check `type(model).forward`.
    """

    def register(finder: _Finder) -> _Finder:
        _finders[cls] = finder
        return finder

    return register


def register_wrapper(cls: type[nn.Module], inner: Callable[[Any], nn.Module | None]) -> None:
    """Teaches a class of modules that return what `inner(module)` makes of their input; None for one that does not."""

    def look_through(module: nn.Module) -> list[Stage] | None:
        wrapped = inner(module)
        return None if wrapped is None else stages_of(wrapped)

    _finders[cls] = look_through


@register_stages(KANLinear)
def _dense_layer(model: KANLinear) -> list[Stage] | None:
    if type(model).forward is not KANLinear.forward:
        return None
    return [Stage(model, (model.spline_weight, model.base_weight))]


@register_stages(SlimKANLinear)
def _slim_layer(model: SlimKANLinear) -> list[Stage] | None:
    if type(model).forward is not SlimKANLinear.forward:
        return None
    return [Stage(model, updates=(Update(1.0, model.components),))]


@register_stages(nn.Sequential)
def _sequence(model: nn.Sequential) -> list[Stage] | None:
    return _join(list(model)) if type(model) is nn.Sequential else None


@register_stages(LayerStack)
def _stack(model: LayerStack) -> list[Stage] | None:
    return _join(list(model.layers)) if type(model).forward is LayerStack.forward else None


def _join(modules: list[nn.Module]) -> list[Stage] | None:
    chains = [stages_of(module) for module in modules]
    if not chains or any(chain is None for chain in chains):
        return None
    return [stage for chain in chains for stage in chain or ()]


register_wrapper(nn.parallel.DistributedDataParallel, lambda wrapper: wrapper.module)
register_wrapper(nn.DataParallel, lambda wrapper: wrapper.module)
