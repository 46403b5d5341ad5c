# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Which adapters a bank takes, what it does with their numbers, and its files, also on the Hub."""

import json
import re
import zlib
from pathlib import Path

import pytest
import torch
from behaving import X, adapted, apart, net, python
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import save_file

from peft_lotra import AdapterBank, LoTRAConfig
from peft_lotra.kan import SlimKAN
from peft_lotra.optim import BankAdamW


CRC32 = zlib.crc32


def answer(bank, name, base=None):
    with torch.no_grad():
        y = bank.attach(base)(X, adapter_names=[name] * len(X))
    bank.detach()
    return y


def test_folders_models_and_state_dicts(tmp_path):
    model = adapted(net(), alpha=0.5)
    expected = model(X).detach()
    model.save_pretrained(tmp_path / "anna")
    bank = AdapterBank.from_folders(net(), [tmp_path / "anna"])
    bank.add("ben", model)
    bank.add("cleo", get_peft_model_state_dict(model), alpha=0.5)
    assert bank.names == ["anna", "ben", "cleo"] and len(bank) == 3 and "ben" in bank and "dora" not in bank
    for name in bank.names:
        assert apart(answer(bank, name), expected) < 1e-5
    assert AdapterBank.from_folders(net(), {"x": tmp_path / "anna"}).names == ["x"]


def test_removed_replaced_and_compacted():
    bank, models = AdapterBank(net()), [adapted(net()) for _ in range(3)]
    for count in range(6):
        bank.add(f"a{count}", models[count % 2])
    with pytest.raises(ValueError, match="already"):
        bank.add("a1", models[2])
    ids = bank.ids(["a5", "__base__"])
    bank.add("a1", models[2], replace=True)
    bank.remove("a0")
    bank.add("new", models[2])
    bank.remove("a2")
    bank.compact()
    assert torch.equal(bank.ids(["a5", "__base__"]), ids) and len(bank) == 5
    assert len(set(bank.ids(bank.names).tolist())) == 5
    for name, model in {"a1": 2, "new": 2, "a3": 1, "a4": 0, "a5": 1}.items():
        assert apart(answer(bank, name), models[model](X)) < 1e-5
    with pytest.raises(ValueError, match="no adapter 'a0'"):
        bank.remove("a0")
    for _ in range(200):  # rows are used again
        bank.add("a1", models[0], replace=True)
    assert len(bank.snapshot.packed) <= 16 and apart(answer(bank, "a1"), models[0](X)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_precision_in_memory_and_in_files_also_of_an_empty_bank(tmp_path, dtype):
    bank, model = AdapterBank(net(), dtype=dtype), adapted(net())
    bank.save(tmp_path)
    assert torch.equal(answer(AdapterBank.load(net(), tmp_path), "__base__"), net()(X))
    bank.add("a", model)
    assert apart(answer(bank, "a"), model(X)) < (1e-5 if dtype == torch.float32 else 2e-2)
    assert bank.snapshot.packed.dtype == dtype and bank.to("cpu") is bank
    bank.save(tmp_path)
    assert torch.equal(answer(AdapterBank.load(net(), tmp_path), "a"), answer(bank, "a"))


def damaged(change):
    tensors = get_peft_model_state_dict(adapted(net()))
    first, *_, last = tensors
    return change(tensors, first, last) or tensors


def damaged_folder(folder):
    adapted(net()).save_pretrained(folder)
    (folder / "adapter_config.json").write_text("{")
    return folder


def of_a_moved_grid(folder):
    other = net()
    other.kan.layers[1].grid_bounds.mul_(1.1)
    adapted(other).save_pretrained(folder)
    AdapterBank(net()).add("anna", folder, check_base="ignore")
    return folder


@pytest.mark.parametrize(
    ("adapter", "word"),
    [
        (of_a_moved_grid, "grid of kan.layers.1"),
        (lambda _: adapted(net(seed=8)), "parameters of kan.layers.0"),
        (lambda _: adapted(net(grid_size=4)), "another base"),
        (lambda _: adapted(SlimKAN([3, 6, 4], ranks=2)), "another model"),
        (lambda _: adapted(net(), modules_to_save=["head"]), "saves modules"),
        (lambda _: net(), "must be a PeftModel"),
        (lambda _: {}, "no KAN layer"),
        (lambda _: damaged(lambda it, first, last: it.__delitem__(last)), "missing"),
        (lambda _: damaged(lambda it, first, last: it.__delitem__(first)), "belongs to no adapter"),
        (lambda _: damaged(lambda it, first, last: it.update({first: it[first] * torch.nan})), "not finite"),
        (lambda _: damaged(lambda it, first, last: it.update({first: it[first][:1]})), "shape"),
        (lambda _: damaged(lambda it, first, last: it.update({first: it[first][0, 0]})), "shape"),
        (lambda _: damaged(lambda it, first, last: it.update(other=it[first])), "other"),
        (lambda _: "no such folder", "no such folder"),
        (damaged_folder, "anna"),
    ],
)
def test_an_adapter_that_does_not_fit(adapter, word, tmp_path):
    bank = AdapterBank(net())
    bank.add("first", adapted(net()))
    before = answer(bank, "first")
    with pytest.raises(ValueError, match=word) as raised:
        bank.add("anna", adapter(tmp_path))
    assert "'anna' was not added" in str(raised.value)
    assert bank.names == ["first"] and torch.equal(answer(bank, "first"), before)


def filled(tmp_path):
    models = {f"customer {count}": adapted(net(), r=count + 1) for count in range(3)}
    models["splines"] = adapted(net(), adapt_residual=False, target_modules=["layers.1"])
    bank = AdapterBank(net())
    for name, model in models.items():
        bank.add(name, model)
    bank.remove("customer 1")
    del models["customer 1"]
    bank.save(tmp_path)
    return models


@pytest.mark.parametrize("mapped", [False, True])
def test_saved_and_loaded(tmp_path, mapped):
    models = filled(tmp_path)
    bank = AdapterBank.load(net(), tmp_path, mapped=mapped)
    assert bank.names == list(models)
    for name, model in models.items():
        assert apart(answer(bank, name), model(X)) < 1e-5
    (file,) = tmp_path.iterdir()
    content = file.read_bytes()
    bank.remove("splines")
    bank.add("more", models["splines"])
    bank.add("customer 0", models["customer 2"], replace=True)
    models |= {"more": models.pop("splines"), "customer 0": models["customer 2"]}
    for change in (lambda: None, lambda: bank.save(tmp_path / "again"), bank.compact):
        change()
        with torch.no_grad():
            y = bank.attach()(X, adapter_names=[*models, "__base__"] * 2)
        bank.detach()
        for row, name in enumerate(models):
            assert apart(y[row], models[name](X)[row]) < 1e-5
    assert AdapterBank.load(net(), tmp_path / "again").names == bank.names
    (file,) = [it for it in tmp_path.iterdir() if it.is_file()]
    assert file.name == "adapter_bank.safetensors" and file.read_bytes() == content


def test_exported_for_peft(tmp_path):
    models = filled(tmp_path)
    bank = AdapterBank.load(net(), tmp_path)
    for name, model in models.items():
        bank.export(name, tmp_path / name)
        loaded = PeftModel.from_pretrained(net(), tmp_path / name).eval()
        assert apart(loaded(X), model(X)) < 1e-5
        former, found = (get_peft_model_state_dict(it) for it in (model, loaded))
        assert {key: part.shape for key, part in former.items()} == {key: part.shape for key, part in found.items()}
    with pytest.raises(ValueError, match="no adapter 'nobody'"):
        bank.export("nobody", tmp_path / "x")


@pytest.mark.parametrize("start", ["gradient", "training", True, False])
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


def opened(folder):
    """The file of a bank, its matrix and its table."""
    file = folder / "adapter_bank.safetensors"
    with safe_open(file, "pt") as content:
        return file, content.get_tensor("adapters").clone(), json.loads(content.metadata()["adapter_bank"])


def metadata_of(table):
    """The metadata of a file with this table, with the right check sum."""
    text = json.dumps(table)
    return {"adapter_bank": text, "adapter_bank_crc32": str(zlib.crc32(text.encode()))}


def test_a_damaged_adapter_is_named(tmp_path):
    filled(tmp_path)
    file, packed, table = opened(tmp_path)
    packed[2, 3] += 1
    save_file({"adapters": packed}, file, metadata=metadata_of(table))
    with pytest.raises(ValueError, match=r"damaged adapters: 'customer 2'\."):
        AdapterBank.load(net(), tmp_path)
    with pytest.warns(UserWarning, match="'customer 2'"):
        bank = AdapterBank.load(net(), tmp_path, skip_damaged=True)
    assert bank.names == ["customer 0", "splines"]
    with pytest.warns(UserWarning, match="'customer 2'"):
        bank = AdapterBank.load(net(), tmp_path, skip_damaged=True, dtype=torch.float64)
    assert bank.names == ["customer 0", "splines"]


def saved_bank(tmp_path, **models):
    """The folder of a saved bank with these adapters."""
    bank = AdapterBank(net())
    for name, model in models.items():
        bank.add(name, model)
    bank.save(tmp_path / "bank")
    return tmp_path / "bank"


def two_customers(tmp_path):
    return saved_bank(tmp_path, anna=adapted(net()), ben=adapted(net()))


def rewritten(folder, change):
    """Change the table of a file, and leave everything else of it as it is."""
    file, packed, table = opened(folder)
    with safe_open(file, "pt") as content:
        metadata = content.metadata()
    save_file({"adapters": packed}, file, {**metadata, "adapter_bank": change(json.dumps(table))})


@pytest.mark.parametrize("options", [{}, {"names": ["ben"]}, {"mapped": True}, {"skip_damaged": True}])
@pytest.mark.parametrize("what", ["names swapped", "bit of a name flipped", "ranks changed"])
def test_an_altered_table_is_noticed(tmp_path, what, options):
    folder = two_customers(tmp_path)
    changes = {
        "names swapped": lambda text: text.replace("anna", "?").replace("ben", "anna").replace("?", "ben"),
        "bit of a name flipped": lambda text: text.replace("anna", "anoa"),
        "ranks changed": lambda text: text.replace("[2, 3, 4]", "[4, 3, 2]"),
    }
    rewritten(folder, changes[what])

    with pytest.raises(ValueError, match="adapter_bank.safetensors is damaged"):
        AdapterBank.load(net(), folder, **options)


@pytest.mark.parametrize("options", [{}, {"names": ["ben"]}, {"mapped": True}])
def test_a_file_of_a_newer_format_is_called_newer(tmp_path, options):
    folder = two_customers(tmp_path)
    table = {"format": 99, "adapters": "elsewhere"}
    metadata = {"adapter_bank": json.dumps(table)}
    save_file({"shards": torch.zeros(2)}, folder / "adapter_bank.safetensors", metadata)

    with pytest.raises(ValueError, match="newer version of peft-lotra") as raised:
        AdapterBank.load(net(), folder, **options)
    assert "damaged" not in str(raised.value)


@pytest.mark.parametrize("names", [None, ["ben"]])
def test_a_file_that_is_cut_anywhere_is_one_clear_error(tmp_path, names):
    folder = two_customers(tmp_path)
    file = folder / "adapter_bank.safetensors"
    content = file.read_bytes()

    for size in (0, 1, 7, 8, 9, 100, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:size])
        with pytest.raises(ValueError, match="adapter_bank.safetensors is damaged"):
            AdapterBank.load(net(), folder, names=names)


@pytest.mark.parametrize("names", [None, ["ben"]])
def test_a_byte_that_is_flipped_anywhere_is_never_an_answer(tmp_path, names):
    """What is loaded all the same is what was saved."""
    folder = two_customers(tmp_path)
    file = folder / "adapter_bank.safetensors"
    content = file.read_bytes()
    expected = answer(AdapterBank.load(net(), folder), "ben")

    for place in [*range(0, 64), *range(64, len(content), len(content) // 150)]:
        altered = bytearray(content)
        altered[place] ^= 0x11
        file.write_bytes(altered)
        try:
            bank = AdapterBank.load(net(), folder, names=names)
        except ValueError as error:
            words = "is damaged", "has damaged adapters", "has no adapter", "newer version"
            assert any(word in str(error) for word in words)
        else:
            assert torch.equal(answer(bank, "ben"), expected)


@pytest.mark.parametrize("change", ["save", "export", "compact", "add"])
def test_damage_in_a_mapped_file_is_not_written_again(tmp_path, change):
    """Not with a check sum that fits."""
    folder = two_customers(tmp_path)
    file = folder / "adapter_bank.safetensors"
    content = bytearray(file.read_bytes())
    content[-100] ^= 1  # of the last adapter
    file.write_bytes(content)
    bank = AdapterBank.load(net(), folder, mapped=True)
    calls = {
        "save": lambda: bank.save(tmp_path / "copy"),
        "export": lambda: bank.export("ben", tmp_path / "copy"),
        "compact": bank.compact,
        "add": lambda: AdapterBank(bank.base).add("ben", bank),
    }

    with pytest.raises(ValueError, match="damaged adapters: 'ben'"):
        calls[change]()

    assert not (tmp_path / "copy").exists()
    bank.export("anna", tmp_path / "anna")
    bank.remove("ben")
    bank.save(tmp_path / "copy")
    assert AdapterBank.load(net(), tmp_path / "copy").names == ["anna"]


def test_adapters_that_are_added_to_a_mapped_bank_have_no_check_sums(tmp_path, monkeypatch):
    """Not while the bank grows either: only what is read from the file may be damaged."""
    bank = AdapterBank.load(net(), two_customers(tmp_path), mapped=True)
    adapter = get_peft_model_state_dict(adapted(net()))
    sums = []

    def crc32(content, *start):
        sums.append(content)
        return CRC32(content, *start)

    monkeypatch.setattr(zlib, "crc32", crc32)
    for count in range(20):
        bank.add(f"more{count}", adapter)

    assert not sums
    bank.compact()
    assert len(sums) == 3  # two adapters and the base


def poisoned():
    """A bank in which a step of training has ruined the adapter of one customer."""
    bank = AdapterBank(net())
    for name in ("anna", "ben"):
        bank.add(name, adapted(net()))
    model = bank.attach()
    optimizer = BankAdamW(bank, lr=1e-2)
    errors = model(X, adapter_names=["anna", "ben"] * 4).square().mean(1)
    factor = torch.tensor([1.0, torch.nan] * 4)
    (errors * factor).sum().backward()
    optimizer.step()
    optimizer.finish()
    bank.detach()
    return bank


@pytest.mark.parametrize("change", ["save", "export", "add"])
def test_an_adapter_that_is_not_finite_is_named_and_not_saved(tmp_path, change):
    bank = poisoned()
    bank.save(tmp_path / "bank", skip=["ben"])
    before = (tmp_path / "bank" / "adapter_bank.safetensors").read_bytes()
    calls = {
        "save": lambda: bank.save(tmp_path / "bank"),
        "export": lambda: bank.export("ben", tmp_path / "bank"),
        "add": lambda: AdapterBank(bank.base).add("ben", bank),
    }

    with pytest.raises(ValueError, match="not finite in torch.float32: 'ben'|'ben' was not added.*not finite"):
        calls[change]()

    assert (tmp_path / "bank" / "adapter_bank.safetensors").read_bytes() == before
    assert AdapterBank.load(net(), tmp_path / "bank").names == ["anna"]
    bank.export("anna", tmp_path / "anna")


def test_an_adapter_that_overflows_in_half_precision_is_refused(tmp_path):
    large = {name: 300 * value for name, value in get_peft_model_state_dict(adapted(net(), r=1)).items()}
    bank = AdapterBank(net(), torch.float16)
    bank.add("anna", adapted(net()))

    with pytest.raises(ValueError, match="'ben' was not added: .*not finite in torch.float16"):
        bank.add("ben", large, alpha=1e4)
    assert bank.names == ["anna"]

    bank = AdapterBank(net())
    bank.add("anna", adapted(net()))
    bank.add("ben", large, alpha=1e4)
    bank.save(tmp_path)
    with pytest.raises(ValueError, match="not finite in torch.float16: 'ben'"):
        AdapterBank.load(net(), tmp_path, dtype=torch.float16)


def test_some_adapters_are_not_saved_over_all(tmp_path):
    """`load(names=...)` leaves adapters out; saving into the same folder would lose them."""
    folder = two_customers(tmp_path)
    link = tmp_path / "link"
    link.symlink_to(folder)
    bank = AdapterBank.load(net(), folder, names=["ben"])

    for same in (folder, link, str(folder) + "/"):
        with pytest.raises(ValueError, match="only some adapters"):
            bank.save(same)
    bank.save(tmp_path / "elsewhere")

    assert AdapterBank.load(net(), folder).names == ["anna", "ben"]
    assert AdapterBank.load(net(), tmp_path / "elsewhere").names == ["ben"]


@pytest.mark.parametrize("what", ["cut", "no table", "not there", "another base"])
def test_a_file_that_is_no_bank(tmp_path, what):
    filled(tmp_path)
    file, packed, _ = opened(tmp_path)
    if what == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    elif what == "not there":
        file.unlink()
    elif what == "no table":
        save_file({"adapters": packed}, file)
    with pytest.raises(ValueError, match="damaged|There is no|parameters of"):
        AdapterBank.load(net(seed=8) if what == "another base" else net(), tmp_path)


def test_the_memory_of_a_mapped_bank(tmp_path):
    """100 MB that are mapped take little memory until they are used, also when one is added; loaded, 1.2 times."""
    script = """
import psutil, torch
from peft import get_peft_model, get_peft_model_state_dict
from peft_lotra import AdapterBank, LoTRAConfig
from peft_lotra.kan import KAN
base = KAN([4, 32, 1])
state = get_peft_model_state_dict(get_peft_model(KAN([4, 32, 1]), LoTRAConfig(r=8)))
bank = AdapterBank(base)
bank.add("a", state)
entry = bank.snapshot.entries["a"]
entries = {"__base__": bank.snapshot.entries["__base__"], **{f"a{n}": entry for n in range(30_000)}}
bank.snapshot = bank.snapshot._replace(entries=entries)
bank.save("bank")
size = 30_001 * bank.snapshot.packed.shape[1] * 4
del bank
for mapped in (True, False):
    before = psutil.Process().memory_info().rss
    bank = AdapterBank.load(base, "bank", mapped=mapped)
    if mapped:
        bank.add("b", state)
    print((psutil.Process().memory_info().rss - before) / size)
    del bank
"""
    mapped, loaded = map(float, python(script, tmp_path).split())
    assert mapped < 0.3 and loaded < 1.2


def test_what_a_bank_refuses(tmp_path):
    for customer in ("anna", "ben"):
        adapted(net()).save_pretrained(tmp_path / customer / "last")
    model = adapted(net())
    model.merge_adapter()
    for call, word in (
        (lambda: AdapterBank.from_folders(net(), [tmp_path / "anna/last", tmp_path / "ben/last"]), "name already"),
        (
            lambda: AdapterBank(net()).save(tmp_path) or AdapterBank.load(net(), tmp_path, names=["d"]),
            "no adapter 'd'",
        ),
        (lambda: AdapterBank.load(net(), tmp_path / "nothing", names=["c"]), "There is no"),
        (lambda: AdapterBank(torch.nn.Linear(2, 2)), "KAN"),
        (lambda: AdapterBank(model), "merged"),
        (lambda: AdapterBank(net()).add("__base__", LoTRAConfig()), "stands for the base"),
    ):
        with pytest.raises(ValueError, match=word):
            call()


HUB = """
from hub_server import start_hub
hub = start_hub("user")
import json, torch
from behaving import X, adapted, net
from peft import get_peft_model_state_dict
from peft_lotra import AdapterBank
from test_adapters import answer
bank, state = AdapterBank(net()), get_peft_model_state_dict(adapted(net()))
for number in range(300):
    bank.add(f"customer {number}", state)
bank.add("anna", {key: part + 0.1 for key, part in state.items()})
bank.add("ben", adapted(net(), r=1))
bank.push_to_hub("user/bank", base_code="base = make()")
files = hub.repos["user/bank"].files("main")
found = {"files": {name: len(blob.content) for name, blob in files.items()}}
found["card"], before = files["README.md"].content.decode(), hub.sent
some = AdapterBank.load(net(), "user/bank", names=["ben", "anna"])
found["sent"], found["names"] = hub.sent - before, some.names
found["same"] = [torch.equal(answer(some, name), answer(bank, name)) for name in some.names]
whole = AdapterBank.load(net(), "user/bank")
found["whole"] = whole.names == bank.names and torch.equal(answer(whole, "ben"), answer(bank, "ben"))
bank.push_to_hub("user/bank", revision="next")
try:
    some.push_to_hub("user/bank")
except ValueError as error:
    found["some"] = str(error)
some.push_to_hub("user/some")
found["kept"] = len(AdapterBank.load(net(), "user/bank"))
found["next"] = len(AdapterBank.load(net(), "user/bank", names=["ben"], revision="next"))
for error in ("user/nothing", "user/bank"):
    try:
        AdapterBank.load(net(), error, names=["cleo"])
    except Exception as raised:
        found[error] = f"{type(raised).__name__}: {raised}"
print(json.dumps(found))
"""


def test_pushed_and_pulled(tmp_path):
    """On a stand-in for the Hub: all of a bank, and one adapter of it without the others."""
    here = f"import sys\nsys.path.append({str(Path(__file__).parent)!r})\n"
    found = json.loads(python(here + HUB, tmp_path).splitlines()[-1])
    assert found["same"] == [True, True] and found["names"] == ["ben", "anna"]
    assert found["whole"] and found["next"] == 1
    assert found["sent"] < 0.2 * found["files"]["adapter_bank.safetensors"]
    assert set(found["files"]) == {".gitattributes", "README.md", "adapter_bank.safetensors"}
    card = found["card"]
    assert "302 adapters" in card and "base = make()" in card and 'names=["customer 0"]' in card
    assert card.count("| `customer") == 100
    assert re.match(r"---\n(.*\n)*library_name: peft\n(.*\n)*---\n", card)
    assert "only some adapters" in found["some"] and found["kept"] == 302
    assert "RepositoryNotFoundError" in found["user/nothing"] and "no adapter 'cleo'" in found["user/bank"]


NO_NETWORK = """
import os
os.environ["HF_ENDPOINT"] = "http://127.0.0.1:9"  # where nothing listens
from behaving import net
from peft_lotra import AdapterBank
try:
    AdapterBank.load(net(), "user/bank", names=["ben"])
except ConnectionError as error:
    print(error)
"""


def test_a_failed_connection_is_no_damage(tmp_path):
    message = python(NO_NETWORK, tmp_path)
    assert "cannot be downloaded" in message and "damaged" not in message


def test_some_adapters_of_a_folder(tmp_path):
    models = filled(tmp_path)
    some = AdapterBank.load(net(), tmp_path, names=["splines"])
    assert some.names == ["splines"] and apart(answer(some, "splines"), models["splines"](X)) < 1e-5


def test_names_may_come_from_a_generator(tmp_path):
    folder = two_customers(tmp_path)

    some = AdapterBank.load(net(), folder, names=(name for name in ["ben"]))
    whole = AdapterBank.load(net(), folder)
    whole.save(tmp_path / "skipped", skip=(name for name in ["ben"]))

    assert some.names == ["ben"]
    assert AdapterBank.load(net(), tmp_path / "skipped").names == ["anna"]
    with pytest.raises(ValueError, match="list"):
        AdapterBank.load(net(), folder, names="ben")
