# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The Python code of the model card that builds the base of an adapter."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub.utils import HFValidationError, validate_repo_id
from torch import nn

from ..kan.network import KAN, arguments_of


CLASS = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+")


def hub_id(name: str | None) -> str | None:
    """Return the name if it can name a repository; None for an existing path and for an invalid name."""
    try:
        validate_repo_id(name or "")
    except HFValidationError:
        return None
    return None if Path(str(name)).exists() else name


def source_of_base(
    config: Mapping[str, Any],
    base: nn.Module | None,
    model: str | None,
) -> tuple[str, str]:
    """Return the class of a base as "module.name", "torch.nn.Module" if unknown, and the code that builds it.

    Args:
        config: The configuration of the adapter.
        base: The base, if it is in memory.
        model: The repository of the base, if it has one.
    """
    if base is not None:
        module = type(base).__module__
        name = type(base).__name__
    else:
        mapping = config.get("auto_mapping") or {}
        module = mapping.get("parent_library")
        name = mapping.get("base_model_class")
    if not CLASS.fullmatch(f"{module}.{name}"):  # a file may contain any text, which must not become code
        module, name = "torch.nn", "Module"
    base_class = f"{module}.{name}"
    if base_class == "peft_lotra.tuner.linear_path.LinearPath" and base is not None:
        _, code = source_of_base(config, base.network, model)  # pyright: ignore[reportArgumentType]
        return base_class, f"from peft_lotra import LinearPath\n{code}\nbase = LinearPath(base)"
    cls = getattr(sys.modules.get(str(module)), str(name), None)  # None: not imported here
    if model and (cls is None or hasattr(cls, "from_pretrained")):
        revision = ""
        if config.get("revision"):
            revision = f", revision={json.dumps(config['revision'])}"
        return base_class, f'from {module} import {name}\n\nbase = {name}.from_pretrained("{model}"{revision})'
    arguments = None
    if isinstance(base, KAN):
        layers = [getattr(layer, "base_layer", layer) for layer in base.layers]
        arguments = arguments_of(KAN, layers)
    if arguments is None:
        return base_class, f"base = ...  # a {base_class}, with the weights that the adapter was trained on"
    keywords = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
    code = f"from peft_lotra.kan import KAN\n\nbase = KAN({keywords})\n"
    return base_class, f"{code}# now load into `base` the weights that the adapter was trained on"
