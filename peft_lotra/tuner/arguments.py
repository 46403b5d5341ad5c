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

"""What the arguments of `LoTRAConfig` may be; a config that is read from a file can have any value."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable
from dataclasses import MISSING, field, fields
from functools import wraps
from types import MappingProxyType
from typing import Any, TypeVar


Check = tuple[Callable[[Any], bool], str]
Config = TypeVar("Config", bound=type)

# What users of LoRA may pass, and what LoTRA has in its place.
_NAMES_IN_LORA = {
    **dict.fromkeys(("rank", "ranks", "lora_r"), "The ranks are `r`, an int or (out, in, basis)."),
    "lora_alpha": "The scale is `alpha`. LoTRA does not divide it by the rank: pass `alpha = lora_alpha / r`.",
    **dict.fromkeys(
        ("dropout", "lora_dropout"),
        "LoTRA drops no inputs, since these are the points at which the edge functions are taken. Pass `rank_dropout` "
        "(components of the update) or `module_dropout` (the update of a whole layer).",
    ),
    "init_lora_weights": "How an adapter starts is `init_weights`.",
    "use_rslora": "LoTRA scales the update by `alpha` alone, for any rank: leave it out.",
    "bias": "LoTRA adapts no biases: leave it out, or train whole modules by `modules_to_save`.",
    "target_parameters": "LoTRA finds the parameters of a KAN layer itself: name the layers in `target_modules`.",
}


def refuse_names_of_lora(cls: Config) -> Config:
    """Makes the constructor name the right argument for one that LoRA has."""
    init = cls.__init__

    @wraps(init)  # PEFT reads the signature
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        for name in (name for name in kwargs if name in _NAMES_IN_LORA):
            # PEFT looks for the first half of this text, and then drops the unknown keys of a file
            raise TypeError(f"LoTRAConfig got an unexpected keyword argument {name!r}. {_NAMES_IN_LORA[name]}")
        init(self, *args, **kwargs)

    cls.__init__ = __init__
    return cls


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_name_or_names(value: Any) -> bool:
    names = [value] if isinstance(value, str) else value
    return isinstance(names, (list, tuple, set)) and all(isinstance(name, str) for name in names)


def _is_index_or_indices(value: Any) -> bool:
    indices = value if isinstance(value, (list, tuple)) else [value]
    return all(isinstance(index, int) and not isinstance(index, bool) for index in indices)


def _is_pattern(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(key, str) for key in value)


def _is_pattern_of_numbers(value: Any) -> bool:
    return _is_pattern(value) and all(map(_is_number, value.values()))


# What a field accepts, with the words for it.
NUMBER: Check = (_is_number, "a finite number")
PROBABILITY: Check = (lambda value: _is_number(value) and 0.0 <= value < 1.0, "at least 0 and below 1")
BOOL: Check = (lambda value: isinstance(value, bool), "True or False")
START: Check = (lambda value: isinstance(value, bool) or value == "gradient", "True, False or 'gradient'")
NAMES: Check = (_is_name_or_names, "a string or a list of strings")
INDICES: Check = (_is_index_or_indices, "an index or a list of indices")
PATTERN: Check = (_is_pattern, "a dict of ranks")
NUMBERS: Check = (_is_pattern_of_numbers, "a dict of finite numbers")


def option(default: Any, check: Check | None = None) -> Any:
    """A field of the config; `dict` as the default is a new one for each config."""
    start: dict[str, Any] = {"default_factory": dict} if default is dict else {"default": default}
    return field(**start, metadata={"check": check})


def with_help(cls: Config) -> Config:
    """Gives the fields of a config their help: what the docstring of the class says of them in PEFT's style."""
    texts = dict(re.findall(r"^ {4}(\w+) \(.*\):\n((?: {8}.*\n)+)", inspect.cleandoc(cls.__doc__ or ""), re.MULTILINE))
    for entry in fields(cls):
        if entry.name in texts:
            entry.metadata = MappingProxyType({**entry.metadata, "help": " ".join(texts[entry.name].split())})
    return cls


def check_values(config: Any) -> None:
    """Raises a ValueError if a field has a value that it does not accept."""
    for entry in fields(config):
        value = getattr(config, entry.name)
        check = BOOL if entry.name == "inference_mode" else entry.metadata.get("check")
        may_be_none = entry.default is None or entry.default_factory is not MISSING
        if check is not None and not (may_be_none if value is None else check[0](value)):
            raise ValueError(f"`{entry.name}` must be {check[1]}, got {value!r:.200}.")
