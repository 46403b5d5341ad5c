# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Each operation on each kind of layer, compared with a base to whose parameters the dense update was added."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import CONVS, KINDS, adapt, add_adapter, images, inputs, layer_of
from peft import PeftModel, get_peft_model
from stand_ins import LAYER_KINDS, as_model
from torch import Tensor, nn
from torch.testing import assert_close

from peft_lotra import AdapterBank, LoTRAConfig, hotswap_adapter, start_from_gradient
from peft_lotra.kan import jet


pytestmark = pytest.mark.filterwarnings("ignore")

ALPHA = 0.7
FORMS: list[Any] = [2, ("full", "full", 1), "full"]
MAKERS = {**KINDS, **CONVS, "wide own": lambda: as_model(LAYER_KINDS["own"](40, 40))}
OPERATIONS: dict[str, Callable] = {}


def operation(function: Callable) -> Callable:
    OPERATIONS[function.__name__] = function
    return function


def make(kind: str) -> tuple[nn.Module, Tensor]:
    """Return a base of one layer, and inputs."""
    torch.manual_seed(0)
    base = MAKERS[kind]().double().eval()
    if kind in CONVS:
        return base, images(48, channels=2, size=5).double()
    return base, inputs(48, in_features=40 if "wide" in kind else 3).double()


def dense(base: nn.Module, *models: nn.Module) -> nn.Module:
    """Return the base with the dense updates of adapted models added to its parameters."""
    total = copy.deepcopy(base)
    for model in models:
        layer = layer_of(model)
        update, *factors = layer.get_components("default")
        for mode, factor in enumerate(factors[: update.dim()]):
            if factor is not None:
                update = torch.tensordot(update, factor, ([mode], [1])).movedim(-1, mode)
        for name, part in layer.lotra_tensor.split(ALPHA * update.detach()).items():
            total.kan.get_parameter(name).data += part
    return total.eval()


def near(actual: Tensor, expected: Tensor, bound: float = 1e-7) -> None:
    assert_close(actual, expected, rtol=bound, atol=bound)


@operation
def forward(base: nn.Module, model: PeftModel, x: Tensor, folder: Path) -> None:
    near(model(x), dense(base, model)(x))


@operation
def gradient(base: nn.Module, model: PeftModel, x: Tensor, folder: Path) -> None:
    x = x.clone().requires_grad_()
    actual, expected = (torch.autograd.grad(m(x).sin().sum(), x)[0] for m in (model, dense(base, model)))
    near(actual, expected, 1e-6)


@operation
def merge(base: nn.Module, model: PeftModel, x: Tensor, folder: Path) -> None:
    expected = dense(base, model)(x)
    model.merge_adapter()
    near(model(x), expected)
    model.unmerge_adapter()
    near(model(x), expected)
    near(model.merge_and_unload()(x), expected)


@operation
def reload(base: nn.Module, model: PeftModel, x: Tensor, folder: Path) -> None:
    model.save_pretrained(folder)
    near(PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()(x), dense(base, model)(x))


@operation
def half(base: nn.Module, model: PeftModel, x: Tensor, folder: Path) -> None:
    model.peft_config["default"].storage = "float16"
    model.save_pretrained(folder)
    near(PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()(x), dense(base, model)(x), 3e-2)


@operation
def hotswap(base: nn.Module, model: PeftModel, x: Tensor, folder: Path) -> None:
    model.save_pretrained(folder)
    other = adapt(copy.deepcopy(base), r=model.peft_config["default"].r, alpha=0.4)
    hotswap_adapter(other, folder)
    near(other(x), dense(base, model)(x))


@operation
def weighted(base: nn.Module, model: PeftModel, x: Tensor, folder: Path) -> None:
    other = adapt(copy.deepcopy(base), r=1, alpha=ALPHA)
    both = copy.deepcopy(model)
    add_adapter(both, "other", r=1, alpha=ALPHA)
    layer_of(both).set_components("other", layer_of(other).get_components("default"))
    both.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum")
    both.set_adapter("sum")
    near(both(x), dense(base, model, other)(x), 1e-6)


@operation
def mixed(base: nn.Module, model: PeftModel, x: Tensor, folder: Path) -> None:
    is_adapted = torch.rand(len(x)) < 0.5
    y = model(x, adapter_names=["default" if adapted else "__base__" for adapted in is_adapted])
    near(y[is_adapted], dense(base, model)(x)[is_adapted])
    near(y[~is_adapted], base(x)[~is_adapted])


@operation
def bank(base: nn.Module, model: PeftModel, x: Tensor, folder: Path) -> None:
    bank = AdapterBank(copy.deepcopy(base))
    bank.add("a", model)
    bank.save(folder)
    served = AdapterBank.load(copy.deepcopy(base), folder).attach().eval()
    near(served(x, adapter_names=["a"] * len(x)), dense(base, model)(x))


@operation
def derivatives(base: nn.Module, model: PeftModel, x: Tensor, folder: Path) -> None:
    if x.dim() > 2 or x.shape[1] > 9:
        return
    _, slopes, second = jet(model, x[:5])
    reference = dense(base, model)
    for row, point in enumerate(x[:5]):
        near(slopes[:, row], torch.autograd.functional.jacobian(lambda p: reference(p[None])[0], point).T, 1e-6)
        hessian = torch.autograd.functional.hessian(lambda p: reference(p[None])[0, 0], point)
        near(second[:, row, 0], hessian.diagonal(), 1e-5)


@operation
def start(base: nn.Module, model: PeftModel, x: Tensor, folder: Path) -> None:
    fresh = get_peft_model(copy.deepcopy(base), LoTRAConfig(r=2))
    start_from_gradient(fresh, lambda: (fresh(x) - 1).square().mean())
    near(fresh.eval()(x), base(x))


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("r", FORMS, ids=str)
@pytest.mark.parametrize("kind", MAKERS)
def test_operation(kind: str, r: Any, name: str, tmp_path: Path) -> None:
    """An operation on an adapted model gives what it gives on the base with the dense update."""
    if (kind, name) == ("flashkan", "derivatives"):
        pytest.skip("its compiled backward pass cannot be differentiated again")
    if (kind, name) == ("kalnconv", "mixed"):
        pytest.skip("it normalizes by the whole batch")
    base, x = make(kind)
    OPERATIONS[name](base, adapt(copy.deepcopy(base), r=r, alpha=ALPHA), x, tmp_path)
