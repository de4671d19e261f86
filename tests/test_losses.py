"""The contrastive loss against its formula in double precision."""

import math

import pytest
import torch

from lightning_peft.losses import in_batch_contrastive


def formula(queries, documents, scale):
    terms = []
    for i, query in enumerate(queries):
        scores = [scale * torch.dot(query, doc) / (query.norm() * doc.norm()) for doc in documents]
        terms.append(torch.logsumexp(torch.stack(scores), 0) - scores[i])
    return torch.stack(terms).mean()


@pytest.mark.parametrize("scale", [1.0, 20.0])
def test_value_and_gradients_are_those_of_the_formula(scale):
    queries = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    documents = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    ours, theirs = in_batch_contrastive(queries, documents, scale), formula(queries, documents, scale)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for mine, other in zip(
        torch.autograd.grad(ours, (queries, documents)), torch.autograd.grad(theirs, (queries, documents)), strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-12)


def test_documents_that_cannot_be_told_apart_cost_the_log_of_their_number():
    loss = in_batch_contrastive(torch.randn(6, 4, dtype=torch.float64), torch.ones(6, 4, dtype=torch.float64))
    assert float(loss) == pytest.approx(math.log(6), abs=1e-12)


def test_one_pair_alone_costs_nothing():
    assert float(in_batch_contrastive(torch.randn(1, 4), torch.randn(1, 4))) == 0.0


def test_the_order_of_the_pairs_does_not_matter():
    queries, documents = torch.randn(2, 9, 4, dtype=torch.float64)
    order = torch.randperm(9)
    torch.testing.assert_close(
        in_batch_contrastive(queries, documents), in_batch_contrastive(queries[order], documents[order])
    )


def test_wrong_partners_cost_more_than_right_ones():
    pairs = torch.randn(8, 16)
    assert in_batch_contrastive(pairs, pairs) < in_batch_contrastive(pairs, pairs.roll(1, 0))
