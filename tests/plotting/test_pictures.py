# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0


import pytest
import torch
from helpers import adapt, assert_same, base, nested, refuses, snapshot
from matplotlib.figure import Figure
from peft import get_peft_model
from stand_ins import LAYER_KINDS

from peft_lotra import LoTRAConfig, update_spectrum, what_changed
from peft_lotra.kan import KAN
from peft_lotra.least_squares import LevenbergMarquardt
from peft_lotra.plotting import plot_edge_functions, plot_history, plot_spectra


def test_spectra_of_the_three_modes_are_drawn(tmp_path):
    figure = plot_spectra(update_spectrum(KAN([3, 5, 4]), KAN([3, 5, 4])))

    assert [axis.get_title() for axis in figure.axes] == ["out mode", "in mode", "basis mode"]
    top = figure.axes[0].get_ylim()[1]
    assert all(max(line.get_ydata()) < top for line in figure.axes[0].lines)
    lines = [line for axis in figure.axes for line in axis.lines]
    assert [len(line.get_xdata()) for line in lines] == [5, 4, 3, 5, 9, 9]
    figure.savefig(tmp_path / "spectra.png")


def test_the_spectra_of_a_zero_update_are_drawn():
    model = KAN([3, 5, 4])

    assert len(plot_spectra(update_spectrum(model, model)).axes) == 3


@pytest.mark.parametrize("kind", [kind for kind in LAYER_KINDS if kind not in ("fast-kan", "faster-kan")])
def test_the_functions_sum_up_to_the_output(kind):
    model = adapt(base(kind))
    x = torch.linspace(0.3, 0.7, 9)[:, None].expand(-1, 3)
    state = snapshot(model)

    figure = plot_edge_functions(model, "kan", [(2, i) for i in range(3)], x)

    assert_same(model, state)
    with torch.no_grad():
        adapted_output = model(x)[0, 2].item()
        with model.disable_adapter():
            base_output = model(x)[0, 2].item()
    layer = model.base_model.model.kan.base_layer
    biases = [p for name, p in layer.named_parameters() if name.endswith("bias") and p.numel() == 4]
    bias = sum(parameter.flatten()[2].item() for parameter in biases)
    for index, output in enumerate((base_output, adapted_output)):
        total = sum(float(axis.lines[index].get_ydata()[0]) for axis in figure.axes)
        assert total + bias == pytest.approx(output, abs=1e-4)
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["base", "adapted; % and darkness: share of the change, without constant shifts"]


def drawn_range(figure):
    return figure.axes[0].lines[0].get_xdata()[[0, -1]].tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_functions_are_drawn_over_the_grid(dtype):
    assert drawn_range(plot_edge_functions(KAN([2, 3], grid_range=(0, 5)).to(dtype), "layers.0")) == [0, 5]


def test_functions_are_drawn_over_the_range_of_the_data():
    model = adapt(KAN([2, 3, 1]))
    x = torch.rand(50, 2) * 0.5
    hidden = model.base_model.model.layers[0](x)[:, 2].detach()

    first = plot_edge_functions(model, "layers.0", [(0, 1)], x)
    second = plot_edge_functions(model, "layers.1", [(0, 2)], x)

    assert drawn_range(first) == pytest.approx([x[:, 1].min().item(), x[:, 1].max().item()])
    assert drawn_range(second) == pytest.approx([hidden.min().item(), hidden.max().item()])
    marks = first.axes[0].lines[2]
    torch.testing.assert_close(torch.tensor(marks.get_xdata()), x[:, 1])


def test_splines_of_other_libraries_are_drawn_between_the_inner_knots():
    model = base("efficient-kan")
    knots = model.kan.grid[0]

    figure = plot_edge_functions(model, "kan", [(0, 0)])

    assert drawn_range(figure) == pytest.approx([knots[3].item(), knots[-4].item()])


@pytest.mark.parametrize("name", ["kan", "base_model.model.kan"])  # PEFT writes the longer one
def test_the_six_edges_with_the_largest_changes_are_drawn_by_default(name):
    model = adapt(base("own"), r=(2, 2, 4))
    factor = model.base_model.model.kan.lotra_factor_in["default"]
    with torch.no_grad():
        factor.copy_(torch.tensor([[0.1] * 2, [9.0] * 2, [3.0] * 2]))

    figure = plot_edge_functions(model, name, inputs=["a", "b", "c"])

    edges = len(figure.axes)
    shares = [int(axis.get_title().split(": ")[1][:-1]) for axis in figure.axes]
    assert edges == 6
    assert shares == sorted(shares, reverse=True)
    assert figure.axes[0].get_title().startswith("b")
    assert figure.get_supxlabel().endswith("6 of 12 edges")


def test_a_title_has_the_share_of_the_edge_in_the_whole_change(adapted):
    model, x = adapted
    largest = what_changed(model, x).edges[0]

    figure = plot_edge_functions(model, largest.layer, [(largest.output, largest.input)], x)

    assert figure.axes[0].get_title() == f"input {largest.input} to unit {largest.output}: {largest.share:.0%}"


def test_a_network_without_adapter_has_one_curve():
    [axis] = plot_edge_functions(base("own"), "kan", [(0, 1)]).axes

    assert len(axis.lines) == 1
    assert axis.get_title() == "input 1 to unit 0"


def test_functions_are_drawn_into_a_given_figure():
    figure = Figure().subfigures(1, 2)[1]

    assert plot_edge_functions(base("own"), "kan", figure=figure) is figure


test_wrong_arguments_are_named = refuses(
    {
        "no module 'head'.*'kan'": lambda: plot_edge_functions(base("own"), "head"),
        "`head` is a Linear, which is not a KAN layer": lambda: plot_edge_functions(nested(), "head"),
        "out of bounds": lambda: plot_edge_functions(base("own"), "kan", [(4, 0), (0, 0)]),
        "each depends on the other inputs": lambda: plot_edge_functions(base("fast-kan"), "kan"),
        "inputs. has 1 names.*`kan` has 3": lambda: plot_edge_functions(base("own"), "kan", inputs=["a"]),
    }
)


@pytest.fixture
def adapted():
    """A model with two adapted layers, and inputs."""
    return get_peft_model(KAN([3, 5, 2]), LoTRAConfig(r=2, init_weights=False)), torch.rand(100, 3)


def test_the_history_is_drawn_with_the_losses_of_named_terms(tmp_path):
    x = torch.rand(40, 1)
    terms = [(lambda model, x, y: model(x) - y, (x, x.sin()), weight) for weight in (1.0, 2.0)]
    history = LevenbergMarquardt(KAN([1, 4, 1])).fit(terms, steps=4, progress=False)

    figure = plot_history(history, ["a", "b"])

    assert list(figure.axes[0].lines[0].get_ydata()) == [step.loss for step in history]
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()][:3] == ["loss", "a", "b"]
    figure.savefig(tmp_path / "history.png")
    with pytest.raises(ValueError, match="`names` has 1 entries"):
        plot_history(history, ["a"])
