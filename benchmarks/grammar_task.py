"""Small Python functions, a character model that has half learned to write them, and a verdict on what it writes."""

from __future__ import annotations

import ast
import random
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from transformers import GPT2Config, GPT2LMHeadModel

from lightning_peft.decoding.draft import Draft

NAMES = ("a", "b", "n", "x", "y", "total", "count", "left", "right", "value")
FUNCTIONS = ("max", "min", "abs", "sum", "len")
ALPHABET = "\n !%()*+,-/0123456789:<=>[]_abcdefghijklmnopqrstuvwxyz"


class CharTokenizer:
    """One token a character; the last one ends a text."""

    eos_token_id = pad_token_id = len(ALPHABET)

    def __call__(self, text: str) -> dict[str, list[int]]:
        """Return the tokens of a text."""
        return {"input_ids": [ALPHABET.index(letter) for letter in text]}

    def batch_decode(self, rows: Sequence[Sequence[int]], **options: Any) -> list[str]:
        """Return rows of tokens as texts, without ends."""
        return ["".join(ALPHABET[token] for token in row if token < len(ALPHABET)) for row in rows]


def expression(names: Sequence[str], rng: random.Random, depth: int = 0) -> str:
    """Return an expression over names, at most two deep."""
    kind = rng.choice(["name", "name", "number"] if depth > 1 else ["name", "number", "sum", "product", "call", "list"])
    if kind == "name":
        return rng.choice(names)
    if kind == "number":
        return str(rng.randrange(1, 20))
    left, right = (expression(names, rng, depth + 1) for _ in range(2))
    if kind == "call":
        function = rng.choice(FUNCTIONS)
        return f"{function}({left}, {right})" if function in ("max", "min") else f"{function}([{left}, {right}])"
    if kind == "list":
        return f"[{left}, {right}]"
    return f"({left} {rng.choice('+-' if kind == 'sum' else '*%')} {right})"


def program(rng: random.Random) -> tuple[str, str]:
    """Return the head of a function and its body, which assigns, asks and returns."""
    names = rng.sample(NAMES, rng.randrange(1, 4))
    head = f"def {rng.choice(NAMES)}_{rng.choice(NAMES)}({', '.join(names)}):\n"
    lines = []
    for _ in range(rng.choice([0, 1, 2])):
        if rng.random() < 0.6:
            new = rng.choice(NAMES)
            lines.append(f"    {new} = {expression(names, rng, 1)}")
            names.append(new)
        else:
            lines.append(f"    if {rng.choice(names)} {rng.choice(['<', '>', '=='])} {expression(names, rng, 2)}:")
            lines.append(f"        return {expression(names, rng, 1)}")
    return head, "\n".join([*lines, f"    return {expression(names, rng)}"]) + "\n"


def trained(seed: int, steps: int = 220, batch: int = 32, width: int = 64) -> GPT2LMHeadModel:
    """Return a GPT of two layers that has seen ``steps`` batches of programs.

    Args:
        seed: Of weights and programs.
        steps: Steps of AdamW.
        batch: Programs in each.
        width: Of the hidden states.
    """
    rng, tokenizer = random.Random(seed), CharTokenizer()
    end = tokenizer.eos_token_id
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=end + 1, n_positions=256, n_embd=width, n_layer=2, n_head=4, bos_token_id=end, eos_token_id=end
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(steps):
        rows = [[*tokenizer("".join(program(rng)))["input_ids"], end] for _ in range(batch)]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [end] * (longest - len(row)) for row in rows])
        lengths = torch.tensor([len(row) for row in rows])
        seen = torch.arange(longest) < lengths[:, None]
        logits = model(ids, attention_mask=seen.long()).logits
        loss = F.cross_entropy(logits[:, :-1][seen[:, 1:]], ids[:, 1:][seen[:, 1:]])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def heads(count: int, seed: int) -> list[str]:
    """Return heads of functions that no training has seen as such: prompts."""
    rng = random.Random(f"test {seed}")
    return [program(rng)[0] for _ in range(count)]


def is_valid(text: Draft) -> bool:
    """Return whether prompt and completion are a program; nothing written is none."""
    if not text.completion.strip():
        return False
    try:
        ast.parse(str(text))
    except (SyntaxError, ValueError):
        return False
    return True


def is_ok(text: Draft) -> bool:
    """Return whether it is one function that uses only names it knows and ends by returning: what tests would ask at least."""
    if not is_valid(text):
        return False
    body = ast.parse(str(text)).body
    if len(body) != 1 or not isinstance(body[0], ast.FunctionDef) or not isinstance(body[0].body[-1], ast.Return):
        return False
    return all(_knows(body[0], node) for node in ast.walk(body[0]) if isinstance(node, ast.Name | ast.Return))


def _knows(function: ast.FunctionDef, node: ast.Name | ast.Return) -> bool:
    """Return whether a name was there before it is read; and whether something is returned."""
    if isinstance(node, ast.Return):
        return node.value is not None
    known = {one.arg for one in function.args.args} | set(FUNCTIONS)
    known |= {
        target.id
        for line in ast.walk(function)
        if isinstance(line, ast.Assign) and line.lineno < node.lineno
        for target in line.targets
        if isinstance(target, ast.Name)
    }
    return isinstance(node.ctx, ast.Store) or node.id in known


def ok_score(texts: Sequence[Draft]) -> torch.Tensor:
    """Give 1 to what is ok, 0 to the rest; a final scorer."""
    return torch.tensor([float(is_ok(text)) for text in texts])
