"""What happens to layers, graphs and the compiler over a wrapper's life."""

import gc
import weakref

import pytest
import torch
from torch import nn
from torch._dynamo import eval_frame

from mkor import MKOR

WINDOW = {"rank": 6, "vectors": 2, "rows": 4}


def chain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 4))


def backward(model, rows=9):
    model.zero_grad()
    model(torch.randn(rows, 6)).square().mean().backward()


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.05)


def test_a_late_group_keeps_the_output_and_frees_the_compiler():
    model = chain()
    optimizer = MKOR(model, sgd([*model[0].parameters(), *model[4].parameters()]), **WINDOW)
    backward(model)
    optimizer.step()
    optimizer.add_param_group({"params": list(model[2].parameters())})
    for _ in range(2):
        backward(model)
        head = model[4].weight.grad.clone()
        optimizer.step()
        assert torch.equal(head, model[4].weight.grad)
    assert eval_frame._stance.stance == "default"
    covered = {row.parameter for row in optimizer.coverage() if row.preconditioned}
    assert covered == {"0.weight", "0.bias", "2.weight", "2.bias"}


def test_a_late_group_before_the_first_step_keeps_the_search():
    model = chain()
    optimizer = MKOR(model, sgd([*model[0].parameters(), *model[4].parameters()]), **WINDOW)
    optimizer.add_param_group({"params": list(model[2].parameters())})
    backward(model)
    optimizer.step()
    reasons = {row.parameter: row.reason for row in optimizer.coverage()}
    assert "output layer" in reasons["4.weight"]
    assert eval_frame._stance.stance == "default"


@pytest.mark.parametrize("steps", [0, 1])
def test_the_search_keeps_no_model_alive(steps):
    model = chain()
    optimizer = MKOR(model, sgd(model.parameters()), **WINDOW)
    weight = weakref.ref(model[2].weight)
    backward(model)
    for _ in range(steps):
        optimizer.step()
    del model, optimizer
    gc.collect()
    assert weight() is None


def test_closing_frees_the_factors():
    model = chain()
    optimizer = MKOR(model, sgd(model.parameters()), **WINDOW)
    backward(model)
    optimizer.step()
    rows = weakref.ref(optimizer.state[model[0].weight]["mkor_left_rows"])
    optimizer.close()
    gc.collect()
    assert rows() is None


def test_modules_called_module_are_told_apart():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = nn.ModuleDict({"fc": nn.Linear(6, 6)})
            self.fc = nn.Linear(6, 6)
            self.head = nn.Linear(6, 4)

        def forward(self, x):
            return self.head(self.fc(self.module["fc"](x).relu()).relu())

    model = Model()
    optimizer = MKOR(model, sgd(model.parameters()), **WINDOW)
    backward(model)
    optimizer.step()
    names = [row.parameter for row in optimizer.coverage() if row.preconditioned]
    assert names == ["module.fc.weight", "module.fc.bias", "fc.weight", "fc.bias"]
    assert all(int(optimizer.state[m.weight]["mkor_updates"]) == 1 for m in (model.fc,))


def test_freezing_after_wrapping():
    model = chain()
    optimizer = MKOR(model, sgd(model.parameters()), **WINDOW)
    model[0].requires_grad_(False)
    before = model[0].weight.clone()
    for _ in range(2):
        backward(model)
        optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    assert torch.equal(before, model[0].weight)
    assert int(optimizer.state[model[2].weight]["mkor_updates"]) == 2


def test_steps_without_rows_are_no_reason_to_stop():
    """Hooks that run on empty inputs are not hooks that never run."""
    model = chain()
    optimizer = MKOR(model, sgd(model.parameters()), **WINDOW)
    for step in range(30):
        optimizer.zero_grad()
        model(torch.randn(0 if step % 2 else 9, 6)).mul(1e-3).sum().backward()
        optimizer.step()
    assert int(optimizer.state[model[0].weight]["mkor_updates"]) == 15


def test_a_head_that_cannot_be_preconditioned_still_counts():
    model = nn.Sequential(
        nn.Linear(6, 5), nn.ReLU(), nn.utils.parametrizations.weight_norm(nn.Linear(5, 4))
    )
    optimizer = MKOR(model, sgd(model.parameters()), **WINDOW)
    backward(model)
    optimizer.step()
    assert [row.parameter for row in optimizer.coverage() if row.preconditioned] == [
        "0.weight",
        "0.bias",
    ]


def test_a_bias_of_another_optimizer_is_left_alone():
    model = chain()
    weights = [p for name, p in model.named_parameters() if name.endswith("weight")]
    optimizer = MKOR(model, sgd(weights), **WINDOW)
    for _ in range(2):
        backward(model)
        before = model[0].bias.grad.clone()
        raw = model[0].weight.grad.clone()
        optimizer.step()
    assert torch.equal(before, model[0].bias.grad)
    assert not torch.equal(raw, model[0].weight.grad)


def test_a_layer_that_reshapes_its_output_is_not_captured():
    class Heads(nn.Linear):
        def forward(self, x):
            return super().forward(x).unflatten(-1, (2, -1))

    model = nn.Sequential(Heads(6, 8), nn.Flatten(1), nn.ReLU(), nn.Linear(8, 4))
    optimizer = MKOR(model, sgd(model.parameters()), **WINDOW)
    backward(model)
    raw = model[0].weight.grad.clone()
    optimizer.step()
    assert torch.equal(raw, model[0].weight.grad)
