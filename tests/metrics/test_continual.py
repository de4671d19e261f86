"""Metrics over a sequence of tasks, against formulas in plain Python and the vectors of the literature's definitions."""

import copy
import math
import pickle
import re
from pathlib import Path

import matplotlib as mpl
import pytest
import torch
from torchmetrics import MetricCollection

from lightning_peft.logging import check_key
from lightning_peft.metrics.accuracy_matrix import AccuracyMatrix, draw_accuracy_matrix
from lightning_peft.metrics.continual import (
    AverageAccuracy,
    AverageIncrementalAccuracy,
    BackwardTransfer,
    Forgetting,
    ForwardTransfer,
    Intransigence,
    LearningAccuracy,
    MinAccuracy,
    Stability,
    StabilityGap,
)

NAN = math.nan
PLAIN = [AverageAccuracy, AverageIncrementalAccuracy, LearningAccuracy, Stability, BackwardTransfer]
CURVES = [MinAccuracy, StabilityGap]


def every_metric(tasks, **options):
    """One of each that takes the matrix, by name."""
    made = {kind.__name__: kind(tasks, **options) for kind in PLAIN}
    for definition in ("chaudhry", "avalanche", "mammoth"):
        made[definition] = Forgetting(tasks, definition=definition, **options)
    made["ForwardTransfer"] = ForwardTransfer(tasks, baseline=[0.1] * tasks, **options)
    made["Intransigence"] = Intransigence(tasks, joint=[0.95] * tasks, **options)
    return made


def same(first, second):
    """Equal, bit for bit, and blank in the same places."""
    return torch.equal(first.isnan(), second.isnan()) and torch.equal(first.nan_to_num(), second.nan_to_num())


def mean(values):
    values = list(values)
    return math.fsum(values) / len(values) if values else NAN


def mammoth_source(results):
    """Mammoth's own function: short rows are padded with 0.0, and the maximum is over all rows."""
    tasks = len(results)
    padded = [list(row) + [0.0] * (tasks - len(row)) for row in results]
    best = [max(row[j] for row in padded) for j in range(tasks)]
    return mean(best[j] - padded[-1][j] for j in range(tasks - 1))


def reference(r, b=0.1, a=0.95):
    """The definitions as they are written, in Python's floats."""
    t = len(r)
    return {
        "AverageAccuracy": mean(r[t - 1][j] for j in range(t)),
        "AverageIncrementalAccuracy": mean(mean(r[i][j] for j in range(i + 1)) for i in range(t)),
        "LearningAccuracy": mean(r[j][j] for j in range(t)),
        "Stability": mean(r[t - 1][j] for j in range(t - 1)),
        "BackwardTransfer": mean(r[t - 1][j] - r[j][j] for j in range(t - 1)),
        "chaudhry": mean(max(r[k][j] for k in range(j, t - 1)) - r[t - 1][j] for j in range(t - 1)),
        "avalanche": mean(r[j][j] - r[t - 1][j] for j in range(t - 1)),
        "mammoth": mammoth_source(r),
        "ForwardTransfer": mean(r[j - 1][j] - b for j in range(1, t)),
        "Intransigence": a - r[t - 1][t - 1],
    }


def collect(metric, rows, before=None):
    """Give a metric what was measured."""
    for i, row in enumerate([before or [NAN] * len(rows), *rows], start=-1):
        for j, value in enumerate(row):
            if not math.isnan(value):
                metric.update(i, j, value)
    return metric


VECTORS = {  # ACC, AIA, LA, BWT, F by Chaudhry, by Mammoth, by Avalanche, FWT
    "forgets": ([[0.9, 0.5], [0.7, 0.8]], [0.75, 0.825, 0.85, -0.2, 0.2, 0.2, 0.2, 0.4]),
    "improves": ([[0.5, 0.2], [0.8, 0.9]], [0.85, 0.675, 0.7, 0.3, -0.3, 0, -0.3, 0.1]),
    "recovers": (
        [[0.9, NAN, NAN], [0.7, 0.8, NAN], [0.95, 0.6, 0.9]],
        [2.45 / 3, 7.4 / 9, 2.6 / 3, -0.075, 0.075, 0.10, 0.075, None],
    ),
    "all differ": (
        [[0.6, 0.3, 0.1], [0.8, 0.5, 0.2], [0.7, 0.6, 0.9]],
        [2.2 / 3, 5.95 / 9, 2 / 3, 0.1, 0, 0.05, -0.1, 0.15],
    ),
}
NAMES = [
    "AverageAccuracy", "AverageIncrementalAccuracy", "LearningAccuracy", "BackwardTransfer",
    "chaudhry", "mammoth", "avalanche", "ForwardTransfer",
]  # fmt: skip


@pytest.mark.parametrize("case", VECTORS)
def test_known_vectors_are_exact_from_a_matrix_and_from_updates(case):
    rows, expected = VECTORS[case]
    for name, value in zip(NAMES, expected, strict=True):
        if value is not None:
            metric = every_metric(len(rows))[name]
            assert float(metric.of(torch.tensor(rows, dtype=torch.float64))) == pytest.approx(value, abs=1e-12), name
            assert float(collect(metric, rows).compute()) == pytest.approx(value, abs=1e-12), name


@pytest.mark.parametrize("tasks", [1, 2, 3, 6])
@pytest.mark.parametrize("seed", range(5))
def test_random_matrices_agree_with_the_written_formulas(tasks, seed):
    rows = torch.rand(tasks, tasks, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    before = torch.full((1, tasks), 2.0, dtype=torch.float64)  # would win every maximum
    for name, expected in reference(rows.tolist()).items():
        metric = every_metric(tasks)[name]
        for matrix in (rows, torch.cat([before, rows])):
            assert float(metric.of(matrix)) == pytest.approx(expected, abs=1e-12, nan_ok=True), name
        assert float(metric.of(rows.float())) == pytest.approx(expected, abs=1e-6, nan_ok=True), name
        got = collect(metric, rows.tolist(), before[0].tolist()).compute()
        assert float(got) == pytest.approx(expected, abs=1e-12, nan_ok=True), name


@pytest.mark.parametrize("seed", range(20))
def test_the_three_kinds_of_forgetting_keep_their_order(seed):
    rows = torch.rand(5, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = {name: float(metric.of(rows)) for name, metric in every_metric(5).items()}
    assert found["avalanche"] == -found["BackwardTransfer"]  # exact: the same differences
    assert found["mammoth"] >= max(found["chaudhry"], 0.0)
    assert found["chaudhry"] >= found["avalanche"]
    # Chaudhry's maximum leaves out the last row: raised by d, all of it is gain.
    raised = rows.clone()
    raised[-1, :-1] += 3.0
    assert float(Forgetting(5).of(raised)) == pytest.approx(found["chaudhry"] - 3.0)
    assert float(Forgetting(5, definition="mammoth").of(raised)) == 0.0


def test_mammoth_counts_rows_before_a_task_only_where_they_were_measured():
    short = [[0.6], [0.8, 0.5], [0.7, 0.6, 0.9]]
    full = [[0.6, 0.95, 0.1], [0.8, 0.5, 0.2], [0.7, 0.6, 0.9]]  # better on task 1 before it was trained
    for rows in (short, full):
        matrix = torch.tensor([row + [NAN] * (3 - len(row)) for row in rows], dtype=torch.float64)
        got = float(Forgetting(3, definition="mammoth").of(matrix))
        assert got == pytest.approx(mammoth_source(rows), abs=1e-12)
    assert float(Forgetting(3).of(matrix)) == pytest.approx(reference(full)["chaudhry"], abs=1e-12)


def test_means_over_no_task_are_nan():
    found = {name: float(collect(metric, [[0.9]]).compute()) for name, metric in every_metric(1).items()}
    empty = {name for name, value in found.items() if math.isnan(value)}
    assert empty == {"Stability", "BackwardTransfer", "chaudhry", "avalanche", "mammoth", "ForwardTransfer"}
    assert found["AverageAccuracy"] == found["LearningAccuracy"] == found["AverageIncrementalAccuracy"] == 0.9
    for kind in CURVES:
        metric = kind(1)
        metric.update(0, 0, 0.9, step=1)
        assert math.isnan(float(metric.compute()))


NEEDED = {
    "AverageAccuracy": {(2, 0), (2, 1), (2, 2)},
    "AverageIncrementalAccuracy": {(0, 0), (1, 0), (1, 1), (2, 0), (2, 1), (2, 2)},
    "LearningAccuracy": {(0, 0), (1, 1), (2, 2)},
    "Stability": {(2, 0), (2, 1)},
    "BackwardTransfer": {(0, 0), (1, 1), (2, 0), (2, 1)},
    "chaudhry": {(0, 0), (1, 0), (1, 1), (2, 0), (2, 1)},
    "avalanche": {(0, 0), (1, 1), (2, 0), (2, 1)},
    "mammoth": {(0, 0), (1, 0), (1, 1), (2, 0), (2, 1)},
    "ForwardTransfer": {(0, 1), (1, 2)},
    "Intransigence": {(2, 2)},
}


@pytest.mark.parametrize("name", NEEDED)
def test_a_needed_entry_that_is_missing_is_named_and_others_are_not_missed(name):
    full = torch.rand(3, 3, dtype=torch.float64)
    for row in range(3):
        for task in range(3):
            matrix = full.clone()
            matrix[row, task] = NAN
            metric = every_metric(3)[name]
            if (row, task) in NEEDED[name]:
                said = rf"^{type(metric).__name__}: needs R\[{row}, {task}\].*after_task={row}, on_task={task}"
                with pytest.raises(ValueError, match=said):
                    metric.of(matrix)
                with pytest.raises(ValueError, match=said):
                    collect(metric, matrix.tolist()).compute()
            else:
                assert math.isfinite(metric.of(matrix))


def test_only_the_baselines_that_are_used_must_be_known():
    matrix = torch.tensor([[0.9, 0.5], [0.7, 0.8]])
    assert float(ForwardTransfer(2, baseline=torch.tensor([NAN, 0.2])).of(matrix)) == pytest.approx(0.3)
    with pytest.raises(ValueError, match=r"ForwardTransfer: baseline\[1\]=nan is needed"):
        ForwardTransfer(2, baseline=[0.1, NAN]).of(matrix)
    joint = Intransigence(2, joint=[NAN, 0.75])
    assert float(joint.of(matrix)) == pytest.approx(-0.05)
    with pytest.raises(ValueError, match=r"Intransigence: joint\[0\]=nan is needed"):
        joint.of(matrix[:1, :1])


def batches():
    """Hits of 60 rows by cell, uneven in number."""
    generator = torch.Generator().manual_seed(3)
    cells = [(i, j) for i in range(-1, 3) for j in range(3)]
    sizes = [7 + 3 * number for number in range(len(cells))]
    return [(i, j, torch.rand(size, generator=generator) < 0.6) for (i, j), size in zip(cells, sizes, strict=True)]


def on_ranks(ranks):
    """Compute on the first of several metrics as torchmetrics does over processes; its gather is stood in for."""
    parts = {name: [states_of(metric)[name] for metric in ranks] for name in ranks[0]._reductions}
    queue = list(parts.values())

    def gather(tensor, group=None):
        sent = queue.pop(0)
        assert torch.equal(tensor, sent[0])
        assert len({(part.dtype, part.ndim) for part in sent}) == 1  # a real gather needs it
        return sent

    ranks[0].dist_sync_fn, ranks[0].distributed_available_fn = gather, lambda: True
    return ranks[0].compute()


TODAY = pytest.mark.skipif(
    not hasattr(AccuracyMatrix, "metric_state"), reason="the stand-in for a gather is that of torchmetrics after 1.0"
)


def states_of(metric):
    states = {name: getattr(metric, name) for name in metric._defaults}
    empty = torch.tensor([], dtype=metric.dtype)  # what torchmetrics sends for a rank without measurements
    return {k: v if isinstance(v, torch.Tensor) else torch.cat([*v]) if v else empty for k, v in states.items()}


@TODAY
@pytest.mark.parametrize("split", [0, 1, 5])
def test_two_ranks_are_one_process_on_the_joint_rows(split):
    whole, ranks = AccuracyMatrix(3), [AccuracyMatrix(3), AccuracyMatrix(3)]
    for i, j, hits in batches():
        whole.update(i, j, hits)
        for metric, part in zip(ranks, (hits[:split], hits[split:]), strict=True):
            metric.update(i, j, part)
    expected = torch.tensor([[hits.sum() / len(hits)] for _, _, hits in batches()]).reshape(4, 3)
    assert torch.equal(on_ranks(ranks), whole.compute())
    assert torch.allclose(whole.compute().float(), expected)
    own = torch.stack([hits[:split].double().mean() for _, _, hits in batches()]).reshape(4, 3)
    assert torch.equal(ranks[0].matrix.isnan(), own.isnan())  # a rank has its own again


def test_rows_hits_and_counts_say_the_same_however_batched():
    rows, counts, single = AccuracyMatrix(3), AccuracyMatrix(3), AccuracyMatrix(3)
    for i, j, hits in batches():
        for part in hits.split(4):
            rows.update(i, j, part)
            counts.update(i, j, part.float().mean(), weight=len(part))
        single.update(i, j, hits.float(), weight=torch.ones(len(hits)))
    assert torch.equal(rows.compute(), single.compute())
    assert torch.allclose(rows.compute(), counts.compute(), atol=1e-7)
    weighted = AccuracyMatrix(1)
    weighted.update(0, 0, torch.tensor([1.0, 0.0]), weight=torch.tensor([3.0, 1.0]))
    assert float(weighted.compute()[1, 0]) == 0.75


def test_the_matrix_has_the_row_before_the_first_task_on_top_and_blanks_are_nan():
    metric = collect(AccuracyMatrix(2), [[0.9, NAN], [0.7, 0.8]], before=[NAN, 0.3])
    expected = torch.tensor([[NAN, 0.3], [0.9, NAN], [0.7, 0.8]], dtype=torch.float64)
    assert same(metric.compute(), expected)
    assert metric.compute().dtype == torch.float64
    metric.reset()
    with pytest.warns(UserWarning, match="before the ``update`` method"):
        assert metric.compute().isnan().all()


def test_a_collection_keeps_one_matrix_for_all():
    rows = VECTORS["all differ"][0]
    together = MetricCollection({**every_metric(3), "matrix": AccuracyMatrix(3)})
    collect(together, rows)
    assert len(together.compute_groups) == 1
    assert len({metric.scores.data_ptr() for metric in together.values(copy_state=False)}) == 1
    found = together.compute()
    for name, expected in reference(rows).items():
        assert float(found[name]) == pytest.approx(expected, abs=1e-12), name
    if not hasattr(AccuracyMatrix, "metric_state"):
        return  # torchmetrics 1.0 lets a collection's members keep the sums of their first result
    together.update(2, 2, 0.5)  # after compute: the mean of 0.9 and 0.5
    assert float(together.compute()["Intransigence"]) == pytest.approx(0.25)


def test_running_values_judge_the_tasks_so_far():
    rows = VECTORS["recovers"][0]
    running = {name: metric for name, metric in every_metric(3, so_far=True).items() if name != "ForwardTransfer"}
    full = every_metric(3)
    matrix = AccuracyMatrix(3)
    for k, row in enumerate(rows):
        for j in range(k + 1):
            for metric in (*running.values(), matrix):
                metric.update(k, j, row[j])
        expected = reference([[0.0 if math.isnan(x) else x for x in r[: k + 1]] for r in rows[: k + 1]])
        for name, metric in running.items():
            assert float(metric.compute()) == pytest.approx(expected[name], abs=1e-12, nan_ok=True), name
            known = full[name].of(matrix.compute()[: k + 2, : k + 1])
            assert float(known) == pytest.approx(expected[name], abs=1e-12, nan_ok=True), name
    early = collect(AverageAccuracy(3), rows[:1])
    with pytest.raises(
        ValueError, match=r"AverageAccuracy: needs R\[2, 0\]"
    ):  # a strict one does not take fewer for all
        early.compute()
    with pytest.raises(ValueError, match=r"AverageAccuracy: needs R\[2, 0\]"):
        collect(AverageAccuracy(3, so_far=True), [], before=[0.1, 0.1, 0.1]).compute()


class Holder(torch.nn.Module):
    def __init__(self, tasks=3):
        super().__init__()
        self.matrix, self.gap = AccuracyMatrix(tasks), StabilityGap(tasks)


def fill(holder, rows):
    collect(holder.matrix, rows)
    for i, row in enumerate(rows):
        for j in range(i + 1):
            holder.gap.update(i, j, row[j], step=10 * i, weight=3)
    return holder


def test_a_checkpoint_of_a_module_keeps_the_measurements_and_goes_on_from_there(tmp_path):
    rows = VECTORS["all differ"][0]
    saved = fill(Holder(), rows)
    torch.save(saved.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    loaded = fill(Holder(), [[0.1] * 3] * 3)
    old = loaded.matrix.compute(), loaded.gap.compute()
    fresh = Holder()
    for holder in (loaded, fresh):  # a metric with a past and a result at hand, and a new one that must not warn
        holder.load_state_dict(state)
        assert same(holder.matrix.compute(), saved.matrix.compute())
        assert torch.equal(holder.gap.compute(), saved.gap.compute())
    assert not same(old[0], saved.matrix.compute())
    loaded.matrix.update(0, 0, 1.0)
    loaded.gap.update(2, 0, 0.2, step=25)
    assert same(fresh.matrix.compute(), saved.matrix.compute())
    assert len(state["gap.measurements"]) == len(fresh.gap.measurements) == 6  # neither shares what another adds
    saved.matrix.update(0, 0, 1.0)
    assert same(loaded.matrix.compute(), saved.matrix.compute())


def test_a_whole_of_all_ranks_loads_into_one_process():
    ranks = [StabilityGap(2), StabilityGap(2)]
    for number, (during, value) in enumerate([(0, 0.9), (1, 0.4), (1, 0.7)]):
        ranks[number % 2].update(during, 0, value, step=number)
    parts = [torch.cat(rank.measurements) for rank in ranks]
    ranks[0].sync(dist_sync_fn=lambda tensor, group=None: parts, distributed_available=lambda: True)
    again = StabilityGap(2)
    again.load_state_dict(ranks[0].state_dict())
    ranks[0].unsync()
    assert float(again.compute()) == pytest.approx(0.5)
    again.update(1, 0, 0.3, step=7)
    assert float(again.compute()) == pytest.approx(0.6)
    again.reset()
    assert again.measurements == []


def test_a_state_of_other_tasks_is_refused():
    with pytest.raises(ValueError, match=r"AccuracyMatrix: the loaded 'scores' are of 2 tasks, not num_tasks=3"):
        AccuracyMatrix(3).load_state_dict(collect(AccuracyMatrix(2), [[0.1, 0.2]] * 2).state_dict())


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))], ids=["deepcopy", "pickle"])
def test_copies_go_their_own_way(twin):
    for metric in every_metric(3).values():
        collect(metric, VECTORS["all differ"][0])
        other = twin(metric)
        assert torch.equal(other.compute(), metric.compute())
        other.update(2, 0, 0.0)
        assert float(metric.scores[3, 0]) == pytest.approx(0.7)


def test_updates_under_inference_mode_and_outside_of_it_mix():
    metric = AccuracyMatrix(1)
    with torch.inference_mode():
        metric.reset()
        metric.update(0, 0, torch.ones(2))
    metric.update(0, 0, torch.zeros(2, requires_grad=True))
    assert float(metric.compute()[1, 0]) == 0.5
    assert not metric.scores.requires_grad


def test_moving_a_module_to_half_precision_keeps_the_counts():
    holder = fill(Holder(), VECTORS["all differ"][0]).half()
    assert holder.matrix.scores.dtype == holder.gap.measurements[0].dtype == torch.float64
    many = AccuracyMatrix(1)
    for _ in range(3):
        many.update(0, 0, 1.0, weight=2**24)
        many.update(0, 0, 0.0, weight=1)
    assert float(many.weights[1, 0]) == 3 * 2**24 + 3  # float32 would lose the single ones
    assert collect(AccuracyMatrix(2).set_dtype(torch.float32), [[0.5, 0.2]] * 2).compute().dtype == torch.float32


def curve_of(metric, looks):
    for during, task, value, step, weight in looks:
        metric.update(during, task, value, step=step, weight=weight)
    return metric


def test_an_old_task_that_falls_in_between_shows_only_inside_of_tasks():
    looks = [(0, 0, 0.9, 10, 1), (1, 0, 0.4, 15, 1), (1, 0, 0.7, 20, 1)]
    assert float(curve_of(MinAccuracy(2), looks).compute()) == pytest.approx(0.4)
    assert float(curve_of(StabilityGap(2), looks).compute()) == pytest.approx(0.5)
    rows = [[0.9, NAN], [0.7, 0.8]]
    assert float(collect(Forgetting(2), rows).compute()) == pytest.approx(0.2)  # all that the ends of tasks tell
    better = [(0, 0, 0.9, 10, 1), (1, 0, 0.95, 15, 1)]
    assert float(curve_of(StabilityGap(2), better).compute()) == pytest.approx(-0.05)  # nothing is clipped


def random_looks(seed):
    generator = torch.Generator().manual_seed(seed)
    pairs = [(step, task) for step in range(12) for task in range(step // 4 + 1)]  # four steps in each of three tasks
    values = torch.rand(len(pairs), generator=generator, dtype=torch.float64).tolist()
    return [(step // 4, task, value, step, 1) for (step, task), value in zip(pairs, values, strict=True)]


@pytest.mark.parametrize("seed", range(5))
def test_random_curves_agree_with_the_written_formula_in_any_order(seed):
    looks = random_looks(seed)
    low, gap = [], []
    for task in range(2):
        curve = [(step, value) for during, on, value, step, _ in looks if on == task and during > task]
        learned = next(value for during, on, value, step, _ in looks if on == task and step == 4 * task + 3)
        low.append(min(value for _, value in curve))
        gap.append(learned - low[-1])
    for order in (looks, looks[::-1]):
        assert float(curve_of(MinAccuracy(3), order).compute()) == pytest.approx(mean(low), abs=1e-12)
        assert float(curve_of(StabilityGap(3), order).compute()) == pytest.approx(mean(gap), abs=1e-12)


@TODAY
@pytest.mark.parametrize("kind", CURVES)
def test_looks_of_one_step_are_joined_over_batches_and_ranks(kind):
    # One rank sees 1 of 4 right, the other 3 of 4: the step is at 0.5, and a minimum over parts would be 0.25.
    looks = [(0, 0, 0.9, 10, 4), (1, 0, 0.25, 15, 4), (1, 0, 0.75, 15, 4), (1, 0, 0.6, 20, 4), (1, 1, 0.5, 20, 4)]
    whole = curve_of(kind(2), looks).compute()
    assert float(whole) == pytest.approx({MinAccuracy: 0.5, StabilityGap: 0.4}[kind])
    ranks = [curve_of(kind(2), looks[::2]), curve_of(kind(2), looks[1::2])]
    assert torch.equal(on_ranks(ranks), whole)
    assert torch.equal(on_ranks([curve_of(kind(2), looks), kind(2)]), whole)  # a rank that has no row
    ranks = [kind(2), curve_of(kind(2), looks)]
    with pytest.warns(UserWarning, match="before the ``update`` method"):
        assert torch.equal(on_ranks(ranks), whole)


@pytest.mark.parametrize("kind", CURVES)
def test_a_task_that_was_not_looked_at_during_another_is_named(kind):
    looks = random_looks(0)
    for row, task in [(0, 0), (1, 0), (2, 0), (1, 1), (2, 1)]:
        kept = [look for look in looks if look[:2] != (row, task)]
        empty = (row, task, 0.5, 4 * row, 0)  # of no rows: no measurement
        with pytest.raises(
            ValueError, match=rf"{kind.__name__}: needs R\[{row}, {task}\], a look at task {task} during task {row}"
        ):
            curve_of(kind(3), [*kept, empty]).compute()


def test_the_picture_names_tasks_writes_values_and_leaves_blanks():
    metric = AccuracyMatrix(2, names=["upright", "rotated"])
    collect(metric, [[0.9, NAN], [0.7, 0.8]])
    figure, panel = metric.plot()
    where = {(round(text.get_position()[1]), round(text.get_position()[0])): text.get_text() for text in panel.texts}
    assert where == {(0, 0): "0.90", (1, 0): "0.70", (1, 1): "0.80"}
    assert [text.get_text() for text in panel.get_yticklabels()] == ["after upright", "after rotated"]
    assert [text.get_text() for text in panel.get_xticklabels()] == ["upright", "rotated"]
    assert panel.images[0].get_array().mask.tolist() == [[False, True], [False, False]]
    assert (panel.images[0].norm.vmin, panel.images[0].norm.vmax) == (0.0, 1.0)
    figure.canvas.draw()
    metric.update(-1, 1, 0.1)
    _, panel = metric.plot()
    assert [text.get_text() for text in panel.get_yticklabels()] == ["before", "after upright", "after rotated"]
    assert {text.get_text() for text in panel.texts} == {"0.10", "0.90", "0.70", "0.80"}


def test_a_picture_is_drawn_on_a_given_panel_and_of_a_given_matrix():
    first, panel = draw_accuracy_matrix(torch.full((3, 2), NAN))
    assert not panel.texts
    second, again = AccuracyMatrix(2).plot(torch.tensor([[1.5, -0.5], [0.2, 0.3]]), ax=first.add_subplot())
    assert second is first
    assert again is not panel
    assert (again.images[0].norm.vmin, again.images[0].norm.vmax) == (-0.5, 1.5)


def test_numbers_are_drawn_as_torchmetrics_draws_them():
    mpl.use("agg")
    from matplotlib import pyplot as plt

    metric = collect(Forgetting(2), [[0.9, 0.5], [0.7, 0.8]])
    figure, _ = metric.plot()
    plt.close(figure)


def test_a_call_says_what_to_do_and_loses_nothing():
    for metric in (collect(Forgetting(2), [[0.9, 0.5], [0.7, 0.8]]), MetricCollection(AverageAccuracy(2))):
        with pytest.raises(ValueError, match=r"a single update has no value. Call update\(\)"):
            metric(0, 0, 1.0)
    metric = collect(Forgetting(2), [[0.9, 0.5], [0.7, 0.8]])
    with pytest.raises(ValueError, match=r"^Forgetting: a single"):
        metric(0, 0, 1.0)
    assert float(metric.compute()) == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: AccuracyMatrix(0), r"AccuracyMatrix: num_tasks=0 must be a whole number of at least 1"),
        (lambda: Forgetting(True), r"Forgetting: num_tasks=True must"),
        (lambda: AccuracyMatrix(2, names=["one"]), r"AccuracyMatrix: names=\['one'\] are 1 for 2 tasks"),
        (lambda: Forgetting(2, definition="best"), r"Forgetting: definition='best' must be one of \['chaudhry'"),
        (lambda: ForwardTransfer(2, baseline=[0.1]), r"ForwardTransfer: baseline=\[0.1\] must be 2 numbers"),
        (lambda: Intransigence(2, joint=[0.1] * 3), r"Intransigence: joint=.* must be 2 numbers"),
        (lambda: AccuracyMatrix(2).update(2, 0, 0.5), r"AccuracyMatrix: after_task=2 must be .* from -1 .* to 1"),
        (lambda: AccuracyMatrix(2).update(-2, 0, 0.5), r"AccuracyMatrix: after_task=-2 must be"),
        (lambda: AccuracyMatrix(2).update(0, -1, 0.5), r"AccuracyMatrix: on_task=-1 must be .* from 0 to 1"),
        (lambda: AccuracyMatrix(2).update(0, 0.0, 0.5), r"AccuracyMatrix: on_task=0.0 must be"),
        (lambda: AccuracyMatrix(2).update(0, 0, NAN), r"AccuracyMatrix: value=nan with weight=1.0 must be finite"),
        (lambda: AccuracyMatrix(2).update(0, 0, 0.5, weight=-1), r"AccuracyMatrix: value=0.5 with weight=-1 must be"),
        (
            lambda: AccuracyMatrix(2).update(0, 0, torch.ones(3), weight=torch.ones(2)),
            r"AccuracyMatrix: value=.*one weight for all or one for each",
        ),
        (lambda: StabilityGap(2).update(-1, 0, 0.5, step=0), r"StabilityGap: during_task=-1 must be"),
        (lambda: StabilityGap(2).update(0, 0, 0.5, step=-1), r"StabilityGap: step=-1 must be"),
        (lambda: Forgetting(2).of(torch.ones(2, 3)), r"Forgetting: a matrix of shape \(2, 3\)"),
        (lambda: Forgetting(2).of(torch.ones(4, 2)), r"Forgetting: a matrix of shape \(4, 2\)"),
        (lambda: Forgetting(2).of(torch.ones(2)), r"Forgetting: a matrix of shape \(2,\)"),
        (lambda: Forgetting(2).of(torch.ones(2, 2).long()), r"Forgetting: a matrix of .*int64 must"),
        (lambda: Forgetting(2).of(torch.ones(3, 3)), r"Forgetting: a matrix of 3 tasks is more than num_tasks=2"),
        (lambda: draw_accuracy_matrix(torch.ones(2, 2), names=["a"]), r"draw_accuracy_matrix: names=\['a'\] are 1"),
    ],
)
def test_what_cannot_be_is_refused_with_its_value_and_the_cure(call, said):
    with pytest.raises(ValueError, match=f"^{said}"):
        call()


def test_the_page_lists_every_metric_with_a_key_that_can_be_logged():
    page = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text().partition("A set's manifold")[0]
    lines = [line for line in page.splitlines() if line.startswith("| `")]
    listed = {re.match(r"\| `(\w+)", line)[1] for line in lines}
    kinds = [*PLAIN, Forgetting, ForwardTransfer, Intransigence, MinAccuracy, StabilityGap, AccuracyMatrix]
    assert listed == {kind.__name__ for kind in kinds}
    keys = [re.search(r"`([\w/]+)` \|$", line)[1] for line in lines]
    assert [check_key(key) for key in keys] == keys
    assert len(set(keys)) == len(keys)
    direction = {kind.__name__: kind.higher_is_better for kind in kinds}
    for line in lines:
        name = re.match(r"\| `(\w+)", line)[1]
        assert f"{'higher' if direction[name] else 'lower'} is better" in line, name
