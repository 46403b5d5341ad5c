# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The layers that a configuration adapts: found, located and checked before the first of them is touched."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from copy import copy
from math import prod
from operator import mul
from typing import Any, NamedTuple

from peft import PeftMixedModel, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from ..families.candidates import likely_layers
from ..families.coefficients import CoefficientTensor
from ..families.registry import (
    KANLayerSpec,
    describe,
    get_kan_spec,
    get_recorded_spec,
    known_families,
    short_name,
    walk_kan_layers,
)
from ..families.slim import SlimLayer
from ..files.checkpoint import TRAINED_ON, refuse
from ..files.fingerprint import Values, hash_all_dtypes, is_same, layer_values, symbolic_of
from ..files.patterns import exact_pattern, find_key
from ..kan.slim_kan import SlimKANLinear
from ..tucker import KernelTucker, cap_ranks
from .config import LoTRAConfig
from .layer import LoTRALayer, lotra_layers


_MAX_CANDIDATES = 5  # that an error shows


class Target(NamedTuple):
    """A KAN layer to adapt, or an adapted one, without adapters; its family, and where its coefficients are."""

    layer: nn.Module
    spec: KANLayerSpec
    coefficients: CoefficientTensor


def find_targets(config: LoTRAConfig, model: nn.Module) -> dict[str, Target]:
    """The layers of the model that the configuration targets, by name; a ValueError says why there are none."""
    if get_kan_spec(model) is not None:
        raise ValueError(
            f"The model is itself a KAN layer ({type(model).__name__}), and PEFT adapts layers inside a model. Wrap "
            "it, e.g. in `torch.nn.Sequential(layer)`, and adapt that."
        )
    if config.target_modules == "all-linear":
        raise ValueError(
            '`target_modules="all-linear"` takes linear layers, which LoTRA does not adapt. Pass "all-kan", or leave '
            "it out, for all KAN layers."
        )
    if config.targets_all_kan:
        return _find_all_kan(config, model)
    names = [name for name, bare in _names(model) if check_target_module_exists(config, bare)]
    records = config.checkpoint.layers
    if records is not None:  # a file names its layers, and its patterns may match more in this model
        names = [name for name in names if name in records]
    return {name: locate_target(name, model.get_submodule(name), (records or {}).get(name)) for name in names}


def _names(model: nn.Module) -> Iterator[tuple[str, str]]:
    """The names of all modules, now and in the bare model; inside of adapted layers only KAN layers, to be refused."""
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            inside += (f"{name}.",)
            yield name, name
            continue
        is_within = name.startswith(inside)
        if name and (not is_within or (not name.endswith(".base_layer") and get_kan_spec(module) is not None)):
            yield name, name.replace(".base_layer", "") if is_within else name


def _find_all_kan(config: LoTRAConfig, model: nn.Module) -> dict[str, Target]:
    layers = {name: (layer, spec) for name, layer, spec in walk_kan_layers(model)}
    if not layers:
        types = Counter(type(module).__name__ for module in model.modules())
        raise ValueError(
            "No KAN layer was found in the model. It consists of "
            + ", ".join(f"{name} ({count})" for name, count in types.most_common())
            + f". {_candidates(model)} The known families are {', '.join(known_families())}."
        )
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
    return targets


def _candidates(model: nn.Module) -> str:
    """Which modules may be KAN layers of a family that is not known: those with a parameter of three axes or more."""
    found = [
        f"`{name or 'the model itself'}` ({type(module).__name__}: `{parameter}` {tuple(value.shape)})"
        for name, module in likely_layers(model)
        for parameter, value in module.named_parameters(recurse=False)
        if value.dim() > 2
    ]
    more = ", ..." if len(found) > _MAX_CANDIDATES else ""
    likely = f"Candidates are {', '.join(found[:_MAX_CANDIDATES])}{more}. " if found else ""
    return (
        f"{likely}If one of the modules is a KAN layer, describe it with `peft_lotra.register_kan_layer`: "
        "`find_kan_layers(model, candidates=True)` shows a call to paste."
    )


def locate_target(name: str, module: nn.Module, record: Mapping[str, Any] | None = None) -> Target:
    """The KAN layer that a module of this name is, adapted or not; a ValueError for any other module.

    `record` is what the file of an adapter says of the layer.
    """
    if isinstance(module, LoTRALayer):
        return Target(*module.base_before_merge())
    spec = get_recorded_spec(module, record)
    if spec is None:
        raise ValueError(
            f"Target module `{name}` is a {type(module).__name__}, which is not a KAN layer that LoTRA knows. The "
            f"known families are {', '.join(known_families())}; describe another one with "
            "`peft_lotra.register_kan_layer`."
        )
    return Target(module, spec, spec.locate(module))


def check_nesting(model: nn.Module, targets: Mapping[str, Target]) -> None:
    """Refuses a target inside of another one, inside of an adapted layer, or around one.

    Its adapter would train, but the names in the file would depend on the order in which adapters are attached.
    """
    adapted = [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    for name in targets:
        for other in (*targets, *adapted):
            if name.startswith(f"{other}."):
                inner, outer = short_name(name), short_name(other)
            elif other.startswith(f"{name}.") and not isinstance(model.get_submodule(name), BaseTunerLayer):
                inner, outer = short_name(other), short_name(name)
            else:
                continue
            raise ValueError(
                f"`{inner}` is a part of `{outer}`, and both would have adapters: an adapter on a part of an adapted "
                "layer cannot be loaded again. Leave one of them out: name the layers whole in `target_modules`, or "
                f"pass `exclude_modules=[{inner!r}]`."
            )


def warn_of_large_adapters(config: LoTRAConfig, targets: Mapping[str, Target]) -> None:
    """Warns of the targets whose adapters train more parameters than the coefficients that they adapt have.

    Ranks that `rank_pattern` gives to a layer are taken as meant.
    """
    large = []
    for name, (_, _, coefficients) in targets.items():
        if find_key(config.rank_pattern, name) is not None:
            continue
        out, in_, basis, *kernel = coefficients.shape
        shape = (out, in_, basis + (config.adapt_residual and coefficients.has_residual), *kernel)
        ranks = cap_ranks(config.ranks_and_alpha(name)[0], shape)
        sizes = dict(zip(KernelTucker._fields, (prod(ranks), *map(mul, shape, ranks)), strict=False))
        frozen, _ = config.frozen_and_zero(sizes)
        size = sum(size for component, size in sizes.items() if component not in frozen)
        if size > prod(shape):
            large.append(f"{name} (ranks {ranks}: {size} instead of {prod(shape)})")
    if large:
        shown = ", ".join(large[:_MAX_CANDIDATES]) + (", ..." if len(large) > _MAX_CANDIDATES else "")
        warnings.warn(
            f"Adapters have more parameters than the coefficients that they adapt: {shown}. Lower `r`, or the ranks "
            "of these layers by `rank_pattern`; or train the layers whole.",
            stacklevel=2,
        )


def check_parameters(with_residual: bool, model: nn.Module, targets: Mapping[str, Target]) -> None:
    """Refuses coefficients that are computed anew in each pass, shared by two layers, or not of a floating type.

    What the layers compute is compared with their descriptions.
    """
    owners: dict[int, tuple[str, nn.Module]] = {}
    adapted = {name: Target(m.base_layer, m.lotra_spec, m.lotra_tensor) for name, m in lotra_layers(model)}
    for name, (layer, _, coefficients) in {**adapted, **targets}.items():
        if isinstance(layer, (SlimKANLinear, SlimLayer)):  # whose coefficients are a product
            continue
        if name in targets and not isinstance(model.get_submodule(name), LoTRALayer):
            targets[name].spec.check(name, layer, coefficients)
        for full_name in coefficients.parameters if with_residual else coefficients.names:
            path, _, leaf = full_name.rpartition(".")
            owner = layer.get_submodule(path)
            dtype = getattr(owner, leaf).dtype
            if not dtype.is_floating_point or dtype.itemsize < 2:
                raise ValueError(
                    f"`{full_name}` of the layer `{name}` is of {dtype}, to which no update can be added. Bring the "
                    "model to float32, or another floating type of two bytes or more, first."
                )
            computed = leaf not in owner._parameters and owner._forward_pre_hooks  # FSDP's views have no such hook
            if is_parametrized(owner, leaf) or computed:
                raise ValueError(
                    f"`{full_name}` of the layer `{name}` is computed from other parameters in each forward pass "
                    "(pruning, weight_norm or another reparametrization), so that an adapter of it would have no "
                    "effect. Remove the reparametrization first: `torch.nn.utils.prune.remove`, "
                    "`torch.nn.utils.remove_weight_norm` or `torch.nn.utils.parametrize.remove_parametrizations`."
                )
            first, other = owners.setdefault(id(owner._parameters.get(leaf, owner)), (name, layer))
            if other is not layer:
                raise ValueError(
                    f"The layers `{first}` and `{name}` share one parameter, `{full_name}`, so that merging would add "
                    "the updates of both to it. Give each its own copy, or leave one of them out by "
                    "`exclude_modules`."
                )


def check_trained(config: LoTRAConfig, targets: Mapping[str, Target]) -> None:
    """Refuses a choice of components that no target has: the adapter would train nothing."""
    components = {name for target in targets.values() for name in KernelTucker._fields[: 1 + len(target[2].shape)]}
    if targets and config.train is not None and not components & set(config.train):
        raise ValueError(
            f"`train` is {config.train}, but the adapted layers have only the components {sorted(components)}, so "
            "that nothing would be trained."
        )


def describe_targets(targets: Mapping[str, Target]) -> dict[str, dict[str, Any]]:
    """Family and shape of each target, as `base_layers` of the configuration records them."""
    return {
        name: {
            "family": target.spec.family,
            "shape": list(target.coefficients.shape),
            "has_residual": target.coefficients.has_residual,
            **describe(target.spec, target.layer),
        }
        for name, target in targets.items()
    }


def record_base(model: nn.Module, base_layers: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """`base_layers` for a file: with hashes of what can be read of the base now."""
    modules = dict(model.named_modules())
    record = {}
    for name, layer in base_layers.items():
        module = modules.get(name)  # FSDP gives other names
        values = (
            {} if module is None else _read_values(locate_target(name, module), module, symbolic_of(modules, name))
        )
        record[name] = {**layer, **{what: hash_all_dtypes(value) for what, value in values.items()}}
    return record


def _read_values(target: Target, module: nn.Module, symbolic: nn.Module | None) -> dict[str, Values]:
    """The grid and the parameters of a target as they are without merged adapters; `module` holds the adapters."""
    frozen = (module.parameters_before_merge or None) if isinstance(module, LoTRALayer) and module.merged else {}
    return layer_values(*target, frozen, symbolic)


def check_base(config: LoTRAConfig, model: nn.Module, targets: Mapping[str, Target]) -> None:
    """Compares the base with the one that an adapter from a file was saved with.

    A missing layer and another family are errors, another grid and other parameters as `config.check_base` says.
    """
    recorded, found = config.checkpoint.layers or {}, describe_targets(targets)
    # Another shape is not an error yet: with `ignore_mismatched_sizes` PEFT drops the tensors that do not fit.
    # Otherwise LoTRAModel._load_from_state_dict refuses them.
    wrong = [
        f"{name}: a {layer['family']} layer, the model has "
        + (f"a {found[name]['family']} layer" if name in found else "no such layer")
        for name, layer in recorded.items()
        if name not in found or found[name]["family"] != layer["family"]
    ]
    beside = (
        f"The model is a {type(model).__name__}, which has adapters already: `model.unload()` returns its base, and "
        '`model.load_adapter(folder, adapter_name="other")` adds an adapter.'
    )
    has_adapters = isinstance(model, (PeftModel, PeftMixedModel))
    refuse("The adapter was made for another model. It is for", wrong, beside if has_adapters else TRAINED_ON)
    if config.check_base == "ignore":
        return
    differ: dict[str, list[str]] = {"grid": [], "parameters": []}
    modules = dict(model.named_modules())
    for name, layer in recorded.items():
        if tuple(layer["shape"]) != tuple(found[name]["shape"]) or not differ.keys() & layer.keys():
            continue
        for what, values in _read_values(targets[name], modules[name], symbolic_of(modules, name)).items():
            if what in layer and is_same(layer[what], values) is False:
                differ[what].append(name)
    for what, noun, consequence in (
        ("grid", "grids", "coefficients would mean other functions"),
        ("parameters", "coefficients", "update would not give the function that it was trained to give"),
    ):
        if not differ[what]:
            continue
        message = (
            f"The {noun} of the layers {', '.join(differ[what])} are not those that the adapter was saved with: its "
            f"{consequence}. {TRAINED_ON}"
        )
        if config.check_base == "error" or (config.check_base is None and what == "grid"):
            raise ValueError(f'{message} If you know better pass `check_base="warn"` or `check_base="ignore"`.')
        warnings.warn(
            f'{message} It is loaded here all the same: `check_base="error"` refuses it, `"ignore"` is silent.',
            stacklevel=2,
        )


def _has_index(config: LoTRAConfig, name: str) -> bool:
    """Whether the layer is one of `layers_to_transform`; other than in PEFT's rule, the number may end the name."""
    indices, patterns = config.layers_to_transform, config.layers_pattern
    if indices is None or indices == []:
        return True
    patterns = [patterns] if isinstance(patterns, str) else patterns or [r"[^.]*"]
    for pattern in patterns:
        match = re.match(rf"(?:.*?\.)??(?:{pattern})\.(\d+)(?:\.|$)", name)
        if match:
            return int(match[1]) in ([indices] if isinstance(indices, int) else indices)
    return False


def exact_targets(names: Iterable[str], model: nn.Module) -> set[str] | str:
    """`target_modules` for these layers alone: a regex if PEFT would take another module's name for one of them."""
    names = set(names)
    suffixes = tuple(f".{name}" for name in names)
    if any(name not in names and name.endswith(suffixes) for name, _ in model.named_modules()):
        return exact_pattern(names)
    return names


def write_targets(config: LoTRAConfig, model: nn.Module, targets: Iterable[str]) -> None:
    """Replaces `target_modules` by exact names, where PEFT would match more modules than these by its rules."""
    if config.targets_all_kan or config.checkpoint.layers is not None:
        exact = exact_targets(targets, model)
        if config.targets_all_kan or isinstance(exact, str):
            config.target_modules = exact
