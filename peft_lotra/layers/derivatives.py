# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Layers and networks of other libraries as chains of stages, for the closed form of `peft_lotra.kan.jet`.

A layer is compared with its formula. A network is run once: its stages must follow each other with nothing between
them. Everything else is differentiated by transforms.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..derivatives.stages import Entry, Stage, is_known, join_stages, register, stages_of
from ..kan.basis import UniformGrid, in_transform
from ..kan.formula import LayerFormula
from ..kan.network import is_norm
from ..modules.calls import attributes_kept, buffers_kept, is_tracing
from .coefficients import CoefficientTensor
from .formula import State, find_formula, state_of
from .kinds import REGISTERED, KANLayerSpec
from .recognize import get_kan_spec


# The kind of a layer and where its coefficients are, or None if it has no formula by its kind.
Located = tuple[KANLayerSpec, CoefficientTensor]
_layers: WeakKeyDictionary[nn.Module, tuple[State, Located | None]] = WeakKeyDictionary()
# The stages of a network that is their composition. They are empty for any other network.
_networks: WeakKeyDictionary[nn.Module, tuple[State, list[nn.Module]]] = WeakKeyDictionary()


def find_stages(module: nn.Module) -> list[Stage] | None:
    """Return the stages of a layer, or of a network, of another library; None if it is no chain of known stages."""
    if is_tracing():
        return None
    if _locate(module):
        formula = formula_of(module)
        return formula and [Stage(module, formula)]
    if not module._modules or in_transform():
        return None
    state = _registered_kinds(), *state_of(module)
    traced_state, stages = _networks.get(module, (None, []))
    if traced_state != state:
        stages = _trace(module)
        _networks[module] = state, stages
    return join_stages(stages)


def formula_of(layer: nn.Module) -> LayerFormula | None:
    """Return the formula of a KAN layer of any library without adapters; None if it has none."""
    located = _locate(layer)
    reader = located and find_formula(layer, *located, for_jets=True)
    if reader is None:
        return None
    spec = reader.spec
    formula = reader.read(layer)
    basis: Any = formula.basis
    if isinstance(basis, UniformGrid):
        # the closed form has no gradient in the knots
        grid = spec.read_grid(layer).values()
        is_trained = any(isinstance(value, Tensor) and value.requires_grad for value in grid)
        return None if is_trained else formula
    terms = {*reader.tensor.parameters, spec.bias, *(spec.edge_scale or ())}
    tensors = []
    for name, value in (*layer.named_parameters(), *layer.named_buffers()):
        if name not in terms and not name.startswith(f"{spec.normalization}."):
            tensors.append(value)
    basis = basis._replace(tensors=tuple(tensors))
    return formula._replace(basis=basis)


def _registered_kinds() -> State:
    return tuple(map(id, REGISTERED.values()))


def _locate(module: nn.Module) -> Located | None:
    """Return the kind of a layer and where its coefficients are; None if it has no formula by its kind."""
    kinds = _registered_kinds()
    known_kinds, located = _layers.get(module, (None, None))
    if known_kinds == kinds:
        return located
    located = None
    spec = get_kan_spec(module)
    if spec is not None and (spec.basis or spec.splines or spec.derivatives):
        try:
            located = spec, spec.locate(module)
        except ValueError:  # it is no such layer
            pass
    _layers[module] = kinds, located
    return located


def _possible_stages(network: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules inside of a network that are stages, outermost first."""
    for child in network.children():
        if is_known(child) or is_norm(child) or _locate(child) is not None:
            yield child
        else:
            yield from _possible_stages(child)


def _trace(network: nn.Module) -> list[nn.Module]:
    """Return the modules that run one after the other, each on the very output of the one before."""
    modules = list(dict.fromkeys(_possible_stages(network)))
    stages: list[Stage] = []
    for module in modules:
        stages += stages_of(module) or ()
    sizes = [stage.in_features for stage in stages if stage.in_features is not None]
    if not any(stage.formula for stage in stages):
        return []
    calls: list[tuple[nn.Module, Any, Any]] = []

    def record(module: nn.Module, args: tuple, output: Any) -> None:
        received = args[0] if len(args) == 1 else None
        calls.append((module, received, output))

    with torch.inference_mode(False), torch.no_grad(), attributes_kept(network), buffers_kept(network):
        generator = torch.Generator().manual_seed(0)
        value: Any = torch.rand(3, sizes[0], generator=generator, device="cpu")
        for parameter in network.parameters():
            if parameter.is_floating_point():
                value = value.to(parameter)
                break
        handles = [module.register_forward_hook(record) for module in modules]
        try:
            output = network(value)
        except Exception:  # foreign code: another width, or more arguments
            return []
        finally:
            for handle in handles:
                handle.remove()
    calls.append((network, output, None))
    for _, received, returned in calls:
        if received is not value:
            return []
        value = returned
    return [module for module, *_ in calls[:-1]]


register(nn.Module, Entry(find_stages))
