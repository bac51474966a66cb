"""KFAC against the naive inverse of full covariances, and where other factors are exactly it."""

import itertools

import pytest
import torch
from torch import nn

import oracles_dense as oracles
from cases import UNGROUPED, convolution
from following import backward, entry, error, follow, images, mlp, net, points
from mkor import KFAC, MKOR, Covariance, DenseMKOR, Eva
from mkor.curvature.contract import BatchShape, Statistics
from oracles_dense import KFACLayer
from recording import Recorder, gradients

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


def test_more_images_than_are_unfolded_at_once(monkeypatch):
    """Patches are made a few images at a time; the sum does not depend on how many."""
    from mkor.layers import convolution

    monkeypatch.setattr(convolution, "SLAB", 1000)
    run(net(), images(5, (7,)), damping=0.1)


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


def test_dropped_update():
    """A batch with NaN changes no covariance, no inverse and no damping."""
    model = mlp()
    optimizer = wrapped(model, nonfinite="skip")
    train(model, optimizer, points(3))
    keys = [f"{side}_{key}" for side in SIDES for key in ("covariance", "inverse")]
    keys += ["damping_factor", "updates"]
    before = [entry(optimizer, model[0], key).clone() for key in keys]
    ((x,),) = points(1)
    x[1, 2] = float("nan")
    train(model, optimizer, [[x]])
    after = [entry(optimizer, model[0], key) for key in keys]
    assert all(torch.equal(p, q) for p, q in zip(before, after, strict=True))


# ----------------------------------------------------------------- inverses apart from averages

APART = Covariance(momentum=0.5, damping=0.1)


def averaged(layers=3, sides=SIDES):
    """A state with averages of one update each, and no inverses yet."""
    shape = BatchShape(layers, 4, 5, True, sides, F64, torch.device("cpu"))
    state = APART.init(shape)
    state["updates"] += 1
    for side in sides:
        rows = torch.randn(layers, 9, shape.full_width(side), dtype=F64)
        state[f"{side}_covariance"].copy_(0.5 * rows.mT @ rows / 9)
    return state


def inverted(state, side):
    S = 2 * state[f"{side}_covariance"]
    return torch.linalg.inv(S + 0.1 * torch.eye(S.shape[-1], dtype=F64))


def test_update_averages_and_no_more():
    """Inverses wait for ``renew``, though they are due with every update."""
    state = averaged()
    before = {key: tensor.clone() for key, tensor in state.items()}
    vectors = {side: torch.randn(3, 1, 4, dtype=F64) for side in SIDES}
    squares, filled = dict.fromkeys(SIDES, torch.ones(3, dtype=F64)), torch.ones(3, 1) > 0
    accept, new = (
        torch.tensor([True, False, True]),
        {"left": torch.eye(4, dtype=F64).repeat(3, 1, 1)},
    )
    APART.update(state, Statistics(vectors, squares, filled, accept, 0, covariance=new))
    assert APART.due(0)
    changed = {key for key, tensor in state.items() if not torch.equal(tensor, before[key])}
    assert changed == {"left_covariance", "updates"}
    expected = 0.5 * before["left_covariance"] + 0.5 * new["left"]
    torch.testing.assert_close(state["left_covariance"][::2], expected[::2])
    assert torch.equal(state["left_covariance"][1], before["left_covariance"][1])


def test_renew_where_it_is_asked():
    """Other layers keep what they have, and are not inverted yet."""
    state = averaged()
    APART.renew(state, torch.tensor([True, False, True]))
    assert state["inverted"].tolist() == [True, False, True]
    for side in SIDES:
        H, expected = state[f"{side}_inverse"], inverted(state, side)
        assert error(H[0], expected[0]) < 1e-12
        assert error(H[2], expected[2]) < 1e-12
        assert torch.equal(H[1], torch.eye(len(H[1]), dtype=F64))


def test_what_renew_changes_is_shared():
    """All that it changes is named, and nothing else: the averages are everybody's own."""
    state = averaged()
    state["damping_factor"] += 3
    before = {key: tensor.clone() for key, tensor in state.items()}
    APART.renew(state, torch.tensor([True] * 3))
    inverses, notes = APART.shared(state)
    changed = {key for key, tensor in state.items() if not torch.equal(tensor, before[key])}
    named = [key for tensor in (*inverses, *notes) for key in state if state[key] is tensor]
    assert changed == set(named) >= {"left_inverse", "right_inverse"}
    assert all(tensor.dim() == 3 for tensor in inverses)
    assert all(tensor.dim() == 1 for tensor in notes)


@pytest.mark.parametrize("sides", [SIDES, ("left",), ("right",)])
def test_without_inverses(sides):
    """Where others use them: the same keys and shapes, and next to no memory."""
    state = averaged(sides=sides)
    less = APART.without_inverses(state)
    assert {k: t.shape for k, t in less.items()} == {k: t.shape for k, t in state.items()}
    for key, tensor in less.items():
        if key.endswith("_inverse"):
            assert tensor.untyped_storage().nbytes() == 8
            assert not tensor.any()
        else:
            assert tensor is state[key]


@pytest.mark.parametrize("sides", [SIDES, ("left",), ("right",)])
def test_recover_what_others_held(sides):
    """From averages alone; a layer with an inverse keeps it, one that never had any gets none."""
    state = averaged(4, sides)
    state["damping_factor"][1] = 4
    APART.renew(state, torch.tensor([True, True, True, False]))
    state["damping_factor"][1] = 4
    expected = {key: tensor.clone() for key, tensor in state.items()}
    for layer, side in zip((0, 1), (sides * 2)[:2], strict=True):
        # A checkpoint may have one side from a process that held it, and not the other.
        state[f"{side}_inverse"][layer] = 0
    for side in sides:
        for d in (expected, state):
            d[f"{side}_inverse"][2] *= 1.5
            d[f"{side}_inverse"][3] *= 0
    APART.recover(state)
    for key, tensor in expected.items():
        assert torch.equal(state[key], tensor), key
    APART.recover(state)
    assert all(torch.equal(state[key], tensor) for key, tensor in expected.items())


def test_recovery_that_fails():
    """Gradients then stay raw until a factorisation succeeds: they are not multiplied by 0."""
    state = averaged()
    APART.renew(state, torch.tensor([True] * 3))
    state["left_inverse"][1] = 0
    state["right_covariance"][1] = float("nan")
    APART.recover(state)
    assert state["inverted"].tolist() == [True, False, True]
    assert state["damping_factor"].tolist() == [1, 1, 1]
    shape = BatchShape(3, 4, 5, True, SIDES, F64, torch.device("cpu"))
    W, b, ok = torch.randn(3, 4, 5, dtype=F64), torch.randn(3, 4, dtype=F64), torch.ones(3) > 0
    raw = W[1].clone()
    done = APART.apply(APART.prepare(state, shape), W, b, ok)
    assert done.tolist() == [True, False, True]
    assert torch.equal(W[1], raw)


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
