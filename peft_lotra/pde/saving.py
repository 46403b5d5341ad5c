# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The network of a solution as a file: its tensors, and how `solve` built it."""

from __future__ import annotations

import json
import os
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_model, save_model
from torch import nn

from .features import BoxFeatures
from .networks import new_network, prepare_network
from .polynomials import new_polynomials
from .windows import Windows


def save_network(network: nn.Module, path: str | os.PathLike) -> None:
    """Write the network of a solution into a file."""
    draft = f"{os.fspath(path)}.part"
    save_model(network, draft, {"network": json.dumps(_record(network))})
    os.replace(draft, path)


def load_network(path: str | os.PathLike, network: nn.Module | None = None) -> nn.Module:
    """Read the network that `Solution.save` wrote. No code of the file is executed.

    Args:
        path: The file.
        network: The `network` of `solve`, built as before, with its adapters and grids. It is filled in place.

    Returns:
        The network of the coordinates, float64, for `HardConstraint` or `solve(network=...)`.

    Raises:
        ValueError: The file holds a network that `solve` did not build, and `network` is missing.
        RuntimeError: `network` has other tensors.

    Example:
        >>> import os, tempfile, torch
        >>> from peft_lotra.kan import jet
        >>> from peft_lotra.pde import BoxDistance, HardConstraint, load_network, solve
        >>> box = BoxDistance([0], [10])
        >>> def poisson(model, x):
        ...     return jet(model, x)[2][0] + 1
        >>> result = solve(poisson, [0], [10], distance=box, steps=1, progress=False)
        >>> path = os.path.join(tempfile.mkdtemp(), "poisson.safetensors")
        >>> result.save(path)
        >>> model = HardConstraint(load_network(path), box)
        >>> x = torch.rand(5, 1).double()
        >>> torch.equal(model(x), result.model(x))
        True
    """
    with safe_open(path, "pt") as file:
        record = json.loads(file.metadata()["network"])
    network = _build(record, network).double()
    load_model(network, path)
    return network


def _record(network: nn.Module) -> dict[str, Any]:
    """Return how `solve` built a network; empty if it did not."""
    if isinstance(network, Windows):
        windows = [_record(window) for window in network.networks]
        return {"windows": windows, "arguments": [network.ends.tolist(), network.time, network.smoothness]}
    return vars(network).get("record", {})  # not that of a network inside of a wrapper


def _build(record: dict[str, Any], network: nn.Module | None) -> nn.Module:
    """Build a network from its record, or around the network of the caller."""
    if "windows" in record:
        networks = [_build(window, None) for window in record["windows"]]
        return Windows(networks, *record["arguments"])
    if "polynomials" in record:
        return new_polynomials(*record["polynomials"])
    if network is None and "layers" not in record:
        raise ValueError("`solve` did not build this network. Build it as before, and pass it: `network=...`.")
    if "features" not in record:
        return network  # pyright: ignore[reportReturnType]
    features = BoxFeatures(*record["features"])
    if network is None:
        return new_network(features, *record["layers"])
    return prepare_network(network, features)
