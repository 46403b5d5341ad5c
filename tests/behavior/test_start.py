# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""An adapted model starts as its base."""

import pytest
import torch
from behaving import CONVS, KINDS, X, apart, layers, net
from peft import get_peft_model

from peft_lotra import LoTRAConfig, preprocess_lotra


@pytest.mark.parametrize("kind", [*KINDS, *CONVS])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float64, 1e-13)])
def test_each_kind(kind, dtype, bound):
    base = {**KINDS, **CONVS}[kind]().to(dtype).eval()
    x = (X if kind in KINDS else torch.linspace(-1, 1, 100).view(2, 2, 5, 5)).to(dtype)
    y = base(x).detach()
    assert apart(get_peft_model(base, LoTRAConfig()).eval()(x), y) < bound


@pytest.mark.parametrize("start", [True, "gradient", "hosvd"])
def test_ways_to_start(start):
    factors = []
    for _ in range(2):
        base, config = net().eval(), LoTRAConfig(r=2, init_weights=start)
        y = base(X).detach()
        if start == "gradient":
            with pytest.raises(ValueError, match="preprocess_lotra"):
                get_peft_model(base, config)
            preprocess_lotra(base, config, lambda base=base: base(X).square().sum().backward())
        model = get_peft_model(base, config).eval()
        assert apart(model(X), y) < 1e-6
        assert not any(layer.get_delta_weight("default").any() for layer in layers(model).values())
        factors.append(next(iter(layers(model).values())).lotra_factor_in["default"])
    assert torch.equal(*factors) == (start is not True)  # random, or found in gradients or coefficients
