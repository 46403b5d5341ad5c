# %% [markdown]
# # Adapt a language model with KAN layers
#
# Train a transformer with KAN feed-forward blocks on one text, and adapt its KAN layers to another. The model is GPT-2
# from `transformers`. The KANs are `qkan`'s copies of efficient-kan. In [kan-gpt](https://github.com/AdityaNG/kan-gpt),
# the projections of the attention and the output head are KANs, too: an adapter then changes all of them, unless you
# name layers in `target_modules`. Run `pip install qkan` first.

# %%
import torch
from peft import PeftModel, get_peft_model
from qkan.kan import KAN
from transformers import GPT2Config, GPT2LMHeadModel

from peft_lotra import LoTRAConfig, find_kan_layers


class KANFeedForward(torch.nn.Module):
    """Flatten tokens into rows, which many copies of efficient-kan require."""

    def __init__(self, width, hidden):
        super().__init__()
        self.kan = KAN([width, hidden, width], grid_size=3)

    def forward(self, x):
        return self.kan(x.reshape(-1, x.shape[-1])).view_as(x)


def make_model():
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=128,
        n_positions=32,
        n_embd=32,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPT2LMHeadModel(config)
    for block in model.transformer.h:
        block.mlp = KANFeedForward(32, 16)
    return model


print(find_kan_layers(make_model()))

# %% [markdown]
# Define two texts with one token per letter. One training loop serves the base and the adapted model:

# %%
CHEMISTRY = (
    "sodium reacts with water, and potassium reacts with water faster "
    "than sodium. " * 8
)
COOKING = (
    "stir the onions in butter, and the garlic after the onions, "
    "on a low flame. " * 8
)


def windows(text, length=32):
    tokens = torch.tensor([ord(letter) for letter in text])
    return tokens[: len(tokens) // length * length].view(-1, length)


def loss_on(model, text):
    batch = windows(text)
    return model(input_ids=batch, labels=batch).loss


def train(model, text, steps, lr):
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr
    )
    for _ in range(steps):
        optimizer.zero_grad()
        loss_on(model, text).backward()
        optimizer.step()
    model.eval()


base = make_model()
train(base, CHEMISTRY, steps=60, lr=1e-2)
state = {name: value.clone() for name, value in base.state_dict().items()}
before = loss_on(base, COOKING).item()

# %% [markdown]
# Attach an adapter, and train it. `target_modules` is not needed: all KAN layers are found. The blocks flatten the tokens
# of all sentences into rows, and mixed batches (`adapter_names`) still work.

# %%
model = get_peft_model(base, LoTRAConfig(r=4, task_type="CAUSAL_LM"))
model.print_trainable_parameters()
train(model, COOKING, steps=60, lr=2e-2)
after = loss_on(model, COOKING).item()
print(f"loss on the other text: {before:.2f} before, {after:.2f} after")
assert after < 0.9 * before

# %% [markdown]
# Save the adapter, and load it onto the same base. A mixed batch then uses the base for one sentence and the adapter
# for another. Merging restores the class and the keys of the model:

# %%
model.save_pretrained("cooking")
fresh = make_model()
fresh.load_state_dict(state)
loaded = PeftModel.from_pretrained(fresh, "cooking").eval()
torch.testing.assert_close(loss_on(loaded, COOKING), loss_on(model, COOKING))

both = windows(COOKING)[:2]
with torch.no_grad():
    mixed = loaded(input_ids=both, adapter_names=["__base__", "default"]).logits
    torch.testing.assert_close(mixed[1], loaded(input_ids=both).logits[1])

merged = loaded.merge_and_unload()  # a GPT2LMHeadModel with the same keys
assert list(merged.state_dict()) == list(state)

# %% [markdown]
# If the new text needs another head or embedding, train a copy of it together with the adapter:
# `LoTRAConfig(r=4, modules_to_save=["lm_head"])`.
