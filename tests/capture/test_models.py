"""Real models, not written by us, trained by every optimizer of the library.

What each model holds is in ``models``, what should be preconditioned in it in ``model_cases``.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import mkor
from support.contestants import ADVANCING, PREFIX, same, weights
from support.model_cases import ADAPTERS, CASES, Case
from support.models import Mixture, words

pytestmark = pytest.mark.slow
STEPS = 15
SILENT = "no data seen so far"

OPTIMIZERS = {
    "mkor": (mkor.MKOR, {}),
    "dense": (mkor.DenseMKOR, {"update_every": 1}),
    "kfac": (mkor.KFAC, {}),
    "eva": (mkor.Eva, {}),
}


def wrap(
    kind: str, model: nn.Module, parameters=None, lr: float = 0.005, **how
) -> mkor.Preconditioned:
    """One of the optimizers, with its own defaults, over AdamW."""
    make, defaults = OPTIMIZERS[kind]
    base = torch.optim.AdamW(parameters or model.parameters(), lr=lr)
    return make(model, base, **(defaults | how))


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def unchanged(raw: Tensor | None, seen: Tensor | None) -> bool:
    """Bitwise."""
    if raw is None or seen is None:
        return raw is seen
    return same([raw], [seen])


@dataclass
class Run:
    """What happened in ``STEPS`` steps on one batch.

    ``changed`` are the parameters whose gradients the base's step did not see as the backward pass
    left them, ``without`` those that never had a gradient.
    """

    model: nn.Module
    coverage: mkor.Coverage
    losses: list[float]
    changed: set[str]
    without: set[str]


@functools.cache
def run(case: str, kind: str) -> Run:
    """Train; both kinds of test look at the same run."""
    model, loss = CASES[case].build()
    optimizer = wrap(kind, model, lr=CASES[case].lr)
    seen: dict[str, Tensor | None] = {}
    optimizer.base.register_step_pre_hook(lambda *_: seen.update(gradients(model)))
    names = {name for name, _ in model.named_parameters()}
    losses, changed, without = [], set(), names
    for _ in range(STEPS):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        losses.append(value.item())
        raw = gradients(model)
        optimizer.step()
        changed |= {name for name in names if not unchanged(raw[name], seen[name])}
        without = {name for name in without if raw[name] is None}
    coverage = optimizer.coverage()
    optimizer.close()
    return Run(model, coverage, losses, changed, without)


@pytest.fixture(name="case", params=CASES)
def _case(request) -> str:
    return request.param


@pytest.fixture(name="kind", params=OPTIMIZERS)
def _kind(request) -> str:
    return request.param


def share_of_trained(model: nn.Module, coverage: mkor.Coverage) -> float:
    """The share of the entries that are trained at all which is preconditioned, counted here."""
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    covered = [row.parameter for row in coverage if row.preconditioned]
    return sum(trained[name] for name in covered) / sum(trained.values())


def test_loss_falls(case, kind):
    losses = run(case, kind).losses
    print(f"{case}, {kind}: loss {losses[0]:.3f} -> {losses[-1]:.3f}", end=" ")
    assert losses[-1] < CASES[case].falls * losses[0]


def test_coverage(case, kind):
    """Exactly the layers written out, and of them those without data are said to have none."""
    made, wanted = run(case, kind), CASES[case]
    rows = list(made.coverage)
    assert [row.parameter for row in rows] == [name for name, _ in made.model.named_parameters()]
    covered = {row.parameter for row in rows if row.preconditioned}
    assert covered == wanted.covered(made.model)
    silent = {row.parameter for row in rows if row.reason == SILENT}
    assert silent == wanted.silent(made.model) | (covered & made.without)
    assert all(
        row.preconditioned != bool(row.reason) for row in rows if "no data" not in row.reason
    )


def test_gradients_of_the_rest_reach_the_base(case, kind):
    """Bitwise those of the backward pass, while all others are really preconditioned."""
    made, wanted = run(case, kind), CASES[case]
    silent = wanted.silent(made.model) | made.without
    assert made.changed == wanted.covered(made.model) - silent


def test_share(case):
    """Printed with ``-s``."""
    made = run(case, "mkor")
    share = share_of_trained(made.model, made.coverage)
    print(f"{case}: {share:.1%} of what is trained, {made.coverage.share:.1%} of all", end=" ")
    low, high = CASES[case].share
    assert low <= share <= high
    assert made.coverage.share <= share


def test_reasons_of_packed_experts():
    """Where all experts are one parameter of three dimensions, they stay with the base."""
    rows = {row.parameter: row for row in run("mixtral", "mkor").coverage}
    experts = [
        f"model.layers.{i}.mlp.experts.{w}_proj" for i in (0, 1) for w in ("gate_up", "down")
    ]
    for name in experts:
        assert len(rows[name].shape) == 3
        assert rows[name].reason == "MixtralExperts is not a supported kind of layer"
    routers = [f"model.layers.{i}.mlp.gate.weight" for i in (0, 1)]
    assert all("MixtralTopKRouter" in rows[name].reason for name in routers)


# --------------------------------------------------------------------- experts without words


def mixture() -> Mixture:
    torch.manual_seed(0)
    return Mixture(4).double()


def learn(model: Mixture, optimizer, experts: list[int], steps: int = 3, to_none=True) -> None:
    """Words go to ``experts`` in turn."""
    torch.manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad(to_none)
        ids = words()
        model.loss(ids, torch.tensor(experts)[ids % len(experts)]).backward()
        optimizer.step()


def learnt(optimizer, model: nn.Module) -> list[Tensor]:
    """Copies of all factors of some layers, and how often they were updated."""
    return [
        value.clone()
        for p in model.parameters()
        for key, value in sorted(optimizer.state[p].items())
        if key.startswith(PREFIX) and key not in ADVANCING
    ]


def updates(optimizer, model: nn.Module) -> list[int]:
    states = [optimizer.state[p] for p in model.parameters()]
    return [int(state["mkor_updates"]) for state in states if "mkor_updates" in state]


@pytest.mark.parametrize("to_none", [True, False])
def test_expert_without_words_waits(kind, to_none):
    """Weights and factors stay as they are, whether gradients are None or 0, until words come."""
    model = mixture()
    optimizer = wrap(kind, model)
    optimizer.param_groups[0]["weight_decay"] = 0.0
    last, rest = model.experts[3], model.experts[:3]
    before = weights(last)
    learn(model, optimizer, [0, 1, 2], to_none=to_none)
    assert same(before, weights(last))
    assert all(p.grad is None for p in last.parameters())
    assert updates(optimizer, last) == [0] * 2
    assert updates(optimizer, rest) == [3] * 6

    known = learnt(optimizer, rest)
    learn(model, optimizer, [3], to_none=to_none)
    assert same(known, learnt(optimizer, rest))
    gradients_of_rest = [p.grad for p in rest.parameters()]
    assert all(g is None if to_none else not g.any() for g in gradients_of_rest)
    assert updates(optimizer, last) == [3] * 2
    assert not any(torch.equal(a, b) for a, b in zip(before, weights(last), strict=True))
    assert all(p.isfinite().all() for p in model.parameters())


def test_expert_without_words_does_not_disturb_the_others(kind):
    """They train as if it were left to the base, though some factors are kept in one tensor."""
    models = mixture(), mixture()
    for model, skip in zip(models, ([], ["experts.3"]), strict=True):
        learn(model, wrap(kind, model, skip=skip), [0, 1, 2], steps=6)
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(p, q)


# -------------------------------------------------------------------------------- adapters


@pytest.fixture(name="adapter", params=ADAPTERS)
def _adapter(request) -> Case:
    return ADAPTERS[request.param]


@functools.cache
def adapt(kind: str, case: Case, only_trained: bool, steps: int):
    """Adapters trained, with all parameters in the base or only those that are; once each."""
    model, loss = case.build()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = wrap(kind, model, trained if only_trained else None)
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    return model, optimizer


def test_frozen_weights_stay(adapter, kind):
    """They have neither gradients nor factors, and may be in the base or not."""
    start, _ = adapter.build()
    (one, optimizer), (two, _) = (adapt(kind, adapter, only, 3) for only in (False, True))
    assert same(weights(one), weights(two))
    before = dict(start.named_parameters())
    frozen = {name: p for name, p in one.named_parameters() if not p.requires_grad}
    assert frozen
    for name, p in frozen.items():
        assert same([before[name].detach()], [p.detach()])
        assert p.grad is None
        assert optimizer.state.get(p, {}).keys() <= ADVANCING


def test_first_gradient_of_an_adapter_is_zero(adapter, kind):
    """As its other half starts at 0: preconditioned it is 0 still, and it trains from then on."""
    names = {name for name in adapter.covered(adapter.build()[0]) if ".lora_A." in name}
    first, _ = adapt(kind, adapter, True, 1)
    assert all(not first.get_parameter(name).grad.any() for name in names)
    later, _ = adapt(kind, adapter, True, 3)
    assert all(later.get_parameter(name).grad.any() for name in names)
    assert all(p.isfinite().all() for p in later.parameters())
