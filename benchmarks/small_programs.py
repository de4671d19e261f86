"""Small Python functions to learn and to complete, character by character, and a tiny language model of them."""

from __future__ import annotations

import ast
import builtins
import random
from typing import Any

import torch
from torch import nn

ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789()[]{}:=+-*<>,._ \n'"
PAD, END = 0, 1
RATE = 1e-3
LONGEST = 90
"""Characters that a completion may have."""


class Characters:
    """A tokenizer of single characters, as transformers' decoding calls it."""

    eos_token_id, pad_token_id = END, PAD

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [ALPHABET.index(letter) + 2 for letter in text]}

    def decode(self, ids: Any, **_: Any) -> str:
        return "".join(ALPHABET[int(i) - 2] for i in ids if int(i) > END)


def expression(rng: random.Random, names: list[str], depth: int = 0) -> str:
    """Return a nested expression: at least one operation deep, at most two."""
    kind = rng.random()
    if depth > 2 or (depth > 1 and kind < 0.5):
        return rng.choice([*names, str(rng.randrange(100))])
    left, right = (expression(rng, names, depth + 1) for _ in range(2))
    kind = rng.random()
    if kind < 0.4:
        return f"({left} {rng.choice('+-*')} {right})"
    if kind < 0.6:
        return f"{rng.choice(['max', 'min'])}({left}, {right})"
    if kind < 0.8:
        return f"[{left}, {right}][{rng.randrange(2)}]"
    return f"{{'{rng.choice('uvw')}': {left}}}.get({right})"


def program(rng: random.Random) -> str:
    """Return a function of one or two arguments with an assignment or none."""
    names = rng.sample("abcdxyz", rng.randrange(1, 3))
    lines = [f"def {rng.choice('fgh')}{rng.randrange(10)}({', '.join(names)}):"]
    for _ in range(rng.randrange(2)):
        new = rng.choice("mnpqrst")
        lines.append(f"    {new} = {expression(rng, names, 1)}")
        names = [*dict.fromkeys([*names, new])]
    lines.append(f"    return {expression(rng, names, 1)}")
    return "\n".join(lines) + "\n"


def prompts(seed: int, count: int) -> list[str]:
    """Return first lines of functions that training has not seen in this order."""
    rng = random.Random(f"prompts {seed}")
    return [program(rng).splitlines(keepends=True)[0] for _ in range(count)]


def trained(seed: int, steps: int = 220, batch: int = 32) -> nn.Module:
    """Return a language model of two layers of 64 that has seen so many batches of programs: it knows them half."""
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415

    torch.manual_seed(seed)
    rng = random.Random(f"training {seed}")
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(ALPHABET) + 2, hidden_size=64, intermediate_size=172, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=4, pad_token_id=PAD, eos_token_id=END, bos_token_id=None, max_position_embeddings=512,
        )
    )  # fmt: skip
    model.generation_config.eos_token_id = END
    optimizer = torch.optim.AdamW(model.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    read = Characters()
    for _ in range(steps):
        rows = [[*read(program(rng))["input_ids"], END] for _ in range(batch)]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [PAD] * (longest - len(row)) for row in rows])
        loss = model(input_ids=ids, attention_mask=(ids != PAD).long(), labels=ids.masked_fill(ids == PAD, -100)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def runs(text: str) -> bool:
    """Return whether a text is a function that uses only names it knows and ends with a return: it stands for unit tests."""
    try:
        body = ast.parse(text).body
    except (SyntaxError, ValueError):
        return False
    if len(body) != 1 or not isinstance(body[0], ast.FunctionDef) or not isinstance(body[0].body[-1], ast.Return):
        return False
    function = body[0]
    known = {argument.arg for argument in function.args.args} | set(dir(builtins))
    known |= {node.id for node in ast.walk(function) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    return all(node.id in known for node in ast.walk(function) if isinstance(node, ast.Name))
