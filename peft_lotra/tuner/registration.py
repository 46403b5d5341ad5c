# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Makes LOTRA a PEFT method. PEFT has no plugin discovery: importing `peft_lotra` is what registers it."""

from __future__ import annotations

from typing import Any

from peft import mapping
from peft.utils import PeftType, register_peft_method


NAME = "LOTRA"


def _peft_type() -> PeftType:
    """`PeftType.LOTRA`, added if it is not there: `register_peft_method` wants a true member of the enumeration."""
    if NAME in PeftType.__members__:
        if not hasattr(PeftType, NAME):  # as whoever added it to the mappings alone left it, from Python 3.12 on
            type.__setattr__(PeftType, NAME, PeftType[NAME])
        return PeftType[NAME]
    member: Any = str.__new__(PeftType, NAME)
    member._name_ = member._value_ = NAME
    member._sort_order_ = len(PeftType._member_names_)
    member.__objclass__ = PeftType
    PeftType._member_names_.append(NAME)
    PeftType._member_map_[NAME] = member
    PeftType._value2member_map_[NAME] = member
    type.__setattr__(PeftType, NAME, member)  # EnumType.__setattr__ refuses to touch members
    return member


def register(config_cls: type, model_cls: type) -> None:
    """Enters the config and the model of LoTRA in PEFT's mappings; after a reload, the newest classes."""
    registered = mapping.PEFT_TYPE_TO_CONFIG_MAPPING.get(NAME)  # pyright: ignore[reportArgumentType]  (members equal their names)
    if registered is None:
        _peft_type()
        register_peft_method(name=NAME.lower(), prefix=model_cls.prefix, config_cls=config_cls, model_cls=model_cls)
        return
    ours, theirs = ((cls.__module__, cls.__qualname__) for cls in (config_cls, registered))
    if ours != theirs:
        raise RuntimeError(
            f"PEFT already has a method {NAME}, registered by {theirs[0]}.{theirs[1]}. Import only one of the two "
            "packages in a process."
        )
    mapping.PEFT_TYPE_TO_CONFIG_MAPPING[_peft_type()] = config_cls
    mapping.PEFT_TYPE_TO_TUNER_MAPPING[_peft_type()] = model_cls
