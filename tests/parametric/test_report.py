# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json

import numpy as np

from peft_lotra.parametric.members import Member
from peft_lotra.parametric.report import FamilyReport


def test_the_table_and_the_plain_values():
    members = [Member((c, 1.0), np.zeros(3), 0.5, 0.1, 4, 0.2) for c in (2.0, 1.0)]
    report = FamilyReport(members, {3.0: "ValueError: no"}, 1.5, 3)
    text = str(report)
    assert text.index("1, 1") < text.index("2, 1") and "not fitted: 3.0: ValueError: no" in text
    assert "1.5 of what it may be" in text
    values = json.loads(json.dumps(report.as_dict()))
    assert values["failed"] == {"3.0": "ValueError: no"} and "vector" not in values["members"][0]
