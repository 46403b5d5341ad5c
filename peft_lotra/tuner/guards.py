# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Guard the network around adapted layers.

Methods that rebuild the network (pykan's MultKAN), or move all grids, raise while it has adapted layers. Methods that
write a checkpoint write the network with its adapters merged, under the original names. Both are set on the instance,
and removed with the adapters.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn

from ..layers.kinds import KANLayerSpec
from ..modules.calls import places
from .grids import refuse_grid_change
from .layer import LoTRALayer, lotra_layers


def guard_network(model: nn.Module, layer_name: str, spec: KANLayerSpec) -> None:
    """Replace the methods that the kind names, on the innermost module around the layer that has one of them."""
    while layer_name:
        layer_name = layer_name.rpartition(".")[0]
        network = model.get_submodule(layer_name)
        guards = {}
        # a partial survives deepcopy and pickle
        for name, argument in spec.network_methods.items():
            guards[name] = partial(_refuse, network, name, argument)
        for name in spec.checkpoint_methods:
            guards[name] = partial(_with_adapters_merged, network, name)
        guards = {name: guard for name, guard in guards.items() if hasattr(type(network), name)}
        if guards:
            vars(network).update(guards)  # attributes, which hide the methods
            return


def release_networks(model: nn.Module) -> None:
    """Restore the methods of networks without adapted layers."""
    for network in model.modules():
        if next(lotra_layers(network), None) is not None:
            continue
        for name, value in list(vars(network).items()):
            if isinstance(value, partial) and value.func in (_refuse, _with_adapters_merged):
                del network.__dict__[name]


@contextmanager
def base_layers_in_place(model: nn.Module) -> Iterator[None]:
    """Replace the adapted layers by their base layers within a context."""
    adapted = [place for place in places(model) if isinstance(place[-1], LoTRALayer)]
    for parent, name, layer in adapted:
        parent._modules[name] = layer._modules["base_layer"]
    try:
        yield
    finally:
        for parent, name, layer in adapted:
            parent._modules[name] = layer


def _refuse(
    network: nn.Module,
    name: str,
    argument: str | None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Refuse a call; if `argument` is given, only a call in which it is true."""
    method = getattr(type(network), name)
    if argument is not None:
        call = inspect.signature(method).bind(network, *args, **kwargs)
        call.apply_defaults()
        if not call.arguments.get(argument):
            return method(network, *args, **kwargs)
        name = f"{name}({argument}=True)"
    return refuse_grid_change(name)


def _with_adapters_merged(
    network: nn.Module,
    name: str,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Call a method of the network with its base layers, which hold the effective coefficients."""
    method = getattr(type(network), name)
    layers = [layer for _, layer in lotra_layers(network) if not (layer.merged or layer.disable_adapters)]
    for layer in layers:
        layer.merge()
    try:
        with base_layers_in_place(network):
            return method(network, *args, **kwargs)
    finally:
        for layer in layers:
            if layer.merged:
                layer.unmerge()
