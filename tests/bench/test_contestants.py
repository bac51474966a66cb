"""Contestants as they are written and as they are made."""

import copy
from dataclasses import astuple
from typing import Any

import pytest
import torch
from torch import nn

import mkor
from mkor.bench.cli import UsageError
from mkor.bench.contestants import (
    BASES,
    RATES,
    WRAPPERS,
    Part,
    Rescaling,
    build,
    centre,
    check,
    check_names,
    grid,
    has_switch,
    hidden_matrices,
    options_of,
    parse_contestant,
    parse_contestants,
    report_loss,
)
from mkor.bench.tasks import TASKS

WINDOWS = "rank=8,vectors=2,rows=4,momentum=0.9,damping=0.05"


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
        ("kfac[release]+adamw", "option=value"),
        ("dense-mkor[release,rule=paper]+adamw", "twice"),
        ("dense-mkor[1]+adamw", "option=value"),
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
        ("mkor[fraction=0.2]+adamw", "unknown option of mkor 'fraction'"),
        ("mkor[hybrid=3]+adamw", "unknown option of mkor 'hybrid'"),
        ("mkor-h[fractoin=0.2]+adamw", "Did you mean 'fraction'"),
        ("rescale[rnk=3]+adamw", "Did you mean 'rank'"),
        ("kfac[inverse_evry=3]+adamw", "Did you mean 'inverse_every'"),
        ("eva[rule=paper]+adamw", "unknown option of eva 'rule'"),
        ("adamw[weightdecay=3]", "Did you mean 'weight_decay'"),
    ],
)
def test_unknown_names_come_with_a_suggestion(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_names(parse_contestant(text))


@pytest.mark.parametrize(
    "text",
    [
        "mkor[rank=0]+adamw",
        "mkor[sides=up]+adamw",
        "adamw[betas=3]",
        "rescale[rank=0]+adamw",
        "dense-mkor[relase]+sgd",
        "mkor-h[fraction=2]+sgd",
        "kfac[rescale=step,kl_clip=0.001]+sgd",
    ],
)
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
        assert any(row.preconditioned for row in optimizer.coverage())
    before = [weight.detach().clone() for weight in net.parameters()]
    for _ in range(3):
        loss = net(torch.randn(16, 4)).square().mean()
        loss.backward()
        report_loss(contestant, optimizer, loss)
        optimizer.step()
        optimizer.zero_grad()
    assert all(
        not torch.equal(weight, old) for weight, old in zip(net.parameters(), before, strict=True)
    )


def test_options_reach_the_optimizer() -> None:
    optimizer = build(parse_contestant("adamw[weight_decay=0.5,lr=7]"), model(), 1e-3, 0.01)
    assert optimizer.param_groups[0]["weight_decay"] == 0.5
    assert optimizer.param_groups[0]["lr"] == 1e-3


def made(text: str) -> Any:
    contestant = parse_contestant(text)
    check_names(contestant)
    return build(contestant, model(), 1e-3, 0.01)


@pytest.mark.parametrize("text", ["dense-mkor[release]+sgd", "Dense-MKOR[rule=release]+sgd"])
def test_a_bare_word_is_the_rule(text: str) -> None:
    assert parse_contestant(text).wrapper == Part("dense-mkor", {"rule": "release"})
    optimizer = made(text)
    assert type(optimizer) is mkor.DenseMKOR
    assert optimizer.curvature.rule == "release"


def test_a_bare_word_stands_beside_other_options() -> None:
    optimizer = made("dense-mkor[vectors=2,exact,momentum=0.5]+adamw")
    curvature = optimizer.curvature
    assert (curvature.rule, curvature.vectors, curvature.momentum) == ("exact", 2, 0.5)


def test_options_of_kfac_and_eva_reach_them() -> None:
    kfac = made("kfac[update_every=2,inverse_every=6,pi_correction=true]+adamw")
    assert type(kfac) is mkor.KFAC
    assert kfac.update_every == 2
    assert kfac.curvature.inverse_every == 3
    assert kfac.curvature.pi_correction is True
    eva = made("eva[damping=0.5]+lamb")
    assert type(eva) is mkor.Eva
    assert eva.curvature.damping == 0.5


def test_options_of_the_switch_go_to_it_and_the_others_to_mkor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    switches = []

    class Spy(mkor.MKOR):
        def __init__(self, *args: object, hybrid: object = None, **options: object) -> None:
            switches.append(hybrid)
            super().__init__(*args, hybrid=hybrid, **options)

    monkeypatch.setattr(mkor, "MKOR", Spy)
    contestant = parse_contestant("mkor-h[fraction=0.2,rank=8,vectors=2,every=3]+adamw")
    optimizer = build(contestant, model(), 1e-3, 0.01)
    assert optimizer.curvature == mkor.Window(rank=8, vectors=2)
    assert switches == [mkor.LossRateSwitch(fraction=0.2, every=3)]
    assert has_switch(contestant.wrapper)
    assert not has_switch(parse_contestant("mkor+adamw").wrapper)
    assert not has_switch(None)


def test_all_options_are_told_those_left_alone_included() -> None:
    options = options_of(parse_contestant("mkor-h[rank=8,fraction=0.5]+sgd[nesterov=true]"))
    assert options["base"]["nesterov"] is True
    assert options["base"]["momentum"] == 0.9
    assert options["base"]["dampening"] == 0
    assert (options["wrapper"]["rank"], options["wrapper"]["fraction"]) == (8, 0.5)
    assert options["wrapper"]["vectors"] == 16
    assert options["wrapper"]["every"] == mkor.LossRateSwitch().every
    assert options_of(parse_contestant("kfac+adamw"))["wrapper"]["skip_output"] is True
    assert options_of(parse_contestant("adamw")).keys() == {"base"}


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
    assert centre(parse_contestant("mkor-h+adamw"), "text-lm") == 6e-3


def test_a_centre_may_be_that_of_one_variant(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {"kfac[inverse_every=50]+sgd": 0.7, "kfac+sgd": 0.6, "sgd": 0.5}
    monkeypatch.setitem(RATES, "digits-mlp", rows)
    written = ("kfac[inverse_every=50]+sgd", "kfac[inverse_every=10]+sgd", "eva+sgd", "sgd")
    found = [centre(parse_contestant(text), "digits-mlp") for text in written]
    assert found == [0.7, 0.6, 0.5, 0.5]


def test_every_centre_is_somebodys() -> None:
    assert RATES.keys() <= TASKS.keys()
    for rows in RATES.values():
        for text, rate in rows.items():
            check_names(parse_contestant(text))
            assert rate > 0


def test_muon_refuses_a_model_without_hidden_matrices() -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4, 2))
    with pytest.raises(UsageError, match="of which this model has none"):
        check(parse_contestant("muon"), net)


def test_a_dtype_is_named_by_a_word() -> None:
    """Windows in bfloat16; a word that is no dtype is the optimizer's to refuse."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    (half,) = parse_contestants("mkor[factor_dtype=bfloat16]+adamw")
    optimizer: Any = build(half, model, 0.1, 0.0)
    assert optimizer.curvature.factor_dtype == torch.bfloat16
    (wrong,) = parse_contestants("mkor[factor_dtype=half-a-byte]+adamw")
    with pytest.raises(TypeError, match="factor_dtype"):
        build(wrong, model, 0.1, 0.0)


def net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Unflatten(1, (1, 6)),
        nn.Conv1d(1, 3, 3),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(12, 8, bias=False),
        nn.Tanh(),
        nn.Linear(8, 2),
    )


def gradients(text: str, steps: int) -> list[list[torch.Tensor]]:
    """What a contestant makes of the gradients of a model that never moves, step by step."""
    model = net()
    optimizer = build(parse_contestant(f"{text}+sgd" if text else "sgd"), model, 0.0, 0.0)
    made = []
    for step in range(steps):
        x = torch.randn(16, 6, generator=torch.Generator().manual_seed(step))
        (model(x) * (1.0 + step)).square().mean().backward()
        optimizer.step()
        made.append([weight.grad.clone() for weight in model.parameters()])
        optimizer.zero_grad()
    return made


def layers(all_gradients: list[torch.Tensor]) -> list[torch.Tensor]:
    conv, bias, hidden, *_ = all_gradients
    return [torch.cat([conv.flatten(), bias]), hidden.flatten()]


@pytest.mark.parametrize(
    "more", ["", ",rescale=none", ",rescale=none,sides=left", ",update_every=3"]
)
def test_lengths_of_mkor_and_directions_of_the_raw_gradient(more: str) -> None:
    control = gradients(f"rescale[{WINDOWS}{more}]", 8)
    wrapped = gradients(f"mkor[{WINDOWS}{more}]", 8)
    raw = gradients("", 8)
    turned = 1.0
    for step in range(8):
        for mine, theirs, before in zip(
            layers(control[step]), layers(wrapped[step]), layers(raw[step]), strict=True
        ):
            assert mine.norm().item() == pytest.approx(theirs.norm().item(), rel=1e-4)
            assert torch.cosine_similarity(mine, before, 0) > 0.9999
            turned = min(turned, float(torch.cosine_similarity(theirs, before, 0)))
        for mine, before in zip(control[step][-2:], raw[step][-2:], strict=True):
            assert torch.equal(mine, before)
    assert turned < 0.99


def test_lengths_are_not_just_those_of_the_raw_gradient() -> None:
    control, raw = gradients(f"rescale[{WINDOWS}]", 8), gradients("", 8)
    ratio = layers(control[-1])[1].norm() / layers(raw[-1])[1].norm()
    assert not 0.99 < ratio < 1.01


def test_the_control_has_the_windows_of_mkor() -> None:
    optimizer = build(parse_contestant("rescale[rank=32]+adamw"), net(), 1e-3, 0.0)
    assert optimizer.curvature == Rescaling(rank=32)
    default = build(parse_contestant("mkor+adamw"), net(), 1e-3, 0.0)
    control = build(parse_contestant("rescale+adamw"), net(), 1e-3, 0.0)
    assert astuple(control.curvature) == astuple(default.curvature)


def test_layers_that_do_not_come_through_stay_bitwise() -> None:
    control = Rescaling(rank=2, vectors=1)
    M = torch.randn(3, 2, 5)
    M[1] = 0.0
    M[2, 0, 0] = torch.inf
    before = M.clone()
    prepared = {
        "left": torch.full((3, 2, 2), 0.3),
        "right": torch.full((3, 2, 5), 0.2),
        "usable": torch.ones(3, dtype=torch.bool),
    }
    # A gradient without a finite norm is none of those that may come through.
    ok = control.apply(prepared, M, torch.tensor([False, True, False]))
    assert ok.tolist() == [False, True, False]
    assert torch.equal(M, before)


def test_a_control_can_be_copied() -> None:
    control = Rescaling(rank=3, vectors=1)
    assert copy.deepcopy(control) == control


@pytest.mark.parametrize("text", ["eva[kl_clip=0.001]+adamw", "kfac[rescale=step]+adamw"])
def test_a_given_rescaling_or_clipping_takes_the_others_place(text: str) -> None:
    check(parse_contestant(text), model())
