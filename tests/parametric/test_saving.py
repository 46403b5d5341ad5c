# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Families that are saved, loaded and pushed."""

import copy
import json

import family_problems as problems
import numpy as np
import pytest
import torch
from helpers import refused
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from peft_lotra import ParametricAdapter, push_to_hub
from peft_lotra.kan import KAN


def test_a_saved_family_is_loaded_and_goes_on(family, base, tmp_path):
    family.save_pretrained(tmp_path)
    loaded = ParametricAdapter.from_pretrained(base, tmp_path, problems.terms_of)

    assert loaded.parameters == family.parameters
    for c in (2.5, 2.9):
        assert_close(loaded.predict(c)(problems.POINTS), family.predict(c)(problems.POINTS))
        assert loaded.predict(c).indicator == pytest.approx(family.predict(c).indicator, rel=1e-6)
    loaded.fit([2.9], progress=False)
    assert len(loaded.parameters) == len(family.parameters) + 1


def test_a_folder_has_a_card_and_one_file(family, tmp_path):
    family.save_pretrained(tmp_path)

    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "parametric_adapter.safetensors"]
    assert "for parameters from 2.5 to 3.5" in (tmp_path / "README.md").read_text()


def test_a_family_that_is_loaded_without_terms_has_no_indicator(family, base, tmp_path):
    family.save_pretrained(tmp_path)

    assert np.isnan(ParametricAdapter.from_pretrained(base, tmp_path).predict(2.9).indicator)


def test_a_family_of_two_parameters_and_scales_is_restored(base, tmp_path):
    family = ParametricAdapter(base, problems.terms_of_two, ranks=4, log=[True, False])
    family.fit([(2.8, 0.8), (3.2, 1.0), (3.0, 1.2), (2.9, 1.0)], progress=False)
    expected = family.predict((3.0, 1.0))(problems.POINTS)

    family.save_pretrained(tmp_path)
    loaded = ParametricAdapter.from_pretrained(base, tmp_path)

    assert_close(loaded.predict((3.0, 1.0))(problems.POINTS), expected)


def test_loading_onto_other_weights_is_refused_or_warns(family, base, tmp_path):
    family.save_pretrained(tmp_path)
    changed = copy.deepcopy(base)
    with torch.no_grad():
        changed.layers[0].spline_weight.mul_(2)

    with refused("base"):
        ParametricAdapter.from_pretrained(changed, tmp_path)
    with pytest.warns(UserWarning):
        ParametricAdapter.from_pretrained(changed, tmp_path, check_base="warn")


def test_loading_onto_another_grid_is_refused(family, tmp_path):
    family.save_pretrained(tmp_path)

    with refused("another base"):
        ParametricAdapter.from_pretrained(KAN([1, 4, 1], 7, dtype=torch.float64), tmp_path)


def test_a_folder_without_a_family_is_named(base, tmp_path):
    with pytest.raises(FileNotFoundError, match="parametric_adapter"):
        ParametricAdapter.from_pretrained(base, tmp_path)


@pytest.fixture
def file(family, tmp_path):
    family.save_pretrained(tmp_path)
    return tmp_path / "parametric_adapter.safetensors"


def read_parts(file):
    """Return the tensors and the metadata of a file."""
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    with safe_open(file, "pt") as opened:
        return tensors, opened.metadata()


def assert_refused(base, file, match="is damaged"):
    """Check that loading raises a ValueError, of no subclass, that names the file."""
    with refused(match) as caught:
        ParametricAdapter.from_pretrained(base, file.parent)

    assert type(caught.value) is ValueError
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("share", [0.0, 1, 7, 8, 9, 100, 0.5, -1])
def test_a_truncated_file_is_refused(base, file, share):
    content = file.read_bytes()
    end = int(share * len(content)) if isinstance(share, float) else share
    file.write_bytes(content[:end])

    assert_refused(base, file)


def test_an_altered_byte_is_refused(base, file):
    """Anywhere in the tensors, and in the names, shapes, configuration and parameters of the header."""
    content = file.read_bytes()
    header = content.index(b'"__metadata__"')
    in_header = range(header, header + 400, 9)
    in_tensors = range(len(content) // 2, len(content), 997)
    for index in (*in_header, *in_tensors, len(content) - 1):
        altered = bytearray(content)
        altered[index] ^= 1
        if meaning(altered) == meaning(content):
            continue
        file.write_bytes(altered)

        assert_refused(base, file)


def meaning(content):
    """Return the entries of the header that are read, and the tensors; None without valid JSON."""
    end = 8 + int.from_bytes(content[:8], "little")
    try:
        header = json.loads(content[8:end])
        metadata = header.pop("__metadata__")
    except (ValueError, KeyError):
        return None
    return header, metadata.get("family"), metadata.get("sha256"), content[end:]


@pytest.mark.parametrize("text", [None, "", "{", "[]", "null", "[" * 100_000])
@pytest.mark.parametrize("entries", [["family"], ["sha256"], ["family", "sha256"]])
def test_broken_metadata_is_refused(base, file, entries, text):
    tensors, metadata = read_parts(file)
    for entry in entries:
        metadata.pop(entry)
        if text is not None:
            metadata[entry] = text
    save_file(tensors, file, metadata)

    assert_refused(base, file)


@pytest.mark.parametrize("name", ["members", "parameters", "indicators"])
def test_a_missing_tensor_is_refused(base, file, name):
    tensors, metadata = read_parts(file)
    del tensors[name]
    save_file(tensors, file, metadata)

    assert_refused(base, file)


def test_a_newer_version_is_called_newer(base, file):
    _, metadata = read_parts(file)
    save_file({"something": torch.ones(2)}, file, metadata | {"family": '{"version": 2}'})

    assert_refused(base, file, "was written by a newer version of peft-lotra: upgrade")


def test_a_card_that_cannot_be_read_stays(family, base, tmp_path):
    (tmp_path / "README.md").write_bytes(b"\xff\xfe mine")

    with pytest.warns(UserWarning, match="its model card is not written"):
        family.save_pretrained(tmp_path)

    assert (tmp_path / "README.md").read_bytes() == b"\xff\xfe mine"
    assert ParametricAdapter.from_pretrained(base, tmp_path).parameters == family.parameters


def test_a_family_is_pushed_and_pulled(hub, base, family):
    push_to_hub(family, "user/family")
    push_to_hub(family, "user/family", revision="second", commit_message="again")

    for revision in ("main", "second"):
        pulled = ParametricAdapter.from_pretrained(base, "user/family", problems.terms_of, revision=revision)
        expected = family.predict(2.95)(problems.POINTS)
        assert_close(pulled.predict(2.95)(problems.POINTS), expected, rtol=0, atol=1e-10)
        assert pulled.parameters == family.parameters
        assert pulled.predict(2.95).indicator < 1
    files = [name for name in hub.repos["user/family"].files("main") if not name.startswith(".")]
    assert sorted(files) == ["README.md", "parametric_adapter.safetensors"]
