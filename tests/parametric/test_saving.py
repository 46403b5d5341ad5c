# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Families that are saved, loaded and pushed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import family_problems as problems
import numpy as np
import pytest
import torch
from hub_server import Hub, HubServer
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from peft_lotra import ParametricAdapter
from peft_lotra.kan import KAN


LEGACY = Path(__file__).parents[1] / "legacy" / "family"


def test_saving_and_loading(family, base, tmp_path):
    family.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "parametric_adapter.safetensors"]
    assert "for parameters from 2.5 to 3.5" in (tmp_path / "README.md").read_text()
    loaded = ParametricAdapter.from_pretrained(base, tmp_path, problems.terms_of)
    assert loaded.parameters == family.parameters
    for c in (2.5, 2.9):
        torch.testing.assert_close(loaded.predict(c)(problems.POINTS), family.predict(c)(problems.POINTS))
        assert loaded.predict(c).indicator == pytest.approx(family.predict(c).indicator, rel=1e-6)
    loaded.fit([2.9], progress=False)  # and it goes on
    assert len(loaded.parameters) == len(family.parameters) + 1
    assert np.isnan(ParametricAdapter.from_pretrained(base, tmp_path).predict(2.9).indicator)


def test_a_family_of_two_logarithmic_parameters(base, tmp_path):
    family = ParametricAdapter(base, problems.terms_of_two, ranks=4, log=[True, False])
    family.fit([(2.8, 0.8), (3.2, 1.0), (3.0, 1.2), (2.9, 1.0)], progress=False)
    family.save_pretrained(tmp_path)
    loaded = ParametricAdapter.from_pretrained(base, tmp_path)
    torch.testing.assert_close(
        loaded.predict((3.0, 1.0))(problems.POINTS), family.predict((3.0, 1.0))(problems.POINTS)
    )


def test_a_file_of_an_earlier_version():
    """With a hash of its members, which is not written any more."""
    base = KAN([2, 10, 10, 1], 8, dtype=torch.float64)
    base.load_state_dict(load_file(LEGACY / "base.safetensors"))
    family = ParametricAdapter.from_pretrained(base, LEGACY)
    assert len(family.parameters) == 32 and family.parameters[0] == pytest.approx(0.02)
    x = torch.tensor([[0.0, 0.5], [0.3, -0.2]], dtype=torch.float64)
    assert not torch.allclose(family.predict(0.03)(x), base(x)) and family.predict(0.03)(x).isfinite().all()


def test_loading_onto_another_base_is_refused(family, base, tmp_path):
    family.save_pretrained(tmp_path)
    other = problems.pretrained(seed=1)
    with pytest.raises(ValueError, match="base"):
        ParametricAdapter.from_pretrained(other, tmp_path)
    with pytest.warns(UserWarning):
        ParametricAdapter.from_pretrained(other, tmp_path, check_base="warn")
    with pytest.raises(ValueError, match="another base"):
        ParametricAdapter.from_pretrained(KAN([1, 4, 1], 7, dtype=torch.float64), tmp_path)  # another grid
    with pytest.raises(FileNotFoundError, match="parametric_adapter"):
        ParametricAdapter.from_pretrained(base, tmp_path / "..")


@pytest.mark.parametrize("damage", ["no modes", "another version", "NaN", "short"])
def test_damaged_files(family, base, tmp_path, damage):
    family.save_pretrained(tmp_path)
    path = tmp_path / "parametric_adapter.safetensors"
    tensors, metadata = load_file(path), safe_open(path, "pt").metadata()
    if damage == "no modes":
        tensors.pop("modes")
    elif damage == "another version":
        metadata["parametric"] = "9"
    elif damage == "NaN":
        tensors["coordinates"][0] = torch.nan
    save_file(tensors, path, metadata)
    if damage == "short":
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="is damaged|holds no family"):
        ParametricAdapter.from_pretrained(base, tmp_path)


COMMON = """
import family_problems as problems
from peft_lotra import ParametricAdapter
base = problems.pretrained()
"""
PUSH_AND_PULL = """
family = ParametricAdapter(base, problems.terms_of, ranks=4)
family.fit([2.9, 3.0, 3.1], progress=False)
family.push_to_hub("ann/family")
family.push_to_hub("ann/family", revision="second", commit_message="again")
for revision in ("main", "second"):
    pulled = ParametricAdapter.from_pretrained(base, "ann/family", problems.terms_of, revision=revision)
    values = pulled.predict(2.95)(problems.POINTS)
    assert (values - family.predict(2.95)(problems.POINTS)).abs().max() < 1e-10
    assert pulled.parameters == [2.9, 3.0, 3.1] and pulled.predict(2.95).indicator < 1
"""


@pytest.mark.slow
def test_a_family_is_pushed_and_pulled(tmp_path):
    """In a process whose endpoint is a server of our own."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    env |= {"HF_TOKEN": "hf_ann", "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1"}
    support = Path(problems.__file__).parent
    env["PYTHONPATH"] = os.pathsep.join([str(support.parents[1]), str(support), env.get("PYTHONPATH", "")])
    hub = Hub({"hf_ann": "ann"})
    with HubServer(hub) as server:
        env["HF_ENDPOINT"] = server.url
        command = [sys.executable, "-c", COMMON + PUSH_AND_PULL]
        result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr[-4000:]
    files = [name for name in hub.repos["ann/family"].files("main") if not name.startswith(".")]
    assert sorted(files) == ["README.md", "parametric_adapter.safetensors"]
