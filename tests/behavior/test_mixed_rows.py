# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Rows of one batch with adapters of their own, whichever way the model calls and feeds its layers."""

import itertools

import pytest
import torch
from helpers import (
    CONVS,
    adapt,
    add_adapter,
    assert_equal,
    assert_near,
    bank_of,
    base,
    images,
    inputs,
    layer_of,
    nested,
    refused,
)
from stand_ins import ChebyKANLayer
from torch import nn
from torch.testing import assert_close

from peft_lotra import LoTRAConfig
from peft_lotra.kan import KAN


NAMES = ["default", "__base__", "other", "other", "default", "__base__"]


def mixed(base, **config):
    model = adapt(base, **config)
    add_adapter(model, "other", **config)
    return model


def row_by_row(model, x, names=NAMES, repeats=1):
    """What each row gives in a batch of its adapter alone."""
    rows = []
    for row, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                y = model(x)
        else:
            model.set_adapter(name)
            y = model(x)
        rows.append(y.reshape(len(names), repeats, *y.shape[1:])[row])
    return torch.cat(rows)


def check(model, x, names=NAMES, **kwargs):
    expected = row_by_row(model, x, names, **kwargs)
    model.set_adapter("default")
    assert_close(model(x, adapter_names=names), expected, rtol=0, atol=1e-12)


def test_a_layer_that_returns_a_tuple_returns_one_for_mixed_rows():
    layer = layer_of(mixed(base("pykan")))
    x = inputs()

    y, plain = layer(x, adapter_names=NAMES), layer(x)

    assert [part.shape for part in y] == [part.shape for part in plain]
    for part, expected in zip(y, plain, strict=True):
        assert_close(part[0], expected[0])


@pytest.mark.parametrize("serve", [mixed, lambda base: bank_of(base, {"default": {}, "other": {}})[0].attach()])
def test_rows_of_a_convolution_that_normalizes_by_the_batch_are_refused(serve):
    """KALN takes the extremes of the batch, so that rows would depend on the adapters of others."""
    model = serve(CONVS["kalnconv"]().eval())

    with refused("`kan` normalizes by the whole batch"):
        model(images(6, channels=2, size=5), adapter_names=NAMES)


def test_a_name_stands_for_all_steps_of_its_row():
    x = torch.randn(6, 5, 3, dtype=torch.float64)
    flat = mixed(nn.Sequential(ChebyKANLayer(3, 4, degree=3)).double())  # which flattens its input

    assert flat(x, adapter_names=NAMES).shape == (30, 4)
    check(flat, x, repeats=5)
    check(mixed(KAN([3, 4, 2], dtype=torch.float64)), x)


class Model(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.kan, self.how = KAN([3, 5, 3], dtype=torch.float64), how

    def forward(self, x):
        if self.how == "forward":
            return self.kan.forward(x)
        return self.kan.layers[1].forward(self.kan.layers[0].forward(x))


@pytest.mark.parametrize("how", ["forward", "layers"])
def test_rows_keep_their_adapters_through_calls_of_forward_and_of_layers(how):
    check(mixed(Model(how)), inputs().double())


class Channels(nn.Module):
    """TimeKAN: channels are folded into the batch, a convolution over time follows, and the layer gets all as rows.

    It normalizes each sample, and keeps the scale for its outputs.
    """

    def __init__(self, order="batch, channel, time"):
        super().__init__()
        self.order, self.embed = order, nn.Conv1d(1, 3, 3, padding=1)
        self.first, self.second = ChebyKANLayer(3, 5, degree=3), KAN([5, 2])

    def forward(self, x):
        batch, time, channels = x.shape
        self.scale = x.abs().amax(1, keepdim=True)
        x = (x / self.scale).permute(0, 2, 1).contiguous().reshape(batch * channels, time, 1)
        x = self.embed(x.transpose(1, 2)).transpose(1, 2)
        if self.order != "batch, channel, time":
            x = x.transpose(0, 1)
        y = self.second(self.first(x.reshape(-1, 3)))
        if self.order != "batch, channel, time":
            y = y.view(time, -1, 2).transpose(0, 1)
        return y.reshape(batch, channels, time, 2).sum(-1).transpose(1, 2) * self.scale


@pytest.mark.parametrize("shape", [(6, 7, 4), (6, 6, 6), (6, 4, 1), (6, 1, 4)])
def test_channels_that_are_folded_into_the_batch_keep_their_adapters(shape):
    model = mixed(Channels().double())

    check(model, torch.rand(shape, dtype=torch.float64))


def test_channels_of_equal_samples_keep_their_adapters():
    x = torch.rand(1, 5, 3, dtype=torch.float64).expand(6, 5, 3).contiguous()

    check(mixed(Channels().double()), x)


@pytest.mark.parametrize("x", [torch.rand(6, 5, 3), torch.ones(6, 5, 3), torch.zeros(6, 5, 3) + 1e-3])
def test_another_order_of_folded_channels_is_refused(x):
    """Also for samples that are equal, which do not show their order."""
    model = mixed(Channels(order="time, batch, channel").double())

    with refused("Length of `adapter_names`.*`first`"):
        model(x.double(), adapter_names=NAMES)


def test_a_sample_that_is_not_finite_spoils_no_other():
    model, x = mixed(Channels().double()), torch.rand(6, 5, 3).double()
    expected = model(x, adapter_names=NAMES)
    x[2, 1, 1] = torch.nan

    y = model(x, adapter_names=NAMES)

    assert_close(y[3:], expected[3:])


def test_a_model_that_checks_its_inputs_is_refused():
    model, x = mixed(Channels().double()), torch.rand(6, 5, 3).double()

    def check_range(module, args):
        assert args[0].min() >= 0

    model.get_base_model().register_forward_pre_hook(check_range)
    with refused("Length of `adapter_names`.*first"):
        model(x, adapter_names=NAMES)


def test_what_a_model_keeps_is_that_of_its_own_pass():
    model, x = mixed(Channels().double()), torch.rand(6, 5, 3).double()

    model(x, adapter_names=NAMES)

    assert_close(model.get_base_model().scale, x.abs().amax(1, keepdim=True))


def test_rows_have_the_saved_modules_of_their_adapter():
    model = adapt(nested().double(), target_modules=["body.0"], modules_to_save=["head"])
    add_adapter(model, "other", target_modules=["body.1", "tail.layers.0"], modules_to_save=["head"])
    for name, parameter in model.eval().named_parameters():
        if "modules_to_save.other" in name:
            parameter.data.mul_(2)

    check(model, inputs(dtype=torch.float64))


def test_an_adapter_without_a_saved_head_uses_the_base_head():
    model = adapt(nested().double(), modules_to_save=["head"])
    head = model.base_model.model["head"]
    head.register_forward_pre_hook(lambda module, args: None)  # a user's
    add_adapter(model, "other")
    with torch.no_grad():
        head.modules_to_save["default"].weight.mul_(2)

    check(model, inputs(dtype=torch.float64))


@pytest.mark.parametrize(
    ("names", "word"),
    [
        *[(names, "adapter") for names in (["default", "unknown"] * 3, NAMES[:5], [], "default", [1] * 6)],
        *[(NAMES, word) for word in ("train", "merge", "last dimension of 3")],
    ],
)
def test_a_refused_call_leaves_nothing_behind(names, word):
    model, x = mixed(KAN([3, 4, 2])).train(word == "train"), inputs()
    if word == "merge":
        model.merge_adapter()
    y = model(x)

    with refused(word):
        model(x[:, :2] if "dimension" in word else x, adapter_names=names)
    assert_equal(model(x), y)  # nothing is left behind


@pytest.mark.parametrize("in_place", [True, False])
def test_names_for_a_compiled_part_are_refused(in_place):
    """Names do not reach compiled code: all rows would get the active adapter."""
    base = KAN([3, 4, 2])
    if in_place:
        base.layers[0].compile(backend="eager")
    else:
        base = nn.Sequential(torch.compile(base, backend="eager"))

    with refused("do not reach compiled modules"):
        adapt(base)(inputs(), adapter_names=["__base__"] * 6)


def test_a_hook_of_a_base_layer_sees_all_rows():
    model, x = adapt(KAN([3, 5, 2])), inputs()
    add_adapter(model, "other")
    model.get_base_model().layers[1].base_layer.register_forward_hook(lambda module, args, output: 2 * output)
    y = model.eval()(x, adapter_names=["default", "other"] * 3)

    assert_near(y[::2], model(x)[::2])


@pytest.mark.parametrize(
    ("shape", "count"),
    [*itertools.product([(32, 3), (32, 1, 3)], [1, 8, 0]), ((1, 32, 3), 8), ((1, 32, 3), 0)],
)
def test_another_number_of_names_than_rows_is_refused(shape, count):
    """`adapter_names=[name]` is a forgotten `* len(x)`, as it is for LoRA."""
    model = mixed(nn.Sequential(KAN([3, 4])))
    x = torch.rand(shape)

    with refused("Length of `adapter_names` should be the same as the number of inputs"):
        model(x, adapter_names=["default"] * count)


def test_a_string_in_place_of_a_list_of_names_is_refused():
    """Also where its letters are names."""
    model = mixed(nn.Sequential(KAN([3, 4])))
    for name in "ab":
        model.add_adapter(name, LoTRAConfig(r=1))

    with refused("must be a list"):
        model(torch.rand(2, 3), adapter_names="ab")
    with refused("list of strings"):
        model.base_model.add_weighted_adapter("ab", [1.0, 1.0], "sum")


def test_one_row_of_many_steps_needs_one_name():
    """Also where the model flattens the steps into the rows of its layers."""
    model = mixed(nn.Sequential(nn.Flatten(0, 1), KAN([3, 4])))
    x = torch.rand(1, 32, 3)

    y = model(x, adapter_names=["other"])

    model.set_adapter("other")
    assert_close(y, model(x), rtol=1e-4, atol=1e-6)


class TimeFirst(nn.Module):
    """Takes (time, batch, in), as recurrent networks of torch do."""

    def __init__(self):
        super().__init__()
        self.kan = KAN([3, 4])

    def forward(self, x):
        return self.kan(x.transpose(0, 1).contiguous())


def test_rows_may_be_in_the_second_dimension():
    model = mixed(TimeFirst())
    x = torch.rand(7, 4, 3)

    y = model(x, adapter_names=["default", "__base__", "other", "other"])

    for name, rows in (("default", [0]), ("other", [2, 3])):
        model.set_adapter(name)
        assert_close(y[rows], model(x)[rows], rtol=1e-4, atol=1e-6)
