# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Adapters that an older version saved load with the same tensors and give the same outputs.

Each folder has a base model, what PEFT saved of its adapter, and `outputs.safetensors` with `inputs` and the outputs
of the base model and of the adapted, merged and unloaded ones. They are of commit c2f4d8a, written by
`git show 91a53ba:tests/legacy/make.py`. Tensors are compared bit for bit. The kernels of torch differ in the last
digits from machine to machine, with any version of peft_lotra: outputs may differ by rounding.
"""

import hashlib
import importlib
import json
import warnings
from collections.abc import Callable
from pathlib import Path

import peft.auto
import pytest
import torch
from helpers import ALLOWED
from peft import AutoPeftModel, PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from stand_ins import FAMILIES, FastKANLayer
from torch import Tensor, nn

from peft_lotra import LoTRAConfig, slim
from peft_lotra.kan import KAN, KANModel, SlimKAN


LEGACY = Path(__file__).parent
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# relative differences that the rounding of another machine explains: FlashKAN loses digits; bfloat16 has three
ROUNDING = {torch.float32: 5e-6, torch.bfloat16: 2e-2}
ROUNDING_OF_FLASHKAN = 5e-4


class WithHead(nn.Module):
    """A KAN layer and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.kan = FastKANLayer(3, 4, num_grids=4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.kan(x))


def stack(family: str) -> nn.Module:
    return nn.Sequential(FAMILIES[family](3, 4), FAMILIES[family](4, 2))


def pykan() -> nn.Module:
    from kan import KAN as MultKAN

    return MultKAN(width=[3, 4, 2], grid=4, k=3, auto_save=False, device="cpu")


# what the adapters are on; the state dicts are in the folders
BASES: dict[str, Callable[[], nn.Module]] = {
    "kan_model": lambda: KANModel.from_pretrained(LEGACY / "kan_model" / "base"),
    "slim_kan": lambda: SlimKAN([3, 4, 2], ranks=(2, 2, 2)),
    "slim_foreign": lambda: slim(stack("efficient-kan"), ranks=(2, 2, 2)),
    "pykan": pykan,
    "efficient_kan": lambda: stack("efficient-kan"),
    "inkan": lambda: stack("inkan"),
    "flashkan": lambda: stack("flashkan"),
    "fast_kan": lambda: stack("fast-kan"),
    "modules_to_save": WithHead,
    "bfloat16": lambda: KAN([3, 4, 2]).bfloat16(),
    **dict.fromkeys(("kan", "no_residual", "patterns", "gradient"), lambda: KAN([3, 4, 2])),
}


def saved_base(name: str) -> nn.Module:
    """The base model of a case, as its folder has it."""
    model = BASES[name]().eval()
    if (state := LEGACY / name / "base.safetensors").exists():
        model.load_state_dict(load_file(state))
    return model


every_case = pytest.mark.parametrize("name", BASES)


def load(name: str) -> PeftModel:
    return PeftModel.from_pretrained(saved_base(name), LEGACY / name).eval()


def check(model: nn.Module, name: str, which: str) -> None:
    """Compares the outputs of a model with those of the older version, up to the rounding of another machine."""
    saved = load_file(LEGACY / name / "outputs.safetensors")
    with torch.no_grad():
        y = model(saved["inputs"])
    y = y if isinstance(y, Tensor) else y.logits
    rounding = ROUNDING_OF_FLASHKAN if name == "flashkan" else ROUNDING[y.dtype]
    torch.testing.assert_close(y, saved[which], rtol=0, atol=rounding * saved[which].abs().max().item())


def assert_same_tensors(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for key, tensor in expected.items():
        assert tensor.dtype == actual[key].dtype and torch.equal(actual[key], tensor), key


@every_case
def test_load(name):
    model = load(name)
    check(model, name, "adapted")
    assert_same_tensors(get_peft_model_state_dict(model), load_file(LEGACY / name / WEIGHTS))
    with model.disable_adapter():
        check(model, name, "base")


@every_case
def test_merge_and_unload(name):
    check(load(name).merge_and_unload(), name, "merged")
    bare = load(name).unload()
    check(bare, name, "unloaded")
    if name != "modules_to_save":  # of which PEFT's `unload` keeps the trained copies
        assert_same_tensors(bare.state_dict(), saved_base(name).state_dict())


# what only files of older versions have, what only newer files have, and what says where and by whom it was saved
OLDER, NEWER = {"integrity", "base_digest", "save_norm_stats"}, {"train", "weights_sha256", "lotra_format"}
PLACES = {"peft_version", "base_model_name_or_path", "auto_mapping"}


def contract(config: dict) -> dict:
    """The meaning of a configuration: without records of other versions, and with the kinds and shapes of layers."""
    layers = config["base_layers"]
    kinds = {n: {what: layers[n][what] for what in ("family", "shape", "has_residual")} for n in layers}
    entries = {name: value for name, value in config.items() if name not in OLDER | NEWER | PLACES}
    return {**entries, "base_layers": kinds}


@every_case
def test_saved_again(name, tmp_path):
    load(name).save_pretrained(tmp_path)
    older, newer = (json.loads((folder / CONFIG).read_text()) for folder in (LEGACY / name, tmp_path))
    assert contract(newer) == contract(older)
    assert not OLDER & newer.keys() and newer.keys() - older.keys() <= NEWER and newer["train"] is None
    classes = [config["auto_mapping"]["base_model_class"] for config in (newer, older)]
    assert classes[0] == classes[1]
    for layer in newer["base_layers"].values():
        for what in ("grid", "parameters"):  # were hashes
            assert len(layer[what]) == 9 and all(isinstance(value, float) for value in layer[what])
    assert newer["weights_sha256"] == hashlib.sha256((tmp_path / WEIGHTS).read_bytes()).hexdigest()
    assert_same_tensors(load_file(tmp_path / WEIGHTS), load_file(LEGACY / name / WEIGHTS))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        again = PeftModel.from_pretrained(saved_base(name), tmp_path, check_base="error").eval()
    check(again, name, "adapted")
    again.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / CONFIG).read_text()) == newer


def test_auto_model(monkeypatch):
    name = "kan_model"
    monkeypatch.chdir(LEGACY)  # the path of the base is relative to it
    monkeypatch.setattr(peft.auto, "check_file_exists_on_hf_hub", lambda **kwargs: False)
    check(AutoPeftModel.from_pretrained(name, **ALLOWED).eval(), name, "adapted")


@pytest.mark.parametrize("name, module", [("kan", "network"), ("kan_model", "modeling_kan")])
def test_the_class_of_the_base_is_found(name, module):
    """`AutoPeftModel` imports the class of the base by this name (`KAN` has no `from_pretrained` for it to call)."""
    mapping = json.loads((LEGACY / name / CONFIG).read_text())["auto_mapping"]
    assert mapping["parent_library"] == f"peft_lotra.kan.{module}"
    found = getattr(importlib.import_module(mapping["parent_library"]), mapping["base_model_class"])
    assert isinstance(saved_base(name), found)


def test_the_module_that_slim_kan_had_before_is_replaced():
    mapping = LoTRAConfig.from_pretrained(LEGACY / "slim_kan").auto_mapping
    assert getattr(importlib.import_module(mapping["parent_library"]), mapping["base_model_class"]) is SlimKAN


def test_the_files_name_no_place_and_hold_no_code():
    files = [path for path in LEGACY.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert {path.suffix for path in files} == {".py", ".json", ".safetensors"}
    assert sum(path.stat().st_size for path in files) < 350_000
    for name in BASES:
        assert (LEGACY / name / "base.safetensors").exists() != (LEGACY / name / "base").exists()
        path = json.loads((LEGACY / name / CONFIG).read_text())["base_model_name_or_path"]
        assert not path or not Path(path).is_absolute()
