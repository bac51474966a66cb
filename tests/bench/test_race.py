"""The race: schedule, fairness, tuning, steps to match, divergence, interruption."""

import math

import pytest
import torch

import mkor
from mkor.bench import race as module
from mkor.bench.contestants import parse_contestant, parse_contestants
from mkor.bench.race import (
    TUNING_SEED,
    Training,
    choose,
    fewest_steps,
    guessed_steps,
    match_all,
    planned_steps,
    rate_factor,
    resolution_for,
    run_race,
    state_bytes,
    train_together,
)
from mkor.bench.results import Race, Run, Settings, Trial
from mkor.bench.show import Progress
from mkor.bench.tasks import Batch, Task, load_task


@pytest.fixture
def task() -> Task:
    return load_task("digits-mlp", {"width": 16, "depth": 2, "batch": 16})


def settings(task: Task, text: str = "adamw,sgd", **changes: object) -> Settings:
    contestants = tuple(parse_contestants(text))
    values = {"steps": 6, "seeds": 2, **changes}
    return Settings(task, contestants, contestants[0].label, **values)


@pytest.mark.parametrize("steps", [1, 2, 7, 200])
@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.5, 0.99])
def test_the_rate_rises_linearly_to_one_and_falls_to_nearly_nothing(
    steps: int, warmup: float
) -> None:
    rates = [rate_factor(step, steps, warmup) for step in range(steps)]
    rise = max(1, round(warmup * steps))
    assert rates[:rise] == pytest.approx([(step + 1) / rise for step in range(rise)])
    assert rates[rise - 1] == max(rates) == 1.0
    assert all(a > b > 0 for a, b in zip(rates[rise - 1 :], rates[rise:], strict=False))
    assert rate_factor(19 + 90, 200, 0.1) == pytest.approx(0.5, abs=0.02)
    assert rate_factor(199, 200, 0.1) < 1e-3


def test_all_start_with_the_same_weights_and_see_the_same_batches(
    task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, list[Batch]] = {}
    starts: dict[str, torch.Tensor] = {}
    advance = Training.advance

    def spy(training: Training, batch: Batch) -> None:
        label = f"{training.contestant.label} {training.seed}"
        if label not in starts:
            weights = [weight.detach().flatten().clone() for weight in training.model.parameters()]
            starts[label] = torch.cat(weights)
        seen.setdefault(label, []).append(batch)
        advance(training, batch)

    monkeypatch.setattr(Training, "advance", spy)
    run_race(settings(task, "adamw,sgd,mkor+adamw"), Progress())
    for seed in range(2):
        labels = [f"{name} {seed}" for name in ("adamw", "sgd", "mkor+adamw")]
        for other in labels[1:]:
            assert torch.equal(starts[labels[0]], starts[other])
            assert len(seen[labels[0]]) == len(seen[other]) == 6
            for mine, theirs in zip(seen[labels[0]], seen[other], strict=True):
                assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    assert not torch.equal(starts["adamw 0"], starts["adamw 1"])


class Log(Progress):
    """Notes every step, and is interrupted after one of them."""

    def __init__(self, last: int = 10**9) -> None:
        super().__init__()
        self.last, self.steps = last, []

    def advance(self, label: str, step: int, value: float) -> None:
        super().advance(label, step, value)
        self.steps.append((label, step))
        if self.done == self.last:
            raise KeyboardInterrupt


def test_contestants_take_steps_in_turn(task: Task) -> None:
    log = Log()
    run_race(settings(task, seeds=1, steps=4), log)
    assert [step for _, step in log.steps] == [1, 1, 2, 2, 3, 3, 4, 4]
    assert [label for label, _ in log.steps[:4]] == ["adamw", "sgd", "sgd", "adamw"]
    assert log.done == log.total == 8


def test_ctrl_c_keeps_the_seeds_that_are_complete(task: Task) -> None:
    race = run_race(settings(task, seeds=3), Log(15))
    assert race.interrupted
    assert [(run.contestant, run.seed) for run in race.runs] == [("adamw", 0), ("sgd", 0)]


def test_a_run_has_its_curve_and_its_clocks(task: Task) -> None:
    race = run_race(settings(task, steps=40, seeds=1), Progress())
    run = race.of("adamw")[0]
    assert [point.step for point in run.curve] == list(range(4, 41, 4))
    assert run.loss == run.curve[-1].held_out_loss < run.curve[0].held_out_loss
    assert 0 < run.curve[0].cpu_seconds < run.curve[-1].cpu_seconds == run.cpu_seconds
    assert 0 < run.curve[0].wall_seconds < run.curve[-1].wall_seconds == run.wall_seconds
    weights = 16 * 64 + 16 + 10 * 16 + 10
    assert race.of("sgd")[0].state_bytes == 4 * weights
    assert run.state_bytes == 2 * 4 * weights + 4 * 4


def test_the_same_race_twice_ends_alike(task: Task) -> None:
    first, second = (run_race(settings(task, "mkor+adamw,sgd"), Progress()) for _ in range(2))
    assert [run.loss for run in first.runs] == [run.loss for run in second.runs]
    assert [run.seed for run in first.of("sgd")] == [0, 1]
    # The search for the steps that match runs contestants alone, on the batches of the race.
    alone = run_race(settings(task, "sgd"), Progress())
    assert [run.loss for run in alone.runs] == [run.loss for run in first.of("sgd")]


def test_shared_storage_counts_once() -> None:
    weight = torch.nn.Parameter(torch.zeros(4))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    buffer = torch.zeros(10)
    optimizer.state[weight] = {"a": buffer[:4], "b": [buffer[4:], None], "step": 3}
    assert state_bytes(optimizer) == 40


def test_everybody_gets_the_same_number_of_trials_unless_a_rate_is_given(task: Task) -> None:
    plan = settings(task, "adamw,sgd,mkor+sgd", tune=3, weight_decays=(0.0, 0.1))
    trials = [plan.trials(who) for who in plan.contestants]
    assert [len(each) for each in trials] == [6, 6, 6]
    assert {trial.weight_decay for trial in trials[0]} == {0.0, 0.1}
    assert planned_steps(plan) == (3 * 6 + 2 * 3) * 6
    plan = settings(task, "adamw[lr=0.5],sgd[weight_decay=0.25],lamb", tune=2, rates={"lamb": 0.7})
    first, second, third = (plan.trials(who) for who in plan.contestants)
    assert first == [Trial(0.5, 0.01)]
    assert {trial.weight_decay for trial in second} == {0.25}
    assert [trial.lr for trial in third] == [0.7]
    assert planned_steps(plan) == (2 + 2 * 3) * 6


def test_tuning_has_a_seed_of_its_own_and_picks_the_lowest_loss(
    task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[int] = []
    real = module.run_round

    def spy(*arguments: object, **named: object) -> list[Run]:
        used.append(named["seed"])
        return real(*arguments, **named)

    monkeypatch.setattr(module, "run_round", spy)
    race = run_race(settings(task, tune=3), Progress())
    assert used == [TUNING_SEED] * 3 + [0, 1]
    assert {run.seed for run in race.runs} == {0, 1}
    for label in ("adamw", "sgd"):
        found = race.tunings[label]
        best = min(found.trials, key=lambda pair: pair[1])[0]
        assert found.best == best
        assert {run.trial for run in race.of(label)} == {best}


def test_a_best_rate_at_the_edge_is_noticed() -> None:
    trials = [Trial(rate, 0.0) for rate in (1.0, 2.0, 0.5)]
    assert not choose(trials, [1.0, 2.0, 3.0]).at_edge
    assert choose(trials, [2.0, 1.0, 3.0]).at_edge
    assert choose(trials, [math.inf, math.inf, 3.0]).best.lr == 0.5
    assert not choose(trials[:1], [None]).at_edge


def test_a_diverged_run_is_a_result(task: Task) -> None:
    progress = Progress()
    race = run_race(settings(task, "adamw,sgd[lr=1e30]", steps=20), progress)
    assert [run.loss for run in race.of("sgd[lr=1e30]")] == [math.inf, math.inf]
    assert all(math.isfinite(run.loss) for run in race.of("adamw"))
    assert progress.done == progress.total


def test_a_refused_decomposition_is_divergence(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training(parse_contestant("adamw"), task, 0, 3, Trial(0.1, 0.0), 0.1)

    def refuse() -> None:
        raise torch.linalg.LinAlgError("ill-conditioned")

    monkeypatch.setattr(training.optimizer, "step", refuse)
    train_together([training], 0, Progress())
    assert training.result().loss == math.inf


def test_losses_reach_the_switch_and_its_step_is_kept(task: Task) -> None:
    switch = "mkor-h[every=1,warmup=2,fraction=0.99,patience=0,rank=8,vectors=2]+sgd"
    race = run_race(settings(task, f"sgd,mkor+sgd,{switch}", steps=40), Progress())
    assert all(2 < run.switched_at < 40 for run in race.of(switch))
    assert {run.switched_at for run in race.of("sgd") + race.of("mkor+sgd")} == {None}


def test_only_a_switch_is_told_the_loss_and_told_it_without_its_graph(
    task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard = []
    monkeypatch.setattr(
        mkor.Preconditioned,
        "report_loss",
        lambda self, loss: heard.append((loss.item(), loss.requires_grad)),
    )
    race = run_race(settings(task, "sgd,mkor+sgd,mkor-h+sgd", seeds=1, steps=3), Progress())
    assert [graph for _, graph in heard] == [False] * 3
    assert [loss for loss, _ in heard] == pytest.approx(
        [race.of("mkor-h+sgd")[0].curve[index].training_loss for index in range(3)]
    )


@pytest.mark.parametrize("needed", [1, 2, 5, 50, 63, 90, 199, 200])
@pytest.mark.parametrize("resolution", [1, 4, 7])
def test_the_search_finds_the_fewest_steps_within_its_resolution(
    needed: int, resolution: int
) -> None:
    # A probe that diverged is not enough.
    found, probes = fewest_steps(
        lambda steps: 1.0 if steps >= needed else math.inf, 1.0, 200, resolution
    )
    assert needed <= found < needed + resolution or found == 200
    assert (200 - found) % resolution == 0
    assert all(0 < steps < 200 for steps, _ in probes)
    assert len({steps for steps, _ in probes}) == len(probes)
    assert len(probes) <= math.ceil(math.log2(200 / resolution)) + 1
    assert fewest_steps(lambda steps: 0.0, 1.0, 3, 5) == (3, [])
    assert (resolution_for(200), resolution_for(20), resolution_for(600)) == (2, 1, 6)


def fake_run(label: str, seed: int, loss: float, cpu: float) -> Run:
    return Run(label, seed, 100, Trial(0.1, 0.0), loss, cpu, 2 * cpu, 0, ())


def test_ratios_count_steps_and_what_a_step_costs(
    task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = settings(task, "adamw,mkor+adamw,sgd", steps=100)
    tunings = {who.label: choose(plan.trials(who), [None]) for who in plan.contestants}
    runs = [
        fake_run(label, seed, loss + seed * (label == "adamw"), cpu)
        for label, loss, cpu in (("adamw", 1.0, 10.0), ("mkor+adamw", 0.5, 12.0), ("sgd", 2.0, 9.0))
        for seed in range(2)
    ]
    race = Race(plan, tunings, runs)
    calls: list[tuple[int, int]] = []

    def fake_round(_: Settings, trials: object, *, seed: int, steps: int, **__: object) -> list:
        calls.append((steps, seed))
        (label,) = trials
        # The mean over the seeds, not each of them, has to reach the baseline's 1.5.
        return [fake_run(label, seed, (1.4 if steps >= 41 else 1.6) + (0.1 if seed else -0.1), 1.0)]

    monkeypatch.setattr(module, "run_round", fake_round)
    progress = Progress()
    progress.expect(2 * guessed_steps(plan))
    match_all(race, progress)
    found = race.matches["mkor+adamw"]
    assert (found.steps, found.resolution, found.target) == (41, 1, 1.5)
    assert found.step_ratio == pytest.approx(0.41)
    assert found.cpu_ratio == found.wall_ratio == pytest.approx(0.41 * 1.2)
    assert calls == [(steps, seed) for steps, _ in found.probes for seed in range(2)]
    assert progress.total == sum(steps for steps, _ in calls)
    assert race.matches["sgd"].steps is None
    assert race.matches.keys() == {"mkor+adamw", "sgd"}


def test_a_match_over_real_runs(task: Task) -> None:
    race = run_race(
        settings(task, "sgd[lr=0.001],adamw", steps=20, seeds=1, match=True), Progress()
    )
    found = race.matches["adamw"]
    assert found.steps < 20
    losses = dict(found.probes)
    assert losses[found.steps] <= found.target == race.of("sgd[lr=0.001]")[0].loss
