"""The score is the classifier's log-probability; the classifier is left as it was."""

import copy
import pickle
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from lightning_peft.decoding.draft import Draft
from lightning_peft.decoding.scorers import ClassifierScore


class Judge(pl.LightningModule):
    """Sees length and the number of a's; counts its forwards."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, classes), nn.Dropout(0.5))
        self.sizes = []

    def forward(self, x):
        self.sizes.append(len(x))
        assert not self.training
        assert not torch.is_grad_enabled()
        return self.net(x)


def counted(texts):
    return torch.tensor([[len(text), text.count("a")] for text in texts], dtype=torch.float32)


def test_the_score_is_the_log_softmax_in_float64():
    judge, texts = Judge(), ["a", "banana", "", "xyz"]
    weight, bias = (value.detach().double() for value in judge.net[0].parameters())
    logits = counted(texts).double() @ weight.T + bias
    wanted = logits[:, 2] - logits.exp().sum(-1).log()
    assert torch.allclose(ClassifierScore(judge, counted, target=2)(texts).double(), wanted, atol=1e-6)


@pytest.mark.parametrize("target", [0, 1])
def test_a_single_logit_is_a_sigmoid(target):
    logits = torch.tensor([-2.0, 0.5])
    wanted = torch.sigmoid(logits if target else -logits).log()
    assert torch.allclose(ClassifierScore(lambda x: logits, counted, target=target)(["a", "b"]), wanted)


def test_the_classifier_is_left_in_the_modes_it_was_in():
    judge = Judge().train()
    judge.net[1].eval()
    state = torch.get_rng_state()
    ClassifierScore(judge, counted, target=0)(["a"])
    assert judge.training
    assert judge.net.training
    assert not judge.net[1].training
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()


def test_modes_are_restored_after_an_error():
    judge = Judge().train()
    with pytest.raises(RuntimeError):
        ClassifierScore(judge, lambda texts: torch.ones(1, 7), target=0)(["a"])
    assert judge.training


def test_each_text_runs_once_in_batches():
    judge = Judge()
    scorer = ClassifierScore(judge, counted, target=0, batch_size=2)
    first = scorer(["a", "b", "c", "a", "d", "e"])
    assert judge.sizes == [2, 2, 1]
    assert torch.equal(scorer(["d", "a"]), first[[4, 0]])
    assert judge.sizes == [2, 2, 1]
    scorer.forget()
    scorer(["a"])
    assert judge.sizes == [2, 2, 1, 1]


def test_a_small_memory_forgets_nothing_of_the_call():
    scorer = ClassifierScore(Judge(), counted, target=0, cache_size=1)
    texts = ["a", "b", "c"]
    assert torch.equal(scorer(texts), ClassifierScore(scorer.classifier, counted, target=0)(texts))


def test_mappings_go_by_keywords_and_outputs_give_their_logits():
    def classify(*, ids, mask):
        return SimpleNamespace(logits=torch.stack([ids.sum(-1), mask.sum(-1)], -1))

    scorer = ClassifierScore(
        classify, lambda texts: {"ids": counted(texts), "mask": torch.zeros(len(texts), 2)}, target=0
    )
    assert torch.allclose(scorer(["a"]), torch.tensor([2.0, 0.0]).log_softmax(-1)[:1])


def test_the_completion_alone_can_be_judged():
    draft = Draft("aa", prompt="bbbb")
    judge = Judge()
    assert torch.equal(
        ClassifierScore(judge, counted, target=0, reads="completion")([draft]),
        ClassifierScore(judge, counted, target=0)(["aa"]),
    )


@pytest.mark.parametrize("target", [3, -1])
def test_an_unknown_class_is_refused(target):
    with pytest.raises(ValueError, match=f"target={target}, but the classifier has 3 classes"):
        ClassifierScore(Judge(), counted, target=target)(["a"])


def test_it_survives_copies_and_pickles():
    scorer = ClassifierScore(Judge(), counted, target=0)
    for twin in (copy.deepcopy(scorer), pickle.loads(pickle.dumps(scorer))):
        assert torch.equal(twin(["a"]), scorer(["a"]))
