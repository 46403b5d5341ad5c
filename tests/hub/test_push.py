# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""Adapters and their cards on the Hub, for which a server on this machine stands in."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import X, adapt, add_adapter, assert_equal, net, refused
from huggingface_hub import HfApi, ModelCard
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from torch import nn

from peft_lotra import AdapterBank, ParametricAdapter, hotswap_adapter, load_adapters, push_to_hub
from peft_lotra.kan import KAN


ROOT = Path(__file__).parents[2]
FILES = [".gitattributes", "README.md", "adapter_config.json", "adapter_model.safetensors"]
CARD_OF_A_PERSON = "---\nlicense: mit\ntags:\n- mine\n---\n\n# My work\n\nIt reads scans.\n"


@pytest.fixture
def kan_on_hub(hub):
    """A Hub with a base, `user/kan`."""
    KAN([3, 8, 2]).push_to_hub("user/kan")
    return hub


def adapt_base(source="user/kan"):
    return adapt(KAN.from_pretrained(source))


def read_file(hub, repo, name="README.md", revision="main"):
    return hub.repos[repo].files(revision)[name].content.decode()


def load(repo, **options):
    return PeftModel.from_pretrained(net(), repo, **options).eval()


def test_pushed_adapters_come_back(hub):
    model, second, swapped = adapt(), adapt(), adapt()
    add_adapter(model, "other")

    push_to_hub(model, "user/adapter")
    push_to_hub(second, "user/adapter", revision="v2")
    second.push_to_hub("user/method")
    hotswap_adapter(swapped, "user/adapter")

    assert_equal(load("user/adapter")(X), model(X))
    assert_equal(swapped(X), model(X))
    assert_equal(load("user/adapter", revision="v2")(X), second(X))
    assert_equal(load("user/method")(X), second(X))
    model.set_adapter("other")
    assert_equal(load("user/adapter", subfolder="other")(X), model(X))


@pytest.fixture
def two_methods(hub):
    """A model with LoTRA and LoRA, pushed as the revision "v2" of `user/both`; its main revision has LoTRA alone."""
    one, both = adapt(), adapt()
    lora = LoraConfig(r=2, target_modules=["head"], init_lora_weights=False)
    inject_adapter_in_model(lora, both.get_base_model(), adapter_name="lora")
    both.peft_config["lora"].base_model_name_or_path = "/home/ann/kan"
    push_to_hub(one, "user/both")
    push_to_hub(both, "user/both", revision="v2")
    return one, both.eval()


def test_adapters_of_two_methods_come_back(two_methods):
    one, both = two_methods

    loaded = load_adapters(net(), "user/both", revision="v2")
    named = load_adapters(net(), "user/both", names=["lora", "default"], revision="v2")
    main = load_adapters(net(), "user/both")

    assert_equal(loaded(X), both(X))
    assert_equal(named(X), both(X))
    assert_equal(main(X), one(X))


def test_the_card_of_two_methods_loads_both_and_names_no_folder(hub, two_methods):
    readme = read_file(hub, "user/both", revision="v2")
    config = json.loads(read_file(hub, "user/both", "lora/adapter_config.json", "v2"))

    assert 'load_adapters(base, "user/both", revision="v2")' in readme
    assert config["base_model_name_or_path"] is None


def run_code_of_card(text):
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names = {}
    exec(code, names)
    return names["model"].eval()


def test_the_code_of_a_card_loads_an_adapter_of_a_base_on_the_hub(kan_on_hub):
    model = adapt_base()
    push_to_hub(model, "user/adapter")

    loaded = run_code_of_card(read_file(kan_on_hub, "user/adapter"))

    assert_equal(loaded(X), model(X))


def test_a_card_tells_the_base_the_metrics_and_the_ranks(kan_on_hub):
    push_to_hub(adapt_base(), "user/public", metrics={"r2": 0.9}, tags=["digits"], commit_message="first")
    push_to_hub(adapt_base(), "user/public", revision="v2")

    card = ModelCard(read_file(kan_on_hub, "user/public"))

    assert card.data.library_name == "peft"
    assert card.data.base_model == "user/kan"
    assert {"base_model:adapter:user/kan", "digits", "kan", "lotra", "peft-plugin"} <= set(card.data.tags)
    assert card.data.eval_results[0].metric_value == 0.9
    assert "layers.0: (2, full, 4)\n" in card.text
    assert 'revision="v2"' in read_file(kan_on_hub, "user/public", revision="v2")


def test_a_pull_request_is_opened(hub):
    push_to_hub(adapt(), "user/public")

    request = push_to_hub(adapt(), "user/public", create_pr=True)

    assert request.pr_url.endswith("/user/public/discussions/1")
    assert sorted(hub.repos["user/public"].refs) == ["main", "refs/pr/1"]


def test_no_folder_of_this_machine_is_named(kan_on_hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    KAN.from_pretrained("user/kan").save_pretrained("kan")

    push_to_hub(adapt_base("kan"), "user/here")

    readme = read_file(kan_on_hub, "user/here")
    config = json.loads(read_file(kan_on_hub, "user/here", "adapter_config.json"))
    assert ModelCard(readme).data.base_model is None
    assert config["base_model_name_or_path"] is None
    assert "/" not in readme.split("PeftModel.from_pretrained(base, ")[1].split(")")[0].replace("user/here", "")


def upload_card_of_a_person(repo):
    HfApi().create_repo(repo)
    HfApi().upload_file(path_or_fileobj=CARD_OF_A_PERSON.encode(), path_in_repo="README.md", repo_id=repo)


def check_card_of_a_person(text):
    card = ModelCard(text)
    assert card.text.startswith("\n# My work\n\nIt reads scans.\n")
    assert card.text.count("```python") == 1
    assert card.data.license == "mit"
    assert {"mine", "kan", "lotra", "peft-plugin"} <= set(card.data.tags)
    return card


def push_bank(repo, **options):
    bank = AdapterBank(net())
    bank.add("ann", adapt())
    push_to_hub(bank, repo, **options)


def push_family(repo, **options):
    family = ParametricAdapter(KAN([1, 3, 1]), loss_of=lambda model, c: 0.0, ranks=2)
    family.fit([1, 2], train=lambda model, c: None, progress=False)
    push_to_hub(family, repo, **options)


@pytest.mark.parametrize(
    "push", [lambda repo, **options: push_to_hub(adapt(), repo, **options), push_bank, push_family]
)
def test_the_text_of_a_person_is_kept(hub, push):
    upload_card_of_a_person("user/work")

    push("user/work")
    push("work")
    push("user/work", revision="again")

    for revision in ("main", "again"):
        check_card_of_a_person(read_file(hub, "user/work", revision=revision))


def test_new_metrics_replace_the_old_ones(hub):
    upload_card_of_a_person("user/work")

    for r2 in (0.9, 0.5):
        push_to_hub(adapt(), "user/work", metrics={"r2": r2})
    push_to_hub(adapt(), "user/work", revision="again")

    for revision in ("main", "again"):
        card = check_card_of_a_person(read_file(hub, "user/work", revision=revision))
        assert card.data.eval_results[0].metric_value == 0.5


def test_a_private_repository_has_the_files_of_the_adapter(hub):
    push_to_hub(adapt(), "user/private", private=True)

    assert hub.repos["user/private"].private
    assert sorted(hub.repos["user/private"].files("main")) == FILES


def lora():
    return get_peft_model(nn.Sequential(nn.Linear(3, 2)), LoraConfig(target_modules=["0"]))


WRONG_PUSHES = {
    "a folder as base": (adapt, {"base_model": "/home/ann/kan"}, ValueError, "/home/ann/kan"),
    "nan": (adapt, {"metrics": {"r2": float("nan")}}, ValueError, "`metrics"),
    "a misspelt argument": (adapt, {"licence": "mit"}, TypeError, "licence"),
    "LoRA": (lora, {}, ValueError, "holds a LORA adapter"),
}


@pytest.mark.parametrize("kind", WRONG_PUSHES)
def test_a_push_that_fails_leaves_nothing(hub, kind):
    make, options, error, message = WRONG_PUSHES[kind]

    with pytest.raises(error, match=message):
        push_to_hub(make(), "user/new", **options)

    assert not hub.repos


def test_a_public_repository_does_not_become_private(hub):
    push_to_hub(adapt(), "user/public")

    with refused("exists and is public"):
        push_to_hub(adapt(), "user/public", private=True)


def test_the_python_of_the_docs_runs(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    push, pull = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "hub.md").read_text(), re.DOTALL)[:2]
    train = "[p.data.add_(0.1) for p in model.parameters() if p.requires_grad]"
    assert "# ... train ..." in push
    names = {}

    exec(push.replace("# ... train ...", train), names)
    pushed = names["model"].eval()
    exec(pull, names)

    x = torch.rand(4, 3)
    assert_equal(names["model"](x), pushed(x))


def test_a_script_has_its_own_hub(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import sys, huggingface_hub\nhuggingface_hub.create_repo(sys.argv[1])\n")
    command = [sys.executable, str(ROOT / "tests" / "support" / "hub_server.py"), str(script), "user/kan"]

    result = subprocess.run(command, capture_output=True, text=True)

    assert result.stdout == "user/kan on the stand-in for the Hub:\n    .gitattributes\n", result.stderr
