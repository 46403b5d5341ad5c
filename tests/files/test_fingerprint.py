# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""An adapter knows the base it was made for."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
from helpers import adapt, assert_same, base, inputs, lotra_layers, nested, snapshot
from peft import PeftConfig, PeftModel, get_peft_model
from stand_ins import FAMILIES

from peft_lotra import LoTRAConfig, slim
from peft_lotra.files.fingerprint import digest_of, hash_all_dtypes, hash_values, is_same, sketch
from peft_lotra.kan import KAN
from peft_lotra.tuner.targets import record_base


every_family = pytest.mark.parametrize("family", FAMILIES)
HALVES = (torch.bfloat16, torch.float16)


def saved(model, folder, **config):
    """A folder with an adapter for the model, which is left as it was."""
    adapted = adapt(model, **config)
    adapted.save_pretrained(folder)
    adapted.unload()
    return folder


def load(model, folder, **kwargs):
    """Loads with every warning an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        return PeftModel.from_pretrained(model, folder, **kwargs)


def record(folder):
    return json.loads((folder / "adapter_config.json").read_text())


#################
# What is saved #
#################


def test_the_record(tmp_path):
    model = KAN([3, 4, 2])
    config = record(saved(model, tmp_path))
    assert set(config["base_layers"]) == {"layers.0", "layers.1"}
    layer = config["base_layers"]["layers.1"]
    assert (layer["family"], layer["shape"], layer["has_residual"]) == ("peft-lotra", [2, 4, 8], True)
    for what in ("grid", "parameters"):
        assert list(layer[what]) == ["bfloat16", "float16", "float32", "sketch"]
        assert len(set(layer[what].values())) == 4
        hashes = [value.split(":")[0] for value in layer[what].values()]
        assert all(len(value) == 32 and int(value, 16) >= 0 for value in hashes)
    assert config["base_digest"] == digest_of(config["base_layers"]) and len(config["base_digest"]) == 32
    assert "check_base" not in config and set(config["integrity"]) == {"config", "weights"}


def test_saving_the_same_again_gives_the_same_files(tmp_path):
    model = adapt(nested())
    for folder in ("a", "b"):
        copy.deepcopy(model).save_pretrained(tmp_path / folder)
    assert record(tmp_path / "a") == record(tmp_path / "b")
    loaded = load(model.unload(), tmp_path / "a")
    loaded.save_pretrained(tmp_path / "c")
    again = record(tmp_path / "c")
    assert again["base_layers"] == record(tmp_path / "a")["base_layers"] and again["integrity"]["weights"]


def test_a_config_that_is_read_and_written_keeps_the_record(tmp_path):
    saved(nested(), tmp_path / "a")
    config = LoTRAConfig.from_pretrained(tmp_path / "a")
    assert config.base_layers["body.0"] == {"family": "peft-lotra", "shape": [5, 3, 8], "has_residual": True}
    config.save_pretrained(tmp_path / "b")
    assert record(tmp_path / "b")["base_layers"] == record(tmp_path / "a")["base_layers"]


def test_a_base_on_the_meta_device_has_no_hashes(tmp_path):
    with torch.device("meta"):
        model = KAN([3, 4, 2])
    adapt(model).peft_config["default"].save_pretrained(tmp_path)
    assert set(record(tmp_path)["base_layers"]["layers.0"]) == {"family", "shape", "has_residual"}


##########
# Hashes #
##########


def test_one_bit_changes_a_hash():
    values = {"a": torch.randn(5, 3), "b": torch.arange(4), "c": 0.5}
    first = hash_values(values)
    assert first == hash_values({key: values[key] for key in ("c", "b", "a")})
    assert first == hash_values({**values, "a": values["a"].T.contiguous().T})
    changed = copy.deepcopy(values)
    changed["a"].view(torch.int32)[4, 2] ^= 1
    assert len({first, hash_values(changed), hash_values({**values, "c": 0.25}), hash_values({"a": values["a"]})}) == 4
    assert hash_values({"a": torch.zeros(2)}) != hash_values({"a": -torch.zeros(2)})
    assert hash_values({"a": torch.zeros(2, 3)}) != hash_values({"a": torch.zeros(3, 2)})
    assert hash_values({"a": torch.tensor(1.0)}) and hash_values({"a": torch.zeros(0, 3)})


def test_hashes_do_not_depend_on_how_the_tensor_is_cut(monkeypatch):
    values = {"a": torch.randn(5000, dtype=torch.float64), "n": torch.arange(3000)}
    whole = hash_all_dtypes(values)
    monkeypatch.setattr("peft_lotra.files.fingerprint._CHUNK", 2048)
    cut = hash_all_dtypes(values)
    assert len(whole) == 5 and {**cut, "sketch": ""} == {**whole, "sketch": ""}
    assert is_same({"float64": "other", "sketch": whole["sketch"]}, values) is True


@pytest.mark.parametrize("before", [torch.float64, torch.float32, *HALVES])
@pytest.mark.parametrize("after", [torch.float64, torch.float32, *HALVES])
def test_casts_of_values(before, after):
    values = {"a": torch.randn(1000).to(before), "n": torch.arange(3)}
    cast = {"a": values["a"].to(after), "n": values["n"]}
    other = {"a": values["a"].to(after) * 1.01, "n": values["n"]}
    comparable = {before, after} != set(HALVES)
    assert is_same(hash_all_dtypes(values), cast) is (True if comparable else None)
    assert is_same(hash_all_dtypes(values), other) is (False if comparable else None)
    for half in HALVES:  # down and up again
        rounded = {"a": values["a"].to(half).to(before), "n": values["n"]}
        if {before, half} != set(HALVES):
            assert is_same(hash_all_dtypes(values), rounded) is True


def test_a_small_change_is_no_cast():
    values = {"a": torch.randn(1000)}
    nudged = {"a": torch.nextafter(values["a"], torch.tensor(torch.inf))}
    recorded = hash_all_dtypes(values)
    assert is_same(recorded, nudged) is True  # the last bits
    del recorded["sketch"]
    assert is_same(recorded, nudged) is False


###########
# Loading #
###########


@every_family
def test_the_same_base_raises_no_alarm(family, tmp_path):
    model = base(family)
    saved(model, tmp_path)
    x = inputs()
    expected = load(copy.deepcopy(model), tmp_path)(x)
    for dtype in (torch.float64, *HALVES):
        load(copy.deepcopy(model).to(dtype), tmp_path)
    load(copy.deepcopy(model).to(torch.bfloat16).float(), tmp_path)
    adapted = load(model, tmp_path)
    adapted.merge_adapter()
    adapted.save_pretrained(tmp_path / "merged")
    adapted.load_adapter(tmp_path, "second")  # while the first is merged
    fresh = copy.deepcopy(adapted.unload() if adapted.unmerge_adapter() is None else None)
    assert torch.equal(load(fresh, tmp_path / "merged")(x), expected)


@every_family
def test_another_base_is_noticed(family, tmp_path):
    model = base(family)
    saved(model, tmp_path)
    (layer,) = lotra_layers(adapt(copy.deepcopy(model))).values()
    name = next(iter(layer.lotra_tensor.parameters))
    with torch.no_grad():
        model.kan.get_parameter(name).view(-1)[3] += 1e-4
    with pytest.warns(UserWarning, match="coefficients of the layers kan are not those"):
        PeftModel.from_pretrained(copy.deepcopy(model), tmp_path)
    before = snapshot(model)
    with pytest.raises(ValueError, match="coefficients of the layers kan"):
        PeftModel.from_pretrained(model, tmp_path, check_base="error")
    assert_same(model, before)
    load(copy.deepcopy(model), tmp_path, check_base="ignore")


@pytest.mark.parametrize("family", [name for name in FAMILIES if not name.startswith(("cheby", "fourier", "physics"))])
def test_a_grid_that_moved_is_an_error(family, tmp_path):
    model = base(family)
    saved(model, tmp_path)
    (layer,) = lotra_layers(adapt(copy.deepcopy(model))).values()
    name = next(name for name, value in layer.read_grid().items() if isinstance(value, torch.Tensor))
    owner, _, leaf = name.rpartition(".")
    getattr(model.kan.get_submodule(owner), leaf).data.mul_(1.5)
    adapted = adapt(copy.deepcopy(model), adapter_name="existing")
    for live in (model, adapted):
        before = snapshot(live)
        with pytest.raises(ValueError, match="grids of the layers kan are not those"):
            if live is adapted:
                live.load_adapter(tmp_path, "other")
            else:
                PeftModel.from_pretrained(live, tmp_path)
        assert_same(live, before)
    with pytest.warns(UserWarning, match="grids of the layers kan"):
        PeftModel.from_pretrained(copy.deepcopy(model), tmp_path, check_base="warn")
    load(copy.deepcopy(model), tmp_path, check_base="ignore")
    # where `load_adapter` takes no such argument
    adapted.add_adapter("other", LoTRAConfig.from_pretrained(tmp_path, check_base="ignore"))
    adapted.load_adapter(tmp_path, "other")


def test_another_basis_of_the_same_shape_is_another_grid(tmp_path):
    saved(KAN([3, 4, 2], grid_size=5, spline_order=3), tmp_path)
    with pytest.raises(ValueError, match="grids of the layers layers.0, layers.1"):
        PeftModel.from_pretrained(KAN([3, 4, 2], grid_size=6, spline_order=2), tmp_path)


def test_only_the_layers_that_differ_are_named(tmp_path):
    model = nested()
    saved(model, tmp_path)
    with torch.no_grad():
        model["tail"].layers[1].base_weight += 1
    with pytest.warns(UserWarning, match="of the layers tail.layers.1 are"):
        PeftModel.from_pretrained(model, tmp_path)


def test_scales_and_masks_count(tmp_path):
    model = base("efficient-kan")
    saved(model, tmp_path)
    with torch.no_grad():
        model.kan.spline_scaler *= 2
    with pytest.warns(UserWarning, match="coefficients of the layers kan"):
        PeftModel.from_pretrained(model, tmp_path)


@pytest.mark.parametrize("family", ["own", "efficient-kan"])
def test_slim_bases(family, tmp_path):
    """Their components are hashed, not the coefficients that these make."""
    model = slim(base(family), ranks=(2, 3, 4))
    saved(model, tmp_path)
    load(copy.deepcopy(model), tmp_path)
    changed, moved = copy.deepcopy(model), copy.deepcopy(model)
    with torch.no_grad():
        changed.kan.core[0, 0, 0] += 1
    with pytest.warns(UserWarning, match="coefficients of the layers kan"):
        PeftModel.from_pretrained(changed, tmp_path)
    (moved.kan.grid_bounds if family == "own" else moved.kan.layer.grid).mul_(1.5)
    with pytest.raises(ValueError, match="grids of the layers kan"):
        PeftModel.from_pretrained(moved, tmp_path)


def test_without_keeping_the_base_a_merged_one_is_not_recorded(tmp_path):
    model = base("own")
    fresh = copy.deepcopy(model)
    adapted = adapt(model)
    adapted.merge_adapter(keep_base=False)
    adapted.save_pretrained(tmp_path)
    assert set(record(tmp_path)["base_layers"]["kan"]) == {"family", "shape", "has_residual", "grid"}
    load(fresh, tmp_path)


def test_files_without_the_record_still_load(tmp_path):
    model = nested()
    adapted = adapt(copy.deepcopy(model))
    adapted.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    new = ("base_digest", "integrity", "check_base")
    x = inputs()
    old = {key: value for key, value in json.loads(path.read_text()).items() if key not in new}
    for layer in old["base_layers"].values():
        del layer["grid"], layer["parameters"]
    for config in (old, {key: value for key, value in old.items() if key != "base_layers"}):
        path.write_text(json.dumps(config))
        assert torch.equal(load(copy.deepcopy(model), tmp_path)(x), adapted(x))


@pytest.mark.parametrize("value", ["no", 3, True])
def test_bad_choices(tmp_path, value):
    with pytest.raises(ValueError, match="`check_base` must be"):
        LoTRAConfig(check_base=value)
    saved(KAN([3, 4, 2]), tmp_path)
    with pytest.raises(ValueError, match="`check_base` must be"):
        PeftModel.from_pretrained(KAN([3, 4, 2]), tmp_path, check_base=value)


def test_the_choice_is_not_the_files(tmp_path):
    saved(KAN([3, 4, 2]), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "check_base": "ignore"}))
    with pytest.warns(UserWarning, match="coefficients of the layers"):
        PeftModel.from_pretrained(KAN([3, 4, 2]), tmp_path)


####################
# Config integrity #
####################


@pytest.mark.parametrize(
    "change",
    [{"alpha": 2.0}, {"r": 3}, {"rank_pattern": {"layers.0": 1}}, {"target_modules": ["layers.0"]}, {"new": 1}],
)
def test_a_config_that_was_changed(tmp_path, change):
    folder = saved(KAN([3, 4, 2]), tmp_path, r=2)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, **change}))
    if change == {"new": 1}:  # a field that is not known does not count; PEFT warns of it
        with pytest.warns(UserWarning, match="Unexpected keyword"):
            PeftConfig.from_pretrained(folder)
        return
    for cls in (PeftConfig, LoTRAConfig):
        with pytest.raises(ValueError, match="was changed after it was saved"):
            cls.from_pretrained(folder)


def test_what_may_be_edited(tmp_path):
    model = KAN([3, 4, 2])
    folder = saved(model, tmp_path)
    path = folder / "adapter_config.json"
    edited = {"base_model_name_or_path": "user/kan", "revision": "main", "inference_mode": False, "peft_version": "9"}
    path.write_text(json.dumps({**json.loads(path.read_text()), **edited}))
    load(model, folder)


def test_a_record_that_was_changed(tmp_path):
    folder = saved(KAN([3, 4, 2]), tmp_path)
    path = folder / "adapter_config.json"
    config = {**json.loads(path.read_text()), "integrity": None}
    config["base_layers"]["layers.0"]["grid"]["float32"] = "0" * 32
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="`base_digest` does not fit"):
        LoTRAConfig.from_pretrained(folder)


@pytest.mark.parametrize(
    "field, value",
    [
        ("alpha", float("nan")),
        ("alpha", float("inf")),
        ("alpha", "1"),
        ("alpha", None),
        ("alpha_pattern", {"a": "1"}),
        ("rank_pattern", [1]),
        ("rank_dropout", "0"),
        ("module_dropout", None),
        ("target_modules", 5),
        ("target_modules", [5]),
        ("exclude_modules", {"a": 1}),
        ("layers_to_transform", "1"),
        ("layers_to_transform", [True]),
        ("modules_to_save", [None]),
        ("adapt_residual", 1),
        ("inference_mode", "yes"),
        ("base_layers", {"a": 1}),
        ("base_layers", {"a": {"family": "own", "shape": [1, 2], "has_residual": True}}),
        ("base_layers", {"a": {"family": "own", "shape": [1, 2, 3], "has_residual": True, "grid": {"float32": 1}}}),
        ("base_digest", 5),
        ("integrity", "abc"),
    ],
)
def test_values_of_the_wrong_kind(field, value):
    with pytest.raises(ValueError, match=f"`{field}` must be"):
        LoTRAConfig(**{field: value})


def perturbed(values, size):
    generator = torch.Generator().manual_seed(5)
    return {
        name: value * (1 + size * torch.randn(value.shape, generator=generator)).to(value)
        for name, value in values.items()
    }


@pytest.mark.parametrize("size, expected", [(1e-8, True), (1e-7, True), (1e-4, False), (1e-2, False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_last_bits_do_not_count(size, expected, dtype):
    generator = torch.Generator().manual_seed(0)
    values = {
        "a": torch.randn(70, 90, generator=generator, dtype=dtype),
        "b": torch.randn(5, generator=generator, dtype=dtype),
    }
    recorded = hash_all_dtypes(values)
    for name in values:
        changed = {**values, name: perturbed(values, size)[name]} if name == "a" else perturbed(values, size)
        assert bool(is_same(recorded, changed)) is expected
    del recorded["sketch"]  # as in older files
    assert is_same(recorded, perturbed(values, 1e-6)) is False


def test_a_sketch_is_of_names_shapes_and_numbers_too():
    values = {"a": torch.linspace(-1, 1, 60), "size": 5, "mask": torch.ones(3, dtype=torch.int64)}
    first = sketch(values)
    for change in (
        {"size": 6},
        {"a": torch.linspace(-1, 1, 60).view(6, 10)},
        {"mask": torch.zeros(3, dtype=torch.int64)},
    ):
        assert sketch({**values, **change}).split(":")[0] != first.split(":")[0]
    assert is_same({"float32": "other", "sketch": "damaged"}, values) is False
    assert is_same({"float32": "other", "sketch": first.replace("e", "x")}, values) is False
    assert is_same({"float32": "other", "sketch": first}, values) is True


def test_a_permutation_and_a_sign_show():
    values = {"a": torch.randn(9000, generator=torch.Generator().manual_seed(0))}
    recorded = hash_all_dtypes(values)
    assert is_same(recorded, {"a": values["a"].flip(0)}) is False
    assert is_same(recorded, {"a": -values["a"]}) is False
    assert is_same(recorded, {"a": values["a"].roll(1)}) is False
    assert is_same(recorded, {"a": values["a"].roll(4096)}) is False


def test_a_base_that_is_computed_anew(tmp_path):
    """As `lstsq` gives it on another machine: no warning, and none of a base that was trained on is missed."""
    model = nested()
    adapt(model).save_pretrained(tmp_path)
    for size, is_warned in ((1e-7, False), (1e-3, True)):
        other = nested()
        other.load_state_dict(perturbed({n: p for n, p in nested_state(model).items()}, size), strict=False)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            PeftModel.from_pretrained(other, tmp_path, **({} if is_warned else {"check_base": "error"}))
        assert bool([w for w in caught if "not those that the adapter was saved with" in str(w.message)]) == is_warned


def nested_state(model):
    """The parameters of the base, by their names without adapters."""
    names = ((name.replace(".base_layer", ""), value) for name, value in model.named_parameters())
    return {name: value.detach() for name, value in names if "lotra_" not in name and not name.endswith("grid")}


def test_symbolic_functions_of_pykan(tmp_path):
    kan = pytest.importorskip("kan")

    def make(function=None):
        model = kan.KAN(width=[2, 3, 1], grid=3, k=3, seed=0, auto_save=False)
        if function:
            model.fix_symbolic(0, 0, 1, function, fit_params_bool=False, verbose=False, log_history=False)
        return model

    plain, sine, other = (record_base(make(function), {"act_fun.0": {}}) for function in (None, "sin", "exp"))
    assert plain["act_fun.0"]["parameters"] != sine["act_fun.0"]["parameters"] != other["act_fun.0"]["parameters"]
    get_peft_model(make("sin"), LoTRAConfig(r=2)).save_pretrained(tmp_path)
    PeftModel.from_pretrained(make("sin"), tmp_path, check_base="error")
    for function in ("exp", None):
        with pytest.raises(ValueError, match=r"coefficients of the layers act_fun\.0 are not those"):
            PeftModel.from_pretrained(make(function), tmp_path, check_base="error")
