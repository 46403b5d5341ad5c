# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""A family of adapters that knows its parameter."""

import pytest
import torch
from peft import PeftModel

from peft_lotra import ParametricAdapter
from peft_lotra.kan import KAN


X = torch.linspace(-1, 1, 25)[:, None]


def solution(c):
    return c * X.cos() + X.square()


def terms_of(c):
    return [(lambda model, x, y: model(x) - y, (X, solution(c)))]


def base():
    torch.manual_seed(0)
    return KAN([1, 4, 1])


@pytest.fixture(scope="module")
def family():
    kan = base()
    family = ParametricAdapter(kan, terms_of, ranks=4)
    assert not family.fit([0.5, 1.0, 1.5, 2.0], progress=False).failed
    assert torch.equal(kan(X), base()(X))
    return family


def test_predictions(family):
    assert family.parameters == [0.5, 1.0, 1.5, 2.0]
    for c in (0.6, 1.2, 1.9):
        prediction = family.predict(c)
        assert not prediction.extrapolated
        error = (prediction(X) - solution(c)).square().mean().sqrt().item()
        assert prediction.residual == pytest.approx(error, rel=1e-3) and error < 0.1
        assert family.refine(c, steps=2).residual <= prediction.residual
    with pytest.raises(ValueError, match="force"):
        family.predict(3.0)
    assert family.predict(3.0, force=True).extrapolated


def test_saved_and_loaded(family, tmp_path):
    family.save_pretrained(tmp_path / "family")
    loaded = ParametricAdapter.from_pretrained(base(), tmp_path / "family")
    assert loaded.parameters == family.parameters
    torch.testing.assert_close(loaded.predict(1.3)(X), family.predict(1.3)(X))
    loaded.as_adapter(1.3).save_pretrained(tmp_path / "member")
    model = PeftModel.from_pretrained(base(), tmp_path / "member")
    torch.testing.assert_close(model(X), family.predict(1.3)(X))
