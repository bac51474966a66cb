"""The output layer is found by itself, left to the base, named, and kept in checkpoints."""

import copy
import io
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from mkor import MKOR

HOW = {"rank": 6, "vectors": 2, "rows": None}
X = torch.linspace(-1, 1, 48).reshape(8, 6)


def wrapped(model, **how):
    return MKOR(model, torch.optim.SGD(model.parameters(), lr=0.05), **(HOW | how))


def total(out):
    if isinstance(out, dict):
        out = tuple(out.values())
    if isinstance(out, tuple):
        return sum(total(o) for o in out)
    return (out - 1).square().sum()


def train(model, optimizer, x=X, steps=2):
    raw = {}
    for _ in range(steps):
        optimizer.zero_grad()
        total(model(x)).backward()
        raw = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
    parameters = dict(model.named_parameters())
    return {n.rpartition(".")[0] for n, g in raw.items() if not torch.equal(g, parameters[n].grad)}


def outputs(optimizer):
    return {
        row.parameter.rpartition(".")[0]
        for row in optimizer.coverage()
        if not row.preconditioned and "output" in row.reason
    }


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3), nn.Softmax(-1)
    )


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(6, 5)
        self.first, self.second = nn.Linear(5, 3), nn.Linear(5, 1)

    def forward(self, x):
        h = self.body(x).tanh()
        return {"first": self.first(h), "second": self.second(h)}


class Auxiliary(nn.Module):
    """A head in the middle: it reaches the loss through no other layer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.block = nn.Linear(6, 5), nn.Linear(5, 5)
        self.aside, self.last = nn.Linear(5, 2), nn.Linear(5, 3)

    def forward(self, x):
        h = self.stem(x).tanh()
        return self.aside(h), self.last(self.block(h).tanh())


class DeepSupervision(nn.Module):
    """A hidden layer whose output is also a loss: another layer lies between it and the loss."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.last = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x):
        h = self.stem(x)
        return h, self.last(h.tanh())


class Residual(nn.Module):
    """Both layers add up: neither lies behind the other."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.left, self.right = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        h = self.stem(x).tanh()
        return self.left(h) + self.right(h) + h


class Siamese(nn.Module):
    """One layer used twice on the way, one head used twice at the end."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.again, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x):
        h = self.again(self.again(self.stem(x)).tanh()).tanh()
        return self.head(h), self.head(-h)


class Recurrent(nn.Module):
    """A last layer that feeds only itself: no *other* layer lies between it and the loss."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.again = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        return self.again(self.again(self.again(self.stem(x)).tanh()).tanh())


class Tied(nn.Module):
    """The head has the embedding's weight: it is skipped for that, and the last block is not."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(11, 6)
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(self.last(self.first(self.embedding(tokens)).tanh()).tanh())


class TiedByHand(Tied):
    """As some language models do it: the head is a product with the embedding's weight."""

    def __init__(self):
        super().__init__()
        del self.head

    def forward(self, tokens):
        h = self.last(self.first(self.embedding(tokens)).tanh()).tanh()
        return functional.linear(h, self.embedding.weight)


TOKENS = torch.arange(24).reshape(4, 6) % 11


class Convolutional(nn.Sequential):
    def __init__(self):
        torch.manual_seed(0)
        super().__init__(
            nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 3, 2), nn.ReLU(inplace=True),
            nn.Conv1d(3, 2, 3), nn.AdaptiveAvgPool1d(1), nn.Flatten(),
        )  # fmt: skip


@pytest.mark.parametrize(
    ("make", "expected", "x"),
    [
        (mlp, {"4"}, X),
        (TwoHeads, {"first", "second"}, X),
        (Auxiliary, {"aside", "last"}, X),
        (DeepSupervision, {"last"}, X),
        (Residual, {"left", "right"}, X),
        (Siamese, {"head"}, X),
        (Recurrent, {"again"}, X),
        (Tied, set(), TOKENS),
        (Convolutional, {"3"}, X),
    ],
)
def test_found_by_itself(make, expected, x):
    """Named in ``coverage()``; its gradient stays raw, everybody else's does not."""
    model = make()
    optimizer = wrapped(model)
    changed = train(model, optimizer, x)
    assert outputs(optimizer) == expected
    layers = {
        n for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv1d)
    } - expected - {"head"}  # fmt: skip
    assert changed == layers


def test_already_in_the_first_step():
    model = mlp()
    optimizer = wrapped(model)
    assert train(model, optimizer, steps=1) == {"0", "2"}


def test_not_skipped_when_told():
    model = mlp()
    optimizer = wrapped(model, skip_output=False)
    assert train(model, optimizer, steps=1) == {"0", "2", "4"}
    assert outputs(optimizer) == set()


def test_tied_head_by_hand():
    """A product that is no module cannot be seen: then the last module is the output."""
    model = TiedByHand()
    optimizer = wrapped(model)
    assert train(model, optimizer, TOKENS) == {"first"}
    assert outputs(optimizer) == {"last"}


def test_skipped_layers_count_as_layers():
    """A head that the user skips is still the output: the layer before it is preconditioned."""
    model = mlp()
    optimizer = wrapped(model, skip=["4"])
    assert train(model, optimizer) == {"0", "2"}
    assert outputs(optimizer) == set()


def test_frozen_head_counts_as_a_layer():
    model = mlp()
    model[4].requires_grad_(False)
    optimizer = wrapped(model)
    assert train(model, optimizer) == {"0", "2"}


def test_layer_outside_the_base_counts_as_a_layer():
    model = mlp()
    base = torch.optim.SGD([*model[0].parameters(), *model[2].parameters()], lr=0.1)
    optimizer = MKOR(model, base, **HOW)
    assert train(model, optimizer) == {"0", "2"}


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_blocks(reentrant):
    """Recomputation in the backward pass hides the graph: the last block is still no output."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.stem, self.head = nn.Linear(6, 6), nn.Linear(6, 3)
            self.blocks = nn.ModuleList(
                nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6)) for _ in range(3)
            )

        def forward(self, x):
            h = self.stem(x)
            for block in self.blocks:
                h = h + checkpoint(block, h, use_reentrant=reentrant)
            return self.head(h)

    model = Model()
    optimizer = wrapped(model)
    changed = train(model, optimizer)
    assert outputs(optimizer) == {"head"}
    assert changed == {"stem"} | {f"blocks.{i}.{j}" for i in range(3) for j in (0, 2)}


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_head(reentrant):
    """Also a head inside a checkpointed segment is found, and what comes before it is not."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.stem, self.block, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x):
            tail = lambda h: self.head(self.block(h).tanh())  # noqa: E731
            return checkpoint(tail, self.stem(x), use_reentrant=reentrant)

    model = Model()
    optimizer = wrapped(model)
    assert train(model, optimizer) == {"stem", "block"}
    assert outputs(optimizer) == {"head"}


def test_found_when_the_first_passes_do_not_count():
    """Steps without data, evaluation and dropped gradients before the first real one."""
    model = mlp()
    optimizer = wrapped(model)
    optimizer.step()
    with torch.no_grad():
        model(X)
    total(model(X)).backward()
    optimizer.zero_grad()
    assert train(model, optimizer) == {"0", "2"}
    assert outputs(optimizer) == {"4"}


def test_found_over_micro_batches():
    model = TwoHeads()
    optimizer = wrapped(model)
    for x in X.split(4):
        total(model(x)).backward()
    optimizer.step()
    assert outputs(optimizer) == {"first", "second"}


def test_single_layer_warns():
    """A model in which nothing is left says so, and says what to do."""
    model = nn.Sequential(nn.Linear(6, 3))
    optimizer = wrapped(model)
    with pytest.warns(UserWarning, match="skip_output=False"):
        train(model, optimizer, steps=1)
    assert train(model, optimizer) == set()


def shapes(optimizer):
    return {
        key: {name: tuple(torch.as_tensor(v).shape) for name, v in entry.items()}
        for key, entry in optimizer.state_dict()["state"].items()
    }


def test_state_does_not_depend_on_it():
    """The same keys and shapes before the search, after it, and with ``skip_output=False``."""
    found = []
    for how in ({}, {"skip_output": False}):
        model = mlp()
        optimizer = wrapped(model, **how)
        for _ in range(2):
            optimizer.step()
            found.append(shapes(optimizer))
        train(model, optimizer)
        found.append(shapes(optimizer))
    assert all(shape == found[0] for shape in found)
    assert any("mkor" in name for name in found[0][0])


def test_kept_in_checkpoints():
    """A resumed run does not search again: the decision holds even where it would come out else."""
    model = Auxiliary()
    optimizer = wrapped(model)
    train(model, optimizer)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other = Auxiliary()
    other.load_state_dict(model.state_dict())
    resumed = wrapped(other)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert outputs(resumed) == {"aside", "last"}
    for m, o in ((model, optimizer), (other, resumed)):
        o.zero_grad()
        total(m(X)[1]).backward()  # the head in the middle is not used now
        o.step()
    assert outputs(resumed) == {"aside", "last"}
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


def test_checkpoint_from_before_the_search():
    """Saved before any backward pass, loaded, and found afterwards."""
    model = mlp()
    optimizer = wrapped(model)
    optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    resumed = wrapped(model_two := mlp())
    resumed.load_state_dict(state)
    assert train(model_two, resumed) == {"0", "2"}
    assert outputs(resumed) == {"4"}


def test_decided_once():
    """What later passes do does not move it."""
    model = Auxiliary()
    optimizer = wrapped(model)
    optimizer.zero_grad()
    total(model(X)[0]).backward()
    optimizer.step()
    assert outputs(optimizer) == {"aside"}
    train(model, optimizer)
    assert outputs(optimizer) == {"aside"}


def test_coverage_before_the_first_pass():
    """Not known yet: the rows say so instead of promising."""
    model = mlp()
    optimizer = wrapped(model)
    notes = {row.parameter: row.reason for row in optimizer.coverage()}
    assert all("output" in notes[name] for name in ("0.weight", "4.weight"))
    train(model, optimizer)
    assert {row.parameter: row.reason for row in optimizer.coverage()}["0.weight"] == ""


def test_search_leaves_nothing_behind():
    """After the search nothing holds the graph of the passes that it followed."""
    model = mlp()
    optimizer = wrapped(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer)
    hook_counts = [len(m._forward_hooks) for m in model]
    assert hook_counts == [1, 0, 1, 0, 0, 0]


def test_output_layer_keeps_no_factors_in_memory():
    """Its entries keep their shapes, share one number in memory, and are whole in a state dict."""
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    optimizer = MKOR(model, torch.optim.SGD(model.parameters(), lr=0.1), rank=9, vectors=4)
    model(torch.randn(7, 6)).square().mean().backward()
    optimizer.step()
    head = optimizer.state[model[2].weight]
    assert head["mkor_left_rows"].shape == (9, 4)
    assert head["mkor_left_rows"].untyped_storage().nbytes() == 4
    saved = optimizer.state_dict()["state"][2]
    assert saved["mkor_left_rows"].untyped_storage().nbytes() >= 9 * 4 * 4


def test_factors_come_back_where_the_checkpoint_found_another_output():
    """A layer released as an output takes the factors of a checkpoint that knows it as hidden."""
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    states = []
    for whole in (True, False):
        base = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer = MKOR(model, base, rank=9, vectors=4)
        hidden = model(torch.randn(7, 6)) if whole else model[0](torch.randn(7, 6))
        hidden.square().mean().backward()
        optimizer.step()
        states.append(optimizer.state_dict())
        optimizer.close()
    optimizer = MKOR(model, torch.optim.SGD(model.parameters(), lr=0.1), rank=9, vectors=4)
    for state, width in ((states[1], 0), (states[0], 5)):
        optimizer.load_state_dict(state)
        norm = optimizer.state[model[0].weight]["mkor_left_rows"].norm()
        assert bool(norm > 0) == bool(width)
    optimizer.close()
