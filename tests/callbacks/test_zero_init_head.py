"""A head at zero sends no gradient back in the first step, and a head that has learned is left alone."""

import copy
import math
import pickle

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from lightning_peft import LoRA, adapted
from lightning_peft.callbacks import ZeroInitHead
from tests.toy import Toy, same, weights


class Deep(Toy):
    """A head of two layers and three classes."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


class Late(Toy):
    """A head that is built where Lightning asks for large networks to be built."""

    def __init__(self) -> None:
        super().__init__()
        del self.head

    def configure_model(self):
        if not hasattr(self, "head"):
            self.head = nn.Linear(8, 2)


class First(pl.Callback):
    """Keeps the first loss and the first gradients."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.gradients: list[dict[str, torch.Tensor]] = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.losses.append(float(trainer.callback_metrics["loss"]))
        self.gradients.append({name: p.grad.clone() for name, p in pl_module.named_parameters()})


def backbone_gradient(gradients: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([value.flatten() for name, value in gradients.items() if name.startswith("backbone")])


@pytest.mark.parametrize(("kind", "classes"), [(Toy, 2), (Deep, 3), (Late, 2)])
def test_the_first_loss_is_the_log_of_the_classes_and_the_first_backbone_gradient_exactly_zero(fit, kind, classes):
    first = First()
    fit(kind(), ZeroInitHead(), first, steps=2)
    assert first.losses[0] == pytest.approx(math.log(classes), abs=1e-6)
    assert not backbone_gradient(first.gradients[0]).any()
    # The head itself learns at once, and with it the backbone from the second step on.
    output = [value for name, value in first.gradients[0].items() if name.startswith("head")][-2]
    assert output.any()
    assert backbone_gradient(first.gradients[1]).any()


def test_without_it_the_first_gradient_reaches_the_backbone(fit, net):
    first = First()
    fit(net, first, steps=1)
    assert backbone_gradient(first.gradients[0]).any()


def test_of_a_deep_head_only_the_last_linear_layer_is_zeroed(trainer):
    net = Deep()
    start = weights(net)
    ZeroInitHead().setup(trainer(), net, "fit")
    changed = {name for name, value in weights(net).items() if not torch.equal(value, start[name])}
    assert changed == {"head.2.weight", "head.2.bias"}
    assert not net.head[2].weight.any()
    assert not net.head[2].bias.any()


def test_a_nested_head_is_named_by_its_dotted_name(trainer):
    net = Deep()
    ZeroInitHead("head.0").setup(trainer(), net, "fit")
    assert not net.head[0].weight.any()
    assert net.head[2].weight.any()


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_only_training_zeroes_the_head(trainer, net, stage):
    start = weights(net)
    ZeroInitHead().setup(trainer(), net, stage)
    assert same(weights(net), start)


def test_a_resumed_head_keeps_what_it_has_learned(fit, tmp_path):
    def save():
        return pl.callbacks.ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)

    def run(net, **options):
        pl.seed_everything(3, verbose=False)
        fit(net, ZeroInitHead(), save(), epochs=2, fit_with=(torch.utils.data.DataLoader(data, 6),), **options)
        return net

    data = torch.utils.data.TensorDataset(torch.randn(12, 4), torch.arange(12) % 2)
    whole = run(Toy())
    assert same(weights(run(Toy(), ckpt_path=tmp_path / "epoch=0.ckpt")), weights(whole))


def test_a_trainer_that_fits_on_leaves_the_head_alone(trainer, net):
    made = trainer(ZeroInitHead(), epochs=1)
    made.fit(net)
    learned = weights(net)
    assert learned["head.weight"].any()
    made.fit(net)  # nothing left to train
    assert same(weights(net), learned)


@pytest.mark.parametrize(
    ("head", "message"),
    [("haed", "head='haed' is no module of Toy. Nearest: head"), ("backbone.1", "head='backbone.1' .*no linear layer")],
)
def test_a_head_that_cannot_be_zeroed_is_refused_before_training(fit, net, head, message):
    start = weights(net)
    with pytest.raises(ValueError, match=f"ZeroInitHead: {message}"):
        fit(net, ZeroInitHead(head))
    assert same(weights(net), start)


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))], ids=["deepcopy", "pickle"])
def test_a_copy_does_the_same_before_and_after_a_fit(fit, twin):
    callback = ZeroInitHead("head.2")
    nets = [Deep(), Deep(), Deep()]
    for other in nets[1:]:
        other.load_state_dict(nets[0].state_dict())
    for net, each in zip(nets, (twin(callback), callback, None), strict=True):
        pl.seed_everything(5, verbose=False)
        fit(net, each or twin(callback))
    assert same(weights(nets[0]), weights(nets[1]))
    assert same(weights(nets[0]), weights(nets[2]))


@pytest.mark.parametrize("targets", [["backbone.*"], "all-linear"])
def test_a_head_that_an_adapter_freezes_is_refused_before_the_first_step(fit, targets):
    net = adapted(Toy, LoRA(rank=2, targets=targets), backbone=".")()
    with pytest.raises(ValueError, match="the weight of head='head' is frozen, so it would stay zero"):
        fit(net, ZeroInitHead("head"))


class Rare(Toy):
    """One row in four is of the second class, and rows are dropped out and shuffled: everything that draws numbers."""

    def __init__(self) -> None:
        super().__init__(dropout=0.2)
        self.drawn: list[torch.Tensor] = []

    def training_step(self, batch, batch_idx):
        self.drawn.append(batch[0])
        return super().training_step(batch, batch_idx)

    def train_dataloader(self):
        data = torch.utils.data.TensorDataset(torch.randn(24, 4), (torch.arange(24) % 4 == 0).long())
        return torch.utils.data.DataLoader(data, 6, shuffle=True)


def test_with_a_prior_the_head_predicts_the_classes_as_often_as_they_are(fit):
    first, net = First(), Rare()
    fit(net, ZeroInitHead(bias="prior"), first, steps=1)
    assert not backbone_gradient(first.gradients[0]).any()
    net = Rare()
    net.lr = 0.0
    fit(net, ZeroInitHead(bias="prior"))
    assert torch.allclose(net.head(torch.randn(1, 8)).softmax(1), torch.tensor([[0.75, 0.25]]))


def test_reading_the_targets_changes_no_row_and_no_draw_of_the_run(fit):
    drawn = []
    for callback in (ZeroInitHead(), ZeroInitHead(bias="prior")):
        net = Rare()
        pl.seed_everything(7, verbose=False)
        fit(net, callback, epochs=2)
        drawn.append((torch.cat(net.drawn), torch.rand(3)))
    assert torch.equal(drawn[0][0], drawn[1][0])
    assert torch.equal(drawn[0][1], drawn[1][1])


class Started(pl.Callback):
    """The bias that the first step starts from."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.bias = getattr(self, "bias", pl_module.head.bias.detach().clone())


def test_a_resumed_head_keeps_its_bias(fit, tmp_path):
    keep, started = pl.callbacks.ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1), Started()
    fit(Rare(), ZeroInitHead(bias="prior"), keep, epochs=1)
    fit(Rare(), ZeroInitHead(bias="prior"), started, keep, epochs=2, ckpt_path=tmp_path / "epoch=0.ckpt")
    saved = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)["state_dict"]["head.bias"]
    assert torch.equal(started.bias, saved)
    assert not torch.allclose(saved.softmax(0), torch.tensor([0.75, 0.25]))


class Unlabelled(Rare):
    """Batches that are tensors, of which nobody knows where the target is."""

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.randn(12, 4), 6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Unlabelled, "where the targets are in a batch of type Tensor is not known. Give target="),
        (lambda: _without_bias(Rare()), "head='head' has no bias to hold a prior"),
    ],
)
def test_a_prior_that_cannot_be_had_is_refused(make, message, fit):
    with pytest.raises(ValueError, match=f"ZeroInitHead: .*{message}"):
        fit(make(), ZeroInitHead(bias="prior"))
    with pytest.raises(ValueError, match="bias='mean' is unknown"):
        ZeroInitHead(bias="mean")


def _without_bias(net):
    net.head = nn.Linear(8, 2, bias=False)
    return net


@pytest.mark.parametrize("kind", ["Bert", "Roberta", "DistilBert", "GPT2", "Llama"])
def test_heads_of_transformers_are_zeroed_by_their_own_names(kind, trainer):
    import transformers as hf

    sizes = {
        "vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8,
        "num_labels": 3, "pad_token_id": 0, "max_position_embeddings": 16, "dim": 8, "hidden_dim": 8, "n_layers": 1, "n_heads": 2,
    }  # fmt: skip
    if kind == "GPT2":
        sizes = {"vocab_size": 20, "n_embd": 8, "n_layer": 1, "n_head": 2, "num_labels": 3, "pad_token_id": 0}
    name = {"GPT2": "score", "Llama": "score"}.get(kind, "classifier")
    net = Toy()
    net.model = getattr(hf, f"{kind}ForSequenceClassification")(getattr(hf, f"{kind}Config")(**sizes)).eval()
    ids = torch.randint(1, 20, (4, 6))
    assert net.model(input_ids=ids).logits.any()
    ZeroInitHead(f"model.{name}").setup(trainer(), net, "fit")
    assert not net.model(input_ids=ids).logits.any()
