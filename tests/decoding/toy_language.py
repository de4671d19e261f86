"""A tiny random language model whose tokens are numbers, and a module that trains it."""

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

END = 1


class Numbers:
    """A tokenizer: a text is its tokens' numbers."""

    eos_token_id, pad_token_id = END, 0

    def __call__(self, text):
        return {"input_ids": [int(word) for word in text.split()]}

    def decode(self, ids, **_):
        return "".join(f"{int(i)} " for i in ids if int(i) not in (0, END))

    def batch_decode(self, rows, **_):
        return [self.decode(row) for row in rows]


def random_model(kind="llama", seed=0, vocabulary=40):
    torch.manual_seed(seed)
    shared = {"vocab_size": vocabulary, "eos_token_id": END, "pad_token_id": 0, "bos_token_id": 2}
    if kind == "llama":
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        model = LlamaForCausalLM(LlamaConfig(**shared, **sizes, num_key_value_heads=2))
    else:
        model = GPT2LMHeadModel(GPT2Config(**shared, n_embd=32, n_layer=2, n_head=4, n_positions=64))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)  # opinions strong enough for texts to end
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = END, 0
    return model.eval()


class Writer(pl.LightningModule):
    """A tiny language model that learns to repeat a token."""

    def __init__(self, seed=0):
        super().__init__()
        self.lm = random_model(seed=seed)
        self.save_hyperparameters()

    def training_step(self, batch, batch_idx):
        return self.lm(input_ids=batch, labels=batch).loss

    def validation_step(self, batch, batch_idx):
        self.log("learn/loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.05)

    def train_dataloader(self):
        return DataLoader(torch.tensor([[k % 9 + 3] * 5 for k in range(8)]), batch_size=2)

    def val_dataloader(self):
        return DataLoader(torch.tensor([[5] * 4, [7] * 4]), batch_size=1)
