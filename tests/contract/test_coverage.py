"""What is preconditioned and what is not: in ``coverage()`` and in the gradients alike."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from mkor import MKOR

HOW = {"rank": 6, "vectors": 2, "rows": None, "skip_output": False, "rescale": None}


def wrapped(model, parameters=None, **how):
    base = torch.optim.SGD(parameters or model.parameters(), lr=0.01)
    return MKOR(model, base, **(HOW | how))


def reasons(optimizer):
    """Parameters that are left to the base, with the reason given; each row has one or neither."""
    rows = list(optimizer.coverage())
    assert all(bool(row.reason) or row.preconditioned for row in rows)
    return {row.parameter: row.reason for row in rows if not row.preconditioned}


def changed(model, optimizer, x, steps=2):
    """Which parameters' gradients a step changes: those that are really preconditioned."""
    for _ in range(steps):
        optimizer.zero_grad()
        out = model(x)
        (out[0] if isinstance(out, tuple) else out).square().sum().backward()
        raw = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
    parameters = dict(model.named_parameters())
    return {n for n, g in raw.items() if not torch.equal(g, parameters[n].grad)}


def check(model, x, expected, parameters=None, **how):
    """Coverage and gradients tell the same; ``expected`` maps what is left out to its reason."""
    optimizer = wrapped(model, parameters, **how)
    names = [n for n, _ in model.named_parameters()]
    assert [row.parameter for row in optimizer.coverage()] == names
    really = changed(model, optimizer, x)
    found = reasons(optimizer)
    assert found.keys() == expected.keys()
    for name, reason in expected.items():
        assert reason in found[name], (name, found[name])
    assert really == set(names) - expected.keys()
    return optimizer


def chain():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(5, 6), nn.Tanh(), nn.Sequential(nn.Linear(6, 4), nn.Tanh()), nn.Linear(4, 3)
    )


X = torch.linspace(-1, 1, 40).reshape(8, 5)


def test_everything():
    check(chain(), X, {})


@pytest.mark.parametrize(
    ("skip", "left_out"),
    [
        (lambda m: [m[2]], ["2.0"]),
        (lambda m: [m[0], m[3]], ["0", "3"]),
        (lambda _: ["2.*"], ["2.0"]),
        (lambda _: ["[03]"], ["0", "3"]),
        (lambda _: ("2",), ["2.0"]),
        (lambda m: ["0", m[3]], ["0", "3"]),
    ],
    ids=["module", "modules", "pattern", "class", "parent", "mixed"],
)
def test_skip(skip, left_out):
    """Modules with all that is in them, and patterns on names."""
    model = chain()
    expected = {f"{n}.{p}": "skip" for n in left_out for p in ("weight", "bias")}
    check(model, X, expected, skip=skip(model))


def test_skip_by_type():
    model = nn.Sequential(nn.Conv1d(1, 3, 2), nn.Flatten(), nn.Linear(12, 3))
    expected = {"0.weight": "Conv1d", "0.bias": "Conv1d"}
    check(model, X[:, None], expected, skip=[nn.Conv1d])


def test_skip_by_names_of_the_users_model():
    """``torch.compile`` and data parallelism put names in front; patterns do not see them."""
    inner = chain()
    compiled = torch.compile(inner, backend="eager")
    optimizer = wrapped(compiled, skip=["2.*"])
    assert set(reasons(optimizer)) == {"2.0.weight", "2.0.bias"}

    class Distributed(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = chain()

    optimizer = wrapped(Distributed(), skip=["2.*"])
    assert set(reasons(optimizer)) == {"2.0.weight", "2.0.bias"}


def test_frozen_and_foreign():
    model = chain()
    model[0].requires_grad_(False)
    trained = [*model[2].parameters(), *model[0].parameters()]
    expected = {"0.weight": "frozen", "0.bias": "frozen", "3.weight": "base", "3.bias": "base"}
    optimizer = wrapped(model, trained)
    found = reasons(optimizer)
    assert found.keys() == expected.keys()
    assert all(expected[name] in found[name] for name in expected)
    assert changed(model, optimizer, X) == {"2.0.weight", "2.0.bias"}


def test_other_kinds_of_layer():
    """Each with the name of its kind or a reason of its own."""
    model = nn.Sequential(
        nn.Linear(5, 6), nn.LayerNorm(6), nn.PReLU(), nn.Unflatten(1, (2, 3)),
        nn.ConvTranspose1d(2, 2, 2), nn.BatchNorm1d(2), nn.Flatten(), nn.Linear(8, 3),
    )  # fmt: skip
    expected = {
        "1.weight": "LayerNorm",
        "1.bias": "LayerNorm",
        "2.weight": "PReLU",
        "4.weight": "ransposed",
        "4.bias": "ransposed",
        "5.weight": "BatchNorm1d",
        "5.bias": "BatchNorm1d",
    }
    check(model, X, expected)


def test_bare_parameter():
    class Scaled(nn.Linear):
        def __init__(self):
            super().__init__(5, 4)
            self.scale = nn.Parameter(torch.ones(4))

        def forward(self, x):
            return super().forward(x) * self.scale

    model = nn.Sequential(Scaled(), nn.Linear(4, 2))
    optimizer = wrapped(model)
    assert "0.scale" in reasons(optimizer)
    assert "0.scale" not in changed(model, optimizer, X)


def test_subclass_counts():
    """FSDP2 and quantisation rename classes: what is a Linear stays one."""

    class Renamed(nn.Linear):
        pass

    class Strange(nn.Conv1d):
        pass

    model = nn.Sequential(Strange(1, 2, 2), nn.Flatten(), Renamed(8, 3))
    check(model, X[:, None], {})


def test_transformer_layer():
    """In torch's encoder layer the attention's projections and the first layer are hidden."""
    model = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
    optimizer = wrapped(model)
    x = torch.randn(3, 4, 8)
    left = {f"{name}.{part}" for name in ("norm1", "norm2") for part in ("weight", "bias")}
    assert changed(model, optimizer, x) == {n for n, _ in model.named_parameters()} - left


@pytest.mark.parametrize(
    "parametrize", [parametrizations.weight_norm, parametrizations.spectral_norm]
)
def test_parametrized_weight(parametrize):
    """The weight is computed; its parts and its bias go to the base."""
    model = chain()
    parametrize(model[2][0])
    optimizer = wrapped(model)
    left_out = {n for n, _ in model.named_parameters() if n.startswith("2.0")}
    found = reasons(optimizer)
    assert found.keys() == left_out
    assert all("parametri" in reason for reason in found.values())
    assert changed(model, optimizer, X) == {n for n, _ in model.named_parameters()} - left_out


def test_old_weight_norm():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.Sequential(nn.utils.weight_norm(nn.Linear(5, 4)), nn.Linear(4, 3))
    optimizer = wrapped(model)
    assert reasons(optimizer).keys() == {"0.bias", "0.weight_g", "0.weight_v"}
    assert changed(model, optimizer, X) == {"1.weight", "1.bias"}


class Language(nn.Module):
    """Embedding, two hidden layers and a head that may share the embedding's weight."""

    def __init__(self, tied):
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.body = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh())
        self.head = nn.Linear(6, 11, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(self.body(self.embedding(tokens)))


TOKENS = torch.arange(24).reshape(4, 6) % 11


def test_embedding():
    check(Language(tied=False), TOKENS, {"embedding.weight": "Embedding"})


def test_tied_embedding():
    """One parameter under two names: listed once, left to the base."""
    check(Language(tied=True), TOKENS, {"embedding.weight": "tied"})


def test_tied_layers():
    """Two modules of one form with one weight are one layer used twice."""
    torch.manual_seed(0)
    first, twin, last = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 2)
    twin.weight, twin.bias = first.weight, first.bias
    tied = nn.Sequential(first, nn.Tanh(), twin, nn.Tanh(), last)
    torch.manual_seed(0)
    repeated = nn.Linear(5, 5)
    nn.Linear(5, 5)
    repeated = nn.Sequential(repeated, nn.Tanh(), repeated, nn.Tanh(), nn.Linear(5, 2))
    for model in (tied, repeated):
        optimizer = wrapped(model)
        assert reasons(optimizer) == {}
        assert changed(model, optimizer, X) == {"0.weight", "0.bias", "4.weight", "4.bias"}
    for p, q in zip(tied.parameters(), repeated.parameters(), strict=True):
        assert torch.equal(p, q)


def test_weight_shared_by_different_forms():
    """A weight that one layer reads as rows and another as patches belongs to neither."""
    linear, conv = nn.Linear(5, 5), nn.Conv1d(5, 5, 1, bias=False)
    conv.weight = nn.Parameter(linear.weight.detach()[..., None].clone())
    biased, plain = nn.Linear(5, 5), nn.Linear(5, 5, bias=False)
    plain.weight = biased.weight
    model = nn.Sequential(biased, nn.Tanh(), plain, nn.Tanh(), nn.Linear(5, 2))
    optimizer = wrapped(model)
    found = reasons(optimizer)
    assert "0.weight" in found
    assert "shares" in found["0.weight"]
    assert changed(model, optimizer, X) == {"4.weight", "4.bias"}


def test_very_wide_head():
    """A vocabulary's width is left to the base."""
    model = nn.Sequential(nn.Linear(5, 2), nn.Linear(2, 50_000, bias=False))
    check(model, X, {"1.weight": "wide"})


def test_layer_in_two_places_is_listed_once():
    layer = nn.Linear(5, 5)
    model = nn.ModuleDict({"a": layer, "b": layer, "c": nn.Linear(5, 5)})
    names = [row.parameter for row in wrapped(model).coverage()]
    assert names == ["a.weight", "a.bias", "c.weight", "c.bias"]


def test_figures_of_the_rows():
    """Rank, memory and operations of a layer, as section 2.3 counts them."""
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    optimizer = wrapped(model, rank=4)
    changed(model, optimizer, X)
    rows = {row.parameter: row for row in optimizer.coverage()}
    assert rows["0.weight"].shape == (7, 5)
    assert rows["0.weight"].rank == rows["0.bias"].rank == 4
    for name, module in (("0", model[0]), ("2", model[2])):
        entry = optimizer.state[module.weight]
        size = sum(
            v.numel() * v.element_size()
            for k, v in entry.items()
            if k.startswith("mkor_") and "counters" not in k
        )
        assert rows[f"{name}.weight"].state_bytes == size
        d_in, d_out = module.in_features, module.out_features
        assert size >= 4 * 4 * (d_in + d_out)
        assert rows[f"{name}.weight"].flops == 2 * 4 * 4 * d_out * (d_in + 1)
        assert rows[f"{name}.bias"].state_bytes == rows[f"{name}.bias"].flops == 0
    coverage = optimizer.coverage()
    assert coverage.state_bytes == sum(row.state_bytes for row in rows.values())
    assert coverage.share == 1.0
    assert len(coverage) == 4


def test_share_counts_entries():
    model = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3))
    optimizer = wrapped(model, skip=["2"])
    assert optimizer.coverage().share == pytest.approx(42 / (42 + 14 + 24))


def test_prints_as_a_table():
    """One line for every parameter, with its name and, where left out, the reason."""
    model = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3))
    text = str(wrapped(model, skip=["2"]).coverage())
    lines = text.splitlines()
    for name in ("0.weight", "0.bias", "1.weight", "1.bias", "2.weight", "2.bias"):
        assert sum(line.startswith(name) for line in lines) == 1, name
    assert "LayerNorm" in next(line for line in lines if line.startswith("1.bias"))
    assert "skip" in next(line for line in lines if line.startswith("2.weight"))


def test_model_in_which_nothing_is_left_warns():
    with pytest.warns(UserWarning, match="coverage"):
        wrapped(nn.Sequential(nn.Embedding(3, 4), nn.LayerNorm(4)))
    with pytest.warns(UserWarning, match="no layer"):
        wrapped(chain(), skip=[nn.Linear])


def test_sides_use_half_the_memory():
    sizes = {}
    for sides in ("both", "left", "right"):
        model = nn.Sequential(nn.Linear(100, 100), nn.Linear(100, 100))
        optimizer = wrapped(model, sides=sides)
        changed(model, optimizer, torch.randn(8, 100), steps=1)
        sizes[sides] = optimizer.coverage().state_bytes
    assert sizes["left"] < 0.6 * sizes["both"]
    assert sizes["right"] < 0.6 * sizes["both"]
