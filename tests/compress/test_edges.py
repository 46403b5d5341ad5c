# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0


import json

import pytest
import torch
from foreign import make_foreign
from helpers import adapt, assert_same, base, nested, refused, snapshot
from stand_ins import LAYER_KINDS
from torch import nn

from peft_lotra import LoTRAConfig, what_changed
from peft_lotra.kan import KAN
from peft_lotra.plotting import plot_edge_functions


@pytest.mark.parametrize("kind", [kind for kind in LAYER_KINDS if kind not in ("fast-kan", "faster-kan")])
def test_an_edge_counts_as_what_its_change_adds_to_the_output(kind):
    """The two omitted kinds normalize their inputs together, so one input cannot move alone."""
    model = adapt(base(kind))
    x = torch.rand(200, 3) * 1.6 - 0.8
    state = snapshot(model)

    changes = what_changed(model, x).edges

    assert_same(model, state)
    for edge in changes:
        only_input = torch.full_like(x, 0.3)
        only_input[:, edge.input] = x[:, edge.input]
        with torch.no_grad():
            y = model(only_input)[:, edge.output]
            with model.disable_adapter():
                change = y - model(only_input)[:, edge.output]
        assert edge.layer_effect == pytest.approx(change.std(correction=0).item(), abs=1e-4, rel=1e-3)


class Sines(nn.Module):
    """Sines of each input, with a factor or with phases that the outputs do not share."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.coefficients = nn.Parameter(torch.randn(4, 3, 5))
        self.gate = nn.Parameter(torch.linspace(0, 2, 4), requires_grad=False)
        self.phase = nn.Parameter(torch.rand(4, 3, 5), requires_grad=False)
        self.weight = nn.Parameter(torch.randn(4, 3), requires_grad=False)

    def forward(self, x):
        angle = x[:, None, :, None] * torch.arange(1, 6)  # (rows, 1, in, basis)
        if self.kind == "phases":
            angle = angle + self.phase
        y = (torch.sin(angle) * self.coefficients).sum((2, 3))
        if self.kind == "gate of each output":
            y = self.gate * y
        if self.kind == "gate of the inputs":
            y = torch.sigmoid(x @ self.weight.T) * y
        return y


@pytest.mark.parametrize("kind", ["phases", "gate of each output", "gate of the inputs"])
def test_outputs_may_have_functions_of_their_own(kind):
    model = adapt(nn.Sequential(Sines(kind)))
    x = torch.rand(200, 3) * 2 - 1

    changes = what_changed(model, x).edges

    layer = model.base_model.model[0]
    delta = layer.get_delta_weight("default").detach()
    base_layer = layer.get_base_layer()
    for edge in changes:
        base_layer.coefficients.data.zero_()
        base_layer.coefficients.data[edge.output, edge.input] = delta[edge.output, edge.input]
        y = base_layer(x)[:, edge.output]
        assert edge.layer_effect == pytest.approx(y.std(correction=0).item(), abs=1e-5)
        assert edge.shift == pytest.approx(y.mean().item(), abs=1e-5)


@pytest.mark.parametrize("kind", ["phases", "gate of each output"])
def test_edges_of_outputs_with_functions_of_their_own_are_drawn(kind):
    layer = Sines(kind)

    figure = plot_edge_functions(nn.Sequential(layer), "0", edges=[(3, 1)])

    x, y = map(torch.as_tensor, figure.axes[0].lines[0].get_data())
    rows = x.unsqueeze(1).expand(-1, 3)
    with torch.no_grad():
        is_drawn = torch.zeros(4, 3, 1)
        is_drawn[3, 1] = 1
        layer.coefficients *= is_drawn
        torch.testing.assert_close(y, layer(rows)[:, 3], rtol=1e-4, atol=1e-5, check_dtype=False)


def test_removed_edges_of_pykan_have_no_effect():
    kan = make_foreign("pykan").float()
    x = torch.rand(100, 2) * 2 - 1
    kan(x)
    kan.remove_edge(0, 0, 1)
    kan.fix_symbolic(0, 1, 2, "sin", fit_params_bool=False, verbose=False)

    changes = what_changed(adapt(kan), x).edges

    effects = {(edge.output, edge.input): edge.layer_effect for edge in changes if edge.layer == "act_fun.0"}
    assert [edge for edge, effect in effects.items() if effect == 0] == [(1, 0), (2, 1)]


def test_the_effect_on_the_network_is_a_derivative():
    model = adapt(KAN([2, 4, 1]).double(), r=("full", "full", "full")).double()
    x = torch.rand(300, 2, dtype=torch.float64)
    edge = next(edge for edge in what_changed(model, x).edges if edge.layer == "layers.0")
    change = model.base_model.model.layers[0].get_delta_weight("default")[edge.output, edge.input].detach()
    change[:-1] -= edge.shift  # splines sum to one

    merged = model.merge_and_unload()
    layer = merged.layers[0]

    def outputs(step):
        parameters = {name: p.detach().clone() for name, p in merged.named_parameters()}
        parameters["layers.0.spline_weight"][edge.output, edge.input] += step * change[:-1]
        parameters["layers.0.base_weight"][edge.output, edge.input] += step * change[-1]
        return torch.func.functional_call(merged, parameters, (x,))

    assert len(change) == layer.spline_weight.shape[2] + 1
    derivative = (outputs(1e-4) - outputs(-1e-4)) / 2e-4
    assert edge.effect == pytest.approx(derivative.square().mean().sqrt().item(), rel=1e-4)


def test_an_edge_that_was_zero_does_not_lead():
    model = KAN([2, 3, 1])
    with torch.no_grad():
        model.layers[0].spline_weight[1, 0] = 0
        model.layers[0].base_weight[1, 0] = 0
    adapted = adapt(model, r=("full", "full", "full"), random=False)
    with torch.no_grad():
        core = adapted.base_model.model.layers[0].lotra_core["default"]
        core[1, 0] = torch.linspace(0, 1e-3, core.shape[2])  # of a thousandth, on an edge of zero
        core[2, 1] = torch.linspace(0, 0.5, core.shape[2])

    changes = what_changed(adapted, torch.rand(100, 2)).edges

    assert (changes[0].output, changes[0].input) == (2, 1)
    assert changes[0].share > 0.99


def test_a_constant_change_is_a_shift_without_effect():
    adapted = adapt(KAN([2, 1]), r=("full", "full", "full"), random=False)
    with torch.no_grad():
        adapted.base_model.model.layers[0].lotra_core["default"][0, 1, :-1] = 0.5  # splines sum to one

    changes = {edge.input: edge for edge in what_changed(adapted, torch.rand(100, 2)).edges}

    assert changes[1].shift == pytest.approx(0.5, abs=1e-5)
    assert changes[1].effect == pytest.approx(0, abs=1e-6)


def test_only_active_adapters_count():
    model = adapt(nested(), adapter_name="first", target_modules=["body.0", "body.1"])
    model.add_adapter("second", LoTRAConfig(r=2, target_modules=["body.1", "tail.layers.0"], init_weights=False))

    x = torch.rand(30, 3)

    def layers():
        return {edge.layer for edge in what_changed(model, x).edges}

    assert layers() == {"body.0", "body.1"}
    model.set_adapter("second")
    assert layers() == {"body.1", "tail.layers.0"}
    model.base_model.set_adapter(["first", "second"])
    assert layers() == {"body.0", "body.1", "tail.layers.0"}


def test_merged_and_disabled_adapters_do_not_count():
    model, x = adapt(KAN([3, 2])), torch.rand(30, 3)

    with model.disable_adapter():
        assert what_changed(model, x).edges == []
    model.merge_adapter()
    assert what_changed(model, x).edges == []


def test_the_list_is_sorted_and_prints_its_first_ten():
    report = what_changed(adapt(KAN([4, 8, 3]), r=2), torch.rand(100, 4))
    changes = report.edges

    effects = [edge.effect for edge in changes]
    assert effects == sorted(effects, reverse=True)
    assert sum(edge.share for edge in changes) == pytest.approx(1)
    first = changes[0]
    end = f"{first.layer}, input {first.input} to output {first.output}: effect {first.effect:.3g}"
    lines = str(report).splitlines()
    assert [line for line in lines if line.startswith("edges")][0].endswith(end)
    assert "the 10 of 56 edges with the largest effect" in lines
    assert json.loads(json.dumps(report.as_dict()))["edges"][0]["share"] == first.share


def test_wrong_inputs_are_named():
    model = adapt(KAN([3, 4, 1]))
    state = snapshot(model)

    with refused("The input has shape"):
        what_changed(model, torch.rand(30, 2))
    with refused("0 rows"):
        what_changed(model, torch.rand(0, 3))
    with refused("NaN"):
        what_changed(model, torch.full((30, 3), torch.nan))
    with pytest.warns(UserWarning, match="far outside of its grid"):
        what_changed(model, torch.rand(30, 3) + 50)
    assert_same(model, state)


@pytest.mark.parametrize("component", ["spline_weight", "lotra_core.default"])
def test_values_that_are_not_finite_are_named(component):
    model = adapt(KAN([3, 4]))
    [parameter] = [p for name, p in model.named_parameters() if name.endswith(component)]
    with torch.no_grad():
        parameter[0, 0] = torch.nan

    with refused("finite|infinite"):
        what_changed(model, torch.rand(30, 3))


def test_under_inference_mode_the_changes_are_the_same():
    model = adapt(KAN([2, 4, 1]))
    x = torch.rand(50, 2)
    expected = what_changed(model, x).edges

    with torch.inference_mode():
        changes = what_changed(model, x.clone()).edges

    assert changes == expected
