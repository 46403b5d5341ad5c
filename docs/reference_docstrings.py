# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Docstrings as the package writes them, for the API reference (an extension of griffe)."""

from __future__ import annotations

import re

import griffe


# an argument with its type, in PEFT's way
TYPED = re.compile(r"^( +\w+) \((.*`.*)\):$", re.MULTILINE)
# a call and what follows it, up to an empty line
DOCTEST = re.compile(r"^([ \t]*)>>> .*\n(?:[ \t]*\S.*\n)*", re.MULTILINE)


class Docstrings(griffe.Extension):
    """Shows a section "Example" as code, and "[`name`]", PEFT's reference to a name, as the name."""

    def on_object(self, *, obj: griffe.Object, **kwargs) -> None:
        if obj.docstring is not None:
            text = re.sub(r"\[(`[^`\]]+`)\](?![\[(])", r"\1", obj.docstring.value)
            text = TYPED.sub(lambda found: f"{found[1]} ({found[2].replace('`', '')}):", text)
            text = DOCTEST.sub(r"\1```pycon\n\g<0>\1```\n", text + "\n")
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)

    def on_attribute_instance(self, *, attr: griffe.Attribute, **kwargs) -> None:
        """Shows the default of a field that is declared by `option(default, check)`."""
        if isinstance(attr.value, griffe.ExprCall) and str(attr.value.function) == "option":
            default = attr.value.arguments[0]
            attr.value = "{}" if str(default) == "dict" else default
