"""Contestants as they are written and as they are made."""

import pytest
import torch
from torch import nn

import mkor
from mkor.bench.contestants import Part, parse_contestant, parse_contestants
from mkor.bench.errors import UsageError
from mkor.bench.optimizers import (
    BASES,
    WRAPPERS,
    build,
    centre,
    check,
    check_names,
    grid,
    hidden_matrices,
)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))


def test_a_comma_in_brackets_does_not_separate() -> None:
    first, second = parse_contestants("mkor[sides=left,vectors=8,rescale=none]+muon, adamw")
    assert first.label == "mkor[sides=left,vectors=8,rescale=none]+muon"
    assert first.wrapper == Part("mkor", {"sides": "left", "vectors": 8, "rescale": None})
    assert first.base == Part("muon")
    assert second.label == "adamw"
    assert second.wrapper is None


def test_options_of_a_base_and_their_types() -> None:
    base = parse_contestant("AdamW[weight_decay=1e-2,betas=(0.9,0.95),amsgrad=true,eps=1e+0]").base
    assert base.name == "adamw"
    assert base.options == {"weight_decay": 0.01, "betas": (0.9, 0.95), "amsgrad": True, "eps": 1.0}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mkor[rank=3+adamw", "brackets"),
        ("mkor]rank=3[+adamw", "brackets"),
        ("mkor[rank]+adamw", "option=value"),
        ("mkor[rank=]+adamw", "option=value"),
        ("mkor[rank=3,rank=4]+adamw", "twice"),
        ("mkor[rank=3]x+adamw", "name"),
        ("mkor++adamw", "cannot read"),
        ("a+b+c", "3 parts"),
        ("adamw,,sgd", "cannot read"),
        ("adamw,sgd,adamw", "appears twice"),
    ],
)
def test_what_cannot_be_read_is_said(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_contestants(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("admw", "unknown contestant 'admw'. Did you mean 'adamw'.*sgd, adamw.*mkor\\+adamw"),
        ("mkr+adamw", "unknown wrapper 'mkr'. Did you mean 'mkor'"),
        ("mkor+admw", "Did you mean 'adamw'"),
        ("mkor", "write mkor\\+adamw"),
        ("mkor[rnk=3]+adamw", "unknown option of mkor 'rnk'. Did you mean 'rank'"),
        ("adamw[weightdecay=3]", "Did you mean 'weight_decay'"),
    ],
)
def test_unknown_names_come_with_a_suggestion(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_names(parse_contestant(text))


@pytest.mark.parametrize("text", ["mkor[rank=0]+adamw", "mkor[sides=up]+adamw", "adamw[betas=3]"])
def test_wrong_values_are_found_before_anything_runs(text: str) -> None:
    with pytest.raises(UsageError, match="cannot be made"):
        check(parse_contestant(text), model())


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("wrapper", [None, *WRAPPERS])
def test_every_row_of_the_tables_trains(base: str, wrapper: str | None) -> None:
    net = model()
    contestant = parse_contestant(f"{wrapper}+{base}" if wrapper else base)
    check_names(contestant)
    optimizer = build(contestant, net, 1e-3, 0.01)
    if wrapper:
        assert isinstance(optimizer, getattr(mkor, WRAPPERS[wrapper].name))
    before = [weight.detach().clone() for weight in net.parameters()]
    for _ in range(3):
        net(torch.randn(16, 4)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(
        not torch.equal(weight, old) for weight, old in zip(net.parameters(), before, strict=True)
    )


def test_options_reach_the_optimizer() -> None:
    optimizer = build(parse_contestant("adamw[weight_decay=0.5,lr=7]"), model(), 1e-3, 0.01)
    assert optimizer.param_groups[0]["weight_decay"] == 0.5
    assert optimizer.param_groups[0]["lr"] == 1e-3


def test_muon_gets_the_hidden_matrices_and_adamw_the_rest() -> None:
    net = model()
    assert [weight.shape for weight in hidden_matrices(net)] == [(8, 4), (6, 8)]
    optimizer = build(parse_contestant("muon[rest=0.5]"), net, 1e-2, 0.0)
    muon, rest = optimizer.param_groups
    assert len(muon["params"]) == 2
    assert len(rest["params"]) == 4
    assert (muon["lr"], rest["lr"]) == (1e-2, 5e-3)


def test_the_grid_goes_outwards_from_its_centre() -> None:
    assert grid(0.1, 1) == [0.1]
    assert grid(0.1, 5) == [0.1, 0.2, 0.05, 0.4, 0.025]


def test_a_wrapper_searches_where_its_base_does_unless_the_table_knows_better() -> None:
    assert centre(parse_contestant("adamw[lr=0.5]"), "text-lm") == 0.5
    for base in BASES:
        wrapped = centre(parse_contestant(f"mkor+{base}"), "another-task")
        assert wrapped == centre(parse_contestant(base), "another-task")
    assert centre(parse_contestant("mkor+adamw"), "text-lm") == 6e-3
    assert centre(parse_contestant("adamw"), "text-lm") == 3e-3


def test_muon_refuses_a_model_without_hidden_matrices() -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4, 2))
    with pytest.raises(UsageError, match="of which this model has none"):
        check(parse_contestant("muon"), net)
