"""What tests of decoders share: random models with a peaked distribution, one that counts, padded prompts, small scorers."""

import math

import torch
from torch import nn

from tests.prompts.language_nets import CAUSAL, tokenizer

PROMPTS = ["a joy", "Review: a dull film", "It"]
ENDS, MANY_ENDS = list(range(3, 400, 16)), list(range(3, 400, 4))


def model(kind="llama", seed=0, ends=ENDS, scale=6.0) -> nn.Module:
    """A random model in float64, sharpened, so that no two continuations are as likely as each other."""
    torch.manual_seed(seed)
    made = CAUSAL[kind]().double().eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(scale)
    made.generation_config.eos_token_id = ends
    made.generation_config.pad_token_id = 2
    return made


def padded(prompts=PROMPTS) -> dict[str, torch.Tensor]:
    ids = [tokenizer()(prompt)["input_ids"] for prompt in prompts]
    width = max(map(len, ids))
    rows = torch.tensor([[2] * (width - len(one)) + one for one in ids])
    mask = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in ids])
    return {"input_ids": rows, "attention_mask": mask}


class Counting(nn.Module):
    """Counts what goes through a model, from the outside."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.config, self.generation_config = inner, inner.config, inner.generation_config
        self.shapes: list[tuple[int, int]] = []

    def forward(self, input_ids, attention_mask=None, past_key_values=None, position_ids=None, **options):
        self.shapes.append(tuple(input_ids.shape))
        assert not torch.is_grad_enabled()
        assert not self.training
        return self.inner(
            input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
            **options,
        )


class Without:
    """Dead is what holds a letter; counts questions."""

    def __init__(self, letters: str) -> None:
        self.letters, self.seen, self.calls = letters, [], 0

    def __call__(self, texts):
        self.calls += 1
        self.seen += texts
        return torch.tensor([-math.inf if set(self.letters) & set(text.completion) else 0.0 for text in texts])


class EvenLength(Without):
    """May end only after an even number of characters."""

    def __init__(self) -> None:
        super().__init__("")
        self.asked = []

    def finished(self, texts):
        self.asked += texts
        return [len(text.completion) % 2 == 0 for text in texts]
