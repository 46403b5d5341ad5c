# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The layers that a configuration adapts: found, located and checked before the first one is replaced."""

from __future__ import annotations

import re
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping
from copy import copy
from math import prod
from operator import attrgetter

from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import nn

from ..kan.slim_kan import SlimKANLinear
from ..layers.kinds import is_built_in
from ..layers.recognize import compare, get_recorded_spec, recognize
from ..layers.search import unrecognized_modules, walk_kan_layers
from ..modules.checks import list_first, natural_order
from .config import LoTRAConfig
from .initialization import check_start
from .layer import LoTRALayer, Record, Target, Targets, check_stored, check_unmerged, lotra_layers
from .linear_path import PATH


def find_targets(config: LoTRAConfig, model: nn.Module) -> Targets:
    """Return the layers that the configuration targets, by name.

    Raises:
        ValueError: A target is no KAN layer, or there is none in the model, or the model has Slim layers.
    """
    for name, module in model.named_modules():
        if isinstance(module, SlimKANLinear):
            raise ValueError(f"Adapters need dense layers, but `{name}` is a Slim layer: call `to_dense()` first.")
    if config.base_layers is not None:
        return _find_recorded(config.base_layers, model)
    if config.targets_all_kan:
        return _find_all_kan(config, model)
    targets: Targets = {}
    for name, module in model.named_modules():
        if not name or not check_target_module_exists(config, name):
            continue
        is_inside = any(name.startswith(f"{outer}.") for outer in targets)
        targets[name] = locate_target(name, module)
        inner = [] if isinstance(module, LoTRALayer) else module.modules()
        if is_inside or any(isinstance(child, BaseTunerLayer) for child in inner):
            raise ValueError(f"`{name}` is a part of a layer with adapters, or contains one. Leave one of them out.")
    _warn_of_unmatched(config, model, targets)
    return targets


def _warn_of_unmatched(config: LoTRAConfig, model: nn.Module, targets: Targets) -> None:
    """Warn of names in `target_modules`, or of a regex, that match none of the targets."""
    unmatched = []
    if isinstance(config.target_modules, set):
        for ending in sorted(config.target_modules):
            if not any(f".{name}".endswith(f".{ending}") for name in targets):
                unmatched.append(ending)
    elif not targets:
        unmatched.append(config.target_modules)
    if unmatched:
        layers = [f"`{name}`" for name, _, _ in walk_kan_layers(model)]
        warnings.warn(
            f"`target_modules` has {unmatched}, which match no module. The KAN layers of the model are "
            f"{list_first(layers) or 'none'}.",
            stacklevel=2,
        )


def _find_all_kan(config: LoTRAConfig, model: nn.Module) -> Targets:
    chosen = copy(config)
    chosen.target_modules = ".*"  # only `exclude_modules` and `modules_to_save` count
    layers = {}
    targets = {}
    for name, layer, spec in walk_kan_layers(model):
        layers[name] = layer
        if not check_target_module_exists(chosen, name):
            continue
        module = model.get_submodule(name)
        if module is layer:
            targets[name] = Target(layer, spec, spec.locate(layer))
        else:
            targets[name] = locate_target(name, module)  # it has adapters

    candidates = [f"`{name}` ({type(module).__name__})" for name, module in unrecognized_modules(model, layers)]
    doubt = ""
    if candidates:
        doubt = (
            f"{list_first(candidates)} may be KAN layers, but were not recognized and get no adapter. "
            "`find_kan_layers(model)` shows why, and how to register them. "
        )
    is_layer = "" in layers
    if is_layer or not layers:
        hint = (
            f"{doubt}Call `register_kan_layer` to add a layer that is not recognized. Functions shared by all outputs "
            "(KAT, GR-KAN) take plain LoRA on their linear layers."
        )
        if is_layer:
            hint = "It is itself a KAN layer, and PEFT adapts layers inside a model. Wrap it: `nn.Sequential(layer)`."
        raise ValueError(f"No KAN layer was found in the model. {hint}")
    if doubt:
        warnings.warn(doubt, stacklevel=2)
    return targets


def _find_recorded(recorded: Mapping[str, Record], model: nn.Module) -> Targets:
    """Return the layers that a file names, in its order, by their names in this model.

    A name that is absent, for instance since a parent was renamed, is paired with a layer of the same kind and shape:
    with one whose name ends alike, or in order.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    absent = sorted(recorded.keys() - modules.keys(), key=natural_order)  # a file sorts its entries as strings
    free = {}
    for name, layer, spec in walk_kan_layers(model) if absent else ():
        if name not in recorded:
            free[name] = spec.kind, spec.locate(layer).shape

    names = {}
    for name in absent:
        kind = recorded[name]["kind"]
        shape = tuple(recorded[name]["shape"])
        alike = [candidate for candidate, description in free.items() if description == (kind, shape)]
        if not alike:
            raise ValueError(
                f"The adapter is for another model: it was saved with a {kind} layer {shape} at `{name}`, and this "
                "model has none there."
            )
        names[name] = alike[0]
        for candidate in reversed(alike):
            if f".{candidate}".endswith(f".{name}") or name.endswith(f".{candidate}"):
                names[name] = candidate
        del free[names[name]]

    renamed = [f"`{name}` as `{names[name]}`" for name in absent if bare_name(names[name]) != name]
    if renamed:
        warnings.warn(
            f"Layers of the adapter have other names in this model: it takes {', '.join(renamed)}.", stacklevel=2
        )
    targets = {}
    for name, record in recorded.items():
        present_name = names.get(name, name)
        targets[present_name] = locate_target(present_name, modules[present_name], record)
    return targets


def bare_name(name: str) -> str:
    """Return the name of a layer without what torch.compile and FSDP put into it."""
    return name.replace("_orig_mod.", "").replace("_fsdp_wrapped_module.", "")


def locate_target(name: str, module: nn.Module, record: Record | None = None) -> Target:
    """Return the KAN layer that a module is, adapted or not; raise a ValueError for any other module.

    `record` is the entry of the layer in the file of an adapter.
    """
    if isinstance(module, LoTRALayer):
        return module.base_target()
    spec = get_recorded_spec(module, record)
    if spec is None:
        _, reason = recognize(module)
        raise ValueError(
            f"Target module `{name}` is a {type(module).__name__}, which is not a KAN layer that LoTRA knows: "
            f"{reason} Describe it with `peft_lotra.register_kan_layer`, or leave it out."
        )
    return Target(module, spec, spec.locate(module))


def check_targets(config: LoTRAConfig, model: nn.Module, targets: Targets) -> None:
    """Raise a ValueError for targets that cannot be adapted as the configuration says."""
    names_of_parameters = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names_of_parameters[id(parameter)].append(name)
    names_of_modules = defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        names_of_modules[module].append(name)

    adapted = [name for name, _ in lotra_layers(model)]
    for name, (layer, spec, tensor) in targets.items():
        parameters = tensor.parameters if config.adapt_residual else tensor.names
        if name not in adapted and not is_built_in(spec):
            contradiction, _ = compare(layer, spec)
            if contradiction:
                raise ValueError(
                    f"The layer `{name}` ({type(layer).__name__}, of the kind {spec.kind!r}) does not compute what "
                    f"its description says: {contradiction}. Correct the description."
                )
        # a module that is no part of the layer would use what a merge has changed
        prefixes = tuple(f"{place}." for place in names_of_modules[layer])
        for parameter in parameters:
            check_stored(name, layer, parameter)
            stored = attrgetter(parameter)(layer)
            if not stored.is_floating_point() or stored.itemsize < 2:
                raise ValueError(
                    f"`{parameter}` of `{name}` is of {stored.dtype}, but must be of a floating type of 16 bits or "
                    "more."
                )
            for other in names_of_parameters[id(stored)]:
                if not other.startswith(prefixes):
                    raise ValueError(
                        f"`{name}` and `{other}` share the parameter `{parameter}`, so that merging would change "
                        "both. Give each its own copy, or leave the layer out by `exclude_modules`."
                    )
    _check_saved(config, model, targets)
    if config.is_from_file:
        return
    if config.init_weights == "hosvd":
        check_unmerged(model)  # the factors are those of the base
    for name, (layer, _, tensor) in targets.items():
        if config.train is not None:
            shapes = config.shapes_of(name, tensor)
            # a kernel mode is absent from the dense layers of a network of convolutions
            is_of_kernels = config.train == ["factor_kernel"] and len(shapes["core"]) < 4
            if shapes.keys().isdisjoint(config.train) and not is_of_kernels:
                raise ValueError(
                    f"`train={config.train}` leaves nothing to train in `{name}`, whose ranks {shapes['core']} have "
                    f"only {list(shapes)}. Train the core too, or leave the layer out."
                )
        if isinstance(config.init_weights, str):
            coefficients = tensor.read(layer).detach()
            check_start(config.init_weights, coefficients)


def _check_saved(config: LoTRAConfig, model: nn.Module, targets: Targets) -> None:
    """Raise a ValueError if `modules_to_save` names no module, or one whose coefficients are adapted."""
    if not config.modules_to_save:
        return
    names = [name.replace(".base_layer", "") for name, _ in model.named_modules(remove_duplicate=False)]
    adapted = []
    for name, target in targets.items():
        for parameter in target.tensor.parameters:
            owner, _, _ = f"{name}.{parameter}".rpartition(".")
            adapted.append(owner)
    for ending in config.modules_to_save:
        # PEFT adds names of heads for a task
        is_absent = config.task_type is None and not any(name.endswith(ending) for name in names)
        if is_absent or any(owner.endswith(ending) for owner in adapted):
            raise ValueError(
                f"`modules_to_save` has {ending!r}, but must name modules of the model, without coefficients that are "
                f"adapted.{' Load the adapter into `LinearPath(network)`.' * (ending == PATH)}"
            )


def warn_of_choices(config: LoTRAConfig, targets: Targets) -> None:
    """Warn of patterns that match no layer, and adapters that save nothing."""
    large = []
    if config.r is not None and config.train is None and not config.rank_pattern:
        for name, (_, _, tensor) in targets.items():
            shapes = config.shapes_of(name, tensor)
            size = sum(map(prod, shapes.values()))
            dense = prod(config.adapted_shape(tensor))
            if size > dense:
                large.append(f"{name} (ranks {shapes['core']}: {size} instead of {dense})")
    patterns = []
    for key in (*config.rank_pattern, *config.alpha_pattern):
        if not any(get_pattern_key([key], name) == key for name in targets):
            patterns.append(repr(key))

    messages = {
        "Keys of `rank_pattern` or `alpha_pattern` match no adapted layer: {}.": patterns,
        "Adapters have more parameters than the coefficients that they adapt: {}. Lower `r`, or leave it out.": large,
    }
    for message, subjects in messages.items():
        if subjects:
            warnings.warn(message.format(list_first(subjects)), stacklevel=2)


def exact_targets(names: Iterable[str], model: nn.Module) -> set[str] | str:
    """Return `target_modules` for these layers only: a regex if PEFT would also take other modules by the names."""
    names = set(names)
    suffixes = tuple(f".{name}" for name in names)
    if any(name not in names and name.endswith(suffixes) for name, _ in model.named_modules()):
        return "|".join(map(re.escape, sorted(names)))
    return names
