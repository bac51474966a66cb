"""What a checkpoint is keyed by and made of; the rows of the contract test that it resumes."""

import copy
from collections import OrderedDict, defaultdict

import pytest
import torch

from mkor import MKOR
from support.contestants import PREFIX, ROWS, WINDOW, factors, same, seeded, train, weights

ALLOWED = (torch.Tensor, int, float, bool, str, type(None), list, tuple, dict)


def groups_of(model):
    """Parameters in an order of their own, in two groups."""
    parameters = list(model.parameters())[::-1]
    return [{"params": parameters[:3], "lr": 0.01}, {"params": parameters[3:]}]


def make(model, parameters=None):
    base = torch.optim.AdamW(parameters or groups_of(model), lr=0.02)
    return MKOR(model, base, **WINDOW)


def resumes(model, optimizer, state, build=make):
    other = seeded(seed=3)
    other.load_state_dict(model.state_dict())
    resumed = build(other)
    resumed.load_state_dict(copy.deepcopy(state))
    assert same(factors(optimizer), factors(resumed))
    assert train(other, resumed, 4, 5) == train(model, optimizer, 4, 5)
    assert same(weights(model), weights(other))


def test_keys_follow_the_groups():
    """Numbers count through ``param_groups``, whatever the model's own order is."""
    model = seeded()
    optimizer = make(model)
    train(model, optimizer, 5)
    state = optimizer.state_dict()
    order = [p for group in optimizer.param_groups for p in group["params"]]
    for i, p in enumerate(order):
        assert {k for k in state["state"][i] if k.startswith(PREFIX)} == {
            k for k in optimizer.state[p] if k.startswith(PREFIX)
        }
    resumes(model, optimizer, state)


def test_keys_may_be_names():
    """As ``torch.distributed.checkpoint`` writes them."""
    model = seeded()
    optimizer = make(model)
    train(model, optimizer, 5)
    state = optimizer.state_dict()
    names = {id(p): n for n, p in model.named_parameters()}
    order = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    named = {
        "state": {order[i]: entry for i, entry in state["state"].items()},
        "param_groups": [
            group | {"params": [order[i] for i in group["params"]]}
            for group in state["param_groups"]
        ],
    }
    resumes(model, optimizer, named)


def test_base_of_named_parameters():
    """Torch keeps the names in the groups; they survive the round trip."""

    def build(model):
        return make(model, list(model.named_parameters()))

    model = seeded()
    optimizer = build(model)
    train(model, optimizer, 5)
    state = optimizer.state_dict()
    assert state["param_groups"][0]["param_names"] == [n for n, _ in model.named_parameters()]
    resumes(model, optimizer, state, build)


def test_state_of_another_order_of_entries():
    """The order of the entries in the file means nothing."""
    model = seeded()
    optimizer = make(model)
    train(model, optimizer, 5)
    state = optimizer.state_dict()
    entries = {k: OrderedDict(reversed(list(v.items()))) for k, v in state["state"].items()}
    resumes(model, optimizer, state | {"state": dict(reversed(entries.items()))})


@pytest.mark.parametrize("name", ROWS)
def test_plain_types_only(name):
    """Tensors, numbers, strings and containers: all that ``weights_only`` loading takes."""

    def check(value):
        assert type(value) in ALLOWED or isinstance(value, torch.Tensor)
        inner = value.values() if isinstance(value, dict) else value
        if isinstance(value, dict | list | tuple):
            for item in inner:
                check(item)

    model = seeded()
    optimizer = ROWS[name].make(model)
    train(model, optimizer, 2)
    state = optimizer.state_dict()
    check(state)
    own = [v for entry in state["state"].values() for k, v in entry.items() if k.startswith(PREFIX)]
    assert own
    assert all(type(v) is torch.Tensor for v in own)


def test_every_parameter_has_an_entry():
    """Strict loaders ask for one of each parameter once any has one, also of unused ones."""
    model = seeded()
    model.unused = torch.nn.Linear(2, 2)
    optimizer = MKOR(model, torch.optim.SGD(model.parameters(), lr=0.1), **WINDOW)
    train(model, optimizer, 1)
    state = optimizer.state_dict()["state"]
    assert set(state) == set(range(len(list(model.parameters()))))
    assert all(state[i] for i in state)


def test_load_hooks_run_once():
    model = seeded()
    optimizer = make(model)
    train(model, optimizer, 2)
    seen = []
    optimizer.register_load_state_dict_pre_hook(lambda *_: seen.append("pre"))
    optimizer.register_load_state_dict_post_hook(lambda *_: seen.append("post"))
    optimizer.register_state_dict_pre_hook(lambda *_: seen.append("save pre"))
    optimizer.register_state_dict_post_hook(lambda *_: seen.append("save post"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["save pre", "save post", "pre", "post"]


def test_factors_of_a_frozen_layer_are_kept():
    """What is frozen at the moment of saving thaws with the factors that it had."""
    model = seeded()
    optimizer = make(model)
    train(model, optimizer, 3)
    kept = optimizer.state_dict()
    model.first.requires_grad_(False)
    optimizer.zero_grad()
    train(model, optimizer, 1, 3)
    index = [p is model.first.weight for g in optimizer.param_groups for p in g["params"]]
    before = kept["state"][index.index(True)]
    after = optimizer.state_dict()["state"][index.index(True)]
    assert {k for k in before if k.startswith(PREFIX)} == {k for k in after if k.startswith(PREFIX)}


def test_wrapping_a_base_that_has_stepped():
    """A warmed-up base keeps its state; checkpoints hold both parts, also before a first step."""
    model = seeded()
    base = torch.optim.AdamW(model.parameters(), lr=0.01)
    train(model, base, 2)
    momentum = base.state[model.first.weight]["exp_avg"].clone()
    optimizer = MKOR(model, base, **WINDOW)
    assert torch.equal(optimizer.state[model.first.weight]["exp_avg"], momentum)
    state = copy.deepcopy(optimizer.state_dict())
    other = seeded()
    other.load_state_dict(model.state_dict())
    resumed = MKOR(other, torch.optim.AdamW(other.parameters(), lr=0.01), **WINDOW)
    resumed.load_state_dict(state)
    assert train(other, resumed, 3, 2) == train(model, optimizer, 3, 2)


def own(state):
    return sorted({k for e in state.values() for k in e if k.startswith(PREFIX)})


def test_the_bases_own_state_dict_has_the_factors():
    """Schedulers and checkpoints work on either, whether or not somebody looked before."""
    model = seeded()
    optimizer = make(model)
    assert not own(optimizer.base.state_dict()["state"])
    train(model, optimizer, 2)
    found = own(optimizer.base.state_dict()["state"])
    assert found
    assert found == own(optimizer.state_dict()["state"]) == own(optimizer.state)
    train(model, optimizer, 1)
    optimizer.close()
    assert not own(optimizer.base.state_dict()["state"])


@pytest.mark.parametrize("how", ["load", "clear", "replace"])
def test_factors_are_shown_in_a_state_that_was_replaced(how):
    """Looking, changing the base's state by hand, and looking again."""
    model = seeded()
    optimizer = make(model)
    train(model, optimizer, 2)
    whole = own(optimizer.state)
    if how == "load":
        fresh = torch.optim.AdamW(groups_of(model), lr=0.02)
        optimizer.base.load_state_dict(fresh.state_dict())
    elif how == "clear":
        optimizer.state.clear()
    else:
        optimizer.base.state = defaultdict(dict)
    assert own(optimizer.state) == whole == own(optimizer.state_dict()["state"])


def test_counters_of_a_state_dict_follow_its_factors():
    """Its tensors are the optimizer's own, all of them: nothing in it is of another step."""
    model = seeded()
    optimizer = make(model)
    train(model, optimizer, 2)
    state = optimizer.state_dict()["state"]
    train(model, optimizer, 2, 3)
    entry = next(e for e in state.values() if e.get(f"{PREFIX}updates", 0) > 0)
    assert entry[f"{PREFIX}counters"][2] == entry[f"{PREFIX}updates"] == 4
