# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Small models and comparisons of the tests of adapters, which use public names only."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from conv_stand_ins import CONVOLUTIONS
from helpers import lotra_layers as layers  # noqa: F401
from helpers import relative as apart  # noqa: F401
from peft import PeftModel, get_peft_model
from stand_ins import FAMILIES, as_model
from torch import Tensor, nn

from peft_lotra import LoTRAConfig
from peft_lotra.kan import KAN


X = torch.linspace(-0.9, 0.9, 24).view(8, 3)
# a layer of each kind, 3 -> 4, and a convolution of each kind, for images (N, 2, 5, 5)
KINDS = {name: lambda make=make: as_model(make(3, 4)) for name, make in FAMILIES.items()}
CONVS = {name: lambda make=make: as_model(make(2, 3, 3, padding=1)) for name, make in CONVOLUTIONS.items()}


class Net(nn.Module):
    """Two KAN layers, `kan.layers.0` and `kan.layers.1`, and a linear head."""

    def __init__(self, hidden: int = 6, grid_size: int = 5) -> None:
        super().__init__()
        self.kan, self.head = KAN([3, hidden, 4], grid_size=grid_size), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.kan(x))


def net(seed: int = 7, **kwargs: Any) -> Net:
    """The same network at each call."""
    with torch.random.fork_rng(devices=[]):  # adapters that are drawn next differ
        torch.manual_seed(seed)
        return Net(**kwargs)


def adapted(base: nn.Module | None = None, **config: Any) -> PeftModel:
    """In evaluation mode, with an adapter that changes what is computed."""
    config = LoTRAConfig(**{"r": (2, 3, 4), "init_weights": False, **config})
    return get_peft_model(net() if base is None else base, config).eval()


def add(model: PeftModel, name: str, **config: Any) -> None:
    model.add_adapter(name, LoTRAConfig(**{"r": 2, "init_weights": False, **config}))


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """The same names and bits."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def python(script: str, folder: Path) -> str:
    """What a process of its own prints that runs a script in a folder."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    env["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[2])])
    found = subprocess.run([sys.executable, "-c", script], cwd=folder, env=env, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-3000:]
    return found.stdout
