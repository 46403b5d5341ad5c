# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The Python code of the model card that builds the base of an adapter."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Mapping
from keyword import iskeyword
from pathlib import Path
from typing import Any

from huggingface_hub.utils import HFValidationError, validate_repo_id
from torch import nn

from ..kan import KAN, KANLinear


def literal(text: str) -> str:
    """Python code of a string. It neither ends the code block of a card nor the part that a card marks."""
    escaped = text.encode("unicode_escape").decode()
    return '"' + re.sub('["`<]', lambda found: f"\\x{ord(found[0]):x}", escaped) + '"'


def hub_id(name: str | None) -> str | None:
    """The name if it can be that of a repository; None for an existing path and for an invalid name."""
    try:
        validate_repo_id(name or "")
    except HFValidationError:
        return None
    return None if Path(str(name)).exists() else name


def check_base_code(code: str | None) -> None:
    """Raises a ValueError for code that would end its block in the card, and a SyntaxError for what is no Python."""
    if re.search(r"^\s*```", code or "", re.MULTILINE):
        raise ValueError(
            "`base_code` has a line that begins with ```, which would end its block in the model card. "
            "Pass Python that assigns the base model to the variable `base`."
        )
    ast.parse(code or "")


def source_of_base(
    config: Mapping[str, Any], base: nn.Module | None, model: str | None, base_code: str | None
) -> tuple[str | None, str]:
    """The class of a base as "module.name", None if it is unknown, and the code that sets `base` to it.

    Args:
        config: The configuration of the adapter.
        base: The base, if it is in memory.
        model: The repository of the base, if it has one.
        base_code: The code, if the user chose one.
    """
    mapping = config.get("auto_mapping") or {}
    module, name = str(mapping.get("parent_library")), str(mapping.get("base_model_class"))
    if base is not None:
        module, name = type(base).__module__, type(base).__name__
    if not all(part.isidentifier() and not iskeyword(part) for part in [name, *module.split(".")]):
        module = name = ""  # the file can have anything, and both go into code
    cls = getattr(sys.modules.get(module), name, None)  # None: not imported here
    packages = [module[: dot.start()] for dot in re.finditer(r"\.|$", module)] if cls else [module]
    module = next(it for it in packages if getattr(sys.modules.get(it), name, None) is cls)  # the shortest
    what = f"a {module}.{name}" if name else "the base model"
    code = f"base = ...  # {what}, with the weights that the adapter was trained on"
    if base_code is not None:
        code = base_code.strip("\n")
    elif model and name and (cls is None or hasattr(cls, "from_pretrained")):
        revision = f", revision={literal(config['revision'])}" if config.get("revision") else ""
        code = f"from {module} import {name}\n\nbase = {name}.from_pretrained({literal(model)}{revision})"
    elif type(base) is KAN:
        code = _code_of_kan(base) or code
    return f"{module}.{name}" if name else None, code


def _code_of_kan(kan: KAN) -> str | None:
    """Code that makes a KAN of the same shape; None if its layers are not the ones that `KAN` makes."""
    layers = [getattr(layer, "base_layer", layer) for layer in kan.layers]
    if any(type(layer) is not KANLinear for layer in layers):
        return None
    settings = {(layer.grid_size, layer.spline_order, layer.grid_range) for layer in layers}
    if len(settings) > 1:
        return None
    ((size, order, bounds),) = settings
    widths = [layers[0].in_features, *(layer.out_features for layer in layers)]
    return (
        "from peft_lotra.kan import KAN\n\n"
        f"base = KAN({widths}, grid_size={size}, spline_order={order}, grid_range={bounds})\n"
        "# now load into `base` the weights that the adapter was trained on"
    )
