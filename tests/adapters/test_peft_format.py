"""PEFT reads what we write, and we read what PEFT writes."""

import copy
import json

import pytest
import torch

from lightning_peft import FullFinetune, LoRA, add_adapter, merge_adapter
from lightning_peft.adapters.attachment import attachment_of
from lightning_peft.adapters.peft_format import load_adapter, save_adapter
from tests.adapters.test_lora import small, tiny, trained


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_peft_computes_the_same_from_our_files(kind, tmp_path):
    import peft

    base, _ = tiny(kind)
    base = base.double().eval()
    ours = trained(copy.deepcopy(base), alpha=6.0)
    save_adapter(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, autocast_adapter_dtype=False)
    tokens = torch.arange(12).view(2, 6)
    expected = theirs(input_ids=tokens).logits
    assert torch.allclose(ours(input_ids=tokens).logits, expected, rtol=0, atol=1e-9)
    assert not torch.allclose(base(input_ids=tokens).logits, expected, atol=1e-3)
    merged = merge_adapter(ours, unload=True)(input_ids=tokens).logits
    assert torch.allclose(merged, theirs.merge_and_unload()(input_ids=tokens).logits, rtol=0, atol=1e-9)


@pytest.mark.filterwarnings("ignore:Could not find a config file")  # PEFT looks for the base on the hub
@pytest.mark.parametrize("targets", ["all-linear", ["query", "value"], r".*layer\.0.*dense"])
def test_we_compute_the_same_from_peft_s_files(targets, tmp_path):
    import peft

    base, task = tiny("bert")
    base = base.eval()
    config = peft.LoraConfig(r=2, lora_alpha=5, target_modules=targets, task_type=None, init_lora_weights=False)
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    theirs.save_pretrained(tmp_path)
    ours = load_adapter(copy.deepcopy(base), tmp_path)
    tokens = torch.arange(12).view(2, 6)
    assert torch.allclose(ours(input_ids=tokens).logits, theirs(input_ids=tokens).logits, atol=1e-4)
    assert not torch.allclose(ours(input_ids=tokens).logits, base(input_ids=tokens).logits, atol=1e-3)


def test_what_is_written_comes_back_bit_for_bit(tmp_path):
    base = small()
    ours = trained(copy.deepcopy(base))
    save_adapter(ours, tmp_path)
    again = load_adapter(copy.deepcopy(base), tmp_path)
    x = torch.randn(4, 6)
    assert torch.equal(again(x), ours(x))


def test_only_a_lora_can_be_written(tmp_path):
    with pytest.raises(ValueError, match="has no adapter"):
        save_adapter(small(), tmp_path)
    with pytest.raises(ValueError, match="FullFinetune"):
        save_adapter(add_adapter(small(), FullFinetune()), tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"rank_pattern": {"0": 4}}, "rank_pattern"),
        ({"peft_type": "IA3"}, "peft_type='IA3' cannot be read yet"),
        ({"lora_alpha": None}, r"lacks \['lora_alpha'\]"),
        ({"target_modules": ["nothing"]}, "matches no linear layer"),
        ({"target_modules": ["0"]}, r"left over: base_model.model.2.lora_A.weight"),
        ({"r": 1}, r"shape \(2, 6\) in the file, \(1, 6\) in the network"),
    ],
)
def test_files_that_do_not_fit_are_refused_whole(change, message, tmp_path):
    save_adapter(trained(small()), tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    model = small()
    with pytest.raises(ValueError, match=message):
        load_adapter(model, tmp_path)
    assert attachment_of(model) is None
    add_adapter(model, LoRA(rank=2))


def test_a_damaged_or_missing_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no adapter_config.json"):
        load_adapter(small(), tmp_path)
    save_adapter(trained(small()), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"is damaged"):
        load_adapter(small(), tmp_path)
