# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import adapt, inputs
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

import peft_lotra
from peft_lotra import LoTRAConfig, LoTRAModel
from peft_lotra.kan import KAN


ROOT = Path(peft_lotra.__file__).parents[1]


def run(code: str, *arguments: object) -> str:
    """Runs code in a process of its own, in which nothing is imported yet."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_type_is_a_true_member_of_the_enumeration():
    run("""
import copy, json, pickle
from peft import PeftType
before = list(PeftType)
import peft_lotra

member = PeftType.LOTRA
assert type(member) is PeftType and member == "LOTRA" == member.value == member.name
assert PeftType("LOTRA") is PeftType["LOTRA"] is member
assert list(PeftType) == before + [member] and len(PeftType) == len(before) + 1
assert member in PeftType and "LOTRA" in PeftType.__members__ and dict(PeftType.__members__)["LOTRA"] is member
assert hash(member) == hash("LOTRA") and {member: 1}["LOTRA"] == 1
assert all(pickle.loads(pickle.dumps(member, p)) is member for p in range(pickle.HIGHEST_PROTOCOL + 1))
assert copy.copy(member) is copy.deepcopy(member) is member
assert json.dumps({"peft_type": member}) == '{"peft_type": "LOTRA"}'
assert repr(member) == repr(PeftType.LORA).replace("LORA", "LOTRA")
try:
    PeftType.LOTRA = 1
except AttributeError:
    pass
else:
    raise AssertionError("the member can be overwritten")
""")


def test_the_mappings():
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.LOTRA] is LoTRAConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING["LOTRA"] is LoTRAModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.LOTRA] == LoTRAModel.prefix == "lotra_"
    # upstream iterates over all of them
    assert all(kind in PEFT_TYPE_TO_CONFIG_MAPPING for kind in PeftType)


USE = """
def use(LoTRAConfig):
    from peft import PeftType, get_peft_model, mapping
    from peft_lotra.kan import KAN
    assert list(PeftType).count("LOTRA") == 1
    assert mapping.PEFT_TYPE_TO_CONFIG_MAPPING["LOTRA"] is LoTRAConfig
    model = get_peft_model(KAN([2, 3, 1]), LoTRAConfig(r=2))
    assert type(model.base_model) is mapping.PEFT_TYPE_TO_TUNER_MAPPING["LOTRA"]
    assert model.get_nb_trainable_parameters()[0] > 0
"""


def test_reload():
    run(
        USE
        + """
import importlib, sys
import peft_lotra
for _ in range(3):
    importlib.reload(peft_lotra)
    use(peft_lotra.LoTRAConfig)
for name in [name for name in sys.modules if name.startswith("peft_lotra.")]:
    importlib.reload(sys.modules[name])
importlib.reload(peft_lotra)
use(peft_lotra.LoTRAConfig)
"""
    )


def test_import_after_a_purge_of_the_modules():
    run(
        USE
        + """
import sys
import peft_lotra
first = peft_lotra.LoTRAConfig
for name in [name for name in sys.modules if name.partition(".")[0] == "peft_lotra"]:
    del sys.modules[name]
import peft_lotra
assert peft_lotra.LoTRAConfig is not first
use(peft_lotra.LoTRAConfig)
"""
    )


def test_a_foreign_method_of_the_same_name_is_left_in_its_place():
    run("""
from dataclasses import dataclass
from peft import LoraConfig, PeftType, mapping
from peft.tuners.lora import LoraModel

member = str.__new__(PeftType, "LOTRA")
member._name_ = member._value_ = "LOTRA"
PeftType._member_names_.append("LOTRA")
PeftType._member_map_["LOTRA"] = PeftType._value2member_map_["LOTRA"] = member

class Foreign(LoraConfig): ...

mapping.PEFT_TYPE_TO_CONFIG_MAPPING[member] = Foreign
mapping.PEFT_TYPE_TO_TUNER_MAPPING[member] = LoraModel
try:
    import peft_lotra
except RuntimeError as error:
    assert "__main__.Foreign" in str(error) and "LOTRA" in str(error), error
else:
    raise AssertionError("no error")
assert mapping.PEFT_TYPE_TO_CONFIG_MAPPING["LOTRA"] is Foreign
assert mapping.PEFT_TYPE_TO_TUNER_MAPPING["LOTRA"] is LoraModel
assert list(PeftType).count("LOTRA") == 1
""")


def test_a_member_that_somebody_else_added_is_used():
    run(
        USE
        + """
from peft import PeftType
member = str.__new__(PeftType, "LOTRA")
member._name_ = member._value_ = "LOTRA"
PeftType._member_names_.append("LOTRA")
PeftType._member_map_["LOTRA"] = PeftType._value2member_map_["LOTRA"] = member
import peft_lotra
use(peft_lotra.LoTRAConfig)
"""
    )


def test_a_pickled_config_loads_in_a_fresh_process(tmp_path):
    config = LoTRAConfig(r=(2, 3, 4), target_modules=["kan"])
    (tmp_path / "config").write_bytes(pickle.dumps(config))
    code = (
        "import pickle, sys; c = pickle.load(open(sys.argv[1], 'rb')); print(c.r, c.target_modules, c.peft_type.value)"
    )
    assert run(code, tmp_path / "config").split("\n")[0] == "(2, 3, 4) {'kan'} LOTRA"


@pytest.fixture
def saved(tmp_path):
    """A folder with an adapter, its base model's state dict, and what the adapted model computes."""
    model = KAN([3, 5, 2])
    torch.save(model.state_dict(), tmp_path / "base.pt")
    adapted = adapt(model)
    adapted.save_pretrained(tmp_path / "adapter")
    x = inputs()
    torch.save([x, adapted(x).detach()], tmp_path / "data.pt")
    return tmp_path


@pytest.mark.parametrize("statement", ["import peft_lotra", "from peft_lotra.kan import KAN"])
def test_an_adapter_loads_in_a_fresh_process(saved, statement):
    code = """
import sys, torch
from peft import PeftModel
STATEMENT
from peft_lotra.kan import KAN
folder = sys.argv[1]
base = KAN([3, 5, 2])
base.load_state_dict(torch.load(f"{folder}/base.pt"))
x, y = torch.load(f"{folder}/data.pt")
model = PeftModel.from_pretrained(base, f"{folder}/adapter")
print((model(x) - y).abs().max().item())
"""
    assert run(code.replace("STATEMENT", statement), saved) == "0.0\n"


def test_without_the_import_peft_does_not_know_the_method(saved):
    run(
        """
import sys
from peft import PeftConfig
try:
    PeftConfig.from_pretrained(sys.argv[1])
except KeyError as error:
    assert error.args == ("LOTRA",)
else:
    raise AssertionError("no error")
import peft_lotra
assert type(PeftConfig.from_pretrained(sys.argv[1])) is peft_lotra.LoTRAConfig
""",
        saved / "adapter",
    )
