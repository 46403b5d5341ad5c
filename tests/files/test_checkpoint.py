# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import pytest

from peft_lotra.files.checkpoint import HASHES, RECORD, Checkpoint, by_short_name, refuse


SHAPES = {"base_model.model.kan.lotra_core": (2, 2, 2), "base_model.model.head.weight": (3, 1)}
LAYER = {"family": "own", "shape": [1, 2, 3], "has_residual": True}


def test_tensors_of_the_digest_belong_to_the_config():
    assert Checkpoint(digest="a").with_tensors(SHAPES, "a", "here").tensors == {
        "kan.lotra_core": (2, 2, 2),
        "head.weight": (3, 1),
    }
    assert Checkpoint().with_tensors(SHAPES, "a", "here").tensors is not None
    with pytest.raises(ValueError, match="tensors in here do not belong together"):
        Checkpoint(digest="b").with_tensors(SHAPES, "a", "here")


def test_a_prefix_in_front_of_some_names_only():
    """Otherwise one of two tensors hides the other, and its shape is that of neither file."""
    assert by_short_name({"a": 1, "b": 2}) == by_short_name({"base_model.model.a": 1, "base_model.model.b": 2})
    assert by_short_name({"base_model.model.base_model.model.a": 1}) == {"base_model.model.a": 1}
    with pytest.raises(ValueError, match="(?s)not begin with 'base_model.model.'.*\n  kan.lotra_core\n"):
        Checkpoint().with_tensors({**SHAPES, "kan.lotra_core": ()}, "a", "here")


def test_shapes():
    checkpoint = Checkpoint().with_tensors(SHAPES, "a", "here")
    checkpoint.check_shapes({"kan.lotra_core": (2, 2, 2)})
    checkpoint.check_shapes({})
    with pytest.raises(ValueError, match=r"kan.lotra_core: \(2, 2, 2\) in the checkpoint, \(3, 2, 2\) by its config"):
        checkpoint.check_shapes({"kan.lotra_core": (3, 2, 2)})
    with pytest.raises(ValueError, match="kan.other: nothing in the checkpoint"):
        checkpoint.check_shapes({"kan.other": (1,)})


def test_names():
    checkpoint = Checkpoint().with_tensors(SHAPES, "a", "here")
    checkpoint.check_names(["kan.lotra_core"], ["head.weight", "not.there"])
    with pytest.raises(ValueError, match="(?s)not fit.*  x is missing\n.*  head.weight is nothing that this"):
        checkpoint.check_names(["kan.lotra_core", "x"], [])


def test_long_lists_of_problems_are_cut():
    refuse("Nothing:", [])
    with pytest.raises(ValueError) as caught:
        refuse("Much:", [f"problem {n}" for n in range(100)], "Remedy.")
    lines = str(caught.value).splitlines()
    assert lines[0] == "Much:" and lines[-2:] == ["  ...", "Remedy."] and len(lines) == 23


@pytest.mark.parametrize(
    "value", [None, [], {1: LAYER}, {"a": {**LAYER, "shape": [1, 2]}}, {"a": {**LAYER, "grid": {"float32": 1}}}]
)
def test_what_is_no_record(value):
    assert not RECORD[0](value)


def test_records_and_hashes():
    assert RECORD[0]({}) and RECORD[0]({"a": LAYER, "b": {**LAYER, "grid": {"float32": "0"}}})
    assert HASHES[0]({"config": "1"}) and not HASHES[0]({"config": 1}) and not HASHES[0]("config")
