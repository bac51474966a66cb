"""The tasks: their data, their models, and that they can be learned."""

import itertools
from pathlib import Path

import pytest
import torch

from mkor.bench.cli import UsageError
from mkor.bench.tasks import (
    TASKS,
    Task,
    batches,
    encode,
    held_out_loss,
    load_task,
    new_model,
    source_files,
)

TEXT = {"width": 32, "depth": 1, "batch": 4, "context": 16}
SMALL = {
    "text-lm": TEXT,
    "text-lm-torch-init": TEXT,
    "digits-mlp": {"width": 32, "depth": 2, "batch": 32},
    "digits-conv": {"width": 4, "depth": 2, "batch": 32},
    "digits-large": {"width": 4, "depth": 2, "batch": 32},
    "digits-autoencoder": {"width": 32, "depth": 4, "batch": 32},
}


@pytest.fixture(params=TASKS)
def task(request: pytest.FixtureRequest) -> Task:
    return load_task(request.param, SMALL[request.param])


def test_a_few_steps_bring_the_held_out_loss_down(task: Task) -> None:
    model = new_model(task, 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    before = held_out_loss(task, model)
    for inputs, target in itertools.islice(batches(task, 0), 30):
        task.loss(model(inputs), target).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert held_out_loss(task, model) < 0.95 * before
    assert model.training


def test_weights_and_batches_are_functions_of_the_seed(task: Task) -> None:
    def weights(seed: int) -> torch.Tensor:
        return torch.cat([weight.flatten() for weight in new_model(task, seed).parameters()])

    def inputs(seed: int) -> torch.Tensor:
        return torch.cat([inputs for inputs, _ in itertools.islice(batches(task, seed), 3)])

    state = torch.random.get_rng_state()
    for of_seed in (weights, inputs):
        assert torch.equal(of_seed(1), of_seed(1))
        assert not torch.equal(of_seed(1), of_seed(2))
    assert torch.equal(state, torch.random.get_rng_state())


def test_default_sizes_build(task: Task) -> None:
    whole = load_task(task.name)
    assert whole.name == task.name
    assert dict(whole.sizes) == dict(TASKS[task.name].sizes)
    inputs, target = next(batches(whole, 0))
    assert torch.isfinite(whole.loss(new_model(whole, 0)(inputs), target))
    assert len(whole.sha256) == 64


def test_held_out_digits_are_not_trained_on() -> None:
    task = load_task("digits-mlp", {"batch": 10_000})
    inputs, _ = next(batches(task, 0))
    held_out = {tuple(row) for row in task.held_out[0][0].tolist()}
    assert len(inputs) + len(task.held_out[0][0]) == 1797
    # A handful of the 1,797 images are equal to the pixel.
    assert sum(tuple(row) in held_out for row in inputs.tolist()) < 5


def test_the_loss_of_the_mean_image_is_as_documented() -> None:
    (images, _), *_ = load_task("digits-autoencoder").held_out
    loss = (images - images.mean(0)).square().sum(1).mean()
    assert loss == pytest.approx(4.7, abs=0.15)


def test_the_corpus_leaves_out_tests_and_what_a_build_wrote(tmp_path: Path) -> None:
    kept = ("b.py", "a/z.py", "a.py")
    for name in (*kept, "test/x.py", "a/tests/x.py", "site-packages/x.py", "_sysconfigdata_x.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text("pass")
    names = [path.relative_to(tmp_path).as_posix() for path in source_files(tmp_path)]
    assert names == ["a.py", "a/z.py", "b.py"]


def test_characters_and_their_targets() -> None:
    ids = encode("a\n~é\t".encode()).tolist()
    assert ids[0] != ids[1] != ids[2]
    assert ids[3:] == [0, 0, 0]
    assert max(ids) == 96
    inputs, target = next(batches(load_task("text-lm", TEXT), 0))
    assert inputs.shape == target.shape == (4, 16)
    assert torch.equal(inputs[:, 1:], target[:, :-1])


@pytest.mark.parametrize(("name", "spread"), [("text-lm", 0.02), ("text-lm-torch-init", 1.0)])
def test_embeddings_start_as_the_name_says(name: str, spread: float) -> None:
    model = new_model(load_task(name), 0)
    for table in (model.characters, model.positions):
        assert table.weight.std().item() == pytest.approx(spread, rel=0.05)


def test_attention_is_causal() -> None:
    task = load_task("text-lm", TEXT)
    model, (inputs, _) = new_model(task, 0), next(batches(task, 0))
    changed = inputs.clone()
    changed[:, 10] = (changed[:, 10] + 1) % 97
    before, after = model(inputs), model(changed)
    torch.testing.assert_close(before[:, :10], after[:, :10])
    assert not torch.allclose(before[:, 10:], after[:, 10:])


@pytest.mark.parametrize(
    ("name", "sizes", "message"),
    [
        ("text", {}, "unknown task 'text'. Did you mean 'text-lm'.*digits-autoencoder"),
        ("digits-mlp", {"context": 3}, "has no --context; its sizes are --width, --depth, --batch"),
        ("digits-autoencoder", {"depth": 1}, "--depth must be at least 2"),
        ("text-lm", {"width": 100}, "multiple of 32"),
    ],
)
def test_what_cannot_be_had_is_said(name: str, sizes: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_task(name, sizes)
