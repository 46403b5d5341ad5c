# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The base, and the family, that tests share."""

import family_problems as problems
import numpy as np
import pytest

from peft_lotra import ParametricAdapter


@pytest.fixture(scope="session")
def base():
    return problems.pretrained()


@pytest.fixture(scope="session")
def family(base):
    family = ParametricAdapter(base, problems.terms_of, ranks=6)
    family.fit(np.linspace(2.5, 3.5, 13).tolist(), progress=False)
    return family
