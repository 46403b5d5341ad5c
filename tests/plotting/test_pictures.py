# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0


import pytest
import torch
from helpers import adapt, assert_same, base, nested, snapshot
from matplotlib.figure import Figure
from peft import get_peft_model
from stand_ins import FAMILIES

from peft_lotra import LoTRAConfig, slim, update_spectrum
from peft_lotra.kan import KAN
from peft_lotra.optim import LevenbergMarquardt
from peft_lotra.plotting import edge_changes, plot_edge_functions, plot_history, plot_network_change, plot_spectra


def test_spectra(tmp_path):
    model, tuned = KAN([3, 5, 4]), KAN([3, 5, 4])
    figure = plot_spectra(update_spectrum(model, tuned))
    assert [axis.get_title() for axis in figure.axes] == ["out mode", "in mode", "basis mode"]
    assert [len(line.get_xdata()) for axis in figure.axes for line in axis.lines] == [5, 4, 3, 5, 9, 9]
    assert all(max(line.get_ydata()) < figure.axes[0].get_ylim()[1] for line in figure.axes[0].lines)
    figure.savefig(tmp_path / "spectra.png")
    assert len(plot_spectra(update_spectrum(model, model)).axes) == 3  # a zero update too


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in ("fast-kan", "faster-kan")])
def test_the_functions_sum_up_to_the_output(family):
    model = adapt(base(family))
    x = torch.linspace(0.3, 0.7, 9)[:, None].expand(-1, 3)
    before = snapshot(model)

    figure = plot_edge_functions(model, "kan", [(2, i) for i in range(3)], x)

    assert_same(model, before)
    with torch.no_grad(), model.disable_adapter():
        outputs = [model(x)[0, 2].item()]
    outputs.append(model(x)[0, 2].item())
    layer = model.base_model.model.kan
    biases = [p for n, p in layer.base_layer.named_parameters() if n.endswith("bias") and p.numel() == 4]
    for index, output in enumerate(outputs):
        total = sum(float(axis.lines[index].get_ydata()[0]) for axis in figure.axes)
        total += sum(bias.flatten()[2].item() for bias in biases)
        assert total == pytest.approx(output, abs=1e-4)
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["base", "adapted, darker for a larger effect"]


@pytest.mark.parametrize("family", ["own", "efficient-kan"])
def test_a_slim_layer_has_the_functions_of_the_dense_one(family):
    model = adapt(slim(base(family), ranks=(2, 2, 3)))
    drawn = [axis.lines[1].get_ydata() for axis in plot_edge_functions(model, "kan", [(1, 0), (3, 2)]).axes]
    merged = plot_edge_functions(model.merge_and_unload(), "kan", [(1, 0), (3, 2)]).axes
    for y, axis in zip(drawn, merged, strict=True):
        torch.testing.assert_close(*map(torch.as_tensor, (y, axis.lines[0].get_ydata())), atol=1e-5, rtol=1e-4)


def test_functions_are_drawn_over_the_grid():
    model = KAN([2, 3], grid_range=(0, 5))
    x = plot_edge_functions(model, "layers.0").axes[0].lines[0].get_xdata()
    assert (x[0], x[-1]) == (0, 5)


def test_functions_are_drawn_over_the_range_of_the_data():
    model = adapt(KAN([2, 3, 1]))
    x = torch.rand(50, 2) * 0.5

    first = plot_edge_functions(model, "layers.0", [(0, 1)], x)
    second = plot_edge_functions(model, "layers.1", [(0, 2)], x)

    base_line, adapted, marks = first.axes[0].lines
    assert base_line.get_xdata()[[0, -1]].tolist() == pytest.approx([x[:, 1].min().item(), x[:, 1].max().item()])
    torch.testing.assert_close(torch.tensor(marks.get_xdata()), x[:, 1])
    z = model.base_model.model.layers[0](x)[:, 2].detach()
    assert second.axes[0].lines[0].get_xdata()[[0, -1]].tolist() == pytest.approx([z.min().item(), z.max().item()])


def test_splines_of_other_libraries_are_drawn_between_the_inner_knots():
    model = base("efficient-kan")
    knots = model.kan.grid[0]

    x = plot_edge_functions(model, "kan", [(0, 0)]).axes[0].lines[0].get_xdata()

    assert x[[0, -1]].tolist() == pytest.approx([knots[3].item(), knots[-4].item()])


def test_which_edges_are_drawn():
    model = adapt(base("own"), r=(2, 2, 4))
    layer = model.base_model.model.kan
    with torch.no_grad():
        layer.lotra_factor_in["default"].copy_(torch.tensor([[0.1] * 2, [3.0] * 2, [1.0] * 2]))
    for name in ("kan", "base_model.model.kan"):  # as PEFT writes it
        figure = plot_edge_functions(model, name, inputs=["a", "b", "c"])
        assert [axis.get_title()[0] for axis in figure.axes] == ["b", "c", "a"]  # one for each input
    assert len(plot_edge_functions(base("own"), "kan", [(0, 1)]).axes[0].lines) == 1  # no adapter
    part = Figure().subfigures(1, 2)[1]
    assert plot_edge_functions(model, "kan", figure=part) is part


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: plot_edge_functions(base("own"), "head"), "no module 'head'.*'kan'"),
        (lambda: plot_edge_functions(nested(), "head"), "`head` is a Linear, which is not a KAN layer"),
        (lambda: plot_edge_functions(base("own"), "kan", [(4, 0), (0, 0)]), "out of bounds"),
        (lambda: plot_edge_functions(base("fast-kan"), "kan"), "normalizes its inputs together"),
        (lambda: plot_edge_functions(base("own"), "kan", inputs=["a"]), "out of range"),
        (lambda: plot_network_change(adapt(base("own")), torch.rand(9, 3), outputs="wxy"), "longer"),
        (lambda: plot_network_change(base("own"), torch.rand(9, 3)), "no dense KAN layer with an active"),
        (lambda: plot_network_change(torch.nn.Linear(2, 3), torch.rand(9, 2)), "no dense KAN layer with an active"),
    ],
)
def test_errors(call, message):
    with pytest.raises((IndexError, ValueError), match=message):
        call()


def test_the_change_of_a_network():
    model = get_peft_model(KAN([3, 5, 2]), LoTRAConfig(r=2, init_weights=False))
    before, x = snapshot(model), torch.rand(100, 3)
    figure = plot_network_change(model, x)
    assert_same(model, before)
    first, second = figure.axes[0].collections
    assert len(first.get_segments()) == 15 and len(second.get_segments()) == 10
    changes = edge_changes(model, x)
    for lines, layer in zip((first, second), ("layers.0", "layers.1"), strict=True):
        shares = [edge.share for edge in changes if edge.layer == layer]
        torch.testing.assert_close(sorted(lines.get_array().tolist()), sorted(shares), rtol=1e-5, atol=1e-9)
    # the last segment, above the others, is the edge with the largest effect: unit 0 is at the top
    largest = next(edge for edge in changes if edge.layer == "layers.0")
    assert second.get_clim()[1] == pytest.approx(changes[0].share)
    assert first.get_segments()[-1].tolist() == [[0, 1 - largest.input / 2], [1, 1 - largest.output / 4]]
    assert figure._repr_png_()[:4] == b"\x89PNG"
    named = plot_network_change(model, x, inputs=["a", "b", "c"], outputs=["y", "z"])
    assert {"a", "b", "c", "y", "z"} <= {text.get_text() for text in named.axes[0].texts}


def test_history(tmp_path):
    x = torch.rand(40, 1)
    terms = [(lambda model, x, y: model(x) - y, (x, x.sin()), weight) for weight in (1.0, 2.0)]
    history = LevenbergMarquardt(KAN([1, 4, 1])).fit(terms, steps=4, progress=False)
    figure = plot_history(history, ["a", "b"])
    losses = figure.axes[0].lines[0].get_ydata()
    assert list(losses) == [step.loss for step in history]
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()][:3] == ["loss", "a", "b"]
    figure.savefig(tmp_path / "history.png")
    with pytest.raises(IndexError):
        plot_history(history, ["a"])
