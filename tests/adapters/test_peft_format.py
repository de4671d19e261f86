"""PEFT reads what we write, and we read what PEFT writes."""

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_peft import FullFinetune, LoRA, add_adapter, merge_adapter, set_adapter
from lightning_peft.adapters.attachment import attachment_of
from lightning_peft.adapters.peft_format import from_peft, load_adapter, save_adapter
from tests.adapters.test_lora import small, tiny, trained
from tests.adapters.zoo import stir
from tests.toy import Toy


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


def test_a_method_without_a_format_is_refused(tmp_path):
    with pytest.raises(ValueError, match="carries no adapter"):
        save_adapter(small(), tmp_path)
    with pytest.raises(ValueError, match=r"PEFT has no format for FullFinetune\(\)"):
        save_adapter(add_adapter(small(), FullFinetune()), tmp_path)


def edited(folder, **change):
    """A saved adapter with other fields, as another program might have written it."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    weights = load_file(folder / "adapter_model.safetensors")
    save_file(weights, folder / "adapter_model.safetensors")  # without our copy of the fields


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "missing: base_model.model.0.lora_magnitude_vector"),
        ({"rank_pattern": {"0": 4}}, r"shape \(2, 6\) in the file, \(4, 6\) in the network"),
        ({"peft_type": "LOHA"}, r"peft_type='LOHA' cannot be read; these can: .*LORA"),
        ({"lora_alpha": None}, r"lacks \['lora_alpha'\]"),
        ({"target_modules": None}, r"lacks \['target_modules'\]"),
        ({"target_modules": ["nothing"]}, "matches no layer"),
        ({"target_modules": ["0"]}, r"left over: base_model.model.2.lora_A.weight"),
        ({"r": 1}, r"shape \(2, 6\) in the file, \(1, 6\) in the network"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' moved the weights of the base"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"rank_pattern": {"(": 2}}, "a field of adapter_config.json is damaged"),
        ({"exclude_modules": "*"}, "a field of adapter_config.json is damaged"),
        ({"use_rslroa": True}, r"asks for {'use_rslroa': True}, which this version does not know"),
        ({"use_rslora": "yes"}, r"has {'use_rslora': 'yes'}, where only true or false can stand"),
        ({"target_modules": "0|2", "layers_to_transform": [0]}, "Give target_modules as a list"),
        ({"lora_alpha": "x"}, "a field of adapter_config.json is damaged"),
    ],
)
def test_files_that_do_not_fit_are_refused_whole(change, message, tmp_path):
    save_adapter(trained(small()), tmp_path)
    edited(tmp_path, **change)
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
    (tmp_path / "adapter_config.json").write_text("[")
    save_file({"x": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match=r"adapter_config.json is damaged"):
        load_adapter(small(), tmp_path)


def test_a_pair_of_files_from_two_saves_is_refused(tmp_path):
    save_adapter(trained(small(), alpha=6), tmp_path / "old")
    save_adapter(trained(small(), alpha=4), tmp_path / "new")
    shutil.copy(tmp_path / "new" / "adapter_model.safetensors", tmp_path / "old")  # killed after the first of two files
    with pytest.raises(ValueError, match=r"\['lora_alpha'\] differ. A save was interrupted"):
        load_adapter(small(), tmp_path / "old")


def test_a_kill_in_the_middle_of_a_save_leaves_the_old_files(tmp_path):
    torch.manual_seed(1)
    save_adapter(trained(small()), tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    script = (
        "import os, signal, torch\n"
        "import lightning_peft.adapters.peft_folder as f\n"
        "from lightning_peft import save_adapter\n"
        "from tests.adapters.test_lora import small, trained\n"
        "write = f.save_file\n"
        "def killed(weights, draft, **more):\n"
        "    write(weights, draft, **more)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "f.save_file = killed\n"
        f"save_adapter(trained(small()), {str(tmp_path)!r})\n"
    )
    run = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert run.returncode == -9, run.stderr
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    torch.manual_seed(1)
    load_adapter(small(), tmp_path)


def test_patterns_and_the_scale_of_large_ranks_come_back(tmp_path):
    lora = LoRA(rank=2, alpha=6, rank_pattern={"0": 3}, alpha_pattern={"2": 5.0}, scaling="rslora", dora=True)
    base, x = small(), torch.randn(4, 6)
    ours = stir(add_adapter(copy.deepcopy(base), lora))
    again = load_adapter(copy.deepcopy(base), save_adapter(ours, tmp_path))
    assert torch.equal(again(x), ours(x))


@pytest.mark.filterwarnings("ignore:Could not find a config file")
@pytest.mark.parametrize(
    "options",
    [
        {"rank_pattern": {"value": 3, r"layer\.0.*query": 1}, "alpha_pattern": {"query": 7}},
        {"exclude_modules": ["key"], "layers_to_transform": [1], "layers_pattern": "layer"},
        {"bias": "all"},
        {"bias": "lora_only"},
        {"modules_to_save": ["classifier"]},
        {"task_type": "SEQ_CLS"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_peft_s_patterns_biases_and_heads_mean_the_same_here(options, tmp_path):
    import peft

    base = tiny("bert")[0].double().eval()
    config = peft.LoraConfig(r=2, lora_alpha=5, target_modules=["query", "value", "key"], **options)
    theirs = stir(peft.get_peft_model(copy.deepcopy(base), config, autocast_adapter_dtype=False)).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    tokens = torch.arange(12).view(2, 6)
    expected = theirs(input_ids=tokens).logits
    ours = load_adapter(copy.deepcopy(base), tmp_path / "theirs")
    assert torch.allclose(ours(input_ids=tokens).logits, expected, rtol=0, atol=1e-10)
    trains = {name for name, parameter in ours.named_parameters() if parameter.requires_grad}
    assert len(trains) == sum(parameter.requires_grad for parameter in theirs.parameters())
    save_adapter(ours, tmp_path / "ours")
    read = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours", autocast_adapter_dtype=False).eval()
    assert torch.allclose(read(input_ids=tokens).logits, expected, rtol=0, atol=1e-10)
    assert torch.allclose(from_peft(theirs)(input_ids=tokens).logits, expected, rtol=0, atol=1e-10)


def test_transformers_itself_loads_our_file(tmp_path):
    base, _ = tiny("llama")
    ours = trained(copy.deepcopy(base), targets=["*.q_proj", "*.v_proj"])
    save_adapter(ours, tmp_path)
    base.load_adapter(str(tmp_path))
    tokens = torch.arange(12).view(2, 6)
    assert torch.allclose(base(input_ids=tokens).logits, ours(input_ids=tokens).logits, atol=1e-5)


def test_a_start_from_singular_values_is_exported_as_an_ordinary_delta(tmp_path):
    import peft

    base, x = small().double(), torch.randn(4, 6, dtype=torch.float64)
    ours = stir(add_adapter(copy.deepcopy(base), LoRA(rank=2, alpha=6, init="pissa", scaling="rslora")))
    save_adapter(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, autocast_adapter_dtype=False)
    assert torch.allclose(theirs(x), ours(x), rtol=0, atol=1e-10)
    assert torch.allclose(load_adapter(copy.deepcopy(base), tmp_path)(x), ours(x), rtol=0, atol=1e-10)


def test_a_module_around_the_network_saves_and_loads_by_the_network_s_names(tmp_path, fit):
    net = Toy()
    trained(net.backbone)
    save_adapter(net, tmp_path)
    assert all(
        key.startswith("base_model.model.0.") or key.startswith("base_model.model.2.")
        for key in load_file(tmp_path / "adapter_model.safetensors")
    )
    again, x = load_adapter(Toy(), tmp_path), torch.randn(3, 4)
    assert torch.equal(again.backbone(x), net.backbone(x))
    assert attachment_of(again.backbone) is not None


def test_several_adapters_come_from_several_folders(tmp_path):
    base, x = small(), torch.randn(3, 6)
    for name in ("first", "second"):
        save_adapter(trained(copy.deepcopy(base)), tmp_path / name)
    model = load_adapter(copy.deepcopy(base), tmp_path / "first", name="first")
    load_adapter(model, tmp_path / "second", name="second")
    for name in ("first", "second"):
        alone = load_adapter(copy.deepcopy(base), tmp_path / name)
        assert torch.equal(set_adapter(model, name)(x), alone(x))
        save_adapter(model, tmp_path / "again", name=name)
        assert torch.equal(load_adapter(copy.deepcopy(base), tmp_path / "again")(x), alone(x))


def test_a_live_model_with_two_adapters_is_taken_over(tmp_path):
    import peft

    base, x = small().double(), torch.randn(3, 6, dtype=torch.float64)
    config = peft.LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False)
    theirs = peft.get_peft_model(copy.deepcopy(base), config, adapter_name="first", autocast_adapter_dtype=False)
    theirs.add_adapter("second", config, autocast_adapter_dtype=False)
    theirs.set_adapter("second")
    expected = {}
    for name in ("first", "second"):
        theirs.set_adapter(name)
        expected[name] = theirs(x).detach()
    ours = from_peft(theirs)
    assert torch.allclose(ours(x), expected["second"], rtol=0, atol=1e-12)
    assert torch.allclose(set_adapter(ours, "first")(x), expected["first"], rtol=0, atol=1e-12)
    with pytest.raises(TypeError, match="Sequential is no peft.PeftModel"):
        from_peft(small())


def test_numbers_that_are_no_weights_are_refused(tmp_path):
    save_adapter(trained(small()), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({key: value.int() for key, value in load_file(file).items()}, file)
    with pytest.raises(ValueError, match=r"torch.int32, no weights: base_model.model.0.lora_A.weight"):
        load_adapter(small(), tmp_path)


def test_numbers_that_are_not_finite_are_refused(tmp_path):
    save_adapter(trained(small()), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    weights = load_file(file)
    weights["base_model.model.0.lora_A.weight"][0, 0] = float("nan")
    save_file(weights, file)
    with pytest.raises(ValueError, match=r"NaN or infinite: base_model.model.0.lora_A.weight"):
        load_adapter(small(), tmp_path)


def test_a_tied_weight_that_trains_is_not_written_as_one_that_peft_would_untie(tmp_path):
    from tests.adapters.prompt_nets import network

    base = network("gpt2")
    assert base.lm_head.weight is base.transformer.wte.weight
    ours = add_adapter(base, LoRA(rank=2, targets=["*.c_attn"], train_also=["lm_head"]))
    with pytest.raises(ValueError, match="trains and shares its weight, and PEFT would untie it"):
        save_adapter(ours, tmp_path)
