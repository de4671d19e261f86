"""Meta-gradients are those of an explicit loop in float64, and a module is meta-learned as any other is trained."""

import copy
import itertools
import math
import pickle
from dataclasses import replace

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy

from lightning_peft import (
    ANILMixin,
    FOMAMLMixin,
    KVPrefix,
    LoRA,
    LoRAMixin,
    MAMLMixin,
    MetaConfig,
    MetaSGDMixin,
    PrefixMixin,
    ReplayMixin,
    ReptileMixin,
    SoftPrompt,
    SoftPromptMixin,
)
from lightning_peft.callbacks import ReplayMixing
from lightning_peft.meta import Episode
from lightning_peft.meta.inner_loop import recomputed


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(4, 12), nn.Linear(4, 4)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return x + self.out(F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0])


class Letters(nn.Module):
    """Numbers of tokens, 0 for none."""

    def forward(self, x):
        return (2 * x).round().abs().long().clamp(max=5)


BODIES = {
    "linear": lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5)),
    "layer_norm": lambda: nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh()),
    "batch_norm": lambda: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh()),
    "convolution": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 2, 2)),
        nn.Conv2d(1, 3, 2, padding=1),
        nn.BatchNorm2d(3),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(27, 5),
    ),
    "group_norm": lambda: nn.Sequential(nn.Linear(4, 6), nn.GroupNorm(2, 6), nn.Tanh(), nn.Linear(6, 5)),
    "instance_norm": lambda: nn.Sequential(
        nn.Linear(4, 6),
        nn.Unflatten(1, (2, 3)),
        nn.InstanceNorm1d(2, track_running_stats=True),
        nn.Flatten(),
        nn.Linear(6, 5),
    ),
    "attention": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 2)), nn.Linear(2, 4), Attention(), nn.Flatten(), nn.Linear(8, 5)
    ),
    "encoder": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 4)),
        nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True),
        nn.Flatten(),
        nn.Linear(4, 5),
    ),
    "embedding": lambda: nn.Sequential(
        Letters(), nn.Embedding(6, 3, padding_idx=0), nn.Flatten(), nn.Linear(12, 5), nn.Tanh()
    ),
    "dropout": lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, 5)),
}
"""Bodies with every kind of layer."""


class Net(pl.LightningModule):
    def __init__(self, body: str = "layer_norm", lr: float = 0.1) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.backbone, self.head = BODIES[body](), nn.Linear(5, 3)
        self.lr = lr

    def forward(self, x):
        return self.head(self.backbone(x))

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=self.lr)


class MAML(MAMLMixin, Net): ...


class FOMAML(FOMAMLMixin, Net): ...


class ANIL(ANILMixin, Net): ...


class MetaSGD(MetaSGDMixin, Net): ...


class Reptile(ReptileMixin, Net): ...


class AdapterMAML(MAMLMixin, LoRAMixin, Net):
    def __init__(self, body="attention", **options) -> None:
        super().__init__(body, adapter=LoRA(rank=2, targets="all-linear"), backbone="backbone", **options)


def episode(tasks: int = 3, seed: int = 0, dtype=torch.float64) -> Episode:
    generator = torch.Generator().manual_seed(seed)
    sides, maps = [], torch.randn(tasks, 4, 3, generator=generator, dtype=torch.float64)
    for rows in (6, 5):
        x = torch.randn(tasks, rows, 4, generator=generator, dtype=torch.float64)
        sides.append((x.to(dtype), (x @ maps).argmax(-1)))
    return Episode(*sides)


class Tasks(torch.utils.data.Dataset):
    """Episodes as a user may keep them: one task for each index."""

    def __init__(self, dtype=torch.float32, count: int = 8) -> None:
        self.whole = episode(count, dtype=dtype)

    def __len__(self) -> int:
        return self.whole.tasks

    def __getitem__(self, index):
        (sx, sy), (qx, qy) = self.whole[:2]
        return {"support": [sx[index], sy[index]], "query": [qx[index], qy[index]]}


def loader(tasks: int = 4) -> DataLoader:
    # By keyword: Lightning leaves DataLoader.__init__ patched after a hook that raised, in any test before, and then
    # cannot make a loader anew whose batch size was given by position.
    return DataLoader(Tasks(), batch_size=tasks)


def by_hand(module, batch, *, steps=1, lr=0.05, names=None, second_order=True, rates=None, weights=None):
    """The meta-loss task by task, with plain autograd: what all ways are held to."""
    names = names or [name for name, p in module.named_parameters() if p.requires_grad and "inner_rates" not in name]
    named, total = dict(module.named_parameters()), 0.0
    weights = weights or [0.0] * (steps - 1) + [1.0]

    def loss(values, x, y):
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return F.cross_entropy(functional_call(module, values, (x,)), y)

    (sx, sy), (qx, qy) = batch[:2]
    for i in range(len(sx)):
        values = {name: named[name] for name in names}
        for t in range(steps):
            grads = torch.autograd.grad(loss(values, sx[i], sy[i]), list(values.values()), create_graph=True)
            grads = grads if second_order else [one.detach() for one in grads]
            scale = [lr] * len(names) if rates is None else rates(t)
            values = {n: v - r * g for (n, v), g, r in zip(values.items(), grads, scale, strict=True)}
            if weights[t]:
                total = total + weights[t] * loss(values, qx[i], qy[i]) / len(sx)
    return total


def gradients(module, loss) -> dict[str, torch.Tensor]:
    module.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def distance(first, second) -> float:
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def prepared(kind=MAML, body="layer_norm", **config):
    module = kind(body, meta=MetaConfig(inner_lr=0.05, **config)).double()
    module.configure_model()
    return module.double()


def without_running(module):
    """The same network whose norm layers know no running statistics, for the reference."""
    other = copy.deepcopy(module)
    for layer in other.modules():
        if hasattr(layer, "running_mean"):
            layer.running_mean = layer.running_var = layer.num_batches_tracked = None
            layer.track_running_stats = False
    return other


WAYS = {
    "stacked": {},
    "loop": {"task_batching": "loop"},
    "chunks": {"task_chunk": 2},
    "recompute": {"memory": "recompute"},
    "recompute_loop": {"memory": "recompute", "task_batching": "loop"},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("body", [body for body in BODIES if body != "dropout"])
def test_every_way_has_the_gradient_of_the_explicit_loop(body, way):
    module = prepared(body=body, adaptation_steps=3, **WAYS[way])
    batch = episode()
    expected = by_hand(reference := without_running(module), batch, steps=3)
    loss, _ = module.learner.meta_loss(batch, 0)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-12)
    assert distance(gradients(module, loss), gradients(reference, expected)) < 1e-12


def test_the_form_of_the_torch_func_example_is_wrong_through_layer_norm():
    """A canary: should it fail one day, vmap(grad) is mended upstream (pytorch/functorch#534)."""
    module = prepared(body="layer_norm")
    (sx, sy), (qx, qy), _ = batch = episode()
    named = dict(module.named_parameters())

    def loss(values, x, y):
        return F.cross_entropy(functional_call(module, values, (x,)), y)

    start = {name: value.expand(3, *value.shape) for name, value in named.items()}
    found = vmap(grad(loss))(start, sx, sy)
    fast = {name: start[name] - 0.05 * found[name] for name in start}
    wrong = gradients(module, vmap(loss)(fast, qx, qy).mean())
    assert distance(wrong, gradients(module, by_hand(module, batch))) > 1e-6


@pytest.mark.parametrize("way", WAYS)
def test_first_order_is_the_gradient_at_the_adapted_weights(way):
    module, batch = prepared(FOMAML, adaptation_steps=2, **WAYS[way]), episode()
    first = gradients(module, module.learner.meta_loss(batch, 0)[0])
    assert distance(first, gradients(module, by_hand(module, batch, steps=2, second_order=False))) < 1e-12
    assert distance(first, gradients(module, by_hand(module, batch, steps=2))) > 1e-4


def test_second_order_begins_at_its_epoch():
    module, batch = prepared(second_order=2), episode()
    for epoch, exact in ((1, False), (2, True)):
        found = gradients(module, module.learner.meta_loss(batch, epoch)[0])
        assert distance(found, gradients(module, by_hand(module, batch, second_order=exact))) < 1e-12


def test_a_preset_fills_in_what_is_left_at_its_default():
    assert FOMAML(meta=MetaConfig(adaptation_steps=3)).meta == MetaConfig(adaptation_steps=3, second_order=False)
    second = FOMAML(meta={"second_order": 1}).meta
    assert [second.second_order_at(epoch) for epoch in (0, 1)] == [False, True]


@pytest.mark.parametrize("way", WAYS)
def test_the_body_of_anil_learns_and_does_not_adapt(way):
    module, batch = prepared(ANIL, adaptation_steps=2, **WAYS[way]), episode()
    assert module.inner_parameters() == ["head.weight", "head.bias"]
    expected = gradients(module, by_hand(module, batch, steps=2, names=module.inner_parameters()))
    assert distance(gradients(module, module.learner.meta_loss(batch, 0)[0]), expected) < 1e-12
    assert "backbone.0.weight" in expected


@pytest.mark.parametrize("kind", ["global", "layer", "layer_step", "parameter"])
@pytest.mark.parametrize("way", WAYS)
def test_learned_rates_and_losses_after_every_step_are_exact(kind, way):
    module = prepared(learn_inner_lr=kind, multi_step_loss_epochs=4, adaptation_steps=3, **WAYS[way])
    rates, batch = module.inner_rates, episode()
    with torch.no_grad():
        for number, parameter in enumerate(rates.parameters()):
            parameter.add_(0.01 * (1 + number + torch.arange(parameter.numel()).view(parameter.shape)))
    expected = gradients(module, by_hand(module, batch, steps=3, rates=rates.at, weights=module.meta.step_weights(1)))
    assert distance(gradients(module, module.learner.meta_loss(batch, 1)[0]), expected) < 1e-11
    assert any(name.startswith("inner_rates") for name in expected)


@pytest.mark.parametrize("way", WAYS)
def test_an_adapter_is_meta_learned_over_a_body_that_stays(way, trainer):
    module, batch = (
        AdapterMAML(meta=MetaConfig(adapt="adapters", inner_lr=0.05, adaptation_steps=2, **WAYS[way])),
        episode(),
    )
    module.configure_model()
    module.double()
    names = module.inner_parameters()
    assert names
    assert all("lora_" in name for name in names)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name in names:
                parameter.add_(0.1)  # B begins at zero, where half of the gradients vanish
    expected = gradients(module, by_hand(module, batch, steps=2, names=names))
    assert distance(gradients(module, module.learner.meta_loss(batch, 0)[0]), expected) < 1e-12
    start = {name: p.detach().clone() for name, p in module.named_parameters()}
    trainer(steps=2).fit(module.float(), loader())
    moved = {name for name, p in module.named_parameters() if not torch.equal(p, start[name].float())}
    assert moved == {name for name, p in module.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", ["global", "layer", "layer_step", "parameter"])
def test_what_a_schedule_freezes_leaves_the_rates_of_the_others(kind):
    module, batch = prepared(learn_inner_lr=kind), episode()
    module.backbone.requires_grad_(False)
    names, places = module.inner_parameters(), list(module.inner_rates.places)
    assert names == ["head.weight", "head.bias"]
    with torch.no_grad():
        for number, parameter in enumerate(module.inner_rates.parameters()):
            parameter.add_(0.01 * (1 + number + torch.arange(parameter.numel()).view(parameter.shape)))

    def rates(step):
        every = module.inner_rates.at(step)
        return [every[places.index(name)] for name in names]

    expected = gradients(module, by_hand(module, batch, names=names, rates=rates))
    assert distance(gradients(module, module.learner.meta_loss(batch, 0)[0]), expected) < 1e-12


def test_what_trains_too_late_for_a_rate_is_named():
    module = MetaSGD()
    module.backbone.requires_grad_(False)
    module.configure_model()
    module.backbone.requires_grad_(True)
    with pytest.raises(
        ValueError, match=r"InnerRates: 'backbone\.0\.weight' adapts and has no rate.*learn_inner_lr='global'"
    ):
        module.learner.meta_loss(episode(dtype=torch.float32), 0)


class Grouped(Net):
    def configure_optimizers(self):
        groups = [{"params": self.backbone.parameters()}, {"params": self.head.parameters(), "lr": 0.2}]
        return torch.optim.SGD(groups, lr=self.lr)


class GroupedSGD(MetaSGDMixin, Grouped): ...


class GroupedRates(GroupedSGD):
    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        optimizer.add_param_group({"params": self.inner_rates.parameters()})
        return optimizer


def test_learned_rates_that_no_optimizer_holds_are_refused(trainer):
    with pytest.raises(
        ValueError, match=r"GroupedSGD: learn_inner_lr='parameter'.*never move.*self\.inner_rates\.parameters"
    ):
        trainer(steps=1).fit(GroupedSGD(), loader())
    module = GroupedRates()
    trainer(steps=1).fit(module, loader())
    assert not torch.equal(
        module.inner_rates.values[0], torch.full_like(module.inner_rates.values[0], module.meta.inner_lr)
    )


def test_reptile_moves_towards_what_tasks_adapt_to():
    module, batch = prepared(Reptile, adaptation_steps=4), episode()
    found = gradients(module, module.learner.reptile_loss(batch)[0])
    named = dict(module.named_parameters())
    for i in range(3):
        fast = module.adapt((batch.support[0][i], batch.support[1][i]), steps=4).parameters
        for name in found:
            found[name] = found[name] - (named[name] - fast[name]).detach() / 3
    assert max(float(value.abs().max()) for value in found.values()) < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("body", ["layer_norm", "batch_norm", "attention"])
def test_a_compiled_meta_gradient_is_exact(body):
    module, batch = prepared(body=body, adaptation_steps=2, memory="recompute", compile=True), episode()
    module.learner.compile_backend = "aot_eager"  # what is computed, without the minute that a C++ compiler takes
    reference = without_running(module)
    for seed in (0, 1):
        batch = episode(seed=seed)
        found = gradients(module, module.learner.meta_loss(batch, 0)[0])
        assert distance(found, gradients(reference, by_hand(reference, batch, steps=2))) < 1e-12


@pytest.mark.slow
def test_weights_that_change_from_epoch_to_epoch_are_not_compiled_anew():
    settings = {"adaptation_steps": 2, "multi_step_loss_epochs": 12}
    module = prepared(memory="recompute", compile=True, **settings)
    module.learner.compile_backend = "aot_eager"
    plain, batch = prepared(**settings), episode()
    torch._dynamo.utils.counters.clear()
    for epoch in range(14):
        found = gradients(module, module.learner.meta_loss(batch, epoch)[0])
        assert distance(found, gradients(plain, plain.learner.meta_loss(batch, epoch)[0])) < 1e-12
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2  # with and without the first step's query loss


def test_more_shapes_than_are_compiled_for_are_told(monkeypatch):
    monkeypatch.setattr("lightning_peft.meta.compiled._SHAPES", 1)
    torch._dynamo.reset()
    module = prepared(adaptation_steps=1, memory="recompute", compile=True)
    module.learner.compile_backend = "aot_eager"
    module.learner.meta_loss(episode(2), 0)
    with pytest.raises(RuntimeError, match="MAML: the meta-gradient does not compile: .*compile=False"):
        module.learner.meta_loss(episode(3), 0)
    torch._dynamo.reset()


def test_dropout_of_a_single_compiled_step_is_drawn_once():
    config = {"body": "dropout", "adaptation_steps": 1}
    module, plain = prepared(memory="recompute", compile=True, **config), prepared(**config)
    module.learner.compile_backend = "aot_eager"
    found = []
    for one in (module, plain):
        torch.manual_seed(5)
        found.append(gradients(one, one.learner.meta_loss(episode(), 0)[0]))
    assert distance(*found) < 1e-12


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"second_order": False},
        {"multi_step_loss_epochs": 5},
        {"learn_inner_lr": "layer_step"},
        {"learn_inner_lr": "parameter", "multi_step_loss_epochs": 5},
        {"adaptation_steps": 1},
        {"task_batching": "loop"},
    ],
    ids=str,
)
def test_a_last_step_that_is_kept_gives_the_same_gradient(settings, monkeypatch):
    module, batch = prepared(memory="recompute", **{"adaptation_steps": 3, **settings}), episode()
    expected = gradients(module, module.learner.meta_loss(batch, 0)[0])
    calls = []

    def kept(loop, *args):
        counted = replace(loop, support=lambda *a: calls.append(1) or loop.support(*a))
        return recomputed(counted, *args, keep_last=True)

    monkeypatch.setattr("lightning_peft.mixins.meta_learner.recomputed", kept)
    assert distance(gradients(module, module.learner.meta_loss(batch, 0)[0]), expected) < 1e-12
    tasks = 3 if "task_batching" in settings else 1
    assert len(calls) == tasks * (2 * module.meta.adaptation_steps - 1)


def test_what_a_compiled_step_would_get_wrong_is_refused():
    config = {"adaptation_steps": 2, "memory": "recompute", "compile": True}
    module = prepared(body="dropout", **config)
    module.learner.compile_backend = "aot_eager"
    with pytest.raises(RuntimeError, match="losses that draw random numbers, as of dropout"):
        module.learner.meta_loss(episode(), 0)
    module.eval()
    module.learner.meta_loss(episode(), 0)
    with pytest.raises(ValueError, match="cannot adapt an embedding with padding_idx=0"):
        prepared(body="embedding", **config).learner.meta_loss(episode(), 0)


@pytest.mark.parametrize("way", WAYS)
def test_what_no_loss_depends_on_has_no_gradient(way):
    module = prepared(adaptation_steps=2, **WAYS[way])
    module.idle = nn.Linear(2, 2)
    found = gradients(module, module.learner.meta_loss(episode(), 0)[0])
    assert "head.weight" in found
    assert not any(name.startswith("idle") for name in found)  # weight decay would move what has a gradient of zero


class TextNet(pl.LightningModule):
    """A small encoder of transformers, over which adapters adapt."""

    def __init__(self, **options) -> None:
        super().__init__(**options)
        torch.manual_seed(3)
        sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = transformers.BertConfig(vocab_size=6, max_position_embeddings=20, initializer_range=0.5, **sizes)
        self.backbone = transformers.BertModel(config, add_pooling_layer=False)
        self.letters, self.head = Letters(), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.backbone(input_ids=self.letters(x)).last_hidden_state.mean(-2))

    training_step = Net.training_step


class LoRATextNet(MAMLMixin, LoRAMixin, TextNet): ...


class SoftPromptTextNet(MAMLMixin, SoftPromptMixin, TextNet): ...


class PrefixTextNet(MAMLMixin, PrefixMixin, TextNet): ...


@pytest.mark.parametrize("way", ["stacked", "loop", "recompute"])
@pytest.mark.parametrize(
    ("kind", "adapter"),
    [(LoRATextNet, LoRA(rank=2)), (SoftPromptTextNet, SoftPrompt(tokens=3)), (PrefixTextNet, KVPrefix(tokens=3))],
    ids=["lora", "soft prompt", "prefix"],
)
def test_the_start_of_an_adapter_over_a_frozen_text_encoder_is_learned_exactly(kind, adapter, way):
    meta = MetaConfig(inner_lr=0.05, adapt="adapters", adaptation_steps=2, **WAYS[way])
    module = kind(adapter=adapter, backbone="backbone", meta=meta)
    module.configure_model()
    module, batch, names = module.double().eval(), episode(), module.inner_parameters()
    assert names
    assert not any("head" in name for name in names)
    expected = gradients(module, by_hand(module, batch, steps=2, names=names))
    assert expected.keys() == {*names, "head.weight", "head.bias"}
    assert distance(gradients(module, module.learner.meta_loss(batch, 0)[0]), expected) < 1e-12


@pytest.mark.parametrize("strategy", ["ModelParallelStrategy", "FSDPStrategy", "DeepSpeedStrategy"])
def test_strategies_that_gather_weights_in_each_forward_are_refused(strategy, trainer):
    made = trainer()
    made.strategy.__class__ = vars(pl.strategies)[strategy]  # none can be made without a GPU
    with pytest.raises(ValueError, match=f"MAML: under {strategy} a module's own weights .* Use a single device or"):
        prepared().learner.refuse_fit(made)


@pytest.mark.parametrize(("setting", "value"), [("memory", "recompute"), ("multi_step_loss_epochs", 2)])
def test_reptile_refuses_what_it_has_no_use_for(setting, value, trainer):
    module = Reptile(meta=MetaConfig(**{setting: value}))
    with pytest.raises(ValueError, match=f"Reptile has no use for {setting}={value!r}"):
        trainer(steps=1).fit(module, loader())


def test_dropout_is_drawn_once_when_a_step_is_computed_twice():
    found = []
    for way in ("stacked", "recompute"):
        module = prepared(body="dropout", adaptation_steps=2, **WAYS[way])
        torch.manual_seed(1)
        found.append(gradients(module, module.learner.meta_loss(episode(), 0)[0]))
    assert distance(*found) < 1e-12


@pytest.mark.parametrize("way", ["recompute", "recompute_loop"])
def test_a_step_that_is_computed_twice_takes_no_dropout_from_what_comes_after(way):
    module = prepared(body="dropout", adaptation_steps=2, **WAYS[way])
    plain = prepared(body="dropout", adaptation_steps=2, **WAYS["loop" if "loop" in way else "stacked"])
    found = []
    for net in (plain, module):
        torch.manual_seed(1)
        found.append([gradients(net, net.learner.meta_loss(episode(), 0)[0]) for _ in range(2)])
        found[-1].append({"next": torch.rand(2)})
    assert max(map(distance, *found)) < 1e-12


@pytest.mark.parametrize("kind", [MAML, FOMAML, ANIL, MetaSGD, Reptile])
@pytest.mark.filterwarnings("ignore:The `srun` command")
def test_all_loops_work_in_a_default_trainer(kind, trainer):
    module = kind("batch_norm", meta=MetaConfig(adaptation_steps=2, eval_adaptation_steps=3, inner_lr=0.1))
    running = {name: value.clone() for name, value in module.named_buffers()}
    made = trainer(epochs=2, accumulate_grad_batches=2, gradient_clip_val=1.0)
    start = module.backbone[0].weight.detach().clone()
    made.fit(module, loader(), loader())
    assert not torch.equal(module.backbone[0].weight, start)
    assert all(torch.equal(value, running[name]) for name, value in module.named_buffers())
    here = {name: p.detach().clone() for name, p in module.named_parameters()}
    for stage, run in (("validation", made.validate), ("test", made.test)):
        logged = run(module, loader(), verbose=False)[0]
        assert {f"meta/{stage}_accuracy_after_{steps}" for steps in range(4)} <= logged.keys()
        assert logged[f"meta/{stage}_loss"] == logged[f"meta/{stage}_loss_after_3"]
        assert logged[f"meta/{stage}_loss_after_3"] < logged[f"meta/{stage}_loss_after_0"]
    predicted = made.predict(module, loader())
    assert [one.shape for one in predicted[0]] == [(5, 3)] * 4
    assert all(torch.equal(p, here[name]) for name, p in module.named_parameters())


def test_evaluation_is_the_loss_after_adaptation_by_hand(trainer):
    module = MAML(meta=MetaConfig(adaptation_steps=2, inner_lr=0.05)).double()
    logged = trainer().validate(module, DataLoader(Tasks(torch.float64), 4), verbose=False)[0]
    expected = by_hand(module, Tasks(torch.float64).whole, steps=2)
    assert logged["meta/validation_loss"] == pytest.approx(expected.item(), abs=1e-6)  # a log is float32


def test_fast_weights_serve_the_module_s_own_forward():
    module, batch = prepared(), episode()
    x, y = batch.support[0][0], batch.support[1][0]
    before = module(x)
    with torch.inference_mode():
        fast = module.adapt((x.clone(), y.clone()), steps=1)
        with module.with_fast_weights(fast):
            adapted = module(x)
    assert torch.equal(module(x), before)
    named = dict(module.named_parameters())
    loss = F.cross_entropy(before, y)
    grads = torch.autograd.grad(loss, list(named.values()))
    values = {name: p - 0.05 * g for (name, p), g in zip(named.items(), grads, strict=True)}
    assert torch.allclose(adapted, functional_call(module, values, (x,)), atol=1e-12)


@pytest.mark.parametrize("steps", [0, 1])
def test_fast_weights_stay_when_the_module_trains_on(steps):
    module, batch = prepared(body="linear"), episode()
    module.unused = nn.Linear(2, 2).double()
    fast = module.adapt((batch.support[0][0], batch.support[1][0]), steps)
    before = copy.deepcopy(fast.parameters)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(value, before[name]) for name, value in fast.parameters.items())


def test_a_negative_number_of_steps_is_refused():
    with pytest.raises(ValueError, match=r"MAML\.adapt: steps=-1 must be at least 0"):
        MAML().adapt((torch.zeros(2, 4), torch.zeros(2, dtype=torch.long)), -1)


def test_a_resumed_run_ends_where_the_whole_one_ends(fit, tmp_path):
    def module():
        return MetaSGD(meta=MetaConfig(adaptation_steps=2, inner_lr=0.1))

    whole = module()
    fit(whole, epochs=4, fit_with=(loader(),))
    half = fit(module(), epochs=2, fit_with=(loader(),))
    half.save_checkpoint(tmp_path / "half.ckpt")
    rest = module()
    fit(rest, epochs=4, ckpt_path=tmp_path / "half.ckpt", fit_with=(loader(),))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), rest.parameters(), strict=True))
    loaded = MetaSGD.load_from_checkpoint(tmp_path / "half.ckpt", weights_only=True)
    assert loaded.meta == half.lightning_module.meta
    assert torch.equal(loaded.inner_rates.values[0], half.lightning_module.inner_rates.values[0])


@pytest.mark.parametrize("adapt", ["adapters", "all", "head"])
def test_learned_rates_of_adapters_are_loaded_and_resumed(adapt, fit, tmp_path):
    meta = MetaConfig(adapt=adapt, learn_inner_lr="layer_step", adaptation_steps=2, inner_lr=0.1)
    saved = AdapterMAML("linear", meta=meta)
    fit(saved, epochs=2, fit_with=(loader(),)).save_checkpoint(tmp_path / "half.ckpt")
    loaded = AdapterMAML.load_from_checkpoint(tmp_path / "half.ckpt", body="linear")
    assert loaded.meta == meta
    assert torch.equal(loaded.inner_rates.values, saved.inner_rates.values)
    rest = AdapterMAML("linear", meta=meta)
    fit(rest, epochs=4, ckpt_path=tmp_path / "half.ckpt", fit_with=(loader(),))
    whole = AdapterMAML("linear", meta=meta)
    fit(whole, epochs=4, fit_with=(loader(),))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), rest.parameters(), strict=True))


class Placed(Net):
    def predict_step(self, batch, batch_idx, dataloader_idx):
        return batch_idx, dataloader_idx


class PlacedMAML(MAMLMixin, Placed): ...


def test_a_predict_step_of_one_s_own_knows_its_loader(trainer):
    first, second = trainer().predict(PlacedMAML(), [loader(), loader()])
    assert first == [[(0, 0)] * 4, [(1, 0)] * 4]
    assert second == [[(0, 1)] * 4, [(1, 1)] * 4]


class Remembering(MAMLMixin, Net):
    def __init__(self, body="linear", meta=None) -> None:
        super().__init__(body, meta=meta)
        self.save_hyperparameters()


def test_a_class_that_saves_its_hyperparameters_is_loaded_again(fit, tmp_path):
    saved = Remembering(meta=MetaConfig(adaptation_steps=3))
    fit(saved, epochs=1, fit_with=(loader(),)).save_checkpoint(tmp_path / "one.ckpt")
    assert Remembering.load_from_checkpoint(tmp_path / "one.ckpt", weights_only=True).meta == saved.meta
    assert saved.hparams["meta"] == saved.meta


def test_a_module_is_copied_and_pickled_in_the_middle():
    module, batch = prepared(learn_inner_lr="layer"), episode()
    expected = gradients(module, module.learner.meta_loss(batch, 0)[0])
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert other.learner.module is other
        assert distance(gradients(other, other.learner.meta_loss(batch, 0)[0]), expected) == 0


def test_statistics_of_each_step_are_kept_in_training_and_used_in_evaluation(trainer):
    module = MAML("batch_norm", meta=MetaConfig(norm_stats="per_step", adaptation_steps=2, inner_lr=0.5))
    made = trainer(epochs=3)
    made.fit(module, loader())
    mean = module.step_statistics.running_mean_0
    assert mean.shape == (3, 5)
    assert not torch.allclose(mean[0], mean[2])
    (x, _), *_ = Tasks().whole
    single = made.validate(module, loader(), verbose=False)[0]["meta/validation_loss"]
    alone = made.validate(module, DataLoader(Tasks(), 1), verbose=False)[0]["meta/validation_loss"]
    assert single == pytest.approx(alone, abs=1e-6)
    with module.eval().with_fast_weights(module.adapt((x[0], torch.zeros(6, dtype=torch.long)))):
        rows = module(x[1])
        assert torch.allclose(rows[:1], module(x[1][:1]), atol=1e-6)  # a row does not see the others


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return 2 * grad


class Fused(MAML):
    def forward(self, x):
        return Once.apply(super().forward(x))


@pytest.mark.parametrize("config", [{}, {"memory": "recompute"}, {"task_batching": "loop"}])
def test_an_operation_without_a_second_derivative_is_named(config, trainer):
    module = Fused("linear", meta=MetaConfig(**{"task_batching": "loop", **config}))
    one = DataLoader(Tasks(), 1)
    with pytest.raises(
        RuntimeError, match=r"second derivatives, which the custom functions \['Once'\] has not.*second_order=False"
    ):
        trainer(steps=1).fit(module, one)
    fine = Fused("linear", meta=MetaConfig(**{"task_batching": "loop", "second_order": False, **config}))
    trainer(steps=1).fit(fine, one)


class Cast(torch.autograd.Function):
    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu")
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx, grad):
        return 3 * ctx.saved_tensors[0] ** 2 * grad


class Cubed(MAML):
    def forward(self, x):
        return Cast.apply(super().forward(x))


def test_other_decorators_of_a_backward_do_not_make_it_once_differentiable():
    module, batch = prepared(Cubed, "linear", task_batching="loop"), episode()
    expected = gradients(module, by_hand(module, batch))
    assert distance(gradients(module, module.learner.meta_loss(batch, 0)[0]), expected) < 1e-12


class Checkpointed(MAML):
    def forward(self, x):
        return self.head(torch.utils.checkpoint.checkpoint(self.backbone, x, use_reentrant=False))


@pytest.mark.parametrize("way", WAYS)
def test_gradient_checkpointing_is_refused_where_its_gradients_would_be_wrong(way):
    module, (x, y) = prepared(Checkpointed, adaptation_steps=2, **WAYS[way]), episode().support
    for run in (lambda: module.learner.meta_loss(episode(), 0), lambda: module.adapt((x[0], y[0]))):
        with pytest.raises(
            RuntimeError, match=r"Checkpointed: gradient checkpointing .* would be wrong.*memory='recompute'"
        ):
            run()


def test_an_encoder_of_torch_is_evaluated_on_stacked_tasks_as_one_by_one():
    curves = []
    for way in ("stacked", "loop"):
        module = prepared(body="encoder", adaptation_steps=2, **WAYS[way]).eval()
        curves.append(torch.tensor(module.learner.curve(episode()).losses))
    assert torch.allclose(*curves, atol=1e-6)
    assert torch.backends.mha.get_fastpath_enabled()


class Compiled(MAML):
    def __init__(self, **options) -> None:
        super().__init__("linear", **options)
        self.backbone = torch.compile(self.backbone, backend="aot_eager")


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo looks at inputs
def test_a_compiled_part_without_a_second_derivative_is_told(trainer):
    one = DataLoader(Tasks(), batch_size=1)
    with pytest.raises(
        RuntimeError, match="Compiled: second-order .*(double backward|donated buffers).*second_order=False"
    ):
        trainer(steps=1).fit(Compiled(meta=MetaConfig(task_batching="loop")), one)
    trainer(steps=1).fit(Compiled(meta=MetaConfig(task_batching="loop", second_order=False)), one)


class Counting(MAML):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx)

    def adaptation_loss(self, batch):
        loss = super().adaptation_loss(batch)
        return loss * (1 if loss.item() > 0 else 2)


def test_what_cannot_be_stacked_says_so_and_runs_in_a_loop(trainer):
    with pytest.raises(
        RuntimeError, match="Counting: something in the loss cannot run on stacked tasks.*task_batching='loop'"
    ):
        trainer(steps=1).fit(Counting(), loader())
    trainer(steps=1).fit(Counting(meta=MetaConfig(task_batching="loop")), loader())


class Measured(Net):
    def __init__(self) -> None:
        super().__init__("linear")
        self.accuracy = MulticlassAccuracy(3, average="micro", validate_args=False)

    def training_step(self, batch, batch_idx):
        logits = self(batch[0])
        self.log("accuracy", self.accuracy(logits, batch[1]))
        return F.cross_entropy(logits, batch[1])


class MeasuredMAML(MAMLMixin, Measured): ...


@pytest.mark.parametrize("way", ["stacked", "loop"])
def test_the_metrics_of_a_module_count_no_tasks(way, trainer):
    module = MeasuredMAML(meta=MetaConfig(adaptation_steps=2, **WAYS[way]))
    module.accuracy.update(torch.tensor([1, 2, 2]), torch.tensor([1, 1, 2]))
    trainer(epochs=2).fit(module, loader(), loader())
    assert module.accuracy.compute().item() == pytest.approx(2 / 3)
    copy.deepcopy(module)


class Recurrent(MAML):
    def __init__(self, **options) -> None:
        super().__init__("linear", **options)
        self.recurrent = nn.LSTM(4, 4, batch_first=True)

    def forward(self, x):
        return super().forward(self.recurrent(x[:, None])[0][:, 0])


def test_a_layer_without_a_rule_for_stacked_tasks_says_so_and_runs_in_a_loop(trainer):
    with pytest.raises(RuntimeError, match="Recurrent: .* cannot run on stacked tasks: .*lstm.*task_batching='loop'"):
        trainer(steps=1).fit(Recurrent(), loader())
    trainer(steps=1).fit(Recurrent(meta=MetaConfig(task_batching="loop")), loader(), loader())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"adaptation_steps": 0}, "adaptation_steps=0 must be a whole number of at least 1"),
        ({"adaptation_steps": 2.0}, "adaptation_steps=2.0 must be a whole number"),
        ({"adaptation_steps": None}, "adaptation_steps=None must be a whole number"),
        ({"eval_adaptation_steps": "3"}, "eval_adaptation_steps='3' must be a whole number"),
        ({"second_order": "yes"}, "second_order='yes' must be a whole number of at least 0"),
        ({"second_order": -1}, "second_order=-1"),
        ({"multi_step_loss_epochs": 1.5}, "multi_step_loss_epochs=1.5"),
        ({"inner_lr": "1e-2"}, "inner_lr='1e-2' must be a number"),
        ({"inner_lr": math.nan}, "inner_lr=nan"),
        ({"adapt": 3}, "adapt=3 must be 'all'"),
        ({"adapt": []}, r"adapt=\[\] must be 'all'"),
        ({"compile": "no"}, r"compile='no' must be one of \[False, True\]"),
        ({"inner_lr": -1.0}, "inner_lr=-1.0"),
        ({"task_chunk": 0}, "task_chunk=0"),
        ({"memory": "disk"}, r"memory='disk' must be one of \['graph', 'recompute'\]"),
        ({"compile": True}, "compile=True needs memory='recompute'"),
        ({"norm_stats": "per_step", "memory": "recompute"}, "norm_stats='per_step'.*memory='graph'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(config, message):
    with pytest.raises(ValueError, match=f"MetaConfig: {message}"):
        MetaConfig(**config)


@pytest.mark.parametrize(
    ("adapt", "message"),
    [
        ("adapters", "finds no adapter that trains.*LoRAMixin"),
        (["hed.*"], r"'hed\.\*' matches none of \d+ trainable parameters\."),
    ],
)
def test_inner_parameters_that_are_not_there_are_refused(adapt, message):
    with pytest.raises(ValueError, match=message):
        MAML(meta=MetaConfig(adapt=adapt)).inner_parameters()


def test_fp16_with_second_order_is_refused(trainer):
    made = trainer(steps=1)
    made.strategy.precision_plugin.precision = "16-mixed"
    with pytest.raises(ValueError, match="precision='16-mixed' scales the loss.*bf16-mixed"):
        MAML().learner.refuse_fit(made)
    MAML(meta=MetaConfig(second_order=False)).learner.refuse_fit(made)


def test_bf16_trains(trainer):
    trainer(steps=2, precision="bf16-mixed").fit(MAML(), loader())


@pytest.mark.parametrize("batch", [torch.zeros(3), (torch.zeros(3), torch.zeros(3)), {"support": 1}])
def test_a_batch_that_is_no_episode_says_what_would_be(batch):
    with pytest.raises(TypeError, match="MAML: a batch of .* is no episode.*split_episode"):
        MAML().split_episode(batch)


def test_tasks_of_different_sizes_run_in_a_loop():
    module = prepared(task_batching="loop")
    (sx, sy), (qx, qy) = episode()[:2]
    ragged = Episode([(sx[0], sy[0]), (sx[1, :2], sy[1, :2])], [(qx[0], qy[0]), (qx[1], qy[1])], ragged=True)
    loss, _ = module.learner.meta_loss(ragged, 0)
    one, two = (
        by_hand(module, Episode(*((a[None], b[None]) for a, b in pair))) for pair in zip(*ragged[:2], strict=True)
    )
    assert loss.item() == pytest.approx((one.item() + two.item()) / 2, abs=1e-12)
    with pytest.raises(ValueError, match="different sizes cannot be stacked"):
        prepared().learner.meta_loss(ragged, 0)


def test_validation_keeps_no_graph(trainer):
    module = MAML()
    trainer().validate(module, loader(), verbose=False)
    curve = module.learner.curve(Tasks().whole)
    assert all(isinstance(value, float) for value in itertools.chain(*curve.losses))
    assert all(p.grad is None for p in module.parameters())


class Rehearsing(ReplayMixin, MAML):
    def replay_step(self, batch):
        return F.cross_entropy(self(batch[0]), batch[1])


def test_old_rows_come_beside_episodes_and_not_among_them(trainer):
    (x, y), _, _ = Tasks(count=2).whole
    old = torch.utils.data.TensorDataset(x.flatten(0, 1), y.flatten())
    module = Rehearsing("linear")
    trainer(ReplayMixing(old, ratio=0.25), steps=3).fit(module, loader())
    assert module.replay_loss is not None
    with pytest.raises(ValueError, match=r"MAML learns from episodes.*class MAML\(ReplayMixin"):
        trainer(ReplayMixing(old, ratio=0.25)).fit(MAML("linear"), loader())


class Regression(MAML):
    def adaptation_loss(self, batch):
        return F.mse_loss(self(batch[0])[:, 0], batch[1].to(self.dtype))

    def query_accuracy(self, batch):
        return None


def test_tasks_without_classes_have_a_loss_and_no_accuracy(trainer):
    logged = trainer().validate(Regression(), loader(), verbose=False)[0]
    assert "meta/validation_loss" in logged
    assert not any("accuracy" in key for key in logged)


class Diverging(Regression):
    def adaptation_loss(self, batch):
        return super().adaptation_loss(batch).exp().exp()


def test_tasks_that_diverge_are_logged_and_drawn(trainer, tmp_path):
    logger = pl.loggers.TensorBoardLogger(tmp_path)
    module = Diverging("linear", meta=MetaConfig(inner_lr=1e4))
    logged = trainer(logger=logger).validate(module, loader(), verbose=False)[0]
    assert not math.isfinite(logged["meta/validation_loss"])
    assert math.isnan(logged["meta/validation_loss_interval"])


class Shaped(MAML):
    reduction = "none"

    def adaptation_loss(self, batch):
        loss = F.cross_entropy(self(batch[0]), batch[1], reduction=self.reduction)
        return loss if loss.ndim else loss[None]


@pytest.mark.parametrize("way", ["stacked", "loop"])
def test_a_loss_is_one_number(way, trainer):
    module = Shaped(meta=MetaConfig(**WAYS[way]))
    with pytest.raises(ValueError, match=r"Shaped: the loss of a task has shape \(6,\); it must be one number"):
        trainer(steps=1).fit(module, loader())
    module.reduction = "mean"
    found = trainer().validate(module, loader(), verbose=False)
    assert found == trainer().validate(MAML(meta=MetaConfig(**WAYS[way])), loader(), verbose=False)


class NoForward(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 3)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])


class NoForwardMAML(MAMLMixin, NoForward): ...


def test_a_module_without_forward_has_a_loss_and_no_accuracy(trainer):
    logged = trainer().validate(NoForwardMAML(), loader(), verbose=False)[0]
    assert "meta/validation_loss" in logged
    assert not any("accuracy" in key for key in logged)


@pytest.mark.parametrize("body", ["batch_norm", "instance_norm"])
def test_batch_statistics_are_those_of_the_batch_in_eval_mode_too(body):
    module = prepared(body=body, adaptation_steps=2)
    curves = [net.learner.curve(episode()) for net in (module, copy.deepcopy(module).eval())]
    assert curves[0] == curves[1]
