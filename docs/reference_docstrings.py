# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Docstrings as the package writes them, for the API reference (an extension of griffe)."""

from __future__ import annotations

import re
import textwrap

import griffe


# an argument with its type, in PEFT's way
TYPED = re.compile(r"^( +\w+) \((.*?`.*?)\):(?= |$)", re.MULTILINE)
# a result with its type, in PEFT's way, which the signature has; a class has no result
RESULT = re.compile(r"^(Returns:\n +)`[\w.]+`: ", re.MULTILINE)
OF_CLASS = re.compile(r"^Returns:\n(?: .*\n?)+\n*", re.MULTILINE)
# several of one description
ATTRIBUTES = re.compile(r"(?<=^Attributes:\n)(?: .*\n?)+", re.MULTILINE)
NAMES = re.compile(r"^ {4}(\w+(?:, \w+)*)(?=: )", re.MULTILINE)
ERRORS = re.compile(r"^( +)(\w+Error), (\w+Error)(: .*)$", re.MULTILINE)
# the attributes of a class in PEFT's way
LISTED = re.compile(r"^(\*\*Attributes\*\*:\n)((?: .*\n?)+)", re.MULTILINE)
# a field that only files have, in an argument section
INTERNAL = re.compile(
    r"^( +)(\w+) \([^\n]*\):\s+Internal\.[^\n]*\n(?:\1 +[^\n]*\n)*",
    re.MULTILINE,
)
# a call and what follows it, up to an empty line
DOCTEST = re.compile(r"^([ \t]*)>>> .*\n(?:[ \t]*\S.*\n)*", re.MULTILINE)


def with_type(names: re.Match, obj: griffe.Object) -> str:
    """Names with their type, or with an empty one: griffe would repeat the type of the line before.

    The spaces between names do not break: griffe takes what follows a space for a type.
    """
    members = [obj.members.get(name) for name in names[1].split(", ")]
    annotations = [getattr(member, "annotation", None) for member in members]
    if len(members) == 1 and None not in annotations:
        return names[0]  # griffe finds the type
    types = {str(annotation or "") for annotation in annotations}
    joined = names[0].replace(", ", ",\xa0")
    return f"{joined} ({types.pop() if len(types) == 1 else ''})"


class Docstrings(griffe.Extension):
    """Shows a section "Example" as code, and "[`name`]", PEFT's reference to a name, as the name.

    Fields of a dataclass that its docstring calls internal are left out, of the signature too.
    """

    def on_class_members(self, *, cls: griffe.Class, **kwargs) -> None:
        """Remove internal fields before griffe makes the signature of the dataclass."""
        if cls.docstring is None:
            return
        for field in INTERNAL.finditer(cls.docstring.value):
            cls.members.pop(field[2], None)
        cls.docstring.value = INTERNAL.sub("", cls.docstring.value)

    def on_object(self, *, obj: griffe.Object, **kwargs) -> None:
        if obj.docstring is not None:
            text = re.sub(
                r"\[(`[^`\]]+`)\](?![\[(])", r"\1", obj.docstring.value
            )
            text = TYPED.sub(
                lambda found: f"{found[1]} ({re.sub('[`*]', '', found[2])}):",
                text,
            )
            text = (
                OF_CLASS.sub("", text)
                if obj.is_class
                else RESULT.sub(r"\1", text)
            )
            text = ATTRIBUTES.sub(
                lambda found: NAMES.sub(
                    lambda names: with_type(names, obj), found[0]
                ),
                text,
            )
            text = ERRORS.sub(r"\1\2\4\n\1\3\4", text)
            text = LISTED.sub(
                lambda found: f"{found[1]}\n{textwrap.dedent(found[2])}", text
            )
            text = DOCTEST.sub(r"\1```pycon\n\g<0>\1```\n", text + "\n")
            obj.docstring.value = re.sub(
                r"^Example:$", "Examples:", text, flags=re.MULTILINE
            )

    def on_attribute_instance(
        self, *, attr: griffe.Attribute, **kwargs
    ) -> None:
        """Shows the default of a field that is declared by `option(default, check)`."""
        if (
            isinstance(attr.value, griffe.ExprCall)
            and str(attr.value.function) == "option"
        ):
            default = attr.value.arguments[0]
            attr.value = "{}" if str(default) == "dict" else default
