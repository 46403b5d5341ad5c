# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Derivatives of (adapted) networks in closed form."""

import pytest
import torch
from behaving import KINDS, adapted, add
from torch import nn
from torch.autograd.functional import hessian as hessian_of_row
from torch.autograd.functional import jacobian

from peft_lotra.kan import KAN, KANConfig, KANModel, SlimKAN, hessian, jet, laplacian


X = torch.rand(7, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 1.6 - 0.8


def changed(change):
    model = adapted(KAN([3, 5, 2]))
    add(model, "other")
    change(model.base_model)
    return model


BASES = {
    "network": lambda: KAN([3, 5, 2]),
    "norm": lambda: KAN([3, 5, 2], norm="layer"),
    "slim": lambda: SlimKAN([3, 5, 2], ranks=2),
    "transformers": lambda: KANModel(KANConfig(widths=(3, 5, 2))),
    **{
        kind: lambda kind=kind: nn.Sequential(KINDS[kind]().kan) for kind in ("efficient-kan", "fast-kan", "cheby-kan")
    },
}
MODELS = {
    **BASES,
    **{f"adapted {kind}": lambda make=make: adapted(make()) for kind, make in BASES.items()},
    "several": lambda: changed(lambda model: model.set_adapter(["default", "other"])),
    "merged": lambda: changed(lambda model: model.merge_adapter()),
    "disabled": lambda: changed(lambda model: model.disable_adapter_layers()),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", MODELS)
def test_nested_autograd(kind):
    model = MODELS[kind]().double().eval()

    def function(x):
        y = model(x[None])
        return getattr(y, "logits", y)[0]

    value = torch.stack([function(row) for row in X])
    first = torch.stack([jacobian(function, row) for row in X]).permute(2, 0, 1)
    outputs = range(value.shape[1])
    rows = [[hessian_of_row(lambda x, o=o: function(x)[o], row) for o in outputs] for row in X]
    second = torch.stack([torch.stack(row) for row in rows]).permute(2, 3, 0, 1)
    diagonal = second.diagonal().permute(2, 0, 1)
    v = torch.randn(2, 3, dtype=torch.float64)
    along = torch.einsum("di,dj,ijno->dno", v, v, second)
    found = (*jet(model, X), laplacian(model, X), jet(model, X, v)[2], jet(model, X, v, collapse=True)[2])
    expected = (value, first, diagonal, diagonal.sum(0), along, along.sum(0))
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(hessian(model, X)[2], second, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("kind", ["adapted network", "adapted slim", "adapted efficient-kan"])
def test_gradients_of_the_adapter(kind):
    model = MODELS[kind]().double()
    core = next(p for name, p in model.named_parameters() if "lotra_core" in name)
    (found,) = torch.autograd.grad(laplacian(model, X).square().sum(), core)
    core.data[0, 0, 0] += 1e-5
    above = laplacian(model, X).square().sum()
    core.data[0, 0, 0] -= 2e-5
    below = laplacian(model, X).square().sum()
    torch.testing.assert_close(found[0, 0, 0], (above - below) / 2e-5, rtol=1e-4, atol=1e-6)
