# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The life of an adapter on each kind of layer: attached, trained, saved, loaded, merged, unmerged."""

import copy

import pytest
import torch
from helpers import CONVS, KINDS, X, adapt, assert_equal, assert_near, images, lotra_layers, relative, state, train
from peft import PeftModel, get_peft_model
from stand_ins import CONVOLUTIONS, LAYER_KINDS, ConvNet, as_model
from torch import nn

from peft_lotra import LoTRAConfig, find_kan_layers, slim
from peft_lotra.kan import KAN, KANLinear, SlimKAN


def subclass(name):
    layer = LAYER_KINDS[name](3, 4)
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
        f"slim {name}": (lambda name=name: slim(as_model(LAYER_KINDS[name](3, 4)), 2), X)
        for name in ("own", "efficient-kan", "pykan", "cheby-kan")
    },
    "slim network": (lambda: SlimKAN([3, 5, 4], ranks=2), X),
    "network": (lambda: KAN([3, 5, 4], norm="layer"), X),
    "network of pykan": (pykan, X),
    **{f"subclass of {name}": (lambda name=name: subclass(name), X) for name in ("own", "efficient-kan")},
    "beside others": (lambda: nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), KANLinear(3, 2)), X),
}


ONE_SHAPE = ("full", "full", 1)
CASES = [(kind, 2) for kind in MODELS] + [(kind, r) for kind in (*KINDS, *CONVS) for r in (ONE_SHAPE, "full")]


@pytest.mark.filterwarnings("ignore:Adapters have more parameters")
@pytest.mark.parametrize(("kind", "r"), CASES, ids=str)
def test_an_adapter_is_trained_saved_merged_and_unloaded(kind, r, tmp_path):
    make, x = MODELS[kind]
    base = make()
    fresh, base_state, layers = copy.deepcopy(base), state(base), find_kan_layers(base)
    model = get_peft_model(base, LoTRAConfig(r=r))
    adapted = lotra_layers(model)
    assert layers
    assert set(adapted) == {f"base_model.model.{layer.name}" for layer in layers}
    components = [layer.get_components("default") for layer in adapted.values()]

    # trained: all components, and nothing else
    start = state(model)
    train(model, x, 0.0, 2, lr=0.1)
    moved = {name.split(".")[-2] for name, tensor in state(model).items() if not torch.equal(tensor, start[name])}
    assert moved == {f"lotra_{name}" for tensor in components for name in tensor._asdict()}
    if "conv" in kind and r != 2:
        assert all(tensor.form[3] == "full" for tensor in components)  # three ranks leave the kernel full
    assert ("lotra_factor_kernel" in moved) == ("conv" in kind and r == 2)
    y = model.eval()(x).detach()
    with model.disable_adapter():
        plain = model(x).detach()
    assert relative(y, plain) > 1e-4

    # saved and loaded
    model.save_pretrained(tmp_path)
    assert_equal(PeftModel.from_pretrained(fresh, tmp_path).eval()(x), y)

    # merged and back
    model.merge_adapter()
    assert_near(model(x), y, 1e-4)
    model.unmerge_adapter()
    assert_equal(model(x), y)

    # unloaded
    base = model.unload()
    assert_equal(state(base), base_state)
    assert not lotra_layers(base)
    assert_near(base(x), plain)


def test_an_adapter_of_a_convolution_has_four_ranks():
    model, x = adapt(CONVS["fastkanconv"](), r=(2, 2, 3, 4)), images(channels=2, size=5)
    (layer,) = lotra_layers(model).values()

    assert layer.lotra_factor_kernel["default"].shape == (9, 4)
    assert layer.lotra_r["default"] == (2, 2, 3, 4)

    with model.disable_adapter():
        plain = model(x)
    mixed, y = model(x, adapter_names=["default", "__base__", "default"]), model(x)

    assert_near(mixed, torch.stack([y[0], plain[1], y[2]]))
