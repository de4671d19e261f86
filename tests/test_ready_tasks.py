"""Ready-made old tasks give what a plain computation gives, over any batches."""

import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_peft.old_task import evaluate
from lightning_peft.ready_tasks import accuracy_task, perplexity_task, retrieval_task
from tests.toy import Toy, rows


@torch.no_grad()
def test_accuracy_is_the_share_of_right_rows():
    net, data = Toy(), rows(37)
    x, y = data.tensors
    right = (net(x).argmax(1) == y).float().mean()
    for task in (accuracy_task(data, 2), accuracy_task(data, 2, logits=lambda module, batch: module(batch[0]) * 2)):
        assert evaluate(net, task) == pytest.approx(float(right))


def embed(module, inputs):
    return module.backbone(inputs)


@torch.no_grad()
def test_retrieval_is_the_share_of_queries_that_find_their_own():
    net = Toy()
    queries = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    documents = queries + 1.5 * torch.randn(30, 4, generator=torch.Generator().manual_seed(1))
    similarity = F.normalize(net.backbone(queries), dim=1) @ F.normalize(net.backbone(documents), dim=1).T
    expected = (similarity.argmax(1) == torch.arange(30)).float().mean()
    task = retrieval_task(DataLoader(list(zip(queries, documents, strict=True)), 7), embed)
    assert 0 < expected < 1
    assert evaluate(net, task) == pytest.approx(float(expected))


def sentences(labels=False, mask=True):
    generator = torch.Generator().manual_seed(3)
    made = []
    for length in (3, 9, 5, 9, 2, 7, 4):
        row = {"input_ids": torch.randint(1, 20, (9,), generator=generator)}
        if mask:
            row["attention_mask"] = (torch.arange(9) < length).long()
        if labels:
            row["labels"] = torch.where(torch.arange(9) < length, row["input_ids"], -100)
        made.append(row)
    return made


def model():
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=20, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    return LlamaForCausalLM(config)


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 2, 7])
@pytest.mark.parametrize("labels", [True, False])
def test_perplexity_weighs_tokens_not_batches(labels, batch):
    net, data = model(), sentences(labels)
    losses = []
    for row in data:
        length = int(row["attention_mask"].sum())
        logits = net(row["input_ids"][None, :length]).logits[0, :-1].double()
        losses.append(F.cross_entropy(logits, row["input_ids"][1:length], reduction="none"))
    expected = torch.cat(losses).mean().exp()
    assert evaluate(net, perplexity_task(DataLoader(data, batch))) == pytest.approx(float(expected), rel=1e-5)


@torch.no_grad()
def test_without_a_mask_every_token_counts():
    net, data = model(), sentences(mask=False)
    ids = torch.stack([row["input_ids"] for row in data])
    expected = F.cross_entropy(net(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).exp()
    task = perplexity_task(data, logits=lambda module, batch: module(batch["input_ids"]).logits)
    assert evaluate(net, task) == pytest.approx(float(expected), rel=1e-5)
    assert task.sign == -1


def test_a_batch_without_tokens_is_named():
    with pytest.raises(ValueError, match=r"perplexity_task: a batch has \['text'\]; it must have input_ids"):
        evaluate(nn.Linear(1, 1), perplexity_task([{"text": torch.zeros(1)}]))


def test_they_can_be_pickled():
    for task in (accuracy_task(rows(4), 2), retrieval_task(rows(4), embed), perplexity_task(sentences())):
        pickle.loads(pickle.dumps(task))
