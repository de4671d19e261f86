"""Padding counts nowhere, on either side; a network's body gives the same features with a head and without."""

import pytest
import torch
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from lightning_peft.probes import AttentionPool, fit_layers, hidden_features, layer_features, pool

SIZES = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def nets():
    torch.manual_seed(0)
    return {"bert": BertModel(BertConfig(**SIZES)).eval(), "llama": LlamaForCausalLM(LlamaConfig(**SIZES)).eval()}


def padded(rows, side, fill=0):
    longest = max(map(len, rows))
    ids, mask = [], []
    for row in rows:
        gap = [fill] * (longest - len(row))
        ids.append([*gap, *row] if side == "left" else [*row, *gap])
        mask.append([0] * len(gap) + [1] * len(row) if side == "left" else [1] * len(row) + [0] * len(gap))
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("how", ["mean", "cls", "last"])
@pytest.mark.parametrize("layered", [False, True])
def test_a_row_is_pooled_as_it_is_without_padding(side, how, layered):
    rows = [torch.randn(4, 3), torch.randn(2, 3), torch.randn(1, 3)]
    mask = padded([[1] * len(row) for row in rows], side)["attention_mask"]
    states = torch.full((3, 4, 3), 1e6)
    for number, row in enumerate(rows):
        states[number][mask[number].bool()] = row
    wanted = torch.stack([{"mean": row.mean(0), "cls": row[0], "last": row[-1]}[how] for row in rows])
    if layered:
        states, wanted = torch.stack([states, -states], 1), torch.stack([wanted, -wanted], 1)
    torch.testing.assert_close(pool(states, mask, how), wanted)


def test_another_pooling_is_refused():
    with pytest.raises(ValueError, match="pooling='max' must be 'mean', 'cls' or 'last'"):
        pool(torch.ones(1, 1, 1), torch.ones(1, 1), "max")


@pytest.mark.parametrize("name", ["bert", "llama"])
@pytest.mark.parametrize("how", ["mean", "last"])
@torch.no_grad()
def test_features_are_the_hidden_states_that_the_model_itself_gives_row_by_row(name, how):
    net, rows = nets()[name], [[5, 6, 7, 8], [9, 3]]
    found = hidden_features(net, {**padded(rows, "right"), "labels": torch.tensor([0, 1])}, layers=(0, -1), pooling=how)
    for number, row in enumerate(rows):
        states = net(input_ids=torch.tensor([row]), output_hidden_states=True).hidden_states
        wanted = [states[layer][0].mean(0) if how == "mean" else states[layer][0, -1] for layer in (0, 2)]
        torch.testing.assert_close(found[number], torch.cat(wanted), atol=1e-5, rtol=1e-4)
    every = layer_features(net, padded(rows, "right"))
    assert every.shape == (2, 2, 3, 16)
    torch.testing.assert_close(every[:, ["mean", "last"].index(how), [0, 2]].flatten(1), found, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_attention_pooling_leaves_tokens_and_starts_at_their_mean():
    net, batch = nets()["bert"], padded([[5, 6, 7, 8], [9, 3]], "right")
    states, mask = hidden_features(net, batch, pooling="attention")
    torch.testing.assert_close(AttentionPool(16)((states, mask)), hidden_features(net, batch))
    pooled = AttentionPool(16)
    pooled.query += states[0, 1] * 100
    nearest = (states[0] @ states[0, 1]).argmax()
    torch.testing.assert_close(pooled((states, mask))[0], states[0, nearest], atol=1e-3, rtol=1e-3)
    states[1, 2:] = 1e6  # padding
    assert pooled((states, mask))[1].abs().max() < 1e3


def test_what_has_no_such_layer_or_no_states_is_refused():
    net, batch = nets()["bert"], padded([[5, 6]], "right")
    with pytest.raises(
        ValueError, match=r"layers=\[3\]: there is no 3. BertModel has the hidden states 0 \(the embedding\) to 2"
    ):
        hidden_features(net, batch, layers=[3])
    with pytest.raises(ValueError, match=r"the batch has \['pixels'\], of which BertModel takes nothing"):
        hidden_features(net, {"pixels": torch.ones(1, 2)})


def test_the_layer_that_knows_is_found_and_of_equal_ones_the_later():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 2, 4, 6, generator=generator)
    y = (x[:, 0, 1, 2] > 0).long()
    found = fit_layers(x[:100], y[:100], (x[100:], y[100:]))
    assert (found.pooling, found.layer) == ("mean", 1)
    assert found.by_layer[1] == max(found.by_layer) > 0.9
    assert torch.equal(found(x), found.fit(x[:, 0, 1]))
    equal = x[:, :, :1].expand(-1, -1, 4, -1)
    y = (equal[:, 0, 0, 0] > 0).long()
    assert fit_layers(equal, y, (equal, y)).layer == 3
