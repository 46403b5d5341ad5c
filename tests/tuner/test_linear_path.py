# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""`LinearPath`: a network plus a linear function, whose paths belong to adapters."""

import copy
import warnings

import pytest
import torch
from helpers import X, adapt, add_adapter, load, net, row_by_row
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.testing import assert_close

from peft_lotra import LinearPath, LoTRAConfig, extract_lotra, hotswap_adapter
from peft_lotra.kan import KAN, jet
from peft_lotra.least_squares import LevenbergMarquardt


def base() -> LinearPath:
    torch.manual_seed(3)
    return LinearPath(KAN([3, 6, 2]))


def draw(model: PeftModel, adapter: str = "default") -> None:
    """Give the path of an adapter random numbers."""
    for parameter in model.get_base_model().path_of(adapter).parameters():
        parameter.data.normal_()


def adapted(**config) -> PeftModel:
    """An adapter whose path and components change the function."""
    model = adapt(base(), **config)
    draw(model)
    return model


@pytest.fixture
def two() -> tuple[PeftModel, dict[str, nn.Module]]:
    """A model with the adapters `default` and `other`, and models that have one of them alone."""
    model = adapted()
    add_adapter(model, "other")
    draw(model, "other")
    alone = {"__base__": base()}
    for name in ("default", "other"):
        alone[name] = copy.deepcopy(model)
        alone[name].set_adapter(name)
    return model, alone


def test_a_new_path_changes_no_output():
    model = base()

    assert torch.equal(model(X), model.network(X))
    assert torch.equal(adapt(model, random=False)(X), model.network(X))


def test_the_output_is_the_scaled_network_plus_a_linear_function():
    model = adapted().get_base_model()
    path = model.path

    expected = path.scale * model.network(X) + X @ path.weight.T + path.bias

    assert_close(model(X.view(2, 4, 3)), expected.view(2, 4, 2))


def test_a_path_is_saved_in_float32_and_loaded_with_its_adapter(tmp_path):
    model = adapted(storage="float16")
    model.save_pretrained(tmp_path)

    loaded = load(tmp_path, base())

    file = load_file(tmp_path / "adapter_model.safetensors")
    for name, value in model.get_base_model().path.state_dict().items():
        assert torch.equal(file[f"base_model.model.linear_path.{name}"], value)
    assert_close(loaded(X), model(X), rtol=1e-2, atol=1e-2)
    with pytest.raises(ValueError, match=r"LinearPath\(network\)"):
        load(tmp_path, base().network)


def test_an_adapter_of_the_bare_network_has_the_path_of_the_base(tmp_path):
    bare = adapt(base().network)
    bare.save_pretrained(tmp_path)
    model = adapted()

    with pytest.warns(UserWarning, match="other names"):
        model.load_adapter(tmp_path, "bare")

    mixed = model.eval()(X, adapter_names=["bare"] * len(X))
    assert_close(mixed, bare(X))


def test_rows_of_a_batch_have_the_paths_of_their_adapters(two):
    model, alone = two
    names = ["other", "default", "__base__", "default", "other", "other", "__base__", "default"]

    assert_close(model(X, adapter_names=names), row_by_row(alone, names, X))
    pairs = X.view(4, 2, 3)
    assert_close(model(pairs, adapter_names=names[:4]), row_by_row(alone, names[:4], pairs))


def test_a_sum_adds_the_weighted_changes_of_the_paths(two):
    model, _ = two
    network = model.get_base_model()

    model.add_weighted_adapter(["default", "other"], [0.7, -0.3], "sum")

    total = network.path_of("sum").state_dict()
    first, second = (network.path_of(name).state_dict() for name in ("default", "other"))
    assert_close(total["weight"], 0.7 * first["weight"] - 0.3 * second["weight"])
    assert_close(total["bias"], 0.7 * first["bias"] - 0.3 * second["bias"])
    assert_close(total["scale"], 1 + 0.7 * (first["scale"] - 1) - 0.3 * (second["scale"] - 1))


def test_hotswap_exchanges_the_path(two, tmp_path):
    model, alone = two
    model.save_pretrained(tmp_path, selected_adapters=["other"])
    swapped = adapt(base(), r=2)

    hotswap_adapter(swapped, tmp_path / "other")

    assert_close(swapped(X), alone["other"](X))


def test_merging_gives_a_path_on_the_merged_network_and_unloading_the_former_one():
    model = adapted()
    expected = model(X)

    merged = copy.deepcopy(model).merge_and_unload()
    unloaded = model.unload()

    assert (type(merged), type(merged.network), type(merged.linear_path)) == (LinearPath, KAN, type(base().path))
    assert_close(merged(X), expected)
    assert torch.equal(unloaded(X), base()(X))


def test_an_extracted_adapter_has_the_path():
    tuned = base()
    for parameter in tuned.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)

    extracted = extract_lotra(base(), tuned, r="full")

    assert extracted.peft_config["default"].modules_to_save == ["linear_path"]
    assert_close(extracted.eval()(X), tuned(X), rtol=1e-4, atol=1e-4)


def test_the_slope_is_that_of_the_network_plus_the_weight():
    model = adapted().double()
    x = X.double()

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of a class without a closed form
        u, du, d2u = jet(model, x)

    jacobian = torch.func.vmap(torch.func.jacrev(lambda row: model(row[None])[0]))(x)
    _, _, of_network = jet(model.get_base_model().network, x)
    assert_close(u, model(x))
    assert_close(du.permute(1, 2, 0), jacobian)
    assert_close(d2u, model.get_base_model().path.scale * of_network)


@pytest.mark.parametrize("is_trained", [True, False])
def test_levenberg_marquardt_fits_with_the_path_trained_or_fixed(is_trained):
    model = adapted()
    path = model.get_base_model().path.requires_grad_(is_trained)
    before = copy.deepcopy(path.state_dict())
    targets = X @ torch.ones(3, 2)

    def residuals(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return model(x) - y

    first, *_, last = LevenbergMarquardt(model).fit([(residuals, (X, targets))], steps=20, progress=False)

    assert last.loss < 1e-2 * first.loss or last.loss < 1e-6
    assert torch.equal(path.weight, before["weight"]) is not is_trained


def test_graphs_of_export_onnx_and_the_compiler_compute_the_same(tmp_path):
    model = adapted()
    shapes = ({0: torch.export.Dim("rows", min=2, max=100)},)

    exported = torch.export.export(model.get_base_model(), (X,), dynamic_shapes=shapes, strict=False)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")

    assert_close(exported.module()(X[:5]), model(X[:5]))
    assert_close(compiled(X), model(X))
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    path = str(tmp_path / "model.onnx")
    torch.onnx.export(model.get_base_model(), (X,), path, dynamo=True, input_names=["x"], verbose=False)
    (output,) = onnxruntime.InferenceSession(path).run(None, {"x": X.numpy()})
    assert_close(torch.from_numpy(output), model(X).detach())


def test_a_config_of_the_user_stays_as_it_was():
    config = LoTRAConfig(modules_to_save=["head"])

    model = get_peft_model(LinearPath(net()), config)

    assert model.peft_config["default"].modules_to_save == ["head", "linear_path"]
    assert config.modules_to_save == ["head"]


@pytest.mark.parametrize(
    ("make", "x", "match"),
    [
        (lambda: LinearPath(nn.Tanh()), X, "no layer whose inputs are known"),
        (lambda: LinearPath(nn.Sequential(nn.Linear(3, 2), nn.Flatten(0))), X, "no tensor"),
        (lambda: LinearPath(nn.Conv2d(1, 2, 3), 25, 2), torch.ones(1, 1, 5, 5), r"Unflatten\(-1, \(1, 5, 5\)\)"),
        (lambda: LinearPath(nn.LSTM(3, 2), 3, 2), X, "tuple"),
    ],
)
def test_networks_of_other_shapes_are_refused(make, x, match):
    with pytest.raises(ValueError, match=match):
        make()(x)
