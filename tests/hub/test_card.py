# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The model card beside a saved adapter; `test_push.py` has the cards of the Hub."""

import re
from types import ModuleType

import pytest
import torch
import yaml
from foreign import pykan
from helpers import assert_equal, edit_config, refused
from huggingface_hub import EvalResult, ModelCard
from orders import Layer
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from peft_lotra import LinearPath, LoTRAConfig, register_kan_layer, write_model_card
from peft_lotra.kan import KAN, KANLinear


@pytest.fixture
def model():
    return get_peft_model(KAN([2, 3, 1]), LoTRAConfig(r=2, init_weights=False))


@pytest.fixture
def readme(model, tmp_path):
    model.save_pretrained(tmp_path)
    return tmp_path / "README.md"


def test_a_plain_save_leaves_a_card(model, readme):
    text = readme.read_text()

    assert ModelCard(text).data.tags == ["kan", "lotra", "peft-plugin"] and text.count("# LoTRA adapter") == 1
    assert "More Information Needed" not in text
    assert str(readme.parent) not in text

    assert "\nlayers.0: (2, full, 2)\n" in text
    assert " kB of float32\n" in text

    for _ in range(2):  # once is as good as twice
        model.save_pretrained(readme.parent)
        assert readme.read_text() == text
    write_model_card(None, readme.parent)

    assert readme.read_text() == text


def code_in(folder):
    """The python of the card in a folder."""
    return (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]


def code_of(base, folder, adapter_config=None, from_files=False, **kwargs):
    model = get_peft_model(base, LoTRAConfig(r=1))
    model.save_pretrained(folder)
    edit_config(folder, **(adapter_config or {}))
    write_model_card(None if from_files else model, folder, **kwargs)
    return code_in(folder)


def test_the_snippet_runs_in_the_folder(model, readme, monkeypatch):
    write_model_card(model, readme.parent)
    monkeypatch.chdir(readme.parent)
    names = {}

    exec(code_in(readme.parent), names)

    assert_equal(get_peft_model_state_dict(names["model"]), get_peft_model_state_dict(model))


def test_code_with_a_fence_or_the_end_of_the_card_keeps_the_card_whole(model, readme):
    """Read it as Markdown does: a block ends at a fence of its own length."""
    markdown = pytest.importorskip("markdown").markdown
    code = 'base = """\n```\n<!-- The part that peft_lotra wrote ends here. -->\n````\n"""'

    write_model_card(model, readme.parent, base_code=code)
    text = readme.read_text()
    model.save_pretrained(readme.parent)

    assert readme.read_text() == text
    blocks = markdown(ModelCard(text).text, extensions=["fenced_code"]).split("<pre>")
    assert len(blocks) == 4
    assert "PeftModel.from_pretrained" in blocks[2].partition("</pre>")[0]
    assert blocks[3].startswith('<code class="language-text">layers.0: ')


def test_a_save_that_is_refused_leaves_no_card(model, tmp_path):
    with refused("as safetensors only"):
        model.save_pretrained(tmp_path, safe_serialization=False)

    assert not list(tmp_path.iterdir())


CARD_OF_A_PERSON = "---\nlicense: mit\nlibrary_name: peft\n---\n# Mine\n\n### Framework versions\n\n- PEFT 0.1\n"


def test_the_snippet_loads_adapters_of_other_methods_too(tmp_path, monkeypatch):
    base_code = (
        "import torch\nfrom peft_lotra.kan import KAN\ntorch.manual_seed(0)\n"
        "base = torch.nn.Sequential(KAN([2, 3]), torch.nn.Linear(3, 1))"
    )
    namespace = {}
    exec(base_code, namespace)
    model = get_peft_model(namespace["base"], LoTRAConfig(r=2, init_weights=False))
    lora = LoraConfig(r=1, target_modules=["1"], init_lora_weights=False)
    inject_adapter_in_model(lora, model.get_base_model(), adapter_name="head")
    x = torch.rand(5, 2)

    model.save_pretrained(tmp_path)
    plain_text = (tmp_path / "README.md").read_text()
    write_model_card(model, tmp_path, base_code=base_code)
    monkeypatch.chdir(tmp_path)
    exec(code_in(tmp_path), namespace)

    sentence = 'trained together with adapters of other methods, which the code below loads, too: "head".'
    assert sentence in plain_text
    assert sentence in (tmp_path / "README.md").read_text()
    assert 'load_adapters(base, ".")' in plain_text
    torch.testing.assert_close(namespace["model"](x), model.eval()(x))


def test_a_save_leaves_the_card_of_a_person_alone(model, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(CARD_OF_A_PERSON)

    model.save_pretrained(tmp_path)
    saved = readme.read_text()
    model.peft_config["default"].save_pretrained(str(tmp_path / "subfolder"))

    assert "# Mine" in saved
    assert "## Use it" not in saved
    assert readme.read_text() == saved
    assert not (tmp_path / "subfolder/README.md").exists()


def test_a_card_that_is_asked_for_comes_below_the_text_of_a_person_and_is_replaced_there(model, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(CARD_OF_A_PERSON)
    model.save_pretrained(tmp_path)

    write_model_card(model, tmp_path)
    readme.write_text(readme.read_text() + "\nAfter.\n")
    model.save_pretrained(tmp_path)
    write_model_card(model, tmp_path, tags="scans")

    text = readme.read_text()
    assert text.index("# Mine") < text.index("## Use it") < text.index("After.")
    assert text.count("## Use it") == 1
    assert ModelCard(text).data.license == "mit"
    assert "scans" in ModelCard(text).data.tags


def test_front_matter_that_exists_is_kept(model, readme):
    result = EvalResult("tabular-regression", "scikit-learn/diabetes", "Diabetes", "r2", 0.5, metric_name="R2")
    card = ModelCard(readme.read_text())
    card.data.eval_results, card.data.model_name = [result], "x"
    card.save(readme)
    write_model_card(model, readme.parent, base_model="ann/kan", license="mit", repo_id="ann/x")
    model.save_pretrained(readme.parent)
    data = ModelCard(readme.read_text()).data

    assert (data.license, data.base_model, data.eval_results) == ("mit", "ann/kan", [result])
    assert "base_model:adapter:ann/kan" in data.tags


def test_the_code_of_the_user_stays(model, readme):
    write_model_card(model, readme.parent, base_code="\nbase = mine()\n")
    model.save_pretrained(readme.parent)
    write_model_card(model, readme.parent)

    assert "\n\nbase = mine()\n\nmodel = " in code_in(readme.parent)

    write_model_card(model, readme.parent, base_model="ann/kan")  # which the code did not build

    assert "mine()" not in code_in(readme.parent)


def test_the_code_makes_a_kan_of_the_same_sizes_and_grid(tmp_path):
    base = KAN([2, 3, 1], grid_size=4, spline_order=2, grid_range=(0.0, 2.0), norm="layer")
    namespace, bounds = {}, base.layers[0].grid_bounds
    exec(code_of(base, tmp_path).split("\nmodel =")[0], namespace)

    assert_equal(namespace["base"].layers[0].grid_bounds, bounds)
    assert namespace["base"](torch.rand(4, 2)).shape == (4, 1)


UNEQUAL_GRIDS = KAN([2, 3, 1], grid_size=4)
UNEQUAL_GRIDS.layers[1] = KANLinear(3, 1, grid_size=7)


@pytest.mark.parametrize("base", [nn.Sequential(KAN([2, 1])), UNEQUAL_GRIDS])
def test_the_code_leaves_other_bases_to_the_user(tmp_path, base):
    assert "base = ...  # the network" in code_of(base, tmp_path)
    assert "This card does not say how to build the base" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("from_files", [False, True])
def test_the_code_loads_a_base_from_the_hub(tmp_path, from_files):
    code = code_of(KAN([2, 4, 1]), tmp_path, {"revision": "v1"}, from_files, base_model="ann/kan")
    assert 'from peft_lotra.kan import KAN\n\nbase = KAN.from_pretrained("ann/kan", revision="v1")' in code


def our_own():
    return KAN([2, 3, 1])


def efficient_kan_of_a_clone():
    """Return a network whose class is in a module of the name that a clone of efficient-kan has."""
    module = ModuleType("efficient_kan")
    exec("from stand_ins import OldEfficientKANLayer\nfrom foreign import Loop\nclass KAN(Loop): pass", vars(module))
    module.KAN.__module__ = "efficient_kan"
    return module.KAN(module.OldEfficientKANLayer(2, 3))


def registered_layer():
    register_kan_layer("mine", matches=Layer, coefficients=("A", "i o k"), residual=("base", "o i"))
    return nn.Sequential(Layer(2, 3, 4, "i o k", residual="oi"))


def transformer():
    """Return a GPT-2 from the Hub into which KAN layers were put."""
    config = GPT2Config(vocab_size=8, n_positions=4, n_embd=8, n_layer=1, n_head=1, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config)
    model.transformer.h[0].mlp = KAN([8, 2, 8])
    model.config._name_or_path = "ann/gpt2"
    return model


IMPORT_KAN = "from peft_lotra.kan import KAN"


@pytest.mark.parametrize(
    ("make_base", "words", "packages", "first_code"),
    [
        (our_own, "a network of the class `peft_lotra.kan.KAN`", None, f"{IMPORT_KAN}\n\nbase = KAN(widths=[2, 3,"),
        (pykan, "a network of the class `kan.MultKAN.MultKAN`", "pykan pandas", "base = ...  #"),
        (efficient_kan_of_a_clone, "a network of the class `efficient_kan.KAN`", None, "base = ...  #"),
        (
            transformer,
            "[ann/gpt2](https://huggingface.co/ann/gpt2)",
            "transformers",
            "from transformers.models.gpt2.modeling_gpt2 import GPT2LMHeadModel\n\n"
            'base = GPT2LMHeadModel.from_pretrained("ann/gpt2")\n# this class has no KAN layers: put in those',
        ),
        (registered_layer, "a network of the class `torch.nn.modules.container.Sequential`", None, "base = ...  #"),
    ],
)
def test_a_card_names_the_base_its_packages_and_its_code(tmp_path, make_base, words, packages, first_code):
    code = code_of(make_base(), tmp_path)

    text = (tmp_path / "README.md").read_text()
    install = re.findall(r"^pip install (?!\"peft-lotra)(.*)$", text, re.MULTILINE)
    assert f"the Kolmogorov-Arnold (KAN) layers of {words}.\n" in text
    assert install == [packages] * (packages is not None)
    assert code.partition("import PeftModel\n\n")[2].startswith(first_code)
    assert ("This card does not say" in text) is ("base = ..." in code)


def test_the_packages_of_given_code_are_installed(tmp_path):
    """A module named kan is pykan's only if the layers are."""
    code_of(nn.Sequential(pykan()), tmp_path / "pykan", base_code="from kan import KAN\nbase = make()")
    code_of(KAN([2, 1]), tmp_path / "other", base_code="from kan import KAN\nbase = KAN()")

    assert "\npip install pykan pandas\n" in (tmp_path / "pykan/README.md").read_text()
    assert "pandas" not in (tmp_path / "other/README.md").read_text()


@pytest.mark.parametrize("value", ["X; print(1)", "X`\n```\n# title", 3])
def test_a_class_that_would_be_code_is_not_written(tmp_path, value):
    mapping = {"base_model_class": value, "parent_library": "nets"}
    code = code_of(KAN([2, 1]), tmp_path, {"auto_mapping": mapping}, True)

    assert "base = ...  # the network" in code
    assert "layers of a network whose class is not known." in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("text", [b"---\ntags: [a\n---\n", b"---\n- a\n---\n", b"\xff\xfe\0bad"])
def test_a_card_that_cannot_be_read_is_left_as_it_is(model, readme, text):
    readme.write_bytes(text)

    with pytest.raises((ValueError, yaml.YAMLError)):
        write_model_card(model, readme.parent)
    with pytest.warns(UserWarning, match="The adapter is saved, its model card is not written"):
        model.peft_config["default"].save_pretrained(str(readme.parent))
    assert readme.read_bytes() == text


def test_wrong_arguments_of_a_card_are_refused(model, readme):
    before = readme.read_text()

    for kwargs in ({"metrics": {"r2": "0.9"}}, {"metrics": {"r2": float("inf")}}, {"base_model": "./kan"}):
        with pytest.raises(ValueError):
            write_model_card(model, readme.parent, **kwargs)
    with pytest.raises(SyntaxError):
        write_model_card(model, readme.parent, base_code="base = (")
    assert readme.read_text() == before
    with refused("Save the adapter there first"):
        write_model_card(model, readme.parent / "nowhere")


@pytest.mark.parametrize("names", [["default", "anna"], ["anna", "ben"]])
def test_several_adapters_have_one_card(tmp_path, names):
    config = LoTRAConfig(r=2, train=["core"])
    model = get_peft_model(KAN([2, 1]), config, adapter_name=names[0])
    model.add_adapter(names[1], config)
    model.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()

    assert f"Adapters in subfolders of their names: {names[1]}." in text
    assert text.count("\nlayers.0: ") == 1
    assert ('subfolder="anna"' in text) is (names[0] == "anna")
    assert not list(tmp_path.glob("*/README.md"))


def test_the_card_of_a_base_with_a_path_builds_both(tmp_path):
    model = get_peft_model(LinearPath(KAN([2, 3, 1])), LoTRAConfig(r=1))

    model.save_pretrained(tmp_path)
    write_model_card(model, tmp_path)

    text = (tmp_path / "README.md").read_text()
    assert "from peft_lotra import LinearPath\nfrom peft_lotra.kan import KAN\n\nbase = KAN(widths=" in text
    assert "\nbase = LinearPath(base)\n" in text
