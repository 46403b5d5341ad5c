# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The model card beside a saved adapter; `test_push.py` has the cards of the Hub."""

from __future__ import annotations

import pytest
import torch
import yaml
from huggingface_hub import EvalResult, ModelCard
from peft import get_peft_model, get_peft_model_state_dict

from peft_lotra import LoTRAConfig, write_model_card
from peft_lotra.kan import KAN


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
    assert "More Information Needed" not in text and str(readme.parent) not in text
    norm = model.base_model.model.layers[0].get_delta_weight("default").norm()
    assert f"| `layers.0` | peft-lotra | (3, 2, 9) | (2, 2, 2) | 1 | {norm:.3g} | 36 | 0.1 |" in text
    for _ in range(2):  # once is as good as twice
        model.save_pretrained(readme.parent)
        assert readme.read_text() == text
    write_model_card(None, readme.parent)
    assert readme.read_text() == text


def test_the_snippet_runs_in_the_folder(model, readme, monkeypatch):
    write_model_card(model, readme.parent)
    monkeypatch.chdir(readme.parent)
    namespace = {}
    exec(readme.read_text().split("```python\n")[1].split("```")[0], namespace)
    tensors = get_peft_model_state_dict(namespace["model"])
    assert all(torch.equal(tensors[name], it) for name, it in get_peft_model_state_dict(model).items())


def test_a_save_leaves_the_card_of_a_person_alone(model, tmp_path):
    text = "---\nlicense: mit\nlibrary_name: peft\n---\n# Mine\n\n### Framework versions\n\n- PEFT 0.1\n"
    (tmp_path / "README.md").write_text(text)
    model.save_pretrained(tmp_path)
    found = (tmp_path / "README.md").read_text()
    assert "# Mine" in found and "## Use it" not in found
    model.peft_config["default"].save_pretrained(str(tmp_path / "subfolder"))
    assert (tmp_path / "README.md").read_text() == found and not (tmp_path / "subfolder/README.md").exists()
    # asked for, the card comes below the text, and is replaced there
    write_model_card(model, tmp_path)
    with open(tmp_path / "README.md", "a") as file:
        file.write("\nAfter.\n")
    model.save_pretrained(tmp_path)
    write_model_card(model, tmp_path, tags="scans")
    found = (tmp_path / "README.md").read_text()
    assert found.index("# Mine") < found.index("## Use it") < found.index("After.") and found.count("## Use it") == 1
    assert ModelCard(found).data.license == "mit" and "scans" in ModelCard(found).data.tags


def test_front_matter_that_exists_is_kept(model, readme):
    result = EvalResult("tabular-regression", "scikit-learn/diabetes", "Diabetes", "r2", 0.5, metric_name="R2")
    write_model_card(model, readme.parent, base_model="ann/kan", license="mit", metrics=[result], repo_id="ann/x")
    model.save_pretrained(readme.parent)
    data = ModelCard(readme.read_text()).data
    assert (data.license, data.base_model, data.eval_results) == ("mit", "ann/kan", [result])
    assert "base_model:adapter:ann/kan" in data.tags and "| R2 | 0.5 | Diabetes |" in readme.read_text()


@pytest.mark.parametrize("text", [b"---\ntags: [a\n---\n", b"---\n- a\n---\n", b"\xff\xfe\0bad"])
def test_a_card_that_cannot_be_read(model, readme, text):
    readme.write_bytes(text)
    with pytest.raises((ValueError, yaml.YAMLError)):
        write_model_card(model, readme.parent)
    with pytest.warns(UserWarning, match="The adapter is saved, its model card is not written"):
        model.peft_config["default"].save_pretrained(str(readme.parent))
    assert readme.read_bytes() == text


def test_bad_arguments(model, readme):
    before = readme.read_text()
    for kwargs in ({"metrics": {"r2": "0.9"}}, {"metrics": {"r2": float("inf")}}, {"base_model": "./kan"}):
        with pytest.raises(ValueError):
            write_model_card(model, readme.parent, **kwargs)
    assert readme.read_text() == before
    with pytest.raises(ValueError, match="Save the adapter there first"):
        write_model_card(model, readme.parent / "nowhere")


@pytest.mark.parametrize("names", [["default", "anna"], ["anna", "ben"]])
def test_several_adapters_have_one_card(tmp_path, names):
    config = LoTRAConfig(r=2, train=["core"])
    model = get_peft_model(KAN([2, 1]), config, adapter_name=names[0])
    model.add_adapter(names[1], config)
    model.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert f"Adapters in subfolders of their names: {names[1]}." in text and text.count("| `layers.0` |") == 1
    assert ('subfolder="anna"' in text) is (names[0] == "anna")
    assert not list(tmp_path.glob("*/README.md"))
