# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""pykan's MultKAN, which reaches into its layers and rebuilds itself, while it is adapted and afterwards."""

from __future__ import annotations

import copy
import functools
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from helpers import adapt, assert_same, lotra_layers, relative, snapshot
from kan import KAN, create_dataset
from matplotlib import pyplot
from torch import nn


LIBRARY = ["x", "sin", "gaussian"]
# pykan 0.2.8 executes assignments to local variables, which Python 3.13 (PEP 667) no longer shows to the function
with_formulas = pytest.mark.skipif(sys.version_info >= (3, 13), reason="pykan's formulas need Python 3.12 or older")


@pytest.fixture(autouse=True)
def _own_directory(tmp_path, monkeypatch):
    """MultKAN writes its checkpoints and figures into the working directory."""
    monkeypatch.chdir(tmp_path)
    matplotlib.use("Agg")
    yield
    pyplot.close("all")


@functools.cache
def dataset() -> dict[str, torch.Tensor]:
    def function(x):
        return torch.exp(torch.sin(torch.pi * x[:, [0]]) + x[:, [1]] ** 2)

    return create_dataset(function, n_var=2, train_num=60, test_num=30)


def network(**kwargs: Any) -> KAN:
    kan = KAN(**{"width": [2, 3, 1], "grid": 3, "k": 3, "seed": 1, **kwargs})
    for layer in kan.act_fun:  # least squares, whose last bits are not the same each time
        nn.init.normal_(layer.coef, std=0.3)
    return kan


def adapted(random: bool = True, r: int = 2, **config: Any):
    """A `PeftModel` and the network inside, by default with an adapter that changes the function."""
    kan = network()
    return adapt(kan, random=random, r=r, **config), kan


def adapted_and_merged():
    """An adapted network and a plain one that computes the same; both have seen the data."""
    model, kan = adapted()
    twin = copy.deepcopy(model).merge_and_unload()
    x = dataset()["train_input"]
    assert type(twin) is KAN and relative(kan(x), twin(x)) < 1e-6
    return model, kan, twin


def base_state(kan: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name.replace(".base_layer", ""): value.clone()
        for name, value in kan.state_dict().items()
        if "lotra_" not in name
    }


def files() -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in Path().rglob("*") if path.is_file()}


def everything(kan: nn.Module) -> tuple[dict, dict]:
    """What a refused call must leave as it was, besides the modules."""
    return {name: value for name, value in vars(kan).items() if isinstance(value, (bool, int, float, str))}, files()


def as_values(result: Any) -> Any:
    """The numbers in what a method returned, to compare them."""
    if isinstance(result, (torch.Tensor, np.ndarray, float)):
        return torch.as_tensor(result).detach().double()
    if isinstance(result, (tuple, list)):
        return [as_values(part) for part in result]
    if isinstance(result, dict):
        return {name: as_values(part) for name, part in result.items()}
    if isinstance(result, str):
        return list(result.encode())
    return result if isinstance(result, int) else None  # functions, figures


################
# What is told #
################


@pytest.mark.parametrize("random", [True, False])
def test_forward_is_that_of_the_merged_network(random):
    model, kan = adapted(random=random)
    twin = copy.deepcopy(model).merge_and_unload()
    plain = network()
    x = dataset()["test_input"]
    assert relative(model(x), twin(x)) < 1e-6 and torch.equal(model(x), kan(x))
    assert (relative(model(x), plain(x)) > 1e-2) == random
    with model.disable_adapter():
        assert torch.equal(model(x), plain(x))


READING: dict[str, Callable[[KAN], Any]] = {
    "get_act": lambda kan: (kan.get_act(dataset()["test_input"]), kan.acts, kan.spline_postacts)[1:],
    "attribute": lambda kan: (kan.attribute(), kan.edge_scores, kan.node_scores, kan.feature_score)[1:],
    "attribute of a node": lambda kan: kan.attribute(1, 0, plot=False),
    "node_attribute": lambda kan: (kan.node_attribute(), kan.node_attribute_scores)[1],
    "feature_interaction": lambda kan: kan.feature_interaction(1),
    "get_fun": lambda kan: kan.get_fun(0, 1, 2),
    "get_range": lambda kan: kan.get_range(0, 1, 2, verbose=False),
    "get_reg": lambda kan: kan.get_reg("edge_forward_spline_n", 1.0, 2.0, 0.5, 0.5),
    "evaluate": lambda kan: kan.evaluate(dataset()),
    "n_edge": lambda kan: kan.n_edge,
    "suggest_symbolic": lambda kan: kan.suggest_symbolic(0, 1, 2, lib=LIBRARY, verbose=False),
    "fix_symbolic": lambda kan: kan.fix_symbolic(0, 1, 2, "sin", verbose=False),
    "unfix_symbolic": lambda kan: (kan.fix_symbolic(0, 1, 2, "sin", verbose=False), kan.unfix_symbolic(0, 1, 2)),
    "auto_symbolic": lambda kan: kan.auto_symbolic(lib=LIBRARY, verbose=0),
    "symbolic_formula": lambda kan: (kan.auto_symbolic(lib=["x", "x^2"], verbose=0), formula_values(kan)),
    "prune_edge": lambda kan: (kan.attribute(), kan.prune_edge(0.2), kan.act_fun[0].mask),
    "remove_edge": lambda kan: (kan.remove_edge(0, 1, 2), kan.act_fun[0].mask),
    "remove_node": lambda kan: (kan.remove_node(1, 2), kan.act_fun[0].mask, kan.act_fun[1].mask),
    "module": lambda kan: (kan.module(0, "[0]->[0,1]"), kan.act_fun[0].mask),
    "speed": lambda kan: (kan.speed() is kan, kan.save_act, kan.symbolic_enabled, kan.auto_save),
}


def formula_values(kan: KAN) -> list[float]:
    (expression,), names = kan.symbolic_formula()
    points = dataset()["test_input"][:5].double().tolist()
    return [float(expression.subs(dict(zip(names, point, strict=True)))) for point in points]


@pytest.mark.parametrize(
    "method", [pytest.param(name, marks=with_formulas) if name == "symbolic_formula" else name for name in READING]
)
def test_a_method_answers_as_the_merged_network_does(method):
    _, kan, twin = adapted_and_merged()
    plain = network()
    plain(dataset()["train_input"])
    answers = []
    for each in (kan, twin, plain):
        random.seed(0), np.random.seed(0), torch.manual_seed(0)
        answers.append(as_values(READING[method](each)))
    torch.testing.assert_close(answers[0], answers[1], rtol=1e-3, atol=1e-4)
    x = dataset()["test_input"]
    assert relative(kan(x), twin(x)) < 1e-4
    # it is not the base network's answer that the two agree on
    assert relative(kan(x), plain(x)) > 1e-3
    state = base_state(kan)
    for name, value in base_state(plain).items():
        if name.startswith("act_fun") and not name.endswith("mask"):
            assert torch.equal(state[name], value), name


def test_plot(tmp_path):
    _, kan, twin = adapted_and_merged()
    for each, folder in ((kan, "of-adapted"), (twin, "of-merged")):
        each.plot(folder=folder)
    of_adapted, of_merged = (sorted((tmp_path / name).iterdir()) for name in ("of-adapted", "of-merged"))
    assert [path.name for path in of_adapted] == [path.name for path in of_merged] and len(of_adapted) == 9
    for path, expected in zip(of_adapted, of_merged, strict=True):
        difference = np.abs(pyplot.imread(path) - pyplot.imread(expected))
        assert difference.mean() < 1e-3


#######
# fit #
#######


@pytest.mark.parametrize("opt, lr, steps", [("LBFGS", 1.0, 5), ("Adam", 0.05, 20)])
@pytest.mark.parametrize("inner", [False, True], ids=["PeftModel", "MultKAN"])
def test_fit_trains_the_adapter_alone(opt, lr, steps, inner):
    model, kan = adapted(random=False)
    before = base_state(kan)
    adapters = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    assert adapters and all("lotra_" in name for name in adapters)
    result = (kan if inner else model).fit(dataset(), opt=opt, lr=lr, steps=steps, update_grid=False)
    assert result["train_loss"][-1] < 0.7 * result["train_loss"][0]
    after = base_state(kan)
    assert before.keys() == after.keys() and all(torch.equal(after[name], value) for name, value in before.items())
    assert all(not torch.equal(dict(model.named_parameters())[name], value) for name, value in adapters.items())

    # auto_save is on by default
    loaded = KAN.loadckpt("model/0.1")
    x = dataset()["test_input"]
    assert relative(loaded(x), model(x)) < 1e-6
    assert relative(loaded(x), network()(x)) > 1e-2
    assert relative(kan.checkout("0.1")(x), model(x)) < 1e-6


def test_fit_with_regularisation_makes_the_adapted_functions_small():
    results = {}
    for lamb in (1e-4, 1.0):  # lamb=0 computes no regularisation
        model, _ = adapted(r=3)
        results[lamb] = model.fit(dataset(), steps=5, update_grid=False, lamb=lamb, lamb_coef=0.1)["reg"][-1]
    assert results[1.0] < 0.5 * results[1e-4]


@pytest.mark.parametrize(
    "metric, arguments",
    [
        ("edge_forward_spline_n", (1, 2, 0, 0)),
        ("edge_forward_spline_u", (1, 2, 0, 0)),
        ("edge_forward_spline_n", (0, 0, 1, 0)),
        ("edge_forward_spline_n", (0, 0, 0, 1)),
    ],
)
def test_a_regularisation_sees_the_adapter_and_reaches_it(metric, arguments):
    model, kan, twin = adapted_and_merged()
    plain = network()
    plain(dataset()["train_input"])
    value, merged, base = (each.get_reg(metric, *arguments) for each in (kan, twin, plain))
    assert relative(value, merged) < 1e-5 and relative(value, base) > 1e-2
    value.backward()
    for name, parameter in model.named_parameters():
        if "lotra_" in name:
            assert parameter.grad.any(), name
        else:
            assert parameter.grad is None, name


def test_fit_with_one_layer_adapted():
    model, kan = adapted(random=False, target_modules=["act_fun.1"])
    assert list(lotra_layers(model)) == ["base_model.model.act_fun.1"]
    result = model.fit(dataset(), steps=4, update_grid=False)
    assert result["train_loss"][-1] < result["train_loss"][0]
    x = dataset()["test_input"]
    assert relative(KAN.loadckpt("model/0.1")(x), model(x)) < 1e-6
    with pytest.raises(RuntimeError, match="merge_and_unload"):
        kan.refine(5)


###########
# Refused #
###########


REFUSED: dict[str, Callable[[], tuple]] = {
    "prune": tuple,
    "prune_node": tuple,
    "prune_input": tuple,
    "refine": lambda: (5,),
    "copy": tuple,
    "expand_depth": tuple,
    "expand_width": lambda: (1, 1),
    "perturb": tuple,
    "swap": lambda: (1, 0, 1),
    "auto_swap": tuple,
    "auto_swap_l": lambda: (1,),
    "rewind": lambda: ("0.0",),
    "update_grid": lambda: (dataset()["test_input"],),
    "update_grid_from_samples": lambda: (dataset()["test_input"],),
    "initialize_from_another_model": lambda: (seen(network(auto_save=False, seed=5)), dataset()["test_input"]),
    "initialize_grid_from_another_model": lambda: (network(auto_save=False, seed=5), dataset()["test_input"]),
    "fit": lambda: (dataset(), "LBFGS", 2),
}
# least squares, with results that rounding changes
REFITTING = {"fit", "refine", "initialize_from_another_model", "initialize_grid_from_another_model"}
REFITTING |= {"update_grid", "update_grid_from_samples"}
REFUSED_BY_LAYERS: dict[str, Callable[[], tuple]] = {
    "update_grid_from_samples": lambda: (dataset()["test_input"],),
    "initialize_grid_from_parent": lambda: (network(auto_save=False, seed=5).act_fun[0], dataset()["test_input"]),
    "get_subset": lambda: ([0], [0, 1]),
    "swap": lambda: (0, 1),
}


def seen(kan: KAN) -> KAN:
    kan(dataset()["train_input"])
    return kan


def refused(kan: nn.Module, function: Callable, *args: Any) -> None:
    before, rest, y = snapshot(kan), everything(kan), kan(dataset()["train_input"])
    with pytest.raises(RuntimeError, match="(?i)merge"):
        function(*args)
    assert_same(kan, before)
    assert everything(kan) == rest
    assert torch.equal(kan(dataset()["train_input"]), y)


@pytest.mark.parametrize("inner", [False, True], ids=["PeftModel", "MultKAN"])
@pytest.mark.parametrize("method", REFUSED)
def test_what_rebuilds_the_network_is_refused(method, inner):
    model, kan = adapted()
    seen(kan)
    refused(kan, getattr(kan if inner else model, method), *REFUSED[method]())


@pytest.mark.parametrize("method", REFUSED_BY_LAYERS)
def test_what_moves_the_grid_of_a_layer_is_refused(method):
    model, kan = adapted()
    seen(kan)
    refused(kan, getattr(model.act_fun[0], method), *REFUSED_BY_LAYERS[method]())


def test_fit_is_refused_with_update_grid_however_it_is_passed():
    _, kan = adapted()
    seen(kan)
    positional = (dataset(), "LBFGS", 2, 1, 0.0, 1.0, 2.0, 0.0, 0.0)
    refused(kan, kan.fit, *positional)
    refused(kan, lambda: kan.fit(dataset(), steps=2, update_grid=True))
    refused(kan, kan.fit, *positional, True)
    kan.fit(*positional, False)


def test_the_message_of_fit_names_both_ways_out():
    _, kan = adapted()
    with pytest.raises(RuntimeError, match=r"`fit\(update_grid=True\)`.*`update_grid=False`.*merge_and_unload"):
        kan.fit(dataset(), steps=2)


@pytest.mark.parametrize("method", REFUSED)
def test_what_was_refused_works_after_merge_and_unload(method):
    model, _, twin = adapted_and_merged()
    kan = model.merge_and_unload()
    outcomes = []
    for each in (kan, twin):
        seen(each)
        random.seed(0), np.random.seed(0), torch.manual_seed(0)
        try:
            result = getattr(each, method)(*REFUSED[method]())
            each = result if isinstance(result, KAN) else each
            y = each(dataset()["test_input"])
            assert y.isfinite().all()
            outcomes.append(each.act_fun[0].grid if method in REFITTING else y)
        except AttributeError as error:  # pykan's own expand_depth
            outcomes.append(str(error))
    if method == "expand_depth":
        assert outcomes[0] == outcomes[1] and "append" in outcomes[0]
    else:
        torch.testing.assert_close(*outcomes, rtol=1e-3, atol=1e-3)


def test_only_the_network_around_an_adapted_layer_is_guarded():
    parts = nn.ModuleDict({"first": network(auto_save=False), "second": network(auto_save=False, seed=2)})
    parts.forward = lambda x: parts["first"](x) + parts["second"](x)
    model = adapt(parts, target_modules=r"first\.act_fun\.\d")
    x = dataset()["train_input"]
    model(x)
    refused(parts["first"], parts["first"].copy)
    assert torch.equal(parts["second"].copy()(x), parts["second"](x))
    assert type(parts["second"].refine(5)) is KAN
    model.unload()
    assert torch.equal(parts["first"].copy()(x), parts["first"](x))


############
# saveckpt #
############


@pytest.mark.parametrize("inner", [False, True], ids=["PeftModel", "MultKAN"])
def test_saveckpt_saves_the_adapted_function_under_the_original_names(inner):
    model, kan = adapted()
    seen(kan)
    before = snapshot(kan)
    (kan if inner else model).saveckpt("checkpoint")
    assert_same(kan, before)
    state = torch.load("checkpoint_state")
    assert list(state) == list(network().state_dict())
    x = dataset()["test_input"]
    loaded = KAN.loadckpt("checkpoint")
    assert torch.equal(loaded.cache_data, dataset()["train_input"])
    assert relative(loaded(x), model(x)) < 1e-6


def test_saveckpt_saves_what_is_in_force():
    model, kan = adapted()
    x = dataset()["test_input"]
    plain = network()
    with model.disable_adapter():
        kan.saveckpt("disabled")
    assert torch.equal(KAN.loadckpt("disabled")(x), plain(x))
    model.add_adapter("second", copy.deepcopy(model.peft_config["default"]))
    model.base_model.set_adapter(["default", "second"])
    kan.saveckpt("both")
    assert relative(KAN.loadckpt("both")(x), model(x)) < 1e-6
    model.set_adapter("second")
    kan.saveckpt("second")
    assert relative(KAN.loadckpt("second")(x), model(x)) < 1e-6
    assert relative(KAN.loadckpt("both")(x), model(x)) > 1e-3
    model.merge_adapter()
    kan.saveckpt("merged")
    assert torch.equal(KAN.loadckpt("merged")(x), model(x))


@pytest.mark.parametrize("dropout", ["rank_dropout", "module_dropout"])
def test_saveckpt_in_training_mode_saves_without_dropout(dropout):
    model, kan = adapted(**{dropout: 0.9})
    x = dataset()["test_input"]
    y = model(x)
    model.train()
    kan.saveckpt("checkpoint")
    assert relative(KAN.loadckpt("checkpoint")(x), y) < 1e-6


def test_a_failed_saveckpt_leaves_the_network_as_it_was():
    model, kan = adapted()
    y = model(dataset()["test_input"])
    before = snapshot(kan)
    with pytest.raises(FileNotFoundError):
        kan.saveckpt("no/such/folder/checkpoint")
    assert_same(kan, before)
    assert torch.equal(model(dataset()["test_input"]), y)


#####################
# Merge and unload  #
#####################


def flags(kan: nn.Module) -> list[tuple[str, bool]]:
    return [(name, parameter.requires_grad) for name, parameter in kan.named_parameters()]


@pytest.mark.parametrize("way", ["merge_and_unload", "unload", "delete_adapter"])
def test_unloading_leaves_a_plain_network(way):
    plain = network()
    before = flags(plain)
    assert {flag for _, flag in before} == {True, False}
    model, kan = adapted()
    x = dataset()["test_input"]
    y = model(x) if way == "merge_and_unload" else plain(x)
    if way == "delete_adapter":
        model.delete_adapter("default")
        assert torch.equal(kan(x), y)
        way = "unload"
    unloaded = getattr(model, way)()
    assert unloaded is kan and type(kan) is KAN
    assert relative(kan(x), y) < 1e-6
    plain(x)
    assert set(vars(kan)) == set(vars(plain))
    assert flags(kan) == before and list(kan.state_dict()) == list(plain.state_dict())
    assert not any("lotra" in type(module).__module__ for module in kan.modules())


@with_formulas
def test_a_life_after_merging():
    model, _ = adapted(random=False)
    model.fit(dataset(), steps=3, update_grid=False)
    x = dataset()["test_input"]
    y = model(x)
    kan = model.merge_and_unload()
    assert relative(kan(x), y) < 1e-6
    result = kan.fit(dataset(), steps=3)
    assert result["train_loss"][-1] < result["train_loss"][0]
    kan.saveckpt("checkpoint")
    for copied in (KAN.loadckpt("checkpoint"), kan.copy()):
        assert torch.equal(copied(x), kan(x))
    kan.plot()
    assert len(list(Path("figures").iterdir())) == 9
    kan = kan.prune()
    seen(kan)
    kan = kan.refine(6)
    assert kan.act_fun[0].coef.shape[-1] == 9 and type(kan) is KAN
    assert kan(x).isfinite().all()
    kan.auto_symbolic(lib=["x", "x^2"], verbose=0)
    assert formula_values(kan) == pytest.approx(kan(x)[:5, 0].tolist(), rel=1e-2, abs=1e-2)


def test_adapted_again_after_unloading():
    model, kan = adapted()
    kan = model.unload()
    again = adapt(kan, r=2)
    seen(kan)
    refused(kan, again.copy)
    assert type(again.merge_and_unload().copy()) is KAN


def test_merged_but_not_unloaded():
    model, kan, twin = adapted_and_merged()
    model.merge_adapter()
    x = dataset()["train_input"]
    assert relative(model(x), twin(x)) < 1e-6
    # the network's state dict still has other names
    refused(kan, kan.copy)
    refused(kan, kan.fit, dataset(), "LBFGS", 2)
    # a layer's grid may move now, as the adapter cannot be taken out of it any more
    for each in (kan, twin):
        each.act_fun[0].update_grid_from_samples(x)
    assert relative(model(x), twin(x)) < 1e-4
    with pytest.raises(RuntimeError, match="grid"):
        model.unmerge_adapter()


def test_unmerging_gives_the_adapter_back():
    model, kan = adapted()
    x = dataset()["test_input"]
    y, before = model(x), base_state(kan)
    model.merge_adapter()
    model.unmerge_adapter()
    after = base_state(kan)
    assert all(torch.allclose(after[name], value, atol=1e-6) for name, value in before.items())
    assert relative(model(x), y) < 1e-5


##########
# Copies #
##########


def test_a_deep_copy_of_a_fresh_network_is_its_own():
    model, kan = adapted()
    copied = copy.deepcopy(model)
    inner = copied.get_base_model()
    x = dataset()["test_input"]
    y = model(x)
    assert torch.equal(copied(x), y)
    with torch.no_grad():
        for layer in lotra_layers(copied).values():
            layer.lotra_core["default"] *= -1
    assert relative(copied(x), y) > 1e-3 and torch.equal(model(x), y)
    inner.saveckpt("of-copy")
    kan.saveckpt("of-original")
    assert relative(KAN.loadckpt("of-copy")(x), copied(x)) < 1e-6
    assert relative(KAN.loadckpt("of-original")(x), y) < 1e-6
    refused(inner, copied.refine, 5)
    # unloading the copy frees the copy alone
    copied.unload()
    assert type(inner.copy()) is KAN
    refused(kan, kan.copy)
