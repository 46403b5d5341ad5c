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
UNKNOWN = "torch.nn.Module"
IMPORT = re.compile(r"^(?:from|import) (\w+)", re.MULTILINE)
# what to install for the modules that bases come from; pykan imports pandas without requiring it
PACKAGES = {
    "flashkan": "flashkan",
    "inkan": "inkan",
    "kan": "pykan pandas",
    "qkan": "qkan",
    "transformers": "transformers",
}


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
    base_code: str | None,
) -> dict[str, Any]:
    """Return what a card says of a base: `base`, words for it; `code`, which builds it; `packages` of PyPI to install.

    Args:
        config: The configuration of the adapter.
        base: The base, if it is in memory.
        model: The repository of the base, if it has one.
        base_code: The author's code that builds the base.
    """
    module, name = _class_of_base(config, base)
    base_class = f"{module}.{name}"
    if model:
        words = f"[{model}](https://huggingface.co/{model})"
    elif base_class == UNKNOWN:
        words = "a network whose class is not known"
    elif module == "__main__":
        words = f"a network of the class `{name}`, which is in its author's script"
    else:
        words = f"a network of the class `{base_class}`"
    code = base_code or _code_of_base(config, base, model)
    packages = []
    for root in sorted({module.partition(".")[0], *IMPORT.findall(code)}):
        # other modules are named kan, too
        is_package = root != "kan" or module == "kan.MultKAN" or "'pykan'" in str(config.get("base_layers"))
        if root in PACKAGES and is_package:
            packages.append(PACKAGES[root])
    return {"base": words, "code": code, "packages": packages}


def _class_of_base(config: Mapping[str, Any], base: nn.Module | None) -> tuple[str, str]:
    """Return the module and the name of the class of a base, those of `UNKNOWN` if they are not known."""
    if base is not None:
        module = type(base).__module__
        name = type(base).__name__
    else:
        mapping = config.get("auto_mapping") or {}
        module = mapping.get("parent_library")
        name = mapping.get("base_model_class")
    # a file may contain any text, which must not become code
    base_class = f"{module}.{name}" if CLASS.fullmatch(f"{module}.{name}") else UNKNOWN
    module, _, name = base_class.rpartition(".")
    return module, name


def _code_of_base(config: Mapping[str, Any], base: nn.Module | None, model: str | None) -> str:
    """Return code that builds a base."""
    module, name = _class_of_base(config, base)
    base_class = f"{module}.{name}"
    if base_class == "peft_lotra.tuner.linear_path.LinearPath" and base is not None:
        code = _code_of_base(config, base.network, model)  # pyright: ignore[reportArgumentType]
        return f"from peft_lotra import LinearPath\n{code}\nbase = LinearPath(base)"
    root = module.partition(".")[0]
    cls = getattr(sys.modules.get(module), name, None)  # None: not imported here
    # transformers downloads the modules of `trust_remote_code`, which cannot be imported before
    if model and root != "transformers_modules" and (cls is None or hasattr(cls, "from_pretrained")):
        revision = ""
        if config.get("revision"):
            revision = f", revision={json.dumps(config['revision'])}"
        code = f'from {module} import {name}\n\nbase = {name}.from_pretrained("{model}"{revision})'
        if root == "transformers":
            code += "\n# this class has no KAN layers: put in those that are listed below, with their trained weights"
        return code
    arguments = None
    if isinstance(base, KAN):
        layers = [getattr(layer, "base_layer", layer) for layer in base.layers]
        arguments = arguments_of(KAN, layers)
    if arguments is None:
        return "base = ...  # the network with the weights that the adapter was trained on"
    keywords = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
    code = f"from peft_lotra.kan import KAN\n\nbase = KAN({keywords})\n"
    return f"{code}# now load into `base` the weights that the adapter was trained on"
