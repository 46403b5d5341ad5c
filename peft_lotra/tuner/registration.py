# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Register LOTRA as a PEFT method. PEFT discovers no plugins, so importing `peft_lotra` does it."""

from __future__ import annotations

from typing import Any

from peft import mapping
from peft.utils import PeftType, register_peft_method


NAME = "LOTRA"


def register(config_cls: type, model_cls: type) -> None:
    """Add the config and the model of LoTRA to PEFT's mappings. After a reload, they hold the newest classes."""
    mappings: list[dict[Any, Any]] = [mapping.PEFT_TYPE_TO_CONFIG_MAPPING, mapping.PEFT_TYPE_TO_TUNER_MAPPING]
    former = mappings[0].get(NAME, config_cls)  # a member of PeftType equals its name
    if former.__module__ != config_cls.__module__:
        name = f"{former.__module__}.{former.__qualname__}"
        raise RuntimeError(f"PEFT already has a method {NAME}, registered by {name}: import only one of the two.")
    if NAME not in PeftType.__members__:  # `register_peft_method` wants a true member of the enumeration
        member: Any = str.__new__(PeftType, NAME)
        member._name_ = member._value_ = NAME
        member._sort_order_ = len(PeftType._member_names_)
        member.__objclass__ = PeftType
        PeftType._member_names_.append(NAME)
        PeftType._member_map_[NAME] = PeftType._value2member_map_[NAME] = member
        type.__setattr__(PeftType, NAME, member)  # EnumType.__setattr__ refuses to touch members
    for entries in mappings:
        entries.pop(NAME, None)
    register_peft_method(name=NAME.lower(), prefix=model_cls.prefix, config_cls=config_cls, model_cls=model_cls)
