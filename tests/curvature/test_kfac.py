"""KFAC against the naive inverse of full covariances, and where other factors are exactly it."""

import copy
import itertools

import pytest
import torch
from torch import nn

from mkor import KFAC, MKOR, DenseMKOR, Eva
from oracles import dense as oracles
from oracles.dense import KFACLayer
from support.cases import UNGROUPED, convolution
from support.following import backward, entry, error, follow, images, mlp, net, points
from support.recording import Recorder, gradients

pytestmark = pytest.mark.usefixtures("device")

F64 = torch.float64
SIDES = ("left", "right")


def wrapped(model, kind=KFAC, *, lr=0.01, **how):
    """Over plain SGD, with every layer and without any scaling unless told."""
    how = {"skip_output": False} | ({"kl_clip": None} if kind in (KFAC, Eva) else {}) | how
    return kind(model, torch.optim.SGD(model.parameters(), lr=lr), **how)


def run(model, batches, tolerance=1e-8, *, scale=1.0, turned=True, **how):
    twin_how = {"kind": KFACLayer, **how}
    every = twin_how.pop("inverse_every", 1)
    twin_how["inverse_updates"] = every // how.get("update_every", 1)
    twin_how |= {"scale": scale, "turned": turned}
    return follow(model, batches, lambda m: wrapped(m, **how), tolerance, **twin_how)


def train(model, optimizer, batches, scale=1.0):
    for micro in batches:
        optimizer.zero_grad()
        backward(model, micro, scale)
        optimizer.step()


# ------------------------------------------------------------------------------- whole runs


@pytest.mark.slow
def test_two_hundred_updates():
    """Convolution, biases, a layer used twice: the exact damped inverse in every step."""
    model = net()
    optimizer, twin = run(model, images(200), damping=0.01)
    for name, (layer,) in twin.layers.items():
        for side, inverse in zip(SIDES, (layer.left(), layer.right()), strict=True):
            stored = entry(optimizer, model.get_submodule(name), f"{side}_inverse")
            assert error(stored, inverse) < 1e-8


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"damping": 1.0},
        {"momentum": 0.3},
        {"pi_correction": True},
        {"pi_correction": True, "inverse_every": 4},
        {"inverse_every": 3},
        {"update_every": 2, "inverse_every": 2},
        {"update_every": 2, "inverse_every": 6},
        {"sides": "left"},
        {"sides": "right", "inverse_every": 2},
        {"rescale": "step"},
        {"rescale": "running", "pi_correction": True},
    ],
    ids=str,
)
def test_options(how):
    run(mlp(), points(13), **({"damping": 0.02} | how))


@pytest.mark.parametrize("pi_correction", [False, True])
def test_accumulation(pi_correction):
    """Rows of all micro-batches count alike, however unequal."""
    batches = points(4, (3, 5)) + points(3, (1, 1, 7)) + points(2, (2,))
    run(mlp(), batches, pi_correction=pi_correction, damping=0.05)


@pytest.mark.parametrize("name", UNGROUPED)
def test_convolutions(name):
    """All patches of each kind of convolution, padding included."""
    layer, shapes = convolution(name)
    batches = [[shapes(3)], [shapes(1), shapes(2)], [shapes(1)]]
    run(nn.Sequential(layer), batches, damping=0.1)


@pytest.mark.parametrize("scale", [1e-12, 1e12])
@pytest.mark.parametrize("inputs", [1e-6, 1.0, 1e6])
def test_scales(inputs, scale):
    """Neither small nor large inputs and gradients make it anything but the damped inverse."""
    layer = nn.Linear(6, 4, bias=False, dtype=F64)
    batches = [[inputs * x for x in micro] for micro in points(5)]
    run(nn.Sequential(layer), batches, scale=scale, lr=0.0, damping=0.02, turned=False)


def test_without_bias():
    run(mlp(bias=False), points(20), damping=0.02)


def test_sequences_and_single_samples():
    """Rows of sequences all count; an input without a batch dimension is one row."""
    layer = nn.Linear(6, 4, dtype=F64)
    run(nn.Sequential(layer), [[torch.randn(3, 5, 6, dtype=F64)] for _ in range(6)], damping=0.05)
    model = nn.Linear(6, 4, dtype=F64)
    optimizer, recorder = wrapped(model, damping=0.05), Recorder(nn.Sequential(model))
    model(torch.randn(6, dtype=F64)).square().sum().backward()
    a, g = oracles.rows_of(recorder.take()["0"][0], bias=True)
    raw = gradients(nn.Sequential(model))["0"][0]
    optimizer.step()
    L, R = oracles.damped_inverses(oracles.covariance(g), oracles.covariance(a), 0.05, False)
    assert len(a) == 1
    assert error(gradients(nn.Sequential(model))["0"][0], L @ raw @ R) < 1e-10


def test_layer_unused_in_some_steps():
    """Its factors stay; a layer first seen between two inversions waits for the next."""

    class Either(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(6, 5, dtype=F64)
            self.second = nn.Linear(6, 5, dtype=F64)
            self.turn = 0

        def forward(self, x):
            self.turn += 1
            return (self.first if self.turn % 4 != 2 else self.second)(x)

    run(Either(), points(14), damping=0.05, inverse_every=3)


# -------------------------------------------------------------------------- exactness elsewhere


def test_covariance_in_the_state():
    """After one update it is ``1 - gamma`` times that of the batch, with the ones of the bias."""
    model = nn.Sequential(nn.Linear(6, 4, dtype=F64))
    optimizer, recorder = wrapped(model, momentum=0.9), Recorder(model)
    backward(model, points(1)[0])
    a, g = oracles.rows_of(recorder.take()["0"][0], bias=True)
    optimizer.step()
    for side, rows in (("left", g), ("right", a)):
        stored = entry(optimizer, model[0], f"{side}_covariance")
        assert error(stored, 0.1 * rows.T @ rows / len(rows)) < 1e-12


def test_state_is_symmetric():
    model = net()
    optimizer = wrapped(model)
    train(model, optimizer, images(10))
    for m, side in itertools.product((model.conv, model.first, model.again), SIDES):
        for key in ("covariance", "inverse"):
            S = entry(optimizer, m, f"{side}_{key}")
            assert error(S, S.mT) < 1e-12


def one_sample(kind, **how):
    """A run on single samples, whose mean is the sample itself."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 4, dtype=F64))
    optimizer = wrapped(model, kind, lr=0.0, **how)
    train(model, optimizer, points(5, (1,)))
    return model, optimizer


@pytest.mark.parametrize("side", SIDES)
def test_one_sample_dense(side):
    """Rank-1 statistics are the covariance: ``H^-1 = gamma^t I + A`` of the exact rule."""
    gamma, t = 0.9, 5
    model, dense = one_sample(DenseMKOR, rule="exact", momentum=gamma, epsilon=None, update_every=1)
    other, kfac = one_sample(KFAC, momentum=gamma)
    covariance = entry(kfac, other[0], f"{side}_covariance")
    inverse = entry(dense, model[0], f"{side}_inverse")
    expected = covariance + gamma**t * torch.eye(len(covariance), dtype=F64)
    assert error(torch.linalg.inv(inverse), expected) < 1e-10


def test_one_sample_eva():
    """In the first step Eva's factor is the Kronecker product of KFAC's covariances."""
    torch.manual_seed(4)
    model, other = mlp(), mlp()
    other.load_state_dict(model.state_dict())
    eva, kfac = wrapped(model, Eva, damping=0.3), wrapped(other, KFAC, momentum=0.9)
    (micro,) = points(1, (1,))
    for m in (model, other):
        torch.manual_seed(5)
        backward(m, micro)
    raw = gradients(model)
    eva.step()
    kfac.step()
    for name, P in gradients(model).items():
        L, R = (
            entry(kfac, other.get_submodule(name), f"{side}_covariance") / (1 - 0.9)
            for side in SIDES
        )
        assert error(P[0], oracles.kronecker_solve(raw[name][0], L, R, 0.3)) < 1e-10


@pytest.mark.parametrize("side", SIDES)
def test_window_of_every_row_is_the_covariance(side):
    """``vectors`` as many as rows: one update's window inverts ``A + lambda I``, as KFAC does."""
    n, damping = 8, 0.05
    torch.manual_seed(6)
    model, other = (nn.Sequential(nn.Linear(6, 4, dtype=F64)) for _ in range(2))
    other.load_state_dict(model.state_dict())
    recorder = Recorder(model)
    how = {"rank": n, "vectors": n, "rows": None, "damping": damping, "rescale": None}
    window = wrapped(model, MKOR, sides=side, **how)
    (micro,) = points(1, (n,))
    torch.manual_seed(7)
    backward(model, micro)
    a, g = oracles.rows_of(recorder.take()["0"][0], bias=True)
    lam = damping * (g if side == "left" else a).square().mean().item()
    window.step()
    kfac = wrapped(other, KFAC, sides=side, damping=lam)
    torch.manual_seed(7)
    backward(other, micro)
    kfac.step()
    expected = lam * gradients(other)["0"][0]  # the window drops the constant 1 / lambda
    assert error(gradients(model)["0"][0], expected) < 1e-10


# ------------------------------------------------------------------------ failed factorisations


def spoiled(value, how="fill"):
    """A trained pair whose first layer's left covariance can no longer be factorised."""
    torch.manual_seed(8)
    model = mlp()
    optimizer = wrapped(model, lr=0.001, damping=0.01, momentum=0.5)
    train(model, optimizer, points(4))
    covariance = entry(optimizer, model[0], "left_covariance")
    if how == "fill":
        covariance.fill_(value)
    else:
        covariance.diagonal().fill_(value)
    return model, optimizer


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("value", [-5.0, float("nan"), float("inf"), float("-inf")])
def test_failed_factorisation_keeps_the_old_inverse(value, side):
    """Nothing is raised; both old inverses stay, other layers go on, and the damping grows."""
    model, optimizer = spoiled(1.0)
    train(model, optimizer, points(3))
    covariance = entry(optimizer, model[0], f"{side}_covariance")
    covariance.fill_(value)
    layers = (model[0], model[2])
    keys = [f"{side}_inverse" for side in SIDES]
    before = [[entry(optimizer, m, key).clone() for key in keys] for m in layers]
    start = entry(optimizer, model[0], "damping_factor").clone()
    raw_before = optimizer.diagnostics()["mkor/raw_gradients"]
    train(model, optimizer, points(2))
    after = [[entry(optimizer, m, key) for key in keys] for m in layers]
    assert all(torch.equal(p, q) for p, q in zip(before[0], after[0], strict=True))
    assert not any(torch.equal(p, q) for p, q in zip(before[1], after[1], strict=True))
    assert entry(optimizer, model[0], "damping_factor") == 100 * start
    assert entry(optimizer, model[2], "damping_factor") == 1
    assert all(p.isfinite().all() for p in model.parameters())
    assert optimizer.diagnostics()["mkor/raw_gradients"] == raw_before


def test_damping_comes_back():
    """Once the damping is large enough the inverse is renewed with it; then it shrinks again."""
    model, optimizer = spoiled(-5.0, "diagonal")
    seen = []
    for _ in range(24):
        inverse = entry(optimizer, model[0], "left_inverse").clone()
        factor = entry(optimizer, model[0], "damping_factor").item()
        train(model, optimizer, points(1))
        changed = not torch.equal(inverse, entry(optimizer, model[0], "left_inverse"))
        new = entry(optimizer, model[0], "damping_factor").item()
        assert new == (max(1.0, factor / 2) if changed else 10 * factor)
        seen.append(new)
    assert max(seen) >= 100
    assert seen[-1] == 1.0


def test_grown_damping_is_used():
    """The inverse after a failure is that of the covariance with the multiplied damping."""
    model = nn.Sequential(nn.Linear(6, 4, dtype=F64))
    optimizer = wrapped(model, lr=0.0, damping=0.01, momentum=0.5)
    train(model, optimizer, points(3))
    entry(optimizer, model[0], "damping_factor").fill_(100.0)
    train(model, optimizer, points(1))
    S = entry(optimizer, model[0], "left_covariance") / (1 - 0.5**4)
    expected = torch.linalg.inv(S + 0.01 * 100 * torch.eye(4, dtype=F64))
    assert error(entry(optimizer, model[0], "left_inverse"), expected) < 1e-10
    assert entry(optimizer, model[0], "damping_factor") == 50


@pytest.mark.slow
def test_many_failures_can_be_survived():
    """However often it failed, a good covariance later gives a good inverse again."""
    model, optimizer = spoiled(float("nan"))
    train(model, optimizer, points(400))
    for side in SIDES:
        covariance = entry(optimizer, model[0], f"{side}_covariance")
        covariance.copy_(torch.eye(len(covariance), dtype=F64))
    old = entry(optimizer, model[0], "left_inverse").clone()
    train(model, optimizer, points(5))
    assert entry(optimizer, model[0], "damping_factor").isfinite()
    new = entry(optimizer, model[0], "left_inverse")
    assert new.isfinite().all()
    assert not torch.equal(old, new)


def test_first_factorisation_fails():
    """Inputs so large and so alike that rounding swallows the damping: nothing is raised.

    The pivot after the first is exactly 0. The identity stays, and gradients are autograd's own.
    """
    model = nn.Sequential(nn.Linear(3, 2, bias=False))
    optimizer = wrapped(model, lr=0.0)
    for failures in range(1, 4):
        optimizer.zero_grad()
        model(torch.full((4, 3), 4096.0)).sum().backward()
        raw = gradients(model)["0"]
        optimizer.step()
        assert torch.equal(raw, gradients(model)["0"])
        assert entry(optimizer, model[0], "damping_factor") == 10**failures


# ------------------------------------------------------------------- checkpoints without inverses


class Unused(nn.Sequential):
    """A layer that never sees a row."""

    def __init__(self):
        super().__init__(*mlp())
        self.unused = nn.Linear(3, 3, dtype=F64)

    def forward(self, x):
        for layer in list(self)[:-1]:
            x = layer(x)
        return x


@pytest.mark.parametrize("sides", ["both", "left", "right"])
def test_inverses_that_a_checkpoint_lacks_come_back(sides):
    """Where processes share them out, one side may be zeros; others are kept as they are."""
    model = Unused()
    optimizer = wrapped(model, sides=sides, damping=0.1)
    train(model, optimizer, points(3))
    here = SIDES if sides == "both" else (sides,)
    keys = [(m, f"{side}_inverse") for m in (model[0], model[2], model[4]) for side in here]
    expected = [entry(optimizer, *key).clone() for key in keys]
    saved = copy.deepcopy(optimizer.state_dict())
    numbers = {p: i for i, p in enumerate(model.parameters())}
    own = [saved["state"][numbers[m.weight]] for m in (model[0], model[2], model[4])]
    for state, side in zip(own, (here * 2)[:2], strict=False):
        state[f"mkor_{side}_inverse"].zero_()
    own[2][f"mkor_{here[0]}_inverse"] *= 1.5
    expected[2 * len(here)] *= 1.5
    optimizer.load_state_dict(saved)
    for key, inverse in zip(keys, expected, strict=True):
        assert torch.equal(entry(optimizer, *key), inverse)
    assert not entry(optimizer, model.unused, "inverted")


def test_an_inverse_that_does_not_come_back_leaves_gradients_raw():
    """They are not multiplied by the zeros; other layers go on."""
    model = mlp()
    optimizer = wrapped(model, lr=0.0, inverse_every=100)
    train(model, optimizer, points(2))
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["mkor_left_inverse"].zero_()
    saved["state"][0]["mkor_right_covariance"].fill_(float("nan"))
    optimizer.load_state_dict(saved)
    inverted = [bool(entry(optimizer, m, "inverted")) for m in (model[0], model[2])]
    assert inverted == [False, True]
    optimizer.zero_grad()
    backward(model, points(1)[0])
    raw = gradients(model)
    optimizer.step()
    new = gradients(model)
    assert torch.equal(raw["0"], new["0"])
    assert not torch.equal(raw["2"], new["2"])


# -------------------------------------------------------------------------------- arguments


def test_settings_in_turn():
    """``inverse_every`` counts steps and is a multiple of ``update_every``."""
    with pytest.raises(ValueError, match=r"inverse_every.*multiple of update_every"):
        wrapped(mlp(), update_every=4, inverse_every=6)
    with pytest.raises(ValueError, match=r"inverse_every.*multiple of update_every"):
        wrapped(mlp(), update_every=4, inverse_every=2)
    assert wrapped(mlp(), update_every=4, inverse_every=8).curvature.inverse_every == 2
    assert wrapped(mlp(), update_every=4).curvature.inverse_every == 1


BAD = [
    ({"momentum": 1.0}, ValueError, "momentum.*between 0 and 1.*1.0"),
    ({"momentum": "0.9"}, TypeError, "momentum.*number.*'0.9'"),
    ({"damping": 0.0}, ValueError, "damping.*positive.*0.0"),
    ({"damping": float("nan")}, ValueError, "damping.*positive.*nan"),
    ({"damping": None}, TypeError, "damping.*number.*None"),
    ({"update_every": 0}, ValueError, "update_every.*at least 1.*0"),
    ({"inverse_every": 0}, ValueError, "inverse_every.*at least 1.*0"),
    ({"inverse_every": 2.0}, TypeError, "inverse_every.*whole number.*2.0"),
    ({"pi_correction": 1}, TypeError, "pi_correction.*True or False.*1"),
    ({"grad_worker_fraction": 0.0}, ValueError, "grad_worker_fraction.*positive.*0.0"),
    ({"grad_worker_fraction": 1.5}, ValueError, "grad_worker_fraction.*at most 1.*1.5"),
    ({"grad_worker_fraction": "1"}, TypeError, "grad_worker_fraction.*number.*'1'"),
    ({"pi_correction": True, "sides": "left"}, ValueError, "pi.correction.*sides='both'"),
    ({"vectors": 4}, TypeError, "vectors"),
    ({"rows": 4}, TypeError, "rows"),
]


@pytest.mark.parametrize(("options", "kind", "message"), BAD, ids=str)
def test_bad_arguments(options, kind, message):
    """Refused at construction, with what would be right, and without a hook left behind."""
    model = mlp()
    with pytest.raises(kind, match=message):
        wrapped(model, **options)
    assert not any(m._forward_hooks for m in model)
