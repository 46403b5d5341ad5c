# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""What the extension of griffe makes of docstrings, for the API reference (extra `docs`)."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest


griffe = pytest.importorskip("griffe")
PATH = Path(__file__).parents[1] / "docs" / "reference_docstrings.py"


def sections(text: str, kind: str = "Class") -> dict:
    """The sections of a class, or a function, with this docstring, by kind."""
    spec = importlib.util.spec_from_file_location(PATH.stem, PATH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    shown = getattr(griffe, kind)("Shown")
    shown.docstring = griffe.Docstring(text, parent=shown)
    module.Docstrings().on_object(obj=shown)
    return {part.kind.value: part.value for part in griffe.parse_google(shown.docstring, warnings=False)}


def test_types_have_no_backticks() -> None:
    found = sections("It is.\n\nArgs:\n    a (`str`, *optional*): The first.\n    b ([`Module`]): One (`b`): two.\n")
    types = [parameter.annotation for parameter in found["parameters"]]
    assert [str(kind) for kind in types] == ["str", "Module"]  # griffe knows what is optional
    assert found["parameters"][1].description == "One (`b`): two."


def test_attributes_of_one_description_keep_their_names() -> None:
    found = sections("It is.\n\nAttributes:\n    a: One.\n    b, c, d: The others, of all (a, b): more.\n")
    assert [attribute.name.replace("\xa0", " ") for attribute in found["attributes"]] == ["a", "b, c, d"]
    assert found["attributes"][1].description == "The others, of all (a, b): more."


def test_errors_of_one_description() -> None:
    found = sections("It is.\n\nRaises:\n    ValueError, TypeError: As above.\n")
    assert [str(error.annotation) for error in found["raises"]] == ["ValueError", "TypeError"]


def test_attributes_in_the_way_of_peft_are_a_list() -> None:
    text = sections("It is.\n\n**Attributes**:\n    - **model** -- The model.\n    - **config** -- The config.\n")[
        "text"
    ]
    assert "**Attributes**:\n\n- **model** -- The model.\n- **config**" in text


def test_a_result_has_its_type_once() -> None:
    text = "It is.\n\nReturns:\n    `dict`: By name.\n\nRaises:\n    ValueError: It is wrong.\n"
    assert [part.description for part in sections(text, "Function")["returns"]] == ["By name."]
    assert sections(text).keys() == {"text", "raises"}  # of a class
    kept = sections("It is.\n\nReturns:\n    `shape` and `rank`: both.\n", "Function")["returns"][0]
    assert kept.description.endswith("both.")


def test_an_example_is_code() -> None:
    ((_, text),) = sections("It is.\n\nExample:\n    >>> 1 + 1\n    2\n")["examples"]
    assert text.startswith("```pycon\n>>> 1 + 1\n2\n")
