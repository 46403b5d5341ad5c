# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""A trained adapter and the same one loaded multiply the same matrices, so that no processor tells them apart.

torch takes other products of batches if a factor requires a gradient.
"""

import pytest
import torch
from helpers import CONVS, KINDS, adapt, base, images
from torch.utils._python_dispatch import TorchDispatchMode

from peft_lotra.kan import SlimKAN


FORMS = [2, ("full", "full", 1), "full"]
WIDE = ["own", "efficient-kan", "pykan", "fast-kan", "cheby-kan", "fourier-kan", "inkan"]


class Products(TorchDispatchMode):
    """The products of matrices in the order of their calls, with the shapes of their factors."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "mm" in function.overloadpacket.__name__:
            shapes = [argument.shape for argument in args if isinstance(argument, torch.Tensor)]
            self.calls.append((str(function), shapes))
        return function(*args, **(kwargs or {}))


def assert_same_products(model, x):
    model(x)  # a layer is recognized in its first call
    with Products() as trained:
        model(x)
    model.requires_grad_(False)
    with Products() as loaded:
        model(x)
    assert trained.calls == loaded.calls


@pytest.mark.parametrize("r", FORMS, ids=str)
@pytest.mark.parametrize("kind", [*KINDS, *CONVS])
def test_an_adapter_of_each_kind(kind, r):
    model = adapt((KINDS | CONVS)[kind](), r=r)
    x = images(channels=2, size=5) if kind in CONVS else torch.rand(7, 3)

    assert_same_products(model, x)


@pytest.mark.parametrize("kind", WIDE)
def test_an_adapter_of_a_wide_layer(kind):
    model = adapt(base(kind, in_features=40, out_features=160), r=("full", "full", 1))

    assert_same_products(model, torch.rand(7, 40))


@pytest.mark.parametrize("rows", [7, 100])
def test_a_slim_network(rows):
    network = SlimKAN([3, 5, 2], ranks=(2, 2, 3))

    assert_same_products(network, torch.rand(rows, 3))
