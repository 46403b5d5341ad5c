# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Which adapters a bank takes, what it does with their numbers, and its files, also on the Hub."""

import json
import re
import shutil

import pytest
import torch
from helpers import X, adapt, assert_equal, assert_near, bank_of, net, refused, row_by_row, run_python
from huggingface_hub.errors import RepositoryNotFoundError
from peft import get_peft_model, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from peft_lotra import AdapterBank, BankAdamW, LoTRAConfig, push_to_hub
from peft_lotra.kan import KAN


def answer(bank, name):
    """What the bank answers for `X` with this adapter, or with the base."""
    with torch.no_grad():
        y = bank.attach()(X, adapter_names=[name] * len(X))
    bank.detach()
    return y


def check_answers(bank, models):
    """Check that the bank has these adapters and no others, and answers a mixed batch as each model by itself."""
    assert bank.names == list(models)
    names = (bank.names * len(X))[: len(X)]
    with torch.no_grad():
        y = bank.attach()(X, adapter_names=names)
    bank.detach()
    assert_near(y, row_by_row(models, names, X))


def test_adapters_come_from_folders_models_and_state_dicts(tmp_path):
    model = adapt(alpha=0.5)
    model.save_pretrained(tmp_path / "anna")

    bank = AdapterBank.from_folders(net(), [tmp_path / "anna"])
    bank.add("ben", model)
    bank.add("cleo", get_peft_model_state_dict(model), alpha=0.5)

    check_answers(bank, dict.fromkeys(["anna", "ben", "cleo"], model))
    assert len(bank) == 3
    assert "ben" in bank
    assert "dora" not in bank
    assert AdapterBank.from_folders(net(), {"x": tmp_path / "anna"}).names == ["x"]


def test_the_adapter_that_a_model_computes_with_is_added():
    """`set_adapter` of the tuner does not change `PeftModel.active_adapter`."""
    model = adapt()
    model.add_adapter("other", LoTRAConfig(r=2, init_weights=False))
    model.base_model.set_adapter("other")
    bank = AdapterBank(net())

    bank.add("anna", model)

    check_answers(bank, {"anna": model})


@pytest.mark.parametrize("active", [["default", "other"], []])
def test_a_model_with_several_active_adapters_or_none_is_refused(active):
    model = adapt()
    model.add_adapter("other", LoTRAConfig(r=2, init_weights=False))
    model.base_model.set_adapter(active)
    bank = AdapterBank(net())

    with refused("active adapters"):
        bank.add("anna", model)

    assert bank.names == []


@pytest.mark.parametrize("skip", [["ana"], ["__base__"]])
def test_an_unknown_adapter_to_skip_is_named(skip, tmp_path, two_customers):
    bank = AdapterBank.load(net(), two_customers)

    with refused(f"no adapter '{skip[0]}'"):
        bank.save(tmp_path / "rest", skip=skip)

    assert not (tmp_path / "rest").exists()


@pytest.mark.parametrize("agrees", [False, True])
def test_tensors_and_configuration_of_different_saves_are_no_adapter(agrees, tmp_path):
    """A reader may come between the two files of a save; with the old `alpha`, new tensors are another function."""
    adapt(alpha=0.5).save_pretrained(tmp_path / "new")
    adapt(alpha=2.0).save_pretrained(tmp_path / "anna")
    bank = AdapterBank(net())
    if agrees:  # the base is not compared again
        bank.add("anna", tmp_path / "anna")
    shutil.copy(tmp_path / "new" / "adapter_model.safetensors", tmp_path / "anna")

    with refused("SHA-256 differs. If it is being saved, try again"):
        bank.add("ben", tmp_path / "anna")

    assert "ben" not in bank


def test_adapters_are_removed_replaced_and_compacted():
    first, second, third = (adapt() for _ in range(3))
    bank = AdapterBank(net())
    for name, model in {"a0": first, "a1": second, "a2": first, "a3": second}.items():
        bank.add(name, model)
    ids = bank.ids(["a3", "__base__"])
    with refused("of this name already"):
        bank.add("a1", third)
    for name in ("__base__", "", 7):
        with refused("cannot be called"):
            bank.add(name, third, replace=True)

    bank.add("a1", third, replace=True)
    bank.remove("a0")
    bank.add("new", third)
    bank.remove("a2")
    bank.compact()

    check_answers(bank, {"a1": third, "a3": second, "new": third})
    assert_equal(bank.ids(["a3", "__base__"]), ids)
    assert bank.ids(bank.names).unique().numel() == len(bank) == 3
    with refused("no adapter 'a0'"):
        bank.remove("a0")


def test_rows_of_replaced_adapters_are_used_again():
    bank, model = AdapterBank(net()), adapt()
    bank.add("a", model)

    for _ in range(200):
        bank.add("a", model, replace=True)

    assert len(bank.snapshot.packed) <= 16
    assert bank.to("cpu") is bank
    assert_near(answer(bank, "a"), model(X))


def test_an_empty_bank_is_saved(tmp_path):
    AdapterBank(net()).save(tmp_path)

    assert_equal(answer(AdapterBank.load(net(), tmp_path), "__base__"), net()(X))


def state_dict_with(change):
    """A function that makes the state dict of an adapter after a change, which gets it and its first name."""

    def make(folder):
        tensors = get_peft_model_state_dict(adapt())
        change(tensors, next(iter(tensors)))
        return tensors

    return make


def damaged_folder(folder):
    adapt().save_pretrained(folder)
    (folder / "adapter_config.json").write_text("{")
    return folder


def folder_of_a_moved_grid(folder):
    base = net()
    base.kan.layers[1].grid_bounds.mul_(1.1)
    adapt(base).save_pretrained(folder)
    AdapterBank(net()).add("anna", folder, check_base="ignore")
    return folder


WRONG_ADAPTERS = {
    "a moved grid": (folder_of_a_moved_grid, "grid of kan.layers.1"),
    "another base": (lambda folder: adapt(net(seed=8)), "parameters of kan.layers.0"),
    "a base of other sizes": (lambda folder: adapt(net(grid_size=4)), "another base"),
    "another model": (lambda folder: adapt(nn.Sequential(KAN([3, 5, 4]))), "another model"),
    "saved modules": (lambda folder: adapt(modules_to_save=["head"]), "saves modules"),
    "an empty state dict": (lambda folder: {}, "no KAN layer"),
    "a missing last tensor": (state_dict_with(lambda tensors, first: tensors.popitem()), "missing"),
    "a missing first tensor": (state_dict_with(lambda tensors, first: tensors.pop(first)), "belongs to no adapter"),
    "nan": (state_dict_with(lambda tensors, first: tensors[first].fill_(torch.nan)), "not finite"),
    "a shape": (state_dict_with(lambda tensors, first: tensors.update({first: tensors[first][:1]})), "shape"),
    "a vector": (state_dict_with(lambda tensors, first: tensors.update({first: tensors[first][0, 0]})), "shape"),
    "a stranger": (state_dict_with(lambda tensors, first: tensors.update(other=torch.ones(2))), "other"),
    "no folder": (lambda folder: "no such folder", "no such folder"),
    "a damaged folder": (damaged_folder, "anna"),
}


@pytest.mark.parametrize("kind", WRONG_ADAPTERS)
def test_an_adapter_that_does_not_fit_is_refused(kind, tmp_path):
    bank = AdapterBank(net())
    bank.add("first", adapt())
    before = answer(bank, "first")
    make, message = WRONG_ADAPTERS[kind]

    with refused(message) as raised:
        bank.add("anna", make(tmp_path))

    assert "'anna' was not added" in str(raised.value)
    assert bank.names == ["first"]
    assert_equal(answer(bank, "first"), before)


# --- Files ---


@pytest.fixture
def customers(tmp_path):
    """The models of the adapters of a bank that is saved in the folder, from which one was removed."""
    configs = {f"customer {number}": {"r": number + 1} for number in range(3)}
    configs["splines"] = {"adapt_residual": False, "target_modules": ["layers.1"]}
    bank, models = bank_of(net(), configs)
    bank.remove("customer 1")
    del models["customer 1"]
    bank.save(tmp_path)
    return models


def bank_file(folder):
    return folder / "adapter_bank.safetensors"


def test_a_loaded_bank_answers_and_changes_without_its_file(tmp_path, customers):
    content = bank_file(tmp_path).read_bytes()

    bank = AdapterBank.load(net(), tmp_path)
    check_answers(bank, customers)
    bank.remove("splines")
    bank.add("more", customers["splines"])
    bank.add("customer 0", customers["customer 2"], replace=True)

    models = {name: customers["customer 2"] for name in ("customer 0", "customer 2")}
    models["more"] = customers["splines"]
    check_answers(bank, models)
    bank.save(tmp_path / "again")
    check_answers(AdapterBank.load(net(), tmp_path / "again"), models)
    bank.compact()
    check_answers(bank, models)
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == [bank_file(tmp_path).name]
    assert bank_file(tmp_path).read_bytes() == content


@pytest.mark.parametrize("start", ["gradient", True, False])
def test_an_exported_adapter_says_how_it_started(tmp_path, start):
    """Also after the file of a bank, and after another bank: an optimizer takes its rates from it."""
    model = get_peft_model(net(), LoTRAConfig(r=2))
    model.peft_config["default"].init_weights = start
    bank = AdapterBank(net())
    bank.add("a", model)
    bank.save(tmp_path / "bank")
    bank = AdapterBank.load(bank.base, tmp_path / "bank")
    copied = AdapterBank(bank.base)
    copied.add("a", bank)

    for source in (bank, copied):
        source.export("a", tmp_path / "a")
        assert LoTRAConfig.from_pretrained(str(tmp_path / "a")).init_weights == start


def read_file(folder):
    """The matrix of a bank's file, and its metadata."""
    with safe_open(bank_file(folder), "pt") as content:
        return content.get_tensor("adapters").clone(), content.metadata()


def test_a_damaged_adapter_is_named(tmp_path, customers):
    packed, metadata = read_file(tmp_path)
    packed[2, 3] += 1
    save_file({"adapters": packed}, bank_file(tmp_path), metadata)

    with refused(r"damaged adapters: 'customer 2'\."):
        AdapterBank.load(net(), tmp_path)
    others = AdapterBank.load(net(), tmp_path, names=["splines"])
    check_answers(others, {"splines": customers["splines"]})


@pytest.fixture
def two_customers(tmp_path):
    """The folder of a saved bank with the adapters anna and ben."""
    bank, _ = bank_of(net(), {"anna": {}, "ben": {}})
    bank.save(tmp_path / "bank")
    return tmp_path / "bank"


ALTERED_TABLES = {
    "names swapped": lambda text: text.replace("anna", "?").replace("ben", "anna").replace("?", "ben"),
    "bit of a name flipped": lambda text: text.replace("anna", "anoa"),
    "ranks changed": lambda text: text.replace("[2, 3, 4]", "[4, 3, 2]"),
    "nothing left": lambda text: "",
}


@pytest.mark.parametrize("options", [{}, {"names": ["ben"]}])
@pytest.mark.parametrize("change", ALTERED_TABLES)
def test_an_altered_table_is_noticed(two_customers, change, options):
    packed, metadata = read_file(two_customers)
    metadata["adapter_bank"] = ALTERED_TABLES[change](metadata["adapter_bank"])
    save_file({"adapters": packed}, bank_file(two_customers), metadata)

    with refused("adapter_bank.safetensors is damaged"):
        AdapterBank.load(net(), two_customers, **options)


@pytest.mark.parametrize("options", [{}, {"names": ["ben"]}])
def test_a_file_of_a_newer_format_is_called_newer(two_customers, options):
    metadata = {"adapter_bank": json.dumps({"format": 99, "adapters": "elsewhere"})}
    save_file({"shards": torch.zeros(2)}, bank_file(two_customers), metadata)

    with refused("newer version of peft-lotra") as raised:
        AdapterBank.load(net(), two_customers, **options)

    assert "damaged" not in str(raised.value)


@pytest.mark.parametrize("names", [None, ["ben"]])
def test_a_file_that_is_cut_anywhere_is_one_clear_error(two_customers, names):
    file = bank_file(two_customers)
    content = file.read_bytes()

    for size in (0, 1, 7, 8, 9, 100, len(content) // 2, len(content) - 100, len(content) - 1):
        file.write_bytes(content[:size])
        with refused("adapter_bank.safetensors is damaged"):
            AdapterBank.load(net(), two_customers, names=names)


@pytest.mark.parametrize("names", [None, ["ben"]])
def test_a_byte_that_is_flipped_anywhere_is_never_an_answer(two_customers, names):
    """A bank that is loaded all the same answers as the one that was saved."""
    file = bank_file(two_customers)
    content = file.read_bytes()
    expected = answer(AdapterBank.load(net(), two_customers), "ben")

    for index in [*range(0, 64), *range(64, len(content), len(content) // 150)]:
        altered = bytearray(content)
        altered[index] ^= 0x11
        file.write_bytes(altered)
        try:
            bank = AdapterBank.load(net(), two_customers, names=names)
        except ValueError as error:
            assert re.search("is damaged|has damaged adapters|has no adapter|newer version", str(error))
        else:
            assert_equal(answer(bank, "ben"), expected)


COPIES = {
    "save": lambda bank, folder: bank.save(folder),
    "export": lambda bank, folder: bank.export("ben", folder),
    "add": lambda bank, folder: AdapterBank(bank.base).add("ben", bank),
}


def bank_with_nan():
    """A bank in which a step of training has ruined the adapter of one customer."""
    bank, _ = bank_of(net(), {"anna": {}, "ben": {}})
    optimizer = BankAdamW(bank, lr=1e-2)
    errors = bank.attach()(X, adapter_names=["anna", "ben"] * 4).square().mean(1)
    (errors * torch.tensor([1.0, torch.nan] * 4)).sum().backward()
    optimizer.step()
    optimizer.finish()
    bank.detach()
    return bank


@pytest.mark.parametrize("change", COPIES)
def test_an_adapter_that_is_not_finite_is_named_and_not_saved(tmp_path, change):
    bank = bank_with_nan()
    bank.save(tmp_path / "bank", skip="ben")
    before = bank_file(tmp_path / "bank").read_bytes()

    with refused("not finite in torch.float32: 'ben'|'ben' was not added.*not finite"):
        COPIES[change](bank, tmp_path / "bank")

    assert bank_file(tmp_path / "bank").read_bytes() == before
    assert AdapterBank.load(net(), tmp_path / "bank").names == ["anna"]
    bank.export("anna", tmp_path / "anna")


def test_an_adapter_that_overflows_in_half_precision_is_refused(tmp_path):
    large = {name: 300 * value for name, value in get_peft_model_state_dict(adapt(r=1)).items()}
    bank = AdapterBank(net(), torch.float16)
    bank.add("anna", adapt())

    with refused("'ben' was not added: .*not finite in torch.float16"):
        bank.add("ben", large, alpha=1e4)
    assert bank.names == ["anna"]

    bank = AdapterBank(net())
    bank.add("anna", adapt())
    bank.add("ben", large, alpha=1e4)
    bank.save(tmp_path)
    with refused("not finite in torch.float16: 'ben'"):
        AdapterBank.load(net(), tmp_path, dtype=torch.float16)


def test_some_adapters_are_not_saved_over_all(tmp_path, two_customers):
    """`load(names=...)` leaves adapters out; saving into the same folder would lose them."""
    link = tmp_path / "link"
    link.symlink_to(two_customers)
    bank = AdapterBank.load(net(), two_customers, names=["ben"])

    for folder in (two_customers, link, f"{two_customers}/"):
        with refused("only some adapters"):
            bank.save(folder)
    bank.save(tmp_path / "elsewhere")

    assert AdapterBank.load(net(), two_customers).names == ["anna", "ben"]
    assert AdapterBank.load(net(), tmp_path / "elsewhere").names == ["ben"]


def test_a_file_that_is_not_there_is_an_error(tmp_path):
    for names in (None, ["anna"]):
        with refused("There is no"):
            AdapterBank.load(net(), tmp_path, names=names)


def test_a_bank_of_another_base_is_refused(two_customers):
    with refused("parameters of"):
        AdapterBank.load(net(seed=8), two_customers)


def test_the_memory_of_a_loaded_bank(tmp_path):
    """1.2 times the file, of 100 MB."""
    script = """
import psutil, torch
from peft import get_peft_model, get_peft_model_state_dict
from peft_lotra import AdapterBank, LoTRAConfig, push_to_hub
from peft_lotra.kan import KAN
base = KAN([4, 32, 1])
state = get_peft_model_state_dict(get_peft_model(KAN([4, 32, 1]), LoTRAConfig(r=8)))
bank = AdapterBank(base)
bank.add("a", state)
names = ["__base__", *(f"a{n}" for n in range(30_000))]
ids = {**dict.fromkeys(names, 0), "__base__": -1}
bank.snapshot = bank.snapshot._replace(ids=ids, form_of=dict.fromkeys(names, 1))
bank.save("bank")
size = 30_001 * bank.snapshot.packed.shape[1] * 4
del bank
before = psutil.Process().memory_info().rss
bank = AdapterBank.load(base, "bank")
print((psutil.Process().memory_info().rss - before) / size)
"""
    assert float(run_python(script, tmp_path)) < 1.2


def test_folders_of_one_name_are_refused(tmp_path):
    folders = [tmp_path / customer / "last" for customer in ("anna", "ben")]
    for folder in folders:
        adapt().save_pretrained(folder)

    with refused("of this name already"):
        AdapterBank.from_folders(net(), folders)


def test_a_base_without_kan_layers_or_with_a_merged_adapter_is_refused():
    merged = adapt()
    merged.merge_adapter()

    for base, message in ((torch.nn.Linear(2, 2), "KAN"), (merged, "merged")):
        with refused(message):
            AdapterBank(base)


@pytest.fixture
def large_bank():
    """302 adapters, most of them equal."""
    bank, tensors = AdapterBank(net()), get_peft_model_state_dict(adapt())
    for number in range(300):
        bank.add(f"customer {number}", tensors)
    bank.add("anna", {name: tensor + 0.1 for name, tensor in tensors.items()})
    bank.add("ben", adapt(r=1))
    return bank


def test_a_bank_is_pushed_with_a_card(hub, large_bank):
    push_to_hub(large_bank, "user/bank", base_code="base = make()")

    files = hub.repos["user/bank"].files("main")
    assert set(files) == {".gitattributes", "README.md", "adapter_bank.safetensors"}
    card = files["README.md"].content.decode()
    for text in ("302 LoTRA adapters", "base = make()", 'names=["customer 0"]'):
        assert text in card
    assert card.count("| `customer") == 100
    assert re.match(r"---\n(.*\n)*library_name: peft\n(.*\n)*---\n", card)


@pytest.mark.parametrize("names", [None, ["ben", "anna"]])
@pytest.mark.parametrize("revision", [None, "next"])
def test_a_bank_or_some_of_its_adapters_are_downloaded(hub, large_bank, names, revision):
    push_to_hub(large_bank, "user/bank", revision=revision)

    loaded = AdapterBank.load(net(), "user/bank", names=names, revision=revision)

    assert loaded.names == (names or large_bank.names)
    for name in ("ben", "anna"):
        assert_equal(answer(loaded, name), answer(large_bank, name))


def test_some_adapters_are_not_pushed_over_all(hub, two_customers):
    whole = AdapterBank.load(net(), two_customers)
    push_to_hub(whole, "user/bank")
    some = AdapterBank.load(net(), "user/bank", names=["ben"])

    with refused("only some adapters"):
        push_to_hub(some, "user/bank")
    push_to_hub(some, "user/some")

    assert AdapterBank.load(net(), "user/bank").names == ["anna", "ben"]
    assert AdapterBank.load(net(), "user/some").names == ["ben"]


def test_a_repository_or_an_adapter_that_is_not_there_is_named(hub, two_customers):
    push_to_hub(AdapterBank.load(net(), two_customers), "user/bank")

    with pytest.raises(RepositoryNotFoundError):
        AdapterBank.load(net(), "user/nothing", names=["cleo"])
    with refused("no adapter 'cleo'"):
        AdapterBank.load(net(), "user/bank", names=["cleo"])


def test_names_may_come_from_a_generator(tmp_path, two_customers):
    some = AdapterBank.load(net(), two_customers, names=(name for name in ["ben"]))
    whole = AdapterBank.load(net(), two_customers)
    whole.save(tmp_path / "skipped", skip=(name for name in ["ben"]))

    assert some.names == ["ben"]
    assert AdapterBank.load(net(), tmp_path / "skipped").names == ["anna"]
