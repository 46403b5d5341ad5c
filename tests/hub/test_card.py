# Copyright 2026 the peft-lotra authors.
# SPDX-License-Identifier: Apache-2.0

"""The model card beside a folder; `test_push.py` has the cards of the Hub."""

from __future__ import annotations

import re

import pytest
import torch
from huggingface_hub import EvalResult, ModelCard
from peft import get_peft_model, get_peft_model_state_dict

from peft_lotra import LoTRAConfig, write_model_card
from peft_lotra.hub.card import combine_cards, load_card, written_code
from peft_lotra.kan import KAN, KANConfig, KANModel


class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.kan = KAN([2, 3, 1])


@pytest.fixture
def model():
    return get_peft_model(KANModel(KANConfig(widths=(2, 4, 1))), LoTRAConfig(r=2, init_weights=False))


class TestWriteModelCard:
    def test_beside_a_plain_save(self, model, tmp_path):
        model.save_pretrained(tmp_path)
        write_model_card(model, tmp_path)
        text = (tmp_path / "README.md").read_text()
        assert "More Information Needed" not in text and "## Use it" in text and str(tmp_path) not in text
        # once is as good as twice, and PEFT keeps it
        write_model_card(model, tmp_path)
        assert (tmp_path / "README.md").read_text() == text
        model.save_pretrained(tmp_path)
        write_model_card(model, tmp_path)
        assert (tmp_path / "README.md").read_text() == text
        assert not list(tmp_path.glob("*.tmp"))

    def test_the_snippet_runs_in_the_folder(self, model, tmp_path, monkeypatch):
        model.save_pretrained(tmp_path)
        write_model_card(model, tmp_path)
        snippet = (tmp_path / "README.md").read_text().split("```python\n")[1].split("```")[0]
        monkeypatch.chdir(tmp_path)
        namespace = {}
        exec(snippet, namespace)
        assert type(namespace["model"].get_base_model()) is KANModel
        tensors = get_peft_model_state_dict(namespace["model"])
        for name, tensor in get_peft_model_state_dict(model).items():
            assert torch.equal(tensors[name], tensor)

    def test_text_around_the_part_is_kept(self, model, tmp_path):
        readme = tmp_path / "README.md"
        readme.write_text("---\nlicense: mit\nbase_model: someone/kan\n---\nBefore.\n")
        write_model_card(model, tmp_path)
        with open(readme, "a") as file:
            file.write("After.\n")
        write_model_card(model, tmp_path, tags="scans", metrics={"mse": 0.1})
        text = readme.read_text()
        assert text.index("Before.") < text.index("## Use it") < text.index("After.")
        assert text.count("## Use it") == 1
        data = ModelCard(text).data
        assert data.license == "mit" and data.base_model == "someone/kan" and "scans" in data.tags
        assert data.eval_results[0].metric_value == 0.1

    def test_a_card_without_front_matter(self, model, tmp_path):
        (tmp_path / "README.md").write_text("# Mine\n")
        write_model_card(model, tmp_path)
        assert ModelCard.load(tmp_path / "README.md").text.startswith("# Mine\n")

    @pytest.mark.parametrize(
        "text",
        [
            "---\ntags: [a\n---\n",
            "---\n- a\n- b\n---\n",
            "---\ntags: a\n",
            "---\nmodel-index: 3\n---\n",
            "---\ntags: 3\n---\n",
            "---\nbase_model: [3]\n---\n",
            "---\nmetrics: {a: 1}\n---\n",
        ],
    )
    @pytest.mark.parametrize("of_files", [False, True])
    def test_broken_front_matter(self, model, tmp_path, text, of_files):
        model.save_pretrained(tmp_path)
        (tmp_path / "README.md").write_text(text)
        with pytest.raises(ValueError, match="The front matter of .*README.md is broken"):
            write_model_card(None if of_files else model, tmp_path)
        assert (tmp_path / "README.md").read_text() == text

    def test_bad_arguments(self, model, tmp_path):
        with pytest.raises(ValueError, match="is no folder"):
            write_model_card(model, tmp_path / "nothing")
        with pytest.raises(ValueError, match="huggingface_hub.EvalResult"):
            write_model_card(model, tmp_path, metrics=["r2"])
        with pytest.raises(ValueError, match="finite numbers"):
            write_model_card(model, tmp_path, metrics={"r2": "0.9"})
        assert not list(tmp_path.iterdir())

    def test_a_folder_of_other_adapters(self, model, tmp_path):
        model.save_pretrained(tmp_path)
        (tmp_path / "other").mkdir()
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            (tmp_path / name).rename(tmp_path / "other" / name)
        with pytest.raises(ValueError, match=r"has none of the adapters \['default'\] of the model, only \['other'\]"):
            write_model_card(model, tmp_path)

    def test_results_by_the_user(self, model, tmp_path):
        result = EvalResult("tabular-regression", "scikit-learn/diabetes", "Diabetes", "r2", 0.5, metric_name="R2")
        write_model_card(model, tmp_path, metrics=[result])
        assert ModelCard.load(tmp_path / "README.md").data.eval_results == [result]
        assert "| R2 | 0.5 | Diabetes |" in (tmp_path / "README.md").read_text()

    def test_results_of_an_old_card_stay_in_their_table(self, model, tmp_path):
        result = EvalResult("other", "unknown", "a|b\n# Title", "r2", 0.5, metric_name="`x`<b>[y](z)")
        write_model_card(model, tmp_path, metrics=[result])
        write_model_card(model, tmp_path)
        text = (tmp_path / "README.md").read_text()
        assert r"| \x60x\x60\x3cb>\x5by](z) | 0.5 | a\x7cb\n# Title |" in text and "\n# Title" not in text

    def test_the_same_from_the_files(self, model, tmp_path):
        model.save_pretrained(tmp_path)
        write_model_card(model, tmp_path)
        text = (tmp_path / "README.md").read_text()
        write_model_card(None, tmp_path)
        assert (tmp_path / "README.md").read_text() == text

    @pytest.mark.parametrize(
        ("base", "code"),
        [
            (KAN([2, 3, 1], grid_size=4), "base = KAN([2, 3, 1], grid_size=4, spline_order=3, grid_range=(-1, 1))"),
            (Network(), f"from {__name__} import Network\n\nbase = Network()\n# now load into `base` the weights"),
            (torch.nn.Sequential(KAN([2, 1])), "base = ...  # a torch.nn.Sequential, with the weights"),
        ],
    )
    def test_a_base_that_is_not_on_the_hub(self, tmp_path, base, code):
        write_model_card(get_peft_model(base, LoTRAConfig()), tmp_path)
        text = (tmp_path / "README.md").read_text()
        assert code in text and "not on the Hub" in text and "AutoPeftModel" not in text

    def test_a_revision_of_the_base(self, tmp_path):
        base = KANModel(KANConfig(widths=(2, 4, 1)))
        model = get_peft_model(base, LoTRAConfig(revision="v1"))
        write_model_card(model, tmp_path, repo_id="ann/x", base_model="ann/kan")
        text = (tmp_path / "README.md").read_text()
        assert 'KANModel.from_pretrained("ann/kan", revision="v1")' in text and "AutoPeftModel" in text

    def test_a_base_that_the_snippet_finds(self, model, tmp_path):
        model.save_pretrained(tmp_path)
        write_model_card(model, tmp_path, repo_id="ann/x", revision="v2", base_model="ann/kan")
        text = (tmp_path / "README.md").read_text()
        assert 'model = PeftModel.from_pretrained(base, "ann/x", revision="v2")\n' in text
        assert ModelCard(text).data.base_model == "ann/kan" and "is not on the Hub" not in text

    def test_which_adapters_lie_in_subfolders(self, model, tmp_path):
        model.add_adapter("anna", model.peft_config["default"])
        model.add_adapter("ben", model.peft_config["default"])
        write_model_card(model, tmp_path)
        assert "all but default are loaded by their" in (tmp_path / "README.md").read_text()
        model.delete_adapter("default")
        write_model_card(model, tmp_path)
        assert "anna, ben; all are loaded by their" in (tmp_path / "README.md").read_text()

    def test_adapters_in_subfolders(self, model, tmp_path):
        model.add_adapter("other", LoTRAConfig(r=1))
        model.save_pretrained(tmp_path, selected_adapters=["other"])
        write_model_card(model, tmp_path, repo_id="ann/x")
        text = (tmp_path / "README.md").read_text()
        assert '"ann/x", subfolder="other")' in text and "AutoPeftModel" not in text and "other: " not in text
        model.save_pretrained(tmp_path)
        write_model_card(model, tmp_path, repo_id="ann/x")
        text = (tmp_path / "README.md").read_text()
        assert "The adapters here are default, other;" in text
        assert "| default: `kan.layers.0` |" in text and "| **other: total** | | | | **" in text


def test_the_code_of_a_card(model, tmp_path):
    code = "import nets\n\nbase = nets.build()"
    model.save_pretrained(tmp_path)
    assert written_code(None) is None
    assert "# now load into `base`" in written_code(load_card(tmp_path / "README.md"))
    write_model_card(model, tmp_path, base_code=f"\n{code}\n")
    assert written_code(load_card(tmp_path / "README.md")) == code
    write_model_card(None, tmp_path, metrics={"mse": 0.5})
    assert written_code(load_card(tmp_path / "README.md")) == code
    model.save_pretrained(tmp_path)  # what a person gave stays
    card = load_card(tmp_path / "README.md")
    assert written_code(card) == code and card.data.eval_results[0].metric_value == 0.5


class TestLoadCard:
    def test_no_file(self, tmp_path):
        assert load_card(tmp_path / "README.md") is None

    @pytest.mark.parametrize("start", ["", "\ufeff"])
    def test_text_and_front_matter(self, tmp_path, start):
        (tmp_path / "README.md").write_text(
            f"{start}---\r\nlicense: mit\r\n---\r\n# Mine\r\n", encoding="utf-8", newline=""
        )
        card = load_card(tmp_path / "README.md")
        assert card.data.license == "mit" and card.text.strip() == "# Mine"

    def test_the_error_names_the_origin(self, tmp_path):
        (tmp_path / "README.md").write_text("---\ntags: [a\n---\n")
        with pytest.raises(ValueError, match="The front matter of that file is broken"):
            load_card(tmp_path / "README.md", "that file")


class TestCombineCards:
    PERSON = ModelCard("---\nlicense: mit\ntags: [mine]\n---\n# Mine\n\nIt reads scans.\n")

    def generated(self, model, folder):
        model.save_pretrained(folder)
        write_model_card(model, folder, metrics={"mse": 0.5})
        return load_card(folder / "README.md")

    def test_one_card(self):
        assert combine_cards(None, None) is None
        assert combine_cards(self.PERSON, None) is combine_cards(None, self.PERSON) is self.PERSON

    def test_a_generated_card_adds_its_facts(self, model, tmp_path):
        there = ModelCard(str(self.PERSON))
        combined = combine_cards(self.generated(model, tmp_path), there)
        assert combined.text == self.PERSON.text and combined.data.license == "mit"
        assert {"mine", "lotra"} <= set(combined.data.tags) and combined.data.eval_results[0].metric_value == 0.5

    @pytest.mark.parametrize("change", ["text", "front matter"])
    def test_a_person_wrote_the_card_of_the_folder(self, model, tmp_path, change):
        here = self.generated(model, tmp_path)
        if change == "text":
            here.text += "\nIt reads other scans.\n"
        else:
            here.data.license = "apache-2.0"
        assert combine_cards(here, ModelCard(str(self.PERSON))) is here


def test_saving_leaves_a_card(model, tmp_path):
    model.save_pretrained(tmp_path / "a")
    text = (tmp_path / "a" / "README.md").read_text()
    assert "## Layers" in text and "[More Information Needed]" not in text and "@article{gao2025lotra" in text
    assert re.search(r"^pip install .*peft-lotra", text, re.MULTILINE)
    model.save_pretrained(tmp_path / "b", is_main_process=False)
    assert not (tmp_path / "b" / "README.md").exists()


def test_a_card_that_cannot_be_written_does_not_undo_the_saving(model, tmp_path, monkeypatch):
    def fail(*args):
        raise ValueError("no card today")

    monkeypatch.setattr(type(model.base_model), "write_card", staticmethod(fail))
    with pytest.warns(UserWarning, match="is saved, its model card is not written: no card today"):
        model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").is_file()


def test_license_and_metrics_by_adapter(model, tmp_path):
    model.save_pretrained(tmp_path)
    write_model_card(model, tmp_path, license="apache-2.0", metrics={"default": {"accuracy": 0.9}})
    card = load_card(tmp_path / "README.md")
    assert card.data.license == "apache-2.0" and "default: accuracy | 0.9" in card.text
    with pytest.raises(ValueError, match="names the adapters"):
        write_model_card(model, tmp_path, metrics={"nobody": {"accuracy": 0.9}})


@pytest.mark.parametrize("name", ["repo_id", "revision", "license", "base_code"])
def test_arguments_that_are_no_strings(model, tmp_path, name):
    model.save_pretrained(tmp_path)
    before = (tmp_path / "README.md").read_text()
    with pytest.raises(ValueError, match=name):
        write_model_card(model, tmp_path, **{name: 3})
    assert (tmp_path / "README.md").read_text() == before
