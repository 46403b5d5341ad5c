# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The life of an adapter on each kind of layer: attached, trained, saved, loaded, merged, unmerged."""

import copy

import pytest
import torch
from behaving import CONVS, KINDS, X, adapted, apart, layers, same, state
from conv_stand_ins import CONVOLUTIONS, ConvNet, images
from helpers import train
from peft import PeftModel, get_peft_model
from stand_ins import FAMILIES, as_model
from torch import nn

from peft_lotra import LoTRAConfig, find_kan_layers, slim
from peft_lotra.kan import KAN, KANLinear, SlimKAN


def subclass(name):
    layer = FAMILIES[name](3, 4)
    layer.__class__ = type("Renamed", (type(layer),), {})
    return as_model(layer)


def pykan():
    from kan import KAN

    return KAN(width=[3, 4, 2], grid=3, k=3, auto_save=False, device="cpu").speed()


MODELS = {
    **{name: (make, X) for name, make in KINDS.items()},
    **{name: (make, images(channels=2, size=5)) for name, make in CONVS.items()},
    **{
        f"{name}, {sizes}": (lambda name=name, sizes=sizes: ConvNet(name, **sizes), images(ndim=sizes["ndim"]))
        for name in CONVOLUTIONS
        for sizes in ({"groups": 2, "ndim": 1}, {"groups": 2, "ndim": 2}, {"ndim": 3})
    },
    **{
        f"slim {name}": (lambda name=name: slim(as_model(FAMILIES[name](3, 4)), 2), X)
        for name in ("own", "efficient-kan", "pykan", "cheby-kan")
    },
    "slim network": (lambda: SlimKAN([3, 5, 4], ranks=2), X),
    "network": (lambda: KAN([3, 5, 4], norm="layer"), X),
    "network of pykan": (pykan, X),
    **{f"subclass of {name}": (lambda name=name: subclass(name), X) for name in ("own", "efficient-kan")},
    "beside others": (lambda: nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), KANLinear(3, 2)), X),
}


@pytest.mark.parametrize("kind", MODELS)
def test_life(kind, tmp_path):
    make, x = MODELS[kind]
    base = make()
    fresh, before, found = copy.deepcopy(base), state(base), find_kan_layers(base)
    model = get_peft_model(base, LoTRAConfig(r=2))
    assert found and set(layers(model)) == {f"base_model.model.{layer.name}" for layer in found}
    start = state(model)
    train(model, x, 0.0, 2, lr=0.1)
    moved = {name.split(".")[-2] for name, tensor in state(model).items() if not torch.equal(tensor, start[name])}
    parts = set()
    for layer in layers(model).values():
        parts |= {f"lotra_{name}" for name in layer.get_components("default")._asdict()}
    assert moved == parts and {"lotra_core", "lotra_factor_basis"} < parts
    assert ("lotra_factor_kernel" in parts) == ("conv" in kind)
    y = model.eval()(x).detach()
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(fresh, tmp_path).eval()(x), y)
    with model.disable_adapter():
        plain = model(x).detach()
    assert apart(y, plain) > 1e-4
    model.merge_adapter()
    assert apart(model(x), y) < 1e-4
    model.unmerge_adapter()
    assert torch.equal(model(x), y)
    base = model.unload()
    assert same(state(base), before) and not layers(base) and apart(base(x), plain) < 1e-5


def test_a_convolution():
    model, x = adapted(CONVS["fastkanconv"](), r=(2, 2, 3, 4)), images(channels=2, size=5)
    (layer,) = layers(model).values()
    assert layer.lotra_factor_kernel["default"].shape == (9, 4) and layer.lotra_r["default"] == (2, 2, 3, 4)
    with model.disable_adapter():
        plain = model(x)
    mixed, y = model(x, adapter_names=["default", "__base__", "default"]), model(x)
    assert apart(mixed, torch.stack([y[0], plain[1], y[2]])) < 1e-5
