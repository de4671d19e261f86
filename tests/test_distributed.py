"""Two processes are one process on the joint batch, in every case of tests/ranks.py, in one launch."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch

from lightning_peft.distributed import check_ranks_agree, gather_rows, refuse_unsupported, rewrap
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


def test_strategies_that_were_never_tried_are_refused(net, trainer):
    class Strange(pl.strategies.Strategy):
        def __init__(self):
            pass

    made = trainer()
    made.strategy.__class__ = type("Strange", (pl.strategies.ParallelStrategy,), {"__abstractmethods__": frozenset()})
    with pytest.raises(ValueError, match="strategy Strange is not supported.*FSDP2"):
        refuse_unsupported(made, "FreezeSchedule")


def test_a_spawned_run_trains(tmp_path):
    code = (
        "import lightning.pytorch as pl, warnings; warnings.simplefilter('ignore')\n"
        "from tests.toy import Toy; from lightning_peft.callbacks import FreezeSchedule\n"
        "if __name__ == '__main__':\n"
        "    net = Toy()\n"
        "    pl.Trainer(accelerator='cpu', devices=2, strategy='ddp_spawn', max_epochs=1, logger=False,\n"
        "        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,\n"
        "        callbacks=[FreezeSchedule.head_first('head', steps=1)]).fit(net)\n"
        "    assert abs(float(net.head.bias.detach().sum())) < 9\n"
    )
    file = tmp_path / "spawned.py"
    file.write_text(code)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, file], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stderr[-3000:]
