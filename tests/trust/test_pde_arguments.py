# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Arguments that make no sense, given to the blocks of `peft_lotra.pde`: clear errors, and nothing changed."""

from __future__ import annotations

import math

import pytest
import torch
from hostile import assert_raised_here as refused
from torch import nn

from peft_lotra.kan import KAN, KnotMap, jet
from peft_lotra.pde import (
    BoxDistance,
    BoxFeatures,
    HardConstraint,
    ResidualAttention,
    ResidualSampler,
    box_points,
    causal_weights,
    continuation,
    gradient_weights,
    knot_density,
    side_points,
)


NO_NUMBER = ["x", None, math.nan, math.inf, 1j, 10**400]
NO_COUNT = [0, 2.5, True, "x", None]
R, X = torch.rand(10), torch.rand(4, 2)


##########################
# Points                 #
##########################


@pytest.mark.parametrize("low", [None, "a", [1j], [[1], [1, 2]], [-(10**400)], [-1.7e308]], ids=range(6))
def test_boxes(low):
    for make in (lambda low: box_points(low, [1.7e308], 3), lambda low: BoxFeatures(low, [1.7e308])):
        refused(lambda make=make: make(low), "`low`")


@pytest.mark.parametrize("count", NO_COUNT, ids=repr)
def test_counts(count):
    refused(lambda: box_points([0], [1], count), "`count`")
    refused(lambda: ResidualSampler([0], [1], count), "`count`")
    refused(lambda: ResidualSampler([0], [1], 8, pool=count), "`pool`")
    refused(lambda: knot_density(KAN([2, 1]), [0, 0], [1, 1], count), "`cells`")
    refused(lambda: causal_weights(R, R, slices=count), "`slices`")
    refused(lambda: continuation(KAN([1, 1]), lambda v: 0.0, 1.0, 2.0, steps=count), "`steps`")


@pytest.mark.parametrize("seed", ["x", 1.5, 2**70, None])
def test_seeds(seed):
    for make in (box_points, side_points, ResidualSampler):
        refused(lambda make=make: make([0], [1], 8, seed=seed), "`seed`")
    refused(lambda: knot_density(KAN([1, 1]), [0], [1], seed=seed), "`seed`")


@pytest.mark.parametrize("number", NO_NUMBER, ids=range(6))
def test_numbers(number):
    refused(lambda: ResidualSampler([0], [1], 8, share=number), "`share`")
    refused(lambda: ResidualSampler([0], [1], 8, power=number), "`power`")
    refused(lambda: knot_density(KAN([1, 1]), [0], [1], power=number), "`power`")
    refused(lambda: gradient_weights(KAN([2, 1]), X, number), "`scale`")
    refused(lambda: causal_weights(R, R, number), "`strictness`")
    refused(lambda: ResidualAttention(number), "`decay`")
    refused(lambda: ResidualAttention(rate=number), "`rate`")
    refused(lambda: continuation(KAN([1, 1]), lambda v: 0.0, number, 2.0), "`start`")
    refused(lambda: continuation(KAN([1, 1]), lambda v: 0.0, 1.0, 2.0, shrinkage=number), "`shrinkage`")
    if number != math.inf:
        refused(lambda: continuation(KAN([1, 1]), lambda v: 0.0, 1.0, 2.0, target=number), "`target`")
    refused(lambda: HardConstraint(KAN([1, 1]), number), "`distance`")


@pytest.mark.parametrize("sides", [3, "low", [[0, "low"]], [(0, "left")]], ids=repr)
def test_sides(sides):
    for make in (lambda: side_points([0], [1], 3, sides), lambda: BoxDistance([0], [1], sides)):
        refused(make, "`sides`")
    refused(lambda: side_points([0], [1], 3, []), "`sides` is empty")


def test_indices():
    for given in (0, "0", [True], [2], [None]):
        refused(lambda given=given: BoxFeatures([0, 0], [1, 1], periodic=given), "`periodic`")
    # they were consumed by the check, and the coordinate was not periodic
    assert BoxFeatures([0, 0], [1, 1], periodic=(i for i in [0])).periodic == [0]


def test_nothing_of_inference_mode_is_left():
    """Points and weights that were made in it could not be trained with."""
    with torch.inference_mode():
        made = [
            box_points([0], [1], 4),
            *side_points([0], [1], 4),
            causal_weights(R, R),
            ResidualAttention().update(R),
        ]
        made += [*ResidualSampler([0], [1], 8).draw(lambda x: x), gradient_weights(KAN([2, 1]), X)]
        made += [knot_density(KAN([1, 1]), [0], [1])]
    assert not any(tensor.is_inference() for tensor in made)


##########################
# Residuals              #
##########################


def sampler(**options):
    return ResidualSampler([0, 0], [1, 1], 40, **options)


def by_autograd(x):
    x = x.clone().requires_grad_(True)
    return torch.autograd.grad(x.square().sum(), x)[0][:, 0]


@pytest.mark.parametrize(
    "residual",
    [
        lambda x: x.sum(1).long(),
        lambda x: x.sum(1) > 1,
        lambda x: (3e4 * x.sum(1)).half(),  # the norm of a row is beyond the dtype
        by_autograd,
        lambda x: x.mul_(100).sum(1),
    ],
)
def test_residuals_that_can_be_followed(residual):
    points, held = sampler().draw(residual)
    assert points.min() >= 0 and points.max() <= 1 and len(points) == 40  # they were what the residual had written


def test_a_power_that_overflows():
    points, _ = sampler(power=4000, share=1.0).draw(lambda x: x[:, 0])
    assert points[:, 0].max() > 0.9


def test_residuals_that_cannot_be_followed():
    refused(lambda: sampler().draw(3), "`residual` is 3")
    refused(lambda: sampler().draw(lambda x: 1j * x.sum(1)), "complex")
    for width in (1, 3):
        knots = KnotMap(-torch.ones(width), torch.ones(width), torch.ones(width, 4))
        refused(lambda knots=knots: sampler().draw(lambda x: x, knots), "KnotMap of 2 coordinates")


def test_a_draw_that_fails_is_not_counted():
    first, second = sampler(), sampler()
    with pytest.raises(ZeroDivisionError):
        first.draw(lambda x: 1 / 0)
    assert all(map(torch.equal, first.draw(lambda x: x), second.draw(lambda x: x)))


@pytest.mark.parametrize("residuals", [None, [1.0], torch.tensor(1.0), torch.rand(0), R + 0j], ids=range(5))
def test_residuals_of_weights(residuals):
    for call in (lambda r: causal_weights(r, R), lambda r: causal_weights(R, r), ResidualAttention().update):
        refused(lambda call=call: call(residuals), "`residuals`|`times`")


@pytest.mark.parametrize("dtype", [torch.long, torch.half, torch.float64])
def test_dtypes_of_weights(dtype):
    """Times that are integers were a raw error, and half precision overflowed."""
    residuals, times = torch.full((10,), 300).to(dtype), torch.arange(10)
    expected = causal_weights(residuals.double(), times.double(), 1e-5)
    assert torch.allclose(causal_weights(residuals, times.to(dtype), 1e-5).double(), expected, rtol=1e-5)


def test_weights_that_are_written_into():
    """The weights that follow came from what the user had made of them."""
    attention = ResidualAttention()
    attention.update(torch.ones(3)).zero_()
    assert torch.allclose(attention.update(torch.ones(3)), torch.ones(3, 1))


class Flat(nn.Module):
    """A network that returns (n,)."""

    def __init__(self):
        super().__init__()
        self.kan = KAN([2, 3, 1])

    def forward(self, x):
        return self.kan(x)[..., 0]


def test_shapes_of_networks():
    flat = Flat()
    assert torch.allclose(gradient_weights(flat, X), gradient_weights(flat.kan, X))
    assert torch.allclose(knot_density(flat, [0, 0], [1, 1], 4), knot_density(flat.kan, [0, 0], [1, 1], 4), rtol=1e-4)
    for x in (torch.rand(4, 5, 2), torch.rand(2)):  # the first was summed over the wrong dimensions
        refused(lambda x=x: gradient_weights(flat.kan, x), "`x` has shape")
    refused(lambda: HardConstraint(nn.LSTM(1, 1), 1.0)(torch.rand(3, 1)), "`kan` returns an object of type tuple")
    refused(lambda: BoxDistance([0], [1])(None), "x is of type NoneType")


def test_numbers_of_other_kinds_as_parts():
    for number in (torch.tensor(2.0), R.numpy()[0]):
        u, x = HardConstraint(KAN([1, 1]), number), torch.rand(3, 1)
        assert torch.allclose(u(x), float(number) * u.kan(x)) and torch.allclose(jet(u, x)[0], u(x))


##########################
# Continuation           #
##########################


@pytest.mark.parametrize("kind", ["None", "text", "floats", "several", "complex", "empty", "error", "Ctrl-C"])
def test_a_solve_that_fails_is_taken_back(kind):
    """The model kept what half a solve had made of it."""
    model = KAN([1, 1])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def solve(value):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1)
        if kind in ("error", "Ctrl-C"):
            raise KeyboardInterrupt if kind == "Ctrl-C" else ZeroDivisionError
        returned = {"text": "0", "floats": [0.0], "several": torch.zeros(2), "complex": 1j, "empty": []}
        return returned.get(kind)

    with pytest.raises((TypeError, ValueError, ZeroDivisionError, KeyboardInterrupt)) as caught:
        continuation(model, solve, 1.0, 2.0)
    assert kind in ("error", "Ctrl-C") or "`solve` returned" in str(caught.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", ["solve", "prepare"])
def test_what_is_no_function(name):
    arguments = {"solve": lambda value: 0.0, name: 3}
    refused(lambda: continuation(KAN([1, 1]), start=1.0, stop=2.0, **arguments), f"`{name}` is 3")
