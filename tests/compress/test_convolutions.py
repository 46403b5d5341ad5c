# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Spectra, extraction and reports of convolutional KAN layers, of four modes."""

import copy

import pytest
import torch
from helpers import assert_equal, images, refused
from peft import get_peft_model
from stand_ins import ConvNet

from peft_lotra import LoTRAConfig, extract_lotra, find_kan_layers, update_spectrum, what_changed
from peft_lotra.plotting import plot_edge_functions, plot_spectra
from peft_lotra.tucker import Tucker
from peft_lotra.tuner.layer import lotra_layers
from peft_lotra.tuner.targets import locate_target


def tuned_pair(ranks, kind="kagnconv", groups=2):
    """A network, and a copy whose first layer has an update of these ranks."""
    base = ConvNet(kind, groups=groups).eval()
    tuned = copy.deepcopy(base)
    location = locate_target("first", tuned.first).tensor
    tensor = location.read(tuned.first).detach()
    factors = [torch.randn(size, rank) for size, rank in zip(tensor.shape, ranks, strict=True)]
    update = Tucker(torch.randn(ranks), *factors).dense(0.1)
    with torch.no_grad():
        for name, value in location.split(tensor + update).items():
            tuned.first.get_parameter(name).copy_(value)
    return base, tuned


def test_spectra_have_four_modes():
    spectrum = update_spectrum(*tuned_pair((2, 1, 3, 2)))
    layer = spectrum.layers["first"]

    assert layer.shape == (6, 2, 5, 9)
    assert len(layer.singular_values) == 4
    assert layer.energy((2, 1, 3, 2)) == pytest.approx(1)
    assert layer.energy((2, 1, 3)) == pytest.approx(1)
    assert layer.energy((2, 1, 3, 1)) < 1 - 1e-5

    costs = layer.costs()

    assert costs[1, 0, 2, 1] == 2 * 1 * 3 * 2 + 6 * 2 + 2 * 1 + 5 * 3 + 9 * 2
    assert "6 x 2 x 5 x 9" in str(spectrum)


def test_ranks_for_four_modes_keep_a_budget():
    base, tuned = tuned_pair((6, 2, 5, 9))
    for budget in (100, 300):
        model = extract_lotra(copy.deepcopy(base), tuned, budget=budget)

        assert 0.7 * budget < model.extraction_report.parameters <= budget
        assert model.extraction_report.parameters == model.get_nb_trainable_parameters()[0]


def test_inputs_do_not_weigh_convolutions():
    base, tuned = tuned_pair((3, 2, 3, 4), "fastkanconv")
    alike, weighed = (extract_lotra(copy.deepcopy(base), tuned, 2, inputs=x) for x in (None, images()))
    (first,), (second,) = (list(lotra_layers(model)) for model in (alike, weighed))

    assert_equal(first[1].get_delta_weight("default"), second[1].get_delta_weight("default"))
    assert "first" in str(weighed.extraction_report)


def test_convolutions_have_pictures_and_summaries():
    base, tuned = tuned_pair((2, 1, 3, 2))
    figure = plot_spectra(update_spectrum(base, tuned))

    assert [axis.get_title() for axis in figure.axes] == ["out mode", "in mode", "basis mode", "kernel mode"]
    assert all(len(axis.lines) == 1 for axis in figure.axes)
    with refused("`first` is a convolution"):
        plot_edge_functions(base, "first")

    model = get_peft_model(base, LoTRAConfig(r=(2, 1, 2, 3)))

    with refused("must have rows and columns"):
        what_changed(model, images())

    row, *_ = find_kan_layers(model)

    assert row.shape == (6, 2, 4, 9)
    assert row.adapters == {"default": (2, 1, 2, 3)}
