# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The layers that a configuration adapts: found, located and checked before the first one is replaced."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from copy import copy
from math import prod

from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from peft.utils.other import get_pattern_key
from torch import nn

from ..kan.slim_kan import SlimKANLinear
from ..layers.describe import NOT_LINEAR, UNUSED, compare, describe
from ..layers.description import is_built_in
from ..layers.registry import get_recorded_spec, unrecognized_modules, walk_kan_layers
from ..layers.slim import SlimLayer
from ..modules.checks import list_first, natural_order
from ..tucker import Tucker
from .config import LoTRAConfig
from .initialization import check_start
from .layer import LoTRALayer, Record, Target, Targets, check_stored, check_unmerged, lotra_layers


Owners = dict[int, tuple[str, nn.Module]]  # by the id of a parameter, the layer that has it


def find_targets(config: LoTRAConfig, model: nn.Module) -> Targets:
    """Return the layers that the configuration targets, by name.

    Raises:
        ValueError: A target is no KAN layer, or there is none in the model.
    """
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
    if targets:
        _warn_of_unmatched(config, model, targets)
    elif config.target_modules != INCLUDE_LINEAR_LAYERS_SHORTHAND and not config.exclude_modules:
        names = config.target_modules
        if isinstance(names, set):
            names = sorted(names)
        indices = config.layers_to_transform
        index = "" if indices is None else f" with an index in `layers_to_transform`={indices}"
        raise ValueError(f"`target_modules` is {names}, which matches no module{index}. {_list_kan_layers(model)}")
    return targets


def _warn_of_unmatched(config: LoTRAConfig, model: nn.Module, targets: Targets) -> None:
    """Warn of names in `target_modules` that match none of the targets."""
    if not isinstance(config.target_modules, set):
        return
    unmatched = []
    for ending in config.target_modules:
        if not any(f".{name}".endswith(f".{ending}") for name in targets):
            unmatched.append(ending)
    if unmatched:
        warnings.warn(
            f"`target_modules` has {sorted(unmatched)}, which match no module. {_list_kan_layers(model)}", stacklevel=2
        )


def _list_kan_layers(model: nn.Module) -> str:
    """Return a sentence that names the KAN layers of a model."""
    names = [f"`{name}`" for name, _, _ in walk_kan_layers(model)]
    if not names:
        return "The model has no KAN layer that LoTRA knows."
    return f"The KAN layers of the model are {list_first(names)}."


def _find_all_kan(config: LoTRAConfig, model: nn.Module) -> Targets:
    layers = {}
    specs = {}
    for name, layer, spec in walk_kan_layers(model):
        layers[name] = layer
        specs[name] = spec

    if "" in layers:
        raise ValueError(
            f"The model is itself a KAN layer ({type(model).__name__}), and PEFT adapts layers inside a model. Wrap "
            "it, e.g. in `torch.nn.Sequential(layer)`."
        )
    if not layers:
        raise ValueError(_no_layer_message(model))
    indices = config.layers_to_transform
    names = list(layers)
    if indices not in (None, []):
        names = [name for name in layers if _has_index(name, indices)]
    if not names:
        raise ValueError(f"None of the KAN layers {list(layers)} has an index in `layers_to_transform`={indices}.")

    chosen = copy(config)
    chosen.target_modules = set(names)
    targets = {}
    for name in names:
        if not check_target_module_exists(chosen, name):  # but excluded
            continue
        module = model.get_submodule(name)
        if module is layers[name]:
            spec = specs[name]
            targets[name] = Target(module, spec, spec.locate(module))
        else:
            targets[name] = locate_target(name, module)  # it has adapters

    candidates = unrecognized_modules(model, layers)
    if candidates:
        warnings.warn(
            f"{', '.join(name for name, _ in candidates)} may be KAN layers, but were not recognized and get no "
            "adapter. `find_kan_layers(model)` shows why, and how to register them.",
            stacklevel=2,
        )
    return targets


def _no_layer_message(model: nn.Module) -> str:
    """Return why there is nothing to adapt in a model without KAN layers."""
    candidates = [f"`{name}` ({type(module).__name__})" for name, module in unrecognized_modules(model, {})]
    message = "No KAN layer was found in the model"
    if candidates:
        message += f"; candidates are {list_first(candidates)}. `find_kan_layers(model)` shows why they are none"
    return (
        f"{message}. Call `register_kan_layer` to add a layer that is not recognized. Functions shared by all outputs "
        "(KAT, GR-KAN) take plain LoRA on their linear layers."
    )


def _has_index(name: str, indices: list[int] | int) -> bool:
    """Return whether a layer has one of the indices in its name; unlike in PEFT, the index may end the name."""
    match = re.search(r"\.(\d+)(?:\.|$)", name)
    if isinstance(indices, int):
        indices = [indices]
    return match is not None and int(match[1]) in indices


def _find_recorded(recorded: Mapping[str, Record], model: nn.Module) -> Targets:
    """Return the layers that a file names, in its order, by their names in this model.

    A name that is absent, for instance since a parent was renamed, is paired with a layer of the same kind and shape:
    with one whose name ends alike, or in order.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    names = {name: name for name in recorded if name in modules}
    absent = sorted(recorded.keys() - names.keys(), key=natural_order)  # a file sorts its entries as strings

    free = {}
    for name, layer, spec in walk_kan_layers(model) if absent else ():
        if name not in recorded:
            free[name] = spec.kind, spec.locate(layer).shape

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
        present_name = names[name]
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
        subject = f"Target module `{name}`" if name else "The layer"
        raise ValueError(
            f"{subject} is a {type(module).__name__}, which is not a KAN layer that LoTRA knows: "
            f"{describe(module).reason} Describe it with `peft_lotra.register_kan_layer`, or leave it out."
        )
    return Target(module, spec, spec.locate(module))


def warn_of_doubts(targets: Targets) -> None:
    """Warn of parameters of registered kinds that shape the functions, or have no effect."""
    doubts = []
    for name, (layer, spec, _) in targets.items():
        if is_built_in(spec):
            continue
        for parameter, reason in describe(layer).doubts.items():
            if reason in (NOT_LINEAR, UNUSED):
                doubts.append(f"`{name}.{parameter}`: {reason}")
    if doubts:
        warnings.warn(
            f"Parameters whose role is in doubt, which `find_kan_layers` lists: {list_first(doubts)}.", stacklevel=2
        )


def check_targets(config: LoTRAConfig, model: nn.Module, targets: Targets) -> None:
    """Raise a ValueError for targets that cannot be adapted as the configuration says."""
    owners = {}
    adapted = {name: layer.base_target() for name, layer in lotra_layers(model)}
    for name, target in {**adapted, **targets}.items():
        if isinstance(target.layer, (SlimKANLinear, SlimLayer)):  # whose coefficients are a product
            continue
        if name not in adapted and not is_built_in(target.spec):
            _check_description(name, target)
        for parameter in target.tensor.parameters if config.adapt_residual else target.tensor.names:
            _check_parameter(name, target.layer, parameter, owners)
    if config.modules_to_save:
        _check_saved(config, model, targets)
    if config.is_from_file:
        return
    if config.init_weights == "hosvd":
        check_unmerged(model)  # the factors are those of the base
    for name, target in targets.items():
        if config.train is not None:
            _check_trained(name, target, config)
        if isinstance(config.init_weights, str):
            coefficients = target.tensor.read(target.layer).detach()
            check_start(config.init_weights, coefficients)


def _check_saved(config: LoTRAConfig, model: nn.Module, targets: Targets) -> None:
    """Raise a ValueError if `modules_to_save` names no module, or one whose coefficients are adapted."""
    names = [name.replace(".base_layer", "") for name, _ in model.named_modules(remove_duplicate=False)]
    adapted = []
    for name, target in targets.items():
        for parameter in target.tensor.parameters:
            owner, _, _ = f"{name}.{parameter}".rpartition(".")
            adapted.append(owner)
    for ending in config.modules_to_save or ():
        # PEFT adds names of heads for a task
        is_absent = config.task_type is None and not any(name.endswith(ending) for name in names)
        if is_absent or any(owner.endswith(ending) for owner in adapted):
            raise ValueError(
                f"`modules_to_save` has {ending!r}, but must name modules of the model, without coefficients that are "
                "adapted."
            )


def _check_description(name: str, target: Target) -> None:
    """Raise a ValueError if the gradients of a layer verify another layout than its description has."""
    layer, spec, _ = target
    reason = compare(layer, spec).reason
    if reason:
        raise ValueError(
            f"The layer `{name}` ({type(layer).__name__}, of the kind {spec.kind!r}) does not compute what its "
            f"description says: {reason}. Correct the description."
        )


def _check_parameter(
    name: str,
    layer: nn.Module,
    parameter: str,
    owners: Owners,
) -> None:
    """Raise a ValueError for a parameter that is computed, of integers, or adapted in another layer too.

    `owners` gets the layer of each parameter.
    """
    owner = check_stored(name, layer, parameter)
    leaf = parameter.rpartition(".")[2]
    dtype = getattr(owner, leaf).dtype
    if not dtype.is_floating_point or dtype.itemsize < 2:
        raise ValueError(
            f"`{parameter}` of `{name}` is of {dtype}, but must be of a floating type of 16 bits or more."
        )
    stored = owner._parameters.get(leaf, owner)  # FSDP makes a new view each time
    first, other_layer = owners.setdefault(id(stored), (name, layer))
    if other_layer is not layer:
        raise ValueError(
            f"`{first}` and `{name}` share the parameter `{parameter}`, so that merging would add both updates to "
            "it. Give each its own copy, or leave one out by `exclude_modules`."
        )


def _check_trained(name: str, target: Target, config: LoTRAConfig) -> None:
    """Raise a ValueError if none of the components in `train` exists in a layer."""
    shapes = config.component_shapes(name, target.tensor)
    # the dense layers of a network of convolutions have no kernel mode
    existing = Tucker._fields[: 1 + len(shapes["core"])]
    trained = {component for component in config.train or () if component in existing}
    if trained and not trained & shapes.keys():
        raise ValueError(
            f"`train={config.train}` leaves nothing to train in `{name}`, whose ranks {shapes['core']} have only "
            f"{list(shapes)}. Train the core too, or leave the layer out."
        )


def warn_of_unused_patterns(config: LoTRAConfig, targets: Targets) -> None:
    """Warn of keys in `rank_pattern` and `alpha_pattern` that match none of the targets."""
    for field in ("rank_pattern", "alpha_pattern"):
        unused = []
        for key in getattr(config, field):
            if not any(get_pattern_key([key], name) == key for name in targets):
                unused.append(key)
        if unused:
            warnings.warn(
                f"`{field}` has {unused}, which match no adapted layer. The layers are {list_first(targets)}.",
                stacklevel=2,
            )


def warn_of_large_adapters(config: LoTRAConfig, targets: Targets) -> None:
    """Warn of targets whose explicit `r` gives more trained parameters than the coefficients that it adapts."""
    if config.r is None or config.train is not None or config.rank_pattern:
        return
    large = []
    for name, target in targets.items():
        shapes = config.component_shapes(name, target.tensor)
        size = sum(map(prod, shapes.values()))
        dense = prod(config.adapted_shape(target.tensor))
        if size > dense:
            large.append(f"{name} (ranks {shapes['core']}: {size} instead of {dense})")
    if large:
        warnings.warn(
            f"Adapters have more parameters than the coefficients that they adapt: {list_first(large)}. Lower `r`, or "
            "leave it out.",
            stacklevel=2,
        )


def exact_targets(names: Iterable[str], model: nn.Module) -> set[str] | str:
    """Return `target_modules` for these layers only: a regex if PEFT would also take other modules by the names."""
    names = set(names)
    suffixes = tuple(f".{name}" for name in names)
    if any(name not in names and name.endswith(suffixes) for name, _ in model.named_modules()):
        return "|".join(map(re.escape, sorted(names)))
    return names
