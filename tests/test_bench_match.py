"""Steps to match: the search on made-up losses, and over real runs."""

import math

import pytest

from mkor.bench import matching
from mkor.bench.contestants import parse_contestants
from mkor.bench.match import expected_steps, fewest_steps, resolution_for
from mkor.bench.progress import Progress
from mkor.bench.race import Race, Settings
from mkor.bench.runner import run_race
from mkor.bench.tasks import Task, load_task
from mkor.bench.training import Run, Trial


@pytest.mark.parametrize("needed", [1, 2, 5, 50, 63, 90, 199, 200])
@pytest.mark.parametrize("resolution", [1, 4, 7])
def test_the_search_finds_the_fewest_steps_within_its_resolution(
    needed: int, resolution: int
) -> None:
    found, probes = fewest_steps(
        lambda steps: 1.0 if steps >= needed else 2.0, 1.0, 200, resolution
    )
    assert needed <= found < needed + resolution or found == 200
    assert (200 - found) % resolution == 0
    assert all(0 < steps < 200 for steps, _ in probes)
    assert len(probes) <= math.ceil(math.log2(200 / resolution)) + 1
    assert len({steps for steps, _ in probes}) == len(probes)
    assert (found == 200) == (needed > 200 - resolution)


def test_a_resolution_as_wide_as_the_run_needs_no_search() -> None:
    assert fewest_steps(lambda steps: 0.0, 1.0, 3, 5) == (3, [])


def test_a_diverged_probe_is_not_enough() -> None:
    found, _ = fewest_steps(lambda steps: math.inf if steps < 100 else 0.5, 1.0, 200, 4)
    assert found == 100


def test_the_resolution_is_a_hundredth() -> None:
    assert (resolution_for(200), resolution_for(20), resolution_for(600)) == (2, 1, 6)
    assert expected_steps(200, 2) == 700


@pytest.fixture
def task() -> Task:
    return load_task("digits-mlp", {"width": 16, "depth": 2, "batch": 16})


def run(label: str, seed: int, loss: float, cpu: float) -> Run:
    return Run(label, seed, 100, Trial(0.1, 0.0), loss, cpu, 2 * cpu, 0, ())


def test_ratios_count_steps_and_what_a_step_costs(
    task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    contestants = tuple(parse_contestants("adamw,mkor+adamw,sgd"))
    race = run_race(Settings(task, contestants, "adamw", steps=1, seeds=1), Progress())
    race = Race(Settings(task, contestants, "adamw", steps=100, seeds=2), tunings=race.tunings)
    race.runs = [
        *(run("adamw", seed, 1.0 + seed, 10.0) for seed in range(2)),
        *(run("mkor+adamw", seed, 0.5, 12.0) for seed in range(2)),
        *(run("sgd", seed, 2.0, 9.0) for seed in range(2)),
    ]
    calls: list[tuple[int, int]] = []

    def fake_round(
        settings: Settings, trials: dict[str, Trial], *, seed: int, steps: int, **_: object
    ) -> list[Run]:
        calls.append((steps, seed))
        (label,) = trials
        # The mean over the seeds, not each of them, has to reach the baseline's 1.5.
        return [run(label, seed, (1.4 if steps >= 41 else 1.6) + (0.1 if seed else -0.1), 1.0)]

    monkeypatch.setattr(matching, "run_round", fake_round)
    progress = Progress()
    progress.expect(2 * matching.guessed_steps(race.settings))
    matching.match_all(race, progress)
    found = race.matches["mkor+adamw"]
    assert found.steps == 41
    assert found.resolution == 1
    assert found.target == 1.5
    assert found.step_ratio == pytest.approx(0.41)
    assert found.cpu_ratio == found.wall_ratio == pytest.approx(0.41 * 1.2)
    assert calls == [(steps, seed) for steps, _ in found.probes for seed in range(2)]
    assert progress.total == sum(steps for steps, _ in calls)
    assert race.matches["sgd"].steps is None
    assert race.matches["sgd"].probes == ()
    assert "adamw" not in race.matches


def test_a_match_over_real_runs(task: Task) -> None:
    contestants = tuple(parse_contestants("sgd[lr=0.001],adamw"))
    settings = Settings(task, contestants, contestants[0].label, steps=20, seeds=1, match=True)
    race = run_race(settings, Progress())
    found = race.matches["adamw"]
    assert found.steps is not None
    assert found.steps < 20
    losses = dict(found.probes)
    assert losses[found.steps] <= found.target == race.of("sgd[lr=0.001]")[0].loss
