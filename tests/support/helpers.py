# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Models, inputs and comparisons that several test files share."""

import copy
import importlib.util
import inspect
import json
import math
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from peft import AutoPeftModel, PeftModel, get_peft_model
from stand_ins import CONVOLUTIONS, LAYER_KINDS, as_model
from torch import Tensor, nn
from torch.testing import assert_close

from peft_lotra import AdapterBank, LoTRAConfig, LoTRALayer
from peft_lotra.kan import KAN


# what `AutoPeftModel.from_pretrained` may import; PEFT before 0.20 imports anything
_ALLOWS = "import_allowlist" in inspect.signature(AutoPeftModel.from_pretrained).parameters
ALLOWED: dict[str, Any] = {"import_allowlist": ["peft_lotra"]} if _ALLOWS else {}

# relative differences that rounding explains, on every processor: about 80 times the spacing of float32
ROUNDING = {torch.float32: 1e-5, torch.float64: 1e-12}

X = torch.linspace(-0.9, 0.9, 24).view(8, 3)
# a layer of each kind, 3 -> 4, and a convolution of each kind, for images (N, 2, 5, 5)
KINDS = {name: lambda make=make: as_model(make(3, 4)) for name, make in LAYER_KINDS.items()}
CONVS = {name: lambda make=make: as_model(make(2, 3, 3, padding=1)) for name, make in CONVOLUTIONS.items()}


# Models


def base(kind: str, dtype: torch.dtype = torch.float32, in_features: int = 3, out_features: int = 4) -> nn.Module:
    """A model of one layer of the kind, called `kan`."""
    return as_model(LAYER_KINDS[kind](in_features, out_features)).to(dtype)


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


class _Nested(nn.ModuleDict):
    def forward(self, x: Tensor) -> Tensor:
        return self["head"](self["tail"](self["body"](x)))


def nested() -> nn.Module:
    """Two KANs and a linear head: `body.0`, `body.1`, `tail.layers.0`, `tail.layers.1`, `head`."""
    layers = [LAYER_KINDS["own"](3, 5), LAYER_KINDS["cheby-kan"](5, 4)]
    parts = {"body": nn.Sequential(*layers), "tail": KAN([4, 6, 5]), "head": nn.Linear(5, 2)}
    return _Nested(parts)


def adapt(
    base: nn.Module | None = None, random: bool = True, adapter_name: str = "default", **config: Any
) -> PeftModel:
    """An adapted model in evaluation mode, `net()` by default, whose adapter changes the function if it is random."""
    config = {"r": (2, 3, 4), "init_weights": not random, **config}
    return get_peft_model(net() if base is None else base, LoTRAConfig(**config), adapter_name=adapter_name).eval()


def load(folder: str | Path, base: nn.Module | None = None, **options: Any) -> PeftModel:
    """The base, `net()` by default, with the adapter of a folder, in evaluation mode."""
    return PeftModel.from_pretrained(net() if base is None else base, folder, **options).eval()


def add_adapter(model: PeftModel, name: str, **config: Any) -> None:
    """Add an adapter that changes the function."""
    model.add_adapter(name, LoTRAConfig(**{"r": 2, "init_weights": False, **config}))


def bank_of(
    base: nn.Module, configs: dict[str, dict[str, Any]], **options: Any
) -> tuple[AdapterBank, dict[str, PeftModel]]:
    """A bank with an adapter of each configuration, and for each name a model that has this adapter alone."""
    bank = AdapterBank(base)
    alone = {}
    for name, config in configs.items():
        alone[name] = adapt(copy.deepcopy(base), **{**options, **config})
        bank.add(name, alone[name])
    return bank, alone


@torch.no_grad()
def row_by_row(alone: Mapping[str, nn.Module], names: Sequence[str], x: Tensor) -> Tensor:
    """The row of each name, as the model of that name computes it."""
    outputs = {name: alone[name](x) for name in set(names)}
    return torch.stack([outputs[name][row] for row, name in enumerate(names)])


def lotra_layers(model: nn.Module) -> dict[str, LoTRALayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoTRALayer)}


def layer_of(model: nn.Module) -> LoTRALayer:
    """The only adapted layer of a model."""
    (layer,) = lotra_layers(model).values()
    return layer


def components(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return ((name, parameter) for name, parameter in model.named_parameters() if "lotra_" in name)


def inputs(rows: int = 6, dtype: torch.dtype = torch.float32, in_features: int = 3) -> Tensor:
    return (torch.rand(rows, in_features) * 1.8 - 0.9).to(dtype)


def images(
    rows: int = 3, channels: int = 4, ndim: int = 2, size: int = 4, dtype: torch.dtype = torch.float32
) -> Tensor:
    return (torch.rand(rows, channels, *[size] * ndim) * 2 - 1).to(dtype)


def train(model: nn.Module, x: Tensor, y: Tensor | float = 1.0, steps: int = 3, lr: float = 0.05) -> nn.Module:
    """Adam steps on the mean square of `model(x) - y`; returns the model."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
    return model


@torch.no_grad()
def perturbed(model: nn.Module) -> nn.Module:
    """Return a copy with other parameters."""
    model = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def config_of(folder: Path) -> dict[str, Any]:
    """The entries of the configuration of a saved adapter."""
    return json.loads((folder / "adapter_config.json").read_text())


def edit_config(folder: Path, **entries: Any) -> None:
    (folder / "adapter_config.json").write_text(json.dumps(config_of(folder) | entries))


def saved_and_merged(build: Callable[[], nn.Module], x: Tensor, folder: Path) -> nn.Module:
    """The model after the merge of an adapter, which its file gives to a model of the same kind too."""
    model = adapt(build())
    y = model(x)
    model.save_pretrained(folder)
    assert_near(PeftModel.from_pretrained(build(), folder).eval()(x), y)
    merged = model.merge_and_unload()
    assert_near(merged(x), y)
    return merged


# Comparisons


def relative(actual: Tensor, expected: Tensor) -> float:
    """The largest difference, as a share of the largest value."""
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def assert_near(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Check that the largest difference is a small share of the largest value."""
    atol = tolerance * expected.abs().max().item()
    assert_close(actual, expected, rtol=0, atol=atol, check_dtype=False)


def assert_equal(actual: Any, expected: Any) -> None:
    """Check that tensors, or mappings and sequences of them, have the same bits."""
    assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def differ(tensors: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
    """Whether any tensor has other bits."""
    return any(not torch.equal(tensor, others[name]) for name, tensor in tensors.items())


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def snapshot(model: nn.Module) -> dict[str, Any]:
    """The state of the model that a failed call must not change."""
    return {
        "types": [(name, type(module)) for name, module in model.named_modules()],
        "state": state(model),
        "requires_grad": [(name, parameter.requires_grad) for name, parameter in model.named_parameters()],
        "attributes": sorted(vars(model)),
        "methods": [(name, sorted(map(str, vars(module)))) for name, module in model.named_modules()],
    }


def assert_same(model: nn.Module, before: dict[str, Any]) -> None:
    after = snapshot(model)
    assert_equal(after.pop("state"), before["state"])
    assert after == {key: value for key, value in before.items() if key != "state"}


@contextmanager
def refused(message: str, *models: nn.Module, error: Any = ValueError) -> Iterator[Any]:
    """Check that the body raises the error, and that the models stay what they were."""
    before = [snapshot(model) for model in models]
    with pytest.raises(error, match=message) as caught:
        yield caught
    for model, kept in zip(models, before, strict=True):
        assert_same(model, kept)


def refuses(calls: Mapping[str, Callable[[], Any]]) -> Callable[[str], None]:
    """Return a test that each call raises an error with the words that it is listed under."""

    @pytest.mark.parametrize("words", calls)
    def test(words: str) -> None:
        with refused(words, error=(TypeError, ValueError, RuntimeError, IndexError)):
            calls[words]()

    return test


# Scripts, processes and threads


def load_script(path: Path) -> ModuleType:
    """Return a script as a module."""
    spec: Any = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_python(script: str, folder: Path) -> str:
    """Run a script in a process of its own, in the folder, and return what it prints."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    env["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[2])])
    process = subprocess.run([sys.executable, "-c", script], cwd=folder, env=env, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-3000:]
    return process.stdout


@dataclass
class Change:
    version: Any  # None: the name was removed
    begin: float
    end: float = math.inf


class Versions:
    """Which versions of a name may be seen while other threads or requests change it.

    One thread changes a name, any thread may ask.
    """

    def __init__(self) -> None:
        self._changes: dict[str, list[Change]] = defaultdict(list)

    @contextmanager
    def change(self, name: str, version: Any) -> Iterator[None]:
        """Record the change to a version that the body makes; to None if it removes the name."""
        change = Change(version, time.monotonic())
        self._changes[name].append(change)
        yield
        change.end = time.monotonic()

    def visible(self, name: str, since: float) -> set[Any]:
        """Return the versions that were visible at some time between `since` and now, None for no version."""
        versions = set()
        for change in reversed(self._changes[name]):
            versions.add(change.version)
            if change.end < since:
                return versions
        return versions | {None}

    def now(self) -> dict[str, Any]:
        """Return the version of each name that is present, while nothing is changed."""
        versions = {name: changes[-1].version for name, changes in self._changes.items() if changes}
        return {name: version for name, version in versions.items() if version is not None}
