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

"""Which layers of a model a configuration adapts, found and checked before the first of them is touched."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from torch import nn

from ..families.coefficients import CoefficientTensor
from ..families.registry import KANLayerSpec, find_kan_layers, get_kan_spec, known_families
from ..files.fingerprint import Values, is_same, layer_values
from .config import LoTRAConfig


def resolve_target_modules(config: LoTRAConfig, model: nn.Module) -> set[str] | str:
    """The `target_modules` of the configuration, with the names of the KAN layers in the place of "all-kan".

    Raises:
        ValueError: The model has no KAN layer, or none that `layers_to_transform` names.
    """
    if config.target_modules == "all-linear":
        raise ValueError(
            '`target_modules="all-linear"` takes linear layers, which LoTRA does not adapt. Pass "all-kan", or leave '
            "it out, for all KAN layers."
        )
    if not config.targets_all_kan:
        return config.target_modules
    layers = find_kan_layers(model)
    if not layers:
        types = Counter(type(module).__name__ for module in model.modules())
        raise ValueError(
            "No KAN layer was found in the model. It consists of "
            + ", ".join(f"{name} ({count})" for name, count in types.most_common())
            + f". The known families are {', '.join(known_families())}. If one of these modules is a KAN layer, "
            "describe it with `peft_lotra.register_kan_layer`."
        )
    names = {layer.name for layer in layers if _has_index(config, layer.name)}
    if not names:
        raise ValueError(
            f"None of the KAN layers {[layer.name for layer in layers]} has an index in `layers_to_transform`="
            f"{config.layers_to_transform} (`layers_pattern`={config.layers_pattern})."
        )
    return names


def find_targets(config: LoTRAConfig, model: nn.Module) -> dict[str, nn.Module]:
    """The modules that the configuration, its `target_modules` resolved, targets, by name.

    Raises:
        ValueError: The model is itself a KAN layer, or a target is none.
    """
    if get_kan_spec(model) is not None:
        raise ValueError(
            f"The model is itself a KAN layer ({type(model).__name__}), and PEFT adapts layers inside a model. Wrap "
            "it, e.g. in `torch.nn.Sequential(layer)`, and adapt that."
        )
    modules = dict(model.named_modules())
    inside = tuple(f"{name}." for name, module in modules.items() if isinstance(module, BaseTunerLayer))
    targets = {
        name: module
        for name, module in modules.items()
        if name and not name.startswith(inside) and check_target_module_exists(config, name)
    }
    for name, module in targets.items():
        locate_target(name, module)
    return targets


def locate_target(name: str, module: nn.Module) -> tuple[nn.Module, KANLayerSpec, CoefficientTensor]:
    """The KAN layer that a target is (adapted or not), its family, and its coefficients.

    Raises:
        ValueError: It is not a KAN layer that is known, or not as its family is described.
    """
    layer = module.base_layer if hasattr(module, "lotra_spec") else module
    spec = get_kan_spec(layer)
    if spec is None:
        raise ValueError(
            f"Target module `{name}` is a {type(module).__name__}, which is not a KAN layer that LoTRA knows. The "
            f"known families are {', '.join(known_families())}; describe another one with "
            "`peft_lotra.register_kan_layer`."
        )
    return layer, spec, spec.locate(layer)


def describe_targets(targets: dict[str, nn.Module]) -> dict[str, dict[str, Any]]:
    """Family and shape of each target, as the configuration of an adapter records them."""
    description = {}
    for name, module in targets.items():
        _, spec, tensor = locate_target(name, module)
        description[name] = {
            "family": spec.family,
            "shape": list(tensor.shape),
            "has_residual": tensor.has_residual,
        }
    return description


def read_values(name: str, module: nn.Module) -> dict[str, Values]:
    """The grid and the parameters of the base layer of a target, as they are without merged adapters."""
    layer, spec, tensor = locate_target(name, module)
    merged = hasattr(module, "lotra_spec") and module.merged
    return layer_values(layer, spec, tensor, (module.parameters_before_merge or None) if merged else {})


def check_base(config: LoTRAConfig, targets: dict[str, nn.Module]) -> None:
    """Compares the base with the one that an adapter from a file was saved with.

    Raises:
        ValueError: A layer that the adapter is for is missing or of another family, or its grid is another one and
            `config.check_base` does not say otherwise.
    """
    recorded, found = config.checkpoint_layers, describe_targets(targets)
    # Another shape is not an error yet: with `ignore_mismatched_sizes` PEFT drops the tensors that do not fit.
    # Otherwise LoTRAModel._load_from_state_dict refuses them.
    wrong = [
        f"{name}: a {layer['family']} layer, the model has "
        + (f"a {found[name]['family']} layer" if name in found else "no such layer")
        for name, layer in recorded.items()
        if name not in found or found[name]["family"] != layer["family"]
    ]
    if wrong:
        raise ValueError(
            "The adapter was made for another model. It is for\n  " + "\n  ".join(wrong) + "\nLoad it into the "
            "base model that it was trained on."
        )
    if config.check_base == "ignore":
        return
    differ: dict[str, list[str]] = {"grid": [], "parameters": []}
    for name, layer in recorded.items():
        if tuple(layer["shape"]) != tuple(found[name]["shape"]) or not differ.keys() & layer.keys():
            continue
        for what, values in read_values(name, targets[name]).items():
            if what in layer and is_same(layer[what], values) is False:
                differ[what].append(name)
    messages = {
        "grid": ("grids", "coefficients would mean other functions"),
        "parameters": ("coefficients", "update would not give the function that it was trained to give"),
    }
    for what, names in differ.items():
        if not names:
            continue
        noun, consequence = messages[what]
        message = (
            f"The {noun} of the layers {', '.join(names)} are not those that the adapter was saved with: its "
            f"{consequence}. Load it into the base model that it was trained on. If you know better pass "
            '`check_base="warn"` or `check_base="ignore"`.'
        )
        if config.check_base == "error" or (config.check_base is None and what == "grid"):
            raise ValueError(message)
        warnings.warn(message, stacklevel=2)


def _has_index(config: LoTRAConfig, name: str) -> bool:
    """Whether the layer is one of `layers_to_transform`. In a KAN the layers are mostly themselves the numbered
    entries ("layers.0"), where PEFT's own rule wants something to follow the number."""
    indices, patterns = config.layers_to_transform, config.layers_pattern
    if indices is None or indices == []:
        return True
    patterns = [patterns] if isinstance(patterns, str) else patterns or [r"[^.]*"]
    for pattern in patterns:
        match = re.match(rf"(?:.*?\.)??(?:{pattern})\.(\d+)(?:\.|$)", name)
        if match:
            return int(match[1]) in ([indices] if isinstance(indices, int) else indices)
    return False


def pattern_key(name: str) -> str:
    """A key for `rank_pattern` that matches this layer alone; PEFT reads keys as regexes of the end of a name."""
    return "^" + re.escape(name)


def exact_targets(names: list[str] | dict[str, object], model: nn.Module) -> set[str] | str:
    """`target_modules` for these layers and no others: the names, or a regex where PEFT would take the end of another
    module's name for one of them."""
    suffixes = tuple(f".{name}" for name in names)
    if any(name not in names and name.endswith(suffixes) for name, _ in model.named_modules()):
        return "|".join(map(re.escape, names))
    return set(names)
