"""Recall@1 against a count done by hand."""

import pickle

import pytest
import torch

from lightning_peft.metrics import RecallAtOne


def reference(queries: torch.Tensor, documents: torch.Tensor) -> float:
    found = 0
    for i, query in enumerate(queries.double()):
        cosines = [float(query @ doc / (query.norm() * doc.norm())) for doc in documents.double()]
        found += cosines.index(max(cosines)) == i
    return found / len(queries)


@pytest.mark.parametrize("batch", [1, 7, 40])
def test_recall_is_the_share_of_queries_nearest_to_their_own_document_however_batched(batch):
    documents = torch.randn(40, 6) * torch.rand(40, 1) * 9  # lengths differ: a dot product would rank otherwise
    queries = documents + torch.randn(40, 6) * 2
    metric = RecallAtOne()
    for part in zip(queries.split(batch), documents.split(batch), strict=True):
        metric.update(*part)
    expected = reference(queries, documents)
    assert 0 < expected < 1
    assert float(metric.compute()) == pytest.approx(expected, abs=1e-6)


def test_recall_does_not_depend_on_the_length_of_the_embeddings():
    queries, documents = torch.randn(30, 4), torch.randn(30, 4)
    plain, scaled = RecallAtOne(), RecallAtOne()
    plain.update(queries, documents)
    scaled.update(queries * 8, documents * torch.logspace(-2, 2, 30)[:, None])
    assert torch.equal(plain.compute(), scaled.compute())


def test_an_encoder_that_maps_all_to_one_point_finds_one():
    metric = RecallAtOne()
    metric.update(torch.ones(10, 4), torch.ones(10, 4))
    assert float(metric.compute()) == pytest.approx(0.1)


def test_half_precision_and_gradients_are_accepted_and_left_behind():
    queries = torch.eye(3, dtype=torch.bfloat16, requires_grad=True)
    metric = RecallAtOne()
    metric.update(queries, torch.eye(3, dtype=torch.bfloat16))
    assert float(metric.compute()) == 1.0
    assert not metric.queries[0].requires_grad


def test_a_reset_metric_knows_nothing_of_the_past():
    metric = RecallAtOne()
    metric.update(torch.eye(2), torch.eye(2).flip(0))
    metric.reset()
    metric.update(torch.eye(2), torch.eye(2))
    assert float(metric.compute()) == 1.0


def test_pairs_that_do_not_pair_are_refused():
    with pytest.raises(ValueError, match=r"queries \(3, 4\) and documents \(2, 4\) differ"):
        RecallAtOne().update(torch.ones(3, 4), torch.ones(2, 4))


def test_the_metric_says_that_higher_is_better_and_survives_pickle():
    metric = RecallAtOne()
    metric.update(torch.eye(2), torch.eye(2))
    again = pickle.loads(pickle.dumps(metric))
    assert again.higher_is_better is True
    assert torch.equal(again.compute(), metric.compute())
