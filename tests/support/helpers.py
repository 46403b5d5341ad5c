# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Models, inputs and comparisons that several test files share."""

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import AutoPeftModel, PeftModel, get_peft_model
from stand_ins import FAMILIES, as_model
from torch import Tensor, nn

from peft_lotra import LoTRAConfig, LoTRALayer
from peft_lotra.kan import KAN


COMPONENTS = ("lotra_core", "lotra_factor_out", "lotra_factor_in", "lotra_factor_basis")

# what `AutoPeftModel.from_pretrained` may import; PEFT before 0.20 imports anything
_ALLOWS = "import_allowlist" in inspect.signature(AutoPeftModel.from_pretrained).parameters
ALLOWED: dict[str, Any] = {"import_allowlist": ["peft_lotra"]} if _ALLOWS else {}

# relative differences that rounding explains, on every processor: about 80 times the spacing of float32
ROUNDING = {torch.float32: 1e-5, torch.float64: 1e-12}


def base(family: str, dtype: torch.dtype = torch.float32, in_features: int = 3, out_features: int = 4) -> nn.Module:
    """A model of one layer of the family, called `kan`."""
    return as_model(FAMILIES[family](in_features, out_features)).to(dtype)


def adapt(model: nn.Module, random: bool = True, adapter_name: str = "default", **config: Any) -> PeftModel:
    """An adapted model in evaluation mode, by default with an adapter that changes the function."""
    config = {"r": (2, 3, 4), "init_weights": not random, **config}
    return get_peft_model(model, LoTRAConfig(**config), adapter_name=adapter_name).eval()


def saved_and_merged(build: Callable[[], nn.Module], x: Tensor, folder: Path) -> nn.Module:
    """The model after the merge of an adapter, which its file gives to a model of the same kind too."""
    model = adapt(build())
    y = model(x)
    model.save_pretrained(folder)
    assert relative(PeftModel.from_pretrained(build(), folder).eval()(x), y) < 1e-5
    merged = model.merge_and_unload()
    assert relative(merged(x), y) < 1e-5
    return merged


def train(model: nn.Module, x: Tensor, y: Tensor | float = 1.0, steps: int = 3, lr: float = 0.05) -> nn.Module:
    """Adam steps on the mean square of `model(x) - y`; returns the model."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
    return model


class _Nested(nn.ModuleDict):
    def forward(self, x: Tensor) -> Tensor:
        return self["head"](self["tail"](self["body"](x)))


def nested() -> nn.Module:
    """Two KANs and a linear head: `body.0`, `body.1`, `tail.layers.0`, `tail.layers.1`, `head`."""
    layers = [FAMILIES["own"](3, 5), FAMILIES["cheby-kan"](5, 4)]
    parts = {"body": nn.Sequential(*layers), "tail": KAN([4, 6, 5]), "head": nn.Linear(5, 2)}
    return _Nested(parts)


def lotra_layers(model: nn.Module) -> dict[str, LoTRALayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoTRALayer)}


def components(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return ((name, parameter) for name, parameter in model.named_parameters() if "lotra_" in name)


def inputs(rows: int = 6, dtype: torch.dtype = torch.float32, in_features: int = 3) -> Tensor:
    return (torch.rand(rows, in_features) * 1.8 - 0.9).to(dtype)


def relative(actual: Tensor, expected: Tensor) -> float:
    """The largest difference, as a share of the largest value."""
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def snapshot(model: nn.Module) -> dict[str, Any]:
    """The state of the model that a failed call must not change."""
    return {
        "types": [(name, type(module)) for name, module in model.named_modules()],
        "state": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "requires_grad": [(name, parameter.requires_grad) for name, parameter in model.named_parameters()],
        "attributes": sorted(vars(model)),
        "methods": [(name, sorted(map(str, vars(module)))) for name, module in model.named_modules()],
    }


def assert_same(model: nn.Module, before: dict[str, Any]) -> None:
    after = snapshot(model)
    state, old_state = after.pop("state"), before["state"]
    assert list(state) == list(old_state)
    for name, tensor in state.items():
        assert torch.equal(tensor, old_state[name]), name
    assert after == {key: value for key, value in before.items() if key != "state"}
