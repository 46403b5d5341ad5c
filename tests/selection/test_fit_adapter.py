# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""`fit_adapter`: the choice that it makes, its comparison with references, and what it leaves alone."""

import copy
import itertools
import json

import pytest
import torch
from foreign import make_foreign
from helpers import lotra_layers, refused
from peft import PeftModel, get_peft_model
from torch import nn
from torch.nn.functional import binary_cross_entropy, cross_entropy, mse_loss, nll_loss
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

from peft_lotra import LinearPath, LoTRAConfig, create_lotra_optimizer, fit_adapter, start_from_data
from peft_lotra.kan import KAN
from peft_lotra.selection import fit
from peft_lotra.selection.data import assign_folds
from peft_lotra.selection.training import is_better


NAMES = {"base", "path", "adapter", "full"}


def make_base(*widths, **kwargs):
    torch.manual_seed(0)
    return KAN(widths or [3, 8, 2], dtype=torch.float64, **kwargs)


def make_rows(count=30, inputs=3):
    return torch.rand(count, inputs, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 2 - 1


def quick_fit(base, data, loss=mse_loss, **kwargs):
    """Fit in a few steps, without a progress bar."""
    return fit_adapter(base, data, loss, **{"steps": 4, "folds": 2, "progress": False, **kwargs})


def shifted(base, x):
    """Outputs of the base with half of the second input, plus a linear function."""
    scale = torch.tensor([1, 0.5, 1], dtype=torch.float64)[: x.shape[1]]
    return base(scale * x).detach() + x[:, :1]


@pytest.fixture(scope="module")
def rows():
    x = make_rows()
    return x, shifted(make_base(), x)


@pytest.fixture(scope="module")
def report(rows):
    """The report of a fit of `make_base()`, for tests that do not change it."""
    return quick_fit(make_base(), rows)


# --- the report ---


@pytest.fixture(scope="module")
def curved_rows():
    """Rows of a task that needs an adapter."""
    x = make_rows(120)
    return x, make_base()(x).detach() + torch.sin(3 * x[:, :2]) * x[:, 1:]


def test_the_model_is_saved_with_its_path_and_loaded_from_its_file(curved_rows, tmp_path):
    x, _ = curved_rows
    report = quick_fit(make_base(), curved_rows, steps=200)

    report.model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(LinearPath(make_base()), tmp_path)

    assert report.chosen == "adapter"
    assert_close(loaded(x), report.model.eval()(x))
    assert not torch.allclose(loaded.get_base_model().path.weight, torch.zeros(2, 3, dtype=torch.float64))


def test_the_report_has_all_rungs_and_prints_and_draws_them(report):
    assert report.scores.keys() == report.errors.keys() == NAMES
    assert report.chosen in NAMES
    assert report.errors[report.chosen] == 0
    lines = str(report).splitlines()
    assert {line.split("  ")[0] for line in lines[1:5]} == NAMES
    assert json.loads(json.dumps(report.as_dict()))["scores"] == report.scores
    assert len(report.plot().axes[0].patches) == len(NAMES)


@pytest.mark.filterwarnings("error:The start overwrites")
def test_a_seed_makes_the_result_and_the_global_generator_stays(rows):
    base = make_base()
    state = torch.random.get_rng_state()

    first, same, different = [quick_fit(copy.deepcopy(base), rows, seed=seed) for seed in (1, 1, 2)]

    assert first.scores == same.scores != different.scores
    assert_close(first.model(rows[0]), same.model(rows[0]), rtol=0, atol=0)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_tensors_that_require_a_gradient_get_none(rows, report):
    x, y = (tensor.clone().requires_grad_() for tensor in rows)

    scores = quick_fit(make_base(), (x, y)).scores

    assert scores == report.scores
    assert x.grad is y.grad is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("loss", [mse_loss, cross_entropy])
def test_a_base_of_half_precision_is_fitted_in_float32(rows, dtype, loss):
    base = make_base().to(dtype)
    x, y = (tensor.to(dtype) for tensor in rows)
    if loss is cross_entropy:
        y = (y[:, 0] > 0.1).long()
    single_y = y.float() if loss is mse_loss else y

    single = quick_fit(copy.deepcopy(base).float(), (x.float(), single_y), loss)
    report = quick_fit(base, (x, y), loss)

    assert report.scores == pytest.approx(single.scores)
    assert report.model(x).dtype == dtype
    assert_close(report.model(x).float(), single.model(x.float()), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_gradients_that_are_switched_off_do_not_matter(rows, report, context):
    base = make_base()

    with context():
        scores = quick_fit(base, rows).scores

    assert scores == report.scores


# --- the choice ---


def test_a_rung_is_taken_only_if_it_is_better_by_more_than_one_standard_error(rows):
    losses = {"base": torch.rand(100), "full": torch.rand(100)}
    losses["path"] = losses["base"] - 0.01 * torch.rand(100)

    assert is_better(losses["path"], losses["base"])
    assert not is_better(losses["base"], losses["path"])
    assert not is_better(losses["full"] - losses["full"].mean() + losses["base"].mean() - 0.01, losses["base"])


def test_the_base_is_chosen_where_it_is_right():
    base, x = make_base(), make_rows()
    y = base(x).detach()

    report = quick_fit(base, (x, y))

    assert report.chosen == "base"
    assert report.scores["base"] == pytest.approx(0, abs=1e-6)
    assert_close(report.model(x), y)


def test_the_base_is_scaled_where_that_helps():
    """The noise of 60 rows hides what a path could learn."""
    base, x = make_base(), make_rows(60)
    y = 0.5 * base(x).detach()

    report = quick_fit(base, (x, y + 1e-3 * torch.randn_like(y)), steps=1)

    assert report.model.get_base_model().path.scale.item() == pytest.approx(0.5, abs=0.02)


def test_the_path_is_chosen_where_the_task_is_linear():
    x = make_rows(40)
    y = x @ torch.tensor([[1.0, 3.0], [-2.0, 1.0], [0.5, 2.0]], dtype=torch.float64) + 7
    y += 0.3 * torch.randn(40, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    report = quick_fit(make_base(), (x, y), steps=100)

    assert report.chosen == "path"
    assert "less loss than the scaled base" in report.advice
    assert_close(report.model(x), y, rtol=0, atol=1.2)


def test_full_fine_tuning_is_named_where_it_is_better():
    x = make_rows(200)
    y = torch.sin(6 * x[:, :2] * x[:, 1:])

    report = quick_fit(make_base(), (x, y), steps=200)

    assert report.scores["full"] != report.scores[report.chosen]
    assert ("Full fine-tuning has" in report.advice) == (report.scores["full"] < report.scores[report.chosen])


def test_the_chosen_adapter_is_trained_on_the_path_of_all_rows_by_adam(curved_rows):
    """The learning rate decays along a cosine, and the path stays."""
    x, y = curved_rows
    report = quick_fit(make_base(), curved_rows, steps=200)
    model = get_peft_model(LinearPath(make_base()), LoTRAConfig(r=("full", "full", 1)))
    start_from_data(model, x, y, mse_loss)
    optimizer = create_lotra_optimizer(model, torch.optim.Adam, lr=1e-3, policy="uniform", eps=1e-10)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 200)

    for _ in range(200):
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        optimizer.step()
        scheduler.step()

    assert report.chosen == "adapter"
    assert_close(report.model(x), model(x), rtol=1e-3, atol=1e-3)


def test_a_base_with_a_path_gets_another_path(rows):
    x, _ = rows
    first = quick_fit(make_base(), rows).model.merge_and_unload()

    report = quick_fit(first, (x, first(x).detach() + 2 * x[:, :2]))

    assert report.chosen != "base"
    assert isinstance(report.model.get_base_model().network, KAN)


def test_inputs_that_are_no_vectors_have_no_path():
    base = nn.Sequential(nn.Flatten(), make_base(4, 5, 2))
    x = make_rows(30, 4).view(30, 2, 2)

    report = quick_fit(base, (x, base(x).detach() + x[:, 0]))

    assert report.scores.keys() == {"base", "adapter", "full"}
    assert report.model(x).shape == (30, 2)


@pytest.mark.parametrize("count, groups", [(30, None), (12, None), (30, [0, 1, 2] * 10)])
def test_a_wide_task_holds_out_one_tenth_or_two_rows_or_one_group(monkeypatch, count, groups):
    monkeypatch.setattr(fit, "_MANY_ROWS", 5)
    base, x = make_base(), make_rows(count)
    y = shifted(base, x)
    calls = []

    def loss(outputs, y):
        calls.append(len(outputs))
        return mse_loss(outputs, y)

    report = quick_fit(base, (x, y), loss, groups=groups)

    assert report.scores.keys() == NAMES
    held_out = 10 if groups else max(2, count // 10)
    assert count - held_out in calls  # the rows of the fold, in the fit of its scale


def test_integers_that_are_no_classes_are_held_out_and_measured_as_they_are():
    """Each integer occurs once, and a class with one row would not be held out."""
    base, x = make_base(3, 8, 1), make_rows()
    y = torch.arange(30)

    def loss(outputs, y):
        return mse_loss(outputs[:, 0], y.double())

    expected = loss(base(x), y).item()

    assert quick_fit(base, (x, y), loss).scores["base"] == pytest.approx(expected)


def test_scores_have_the_class_weights_of_the_loss():
    base, x = make_base(3, 8, 3), make_rows()
    y = torch.arange(30) % 5 % 3  # 12, 12 and 6 rows
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 5.0, 0.2], dtype=torch.float64))
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.zero_()  # each scale has the same loss
    expected = loss(base(x), y).item()

    report = quick_fit(base, (x, y), loss)

    assert report.scores["base"] == pytest.approx(expected)


def test_sums_of_weighted_rows_have_no_path_and_say_so(rows):
    x, _ = rows
    y = torch.arange(30) % 3 % 2
    loss = nn.CrossEntropyLoss(torch.tensor([1.0, 4.0], dtype=torch.float64), reduction="sum")
    expected = loss(make_base()(x), y).item() / 30

    report = quick_fit(make_base(), (x, y), loss)

    assert report.scores["base"] == pytest.approx(expected)
    assert "There is no path: " in report.advice


# --- networks and data ---


class Printing(nn.Module):
    """A network that `vmap` cannot run."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        float(x.sum())
        return self.network(x)


def test_networks_that_vmap_cannot_run_are_trained_fold_by_fold_to_the_same_scores(rows, report):
    scores = quick_fit(Printing(make_base()), rows).scores

    assert scores == pytest.approx(report.scores, rel=1e-6)


@pytest.mark.parametrize("name", ["efficient-kan", "fast-kan", "cheby-kan", "pykan", "hard"])
def test_networks_of_other_libraries_are_adapted(name):
    """Also after a pass with gradients: pykan keeps tensors of the pass."""
    base, x = make_foreign(name), make_rows(inputs=2).abs()
    y = base(x).detach() + x[:, :1]

    report = quick_fit(base, (x, y))

    assert report.scores.keys() == NAMES
    assert torch.tensor(list(report.scores.values())).isfinite().all()


@pytest.mark.parametrize("as_loader", [False, True])
def test_datasets_and_loaders_give_the_result_of_their_tensors(rows, report, as_loader):
    data = TensorDataset(*rows)
    if as_loader:
        data = DataLoader(data, batch_size=7)

    assert quick_fit(make_base(), data).scores == report.scores


@pytest.mark.parametrize("widths, shape", [((1, 4, 1), (30, 1)), ((3, 8, 1), (30,))])
def test_single_inputs_and_outputs_are_taken(widths, shape):
    base, x = make_base(*widths), make_rows(inputs=widths[0])
    network = nn.Sequential(base, nn.Flatten(0)) if len(shape) == 1 else base

    report = quick_fit(network, (x, shifted(base, x).view(shape)))

    assert report.model(x).shape == shape


def test_running_statistics_stay_and_dropout_is_drawn():
    base = nn.Sequential(make_base(norm="batch"), nn.Dropout(0.5))
    x = make_rows()
    norm = base[0].layers[1]
    state = copy.deepcopy(norm.state_dict())

    report = quick_fit(base, (x, x[:, :2] ** 2))

    assert report.scores.keys() == NAMES
    assert_close(norm.state_dict(), state, rtol=0, atol=0)


# --- folds ---


def test_folds_are_of_equal_size_and_each_has_its_share_of_a_class():
    y = torch.tensor([0] * 10 + [1] * 5 + [2])

    (fold,) = assign_folds(y, 5, None, False, are_classes=True)

    assert fold[:10].bincount().tolist() == [2] * 5
    assert fold[10:15].bincount().tolist() == [1] * 5
    assert fold[15] == -1


def test_the_rows_of_a_group_and_of_a_block_are_held_out_together():
    y = torch.zeros(12, 1)
    groups = list("abcdefabcdef")

    (by_group,) = assign_folds(y, 3, groups, blocked=False, are_classes=False)
    (by_block,) = assign_folds(y, 3, None, blocked=True, are_classes=False)

    assert torch.equal(by_group[:6], by_group[6:])
    assert by_group.bincount().tolist() == [4, 4, 4]
    assert by_block.tolist() == [0] * 4 + [1] * 4 + [2] * 4


# --- what is refused ---


CLASSES = torch.arange(30) % 2


@pytest.mark.parametrize(
    "change, message",
    [
        ({"data": (make_rows()[:0], CLASSES[:0])}, "at least one"),
        ({"data": (make_rows(), CLASSES[:20])}, "the same number of both"),
        ({"data": (make_rows() * torch.nan, CLASSES)}, "NaN"),
        ({"data": (make_rows()[:1], CLASSES[:1])}, "fewer folds"),
        ({"folds": 31}, "fewer folds"),
        ({"groups": "a" * 30}, "fewer folds"),
        ({"folds": 1}, "folds"),
        ({"groups": [0, 1] * 10}, "20 entries"),
        ({"groups": [0, 1] * 15, "folds": 2}, "without the classes"),
        ({"data": (make_rows(), CLASSES.sort().values), "blocked": True, "folds": 2}, "without the classes"),
        ({"loss": lambda outputs, y: cross_entropy(outputs, y, reduction="none")}, "one value"),
        ({"data": (make_rows().numpy(), CLASSES)}, "as tensors"),
        ({"data": DataLoader([{"x": row, "y": 0} for row in make_rows()])}, "a pair of tensors"),
        ({"data": (make_rows(), CLASSES * 1.0), "loss": lambda o, y: mse_loss(o[:, :1], y)}, "broadcasts"),
        ({"storage": "float8"}, "storage"),
    ],
)
def test_bad_input_is_refused_before_training(change, message):
    base = make_base()
    arguments = {"data": (make_rows(), CLASSES), "loss": cross_entropy, **change}

    with refused(message):
        quick_fit(base, **arguments)

    assert not lotra_layers(base)


def test_losses_of_probabilities_are_refused_since_a_path_has_none():
    x = make_rows()

    with refused("cross_entropy"):
        quick_fit(nn.Sequential(make_base(), nn.LogSoftmax(1)), (x, CLASSES), nll_loss)
    with refused("logits"):
        quick_fit(nn.Sequential(make_base(), nn.Sigmoid()), (x, x[:, :2].abs()), binary_cross_entropy)


def test_rows_without_a_loss_are_refused():
    classes = torch.where(torch.arange(30) % 10 == 7, -100, CLASSES)

    with refused("single rows"):
        quick_fit(make_base(), (make_rows(), classes), cross_entropy)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_the_base_is_unchanged_after_an_interruption(rows, error):
    base = make_base()
    state = copy.deepcopy(base.state_dict())
    calls = itertools.count()

    def loss(outputs, y):
        if next(calls) >= 60:
            raise error
        return mse_loss(outputs, y)

    with pytest.raises(error):
        quick_fit(base, rows, loss)

    assert not lotra_layers(base)
    assert_close(base.state_dict(), state, rtol=0, atol=0)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in base.parameters())


def test_a_base_with_adapters_is_refused():
    x = make_rows()

    with refused("has adapters"):
        quick_fit(get_peft_model(make_base(), LoTRAConfig(r=1)), (x, x[:, :2]))
