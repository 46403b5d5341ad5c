# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""`fit_adapter`: the choice that it makes, its comparison with references, and what it leaves alone."""

import copy
import itertools
import json

import pytest
import safetensors.torch
import torch
from foreign import make_foreign
from helpers import lotra_layers, refused
from peft import PeftModel, get_peft_model
from torch import nn
from torch.nn.functional import binary_cross_entropy, cross_entropy, mse_loss, nll_loss
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

from peft_lotra import LoTRAConfig, fit_adapter, start_from_gradient
from peft_lotra.kan import KAN
from peft_lotra.selection import fit
from peft_lotra.selection.data import assign_folds


NAMES = {"base", "linear", "last layer", "adapter", "full", "scratch"}


def make_base(*widths, **kwargs):
    torch.manual_seed(0)
    return KAN(widths or [3, 8, 2], dtype=torch.float64, **kwargs)


def make_rows(count=30, inputs=3):
    return torch.rand(count, inputs, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 2 - 1


def quick_fit(base, data, loss=mse_loss, **kwargs):
    """Fit in a few steps, without a progress bar."""
    return fit_adapter(base, data, loss, **{"steps": 4, "folds": 2, "budget": 0.3, "progress": False, **kwargs})


def shifted(base, x):
    """Targets near the outputs of the base."""
    return base(x).detach() + 0.3 * x[:, :1] ** 2


@pytest.fixture(scope="module")
def rows():
    x = make_rows()
    return x, shifted(make_base(), x)


@pytest.fixture(scope="module")
def report(rows):
    """The report of a fit of `make_base()`, for tests that do not change it."""
    return quick_fit(make_base(), rows)


# --- the report ---


def test_the_adapted_base_is_saved_with_its_ranks_and_loaded_from_its_file(rows, report, tmp_path):
    x, _ = rows
    base = make_base()

    report.model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base, tmp_path)

    assert_close(loaded(x), report.model.eval()(x))
    ranks = [layer.get_components("default").form for layer in lotra_layers(base).values()]
    assert ranks == list(report.chosen.ranks.values())
    assert report.bytes == (tmp_path / "adapter_model.safetensors").stat().st_size
    assert report.parameters == report.model.get_nb_trainable_parameters()[0]


def test_the_report_has_all_references_and_prints_and_draws_them(report):
    assert report.scores.keys() == report.errors.keys() == report.sizes.keys() == NAMES
    assert report.advice in NAMES
    lines = str(report).splitlines()
    assert {line.split("  ")[0] for line in lines[1:7]} == NAMES
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
    for name, parameter in report.model.named_parameters():
        expected = single.model.get_parameter(name)
        assert_close(parameter, expected if "lotra_" in name else expected.to(dtype))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_gradients_that_are_switched_off_do_not_matter(rows, report, context):
    base = make_base()

    with context():
        scores = quick_fit(base, rows).scores

    assert scores == report.scores


def test_the_configuration_says_how_the_adapter_started(report):
    """An optimizer that goes on takes its learning rates from it."""
    assert report.model.peft_config["default"].init_weights == "gradient"


# --- the choice ---


def test_the_usual_rate_is_chosen_unless_another_is_better_by_more_than_one_standard_error():
    generator = torch.Generator().manual_seed(1)
    base = make_base()
    x = torch.rand(20, 3, dtype=torch.float64, generator=generator) * 2 - 1
    noise = torch.randn(20, 2, dtype=torch.float64, generator=generator)
    y = shifted(base, x) + 0.1 * noise

    report = quick_fit(base, (x, y), steps=10)

    assert report.chosen.rate == 1e-2
    assert {ranks[:2] for ranks in report.chosen.ranks.values()} == {("full", "full")}


def test_the_chosen_adapter_is_trained_on_all_rows_by_adam(rows):
    """The learning rate decays along a cosine."""
    x, y = rows
    report = quick_fit(make_base(), rows, budget=0.15)  # full matrices exceed it
    model = get_peft_model(make_base(), LoTRAConfig(rank_pattern=report.chosen.ranks))
    start_from_gradient(model, lambda: mse_loss(model(x), y))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=report.chosen.rate, eps=1e-12)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)

    for _ in range(4):
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        optimizer.step()
        scheduler.step()

    assert "full matrices exceed the budget" in str(report)
    assert_close(report.model(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("noise", [0.01, 0])
def test_no_adaptation_is_chosen_where_the_base_is_right(noise):
    base, x = make_base(), make_rows()
    y = base(x).detach()

    report = quick_fit(base, (x, y + noise * make_rows(inputs=2)), ensemble=True)

    assert (report.advice, report.chosen.rate, report.bank) == ("base", 0, None)
    assert "adapter: no adaptation" in str(report)
    assert report.scores["base"] == report.scores["adapter"] == pytest.approx(0, abs=noise**2)
    assert ("the gradient of the loss is zero at the base" in str(report)) == (noise == 0)
    assert "exceed" not in str(report)
    assert_close(report.model(x), y, rtol=0, atol=0)


def test_a_fold_without_a_gradient_has_no_update():
    """A single row differs from the base: its fold trains on rows that the base fits."""
    base, x = make_base(), make_rows(100)
    y = base(x).detach()
    y[0] += 1

    report = quick_fit(base, (x, y))

    assert report.scores.keys() == NAMES
    assert report.chosen.rate == 0


def test_a_linear_model_is_advised_where_the_base_does_not_help():
    x = make_rows(40)
    y = x @ torch.tensor([[1.0, 3.0], [-2.0, 1.0], [0.5, 2.0]], dtype=torch.float64)

    report = quick_fit(make_base(), (x, y), steps=100)

    assert report.advice == "linear"
    assert "linear" in report.reason


def test_files_stay_below_max_bytes_and_half_precision_leaves_room_for_more_parameters(tmp_path):
    base, x = make_base(3, 16, 2), make_rows()
    data = x, shifted(base, x)

    whole = quick_fit(copy.deepcopy(base), data, max_bytes=1500)
    half = quick_fit(base, data, max_bytes=1500, storage="float16")

    for report in (whole, half):
        report.model.save_pretrained(tmp_path)
        assert report.chosen.rate > 0
        assert report.bytes == (tmp_path / "adapter_model.safetensors").stat().st_size <= 1500
    assert half.parameters > whole.parameters
    assert "full matrices exceed `max_bytes`" in str(whole)
    assert "exceed" not in str(half)


def test_an_ensemble_is_a_bank_of_the_adapters_of_all_folds(rows):
    x, _ = rows

    report = quick_fit(make_base(), rows, ensemble=True)
    model = report.bank.attach()
    first, second = [model(x, adapter_names=[name] * len(x)) for name in report.bank.names]

    assert report.bank.names == ["fold 0", "fold 1"]
    assert not torch.allclose(first, second)
    assert_close((first + second) / 2, report.model(x), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("count, groups", [(30, None), (12, None), (30, [0, 1, 2] * 10)])
def test_a_wide_task_holds_out_one_tenth_or_two_rows_or_one_group(monkeypatch, count, groups):
    monkeypatch.setattr(fit, "_MANY_ROWS", 5)
    base, x = make_base(), make_rows(count)

    report = quick_fit(base, (x, shifted(base, x)), groups=groups, ensemble=True)

    assert report.bank.names == ["fold 0"]


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
    logits = base(x).detach()
    expected = min(loss(scale * logits, y).item() for scale in torch.logspace(-1.3, 1.3, 5001).tolist())

    report = quick_fit(base, (x, y), loss)

    assert report.scores["base"] == pytest.approx(expected, rel=1e-5)


def test_sums_of_weighted_rows_are_taken_as_means(rows):
    x, _ = rows
    y = torch.arange(30) % 3 % 2
    weight = torch.tensor([1.0, 4.0], dtype=torch.float64)

    of_mean, of_sum = [
        quick_fit(make_base(), (x, y), nn.CrossEntropyLoss(weight, reduction=reduction))
        for reduction in ("mean", "sum")
    ]

    # a sum also has the mean weight of a row, 2
    assert {name: score / 2 for name, score in of_sum.scores.items()} == pytest.approx(of_mean.scores, rel=1e-3)


def test_sizes_are_of_files(report, tmp_path):
    file = tmp_path / "base.safetensors"
    safetensors.torch.save_file(dict(make_base().named_parameters()), file, {"format": "pt"})

    assert report.sizes["full"].bytes == file.stat().st_size


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

    report = quick_fit(base, (x, y), budget=0.4)

    assert report.scores.keys() == NAMES
    assert torch.tensor(list(report.scores.values())).isfinite().all()


class Scaled(nn.Module):
    """A base with a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.kan = make_base(2, 4, 1)
        self.scale = nn.Parameter(torch.ones(1, dtype=torch.float64))

    def forward(self, x):
        return self.scale * self.kan(x)


LAST_LAYERS = {
    "a loose parameter": (Scaled, {"kan.layers.1.spline_weight", "kan.layers.1.base_weight"}),
    "pykan": (lambda: make_foreign("pykan"), {f"act_fun.1.{name}" for name in ("coef", "scale_base", "scale_sp")}),
    "a head": (lambda: nn.Sequential(KAN([2, 4]), nn.Linear(4, 1)).double(), {"1.weight", "1.bias"}),
}


@pytest.mark.parametrize("case", LAST_LAYERS)
def test_the_last_layer_is_trained_alone_and_counted(case):
    make, names = LAST_LAYERS[case]
    base, x = make(), make_rows(inputs=2).abs()
    parameters = dict(base.named_parameters())
    expected = sum(parameters[name].numel() for name in names)

    report = quick_fit(base, (x, base(x).detach() + x[:, :1]), budget=0.4)

    assert report.sizes["last layer"].parameters == expected
    assert report.scores["last layer"] != report.scores["full"]


def test_a_small_network_gets_the_smallest_adapter():
    """Ranks of 1 take 35 of 216 coefficients, more than the default budget."""
    x = make_rows()

    report = fit_adapter(make_base(3, 6, 1), (x, x[:, :1] ** 2), mse_loss, steps=4, folds=2, progress=False)

    assert report.parameters <= 35
    assert report.scores.keys() == NAMES


def test_the_report_says_that_losses_of_classes_are_those_at_the_best_temperature(rows):
    x, y = rows

    of_classes = quick_fit(make_base(), (x, (x[:, 0] > 0).long()), cross_entropy)

    assert "divided by its best temperature" in str(of_classes)
    assert "temperature" not in str(quick_fit(make_base(), (x, y)))


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

    report = quick_fit(network, (x, shifted(base, x).view(shape)), budget=0.5)

    assert report.model(x).shape == shape


def test_running_statistics_stay_and_dropout_is_drawn():
    base = nn.Sequential(make_base(norm="batch"), nn.Dropout(0.5))
    x = make_rows()
    norm = base[0].layers[1]
    state = copy.deepcopy(norm.state_dict())

    report = quick_fit(base, (x, x[:, :2] ** 2))

    assert report.chosen.rate > 0
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
        ({"budget": 1.5}, "budget"),
        ({"budget": 0.01}, "smallest ranks"),
        ({"max_bytes": 500}, "ranks of 1"),
        ({"max_bytes": "10kB"}, "`max_bytes` is '10kB'"),
        ({"storage": "float8"}, "storage"),
    ],
)
def test_bad_input_is_refused_before_training(change, message):
    base = make_base()
    arguments = {"data": (make_rows(), CLASSES), "loss": cross_entropy, **change}

    with refused(message):
        quick_fit(base, **arguments)

    assert not lotra_layers(base)


def test_losses_of_probabilities_are_refused_since_a_linear_model_has_none():
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
        if next(calls) == 200:
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
