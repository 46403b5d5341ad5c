# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Files: what cannot be loaded changes nothing."""

from __future__ import annotations

import json
import os
import shutil
import struct
import warnings

import pytest
import safetensors.torch
import torch
from helpers import adapt, assert_same, base, inputs, lotra_layers, nested, snapshot
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.save_and_load import set_peft_model_state_dict
from safetensors import safe_open

from peft_lotra import LoTRAConfig, save_adapter
from peft_lotra.files.checkpoint import own_tensors
from peft_lotra.files.format import MAX_HEADER_BYTES, keep_own_tensors, read_weights
from peft_lotra.hub.contents import read_adapter
from peft_lotra.kan import KAN


WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture
def folder(tmp_path):
    """An adapter for `nested()` of `torch.manual_seed(1)`."""
    adapt(model(), modules_to_save=["head"]).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def model():
    torch.manual_seed(1)
    return nested()


def refused(folder, match, error=ValueError, **kwargs):
    """That a load fails, into a bare and into an adapted model, and changes neither."""
    adapted = adapt(model(), adapter_name="existing", modules_to_save=["head"])
    x = inputs()
    y = adapted(x)
    for live in (model(), adapted):
        before = snapshot(live)
        with pytest.raises(error, match=match) as caught:
            if live is adapted:
                live.load_adapter(folder, "other", **kwargs)
            else:
                PeftModel.from_pretrained(live, folder, **kwargs)
        assert_same(live, before)
    assert list(adapted.peft_config) == ["existing"] and adapted.active_adapters == ["existing"]
    assert torch.equal(adapted(x), y)
    return str(caught.value)


def rewrite(folder, edit):
    """Edits the tensors, and gives the config their new digest, as an attacker would."""
    tensors = safetensors.torch.load_file(folder / WEIGHTS)
    edit(tensors)
    safetensors.torch.save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    edit_config(folder, integrity=None)


def edit_config(folder, **changes):
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


################
# Interruption #
################


def test_a_saved_folder(tmp_path):
    adapted = adapt(model())
    save_adapter(adapted, tmp_path / "a" / "b")
    adapted.save_pretrained(tmp_path / "plain")
    assert sorted(os.listdir(tmp_path / "a" / "b")) == sorted(os.listdir(tmp_path / "plain"))
    for name in (CONFIG, WEIGHTS):
        assert (tmp_path / "a" / "b" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


def test_the_tensors_of_other_adapters_are_not_kept(tmp_path):
    """PEFT 0.19 writes the tensors of all adapters into each file, those of others with their names."""
    own = ["a.lotra_core", "base_model.model.1.lotra_running_mean", "head.weight"]
    others = ["a.lotra_core.other", "a.lotra_factor_in.b", "base_model.model.1.lotra_running_mean.other"]
    values = {name: torch.rand(4) for name in [*own, *others]}
    assert list(own_tensors(values)) == own
    path = tmp_path / WEIGHTS
    safetensors.torch.save_file(values, path, metadata={"format": "pt"})
    keep_own_tensors(str(path))
    before = path.read_bytes()
    with safe_open(path, "pt") as file:
        assert sorted(file.keys()) == own and file.metadata() == {"format": "pt"}
        assert all(torch.equal(file.get_tensor(name), values[name]) for name in own)
    keep_own_tensors(str(path))
    assert path.read_bytes() == before and os.listdir(tmp_path) == [WEIGHTS]


def test_each_file_has_the_tensors_of_its_adapter_alone(tmp_path):
    net = adapt(model())
    net.add_adapter("other", LoTRAConfig(r=3, init_weights=False))
    net.save_pretrained(tmp_path)
    for path in (tmp_path / WEIGHTS, tmp_path / "other" / WEIGHTS):
        names = list(safetensors.torch.load_file(path))
        assert names and list(own_tensors(dict.fromkeys(names))) == names
    again = PeftModel.from_pretrained(model(), tmp_path / "other", adapter_name="other")
    net.set_adapter("other")
    x = inputs()
    assert torch.equal(again.eval()(x), net.eval()(x))


def test_what_else_lies_in_the_folder_stays(tmp_path):
    (tmp_path / "optimizer.pt").write_bytes(b"state")
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# My adapter\n")
    save_adapter(adapt(model()), tmp_path)
    save_adapter(adapt(model()), tmp_path)
    assert (tmp_path / "optimizer.pt").read_bytes() == b"state"
    assert "# My adapter" in (tmp_path / "README.md").read_text()


def test_a_save_that_fails_leaves_the_folder(tmp_path):
    adapted = adapt(model())
    save_adapter(adapted, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for kwargs in ({"selected_adapters": ["nobody"]}, {"safe_serialization": False}):
        with pytest.raises(ValueError):
            save_adapter(adapted, tmp_path, **kwargs)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    with pytest.raises(ValueError, match="is a file"):
        save_adapter(adapted, tmp_path / CONFIG)
    with torch.no_grad():
        next(iter(lotra_layers(adapted).values())).lotra_core["default"].fill_(torch.nan)
    with pytest.raises(ValueError, match="not finite"):
        save_adapter(adapted, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_two_adapters_mixed_up(tmp_path):
    for r in (1, 2):
        adapt(model(), r=(r, 2, 2)).save_pretrained(tmp_path / "ab"[r - 1])
    shutil.copy(tmp_path / "a" / WEIGHTS, tmp_path / "b" / WEIGHTS)
    refused(tmp_path / "b", "do not belong together")


###############
# Bad tensors #
###############


def test_a_pickle_is_refused(folder, monkeypatch):
    tensors = safetensors.torch.load_file(folder / WEIGHTS)
    torch.save(tensors, folder / "adapter_model.bin")
    os.remove(folder / WEIGHTS)

    def load(*args, **kwargs):
        raise AssertionError("unpickled")

    monkeypatch.setattr(torch, "load", load)
    message = refused(folder, "is a pickle, which runs code when it is loaded")
    assert "`adapter_model.safetensors`" in message


def test_no_tensors(folder):
    os.remove(folder / WEIGHTS)
    assert LoTRAConfig.from_pretrained(folder).r == (2, 3, 4)


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 9, 100, -1, -5000])
def test_truncated(folder, keep):
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:keep])
    refused(folder, "damaged")


@pytest.mark.parametrize("header", [0, 1, 2**63, 2**64 - 1, MAX_HEADER_BYTES + 1, 10**6])
def test_absurd_header_lengths(folder, header):
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", header) + content[8:])
    refused(folder, "damaged")


def test_a_header_longer_than_any_adapter_needs(folder):
    header = json.dumps({"__metadata__": {"a": "x" * MAX_HEADER_BYTES}}).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header)
    refused(folder, "header claims to have")


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4 * 10**12]},
        {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]},
        {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1]},
        [],
    ],
)
def test_absurd_headers(folder, entry):
    header = json.dumps({"base_model.model.body.0.lotra_core": entry}).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    refused(folder, "damaged")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_not_finite(folder, value):
    rewrite(folder, lambda tensors: tensors["base_model.model.body.0.lotra_core"].view(-1)[3:4].fill_(value))
    refused(folder, "body.0.lotra_core has values that are not finite")


def test_another_dtype(folder):
    def edit(tensors):
        tensors["base_model.model.body.0.lotra_core"] = tensors["base_model.model.body.0.lotra_core"].int()

    rewrite(folder, edit)
    refused(folder, "body.0.lotra_core is of type I32")


@pytest.mark.parametrize("name", ["body.0.lotra_core", "tail.layers.1.lotra_factor_in", "head.weight"])
@pytest.mark.parametrize("record", [True, False])
def test_a_tensor_that_is_missing(folder, name, record):
    rewrite(folder, lambda tensors: tensors.pop(f"base_model.model.{name}"))
    if not record:
        edit_config(folder, base_layers=None)
    refused(folder, f"{name}")


@pytest.mark.parametrize(
    "name",
    [
        "body.0.base_layer.spline_weight",
        "body.0.spline_weight",
        "head.original_module.weight",
        "head.modules_to_save.existing.weight",
        "tail.layers.0.base_weight",
        "nowhere.lotra_core",
    ],
)
def test_a_tensor_that_is_none_of_the_adapters(folder, name):
    """PEFT would write it over the base, or over another adapter."""
    rewrite(folder, lambda tensors: tensors.update({f"base_model.model.{name}": torch.zeros(4, 4)}))
    refused(folder, f"{name} is nothing that this adapter has")


def test_components_of_other_adapters_lead_nowhere(folder):
    """PEFT 0.19 saves them along."""
    adapted = adapt(model(), adapter_name="existing")
    before = {name: tensor.clone() for name, tensor in adapted.state_dict().items()}
    name = "base_model.model.body.0.lotra_core"
    rewrite(folder, lambda tensors: tensors.update({f"{name}.existing": torch.ones(2, 3, 4)}))
    adapted.load_adapter(folder, "other")
    assert all(torch.equal(adapted.state_dict()[n], tensor) for n, tensor in before.items() if "head" not in n)


@pytest.mark.skipif(not hasattr(BaseTuner, "_remap_adapter_state_dict_for_load"), reason="PEFT 0.19 has no such hook")
def test_tensors_for_an_adapter_that_is_there(folder):
    """PEFT reads no config then, as when a Trainer goes back to its best checkpoint."""
    adapted = adapt(model(), adapter_name="existing", modules_to_save=["head"])
    before = snapshot(adapted)
    good = safetensors.torch.load_file(folder / WEIGHTS)
    core = "base_model.model.body.0.lotra_core"
    cases = {
        "would be written": {**good, "base_model.model.body.0.base_layer.spline_weight": torch.zeros(5, 3, 8)},
        "is missing": {name: tensor for name, tensor in good.items() if name != core},
        "not finite": {**good, core: good[core] * torch.inf},
    }
    for message, tensors in cases.items():
        with pytest.raises(ValueError, match=message):
            set_peft_model_state_dict(adapted, tensors, "existing")
        assert_same(adapted, before)
    set_peft_model_state_dict(adapted, good, "existing")


def test_the_digest_is_of_names_and_contents_not_of_the_file(folder):
    tensors = safetensors.torch.load_file(folder / WEIGHTS)
    safetensors.torch.save_file(dict(reversed(tensors.items())), folder / WEIGHTS, {"format": "pt", "note": "x"})
    PeftModel.from_pretrained(model(), folder)


##############
# Bad config #
##############


def test_a_config_that_is_too_long(folder):
    path = folder / CONFIG
    path.write_text(path.read_text() + " " * (8 << 20))
    with pytest.raises(ValueError, match="bytes that a config may have"):
        LoTRAConfig.from_pretrained(folder)


@pytest.mark.parametrize("pattern", ["(a+)+", "(a|a)*b", "(.*)*", "(a){3}", r".*.*.*.*.*", "a" * 100_001])
@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "rank_pattern", "layers_pattern"])
def test_patterns_that_may_take_forever(folder, pattern, field):
    """They are not matched; without them, the layers and ranks are those of the tensors, or the file is refused."""
    value = {pattern: 3} if field == "rank_pattern" else pattern
    changes = {"target_modules": ["body.0"], "layers_to_transform": [0]} if field == "layers_pattern" else {}
    edit_config(folder, integrity=None, base_layers=None, **{**changes, field: value})
    if len(pattern) > 100:
        refused(folder, "may take forever")
    else:
        config = LoTRAConfig.from_pretrained(folder)
        assert pattern not in (config.target_modules, config.exclude_modules, config.layers_pattern)
        assert pattern not in config.rank_pattern
        PeftModel.from_pretrained(model(), folder)


def test_a_task_that_the_model_has_no_methods_for(folder):
    edit_config(folder, task_type="CAUSAL_LM")
    refused(folder, "CAUSAL_LM")


@pytest.mark.parametrize("content", ["", "{", "[]", "5", "\x00", '{"peft_type": 5}', "[" * 100_000])
def test_no_config(folder, content):
    (folder / CONFIG).write_text(content)
    refused(folder, "", Exception)


def test_memory_and_time_of_what_is_read(folder):
    """The file is mapped: a tensor is not copied."""
    shapes, digest = read_weights(str(folder / WEIGHTS))
    assert shapes["base_model.model.body.0.lotra_core"] == (2, 3, 4) and len(digest) == 32


def test_nothing_warns_when_a_good_file_is_loaded(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PeftModel.from_pretrained(model(), folder)


def test_bad_base_families(tmp_path):
    adapt(base("own")).save_pretrained(tmp_path)
    before = snapshot(other := KAN([3, 4]))
    with pytest.raises(ValueError, match="the model has no such layer"):
        PeftModel.from_pretrained(other, tmp_path)
    assert_same(other, before)


@pytest.mark.parametrize(
    "door", [read_weights, lambda path: read_adapter(os.path.dirname(path))], ids=["load", "inspect"]
)
def test_what_is_no_file_of_an_adapter_is_refused_before_it_is_read(tmp_path, door):
    adapt(KAN([2, 3])).save_pretrained(tmp_path)
    path = tmp_path / WEIGHTS
    safetensors.torch.save_file({f"layers.{i}.lotra_core": torch.zeros(1) for i in range(10_001)}, path)
    with pytest.raises(ValueError, match="10,001 tensors"):
        door(str(path))
    path.write_bytes((9 << 20).to_bytes(8, "little") + b"{" + b" " * (9 << 20))
    with pytest.raises(ValueError, match="header"):
        door(str(path))
    path.unlink()
    os.mkfifo(path)  # nobody writes into it
    with pytest.raises(ValueError, match="no file|no adapter_model"):
        door(str(path))
