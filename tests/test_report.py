# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The base of the reports, and the table of a model; other reports are tested beside what makes them."""

import html
import json
from dataclasses import dataclass

import pytest
import torch
from helpers import adapt, base, nested
from peft import get_peft_model

from peft_lotra import LoTRAConfig, model_summary
from peft_lotra.kan import KAN
from peft_lotra.modules.report import Report, TextTable, printable


@dataclass(frozen=True)
class Sizes(Report):
    sizes: dict[str, int]
    titles: tuple[str, ...] = ("layer", ">size")

    def _table(self):
        rows = [[name, str(size)] for name, size in self.sizes.items()]
        return TextTable(list(self.titles), rows, ["as [bold] as <b>&"])


SIZES = {"layers.0": 8, "a [red] <i>&": 1200}


def assert_shows(report, lines):
    """The same text in `print` and in a notebook."""
    assert str(report).splitlines() == lines
    assert html.unescape(report._repr_html_()) == f"<pre>{report}</pre>"


def test_text_is_aligned():
    lines = ["layer         size", "layers.0         8", "a [red] <i>&  1200", "as [bold] as <b>&"]

    assert_shows(Sizes(SIZES), lines)
    assert "&lt;i&gt;&amp;" in Sizes(SIZES)._repr_html_()
    assert_shows(Sizes(SIZES, titles=("", ">")), lines[1:])  # no header
    assert_shows(Sizes({}), lines[-1:])


def test_as_dict_is_json():
    @dataclass(frozen=True)
    class Errors(Report):
        errors: dict[tuple[str, str], float]
        values: torch.Tensor
        layers: dict[str, Sizes]

        def _table(self):
            return TextTable([], [])

    report = Errors({("kan", "default"): 0.5}, torch.eye(2), {"x": Sizes({"y": 3})})
    assert json.loads(json.dumps(report.as_dict())) == {
        "errors": {"kan.default": 0.5},
        "values": [[1.0, 0.0], [0.0, 1.0]],
        "layers": {"x": {"sizes": {"y": 3}, "titles": ["layer", ">size"]}},
    }
    assert str(report) == ""


def test_control_characters_are_escaped():
    text, escaped = "é\x1b[2J\x9b31m\r\n\t\u202e\u2066\udcff", r"é\x1b[2J\x9b31m\r\n\t\u202e\u2066\udcff"
    assert printable(text) == escaped
    assert printable("é (2, 2) %") == "é (2, 2) %"

    class Names(Report):
        def _table(self):
            return TextTable(["name"], [[text]], [text])

    assert_shows(Names(), ["name", escaped, escaped])


def test_a_line_for_each_adapter_of_each_layer():
    model = adapt(nested(), adapter_name="first", target_modules=["body.0", "body.1"], modules_to_save=["head"])
    config = LoTRAConfig(r=2, alpha=0.5, target_modules=["body.1", "tail.layers.0"], adapt_residual=False)
    model.add_adapter("second", config)
    summary = model_summary(model)

    assert [(line.layer, line.kind, line.adapter) for line in summary] == [
        ("body.0", "peft-lotra", "first"),
        ("body.1", "cheby-kan", "first"),
        ("body.1", "cheby-kan", "second"),
        ("tail.layers.0", "peft-lotra", "second"),
        ("tail.layers.1", "peft-lotra", None),
    ]

    first, _, second, _, bare = summary

    assert first.shape == (5, 3, 8)
    assert first.has_residual
    assert first.ranks == (2, "full", 4)
    assert first.scale == 1.0
    assert first.parameters == 2 * 3 * 4 + 5 * 2 + 9 * 4 == first.trainable
    assert first.kilobytes == first.parameters * 4 / 1000
    assert (first.active, second.active, second.trainable, second.scale) == (True, False, 0, 0.5)
    assert (bare.ranks, bare.parameters, bare.scale, bare.active, bare.merged) == (None, 0, None, False, False)


def test_totals_are_those_of_print_trainable_parameters():
    model = adapt(nested(), modules_to_save=["head"])
    summary = model_summary(model)

    assert (summary.trainable_parameters, summary.all_parameters) == model.get_nb_trainable_parameters()
    # counted by hand: the components of all adapters, and the head
    assert summary.trainable_parameters == sum(line.trainable for line in summary) + 5 * 2 + 2

    state = model.state_dict().values()

    assert summary.kilobytes == pytest.approx(sum(t.numel() * t.element_size() for t in state) / 1000)


def test_the_state_follows_the_model():
    model = adapt(base("own"))
    model.merge_adapter()

    assert model_summary(model)[0].merged

    model.unmerge_adapter()
    next(module for module in model.modules() if hasattr(module, "set_scale")).set_scale("default", 3)
    with model.disable_adapter():
        assert not model_summary(model)[0].active
    line = model_summary(model)[0]

    assert line.active
    assert not line.merged
    assert line.scale == 3


def test_table_and_json():
    summary = model_summary(adapt(nested()))

    for expected in ("tail.layers.1", "cheby-kan", "(4, 5, 5)", "(2, full, 4)", "default", "active", "+1: the"):
        assert expected in str(summary)
    assert f"{summary.trainable_parameters:,} of {summary.all_parameters:,} parameters trainable" in str(summary)

    values = json.loads(json.dumps(summary.as_dict()))

    assert values["layers"][0]["ranks"] == [2, "full", 4]
    assert values["all_parameters"] == summary.all_parameters


def test_other_models():
    assert list(model_summary(torch.nn.Linear(2, 3))) == []
    assert model_summary(KAN([2, 3]))[0].adapter is None
    assert "not adapted" in str(model_summary(KAN([2, 3])))

    compiled = torch.compile(get_peft_model(KAN([2, 3]), LoTRAConfig(r=1)), backend="eager")

    assert model_summary(compiled)[0].adapter == "default"
