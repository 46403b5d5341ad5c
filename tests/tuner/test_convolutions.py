# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Convolutional KAN layers, whose coefficients have a fourth mode: the positions of the kernel."""

import copy
from functools import partial

import torch
from helpers import adapt, assert_equal, images, lotra_layers, refused
from peft import get_peft_model
from stand_ins import ConvNet, FastKANConvNDLayer
from torch import nn
from torch.testing import assert_close

from peft_lotra import (
    LoTRAConfig,
    find_kan_layers,
    start_from_gradient,
)
from peft_lotra.kan import KAN, jet


def net(kind="fastkanconv", groups=1, ndim=2):
    torch.manual_seed(0)
    return ConvNet(kind, groups=groups, ndim=ndim).eval()


adapted = partial(adapt, r=(3, 2, 2, 4))


def first(model):
    return model.base_model.model.first


def test_three_ranks_leave_the_kernel_whole_and_a_fourth_is_its_own():
    assert find_kan_layers(net())[0].shape == (6, 4, 5, 9)

    for r, expected in ((3, (3, 3, 3, 3)), ((2, 9, 2), (2, 4, 2, 9)), ((2, 2, 2, 99), (2, 2, 2, 9))):
        layer = first(adapted(net(), r=r))
        components = layer.get_components("default")
        assert layer.lotra_r["default"] == components.ranks == expected
        assert components.shape == (6, 4, 6, 9)
        assert components.factor_kernel is getattr(layer.lotra_factor_kernel, "default", None)
        assert (components.factor_kernel is None) == (expected[3] == 9)
    model = adapted(net(), r=1, rank_pattern={"second": (2, 2, 2, 5)}, adapt_residual=False)
    ranks = {name.rpartition(".")[2]: layer.lotra_r["default"] for name, layer in lotra_layers(model).items()}

    assert ranks == {"first": (1, 1, 1, 1), "second": (2, 2, 2, 5)}
    assert first(model).get_components("default").shape == (6, 4, 5, 9)


def test_four_ranks_serve_dense_layers_too():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.convolution, self.kan = FastKANConvNDLayer(4, 6, 3), KAN([6, 3])

        def forward(self, x):
            return self.kan(self.convolution(x).flatten(2).mean(-1))

    model = adapted(Mixed(), r=(2, 3, 2, 4))
    assert [layer.lotra_r["default"] for layer in lotra_layers(model).values()] == [(2, 3, 2, 4), (2, 3, 2)]
    dense = [name for name in model.state_dict() if "kan" in name and "lotra" in name]
    assert len(dense) == 4
    assert not any("factor_kernel" in name for name in dense)
    model(images()).sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "lotra" in name)


def test_the_gradient_start_uses_the_leading_directions_of_the_kernel():
    model, x = net(), images()
    # with all other modes whole, the best subspace of the kernel is that of the unfolding of the gradient
    twin = copy.deepcopy(model)
    twin(x).square().sum().backward()
    spline, residual = (p.grad for n, p in sorted(twin.first.named_parameters(), reverse=True) if "conv" in n)
    gradient = torch.cat([spline.unflatten(1, (4, 5)), residual.unsqueeze(2)], 2).flatten(3)
    before = model(x)
    model = get_peft_model(model, LoTRAConfig(r=(6, 4, 6, 2), target_modules=["first"]))
    start_from_gradient(model, lambda: model(x).square().sum())

    assert_equal(model(x), before)

    kernel = first(model).lotra_factor_kernel["default"]
    leading = torch.linalg.svd(gradient.movedim(3, 0).flatten(1), full_matrices=False).U[:, :2]

    assert_close(kernel @ kernel.T, leading @ leading.T, atol=1e-3, rtol=0)


def test_what_convolutions_cannot_do_is_refused():
    model, x = adapted(net()), images()

    for network in (model, net()):
        with refused("must return .* a row of outputs for each row of inputs"):
            jet(network, x)
