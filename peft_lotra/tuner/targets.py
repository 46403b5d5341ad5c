# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The layers that a configuration adapts: found, located and checked before the first of them is touched."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from copy import copy
from math import prod
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from torch import nn

from ..kan.slim_kan import SlimKANLinear
from ..layers.describe import NOT_LINEAR, UNUSED, compare, describe
from ..layers.description import KANLayerSpec, is_built_in
from ..layers.registry import get_recorded_spec, unrecognized_modules, walk_kan_layers
from ..layers.slim import SlimLayer
from ..tucker import Tucker
from .config import LoTRAConfig
from .initialization import check_start
from .layer import LoTRALayer, Target, check_stored, check_unmerged, lotra_layers


def find_targets(config: LoTRAConfig, model: nn.Module) -> dict[str, Target]:
    """The layers of the model that the configuration targets, by name; a ValueError says why there are none."""
    if config.target_modules == "all-linear":
        raise ValueError(
            '`target_modules="all-linear"` takes linear layers, which LoTRA does not adapt: leave it out.'
        )
    if config.base_layers is not None:
        return _find_recorded(config.base_layers, model)
    if config.targets_all_kan:
        return _find_all_kan(config, model)
    targets: dict[str, Target] = {}
    for name, module in model.named_modules():
        if not name or not check_target_module_exists(config, name):
            continue
        is_inside = any(name.startswith(f"{other}.") for other in targets)
        targets[name] = locate_target(name, module)
        inner = [] if isinstance(module, LoTRALayer) else module.modules()
        if is_inside or any(isinstance(part, BaseTunerLayer) for part in inner):
            raise ValueError(
                f"`{name}` is a part of a layer with adapters, or has such a part: leave one of them out."
            )
    if isinstance(config.target_modules, set) and targets:
        unmatched = [t for t in config.target_modules if not any(f".{name}".endswith(f".{t}") for name in targets)]
        if unmatched:
            warnings.warn(f"`target_modules` has {sorted(unmatched)}, which match no module.", stacklevel=2)
    return targets


def _find_all_kan(config: LoTRAConfig, model: nn.Module) -> dict[str, Target]:
    layers = {name: (layer, spec) for name, layer, spec in walk_kan_layers(model)}
    if "" in layers:
        raise ValueError(
            f"The model is itself a KAN layer ({type(model).__name__}), and PEFT adapts layers inside a model. Wrap "
            "it, e.g. in `torch.nn.Sequential(layer)`."
        )
    if not layers:
        raise ValueError(_no_layer_message(model))
    chosen = copy(config)
    chosen.target_modules = {name for name in layers if _has_index(config, name)}
    if not chosen.target_modules:
        raise ValueError(
            f"None of the KAN layers {list(layers)} has an index in `layers_to_transform`="
            f"{config.layers_to_transform} (`layers_pattern`={config.layers_pattern})."
        )
    targets = {}
    for name in layers:
        if name in chosen.target_modules and check_target_module_exists(chosen, name):  # PEFT knows the excluded ones
            module, (layer, spec) = model.get_submodule(name), layers[name]
            # another module if the layer is adapted
            targets[name] = Target(layer, spec, spec.locate(layer)) if layer is module else locate_target(name, module)
    others = unrecognized_modules(model, {name: layer for name, (layer, _) in layers.items()})
    if others:
        warnings.warn(
            f"{', '.join(name for name, _ in others)} may be KAN layers, but were not recognized and get no adapter. "
            "`find_kan_layers(model)` shows why, and how to register them.",
            stacklevel=2,
        )
    return targets


def _no_layer_message(model: nn.Module) -> str:
    """Why there is nothing to adapt in a model without KAN layers, in less than 400 characters."""
    modules = unrecognized_modules(model, {})[:3]
    likely = ", ".join(f"`{name[-30:]}` ({type(module).__name__:.20})" for name, module in modules)
    others = "`find_kan_layers(model)` shows why" if likely else "Use `register_kan_layer`"
    return (
        f"No KAN layer was found in the model{'; candidates are ' if likely else ''}{likely}. "
        "Functions shared by all outputs (KAT, GR-KAN) take plain LoRA on their linear layers. "
        f"{others}{', and how' if likely else ''} to describe other layers."
    )


def _has_index(config: LoTRAConfig, name: str) -> bool:
    """Whether the layer is one of `layers_to_transform`; other than in PEFT's rule, the number may end the name."""
    indices, patterns = config.layers_to_transform, config.layers_pattern
    if indices is None or indices == []:
        return True
    pattern = patterns if isinstance(patterns, str) else "|".join(patterns or [r"[^.]*"])
    match = re.match(rf"(?:.*?\.)??(?:{pattern})\.(\d+)(?:\.|$)", name)
    return match is not None and int(match[1]) in ([indices] if isinstance(indices, int) else indices)


def _find_recorded(recorded: Mapping[str, Mapping[str, Any]], model: nn.Module) -> dict[str, Target]:
    """The layers that a file names, in its order, by the names that they have in this model.

    Names that are absent, as after a parent was renamed, are paired with layers of the same kind and shape: with those
    whose names end alike, or in order.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    names = {name: name for name in recorded if name in modules}
    absent = sorted(recorded.keys() - names.keys(), key=_in_order)
    others = walk_kan_layers(model) if absent else ()
    free = [(name, spec.family, spec.locate(layer).shape) for name, layer, spec in others if name not in recorded]
    for name in absent:
        kind = recorded[name]["family"], tuple(recorded[name]["shape"])
        alike = [other for other, *of_layer in free if tuple(of_layer) == kind and other not in names.values()]
        if not alike:
            raise ValueError(
                f"The adapter is for another model: it was saved with a {kind[0]} layer {kind[1]} at `{name}`, and "
                "this model has none there."
            )
        ends_alike = (other for other in alike if f".{other}".endswith(f".{name}") or name.endswith(f".{other}"))
        names[name] = next(ends_alike, alike[0])
    if renamed := ", ".join(f"`{old}` as `{names[old]}`" for old in absent if bare_name(names[old]) != old):
        warnings.warn(f"Layers of the adapter have other names in this model: it takes {renamed}.", stacklevel=2)
    return {names[old]: locate_target(names[old], modules[names[old]], record) for old, record in recorded.items()}


def _in_order(name: str) -> list[str | int]:
    """A key that sorts `layers.2` before `layers.10`: the entries of a file are sorted as strings."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def bare_name(name: str) -> str:
    """The name of a layer without what torch.compile and FSDP put into it."""
    return name.replace("_orig_mod.", "").replace("_fsdp_wrapped_module.", "")


def locate_target(name: str, module: nn.Module, record: Mapping[str, Any] | None = None) -> Target:
    """The KAN layer that a module of this name is, adapted or not; a ValueError for any other module.

    `record` is what the file of an adapter says of the layer.
    """
    if isinstance(module, LoTRALayer):
        return module.base_before_merge()
    spec = get_recorded_spec(module, record)
    if spec is None:
        subject = f"Target module `{name}`" if name else "The layer"
        raise ValueError(
            f"{subject} is a {type(module).__name__}, which is not a KAN layer that LoTRA knows: "
            f"{describe(module).reason} Describe it with `peft_lotra.register_kan_layer`, or leave it out."
        )
    return Target(module, spec, spec.locate(module))


def _check_description(name: str, layer: nn.Module, spec: KANLayerSpec) -> None:
    """Raises a ValueError if the gradients of a layer verify another layout than its description has."""
    reason = "" if is_built_in(spec) else compare(layer, spec).reason
    if reason:
        raise ValueError(
            f"The layer `{name}` ({type(layer).__name__}, of the kind {spec.family!r}) does not compute what its "
            f"description says: {reason}. Correct the description."
        )


def warn_of_doubts(targets: Mapping[str, Target]) -> None:
    """Warns of parameters of layers of no built-in kind that shape the functions, and of those without effect."""
    doubts = []
    for name, (layer, spec, _) in targets.items():
        for parameter, reason in () if is_built_in(spec) else describe(layer).doubts.items():
            if reason in (NOT_LINEAR, UNUSED):
                doubts.append(f"`{name}.{parameter}`: {reason}")
    if doubts:
        more = f" (and {len(doubts) - 5} more)" if len(doubts) > 5 else ""
        warnings.warn(
            f"Parameters whose role is in doubt, which `find_kan_layers` lists: {'; '.join(doubts[:5])}{more}.",
            stacklevel=2,
        )


def check_targets(config: LoTRAConfig, model: nn.Module, targets: Mapping[str, Target]) -> None:
    """Raise a ValueError for targets that cannot be adapted as the configuration says."""
    owners: dict[int, tuple[str, nn.Module]] = {}  # of each parameter; views of FSDP, made anew, by their module
    adapted = {name: layer.base_before_merge() for name, layer in lotra_layers(model)}
    for name, (layer, spec, tensor) in {**adapted, **targets}.items():
        if isinstance(layer, (SlimKANLinear, SlimLayer)):  # whose coefficients are a product
            continue
        if name in targets and name not in adapted:
            _check_description(name, layer, spec)
        for full_name in tensor.parameters if config.adapt_residual else tensor.names:
            owner = check_stored(name, layer, full_name)
            leaf = full_name.rpartition(".")[2]
            dtype = getattr(owner, leaf).dtype
            if not dtype.is_floating_point or dtype.itemsize < 2:
                raise ValueError(
                    f"`{full_name}` of `{name}` is of {dtype}, but must be of a floating type of 16 bits or more."
                )
            first, other = owners.setdefault(id(owner._parameters.get(leaf, owner)), (name, layer))
            if other is not layer:
                raise ValueError(
                    f"`{first}` and `{name}` share the parameter `{full_name}`, so that merging would add both "
                    "updates to it. Give each its own copy, or leave one out by `exclude_modules`."
                )
    if not config.is_from_file:
        for name, target in targets.items() if config.train else ():
            shapes = config.component_shapes(name, target.tensor)
            # the dense layers of a network of convolutions have no kernel mode
            trained = set(config.train or ()).intersection(Tucker._fields[: 1 + len(shapes["core"])])
            if trained and not trained & shapes.keys():
                raise ValueError(
                    f"`train={config.train}` leaves nothing to train in `{name}`, whose ranks {shapes['core']} have "
                    f"only {list(shapes)}. Train the core too, or leave the layer out."
                )
        if config.init_weights == "hosvd":
            check_unmerged(model)  # the factors are those of the base
        for layer, _, tensor in targets.values():
            source = tensor.read(layer).detach() if config.init_weights == "hosvd" else None
            check_start(config.init_weights, source)
    for ending in config.modules_to_save or ():
        _check_saved(ending, config, model, targets)


def _check_saved(ending: str, config: LoTRAConfig, model: nn.Module, targets: Mapping[str, Target]) -> None:
    """Raise a ValueError for an entry of `modules_to_save` that is no module, or that is adapted."""
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    for name, target in targets.items():
        names += [f"{name}.{inner}" for inner, _ in target.layer.named_modules() if inner]
        if any(f"{name}.{p}".rpartition(".")[0].endswith(ending) for p in target.tensor.parameters):
            raise ValueError(
                f"`modules_to_save` has {ending!r}, a part of `{name}` whose coefficients are adapted. Name it in "
                "one of `modules_to_save` and `target_modules`."
            )
    if config.task_type is None and not any(name.endswith(ending) for name in names):
        raise ValueError(f"`modules_to_save` has {ending!r}, which matches no module of the model.")


def warn_of_large_adapters(config: LoTRAConfig, targets: Mapping[str, Target]) -> None:
    """Warns of the targets whose explicit `r` gives more trained parameters than the coefficients that it adapts."""
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
            f"Adapters have more parameters than the coefficients that they adapt: {', '.join(large[:5])}. Lower `r`, "
            "or leave it out.",
            stacklevel=2,
        )


def exact_targets(names: Iterable[str], model: nn.Module) -> set[str] | str:
    """`target_modules` for these layers alone: a regex if PEFT would take another module's name for one of them."""
    names = set(names)
    suffixes = tuple(f".{name}" for name in names)
    if any(name not in names and name.endswith(suffixes) for name, _ in model.named_modules()):
        return "|".join(map(re.escape, sorted(names)))
    return names
