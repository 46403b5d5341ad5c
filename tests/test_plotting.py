# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

import json

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
from peft_lotra.tuner.targets import locate_target


def test_spectra(tmp_path):
    model, tuned = KAN([3, 5, 4]), KAN([3, 5, 4])
    figure = plot_spectra(update_spectrum(model, tuned))
    assert [axis.get_title() for axis in figure.axes] == ["out mode", "in mode", "basis mode"]
    assert [len(line.get_xdata()) for axis in figure.axes for line in axis.lines] == [5, 4, 3, 5, 9, 9]
    assert all(max(line.get_ydata()) < figure.axes[0].get_ylim()[1] for line in figure.axes[0].lines)
    figure.savefig(tmp_path / "spectra.png")
    part = Figure().subfigures(1, 2)[1]
    assert plot_spectra(update_spectrum(model, model), part) is part  # a zero update too


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "fast-kan"])
def test_the_functions_sum_up_to_the_output(family):
    model = adapt(base(family))
    x = torch.full((101,), 0.3)
    before = snapshot(model)
    edges = [(2, i) for i in range(3)]
    figure = plot_edge_functions(model, "kan", edges, x)
    assert_same(model, before)
    with torch.no_grad(), model.disable_adapter():
        outputs = {"base": model(x[:, None].expand(-1, 3))[0, 2]}
    outputs["adapted"] = model(x[:, None].expand(-1, 3))[0, 2]
    layer = model.base_model.model.kan
    biases = [p for n, p in layer.base_layer.named_parameters() if n.endswith("bias") and p.numel() == 4]
    for index, label in enumerate(("base", "adapted")):
        total = sum(float(axis.lines[index].get_ydata()[0]) for axis in figure.axes)
        total += sum(bias.flatten()[2].item() for bias in biases)
        assert total == pytest.approx(outputs[label].item(), abs=1e-4)
        assert figure.axes[0].lines[index].get_label() == label


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


def test_which_edges_are_drawn():
    model = adapt(base("own"), r=(2, 2, 4))
    layer = model.base_model.model.kan
    with torch.no_grad():
        layer.lotra_factor_in["default"].copy_(torch.tensor([[0.1] * 2, [3.0] * 2, [1.0] * 2]))
    for name in ("kan", "base_model.model.kan"):  # as PEFT writes it
        titles = [axis.get_title() for axis in plot_edge_functions(model, name, 2, title="{0} {1}".format).axes]
        assert [title.split()[1] for title in titles] == ["1", "2"]
    figure = plot_edge_functions(model, "kan", x=torch.rand(7, 1))
    assert len(figure.axes) == 3  # one for each input
    assert [len(line.get_xdata()) for line in figure.axes[0].lines] == [7, 7]
    assert len(plot_edge_functions(base("own"), "kan", 1).axes[0].lines) == 1  # no adapter


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: plot_edge_functions(base("own"), "head"), "no module 'head'.*'kan'"),
        (lambda: plot_edge_functions(nested(), "head"), "`head` is a Linear, which is not a KAN layer"),
        (lambda: plot_edge_functions(base("own"), "kan", [(4, 0), (0, 0)]), r"below \(4, 3\), got \[\(4, 0\)"),
        (lambda: plot_edge_functions(base("own"), "kan", 0), "`edges` is 0, but must be an integer of at least 1"),
        (lambda: plot_edge_functions(base("fast-kan"), "kan"), "normalizes its inputs together"),
        (lambda: plot_network_change(base("own"), 2.5), "`most` is 2.5, but must be an integer of at least 1"),
        (lambda: plot_network_change(base("own")), "no dense KAN layer with an active"),
        (lambda: plot_network_change(torch.nn.Linear(2, 3)), "no dense KAN layer with an active"),
    ],
)
def test_errors(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()


def coefficients(model, name="kan"):
    """The coefficients, times what the layer multiplies them by."""
    layer, spec, tensor = locate_target(name, model.get_submodule(name))
    found, scale = tensor.read(layer).detach().clone(), spec.scale(layer)
    if scale is not None:
        found[..., : tensor.shape[2]] *= scale.detach().unsqueeze(-1)
    return found


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_changes_are_those_of_the_coefficients(family):
    model = base(family)
    before = coefficients(model)
    model = adapt(model)
    state = snapshot(model)
    changes = edge_changes(model)
    assert_same(model, state)
    change = (coefficients(model.merge_and_unload()) - before).norm(dim=2)
    torch.testing.assert_close(changes.change, {"kan": change}, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(changes.share, {"kan": change / before.norm(dim=2)}, atol=1e-4, rtol=1e-3)
    assert changes.share["kan"].shape == (4, 3)


def test_an_edge_that_was_zero_has_a_finite_share():
    model = KAN([2, 3])
    with torch.no_grad():
        model.layers[0].spline_weight[1, 0] = 0
        model.layers[0].base_weight[1, 0] = 0
    size = coefficients(model, "layers.0").norm(dim=2)
    changes = edge_changes(adapt(model))
    change, share = changes.change["layers.0"][1, 0], changes.share["layers.0"][1, 0]
    assert share.item() == pytest.approx((change / (size.mean() / 1000)).item(), rel=1e-4)


def test_changes_of_the_adapters_in_force():
    model = adapt(nested(), adapter_name="first", target_modules=["body.0", "body.1"])
    model.add_adapter("second", LoTRAConfig(r=2, target_modules=["body.1", "tail.layers.0"], init_weights=False))
    assert list(edge_changes(model).share) == ["body.0", "body.1"]
    model.set_adapter("second")
    assert list(edge_changes(model).share) == ["body.1", "tail.layers.0"]
    model.base_model.set_adapter(["first", "second"])
    layer = model.base_model.model.body[1]
    together = edge_changes(model)
    assert list(together.share) == ["body.0", "body.1", "tail.layers.0"]
    delta = sum(layer.get_delta_weight(adapter) for adapter in ("first", "second")).detach()
    torch.testing.assert_close(together.change["body.1"], delta.norm(dim=2))
    model.merge_adapter()
    with pytest.raises(ValueError, match="`unmerge_adapter`"):
        edge_changes(model)
    model.unmerge_adapter()
    torch.testing.assert_close(edge_changes(model).share, together.share)
    with model.disable_adapter(), pytest.raises(ValueError, match="`enable_adapter_layers`"):
        edge_changes(model)
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(edge_changes(compiled).share, together.share)


def test_the_edges_that_changed_most():
    changes = edge_changes(get_peft_model(KAN([6, 7, 2]), LoTRAConfig(r=2, init_weights=False)))
    _, *rows, note = str(changes).splitlines()
    shares = torch.cat([share.flatten() for share in changes.share.values()])
    assert [row.split()[-1] for row in rows] == [f"{share:.1%}" for share in shares.topk(10).values.tolist()]
    name, o, i, change, share = rows[0].split()
    o, i = int(o), int(i)
    assert (change, share) == (f"{changes.change[name][o, i]:.3g}", f"{changes.share[name][o, i].item():.1%}")
    assert note == "the 10 of 56 edges that changed most"
    assert "edges that changed most" not in str(edge_changes(adapt(KAN([2, 3]))))  # all are listed
    changes.share["layers.1"][1, 4] = torch.nan  # an adapter that diverged
    assert str(changes).splitlines()[1].split()[:3] == ["layers.1", "1", "4"]
    assert json.loads(json.dumps(changes.as_dict()))["share"]["layers.1"][1][4] is None


def test_the_change_of_a_network():
    model = get_peft_model(KAN([3, 5, 2]), LoTRAConfig(r=2, init_weights=False))
    before = snapshot(model)
    figure = plot_network_change(model)
    assert_same(model, before)
    first, second = figure.axes[0].collections
    assert len(first.get_segments()) == 15 and len(second.get_segments()) == 10
    shares = edge_changes(model).share
    for lines, share in zip((first, second), shares.values(), strict=True):
        assert lines.get_array().tolist() == share.flatten().sort().values.tolist()
    # the last segment, above the others, is the edge that changed most: unit 0 is at the top
    output, input_ = divmod(int(shares["layers.0"].argmax()), 3)
    assert second.get_clim() == (0, max(share.max().item() for share in shares.values()))
    assert first.get_segments()[-1].tolist() == [[0, 1 - input_ / 2], [1, 1 - output / 4]]
    assert figure._repr_png_()[:4] == b"\x89PNG"
    few = plot_network_change(model, most=5).axes[0].collections[0].get_array().tolist()
    assert few == first.get_array().tolist()[-5:]


def test_history(tmp_path):
    x = torch.rand(40, 1)
    terms = [(lambda model, x, y: model(x) - y, (x, x.sin()), weight) for weight in (1.0, 2.0)]
    history = LevenbergMarquardt(KAN([1, 4, 1])).fit(terms, steps=4, progress=False)
    figure = plot_history(history, ["a", "b"])
    losses = figure.axes[0].lines[0].get_ydata()
    assert list(losses) == [step.loss for step in history]
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()][:3] == ["loss", "a", "b"]
    figure.savefig(tmp_path / "history.png")
    with pytest.raises(ValueError, match="2 terms"):
        plot_history(history, ["a"])
