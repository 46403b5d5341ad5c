# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""What the arguments of `LoTRAConfig` may be; a config that is read from a file can have any value."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import MISSING, field, fields
from functools import wraps
from types import MappingProxyType
from typing import Any, TypeVar

from ..files.patterns import is_literal
from ..tucker import KernelTucker


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
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


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


def _is_components(value: Any) -> bool:
    names = [value] if isinstance(value, str) else value
    return (
        isinstance(names, (list, tuple, set))
        and 0 < len(names) == len({name for name in names if isinstance(name, str)})
        and set(names) <= set(KernelTucker._fields)
    )


def _is_mapping_of_base(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(value.get(key), str | None) for key in ("base_model_class", "parent_library")
    )


# What a field accepts, with the words for it.
NUMBER: Check = (_is_number, "a finite number")
PROBABILITY: Check = (lambda value: _is_number(value) and 0.0 <= value < 1.0, "at least 0 and below 1")
BOOL: Check = (lambda value: isinstance(value, bool), "True or False")
START: Check = (
    lambda value: isinstance(value, bool) or (isinstance(value, str) and value in ("gradient", "hosvd")),
    "True, False, 'gradient' or 'hosvd'",
)
TRAIN: Check = (_is_components, f"None or some of the components {KernelTucker._fields}, at least one, each once")
NAMES: Check = (_is_name_or_names, "a string or a list of strings")
INDICES: Check = (_is_index_or_indices, "an index or a list of indices")
PATTERN: Check = (_is_pattern, "a dict of ranks")
NUMBERS: Check = (_is_pattern_of_numbers, "a dict of finite numbers")
_TEXT: Check = (lambda value: isinstance(value, str), "None or a string")
_FIELDS_OF_PEFT: dict[str, Check] = {
    "inference_mode": BOOL,
    "auto_mapping": (_is_mapping_of_base, "None or a dict of strings"),
    **dict.fromkeys(("base_model_name_or_path", "revision", "peft_version"), _TEXT),
}

# The regexes that PEFT, or this package, makes of the patterns of a field.
_AS_MATCHED = {
    "target_modules": "{}",
    "exclude_modules": "{}",
    "layers_pattern": r"(?:.*?\.)??(?:{})\.(\d+)(?:\.|$)",
    "rank_pattern": r"(.*\.)?({})$",
    "alpha_pattern": r"(.*\.)?({})$",
    "modules_to_save": r"(^|.*\.){}($|\..*)",
}
# what `load_adapter` was given, which PEFT does not pass on
CHECK_BASE_OF_LOAD: ContextVar[str | None] = ContextVar("check_base", default=None)
_MAX_NAMES = 100  # of `layers_pattern` and `modules_to_save`, each of which PEFT matches with each module


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
        check = _FIELDS_OF_PEFT.get(entry.name) or entry.metadata.get("check")
        may_be_none = entry.default is None or entry.default_factory is not MISSING
        if check is not None and not (may_be_none if value is None else check[0](value)):
            raise ValueError(f"`{entry.name}` must be {check[1]}, got {value!r:.200}.")


@contextmanager
def clear_errors(folder: str) -> Iterator[None]:
    """Makes a ValueError of what values of any kind raise in PEFT and in the parser of JSON."""
    try:
        yield
    except (TypeError, RecursionError, OverflowError) as error:
        if "missing required keys" in str(error):  # PEFT's own words
            raise
        raise ValueError(f"The config of the adapter in {folder} is broken: {error}") from error


@contextmanager
def check_base_of_load(value: str | None) -> Iterator[None]:
    """Makes `value` the `check_base` of configs that are read meanwhile."""
    token = CHECK_BASE_OF_LOAD.set(value)
    try:
        yield
    finally:
        CHECK_BASE_OF_LOAD.reset(token)


def patterns_of(config: Any) -> dict[str, list[str]]:
    """The patterns of a config by field, without lists of names, which are compared."""
    values = {name: getattr(config, name) or () for name in _AS_MATCHED}
    return {
        name: [value] if isinstance(value, str) else [] if template == "{}" else list(value)
        for (name, value), template in zip(values.items(), _AS_MATCHED.values(), strict=True)
    }


def regexes_of(config: Any) -> dict[str, str]:
    """By field, a pattern of the config that a file may not have, if there is one."""
    found = {}
    for name, patterns in patterns_of(config).items():
        is_name = name in ("layers_pattern", "modules_to_save")
        wrong = [p for p in patterns if not is_literal(p) or (is_name and re.search(r"[\\^|]", p))]
        wrong += patterns[_MAX_NAMES:] if is_name else []
        if wrong:
            found[name] = wrong[0]
    return found


def compile_patterns(config: Any) -> None:
    """Raises a ValueError that names the field if a pattern of the user is no regex."""
    for name, patterns in patterns_of(config).items():
        for pattern in patterns:
            try:
                re.compile(_AS_MATCHED[name].replace("{}", pattern, 1))
            except (re.error, RecursionError, OverflowError) as error:
                raise ValueError(
                    f"`{name}` has {pattern[:100]!r}, which is no regular expression: {error}."
                ) from error
