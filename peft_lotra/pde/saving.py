# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""A solution as one file, which is read without executing code: it names classes of torch and of this package only."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..modules.folders import naming_damage, replacing_files
from .constraints import HardConstraint


FILE = "solution.pt"
# with the classes of these a file is read
PACKAGES = ("torch.nn.modules", "peft_lotra.kan", "peft_lotra.pde", "peft_lotra.least_squares")
TOLERANCE = 1e-8  # relative to the largest saved value


def save_model(
    folder: str | os.PathLike,
    model: HardConstraint,
    points: Tensor,
    settings: dict[str, Any],
) -> None:
    """Write a model, its values at some points, and plain settings into a folder."""
    arguments = {"network": model.kan, "distance": model.distance, "lift": model.lift}
    modules = {name: value for name, value in arguments.items() if isinstance(value, nn.Module)}
    content = {
        **settings,
        "points": points,
        "values": _evaluate(model, points),
        "arguments": {name: value for name, value in arguments.items() if _is_readable(value)},
        "state_dicts": {name: module.state_dict() for name, module in modules.items()},
    }
    with replacing_files(folder) as draft:
        torch.save(content, os.path.join(draft, FILE))


def read_folder(folder: str | os.PathLike) -> dict[str, Any]:
    """Return what `save_model` wrote; raise a `ValueError` if the folder holds no solution."""
    path = os.path.join(folder, FILE)
    if not os.path.isfile(path):
        raise ValueError(f"{folder} has no {FILE}. Write one by `solution.save(folder)`.")
    with open(path, "rb") as file:
        content = io.BytesIO(file.read())  # of damaged files, torch seeks places before the start
    with naming_damage(path):
        return _read(content)


def build_model(
    content: dict[str, Any],
    replacements: dict[str, Any],
) -> HardConstraint:
    """Build the model from the content of a folder.

    Raises:
        ValueError: A replacement is missing, or its values differ from the saved ones.
        RuntimeError: The tensors of a replacement have other names or shapes.
    """
    arguments = content["arguments"]
    for name, replacement in replacements.items():
        if replacement is not None:
            arguments[name] = replacement
            if isinstance(replacement, nn.Module):
                replacement.double().load_state_dict(content["state_dicts"].get(name, {}))
        elif name not in arguments:
            raise ValueError(
                f"The file does not hold `{name}`, which only your code can build. Pass it again: "
                f"`Solution.load(folder, {name}=...)`."
            )

    model = HardConstraint(arguments["network"], arguments["distance"], arguments["lift"]).eval()
    for name, values in _evaluate(model, content["points"]).items():
        saved = content["values"][name]
        tolerance = TOLERANCE * saved.abs().max()
        if saved.shape != values.shape or (saved - values).abs().max() > tolerance:
            raise ValueError(f"`{name}` has other values than when the solution was saved. Pass the same `{name}`.")
    return model


def _read(file: Any) -> Any:
    classes = [*_subclasses(nn.Module), *_subclasses(tuple)]
    allowed: list[Any] = [cls for cls in classes if cls.__module__.startswith(PACKAGES)]
    with torch.serialization.safe_globals(allowed):
        return torch.load(file, map_location="cpu", weights_only=True)


def _subclasses(cls: type) -> Iterator[type]:
    """Yield all imported classes that are derived from a class."""
    for derived in cls.__subclasses__():
        yield derived
        yield from _subclasses(derived)


def _is_readable(argument: Any) -> bool:
    """Return whether a file can hold an argument: not functions, hooks, or classes of other packages."""
    if not isinstance(argument, nn.Module):
        return not callable(argument)
    file = io.BytesIO()
    try:
        torch.save(argument, file)
        file.seek(0)
        _read(file)
    except Exception:  # pickle raises many kinds
        return False
    return True


@torch.no_grad()
def _evaluate(model: HardConstraint, points: Tensor) -> dict[str, Tensor]:
    """Return the values of distance, lift and model. The model is last because it depends on the others."""
    network = model.kan(points)
    return {
        "distance": model.part("distance", points, network),
        "lift": model.part("lift", points, network),
        "network": model(points),
    }
