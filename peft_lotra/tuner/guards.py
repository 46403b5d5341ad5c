# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""What the network around adapted layers may do while they are adapted.

Methods that rebuild the network (pykan's MultKAN), or move all grids, raise until the adapters are unloaded. Methods
that write a checkpoint write the network with its adapters merged, under the original names. Both kinds are shadowed
on the instance, and the shadows are removed with the adapters.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from ..families.registry import KANLayerSpec
from ..modules.calls import unwrap
from ..modules.locks import put_back_by
from .layer import LoTRALayer


def guard_network(model: nn.Module, layer_name: str, spec: KANLayerSpec) -> None:
    """Shadows the methods that the family names, on the innermost module around the layer that has one of them."""
    names = [*spec.network_methods, *spec.checkpoint_methods]
    while names and layer_name:
        layer_name = layer_name.rpartition(".")[0]
        network = model.get_submodule(layer_name)
        here = [name for name in names if callable(getattr(type(network), name, None))]
        for name in here:
            # in __dict__, where an attribute shadows a method; a partial survives deepcopy and pickle
            if name in spec.checkpoint_methods:
                network.__dict__[name] = partial(_with_adapters_merged, network, name)
            else:
                network.__dict__[name] = partial(_refuse, network, name, spec.network_methods[name])
        if here:
            return


def release_networks(model: nn.Module) -> None:
    """Removes the shadows of all networks in the model that have no adapted layer any more."""
    for network in model.modules():
        shadows = _shadows(network)
        if shadows and not any(isinstance(module, LoTRALayer) for module in network.modules()):
            for name in shadows:
                del network.__dict__[name]


@contextmanager
def bare_base(model: nn.Module) -> Iterator[nn.Module]:
    """The base model as it was: with the base layers in their places, and nothing refused.

    Raises a `ValueError` at the end if a base layer is not in its place any more.
    """
    shadows = [(network, dict(_shadows(network))) for network in model.modules() if _shadows(network)]

    def restore() -> None:
        for network, methods in shadows:
            network.__dict__.update(methods)

    with put_back_by(restore):
        with base_layers_in_place(model) as places:
            release_networks(model)
            yield unwrap(model)
            lost = [name for parent, name, layer in places if parent._modules.get(name) is not layer.base_layer]
            if lost:
                raise ValueError(
                    f"The layers {lost} were exchanged for others, to which their adapters do not belong."
                )


@contextmanager
def base_layers_in_place(model: nn.Module) -> Iterator[list[tuple[nn.Module, str, LoTRALayer]]]:
    """Puts the base layers into the places of the adapted ones: parent, name and adapted layer of each."""
    places = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent._modules.items()
        if isinstance(child, LoTRALayer)
    ]

    def restore() -> None:
        for parent, name, layer in places:
            setattr(parent, name, layer)

    with put_back_by(restore):
        for parent, name, layer in places:
            setattr(parent, name, layer.base_layer)
        yield places


def _shadows(network: nn.Module) -> dict[str, partial]:
    return {
        name: value
        for name, value in vars(network).items()
        if isinstance(value, partial) and value.func in (_refuse, _with_adapters_merged)
    }


def _refuse(network: nn.Module, name: str, argument: str | None, *args: Any, **kwargs: Any) -> Any:
    """Refuses a call; if `argument` is given, only a call in which it is true."""
    method = getattr(type(network), name)
    remedy = "Merge them first: `model = model.merge_and_unload()`."
    if argument is not None:
        call = inspect.signature(method).bind(network, *args, **kwargs)
        call.apply_defaults()
        if not call.arguments.get(argument):
            return method(network, *args, **kwargs)
        name, remedy = f"{name}({argument}=True)", f"Pass `{argument}=False`. Or merge" + remedy.removeprefix("Merge")
    raise RuntimeError(
        f"`{name}` rebuilds the network, exchanges its layers or moves their grids, which cannot work while LoTRA "
        f"adapters are attached. {remedy}"
    )


def _with_adapters_merged(network: nn.Module, name: str, *args: Any, **kwargs: Any) -> Any:
    """Calls a method of the network with its base layers in their places, holding the coefficients in force."""
    stored: list[tuple[nn.Parameter, torch.Tensor]] = []

    def restore() -> None:
        for parameter, data in reversed(stored):
            parameter.data = data

    with put_back_by(restore):
        with base_layers_in_place(network) as places:
            for _, _, layer in places:
                with torch.no_grad():
                    values = layer.parameters_in_force()
                for parameter_name, value in values.items():
                    parameter = layer.base_layer.get_parameter(parameter_name)
                    stored.append((parameter, parameter.data))
                    parameter.data = value
            return getattr(type(network), name)(network, *args, **kwargs)
