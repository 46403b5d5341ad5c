# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Reading and writing the coefficients of a layer in every layout."""

import math

import pytest
import torch
from helpers import assert_equal
from torch import nn
from torch.testing import assert_close

from peft_lotra import KANLayerSpec


def module(**shapes):
    """Return a module with parameters of these shapes; a list of shapes makes a ParameterList, a dict a submodule."""
    result = nn.Module()
    for name, shape in shapes.items():
        setattr(result, name, part(shape))
    return result


def part(shape):
    if isinstance(shape, dict):
        return module(**shape)
    if isinstance(shape, tuple):
        return nn.Parameter(torch.randn(shape))
    members = [part(member) for member in shape]
    return nn.ModuleList(members) if isinstance(members[0], nn.Module) else nn.ParameterList(members)


# what is stored, its description, the canonical shape
DESCRIBED = {
    "three parts": (
        {"scale": (4, 3), "translation": (4, 3), "wavelet_weights": (4, 3)},
        {"coefficients": [(name, "o i") for name in ("scale", "translation", "wavelet_weights")]},
        (4, 3, 3),
    ),
    "parts of several axes, with a residual": (
        {"W1": (3, 4, 2, 5), "W2": (4, 3, 7), "base": (3, 4)},
        {"coefficients": [("W1", "i o h s"), ("W2", "o i n")], "residual": ("base", "i o")},
        (4, 3, 17),
    ),
    "blocks, with a residual": (
        {"spline_weight": (2, 4, 3, 5), "base_weight": (2, 4, 3)},
        {"coefficients": ("spline_weight", "g o i k"), "residual": ("base_weight", "g o i"), "groups": "g"},
        (8, 3, 5),
    ),
    "a convolution of two groups, with a residual": (
        {"poly_weights": (2, 4, 15, 3, 3), "base_conv": [{"weight": (4, 3, 3, 3)}, {"weight": (4, 3, 3, 3)}]},
        {
            "coefficients": ("poly_weights", "g o (k i) ..."),
            "residual": ("base_conv.*.weight", "o i ..."),
            "groups": "g",
        },
        (8, 3, 5, 9),
    ),
    "a list of convolutions beside a grouped residual": (
        {"spline_conv": [{"weight": (4, 15, 3)}, {"weight": (4, 15, 3)}], "base_conv": {"weight": (8, 3, 3)}},
        {
            "coefficients": ("spline_conv.*.weight", "o (i k) ..."),
            "residual": ("base_conv.weight", "(g o) i ..."),
            "groups": "g",
            "axes": {"g": 2},
        },
        (8, 3, 5, 3),
    ),
    "several layers in one module, with residuals": (
        {"spline_weights": [(4, 3, 5), (2, 4, 6), (1, 2, 5)], "base_weights": [(4, 3), (2, 4), (1, 2)]},
        {"coefficients": ("spline_weights.*", "o i k"), "residual": ("base_weights.*", "o i")},
        (7, 4, 6),
    ),
    "a residual packed behind a kernel": (
        {"weight": (4, 18, 3)},
        {"coefficients": ("weight", "o ((i k) + i) ..."), "axes": {"i": 3}},
        (4, 3, 5, 3),
    ),
}


@pytest.fixture(params=DESCRIBED)
def described(request):
    shapes, description, shape = DESCRIBED[request.param]
    layer = module(**shapes)
    tensor = KANLayerSpec("mine", nn.Module, **description).locate(layer)
    return layer, tensor, shape, "residual" in request.param


def test_the_canonical_tensor_has_each_parameter_once_and_zeros(described):
    layer, tensor, shape, residual = described

    whole = tensor.read(layer)

    assert tensor.shape == shape
    assert tensor.has_residual == residual
    assert whole.shape == (*shape[:2], shape[2] + residual, *shape[3:])
    stored = torch.cat([parameter.flatten() for parameter in layer.parameters()])
    assert_equal(whole[whole != 0].sort().values, stored.sort().values)
    assert set(tensor.parameters) == {name for name, _ in layer.named_parameters()}
    assert set(tensor.names) == {name for name in tensor.parameters if not name.startswith("base")}


def test_splitting_what_was_read_gives_the_parameters(described):
    layer, tensor, *_ = described

    parameters = tensor.split(tensor.read(layer))

    assert_equal(parameters, dict(layer.named_parameters()))


def test_what_is_written_into_the_padding_is_lost(described):
    layer, tensor, *_ = described
    whole = tensor.read(layer)
    update = torch.randn_like(whole)

    written = tensor.join(list(tensor.split(update).values()))

    assert_equal(written, update.where(whole != 0, 0))


def test_coefficients_and_residual_are_slices_of_the_whole(described):
    layer, tensor, shape, residual = described
    whole = tensor.read(layer)

    coefficients, weights = tensor.read_parts(layer)

    assert_equal(coefficients, whole[:, :, : shape[2]])
    assert torch.equal(weights, whole[:, :, -1]) if residual else weights is None
    assert set(tensor.split(torch.ones(shape))) == set(tensor.names)  # without the residual slice


def test_gradients_flow_both_ways(described):
    layer, tensor, *_ = described
    update = torch.randn(tensor.read(layer).shape, requires_grad=True)

    sum(parameter.sum() for parameter in tensor.split(update).values()).backward()
    tensor.read(layer).sum().backward()

    assert_equal(update.grad, (tensor.read(layer) != 0).float())
    assert all((parameter.grad == 1).all() for parameter in layer.parameters())


@pytest.mark.parametrize(
    "pattern, stored, read, roles",
    [
        ("t o i g", "toig", "oitg", {}),
        ("g i o t", "giot", "oigt", {}),  # the basis axes keep the order in which the pattern names them
        ("g o (k i) ...", "gokihw", "goikhw", {"groups": "g", "axes": {"i": 3}}),
    ],
)
def test_elements_land_where_the_pattern_says(pattern, stored, read, roles):
    lengths = {"g": 2, "o": 4, "k": 5, "t": 2, "i": 3, "h": 2, "w": 3}
    shape = [lengths[axis] for axis in stored]
    values = torch.arange(float(math.prod(shape))).view(shape)
    layer = nn.Module()
    layer.w = nn.Parameter(values.flatten(2, 3) if "(" in pattern else values)

    whole = KANLayerSpec("mine", nn.Module, ("w", pattern), **roles).locate(layer).read(layer)

    assert_equal(whole, torch.einsum(f"{stored}->{read}", values).reshape(whole.shape))


@pytest.mark.parametrize(
    "first, second, roles, dims",
    [
        (("o i m", (4, 3, 2)), ("i k", (3, 5)), {}, (0,)),
        (("g o i m", (2, 2, 3, 2)), ("k", (5,)), {"groups": "g"}, (0, 1)),
        (("o i m ...", (4, 3, 2, 2, 2)), ("() o i ()", (1, 4, 3, 1)), {}, (3,)),
    ],
)
def test_a_shared_parameter_is_repeated_and_gets_the_mean_of_its_updates(first, second, roles, dims):
    """The mean is the update whose repetition is nearest to what each edge would have."""
    layer = module(a=first[1], b=second[1])
    tensor = KANLayerSpec("mine", nn.Module, [("a", first[0]), ("b", second[0])], **roles).locate(layer)
    whole = tensor.read(layer)
    update = torch.randn(whole.shape)

    repeated = whole[:, :, 2:]
    mean = repeated.mean(dims, keepdim=True)

    assert_close(repeated, mean.expand_as(repeated))
    assert_close(mean.flatten(), layer.b.flatten())
    assert_close(tensor.split(update)["b"].flatten(), update[:, :, 2:].mean(dims).flatten())


def test_layers_in_one_module_are_blocks_of_the_whole():
    layer = module(weights=[(2, 3, 5), (1, 2, 4)])

    whole = KANLayerSpec("mine", nn.Module, ("weights.*", "o i k")).locate(layer).read(layer)

    assert_equal(whole[:2], layer.weights[0])
    assert_equal(whole[2:, :2, :4], layer.weights[1])
    assert not whole[2, 2].any()
    assert not whole[2, :, 4].any()


@pytest.mark.parametrize(
    "shapes, coefficients, words",
    [
        ({"a": [(2, 3, 5)], "b": [(2, 3), (2, 3)]}, [("a.*", "o i k"), ("b.*", "o i")], ["'a.*': 1, 'b.*': 2"]),
        ({"a": (2, 3)}, ("b.*", "o i k"), ["'b.*': 0"]),
        ({"a": [{"v": (2, 3)}]}, ("a.*.w", "o i"), ["`a.0.w`", "no such parameter"]),
        ({"a": (2, 3, 5), "b": (2, 4)}, [("a", "o i k"), ("b", "o i")], ["`b`", "'i': 3", "(2, 4)"]),
        ({"a": (2, 3, 5)}, ("a", "o i k g"), ["`a`", "'o i k g'", "(2, 3, 5)", "it names 4 dimensions"]),
        ({"a": (4, 18)}, ("a", "o ((i k) + i)"), ["(4, 18), with {}", "((i k) + i)", "by `axes`"]),
        ({"a": (3, 15, 2)}, ("a", "i (z k) o"), ["(3, 15, 2), with {'z': 4}", "(z k) cannot be 15"]),
    ],
)
def test_what_does_not_fit_together_is_named(shapes, coefficients, words):
    with pytest.raises(ValueError) as error:
        KANLayerSpec("mine", nn.Module, coefficients, axes={"z": 4}).locate(module(**shapes))

    for word in ("Module was recognized as a KAN layer of the kind 'mine'", *words):
        assert word in str(error.value)
