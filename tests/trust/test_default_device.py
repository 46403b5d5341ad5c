# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""`torch.set_default_device`: what is computed for a model lies on the model's device, whatever the default one.

Here the default is "meta", whose tensors have no values: whatever is made on it by mistake fails, or is not equal.
"""

import pytest
import torch
from helpers import adapt, base
from peft import PeftModel
from stand_ins import LAYER_KINDS
from torch.testing import assert_close

from peft_lotra import LoTRAConfig, extract_lotra, find_kan_layers, hotswap_adapter
from peft_lotra.kan import KAN, jet
from peft_lotra.least_squares import LevenbergMarquardt


X = torch.linspace(-0.8, 0.8, 60, dtype=torch.float64).view(20, 3)


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
    return torch.cat([part.flatten() for part in jet(model, X)])


def fitted(model):
    LevenbergMarquardt(model).fit([(lambda m, x: jet(m, x, collapse=True)[2], X, 1.0)], steps=1, progress=False)
    return model(X)


@pytest.mark.parametrize("call", [rows, trained, merged, summed, derived, fitted])
@pytest.mark.parametrize("kind", ["own", "efficient-kan", "cheby-kan"])
def test_adapted_layers_ignore_the_default_device(kind, call):
    results = []
    for device in ("cpu", "meta"):
        torch.manual_seed(0)
        model = adapt(base(kind, torch.float64))
        model.add_adapter("b", LoTRAConfig(r=1, init_weights=False))
        with torch.device(device):
            results.append(call(model.eval()))

    assert_close(*results)


@pytest.mark.parametrize("kind", sorted(LAYER_KINDS))
def test_an_adapter_is_made_on_the_device_of_its_base(kind):
    model = base(kind, torch.float64)
    expected = find_kan_layers(base(kind, torch.float64))
    with torch.device("meta"):
        assert find_kan_layers(model) == expected
        adapted = adapt(model)

    assert {parameter.device.type for parameter in adapted.parameters()} == {"cpu"}


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_saving_and_loading_ignore_the_default_device(tmp_path, low_cpu_mem_usage):
    model, x = adapt(KAN([3, 4, 2])), X.float()
    expected = model(x)
    with torch.device("meta"):
        model.save_pretrained(tmp_path)
    bare, other = model.unload(), adapt(KAN([3, 4, 2]))
    with torch.device("meta"):
        actual = PeftModel.from_pretrained(bare, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)(x)
        hotswap_adapter(other, tmp_path, check_base="ignore")

    assert_close(actual, expected)


def test_extraction_ignores_the_default_device():
    kan, tuned, x = KAN([3, 4, 2]), KAN([3, 4, 2]), X.float()

    def results():
        adapted = extract_lotra(kan, tuned, budget=120, inputs=x)
        outputs = adapted(x)
        adapted.unload()
        return outputs

    expected = results()
    with torch.device("meta"):
        actual = results()
    assert_close(actual, expected)
