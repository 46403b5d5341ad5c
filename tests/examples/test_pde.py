# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import numpy as np
import pytest
import torch


def test_unknown_family(pde) -> None:
    with pytest.raises(ValueError, match="no family .navier_stokes.; there are elliptic, "):
        pde("problems.families").find_family("navier_stokes")


@pytest.mark.parametrize("name", ["elliptic", "allen_cahn", "reaction_diffusion", "burgers"])
def test_parameter_out_of_range(pde, name) -> None:
    family = pde("problems.families").find_family(name)
    low, high = family.bounds
    for parameter in (low - 0.1, high + 0.1, float("nan")):
        with pytest.raises(ValueError, match=f"{family.parameter_name} = .* is out of the range {low} to {high}"):
            family.reference(parameter)


@pytest.mark.parametrize("name", ["elliptic", "allen_cahn", "reaction_diffusion", "burgers"])
def test_references_are_exact_enough(pde, name) -> None:
    """The residuals cannot tell: they are of the network. Twice the resolution does, at the hardest target."""
    families = pde("problems.families")
    family = families.find_family(name)
    if name == "elliptic":  # twice the resolution is a dense system of 5000 unknowns
        exact, coarse = (family.solve(family.targets["far"], n) for n in (44, family.resolution))
        assert np.linalg.norm(exact - coarse) < 1e-6 * np.linalg.norm(exact)
    else:
        assert family.reference_error(family.targets["far"]) < 1e-6


def test_burgers_is_the_cole_hopf_solution(pde) -> None:
    families = pde("problems.families")
    family = families.FAMILIES["burgers"]
    exact = families.cole_hopf(family.base)
    ours = family.reference(family.base).reshape(exact.shape).numpy()
    assert np.linalg.norm(ours - exact) < 1e-6 * np.linalg.norm(exact)


def test_every_method_has_a_rate_for_every_target(pde) -> None:
    families, methods = pde("problems.families"), pde("problems.methods")
    for method in methods.METHODS.values():
        for family in families.FAMILIES.values():
            rates = [method.rate(family.name, target) for target in family.targets]
            assert all(rates) if method.lr else rates == [None] * 3


def test_ranks_leave_three_fifths_of_the_parameters(pde) -> None:
    methods = pde("problems.methods")
    setting = methods.Setting()
    base = methods.new_network(setting, 0)
    total = sum(p.numel() for p in base.parameters())
    share = [sum(p.numel() for p in methods.METHODS[name].model(base, setting, 0).parameters() if p.requires_grad)
             for name in ("lotra_small_lm", "lotra_lm", "lora_adam")]  # fmt: skip
    assert share[0] < share[1] <= 0.4 * total
    assert share[1] <= share[2]


def test_newton_start(pde, tmp_path) -> None:
    """One step of all parameters, as an adapter: the base stays, the ranks are those asked for, and error is gone."""
    families, methods = pde("problems.families"), pde("problems.methods")
    family, setting = families.FAMILIES["burgers"], methods.QUICK
    parameter = family.targets["near"]
    base = methods.pretrained(family, setting, 0, tmp_path)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    terms = family.terms(parameter, torch.Generator().manual_seed(0), setting.points)
    for name in ("lotra_lm", "lotra_small_lm"):
        random = methods.METHODS[name].model(base, setting, 0)
        started = methods.newton_start(base, random, terms)
        shapes = [
            {key: p.shape for key, p in model.named_parameters() if p.requires_grad} for model in (random, started)
        ]
        assert shapes[0] == shapes[1]
        errors = [families.relative_error(model, family.reference(parameter)) for model in (random, started)]
        assert errors[1] < 0.7 * errors[0]
    assert all(torch.equal(before[name], tensor) for name, tensor in base.state_dict().items())


def test_a_run_is_kept(pde, tmp_path, monkeypatch) -> None:
    families, methods, transfer = pde("problems.families"), pde("problems.methods"), pde("transfer")
    family, setting = families.FAMILIES["allen_cahn"], methods.QUICK
    lines = [methods.run(name, family, "near", setting, 0, tmp_path) for name in ("full_adam", "lotra_lm")]
    assert lines[1]["curve"][-1][2] < lines[1]["curve"][0][2]
    monkeypatch.setattr(methods, "train", None)
    assert methods.run("lotra_lm", family, "near", setting, 0, tmp_path)["method"] == "lotra_lm"
    rows = transfer.summarize(lines)
    assert [row["method"] for row in rows] == ["full_adam", "lotra_lm"]
    assert rows[0]["error_at_equal_seconds"] == pytest.approx(lines[0]["curve"][-1][2])


def test_seconds_and_errors_of_a_run(pde) -> None:
    transfer = pde("transfer")
    curve = [(0, 0.0, 0.5), (1, 1.0, 0.2), (2, 2.0, 0.3), (3, 3.0, 0.1)]
    assert transfer.error_at(curve, 1, 2.5) == 0.3
    assert transfer.error_at(curve, 0, 3) == 0.1
    assert transfer.seconds_to(curve, 0.25) == 1.0
    assert transfer.seconds_to(curve, 0.01) is None
