"""Two processes are one process on the joint batch, in every case of tests/ranks.py, in one launch."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch

from lightning_peft.callbacks import FreezeSchedule, GradientFlow, WeightDrift
from lightning_peft.distributed import check_ranks_agree, gather_rows, rewrap
from tests import ranks

ROOT = Path(__file__).parents[1]
PROCESSES = 2 if ranks.ACCELERATOR == "cpu" else torch.cuda.device_count()


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """The results of every case on every rank."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={PROCESSES}", f"--master-port={port}"]
    run = subprocess.run(
        [*command, "-m", "tests.ranks", str(folder)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return [torch.load(folder / f"rank-{k}.pt", weights_only=False) for k in range(PROCESSES)]


@pytest.fixture(scope="module")
def alone():
    """The results of every case in this process."""
    return {}


def distance(first, second) -> float:
    assert first.keys() == second.keys()
    return max(
        (float((torch.as_tensor(first[k]) - torch.as_tensor(second[k])).abs().max()) for k in first), default=0.0
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", [case for case in ranks.CASES if case != "lightning_s_own_unfreezing"])
def test_ranks_agree_and_equal_one_process(case, launched):
    for k, results in enumerate(launched):
        assert not isinstance(results[case], str), f"rank {k}: {results[case]}"
    for other in launched[1:]:
        assert distance(launched[0][case], other[case]) == 0
    assert distance(launched[0][case], ranks.CASES[case]()) < 1e-12


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_lightning_s_own_callback_trains_replicas_apart_without_a_word(launched):
    """The fault that FreezeSchedule mends: should this fail one day, Lightning has mended it too."""
    if PROCESSES == 1:
        pytest.skip("needs two processes")
    first, second = (results["lightning_s_own_unfreezing"] for results in launched[:2])
    assert distance(first, second) > 1e-2


def test_one_process_has_nothing_to_wrap_or_compare(net, fit):
    trainer = fit(net)
    rewrap(trainer, net)
    check_ranks_agree([("weight", torch.zeros(2))], when="now")
    rows = torch.ones(2, 3, requires_grad=True)
    assert gather_rows(rows) == (rows, 0)


@pytest.mark.parametrize("strategy", ["FSDPStrategy", "DeepSpeedStrategy", "a strategy of somebody else"])
@pytest.mark.parametrize("callback", [lambda: FreezeSchedule.head_first(steps=1), GradientFlow, WeightDrift])
def test_strategies_that_fix_what_trains_are_refused_before_training(callback, strategy, net, trainer):
    made, kinds = trainer(callback()), vars(pl.strategies)
    kind = kinds.get(strategy) or type(
        "Strange", (pl.strategies.ParallelStrategy,), {"__abstractmethods__": frozenset()}
    )
    made.strategy.__class__ = kind  # neither can be made without a GPU
    with pytest.raises(ValueError, match=rf"strategy {kind.__name__} is not supported.*strategy='ddp', or .*FSDP2"):
        made.callbacks[0].setup(made, net, "fit")


def test_a_spawned_run_is_one_process_on_the_joint_batch(tmp_path):
    code = (
        "import torch, warnings; warnings.simplefilter('ignore')\n"
        "import lightning.pytorch as pl\n"
        "from tests.ranks import RankToy, three_phases\n"
        "if __name__ == '__main__':\n"
        "    pl.seed_everything(5, verbose=False)\n"
        "    net = RankToy().double()\n"
        "    pl.Trainer(accelerator='cpu', devices=2, strategy='ddp_spawn', max_epochs=2, logger=False,\n"
        "        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,\n"
        "        use_distributed_sampler=False, callbacks=[three_phases()]).fit(net)\n"
        "    torch.save(net.state_dict(), 'end.pt')\n"
    )
    file = tmp_path / "spawned.py"
    file.write_text(code)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, file], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stderr[-3000:]
    assert distance(torch.load(tmp_path / "end.pt"), ranks.CASES["unfreezing_by_steps"]()) < 1e-12


@pytest.mark.large
@pytest.mark.filterwarnings("ignore")
def test_two_nodes_are_one_process_on_the_joint_batch(tmp_path):
    """Two launchers on loopback addresses, a process each."""
    cases = [
        "unfreezing_by_steps",
        "unfreezing_while_accumulating",
        "resuming_in_a_later_phase",
        "starting_at_the_prior",
    ]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--master-addr=127.0.0.1",
        f"--master-port={port}",
    ]  # fmt: skip
    nodes = [
        subprocess.Popen(
            [*command, f"--node-rank={node}", "-m", "tests.ranks", str(tmp_path), *cases],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for node in range(2)
    ]
    assert [node.wait(timeout=300) for node in nodes] == [0, 0]
    for found in (torch.load(tmp_path / f"rank-{k}.pt", weights_only=False) for k in range(2)):
        for case in cases:
            assert not isinstance(found[case], str), found[case]
            assert distance(found[case], ranks.CASES[case]()) < 1e-12
