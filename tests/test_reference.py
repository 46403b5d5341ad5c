# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""What the extension of griffe makes of docstrings, for the API reference (extra `docs`)."""

from pathlib import Path

import pytest
from helpers import load_script


griffe = pytest.importorskip("griffe")
PATH = Path(__file__).parents[1] / "docs" / "reference_docstrings.py"


def sections(text, kind="Class"):
    """The sections of a class, or a function, with this docstring, by kind."""
    shown = getattr(griffe, kind)("Shown")
    shown.docstring = griffe.Docstring(text, parent=shown)
    load_script(PATH).Docstrings().on_object(obj=shown)
    return {part.kind.value: part.value for part in griffe.parse_google(shown.docstring, warnings=False)}


DOCSTRING = """It is.

Args:
    a (`str`, *optional*): The first.
    b ([`Module`]): One (`b`): two.

Attributes:
    c, d: Both, of all (c, d): more.

Raises:
    ValueError, TypeError: As above.

Example:
    >>> 1 + 1
    2
"""


def test_each_section_of_a_docstring():
    found = sections(DOCSTRING)
    types = [parameter.annotation for parameter in found["parameters"]]

    assert [str(kind) for kind in types] == ["str", "Module"]  # griffe knows what is optional
    assert found["parameters"][1].description == "One (`b`): two."

    (attribute,) = found["attributes"]

    assert attribute.name.replace("\xa0", " ") == "c, d"
    assert attribute.description == "Both, of all (c, d): more."
    assert [str(error.annotation) for error in found["raises"]] == ["ValueError", "TypeError"]

    ((_, example),) = found["examples"]

    assert example.startswith("```pycon\n>>> 1 + 1\n2\n")


def test_attributes_in_the_way_of_peft_are_a_list():
    attributes = sections(
        "It is.\n\n**Attributes**:\n    - **model** -- The model.\n    - **config** -- The config.\n"
    )
    assert "**Attributes**:\n\n- **model** -- The model.\n- **config**" in attributes["text"]


def test_a_result_has_its_type_once():
    text = "It is.\n\nReturns:\n    `dict`: By name.\n"

    assert [part.description for part in sections(text, "Function")["returns"]] == ["By name."]
    assert sections(text).keys() == {"text"}  # of a class

    kept = sections("It is.\n\nReturns:\n    `shape` and `rank`: both.\n", "Function")["returns"][0]

    assert kept.description.endswith("both.")


def test_fields_that_only_files_have_are_not_shown():
    text = (
        "It is.\n\nArgs:\n    r (`int`):\n        The rank.\n    digest (`Optional[str]`):\n"
        "        Internal. In a file,\n        the digest.\n    s (`int`):\n        The size."
    )
    shown = griffe.Class("Shown", docstring=griffe.Docstring(text))
    for name in ("r", "digest", "s"):
        shown.set_member(name, griffe.Attribute(name))

    load_script(PATH).Docstrings().on_class_members(cls=shown)

    assert list(shown.members) == ["r", "s"]
    assert shown.docstring.value == text.replace(text[text.index("    digest") : text.index("    s (")], "")
