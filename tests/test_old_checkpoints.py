"""What earlier versions have saved goes on as it did then; see ``make_checkpoints``."""

import copy

import pytest
import torch
from torch.nn.utils import vector_to_parameters

from make_checkpoints import CASES, FILE, MORE, train

SAVED = torch.load(FILE, weights_only=True)


def apart(name, state):
    """How far the weights are from where they were then, relative to the largest of each."""
    case, saved = CASES[name], SAVED[name]
    model, optimizer = case.build()
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(copy.deepcopy(state))
    train(model, optimizer, range(saved["steps"], saved["steps"] + MORE), saved["seed"])
    then, _ = case.build()
    vector_to_parameters(saved["after"], then.parameters())
    distances = [
        (p - q).abs().max() / q.abs().max()
        for p, q in zip(model.parameters(), then.parameters(), strict=True)
    ]
    return max(distances).item(), optimizer


@pytest.mark.parametrize("name", CASES)
def test_goes_on_as_it_did(name):
    """Only names and shapes of the public state are taken for granted, not which entries it has."""
    distance, optimizer = apart(name, SAVED[name]["optimizer"])
    assert optimizer.switched_at == SAVED[name]["switched_at"]
    assert distance <= CASES[name].tolerance


@pytest.mark.parametrize("name", CASES)
def test_the_factors_matter(name):
    """Without them it would end elsewhere, by far more than the tolerance."""
    state = SAVED[name]["optimizer"]
    without = {
        i: {key: value for key, value in entry.items() if not key.startswith("mkor_")}
        for i, entry in state["state"].items()
    }
    distance, _ = apart(name, state | {"state": without})
    assert distance > 10 * CASES[name].tolerance


def test_one_had_switched():
    """The base goes on alone from where a hybrid was saved after its switch."""
    assert SAVED["mkor, switched"]["switched_at"] is not None
