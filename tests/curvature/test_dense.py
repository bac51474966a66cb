"""The paper's dense factors: three rules, the stabilizer, stored dtypes; against the oracle."""

import inspect
import itertools

import pytest
import torch
from torch import nn

from mkor import MKOR, DenseMKOR
from oracles import dense as oracles
from oracles.dense import DenseLayer
from support.cases import FEW, convolution
from support.following import backward, entry, error, follow, images, mlp, net, points
from support.recording import Recorder

pytestmark = pytest.mark.usefixtures("device")

F64, F32 = torch.float64, torch.float32
SIDES = ("left", "right")
RULES = ("exact", "paper", "release")


def wrapper(lr=0.01, **how):
    """DenseMKOR over plain SGD, updated in every step and leaving no layer out."""
    how = {"update_every": 1, "skip_output": False} | how
    return lambda model: DenseMKOR(model, torch.optim.SGD(model.parameters(), lr=lr), **how)


def run(model, batches, tolerance=1e-8, *, scale=1.0, restart=None, **how):
    """The optimizer and its twin over the same batches, and their factors at the end."""
    twin_how = {"kind": DenseLayer, "rule": "paper", "rescale": "step"} | how
    optimizer, twin = follow(
        model, batches, wrapper(**how), tolerance, scale=scale, restart=restart, **twin_how
    )
    for name, (layer,) in twin.layers.items():
        for side in SIDES if layer.sides == "both" else (layer.sides,):
            H = layer.inverse[side]
            stored = entry(optimizer, model.get_submodule(name), f"{side}_inverse")
            assert error(stored, H) < tolerance, f"{name}, {side}"
            assert torch.equal(stored, stored.mT)
    return optimizer, twin


def stabilized(twin, side):
    return sum(layer.stabilizations[side] for (layer,) in twin.layers.values())


# ------------------------------------------------------------------------------- whole runs


LONG = [
    # Every two of these choices meet.
    ("exact", 10.0, 3, {}),
    ("exact", None, 1, {"steps": 60}),
    ("release", 10.0, 1, {"steps": 60}),
    ("release", None, 3, {}),
    # The paper's rule multiplies errors by up to 1.2 in an update near the stabilizer's limit: at
    # momentum 0.95 a last digit in an input changes the eighth of the factor after 200 updates.
    ("paper", 3.0, 1, {"momentum": 0.99}),
    ("paper", 3.0, 3, {"momentum": 0.99}),
    ("paper", None, 1, {}),  # three would overflow float64
]


@pytest.mark.slow
@pytest.mark.parametrize(("rule", "epsilon", "vectors", "how"), LONG)
def test_two_hundred_updates(rule, epsilon, vectors, how):
    """Convolution, biases, a layer used twice: every gradient of 200 steps, or of 60."""
    steps = (how := dict(how)).pop("steps", 200)
    _, twin = run(net(), images(steps), rule=rule, epsilon=epsilon, vectors=vectors, **how)
    acted = stabilized(twin, "left") + stabilized(twin, "right")
    assert (acted > 0) == (epsilon is not None and rule != "release")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("epsilon", "vectors", "zeta", "steps"),
    [(10.0, 1, 0.4, 200), (10.0, 3, 0.4, 200), (None, 3, 0.4, 60)],
)
def test_paper_rule_update_by_update(epsilon, vectors, zeta, steps):
    """Every update begins with the factors that are stored: errors have nothing to grow from."""
    model = net()

    def restart(optimizer, twin):
        for name, (layer,) in twin.layers.items():
            for side in layer.inverse:
                stored = entry(optimizer, model.get_submodule(name), f"{side}_inverse")
                layer.inverse[side] = stored.clone()

    how = {"epsilon": epsilon, "vectors": vectors, "zeta": zeta}
    _, twin = run(model, images(steps), 1e-11, restart=restart, **how)
    assert (stabilized(twin, "left") + stabilized(twin, "right") > 0) == (epsilon is not None)


@pytest.mark.slow
def test_window_over_two_hundred_updates():
    """The same for the window, at a tighter bar."""
    how = {"rank": 12, "vectors": 3, "momentum": 0.95, "damping": 0.02, "rescale": "running"}
    options = how | {"rows": None, "skip_output": False}
    follow(
        net(),
        images(200),
        lambda model: MKOR(model, torch.optim.SGD(model.parameters(), lr=0.01), **options),
        1e-10,
        **how,
    )


OF_THE_RULES = [{"momentum": 0.5}, {"epsilon": 1.05, "zeta": 0.9}]
OF_ALL = [
    {"rescale": None},
    {"rescale": "running"},
    {"sides": "left"},
    {"sides": "right"},
    {"update_every": 3},
    {"vectors": 8},
]
"""What no rule has a part in: they take these in turn."""


@pytest.mark.parametrize(
    ("rule", "how"),
    [*itertools.product(RULES, OF_THE_RULES), *zip(itertools.cycle(RULES), OF_ALL)],
    ids=str,
)
def test_options(rule, how):
    run(mlp(), points(12), rule=rule, **({"vectors": 2} | how))


@pytest.mark.parametrize("rule", RULES)
def test_accumulation(rule):
    """Unequal micro-batches, some with fewer samples than vectors."""
    batches = points(6, (3, 5)) + points(3, (1, 1, 4)) + points(3, (2,))
    run(mlp(), batches, rule=rule, vectors=3)


@pytest.mark.parametrize("name", FEW)
def test_convolutions(name):
    layer, shapes = convolution(name)
    batches = [[shapes(4)], [shapes(2), shapes(3)], [shapes(1)]]
    run(nn.Sequential(layer), batches, vectors=2, rule="exact")


def test_without_bias():
    run(mlp(bias=False), points(30), vectors=2)


# ---------------------------------------------------------------------------- known answers


def constant_input(rule, *, dtype=F64, steps=50, **how):
    """The right inverse of a layer whose input is one unit vector all the time."""
    v = torch.tensor([0.6, -0.48, 0.64], dtype=dtype)
    model = nn.Linear(3, 2, bias=False, dtype=dtype)
    wrap = wrapper(lr=0.0, rule=rule, sides="right", **({"epsilon": None} | how))
    optimizer = wrap(model)
    for step in range(steps):
        optimizer.zero_grad()
        model(v.expand(4, 3)).square().sum().backward()
        optimizer.step()
        yield step + 1, entry(optimizer, model, "right_inverse"), v


def eigenvalues(H, v):
    """Along ``v`` and orthogonal to it, as which ``H`` must be complete."""
    along = v @ H @ v
    across = (H.trace() - along) / (len(v) - 1)
    P = torch.outer(v, v)
    eye = torch.eye(len(v), dtype=H.dtype)
    torch.testing.assert_close(H, along * P + across * (eye - P), rtol=1e-9, atol=1e-9)
    return along.item(), across.item()


TABLE = {
    "exact": {1: (1.0, 1.05), 50: (1.0, 13.0)},
    "paper": {1: (1.003, 0.95), 50: (2.12, 0.077)},
    "release": {1: (0.5, 1.0), 50: (0.183, 1.0)},
}
"""Design section 2.3: the eigenvalues after so many updates, along and orthogonal to ``v``."""


@pytest.mark.parametrize("rule", RULES)
def test_table_of_eigenvalues(rule):
    for step, H, v in constant_input(rule):
        if step in TABLE[rule]:
            found, expected = eigenvalues(H, v), TABLE[rule][step]
            assert found == pytest.approx(expected, rel=5e-3)
    assert step == 50


def test_paper_rule_overflows():
    """Without the stabilizer: 4.9e44 after 200 updates, more than float32 holds."""
    *_, (_, H, v) = constant_input("paper", steps=200)
    assert (v @ H @ v).item() == pytest.approx(4.9e44, rel=0.02)
    *_, (_, H, _) = constant_input("paper", steps=200, dtype=F32)
    assert not (H.isfinite().all() and H.abs().max() < 1e38)


@pytest.mark.parametrize("vectors", [1, 4])
def test_paper_rule_is_bounded_by_default(vectors):
    """Where the rule alone would overflow, the defaults of epsilon and zeta keep it in bounds."""
    defaults = inspect.signature(DenseMKOR).parameters
    how = {name: defaults[name].default for name in ("epsilon", "zeta")}
    runs = constant_input("paper", steps=400, dtype=F32, vectors=vectors, **how)
    largest = max(H.abs().max().item() for _, H, _ in runs)
    assert 5 < largest < 10 * (1 + 0.95**-4)  # what one vector may make of epsilon


@pytest.mark.parametrize("rule", RULES)
def test_first_update_is_not_lost(rule):
    """The first step already uses the first batch's factors: ``H_1``, not the identity."""
    torch.manual_seed(2)
    model = mlp()
    optimizer = wrapper(rule=rule, rescale=None, update_every=10)(model)
    recorder = Recorder(model)
    backward(model, points(1)[0])
    ((a, g),) = recorder.take()["0"][0]
    raw = torch.cat([model[0].weight.grad, model[0].bias.grad[:, None]], 1)
    optimizer.step()
    v, u = torch.cat([a.mean((0, 1)), torch.ones(1)]).double(), g.sum((0, 1))
    H = {side: torch.eye(len(x), dtype=F64) for side, x in (("left", u), ("right", v))}
    L, R = (oracles.dense_update(H[s], [x], rule, 0.95)[0] for s, x in (("left", u), ("right", v)))
    expected = L @ raw @ R
    found = torch.cat([model[0].weight.grad, model[0].bias.grad[:, None]], 1)
    torch.testing.assert_close(found, expected)
    assert error(found, raw) > 0.01


# ------------------------------------------------------------------------------- stabilizer


def test_stabilizer_acts_on_each_side_alone():
    """Large inputs and small gradients: the right side passes ``epsilon``, the left never does."""
    batches = [[10 * x for x in micro] for micro in points(60)]
    model = nn.Sequential(nn.Linear(6, 4, dtype=F64))
    _, twin = run(model, batches, scale=1e-6)
    assert stabilized(twin, "right") > 0
    assert stabilized(twin, "left") == 0


def test_stabilizer_acts_before_the_update():
    """At the moment at which the largest entry first exceeds ``epsilon`` nothing happens yet."""
    seen = [H.abs().max().item() for _, H, _ in constant_input("exact", epsilon=2.0, steps=40)]
    first = next(i for i, x in enumerate(seen) if x > 2.0)
    free = [H.abs().max().item() for _, H, _ in constant_input("exact", steps=40)]
    assert seen[: first + 1] == pytest.approx(free[: first + 1], rel=1e-12)
    assert seen[first + 1] < seen[first]
    assert free[first + 1] > free[first]


# -------------------------------------------------------------------------------- precision

HALVES = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def scaled(*dtypes):
    """Every rule and dtype, with tiny and huge gradients in turn: each meets both."""
    both = itertools.product(enumerate(RULES), enumerate(dtypes))
    kept = [(rule, (1e-12, 1e12)[(i + j) % 2], dtype) for (i, rule), (j, dtype) in both]
    return pytest.mark.parametrize(("rule", "scale", "dtype"), kept, ids=str)


def preconditioned(dtype, *, rule="release", scale=1.0, sides="both", steps=8, **how):
    """The gradients of the last of some steps without movement, with factors of ``dtype``."""
    torch.manual_seed(5)
    model = mlp().float()
    wrap = wrapper(lr=0.0, rule=rule, factor_dtype=dtype, sides=sides, **how)
    optimizer = wrap(model)
    for (x,) in points(steps):
        optimizer.zero_grad()
        backward(model, [x.float()], scale)
        optimizer.step()
    return optimizer, model, [p.grad.double() for p in model.parameters()]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_half_precision(dtype, rule):
    """Stored so, and close to float32: the errors of a few roundings."""
    optimizer, model, found = preconditioned(dtype, rule=rule)
    for m, side in itertools.product((model[0], model[2], model[4]), SIDES):
        stored = entry(optimizer, m, f"{side}_inverse")
        assert stored.dtype == dtype
        assert torch.equal(stored, stored.mT)
    _, _, expected = preconditioned(None, rule=rule)
    for p, q in zip(found, expected, strict=True):
        assert 0 < error(p, q) < 16 * HALVES[dtype]


@scaled(*HALVES)
def test_scale_of_gradients_in_half_precision(rule, scale, dtype):
    """Only the factor is half: gradients of any size come through it with all their entries."""
    how = {"rule": rule, "scale": scale, "sides": "right", "rescale": None}
    _, _, found = preconditioned(dtype, **how)
    _, _, expected = preconditioned(None, **how)
    for p, q in zip(found, expected, strict=True):
        assert q.norm() > 0
        assert error(p, q) < 16 * HALVES[dtype]


@scaled(None, *HALVES)
def test_extreme_gradients_on_both_sides(rule, scale, dtype):
    """The left factor is made of the extreme vectors themselves; no step is lost to them."""
    optimizer, model, found = preconditioned(dtype, rule=rule, scale=scale)
    assert all(p.isfinite().all() and p.norm() > 0 for p in found)
    assert optimizer.diagnostics()["mkor/raw_gradients"] == 0
    for m in (model[0], model[2]):
        left, right = (entry(optimizer, m, f"{side}_inverse").double() for side in SIDES)
        assert left.isfinite().all()
        assert error(right, torch.eye(len(right), dtype=F64)) > 0.01
        if scale > 1:
            assert error(left, torch.eye(len(left), dtype=F64)) > 0.01


# -------------------------------------------------------------------------------- arguments

BAD = [
    ({"rule": "printed"}, ValueError, "rule.*exact.*paper.*release.*'printed'"),
    ({"rule": None}, (TypeError, ValueError), "rule.*exact.*paper.*release.*None"),
    ({"vectors": 0}, ValueError, "vectors.*at least 1.*0"),
    ({"vectors": 1.0}, TypeError, "vectors.*whole number.*1.0"),
    ({"rows": 0}, ValueError, "rows.*at least 1.*0"),
    ({"rows": "all"}, TypeError, "rows.*whole number.*'all'"),
    ({"momentum": 1.0}, ValueError, "momentum.*between 0 and 1.*1.0"),
    ({"momentum": None}, TypeError, "momentum.*number.*None"),
    ({"epsilon": 0.0}, ValueError, "epsilon.*positive.*0.0"),
    ({"epsilon": float("nan")}, ValueError, "epsilon.*positive.*nan"),
    ({"epsilon": "10"}, TypeError, "epsilon.*number.*'10'"),
    ({"zeta": 1.0}, ValueError, "zeta.*between 0 and 1.*1.0"),
    ({"zeta": -0.4}, ValueError, "zeta.*between 0 and 1.*-0.4"),
    ({"zeta": None}, TypeError, "zeta.*number.*None"),
    ({"factor_dtype": torch.int8}, TypeError, "factor_dtype.*floating-point.*int8"),
    ({"factor_dtype": "float16"}, TypeError, "factor_dtype.*torch.dtype.*'float16'"),
    ({"update_every": 0}, ValueError, "update_every.*at least 1.*0"),
    ({"rescale": "always"}, ValueError, "rescale.*'running'.*'step'.*None.*'always'"),
    ({"sides": "top"}, ValueError, "sides.*'both'.*'left'.*'right'.*'top'"),
    ({"rank": 4}, TypeError, "rank"),
    ({"damping": 0.1}, TypeError, "damping"),
]


@pytest.mark.parametrize(("options", "kind", "message"), BAD, ids=str)
def test_bad_arguments(options, kind, message):
    """Refused at construction, with what would be right, and without a hook left behind."""
    model = mlp()
    with pytest.raises(kind, match=message):
        wrapper(**options)(model)
    assert not any(m._forward_hooks for m in model)


def test_defaults_are_the_papers():
    """Design section 3: the printed rule, one mean of all rows, every ten steps, rescaled."""
    optimizer = DenseMKOR(model := mlp(), torch.optim.SGD(model.parameters(), lr=0.1))
    factor = optimizer.curvature
    assert (factor.rule, factor.vectors, factor.rows, factor.momentum) == ("paper", 1, None, 0.95)
    assert (factor.epsilon, factor.zeta, optimizer.update_every) == (10.0, 0.4, 10)
