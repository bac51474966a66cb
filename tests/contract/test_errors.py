"""Bad input is refused at construction, with a message that says what would be right."""

import pytest
import torch
from torch import nn

import mkor
from mkor import MKOR, Combined, Preconditioned, Window


def model():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))


def sgd(m):
    return torch.optim.SGD(m.parameters(), lr=0.1)


BAD_OPTIONS = [
    ({"rank": 0}, ValueError, "rank.*at least 1.*got 0"),
    ({"rank": -3}, ValueError, "rank.*at least 1.*-3"),
    ({"rank": 2.5}, TypeError, "rank.*whole number.*2.5"),
    ({"rank": True}, TypeError, "rank.*whole number"),
    ({"rank": None}, TypeError, "rank.*whole number"),
    ({"rank": 3, "vectors": 4}, ValueError, "rank=3.*4 vectors.*rank >= 4"),
    ({"vectors": 0}, ValueError, "vectors.*at least 1.*got 0"),
    ({"vectors": "4"}, TypeError, "vectors.*whole number.*'4'"),
    ({"vectors": None}, TypeError, "vectors.*whole number"),
    ({"rows": 0}, ValueError, "rows.*at least 1.*got 0"),
    ({"rows": -1}, ValueError, "rows.*at least 1.*-1"),
    ({"rows": 12.0}, TypeError, "rows.*whole number.*12.0"),
    ({"momentum": 0.0}, ValueError, "momentum.*between 0 and 1.*0.0"),
    ({"momentum": 1.0}, ValueError, "momentum.*between 0 and 1.*1.0"),
    ({"momentum": 1.5}, ValueError, "momentum.*between 0 and 1.*1.5"),
    ({"momentum": -0.1}, ValueError, "momentum.*between 0 and 1.*-0.1"),
    ({"momentum": float("nan")}, ValueError, "momentum.*between 0 and 1.*nan"),
    ({"momentum": "0.9"}, TypeError, "momentum.*number.*'0.9'"),
    ({"damping": -0.03}, ValueError, "damping.*positive.*-0.03"),
    ({"damping": float("inf")}, ValueError, "damping.*finite.*inf"),
    ({"damping": float("nan")}, ValueError, "damping.*positive.*nan"),
    ({"damping": None}, TypeError, "damping.*number.*None"),
    ({"factor_dtype": torch.int32}, TypeError, "factor_dtype.*floating-point.*int32"),
    ({"factor_dtype": "bfloat16"}, TypeError, "factor_dtype.*torch.dtype.*'bfloat16'"),
    ({"update_every": 0}, ValueError, "update_every.*at least 1.*got 0"),
    ({"update_every": 1.0}, TypeError, "update_every.*whole number.*1.0"),
    ({"rescale": "always"}, ValueError, "rescale.*'running'.*'step'.*None.*'always'"),
    ({"rescale": False}, ValueError, "rescale.*'running'.*'step'.*None.*False"),
    ({"sides": "top"}, ValueError, "sides.*'both'.*'left'.*'right'.*'top'"),
    ({"sides": None}, ValueError, "sides.*'both'.*'left'.*'right'.*None"),
    ({"nonfinite": "ignore"}, ValueError, "nonfinite.*'propagate'.*'skip'.*'ignore'"),
    ({"skip_output": "yes"}, TypeError, "skip_output.*True or False.*'yes'"),
    ({"skip": "0"}, TypeError, r"skip.*list or tuple.*'0'.*skip=\["),
    ({"skip": nn.Linear}, TypeError, r"skip.*list or tuple.*Linear.*skip=\["),
    ({"skip": nn.Linear(1, 1)}, TypeError, r"skip.*list or tuple.*Linear.*skip=\["),
    ({"skip": ["encoder.*"]}, ValueError, r"'encoder\.\*'.*matches no module.*0, 2"),
    ({"skip": [nn.Conv2d]}, ValueError, "Conv2d.*matches no module"),
    ({"skip": [nn.Linear(1, 1)]}, ValueError, "Linear.*matches no module"),
    ({"skip": [3]}, TypeError, "skip.*modules, module types.*patterns.*3"),
    ({"skip": [int]}, TypeError, "skip.*modules, module types.*patterns.*int"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD_OPTIONS, ids=str)
def test_options(options, error, message):
    m = model()
    before = [len(module._forward_hooks) for module in m.modules()]
    with pytest.raises(error, match=message):
        MKOR(m, sgd(m), **options)
    assert [len(module._forward_hooks) for module in m.modules()] == before


def test_unknown_option():
    m = model()
    with pytest.raises(TypeError, match="lr"):
        MKOR(m, sgd(m), lr=0.1)


def test_options_are_given_by_name():
    m = model()
    with pytest.raises(TypeError, match="positional"):
        MKOR(m, sgd(m), 64)


def test_model_is_no_module():
    m = model()
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module.*generator"):
        MKOR(m.parameters(), sgd(m))


def test_model_and_optimizer_swapped():
    m = model()
    with pytest.raises(TypeError, match=r"MKOR\(model, optimizer\)"):
        MKOR(sgd(m), m)


@pytest.mark.parametrize("wrong", [torch.optim.SGD, None, "adamw", 0.1], ids=str)
def test_base_is_no_optimizer(wrong):
    with pytest.raises(TypeError, match=r"optimizer must be a torch\.optim\.Optimizer"):
        MKOR(model(), wrong)


def test_base_shares_no_parameter():
    with pytest.raises(ValueError, match="none of the model's parameters"):
        MKOR(model(), sgd(model()))


def test_base_needs_a_closure():
    m = model()
    with pytest.raises(TypeError, match=r"LBFGS.*closure"):
        MKOR(m, torch.optim.LBFGS(m.parameters()))


def test_base_is_wrapped_already():
    m = model()
    first = MKOR(m, sgd(m))
    with pytest.raises(TypeError, match=r"already.*\.base"):
        MKOR(m, first)
    with pytest.raises(TypeError, match=r"already.*\.base"):
        MKOR(model(), first)


def test_curvature_is_none():
    m = model()
    with pytest.raises(TypeError, match="curvature"):
        Preconditioned(m, sgd(m), None)
    with pytest.raises(TypeError, match="curvature"):
        Preconditioned(m, sgd(m), Window)


@pytest.mark.parametrize("lazy", [nn.LazyLinear, lambda n: nn.LazyConv1d(n, 1)])
def test_lazy_module(lazy):
    m = nn.Sequential(nn.Linear(4, 5), lazy(3))
    base = torch.optim.SGD(m[0].parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"1\.weight.*not initialised.*forward pass"):
        MKOR(m, base)


def test_lazy_module_after_a_forward_pass():
    m = nn.Sequential(nn.Linear(4, 5), nn.LazyLinear(3), nn.Linear(3, 2))
    m(torch.ones(2, 4))
    optimizer = MKOR(m, sgd(m))
    assert len(optimizer.coverage()) == 6


def test_data_parallel():
    m = model()
    with pytest.raises(TypeError, match=r"DataParallel.*DistributedDataParallel"):
        MKOR(nn.DataParallel(m), sgd(m))
    outer = nn.Sequential(nn.DataParallel(m))
    with pytest.raises(TypeError, match=r"DataParallel.*DistributedDataParallel"):
        MKOR(outer, sgd(m))


def test_second_wrapper_on_a_part_of_the_model():
    """Two wrappers never watch one layer, even if one was built for a part of the model."""
    m = model()
    first = MKOR(m[0], torch.optim.SGD(m[0].parameters(), lr=0.1))
    with pytest.warns(UserWarning, match="already.*closed"):
        second = MKOR(m, sgd(m))
    assert len(m[0]._forward_hooks) == 1
    assert first.base.state == {}
    second.close()


def test_wrappers_of_different_models_live_together():
    one, two = model(), model()
    first, second = MKOR(one, sgd(one)), MKOR(two, sgd(two))
    for m, o in ((one, first), (two, second)):
        m(torch.randn(6, 4)).square().sum().backward()
        o.step()
    assert first.diagnostics().keys() == second.diagnostics().keys()


LOSSES = {"none": lambda m: setattr(m, "weight", None), "deleted": lambda m: delattr(m, "weight")}


@pytest.mark.parametrize("name", LOSSES)
def test_a_watched_layer_without_weight(name):
    """Who takes weights from a model unwraps it: afterwards is early enough."""
    m = model()
    base = sgd(m)
    optimizer = MKOR(m, base, skip_output=False)
    m(torch.ones(3, 4)).sum().backward()
    optimizer.step()
    LOSSES[name](m[0])
    m[2](torch.ones(3, 5)).sum().backward()
    with pytest.raises(
        RuntimeError, match=r"watches 0, whose Linear has no tensor 'weight'.*close"
    ):
        optimizer.step()
    optimizer.close()
    rest = MKOR(m, base, skip_output=False)
    assert [row.parameter for row in rest.coverage() if row.preconditioned] == [
        "2.weight",
        "2.bias",
    ]
    before = m[2].weight.clone()
    m[2](torch.ones(3, 5)).sum().backward()
    rest.step()
    assert not torch.equal(m[2].weight, before)


def test_attribute_that_does_not_exist():
    with pytest.raises(AttributeError, match="'mkor' has no attribute 'Muon'"):
        mkor.Muon  # noqa: B018


def test_combined_of_one():
    with pytest.raises(ValueError, match="two optimizers"):
        Combined(sgd(model()))


def test_combined_takes_optimizers():
    with pytest.raises(TypeError, match=r"Combined takes torch optimizers.*list"):
        Combined([sgd(model())], sgd(model()))


def test_combined_parameter_in_two_parts():
    m = model()
    with pytest.raises(ValueError, match="a parameter is in two"):
        Combined(sgd(m), torch.optim.AdamW([m[0].weight]))


def test_combined_new_group():
    combined = Combined(sgd(model()), sgd(model()))
    with pytest.raises(TypeError, match=r"optimizers\[i\]\.add_param_group"):
        combined.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
