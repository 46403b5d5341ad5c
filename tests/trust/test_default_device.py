# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""`torch.set_default_device`: what is computed for a model lies on the model's device, whatever the default one.

Here the default is "meta", whose tensors have no values: whatever is made on it by mistake fails, or is not equal.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from helpers import adapt, base
from peft import PeftModel
from stand_ins import FAMILIES

import peft_lotra
from peft_lotra import LoTRAConfig, extract_lotra, find_kan_layers, hotswap_adapter, slim
from peft_lotra.kan import KAN, jet
from peft_lotra.optim import LevenbergMarquardt
from peft_lotra.pde import BoxDistance, ResidualSampler, box_points, knot_density, side_points


X = torch.rand(20, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 1.6 - 0.8


def two_adapters(family):
    model = adapt(base(family, torch.float64))
    model.add_adapter("b", LoTRAConfig(r=1, init_weights=False))
    return model.eval()


def rows(model):
    return model(X[:3], adapter_names=["default", "b", "__base__"])


def trained(model):
    model.train()
    model(X).square().sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def merged(model):
    model.merge_adapter()
    return model(X)


def summed(model):
    model.add_weighted_adapter(["default", "b"], [1.0, 2.0], "sum", combination_type="svd", ranks=1)
    model.set_adapter("sum")
    return model(X)


def derived(model):
    return torch.cat([part.flatten() for part in (*jet(model, X), *jet(model, X, collapse=True))])


def fitted(model):
    terms = [(lambda m, x: m(x), X, 1.0), (lambda m, x: jet(m, x, collapse=True)[2], X, 1.0)]
    LevenbergMarquardt(model).fit(terms, steps=1, progress=False)
    return model(X)


@pytest.mark.parametrize("call", [rows, trained, merged, summed, derived, fitted])
@pytest.mark.parametrize("family", ["own", "efficient-kan", "cheby-kan"])
def test_adapted_layers(family, call):
    torch.manual_seed(0)
    expected = call(two_adapters(family))
    torch.manual_seed(0)
    model = two_adapters(family)
    with torch.device("meta"):
        found = call(model)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_attaching(family):
    model = base(family, torch.float64)
    expected = find_kan_layers(base(family, torch.float64), candidates=True)
    with torch.device("meta"):
        assert find_kan_layers(model, candidates=True) == expected
        adapted = adapt(model)
    assert {parameter.device.type for parameter in adapted.parameters()} == {"cpu"}


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_loading(tmp_path, low_cpu_mem_usage):
    model = adapt(KAN([3, 4, 2]))
    expected = model(X.float())
    model.save_pretrained(tmp_path)
    bare, other = model.unload(), adapt(KAN([3, 4, 2]))
    with torch.device("meta"):
        found = PeftModel.from_pretrained(bare, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)(X.float())
        hotswap_adapter(other, tmp_path, check_base="ignore")
    torch.testing.assert_close(found, expected)


def test_whole_models():
    kan, tuned = KAN([3, 4, 2]), KAN([3, 4, 2])
    x = X.float()

    def results():
        small = slim(kan, energy=0.9, inputs=x)
        adapted = extract_lotra(kan, tuned, budget=120, inputs=x)
        outputs = small(x), adapted(x)
        adapted.unload()
        return outputs

    expected = results()
    with torch.device("meta"):
        found = results()
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_points():
    def results():
        box = (-1.0, 0.0), (1.0, 2.0)
        points = [box_points(*box, 20, method=method) for method in ("sobol", "latin", "uniform")]
        held = ResidualSampler(*box, 20).draw(lambda x: x[:, :1])
        return *points, *side_points(*box, 20), *held, BoxDistance(*box)(points[0]), knot_density(kan, *box, cells=4)

    kan = KAN([2, 3, 1])
    expected = results()
    with torch.device("meta"):
        found = results()
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


# A tensor that is drawn by a generator of the CPU, or is written to, cannot lie on another device; "meta" hides some.
FACTORIES = set(
    "arange as_tensor empty eye full linspace logspace ones rand randint randn randperm tensor zeros".split()
)


def test_every_new_tensor_has_a_device():
    package = Path(peft_lotra.__file__).parent
    without = [
        f"{path.relative_to(package)}:{node.lineno}: torch.{node.func.attr}"
        for path in sorted(package.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if path.name != "maps.py"  # a module is made on the default device
        and isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in FACTORIES
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "torch"
        and "device" not in {keyword.arg for keyword in node.keywords}
    ]
    assert not without
