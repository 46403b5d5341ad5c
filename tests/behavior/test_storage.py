# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""`LoTRAConfig(storage=)`: files in half precision, which load as adapters of the usual dtype."""

import pytest
import torch
from helpers import X, adapt, assert_equal, assert_near, components, config_of, load, lotra_layers, net, refused, train
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file

from peft_lotra import AdapterBank, ParametricAdapter, save_adapter


HALF = {"float16": torch.float16, "bfloat16": torch.bfloat16}
# of an update of four components, each rounded to 11 or 8 binary digits
TOLERANCE = {"float16": 2e-3, "bfloat16": 2e-2}
half = pytest.mark.parametrize("storage", HALF)


def weights_of(folder):
    return load_file(folder / "adapter_model.safetensors")


def files_of(folder):
    # PEFT writes README.md before it asks for the tensors
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".md"}


def rounded(model, storage):
    """The components as the file has them, in float32."""
    return {name: part.detach().to(HALF[storage]).float() for name, part in components(model)}


def set_cores(model, factor):
    for layer in lotra_layers(model).values():
        layer.lotra_core["default"].data *= factor


@half
@pytest.mark.parametrize("save", [lambda model, folder: model.save_pretrained(folder), save_adapter])
def test_a_file_holds_components_in_half_precision_and_its_config_says_so(tmp_path, storage, save):
    model = adapt(storage=storage, modules_to_save=["head"])

    save(model, tmp_path)

    dtypes = {name: tensor.dtype for name, tensor in weights_of(tmp_path).items()}
    assert {dtype for name, dtype in dtypes.items() if ".lotra_" in name} == {HALF[storage]}
    assert {dtype for name, dtype in dtypes.items() if "head" in name} == {torch.float32}
    assert config_of(tmp_path)["storage"] == storage
    assert {part.dtype for _, part in components(model)} == {torch.float32}
    assert storage in (tmp_path / "README.md").read_text()


def test_a_state_dict_in_memory_keeps_its_digits():
    tensors = get_peft_model_state_dict(adapt(storage="float16"))

    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


@half
@pytest.mark.filterwarnings("error")  # another SHA-256 would be a warning
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_loaded_adapter_is_in_float32(tmp_path, storage, low_cpu_mem_usage):
    model = adapt(storage=storage, alpha=0.3)
    model.save_pretrained(tmp_path)

    loaded = load(tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    loaded.load_adapter(tmp_path, "second", low_cpu_mem_usage=low_cpu_mem_usage)

    expected = rounded(model, storage)
    expected |= {name.replace("default", "second"): part for name, part in expected.items()}
    assert_equal(dict(components(loaded)), expected)
    assert_near(loaded(X), model(X), TOLERANCE[storage])


@pytest.mark.parametrize(
    ("base", "restored"),
    [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32)],
)
def test_a_loaded_adapter_has_the_dtype_of_a_new_one_beside_each_base(tmp_path, base, restored):
    adapt(net().to(base), storage="float16").save_pretrained(tmp_path)

    for low in (False, True):
        loaded = PeftModel.from_pretrained(net().to(base), tmp_path, low_cpu_mem_usage=low)
        dtypes = {part.dtype for _, part in components(loaded)}
        assert dtypes == {restored}


@pytest.mark.parametrize("alpha", [0.3, 1e-5, 1e5])
def test_banks_scale_the_update_of_a_file_in_float32(tmp_path, alpha):
    adapt(storage="float16", alpha=alpha).save_pretrained(tmp_path / "a")
    loaded = load(tmp_path / "a")
    bank = AdapterBank.from_folders(net(), [tmp_path / "a"])
    bank.add("b", tmp_path / "a")

    y = bank.attach()(X, adapter_names=["a", "b"] * (len(X) // 2))

    assert "float32" in repr(bank)
    assert_near(y, loaded(X))


def test_training_goes_on_in_float32_and_the_next_file_is_of_the_same_dtype(tmp_path):
    adapt(storage="float16").save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(net(), tmp_path, is_trainable=True)
    # steps that float16 would not see
    train(model, X, lr=1e-5)
    trained = {name: part.detach().clone() for name, part in components(model)}

    model.save_pretrained(tmp_path)

    assert any(not torch.equal(part, part.half().float()) for part in trained.values())
    assert {tensor.dtype for tensor in weights_of(tmp_path).values()} == {torch.float16}
    again = load(tmp_path)
    assert_equal(dict(components(again)), rounded(model, "float16"))


@pytest.mark.parametrize("save", [lambda model, folder: model.save_pretrained(folder), save_adapter])
def test_values_above_the_largest_float16_are_refused_before_a_file_changes(tmp_path, save):
    model = adapt(storage="float16")
    save(model, tmp_path)
    before = files_of(tmp_path)
    set_cores(model, 1e6)

    with refused(r"not saved in float16.*kan\.layers\.0\.lotra_core"):
        save(model, tmp_path)

    assert files_of(tmp_path) == before


@pytest.mark.parametrize("factor", [1e-6, 1e-9, 1e-30])
def test_a_component_too_small_for_float16_is_a_warning(tmp_path, factor):
    model = adapt(storage="float16")
    set_cores(model, factor)

    with pytest.warns(UserWarning, match=r"lotra_core.* loses more than 1 % in float16"):
        model.save_pretrained(tmp_path)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("storage", "factor"), [("bfloat16", 1e-30), ("bfloat16", 1e30), ("float16", 0.0)])
def test_bfloat16_has_the_range_of_float32_and_zeros_are_exact(tmp_path, storage, factor):
    model = adapt(storage=storage)
    set_cores(model, factor)

    model.save_pretrained(tmp_path)

    loaded = load(tmp_path)
    assert_equal(dict(components(loaded)), rounded(model, storage))


@half
def test_a_bank_in_half_precision_writes_files_that_say_so(tmp_path, storage):
    bank = AdapterBank(net(), dtype=HALF[storage])
    model = adapt(alpha=0.3)
    bank.add("a", model)
    bank.save(tmp_path / "bank")
    bank.export("a", tmp_path / "a")

    exported = load(tmp_path / "a")
    loaded = AdapterBank.load(net(), tmp_path / "bank")

    assert config_of(tmp_path / "a")["storage"] == storage
    assert {tensor.dtype for tensor in weights_of(tmp_path / "a").values()} == {HALF[storage]}
    assert str(HALF[storage]) in repr(loaded)
    for y in (exported(X), loaded.attach()(X, adapter_names=["a"] * len(X))):
        assert_near(y, model(X), TOLERANCE[storage])


def test_a_family_keeps_its_members(tmp_path):
    family = ParametricAdapter(net().kan, ranks=2, storage="float16")
    family.fit([1.0, 2.0], train=lambda model, c: train(model, X, c), progress=False)
    family.save_pretrained(tmp_path)

    loaded = ParametricAdapter.from_pretrained(net().kan, tmp_path)

    for c in (1.0, 2.0):
        assert_near(loaded.predict(c)(X), family.predict(c)(X), 2e-3)
