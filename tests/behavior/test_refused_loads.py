# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""An adapter is loaded into the base that it was made for, and from files that are whole."""

import copy
import warnings

import pytest
import torch
from helpers import KINDS, X, adapt, assert_equal, edit_config, load, lotra_layers, net, refused, state
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from peft_lotra import AdapterBank, LoTRAConfig, LoTRALayer, hotswap_adapter
from peft_lotra.kan import KAN


@pytest.fixture
def folder(tmp_path):
    adapt().save_pretrained(tmp_path)
    return tmp_path


def changed(name, factor):
    """The base with other numbers in its second layer."""
    base = net()
    getattr(base.kan.layers[1], name).data.mul_(factor)
    return base


def refuses(base, folder, word, **kwargs):
    with refused(word, base):
        PeftModel.from_pretrained(base, folder, **kwargs)


@pytest.mark.parametrize("base", [net(hidden=5), net(grid_size=6), KAN([3, 4])])
def test_a_base_of_another_architecture_is_refused(folder, base):
    refuses(base, folder, "layers")
    adapt(KINDS["fast-kan"]()).save_pretrained(folder / "fast")
    refuses(KINDS["faster-kan"](), folder / "fast", "kan")
    model = adapt()
    y = model(X)
    adapt(net(hidden=5)).save_pretrained(folder / "wide")

    with refused("kan.layers.0", model):
        model.load_adapter(folder / "wide", "wide")
    assert_equal(model(X), y)
    assert list(model.peft_config) == ["default"]


RELOADS = {
    "another alpha": (lambda: adapt(alpha=2.0), "alphas {'kan.layers.0': 2.0.*keep.*: 1.0"),
    "another alpha of a layer": (lambda: adapt(alpha_pattern={"layers.1": 0.5}), "'kan.layers.1': 0.5"),
    "fewer layers": (lambda: adapt(target_modules=["layers.1"]), "alphas {'kan.layers.1': 1.0}"),
    "another grid": (lambda: adapt(moved_grid()), "grid of kan.layers.0"),
    "LoRA": (lambda: get_peft_model(net(), LoraConfig(target_modules=["head"])), "LORA"),
}


def moved_grid():
    base = net()
    base.kan.layers[0].grid_bounds += 1
    return base


@pytest.mark.parametrize("case", RELOADS)
def test_tensors_for_another_configuration_are_not_loaded_into_an_adapter(tmp_path, case):
    make, message = RELOADS[case]
    make().save_pretrained(tmp_path)
    model = adapt()

    with refused(message, model):
        model.load_adapter(tmp_path, "default")


def test_tensors_of_the_same_configuration_are_loaded_into_an_adapter(tmp_path):
    saved = adapt(alpha=2.0, alpha_pattern={"layers.1": 0.5})
    saved.save_pretrained(tmp_path / "first")
    renamed = torch.nn.Sequential(net().kan)
    with pytest.warns(UserWarning, match="other names"):
        model = PeftModel.from_pretrained(renamed, tmp_path / "first")
    adapt(alpha=2.0, alpha_pattern={"layers.1": 0.5}).save_pretrained(tmp_path / "second")

    with pytest.warns(UserWarning, match="other names"):
        model.load_adapter(tmp_path / "second", "default")

    other = load(tmp_path / "second")
    assert_equal(model(X), other.base_model.model.kan(X))


def test_a_renamed_parent_is_a_warning(folder):
    """Recorded layers that are absent are paired in order with those of the same kind and shape."""
    ranks = {"kan.layers.0": (1, 2, 3)}
    for number, config in enumerate(({}, {"rank_pattern": ranks}, {"r": None})):
        saved = folder / str(number)
        adapt(**config).save_pretrained(saved)
        y = load(saved).base_model.model.kan(X)
        with pytest.warns(UserWarning, match="other names"):
            model = PeftModel.from_pretrained(torch.nn.Sequential(net().kan), saved)
        assert_equal(model(X), y)
        model.save_pretrained(saved / "again")
        assert_equal(PeftModel.from_pretrained(torch.nn.Sequential(net().kan), saved / "again")(X), y)


@pytest.mark.parametrize("parent", [torch.nn.DataParallel, torch.nn.Sequential, torch.nn.ModuleList])
def test_layers_of_a_renamed_parent_keep_their_order(tmp_path, parent):
    """A file has `10.layers.0` before `2.layers.0`."""
    base = torch.nn.Sequential(*[KAN([4, 4]) for _ in range(12)])
    adapt(copy.deepcopy(base)).save_pretrained(tmp_path)
    before = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    changed = torch.nn.Module()
    changed.net = parent(base)

    with pytest.warns(UserWarning, match="other names"):
        after = PeftModel.from_pretrained(changed if parent is torch.nn.ModuleList else changed.net, tmp_path)

    pairs = list(zip(lotra_layers(before).values(), lotra_layers(after).values(), strict=True))

    assert len(pairs) == 12
    for old, new in pairs:
        assert_equal(state(new), state(old))


def test_a_compiled_base_is_the_same_base(tmp_path):
    """The names of a file are those of the base itself."""
    base = KAN([3, 4])
    adapt(torch.compile(copy.deepcopy(base))).save_pretrained(tmp_path)

    for loaded in (copy.deepcopy(base), torch.compile(copy.deepcopy(base))):
        assert loaded_silently(loaded, tmp_path, "error", 1)


def test_an_adapter_saved_while_merged_fits_its_base(tmp_path):
    model, base = adapt(), net()
    model.merge_adapter()
    model.save_pretrained(tmp_path)

    assert loaded_silently(base, tmp_path, "error")


def loaded_silently(base, folder, check_base, number=2):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return len(lotra_layers(PeftModel.from_pretrained(base, folder, check_base=check_base))) == number


def test_another_grid_is_refused(folder):
    refuses(changed("grid_bounds", 1.5), folder, "grid")
    refuses(changed("grid_bounds", 1.5), folder, "grid", check_base="error")

    assert loaded_silently(changed("grid_bounds", 1.5), folder, "ignore")
    assert all(loaded_silently(net(), folder, check_base) for check_base in (None, "error", "warn", "ignore"))


def test_other_coefficients_are_a_warning_or_an_error(folder):
    with pytest.warns(UserWarning, match="kan.layers.1"):
        assert len(lotra_layers(PeftModel.from_pretrained(changed("spline_weight", 1.1), folder))) == 2

    refuses(changed("spline_weight", 1.1), folder, "kan.layers.1", check_base="error")

    assert loaded_silently(changed("spline_weight", 1.1), folder, "ignore")


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float64, 3e-6), (torch.bfloat16, 0.045)])
def test_the_tolerance_is_that_of_the_dtype(tmp_path, dtype, rounding):
    adapt(net().to(dtype)).save_pretrained(tmp_path)
    base = net().to(dtype)
    torch.manual_seed(0)
    for weight in base.kan.layers[1].parameters():
        weight.data += torch.randn_like(weight) * weight.detach().square().mean().sqrt() * rounding
    refuses(base, tmp_path, "kan.layers.1", check_base="error")

    assert loaded_silently(net().double().to(dtype), tmp_path, "error")


def test_a_base_of_other_sizes_can_be_ignored(folder):
    with pytest.warns(UserWarning, match="ignore_mismatched_sizes"):
        loaded = PeftModel.from_pretrained(net(hidden=5), folder, ignore_mismatched_sizes=True)
    assert len(lotra_layers(loaded)) == 2


CORE = "base_model.model.kan.layers.0.lotra_core"
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def change_tensors(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def files_refused(folder, word=""):
    """Neither a bare model nor an adapted one takes the files, and both stay what they were."""
    base, model = net(), adapt()
    y = model(X)
    with refused(word, base, error=Exception) as error:
        PeftModel.from_pretrained(base, folder)
    assert not isinstance(error.value, (KeyError, AttributeError, AssertionError))
    with refused(word, model, error=type(error.value)):
        model.load_adapter(folder, "other")
    assert_equal(model(X), y)
    assert list(model.peft_config) == ["default"]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda tensors: tensors.update(stranger=torch.ones(2)), "stranger"),
        (lambda tensors: tensors.update({"base_model.model.head.weight": torch.ones(2, 4)}), "head.weight"),
        (lambda tensors: tensors.update({CORE: torch.ones(2, 3, 5)}), "lotra_core"),
        (lambda tensors: tensors.pop(CORE), "lotra_core"),
        (lambda tensors: tensors[CORE].fill_(torch.nan), "lotra_core"),
    ],
    ids=["foreign", "of the base", "shape", "missing", "nan"],
)
def test_tensors_that_do_not_fit_are_refused(folder, change, word):
    change_tensors(folder, change)
    files_refused(folder, word)


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_a_folder_without_its_files_is_refused(folder, name):
    tensors = load_file(folder / WEIGHTS)
    (folder / name).unlink()
    files_refused(folder, "adapter|safetensors")
    torch.save(tensors, folder / "adapter_model.bin")  # a pickle does not help
    files_refused(folder, "adapter|safetensors")


@pytest.mark.parametrize("text", ['{"peft_type": "LOTRA", "r": "many"}', None])
def test_a_broken_file_is_refused(folder, text):
    (folder / CONFIG).write_text(text or (folder / CONFIG).read_text())
    if text is None:
        (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-20])
    files_refused(folder)


def test_an_error_while_layers_are_replaced_changes_nothing(tmp_path, monkeypatch):
    """The second layer does not fit into memory."""
    adapt(modules_to_save=["head"]).save_pretrained(tmp_path)
    base, model = net(), adapt()
    y = model(X)
    update_layer = LoTRALayer.update_layer

    def run_out_of_memory(layer, *args):
        if layer.lotra_name == "kan.layers.1":
            raise MemoryError("no room")
        update_layer(layer, *args)

    with monkeypatch.context() as patch:
        patch.setattr(LoTRALayer, "update_layer", run_out_of_memory)
        with refused("no room", base, error=MemoryError):
            PeftModel.from_pretrained(base, tmp_path)
        with refused("no room", model, error=MemoryError):
            model.load_adapter(tmp_path, "other")

    assert_equal(model(X), y)
    assert list(model.peft_config) == ["default"]
    model.load_adapter(tmp_path, "other")
    model.set_adapter("other")
    assert_equal(model.eval()(X), PeftModel.from_pretrained(base, tmp_path)(X))


READS = {
    "config": LoTRAConfig.from_pretrained,
    "hotswap": lambda folder: hotswap_adapter(adapt(), folder),
    "bank": lambda folder: AdapterBank(net()).add("name", folder),
}


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize(
    "content",
    [
        *(share for share in (0.0, 0.1, 0.5, 0.99)),
        b"[]",
        b"null",
        b"{",
        b"[" * 100_000,
        b'{"peft_type": "\xff"}',
        b'{"peft_type": "OTHER"}',
        b'{"peft_type": ["LOTRA"]}',
        b'{"peft_type": "LOTRA", "base_layers": []}',
    ],
)
def test_a_broken_configuration_is_one_clear_error(folder, read, content):
    path = folder / CONFIG
    whole = path.read_bytes()
    path.write_bytes(whole[: int(content * len(whole))] if isinstance(content, float) else content)

    with refused("cannot be read") as caught:
        READS[read](folder)

    assert type(caught.value) is ValueError
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("more", [{}, {"a_field_of_later": 3}])
def test_a_newer_format_is_called_newer(folder, more):
    edit_config(folder, lotra_format=2, **more)

    files_refused(folder, f"{folder}.*newer version: upgrade peft-lotra")
