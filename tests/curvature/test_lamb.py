"""LAMB as the bench uses it against the formula of its paper, in float64.

You et al. 2020, "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes",
Algorithm 2, in the version without bias correction (the third on arXiv); the BERT recipe adds a
clip of the gradients' global norm to 1 before everything else.
"""

import pytest
import torch
from pytorch_optimizer import Lamb

from mkor.bench.contestants import build, parse_contestant

RATE, BETAS, DECAY, LARGEST = 0.02, (0.9, 0.999), 0.01, 10.0
RECIPE = {"betas": BETAS, "eps": 1e-6, "weight_decay": DECAY, "pre_norm": True}
PAPER = {"weight_decouple": False, "adam_debias": True}
"""Decay inside the ratio, and no division of the rate by ``1 - beta_1^t``."""

SHAPES = [(6, 5), (6,), (40, 30), (3, 2, 3, 3)]


def tensors(scale=1.0):
    """Weights: one with a norm above the clamp, one that is 0."""
    weights = [scale * torch.randn(shape, dtype=torch.float64) for shape in SHAPES]
    weights[1].zero_()
    assert weights[2].norm() > LARGEST
    return weights


def clipped(gradients):
    """``g min(1, 1 / |g|)`` with the norm over all tensors."""
    norm = sum(g.square().sum() for g in gradients).sqrt()
    return [g * min(1.0, 1.0 / norm.item()) for g in gradients]


def trust(weight, update):
    """``phi(|x|) / |r + lambda x|`` with ``phi(z) = min(z, 10)``; 1 where a norm is 0."""
    if weight.norm() == 0 or update.norm() == 0:
        return 1.0
    return (weight.norm().clamp(max=LARGEST) / update.norm()).item()


def reference(weights, steps, eps, *, clip=True):
    """Algorithm 2, line by line; ``steps`` is a list of gradients of all tensors."""
    x = [w.clone() for w in weights]
    m, v = ([torch.zeros_like(w) for w in weights] for _ in range(2))
    for gradients in steps:
        for i, g in enumerate(clipped(gradients) if clip else gradients):
            m[i] = BETAS[0] * m[i] + (1 - BETAS[0]) * g
            v[i] = BETAS[1] * v[i] + (1 - BETAS[1]) * g**2
            r = m[i] / (v[i].sqrt() + eps) + DECAY * x[i]
            x[i] = x[i] - RATE * trust(x[i], r) * r
    return x


def found(weights, steps, **options):
    parameters = [torch.nn.Parameter(w.clone()) for w in weights]
    optimizer = Lamb(parameters, lr=RATE, **options)
    for gradients in steps:
        for p, g in zip(parameters, gradients, strict=True):
            p.grad = g.clone()
        optimizer.step()
    return [p.detach() for p in parameters]


def gradients(size, steps=8):
    return [[size * torch.randn(s, dtype=torch.float64) for s in SHAPES] for _ in range(steps)]


def error(found, expected, start):
    """Of the way that the weights went, relative, the worst tensor's."""
    return max(
        ((f - e).norm() / (e - s).norm()).item()
        for f, e, s in zip(found, expected, start, strict=True)
    )


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("size", [1e-3, 10.0], ids=["below the clip", "above the clip"])
def test_recipe_is_the_formula(size, foreach):
    """With the recipe's options; ``pre_norm`` takes its norm in float32 and adds ``eps`` to it."""
    start, steps = tensors(), gradients(size)
    new = found(start, steps, foreach=foreach, **RECIPE, **PAPER)
    assert error(new, reference(start, steps, 1e-6), start) < 3e-6


@pytest.mark.parametrize("foreach", [False, True])
def test_arithmetic_is_exact(foreach):
    """``eps`` also stands in the ratio, which the paper has not: without it, all digits agree."""
    start, steps = tensors(), gradients(1.0)
    options = RECIPE | PAPER | {"eps": 1e-15, "pre_norm": False, "foreach": foreach}
    expected = reference(start, steps, 1e-15, clip=False)
    assert error(found(start, steps, **options), expected, start) < 1e-12


@pytest.mark.parametrize("option", PAPER)
def test_defaults_are_another_optimizer(option):
    """Each of the two options is needed: the package's own values leave the formula far behind."""
    start, steps = tensors(), gradients(1.0)
    options = RECIPE | {key: value for key, value in PAPER.items() if key != option}
    assert error(found(start, steps, **options), reference(start, steps, 1e-6), start) > 0.01


def test_step_without_decay_has_the_length_of_the_ratio():
    """``|dx| = eta phi(|x|)``; the package's default makes the first step ten times as long."""
    start, steps = tensors(), gradients(1.0, 1)
    expected = RATE * min(start[0].norm().item(), LARGEST)
    for options, factor in ((PAPER, 1.0), ({"weight_decouple": False}, 10.0)):
        new = found(start, steps, **(RECIPE | options | {"weight_decay": 0.0}))
        assert (new[0] - start[0]).norm().item() == pytest.approx(factor * expected, rel=1e-5)


def test_contestant_is_the_recipe():
    """``lamb`` of the command line follows the formula, clip included, unless told otherwise."""
    model = torch.nn.Sequential(torch.nn.Linear(6, 7), torch.nn.Linear(7, 40)).double()
    start = [p.detach().clone() for p in model.parameters()]
    steps = [[3 * torch.randn_like(p) for p in start] for _ in range(8)]
    optimizer = build(parse_contestant("lamb"), model, RATE, DECAY)
    for gradients in steps:
        for p, g in zip(model.parameters(), gradients, strict=True):
            p.grad = g.clone()
        optimizer.step()
    expected = reference(start, steps, 1e-6)
    assert error([p.detach() for p in model.parameters()], expected, start) < 1e-4
