"""``Combined``: several optimizers as one, alone and below a wrapper."""

import copy
import io

import pytest
import torch
from torch.optim import lr_scheduler

from mkor import MKOR, Combined
from support.contestants import WINDOW, Net, base_state, same, seeded, train, weights


def parts(model: Net):
    matrices = [p for p in model.parameters() if p.dim() == 2]
    rest = [p for p in model.parameters() if p.dim() != 2]
    return torch.optim.Muon(matrices, lr=0.01), torch.optim.AdamW(rest, lr=0.02)


class Both:
    """What ``Combined`` stands for: every part asked in turn."""

    def __init__(self, optimizers):
        self.optimizers = optimizers

    def zero_grad(self):
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def step(self):
        for optimizer in self.optimizers:
            optimizer.step()


def test_equals_its_parts():
    model, other = seeded(), seeded()
    assert train(model, Combined(*parts(model)), 5) == train(other, Both(parts(other)), 5)
    assert same(weights(model), weights(other))


def test_groups_and_state_are_the_parts_own():
    model = seeded()
    muon, adamw = parts(model)
    combined = Combined(muon, adamw)
    train(model, combined, 1)
    for _ in range(2):
        assert combined.param_groups[0] is muon.param_groups[0]
        assert combined.param_groups[1] is adamw.param_groups[0]
        assert set(combined.state) == set(model.parameters())
        assert "momentum_buffer" in combined.state[model.first.weight]
        assert "exp_avg" in combined.state[model.first.bias]
        combined.load_state_dict(copy.deepcopy(combined.state_dict()))
    adamw.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))], "lr": 0.5})
    assert [group["lr"] for group in combined.param_groups] == [0.01, 0.02, 0.5]


@pytest.mark.parametrize("wrap", [False, True])
def test_resume(wrap):
    def make(model):
        combined = Combined(*parts(model))
        return MKOR(model, combined, **WINDOW) if wrap else combined

    model, other = seeded(), seeded(seed=1)
    optimizer = make(model)
    train(model, optimizer, 3)
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    expected = train(model, optimizer, 3, 3)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other.load_state_dict(saved[0])
    resumed = make(other)
    resumed.load_state_dict(saved[1])
    assert train(other, resumed, 3, 3) == expected
    assert same(base_state(optimizer), base_state(resumed))


def test_scheduler_moves_all_parts():
    model = seeded()
    combined = Combined(*parts(model))
    scheduler = lr_scheduler.ExponentialLR(combined, 0.5)
    for i in range(2):
        train(model, combined, 1, i)
        scheduler.step()
    assert [group["lr"] for group in combined.param_groups] == pytest.approx([0.0025, 0.005])


def test_closure_runs_once():
    model = seeded()
    combined = Combined(*parts(model))
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        return 4.5

    with torch.no_grad():
        assert combined.step(closure) == 4.5
    assert calls == [True]


def test_group_added_to_a_part_reaches_the_wrapper():
    """Steps, checkpoints and coverage know parameters that a part gets later."""
    model = seeded()
    output = list(model.output.parameters())
    matrices = [model.first.weight, model.again.weight]
    known = {id(p) for p in output + matrices}
    rest = [p for p in model.parameters() if id(p) not in known]
    combined = Combined(torch.optim.Muon(matrices, lr=0.01), torch.optim.AdamW(rest, lr=0.02))
    optimizer = MKOR(model, combined, **WINDOW)
    before = weights(model.output)
    train(model, optimizer, 1)
    assert same(before, weights(model.output))
    combined.optimizers[1].add_param_group({"params": output})
    train(model, optimizer, 2, 1)
    assert not same(before, weights(model.output))
    state = optimizer.state_dict()
    assert len(state["param_groups"]) == 3
    optimizer.load_state_dict(copy.deepcopy(state))
    train(model, optimizer, 1, 3)
    reasons = {row.parameter: row.reason for row in optimizer.coverage()}
    assert "base optimizer's" not in reasons["output.weight"]


def test_other_number_of_groups():
    model = seeded()
    combined = Combined(*parts(model))
    state = torch.optim.AdamW(model.parameters()).state_dict()
    with pytest.raises(ValueError, match=r"1 parameter groups.*2"):
        combined.load_state_dict(state)
