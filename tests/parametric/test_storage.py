# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import math

import family_problems as problems
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from peft_lotra import ParametricAdapter
from peft_lotra.parametric.members import Member
from peft_lotra.parametric.storage import FILE, RUN, RunFolder, modes_of


PARAMETERS = [2.9, 3.0, 3.1]


@pytest.fixture(scope="module")
def base():
    return problems.pretrained()


def make(base, terms_of=problems.terms_of, ranks=4):
    return ParametricAdapter(base, terms_of, ranks=ranks)


def test_modes_lose_nothing():
    vectors = np.random.default_rng(0).normal(size=(5, 40)) @ np.diag(np.linspace(1, 1e-6, 40))
    modes, coordinates = modes_of(vectors)
    np.testing.assert_allclose(coordinates @ modes, vectors, atol=1e-14)
    np.testing.assert_allclose(modes @ modes.T, np.eye(5), atol=1e-12)
    assert modes_of(vectors, 2)[0].shape == (2, 40) and modes_of(np.zeros((3, 4)))[1].shape == (3, 1)


def test_nothing_is_fitted_twice(base, tmp_path, monkeypatch):
    monkeypatch.setenv("PEFT_LOTRA_COUNTS", str(tmp_path / "counts"))
    first = make(base, problems.terms_counted)
    first.fit(PARAMETERS, folder=tmp_path / "run", progress=False)
    (tmp_path / "counts").unlink()
    second = make(base, problems.terms_counted)
    second.fit(PARAMETERS, folder=tmp_path / "run", progress=False)
    evaluated = (tmp_path / "counts").read_text().split()
    assert len(evaluated) == len(PARAMETERS)  # the base's own loss, that finds the first one
    for one, other in zip(first._path.members, second._path.members, strict=True):
        assert np.array_equal(one.vector, other.vector) and one.indicator == other.indicator


def test_a_search_is_resumed_bit_for_bit(base, tmp_path):
    first, second = make(base), make(base)
    first.fit(between=(2.6, 3.4), max_members=11, folder=tmp_path, progress=False)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("member-*")}
    second.fit(between=(2.6, 3.4), max_members=11, folder=tmp_path, progress=False)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("member-*")} == before
    assert first.parameters == second.parameters
    assert all(
        np.array_equal(one.vector, other.vector)
        for one, other in zip(first._path.members, second._path.members, strict=True)
    )


def test_a_folder_that_another_run_writes_to(base, tmp_path):
    other = RunFolder(tmp_path, make(base)._record())
    with other.opened(), pytest.raises(ValueError, match="Another run is writing"):
        make(base).fit(PARAMETERS, folder=tmp_path, progress=False)
    make(base).fit(PARAMETERS, folder=tmp_path, progress=False)  # and it is free again


def test_a_folder_of_another_family(base, tmp_path):
    make(base).fit(PARAMETERS, folder=tmp_path, progress=False)
    for family, arguments, words in (
        (make(problems.pretrained(seed=1)), {}, "base"),
        (make(base, ranks=5), {}, "coordinates"),
        (make(base), {"steps": 4}, "steps"),
    ):
        with pytest.raises(ValueError, match=f"another family or other settings.*{words}"):
            family.fit(PARAMETERS, folder=tmp_path, progress=False, **arguments)
        assert family.parameters == []


@pytest.mark.parametrize("damage", ["run", "member", "vector"])
def test_damaged_files_of_a_run(base, tmp_path, damage):
    make(base).fit(PARAMETERS, folder=tmp_path, progress=False)
    path = tmp_path / RUN if damage == "run" else next(tmp_path.glob("member-*"))
    if damage == "vector":
        save_file({"vector": torch.zeros(3)}, path)
    else:
        path.write_bytes(b"{")
    with pytest.raises(ValueError, match=f"{path.name} is"):
        make(base).fit(PARAMETERS, folder=tmp_path, progress=False)


@pytest.mark.parametrize("content", ["[]", "null", "[" * 100_000], ids=["list", "null", "deep"])
@pytest.mark.parametrize("where", ["run", "member"])
def test_records_that_are_no_objects(tmp_path, where, content):
    folder = RunFolder(tmp_path, {"coordinates": 4})
    with folder.opened():
        if where == "run":
            (tmp_path / RUN).write_text(content)
        else:
            save_file({"vector": torch.zeros(4)}, tmp_path / "member-1-0.safetensors", {"member": content})
    with pytest.raises(ValueError, match="is broken|is damaged"), folder.opened():
        pass


@pytest.mark.parametrize(
    "change",
    [
        {"vector": np.full(4, np.nan)},
        {"vector": np.arange(4)},
        {"vector": np.zeros((1, 4))},
        {"parameter": (math.nan,)},
        {"indicator": "x"},
        {"steps": None},
    ],
    ids=str,
)
def test_members_that_no_fit_has_written(tmp_path, change):
    """They were taken as they were, and predictions were NaN."""
    folder = RunFolder(tmp_path, {"coordinates": 4})
    with folder.opened():
        folder.add(Member((1.0,), np.zeros(4), 0.5, 0.25, 3, 0.5)._replace(**change), 0)
    with pytest.raises(ValueError, match="is damaged .*: delete it"), folder.opened():
        pass


def test_members_are_written_in_one_step(tmp_path):
    folder = RunFolder(tmp_path, {"a": 1})
    member = Member((1.5, 2.0), np.arange(4.0), float("nan"), 0.25, 3, 0.5)
    with folder.opened() as known:
        assert known == {}
        folder.add(member, 0)
        folder.add(member._replace(steps=4), 1)
    with folder.opened() as known:
        assert [known[(1.5, 2.0), number].steps for number in (0, 1)] == [3, 4]
    assert not list(tmp_path.glob("*.tmp"))


def rewrite(path, change):
    with safe_open(path, "pt") as file:
        metadata = dict(file.metadata())
    del metadata["sha256"]  # as in files without a hash, so that what reads the members has to notice
    tensors = load_file(path)
    change(tensors, metadata)
    save_file(tensors, path, metadata)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda t, m: t.pop("modes"), "no family"),
        (lambda t, m: m.update(parametric="9"), "no family"),
        (lambda t, m: t.update(coordinates=t["coordinates"][:1]), "damaged"),
        (lambda t, m: t.update(modes=t["modes"][:, :-1].contiguous()), "damaged"),
        (lambda t, m: t.update(coordinates=t["coordinates"] * torch.nan), "damaged"),
        (lambda t, m: t.update(parameters=t["parameters"].repeat(1, 2)), "damaged"),
        (lambda t, m: t["parameters"].fill_(3.0), "must differ"),
        (lambda t, m: (m.update(log="[true]"), t["parameters"].sub_(9)), "above 0"),
        (lambda t, m: t.update(parameters=t["parameters"].long()), "of torch.int64"),
        (lambda t, m: t.update(coordinates=t["coordinates"].bfloat16()), "of torch.bfloat16"),
        (lambda t, m: (t["coordinates"].mul_(1e200), t["modes"].mul_(1e200)), "beyond the dtype"),
        (lambda t, m: m.update(log="1"), "`log`"),
        (lambda t, m: m.update(config="{"), "parametric_adapter|JSON|broken|property"),
        (lambda t, m: m.update(config=json.dumps({"peft_type": "LORA"})), "LORA"),
        (lambda t, m: t.pop(next(name for name in t if name.endswith("lotra_core"))), "lotra_core|do not belong"),
    ],
)
def test_damaged_files_of_a_family(base, tmp_path, change, words):
    family = make(base)
    family.fit(PARAMETERS, progress=False)
    family.save_pretrained(tmp_path)
    rewrite(tmp_path / FILE, change)
    with pytest.raises(ValueError, match=words):
        ParametricAdapter.from_pretrained(base, tmp_path)


@pytest.mark.parametrize("name", ["coordinates", "modes", "parameters", "indicators", "log"])
def test_members_that_were_changed_are_noticed(base, tmp_path, name):
    family = make(base)
    family.fit(PARAMETERS, progress=False)
    family.save_pretrained(tmp_path)
    with safe_open(tmp_path / FILE, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(tmp_path / FILE)
    if name == "log":
        metadata["log"] = "[true]"
    else:
        tensors[name].view(-1)[0] += 1e-3
    save_file(tensors, tmp_path / FILE, metadata)
    with pytest.raises(ValueError, match="members are not those that were saved"):
        ParametricAdapter.from_pretrained(base, tmp_path)
