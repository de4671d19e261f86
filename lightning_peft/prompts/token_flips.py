"""New instructions by changing a token where the gradient says that it helps: for models whose weights can be seen."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lightning_peft.budget import Usage
from lightning_peft.old_task import untouched
from lightning_peft.prompts.label_scores import prompt_tokens
from lightning_peft.prompts.template import PromptTemplate
from lightning_peft.prompts.trials import Example
from lightning_peft.prompts.verbalizer import Verbalizer


@dataclass
class TokenFlips:
    """A writer for :class:`~lightning_peft.prompts.Rewrite`: the best instruction so far with one token changed, in several ways.

    For token ``i`` of the instruction, with embedding ``e_i``, and the loss ``L`` of the right answers on ``examples``, a change to
    the token ``v`` moves the loss by about ``(E_v - e_i) . dL/de_i``. Of the ``top`` best tokens of each place some are drawn;
    those that do not come back from text as they were are left out. Ebrahimi et al. 2018, arXiv:1712.06751; Zou et al. 2023,
    arXiv:2307.15043 (GCG).

    Args:
        model: A causal language model of transformers; no gradient stays in it.
        tokenizer: The model's, a fast one.
        template: The prompt around the instruction.
        verbalizer: The labels' answers; the first one of each counts.
        examples: Training rows of the loss.
        count: New instructions for each call.
        top: Tokens of a place that may be drawn.
        seed: Of the draws.

    Raises:
        ValueError: For an instruction without tokens, or a tokenizer that does not say where tokens stand.
    """

    model: Any
    tokenizer: Any
    template: PromptTemplate
    verbalizer: Verbalizer
    examples: Sequence[Example]
    count: int = 16
    top: int = 32
    seed: int = 0
    usage: Usage = field(default_factory=Usage)
    """What the gradients have cost; a backward pass counts as two forwards."""

    def __call__(self, told: list[tuple[str, float]]) -> list[str]:
        """Return changed versions of the best instruction."""
        instruction = told[0][0]
        ids = list(self.tokenizer(instruction, add_special_tokens=False)["input_ids"])
        if not ids:
            raise ValueError("TokenFlips: the best instruction is empty; give instructions with at least one token.")
        table = self.model.get_input_embeddings().weight.detach().float()
        gradient = self.gradient(instruction)
        gain = -(gradient @ table.T)  # of each token in each place, up to what the present token gives
        gain[:, list(self.tokenizer.all_special_ids)] = -torch.inf
        gain[torch.arange(len(ids)), torch.tensor(ids)] = -torch.inf
        best = gain.topk(self.top).indices.tolist()
        generator = random.Random(f"{self.seed} {instruction}")
        found: dict[str, None] = {}
        for _ in range(20 * self.count):  # many combinations do not come back from text
            place, token = generator.randrange(len(ids)), generator.randrange(self.top)
            changed = [*ids[:place], best[place][token], *ids[place + 1 :]]
            text = self.tokenizer.decode(changed)
            if self.tokenizer(text, add_special_tokens=False)["input_ids"] == changed:
                found[text] = None
            if len(found) == self.count:
                break
        return list(found)

    def gradient(self, instruction: str) -> Tensor:
        """Return ``dL/de`` for each token of an instruction, ``(tokens, width)``, of the mean loss of the right answers."""
        template, device = replace(self.template, instruction=instruction), next(self.model.parameters()).device
        total: Tensor | None = None
        answers = self.verbalizer.tokens(self.tokenizer, template.gap(self.tokenizer))
        embed = self.model.get_input_embeddings()
        with untouched(self.model, device), torch.enable_grad():
            for row, label in self.examples:
                prompt, answer = prompt_tokens(template, row, self.tokenizer), list(answers[label][0])
                first, last = self._place(template, row, prompt, instruction)
                ids = torch.tensor([prompt + answer], device=device)
                embedded = embed(ids).detach()
                part = embedded[:, first:last].clone().requires_grad_()
                whole = torch.cat([embedded[:, :first], part, embedded[:, last:]], 1)
                logits = self.model(inputs_embeds=whole, use_cache=False).logits[0, len(prompt) - 1 : -1]
                loss = torch.nn.functional.cross_entropy(logits.float(), ids[0, len(prompt) :])
                (found,) = torch.autograd.grad(loss, part)
                total = found[0].float() if total is None else total + found[0].float()
                self.usage += Usage(forwards=3, tokens=3 * ids.numel())
        assert total is not None
        mean: Tensor = total.cpu() / len(self.examples)
        return mean

    def _place(self, template: PromptTemplate, row: Any, prompt: list[int], instruction: str) -> tuple[int, int]:
        """Return where the tokens of the instruction stand in a prompt."""
        text = template.prompt(row, self.tokenizer)
        special = not template.chats(self.tokenizer)
        offsets = self.tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)["offset_mapping"][
            : len(prompt)
        ]
        start = text.index(instruction)
        inside = [number for number, (a, b) in enumerate(offsets) if start <= a < b <= start + len(instruction)]
        ids = list(self.tokenizer(instruction, add_special_tokens=False)["input_ids"])
        if [prompt[number] for number in inside] != ids:
            raise ValueError(
                f"TokenFlips: inside the prompt the instruction {instruction!r} has other tokens than alone. End it with a full "
                "stop."
            )
        return inside[0], inside[-1] + 1
