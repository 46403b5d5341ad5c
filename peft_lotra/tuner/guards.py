# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""What the network around adapted layers may do while they are adapted.

Methods that rebuild the network (pykan's MultKAN), or move all grids, raise while it has adapted layers. Methods that
write a checkpoint write the network with its adapters merged, under the original names. Both kinds are set on the
instance, and removed with the adapters.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn

from ..layers.registry import KANLayerSpec
from ..modules.calls import places
from .grids import refuse_grid_change
from .layer import LoTRALayer, lotra_layers


def guard_network(model: nn.Module, layer_name: str, spec: KANLayerSpec) -> None:
    """Replaces the methods that the kind names, on the innermost module around the layer that has one of them."""
    names = [*spec.network_methods, *spec.checkpoint_methods]
    while names and layer_name:
        layer_name = layer_name.rpartition(".")[0]
        network = model.get_submodule(layer_name)
        here = [name for name in names if callable(getattr(type(network), name, None))]
        for name in here:
            # in __dict__, where an attribute hides a method; a partial survives deepcopy and pickle
            if name in spec.checkpoint_methods:
                network.__dict__[name] = partial(_with_adapters_merged, network, name)
            else:
                network.__dict__[name] = partial(_refuse, network, name, spec.network_methods[name])
        if here:
            return


def release_networks(model: nn.Module) -> None:
    """Gives networks without adapted layers their methods back."""
    for network in model.modules():
        guards = [
            name
            for name, value in vars(network).items()
            if isinstance(value, partial) and value.func in (_refuse, _with_adapters_merged)
        ]
        if guards and next(lotra_layers(network), None) is None:
            for name in guards:
                del network.__dict__[name]


@contextmanager
def base_layers_in_place(model: nn.Module) -> Iterator[None]:
    """Puts the base layers into the places of the adapted ones for a while."""
    adapted = [(parent, name, layer) for parent, name, layer in places(model) if isinstance(layer, LoTRALayer)]
    for parent, name, layer in adapted:
        parent._modules[name] = layer._modules["base_layer"]
    try:
        yield
    finally:
        for parent, name, layer in adapted:
            parent._modules[name] = layer


def _refuse(network: nn.Module, name: str, argument: str | None, *args: Any, **kwargs: Any) -> Any:
    """Refuses a call; if `argument` is given, only a call in which it is true."""
    method = getattr(type(network), name)
    if next(lotra_layers(network), None) is None:  # the base layers are in their places
        return method(network, *args, **kwargs)
    if argument is not None:
        call = inspect.signature(method).bind(network, *args, **kwargs)
        call.apply_defaults()
        if not call.arguments.get(argument):
            return method(network, *args, **kwargs)
        name = f"{name}({argument}=True)"
    refuse_grid_change(name)


def _with_adapters_merged(network: nn.Module, name: str, *args: Any, **kwargs: Any) -> Any:
    """Calls a method of the network with its base layers in their places, holding the effective coefficients."""
    layers = [layer for _, layer in lotra_layers(network) if not (layer.merged or layer.disable_adapters)]
    for layer in layers:
        layer.merge()
    try:
        with base_layers_in_place(network):
            return getattr(type(network), name)(network, *args, **kwargs)
    finally:
        for layer in layers:
            layer.unmerge() if layer.merged else None
