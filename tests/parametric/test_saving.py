# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Families that are saved, loaded and pushed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import family_problems as problems
import numpy as np
import pytest
import torch
from hub_server import Hub, HubServer
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from peft_lotra import ParametricAdapter
from peft_lotra.kan import KAN


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


@pytest.fixture
def file(family, tmp_path):
    family.save_pretrained(tmp_path)
    return tmp_path / "parametric_adapter.safetensors"


def read_parts(file):
    """The tensors and the metadata of a file."""
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    with safe_open(file, "pt") as opened:
        return tensors, opened.metadata()


def refuse(base, file, match="is damaged") -> None:
    """That loading raises one error, a ValueError that names the file."""
    with pytest.raises(ValueError, match=match) as caught:
        ParametricAdapter.from_pretrained(base, file.parent)

    assert type(caught.value) is ValueError and str(file) in str(caught.value)


@pytest.mark.parametrize("share", [0.0, 1, 7, 8, 9, 100, 0.5, -1])
def test_a_truncated_file_is_refused(base, file, share):
    content = file.read_bytes()
    end = int(share * len(content)) if isinstance(share, float) else share
    file.write_bytes(content[:end])

    refuse(base, file)


def test_an_altered_byte_is_refused(base, file):
    """Anywhere in the tensors, and in the names, shapes, configuration and parameters before them."""
    content = file.read_bytes()
    header = content.index(b'"__metadata__"')
    for place in [*range(header, header + 400, 9), *range(len(content) // 2, len(content), 997), len(content) - 1]:
        altered = bytearray(content)
        altered[place] ^= 1
        if json_of(altered) == json_of(content) and altered[end_of(content) :] == content[end_of(content) :]:
            continue  # the meaning is the same
        file.write_bytes(altered)

        refuse(base, file)


def end_of(content: bytes) -> int:
    """Where the header ends."""
    return 8 + int.from_bytes(content[:8], "little")


def json_of(content: bytes):
    """The entries of the header that are read; None if it is no JSON."""
    try:
        header = json.loads(content[8 : end_of(content)])
        metadata = header.pop("__metadata__")
        return header, {name: metadata.get(name) for name in ("family", "sha256")}
    except (ValueError, KeyError):
        return None


@pytest.mark.parametrize("text", [None, "", "{", "[]", "null", "[" * 100_000])
@pytest.mark.parametrize("entry", ["family", "sha256"])
def test_broken_metadata_is_refused(base, file, entry, text):
    tensors, metadata = read_parts(file)
    metadata.pop(entry)
    if text is not None:
        metadata[entry] = text
    save_file(tensors, file, metadata)

    refuse(base, file)


@pytest.mark.parametrize("change", ["missing", "dtype", "shape", "NaN", "values"])
@pytest.mark.parametrize("name", ["members", "parameters", "indicators"])
def test_altered_tensors_are_refused(base, file, name, change):
    tensors, metadata = read_parts(file)
    tensor = tensors.pop(name)
    if change == "dtype":
        tensors[name] = tensor.long()
    elif change == "shape":
        tensors[name] = tensor.flatten().unsqueeze(0)
    elif change == "NaN":
        tensors[name] = tensor * torch.nan
    elif change == "values":
        tensors[name] = tensor + 1e-12
    save_file(tensors, file, metadata)

    refuse(base, file)


def test_a_file_without_metadata_is_refused(base, file):
    save_file(read_parts(file)[0], file)

    refuse(base, file)


def test_a_newer_version_is_called_newer(base, file):
    _, metadata = read_parts(file)
    save_file({"something": torch.ones(2)}, file, metadata | {"family": '{"version": 2}'})

    refuse(base, file, "was written by a newer version of peft-lotra: upgrade")


def test_the_text_of_a_person_is_kept(family, tmp_path):
    mine = "---\nlicense: mit\ntags:\n- mine\n---\n\n# My family\n\nIt reads scans.\n"
    (tmp_path / "README.md").write_text(mine)

    for _ in range(2):
        family.save_pretrained(tmp_path)

    card = ModelCard((tmp_path / "README.md").read_text())
    assert card.text.startswith("\n# My family\n\nIt reads scans.\n") and card.text.count("```python") == 1
    assert card.data.license == "mit" and {"mine", "parametric"} <= set(card.data.tags)


def test_a_card_that_cannot_be_read_stays(family, base, tmp_path):
    (tmp_path / "README.md").write_bytes(b"\xff\xfe mine")

    with pytest.warns(UserWarning, match="its model card is not written"):
        family.save_pretrained(tmp_path)

    assert (tmp_path / "README.md").read_bytes() == b"\xff\xfe mine"
    assert ParametricAdapter.from_pretrained(base, tmp_path).parameters == family.parameters


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
        result = subprocess.run(command, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    files = [name for name in hub.repos["ann/family"].files("main") if not name.startswith(".")]
    assert sorted(files) == ["README.md", "parametric_adapter.safetensors"]
