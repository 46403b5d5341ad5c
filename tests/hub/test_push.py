# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Adapters on a stand-in for the Hub, there and back: cards, texts, errors and commands, in a process of its own."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from behaving import python
from huggingface_hub import ModelCard


ROOT = Path(__file__).parents[2]
SCRIPT = """
from hub_server import start_hub
hub = start_hub("user")
import json, re, torch
from huggingface_hub import HfApi
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from typer.testing import CliRunner
from behaving import X, adapted, add, net
from peft_lotra import cli, hotswap_adapter, load_adapters, push_to_hub
from peft_lotra.kan import KAN, KANConfig, KANModel

def text(repo, name="README.md", revision="main"):
    return hub.repos[repo].files(revision)[name].content.decode()

def on_base(source="user/kan"):
    return adapted(KANModel.from_pretrained(source))

def logits(model):
    found = model(X)
    return getattr(found, "logits", found)

def snippet_runs(model, repo):
    (code,) = re.findall(r"```python\\n(.*?)```", text(repo), re.DOTALL)
    scope = {}
    exec(code, scope)
    return torch.equal(logits(scope["model"].eval()), logits(model))

def error(*args, **kwargs):
    try:
        push_to_hub(*args, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"

def comes_back(model, repo, **kwargs):
    return torch.equal(PeftModel.from_pretrained(net(), repo, **kwargs).eval()(X), model(X))

one, second, other = (adapted() for _ in range(3))
push_to_hub(one, "user/one")
push_to_hub(second, "user/one", revision="v2")
back = {"pushed": comes_back(one, "user/one"), "revision": comes_back(second, "user/one", revision="v2")}
one.push_to_hub("user/method")
hotswap_adapter(other, "user/one")
back |= {"method": comes_back(one, "user/method"), "hotswap": torch.equal(other(X), one(X))}
add(second, "other")
push_to_hub(second, "user/several")
second.set_adapter("other")
back["several"] = comes_back(second, "user/several", subfolder="other")

both = adapted()
lora = LoraConfig(r=2, target_modules=["head"], init_lora_weights=False)
inject_adapter_in_model(lora, both.get_base_model(), adapter_name="lora")
both.peft_config["lora"].base_model_name_or_path = "/home/ann/kan"
push_to_hub(one, "user/both")
push_to_hub(both, "user/both", revision="v2")
loaded = load_adapters(net(), "user/both", revision="v2")
back["both"] = torch.equal(loaded(X), both.eval()(X))
loaded = load_adapters(net(), "user/both", names=["lora", "default"], revision="v2")
back["both, named"] = torch.equal(loaded(X), both(X))
back["only LoTRA"] = torch.equal(load_adapters(net(), "user/both")(X), one(X))
both_files = [text("user/both", name, "v2") for name in ("README.md", "lora/adapter_config.json")]

KANModel(KANConfig(widths=(3, 8, 2))).push_to_hub("user/kan")
public = on_base()
push_to_hub(public, "user/public", metrics={"r2": 0.9}, tags=["digits"], commit_message="first")
push_to_hub(on_base(), "user/public", revision="v2")
found = {"back": back, "both": both_files, "public": snippet_runs(public, "user/public"), "card": text("user/public")}
found["v2"] = text("user/public", revision="v2")
found["request"] = push_to_hub(on_base(), "user/public", create_pr=True).pr_url
found["refs"] = sorted(hub.repos["user/public"].refs)

code = "import torch\\nfrom peft_lotra.kan import KAN\\n\\ntorch.manual_seed(3)\\nbase = KAN([3, 8, 2])"
scope = {}
exec(code, scope)
own = adapted(scope["base"])
push_to_hub(own, "user/own", base_code=code)
push_to_hub(own, "own")
found["own"] = snippet_runs(own, "user/own")

KANModel.from_pretrained("user/kan").save_pretrained("kan")
push_to_hub(on_base("kan"), "user/here")
found["here"] = [text("user/here", name) for name in ("README.md", "adapter_config.json")]

HfApi().create_repo("user/kept")
mine = "---\\nlicense: mit\\ntags:\\n- mine\\n---\\n\\n# My adapter\\n\\nIt reads scans.\\n"
HfApi().upload_file(path_or_fileobj=mine.encode(), path_in_repo="README.md", repo_id="user/kept")
push_to_hub(public, "user/kept")
push_to_hub(public, "user/kept", metrics={"r2": 0.5})
push_to_hub(public, "user/kept", revision="again")
found["kept"], found["again"] = text("user/kept"), text("user/kept", revision="again")

push_to_hub(public, "user/private", private=True)
found["private"], found["files"] = hub.repos["user/private"].private, sorted(hub.repos["user/private"].files("main"))

lora = get_peft_model(torch.nn.Sequential(torch.nn.Linear(3, 2)), LoraConfig(target_modules=["0"]))
found["errors"] = {
    "public": error(public, "user/public", private=True),
    "base_model": error(public, "user/new", base_model="/home/ann/kan"),
    "metrics": error(public, "user/new", metrics={"r2": float("nan")}),
    "argument": error(public, "user/new", licence="mit"),
    "lora": error(lora, "user/new"),
}
found["repos"] = sorted(hub.repos)

def command(*args):
    result = CliRunner().invoke(cli.app, list(args))
    return result.exit_code, result.stdout, result.stderr

found["inspect"] = command("inspect", "user/public", "--json")
found["merge"] = command("merge", "user/kan", "user/public", "merged", "--revision", "v2")
found["missing"], found["kan"] = command("inspect", "user/nothing"), command("inspect", "user/kan")
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return json.loads(python(SCRIPT, tmp_path_factory.mktemp("hub")).splitlines()[-1])


WAYS = ["pushed", "revision", "method", "hotswap", "several", "both", "both, named", "only LoTRA"]


@pytest.mark.parametrize("way", WAYS)
def test_what_comes_back(found, way):
    assert found["back"][way] is True


def test_the_card_of_two_methods_loads_both(found):
    readme, config = found["both"]
    assert 'load_adapters(base, "user/both", revision="v2")' in readme
    assert json.loads(config)["base_model_name_or_path"] is None


@pytest.mark.parametrize("name", ["public", "own"])
def test_the_code_of_the_card_loads_the_adapter(found, name):
    assert found[name] is True


def test_the_card(found):
    card = ModelCard(found["card"])
    assert card.data.library_name == "peft" and card.data.base_model == "user/kan"
    assert {"base_model:adapter:user/kan", "digits", "kan", "lotra", "peft-plugin"} <= set(card.data.tags)
    assert card.data.eval_results[0].metric_value == 0.9
    assert re.search(r"\n\S*layers.0 +peft-lotra +\(8, 3, 9\) +\(2, full, 4\) +1 ", card.text)
    assert 'revision="v2"' in found["v2"]


def test_a_pull_request(found):
    assert found["request"].endswith("/user/public/discussions/1")
    assert found["refs"] == ["main", "refs/pr/1", "v2"]


def test_no_folder_of_this_machine_is_named(found):
    readme, config = found["here"]
    assert ModelCard(readme).data.base_model is None and json.loads(config)["base_model_name_or_path"] is None
    assert "/" not in readme.split("PeftModel.from_pretrained(base, ")[1].split(")")[0].replace("user/here", "")


@pytest.mark.parametrize("name", ["kept", "again"])
def test_the_text_of_a_person_is_kept(found, name):
    card = ModelCard(found[name])
    assert card.text.startswith("\n# My adapter\n\nIt reads scans.\n") and card.text.count("## Use it") == 1
    assert card.data.license == "mit" and {"mine", "lotra"} <= set(card.data.tags)
    assert card.data.eval_results[0].metric_value == 0.5


def test_a_private_repository_has_the_files_of_the_adapter(found):
    assert found["private"] is True
    assert found["files"] == [".gitattributes", "README.md", "adapter_config.json", "adapter_model.safetensors"]


ERRORS = {
    "public": "ValueError: .* exists and is public",
    "base_model": "HFValidationError: .*/home/ann/kan",
    "metrics": "ValueError: `metrics",
    "argument": "TypeError: .*licence",
    "lora": "ValueError: .* holds a LORA adapter",
}


@pytest.mark.parametrize("case", ERRORS)
def test_a_push_that_fails_leaves_nothing(found, case):
    assert re.match(ERRORS[case], found["errors"][case], re.DOTALL) and "user/new" not in found["repos"]


def test_commands_on_the_hub(found):
    code, out, _ = found["inspect"]
    assert code == 0 and json.loads(out)["base_model"] == "user/kan" and found["merge"][0] == 0
    for code, out, err in (found["missing"], found["kan"]):
        assert code == 1 and out == "" and err.startswith("error: ") and err.count("\n") == 1


CARDS = """
from hub_server import start_hub
hub = start_hub("user")
import json
from pathlib import Path
from behaving import X, adapted, net
from huggingface_hub import HfApi
from test_interrupted_saves import make_family
from peft_lotra import AdapterBank, push_to_hub

bank = AdapterBank(net())
bank.add("ann", adapted())
pushes = {
    "adapter": lambda repo, **kwargs: push_to_hub(adapted(), repo, **kwargs),
    "bank": bank.push_to_hub,
    "family": make_family(2).push_to_hub,
}
mine = "---\\nlicense: mit\\ntags:\\n- mine\\n---\\n\\n# My work\\n\\nIt reads scans.\\n"
found = {}
for name, push in pushes.items():
    HfApi().create_repo(f"user/{name}")
    HfApi().upload_file(path_or_fileobj=mine.encode(), path_in_repo="README.md", repo_id=f"user/{name}")
    push(f"user/{name}")
    push(name)
    push(f"user/{name}", revision="again")
    found[name] = [hub.repos[f"user/{name}"].files(at)["README.md"].content.decode() for at in ("main", "again")]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def cards(tmp_path_factory):
    trust = f"import sys\nsys.path.append({str(ROOT / 'tests' / 'trust')!r})\n"
    return json.loads(python(trust + CARDS, tmp_path_factory.mktemp("cards")).splitlines()[-1])


@pytest.mark.parametrize("kind", ["adapter", "bank", "family"])
def test_adapters_banks_and_families_keep_the_text_of_a_person(cards, kind):
    for text in cards[kind]:
        card = ModelCard(text)

        assert card.text.startswith("\n# My work\n\nIt reads scans.\n")
        assert card.text.count("```python") == 1
        assert card.data.license == "mit" and {"mine", "kan", "lotra", "peft-plugin"} <= set(card.data.tags)


def test_the_python_of_the_docs(tmp_path):
    push, pull = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "hub.md").read_text(), re.DOTALL)[:2]
    train = "[p.data.add_(0.1) for p in model.parameters() if p.requires_grad]\npushed = model"
    same = "import torch\nx = torch.rand(4, 3)\nprint(torch.equal(model(x).logits, pushed.eval()(x).logits))"
    assert "# ... train ..." in push
    script = 'from hub_server import start_hub\nstart_hub("user")\n' + push.replace("# ... train ...", train) + pull
    assert python(script + same, tmp_path).splitlines()[-1] == "True"


def test_a_script_with_a_hub_of_its_own(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import sys, huggingface_hub\nhuggingface_hub.create_repo(sys.argv[1])\n")
    command = [sys.executable, str(ROOT / "tests" / "support" / "hub_server.py"), str(script), "user/kan"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.stdout == "user/kan on the stand-in for the Hub:\n    .gitattributes\n", result.stderr
