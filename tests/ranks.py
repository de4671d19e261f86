"""Cases that run in one process and, launched by torchrun, in several; their results are compared.

``torchrun --nproc-per-node 2 -m tests.ranks FOLDER`` writes ``FOLDER/rank-K.pt``. ``PARITY_ACCELERATOR=gpu`` runs them on
GPUs with NCCL.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch.callbacks import BackboneFinetuning, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from safetensors.torch import load_file
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.utils.data import DataLoader, DistributedSampler
from torchmetrics import MeanMetric

from lightning_peft import (
    DistillMixin,
    LinearProbeMixin,
    LoRA,
    LoRAMixin,
    MAMLMixin,
    MetaConfig,
    ReplayMixin,
    ReptileMixin,
    save_adapter,
)
from lightning_peft.callbacks import (
    DecodingEvaluation,
    ForgettingBudget,
    ForgettingEvaluation,
    FreezeSchedule,
    GenerationMetrics,
    GradientFlow,
    OldTask,
    Phase,
    Plateau,
    ProbeBaseline,
    ReplayMixing,
    WeightDrift,
    ZeroInitHead,
)
from lightning_peft.data import EpisodeCollate, EpisodeLoader, EpisodeSampler, FeatureCache
from lightning_peft.data.episode_loader import EpisodeDataset
from lightning_peft.decoding import BestOfN
from lightning_peft.distributed import gather_objects, gather_rows, rank, world_size
from lightning_peft.losses import in_batch_contrastive
from lightning_peft.metrics import DensityCoverage, PrecisionRecall, RecallAtOne
from lightning_peft.mixins.prompt_search_mixin import PromptSearchMixin
from lightning_peft.prompts import Halving, PromptSearch
from tests.decoding.searched import model as sharpened
from tests.mixins.test_prompt_search_mixin import space
from tests.mixins.test_prompting_mixin import Module
from tests.prompts.language_nets import tokenizer
from tests.resume_matrix import STRATEGIES, differences, remove, shared_folder
from tests.toy import Toy, rows, weights

BATCH = 12  # rows of a step over all processes
ACCELERATOR = os.environ.get("PARITY_ACCELERATOR", "cpu")
Result = dict[str, Any]


class RankToy(Toy):
    """The toy in float64, on this process's share of the rows in their own order."""

    def __init__(self) -> None:
        torch.manual_seed(5)
        super().__init__()

    def train_dataloader(self) -> DataLoader:
        data = rows(48, dtype=torch.float64)
        sampler = DistributedSampler(data, world_size(), rank(), shuffle=False)
        return DataLoader(data, BATCH // world_size(), sampler=sampler)


class LoRAToy(LoRAMixin, RankToy):
    def __init__(self) -> None:
        super().__init__(adapter=LoRA(rank=2))


class ReplayToy(ReplayMixin, RankToy):
    """Rehearses with a loss in which every row meets the rows of all processes."""

    def replay_step(self, batch):
        x, _ = batch
        return in_batch_contrastive(self.backbone(x), self.backbone(x + 0.1 * x.roll(1, dims=1)))


def fit(
    module: pl.LightningModule,
    *callbacks: pl.Callback,
    epochs: int = 2,
    ckpt_path: Path | None = None,
    seed: int = 5,
    **options: Any,
) -> pl.Trainer:
    """Train in float64, on every process of the group if there is one."""
    pl.seed_everything(seed, verbose=False)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "max_epochs": epochs}
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if dist.is_initialized() else 1
    where = {"accelerator": ACCELERATOR, "devices": here, "num_nodes": world_size() // here}
    trainer = pl.Trainer(
        **{
            **quiet,
            **where,
            "strategy": "ddp" if dist.is_initialized() else "auto",
            "use_distributed_sampler": False,
            "enable_checkpointing": False,
            **options,
        },
        callbacks=list(callbacks),
        default_root_dir=tempfile.gettempdir(),
    )
    trainer.fit(module.double(), ckpt_path=ckpt_path)
    return trainer


def cpu(module: torch.nn.Module) -> Result:
    return {name: value.cpu() for name, value in weights(module).items()}


def trained(module: pl.LightningModule, *callbacks: pl.Callback, **options: Any) -> Result:
    fit(module, *callbacks, **options)
    return cpu(module)


def three_phases() -> FreezeSchedule:
    return FreezeSchedule([Phase(["head.*"], steps=2), Phase(["*"], steps=3), Phase(["head.*", "backbone.2.*"])])


def unfreezing_by_steps() -> Result:
    return trained(RankToy(), three_phases())


VARIANTS: dict[str, Callable[[], DDPStrategy]] = {
    **{name: made for name, made in STRATEGIES.items() if not name.startswith("fsdp2")},
    "a communication hook": lambda: DDPStrategy(ddp_comm_hook=default_hooks.allreduce_hook),
    "small buckets": lambda: DDPStrategy(bucket_cap_mb=1e-4),
}


def unfreezing_under_variants_of_ddp() -> Result:
    """One result for all: none may differ from another by a bit."""
    found = [
        trained(RankToy(), three_phases(), strategy=made() if dist.is_initialized() else "auto")
        for made in VARIANTS.values()
    ]
    assert all(torch.allclose(found[0][name], other[name], rtol=0, atol=1e-15) for other in found for name in other)
    return found[0]


def unfreezing_full_weights_under_fsdp2() -> Result:
    net = Sharded()
    fit(net, three_phases(), strategy=ModelParallelStrategy(world_size(), 1) if dist.is_initialized() else "auto")
    whole = {name: v.full_tensor() if hasattr(v, "full_tensor") else v for name, v in net.state_dict().items()}
    return {name: value.detach().clone().cpu() for name, value in whole.items()}


def unfreezing_by_epochs() -> Result:
    return trained(RankToy(), FreezeSchedule.head_first("head", epochs=1))


def unfreezing_while_accumulating() -> Result:
    return trained(
        RankToy(), FreezeSchedule.head_first("head", steps=2), accumulate_grad_batches=2, gradient_clip_val=0.3
    )


def unfreezing_when_a_metric_is_flat() -> Result:
    """Ranks log different values: what counts is their mean, or one would go on alone and the run would hang."""

    class Logged(RankToy):
        def training_step(self, batch, batch_idx):
            value = 1.0 if self.current_epoch else 2.0
            self.log("flat", value if world_size() == 1 else value + (-1) ** rank() * self.current_epoch, on_epoch=True)
            return super().training_step(batch, batch_idx)

    schedule = FreezeSchedule([Phase(["head.*"], until=Plateau("flat", 1, each="epoch")), Phase(["*"])])
    result = trained(Logged(), schedule, epochs=5)
    assert schedule.number == 1
    return result


def unfreezing_when_a_function_of_one_rank_says_so() -> Result:
    def decides(trainer, pl_module):
        return trainer.global_rank == trainer.world_size - 1 and trainer.global_step == 3

    return trained(RankToy(), FreezeSchedule([Phase(["head.*"], until=decides), Phase(["*"])]))


def gradients_that_are_not_averaged_are_noticed() -> Result:
    if world_size() == 1:
        return {}

    class Breaks(pl.Callback):
        def on_after_backward(self, trainer, pl_module):
            if trainer.global_step == 3:
                pl_module.backbone[0].weight.grad.add_(rank())

    try:
        fit(RankToy(), Breaks(), FreezeSchedule.head_first("head", steps=3))
    except RuntimeError as error:
        wanted = "in the first gradients after a change of what trains, 1 of 6 tensors differ between ranks, first ['backbone.0"
        assert wanted in str(error), error  # noqa: PT017
        return {}
    raise AssertionError("gradients that differ went unnoticed")


def unfreezing_a_lora() -> Result:
    return trained(LoRAToy(), ZeroInitHead("head"), FreezeSchedule.head_first("head", steps=3))


def starting_at_the_prior() -> Result:
    return trained(RankToy(), ZeroInitHead(bias="prior"))


def thawing_the_base() -> Result:
    schedule = FreezeSchedule([Phase(["head.*"], steps=3), Phase(["*"], thaw_base=True)])
    return trained(LoRAToy(), schedule)


def resuming_in_a_later_phase() -> Result:
    folder = shared_folder()
    path = folder / "first.ckpt"
    first = fit(RankToy(), FreezeSchedule.head_first("head", epochs=1), epochs=2)
    first.save_checkpoint(path)
    resumed = RankToy()
    fit(resumed, FreezeSchedule.head_first("head", epochs=1), epochs=3, ckpt_path=path)
    remove(folder)
    return cpu(resumed)


def resuming_exactly_under_ddp() -> Result:
    """Killed after each of these batches, among them boundaries of phases and half-accumulated gradients: nothing is lost."""
    assert set(differences("ddp", "OneCycleLR", [1, 3, 4, 5, 8], accumulate=2).values()) == {0.0}
    return {}


def resuming_exactly_under_fsdp2() -> Result:
    assert set(differences("fsdp2", "ReduceLROnPlateau", [1, 2, 3, 5]).values()) == {0.0}
    return {}


def lightning_s_own_unfreezing() -> Result:
    return trained(RankToy(), BackboneFinetuning(unfreeze_backbone_at_epoch=1, backbone_initial_lr=0.1, verbose=False))


def mixing_old_rows_in() -> Result:
    memory = rows(30, seed=7, dtype=torch.float64)
    return trained(RankToyShuffled(), ReplayMixing(memory, ratio=0.25, seed=3))


class RankToyShuffled(RankToy):
    def train_dataloader(self) -> DataLoader:
        return DataLoader(rows(45, dtype=torch.float64), BATCH // world_size(), shuffle=True)


def replaying_beside() -> Result:
    memory = rows(30, seed=7, dtype=torch.float64)
    return trained(ReplayToy(), ReplayMixing(memory, ratio=0.25, weight=0.5, seed=3))


def replaying_fewer_rows_than_processes() -> Result:
    memory = rows(30, seed=7, dtype=torch.float64)
    return trained(ReplayTailed(), ReplayMixing(memory, ratio=0.05, weight=0.5, seed=3), epochs=3)


class ReplayTailed(ReplayToy):
    def replay_step(self, batch):
        x, y = batch
        return F.cross_entropy(self(x), y)


class DistillToy(DistillMixin, RankToy):
    """Held on tokens, of which each row has another number; a third of the rows has none."""

    def distill_outputs(self, batch):
        return self(batch[0]).unsqueeze(1).expand(-1, 4, -1) * torch.arange(1, 5, dtype=torch.float64).view(1, 4, 1)

    def distill_mask(self, batch):
        return torch.arange(4) < (batch[0][:, :1] * 10).long().remainder(6) - 1


def holding_tokens() -> Result:
    memory = rows(30, seed=7, dtype=torch.float64)
    return trained(DistillToy(), ReplayMixing(memory, ratio=0.25, weight=0.5, seed=3), epochs=3)


def holding_fewer_rows_than_processes() -> Result:
    memory = rows(30, seed=7, dtype=torch.float64)
    return trained(DistillToy(), ReplayMixing(memory, ratio=0.05, weight=0.5, seed=3), epochs=3)


class ProbedToy(LinearProbeMixin, RankToy):
    def forward(self, x):
        return self.head(self.features(x))

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("learn/accuracy", (self(x).argmax(1) == y).double().mean(), batch_size=len(y), sync_dist=True)

    def val_dataloader(self):
        data = rows(16, seed=1, dtype=torch.float64)
        return DataLoader(data, 3, sampler=DistributedSampler(data, world_size(), rank(), shuffle=False))


def probing_from_a_cache() -> Result:
    """Each process runs a share of the rows through the backbone; a head trains on all of them, another one is solved for."""
    folder = gather_objects(tempfile.mkdtemp())[0]
    found: Result = {}
    for number in range(2):  # the second fit reads what the first one has kept
        net, baseline = ProbedToy(feature_cache=folder), ProbeBaseline("head")
        result = trained(net, baseline, epochs=3)
        found |= {f"{name} {number}": value for name, value in result.items()}
        found[f"probe {number}"] = baseline.probe_score
    found |= {f"solved {name}": value for name, value in trained(ProbedToy(solver="ridge")).items()}
    gather_objects(None)
    if rank() == 0:
        shutil.rmtree(folder)
    return found


def features_that_fail_on_one_process() -> Result:
    """The others hear of it, and wait for nobody."""

    def extract(batch):
        if rank() == world_size() - 1:
            raise ValueError("a row is broken")
        return batch[0], None

    loader = DataLoader(rows(24), 4)
    try:
        FeatureCache(batch_size=4).rows(loader, extract, key="broken")
    except (ValueError, RuntimeError) as error:
        return {"told": float("a row is broken" in str(error))}
    return {"told": 0.0}


def searching_for_a_prompt() -> Result:
    """17 validation rows and 30 training rows on two processes: each row counts once, and all choose the same prompt."""

    class Reviews(PromptSearchMixin, Module):
        pass

    fitted = Reviews(search=PromptSearch(space(), Halving(6, 8), rounds=3, calibration="batch"))
    loaders = [DataLoader([{"text": f"a film {k}", "label": k % 2} for k in range(n)], 4) for n in (30, 17)]
    fitted.train_dataloader, fitted.val_dataloader = (lambda: loaders[0]), (lambda: loaders[1])
    fit(fitted, epochs=3, use_distributed_sampler=True)
    report = fitted.report
    told = [value for found in report.rounds for result in found for value in (result.correct, result.rows)]
    prompt = [float(ord(letter)) for letter in str((report.prompt, report.verbalizer))]
    return {"rounds": told, "prompt": prompt, "validation": [report.validation.correct, report.validation.rows]}


def everything_together() -> Result:
    class Suite(ReplayMixin, LoRAToy):
        replay_step = ReplayToy.replay_step

    net, task = Suite(), old_task()
    callbacks = [
        ZeroInitHead("head"),
        FreezeSchedule.head_first("head", steps=3),
        ReplayMixing(rows(30, seed=7, dtype=torch.float64), ratio=0.25, weight=0.5, seed=3),
        ForgettingEvaluation({"pairs": task}, every_n_steps=2),
    ]
    result = trained(net, *callbacks)
    return {**result, "forgetting": callbacks[-1].forgetting["pairs"]}


def old_task() -> OldTask:
    def step(module, batch):
        x, _ = batch
        return module.backbone(x), module.backbone(x + 0.5)

    return OldTask(DataLoader(rows(33, seed=9, dtype=torch.float64), 5), RecallAtOne(), step)


def measuring_an_uneven_set() -> Result:
    """33 rows on two processes: each row counts once, and one process writes the summary."""

    def step(module, batch):
        return batch[0].sum(1)

    mean = OldTask(DataLoader(rows(33, seed=9, dtype=torch.float64), 4), MeanMetric(), step, higher_is_better=True)
    folder = shared_folder()
    evaluation = ForgettingEvaluation({"mean": mean, "pairs": old_task()}, every_n_epochs=1, learned="retained/mean")
    trainer = fit(RankToy(), evaluation, logger=TensorBoardLogger(folder))
    logged = {key: float(value) for key, value in trainer.callback_metrics.items() if "mean" in key or "pairs" in key}
    trainer.strategy.barrier()
    written = json.loads(Path(trainer.log_dir, "forgetting.json").read_text())["after"]
    remove(folder)
    return {**evaluation.before, **logged, **{f"written {task}": value for task, value in written.items()}}


class Writer(RankToy):
    """The toy, and a language model that writes beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.model = sharpened().requires_grad_(False)


def writing_after_an_uneven_set_of_prompts() -> Result:
    """Three prompts on two processes: each draws the texts of its own, and both know all."""

    def short(texts):
        return [len(text.completion) < 12 for text in texts]

    decoder, prompts = BestOfN(n=3, max_new_tokens=6), ["a joy", "Review: a dull film", "It"]
    evaluation = DecodingEvaluation(decoder, prompts, short, tokenizer=tokenizer(), every_n_epochs=1)
    module = Writer()
    fit(module, evaluation)
    last = {key: value for key, value in evaluation.history[-1].items() if key != "step"}
    texts = {f"text {place}": [ord(letter) for letter in text] for place, text in enumerate(evaluation.texts)}
    return {**cpu(module), **last, **{key: torch.tensor(value) for key, value in texts.items()}}


def gathering_uneven_rows() -> Result:
    """Rank k brings k + 1 rows of five columns; the gradient comes back to each."""
    total = sum(k + 1 for k in range(world_size()))
    everything = torch.arange(5.0 * total, dtype=torch.float64).view(total, 5)
    first = sum(k + 1 for k in range(rank()))
    own = everything[first : first + rank() + 1].clone().requires_grad_()
    gathered, start = gather_rows(own)
    assert torch.equal(gathered, everything)
    assert start == first
    (gathered * (rank() + 1)).sum().backward()
    factor = sum(k + 1 for k in range(world_size()))
    assert torch.equal(own.grad, torch.full_like(own, factor))
    return {}


def drifted_replicas_are_noticed() -> Result:
    if world_size() == 1:
        return {}
    net = RankToy()

    class Drift(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 1 and trainer.global_rank == 1:
                pl_module.head.bias.data.add_(1e-9)

    try:
        fit(net, Drift(), FreezeSchedule.head_first("head", steps=2))
    except RuntimeError as error:
        assert "1 of 6 tensors differ between ranks, first ['head.bias']" in str(error), error  # noqa: PT017
        return {}
    raise AssertionError("drift went unnoticed")


def sharding_a_lora_with_fsdp2() -> Result:
    """FSDP2 on every process: the adapter comes before the sharding, and trains as in one process."""

    class ShardedLoRA(LoRAToy):
        def configure_model(self) -> None:
            super().configure_model()
            if world_size() > 1:
                from torch.distributed.fsdp import fully_shard

                fully_shard(self, mesh=self.device_mesh["data_parallel"])

    strategy = ModelParallelStrategy(world_size(), 1) if dist.is_initialized() else "auto"
    net = ShardedLoRA()
    fit(net, FreezeSchedule.head_first("head", steps=3), strategy=strategy)
    state = {
        name: value.full_tensor() if hasattr(value, "full_tensor") else value
        for name, value in net.state_dict().items()
    }
    with tempfile.TemporaryDirectory() as folder:  # every process gathers, and could write
        state |= load_file(save_adapter(net, folder) / "adapter_model.safetensors")
    return {name: value.detach().clone().cpu() for name, value in state.items()}


def measuring_sharded_weights() -> Result:
    """FSDP2: old tasks, with the adapter on and off, by steps; and a budget that steers replay by them."""

    class ShardedLoRA(LoRAToy):
        def configure_model(self) -> None:
            super().configure_model()
            if world_size() > 1:
                from torch.distributed.fsdp import fully_shard

                fully_shard(self, mesh=self.device_mesh["data_parallel"])

    def step(module, batch):
        return module(batch[0]).sum(1)

    def task(seed: int) -> OldTask:
        data = DataLoader(rows(33, seed=seed, dtype=torch.float64), 4)
        return OldTask(data, MeanMetric(), step, higher_is_better=True)

    strategy = ModelParallelStrategy(world_size(), 1) if dist.is_initialized() else "auto"
    evaluation = ForgettingEvaluation({"mean": task(9)}, every_n_steps=2, adapter_off=True)
    budget = ForgettingBudget(0.01, tasks={"mean": task(8)}, every_n_steps=2)
    replay = ReplayMixing(rows(20, seed=4, dtype=torch.float64), 0.5)
    trainer = fit(ShardedLoRA(), evaluation, budget, replay, strategy=strategy)
    seen = {
        f"{entry['step']} {kind}": entry[kind]["mean"]
        for entry in evaluation.history
        for kind in ("retained", "forgetting")
    }
    seen["off"] = float(trainer.callback_metrics["retained/mean/adapter_off"])
    seen = {name: round(value, 6) for name, value in seen.items()}  # the metric adds up in single precision
    return seen | {f"{entry['step']} ratio": entry["ratio"] for entry in budget.history}


class DecayingToy(RankToy):
    """AdamW, whose decay is decoupled, on weights only."""

    def configure_optimizers(self):
        biases, others = [], []
        for name, parameter in self.named_parameters():
            (biases if name.endswith("bias") else others).append(parameter)
        groups = [{"params": biases, "weight_decay": 0.0}, {"params": others, "weight_decay": 0.5}]
        return torch.optim.AdamW(groups, lr=0.02)


class Sharded(DecayingToy):
    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            from torch.distributed.fsdp import fully_shard

            fully_shard(self, mesh=self.device_mesh["data_parallel"])


def watched(module: pl.LightningModule, *callbacks: pl.Callback, **options: Any) -> Result:
    """All that GradientFlow and WeightDrift saw."""
    flow, drift = GradientFlow(2, first=3), WeightDrift(3)
    fit(module, *callbacks, flow, drift, **options)
    tables = (("norm", flow.norms), ("update", flow.updates))
    seen = {f"{kind} {block} {n}": v for kind, table in tables for block, found in table.items() for n, v in found}
    seen |= {f"{kind} {block}": value for block, found in drift.values.items() for kind, value in found.items()}
    for name, found in drift.state_dict()["drifts"].items():
        seen |= {f"{kind} {name}": found[kind].cpu() for kind in ("reference", "decayed") if found[kind] is not None}
    return seen


def watching_gradients_and_drift() -> Result:
    return watched(DecayingToy(), FreezeSchedule.head_first("head", steps=2), gradient_clip_val=0.3)


def watching_sharded_weights_through_a_resume() -> Result:
    folder, sharded = shared_folder(), ModelParallelStrategy(world_size(), 1) if dist.is_initialized() else "auto"
    first = fit(Sharded(), GradientFlow(2, first=3), WeightDrift(3), strategy=sharded)
    first.save_checkpoint(folder / "first.ckpt")
    sharded = ModelParallelStrategy(world_size(), 1) if dist.is_initialized() else "auto"
    seen = watched(Sharded(), strategy=sharded, epochs=3, ckpt_path=folder / "first.ckpt")
    remove(folder)
    return seen


def toy_samples(module: pl.LightningModule, count: int) -> torch.Tensor:
    return module.backbone(torch.randn(count, 4, dtype=torch.float64, device=module.device))


def measuring_samples() -> Result:
    """Ranks share the rows of a metric, and all log what the callback has found."""
    real = torch.randn(40, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    found: Result = {}
    for metric in (PrecisionRecall(k=2), DensityCoverage(k=2)):
        metric.update(real[:24][rank() :: world_size()], real=True)
        metric.update(real[24:][rank() :: world_size()] / 2, real=False)
        found |= {name: float(value) for name, value in metric.compute().items()}
    callback = GenerationMetrics(real, toy_samples, features=lambda rows: rows[:, :3], count=16, k=2, every_n_steps=3)
    trainer = fit(RankToy(), callback)
    return found | {
        key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith("generation")
    }


class Episodic(RankToy):
    """The toy on episodes of its rows, with rates of its own if it learns them."""

    def episodes(self, *, fixed: bool = False) -> EpisodeLoader:
        data = rows(48, dtype=torch.float64)
        sampler = EpisodeSampler(data.tensors[1].tolist(), 2, 2, 3, episodes=12, seed=3, fixed=fixed)
        collate = EpisodeCollate()
        return EpisodeLoader(EpisodeDataset(data), 4 // world_size(), sampler=sampler, collate_fn=collate)

    def train_dataloader(self) -> EpisodeLoader:
        return self.episodes()


class MetaToy(MAMLMixin, Episodic): ...


class ReptileToy(ReptileMixin, Episodic): ...


def meta_learning_by_every_way() -> Result:
    """Weights, learned rates and what validation says."""
    found: Result = {}
    for name, kind, config in (
        ("stacked", MetaToy, {"learn_inner_lr": "layer", "adaptation_steps": 2, "multi_step_loss_epochs": 2}),
        ("loop", MetaToy, {"task_batching": "loop"}),
        ("recompute", MetaToy, {"memory": "recompute", "adaptation_steps": 2}),
        ("anil", MetaToy, {"adapt": "head"}),
        ("reptile", ReptileToy, {"adaptation_steps": 3}),
    ):
        module = kind(meta=MetaConfig(inner_lr=0.1, **config))
        trainer = fit(module)
        found |= {f"{name} {key}": value for key, value in cpu(module).items()}
        told = trainer.validate(module, module.episodes(fixed=True), verbose=False)[0]
        found |= {f"{name} {key}": round(value, 5) for key, value in told.items()}  # a log is in single precision
    return found


def resuming_meta_learning_within_an_epoch() -> Result:
    folder = shared_folder()

    def module() -> MetaToy:
        return MetaToy(meta=MetaConfig(inner_lr=0.1, learn_inner_lr="parameter"))

    def saving() -> ModelCheckpoint:
        return ModelCheckpoint(folder, filename="{step}", every_n_train_steps=2, save_top_k=-1)

    whole, rest = module(), module()
    fit(whole, saving(), enable_checkpointing=True)
    fit(rest, saving(), enable_checkpointing=True, ckpt_path=folder / "step=2.ckpt")
    remove(folder)
    apart = max(float((a - b).abs().max()) for a, b in zip(whole.parameters(), rest.parameters(), strict=True))
    assert apart == 0, apart
    return cpu(rest)


CASES: dict[str, Callable[[], Result]] = {
    case.__name__: case
    for case in (
        gathering_uneven_rows,
        unfreezing_by_steps,
        unfreezing_under_variants_of_ddp,
        unfreezing_full_weights_under_fsdp2,
        unfreezing_by_epochs,
        unfreezing_while_accumulating,
        unfreezing_when_a_metric_is_flat,
        unfreezing_when_a_function_of_one_rank_says_so,
        gradients_that_are_not_averaged_are_noticed,
        unfreezing_a_lora,
        starting_at_the_prior,
        thawing_the_base,
        resuming_in_a_later_phase,
        resuming_exactly_under_ddp,
        resuming_exactly_under_fsdp2,
        lightning_s_own_unfreezing,
        mixing_old_rows_in,
        replaying_beside,
        replaying_fewer_rows_than_processes,
        meta_learning_by_every_way,
        resuming_meta_learning_within_an_epoch,
        probing_from_a_cache,
        features_that_fail_on_one_process,
        searching_for_a_prompt,
        holding_tokens,
        holding_fewer_rows_than_processes,
        everything_together,
        measuring_an_uneven_set,
        writing_after_an_uneven_set_of_prompts,
        measuring_sharded_weights,
        watching_gradients_and_drift,
        measuring_samples,
        watching_sharded_weights_through_a_resume,
        drifted_replicas_are_noticed,
        sharding_a_lora_with_fsdp2,
    )
}


def run(names: list[str]) -> dict[str, Result | str]:
    """Run cases; a failed one is its traceback."""
    results: dict[str, Result | str] = {}
    for name in names:
        try:
            results[name] = CASES[name]()
        except Exception:
            results[name] = traceback.format_exc()
    return results


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("nccl" if ACCELERATOR == "gpu" else "gloo")
    found = run(sys.argv[2:] or list(CASES))
    torch.save(found, Path(sys.argv[1]) / f"rank-{rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()
