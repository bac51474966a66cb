"""``nn.MultiheadAttention``: its projections are found in the autograd graph of its output."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from mkor import KFAC, MKOR, DenseMKOR, Eva
from support.contestants import hooks

D, HEADS = 8, 2
ONE = {"vectors": 1, "rows": None}


class Packed(nn.Module):
    """Self-attention by the module whose products no hook sees."""

    def __init__(self, **how):
        super().__init__()
        self.first = nn.Linear(5, D)
        self.attention = nn.MultiheadAttention(D, HEADS, batch_first=True, **how)
        self.last = nn.Linear(D, 3)

    def forward(self, x):
        h = self.first(x).tanh()
        return self.last(self.attend(h).tanh())

    def attend(self, h):
        return self.attention(h, h, h, need_weights=False)[0]


class Plain(Packed):
    """The same products by linear layers of their own."""

    def __init__(self, packed: Packed):
        nn.Module.__init__(self)
        packed = copy.deepcopy(packed)
        self.first, self.last, attention = packed.first, packed.last, packed.attention
        bias = attention.in_proj_bias is not None
        self.proj = nn.Linear(D, 3 * D, bias=bias, dtype=attention.in_proj_weight.dtype)
        self.proj.weight = attention.in_proj_weight
        self.out = nn.Linear(D, D, bias=bias, dtype=attention.in_proj_weight.dtype)
        self.out.weight = attention.out_proj.weight
        if bias:
            self.proj.bias, self.out.bias = attention.in_proj_bias, attention.out_proj.bias

    def attend(self, h):
        q, k, v = (x.unflatten(-1, (HEADS, -1)).transpose(1, 2) for x in self.proj(h).chunk(3, -1))
        h = functional.scaled_dot_product_attention(q, k, v)
        return self.out(h.transpose(1, 2).flatten(2))


def points(n=6):
    return torch.randn(n, 4, 5, dtype=torch.float64)


def train(model, optimizer, batches):
    """Trains and returns the last preconditioned gradients."""
    for x in batches:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return {n: p.grad.clone() for n, p in model.named_parameters()}


def wrap(kind, model, **how):
    return kind(model, torch.optim.SGD(model.parameters(), lr=0.05), **how)


KINDS = {
    "mkor": (MKOR, {"rank": 5} | ONE),
    "mkor-left": (MKOR, {"rank": 5, "sides": "left"} | ONE),
    "dense": (DenseMKOR, {"update_every": 1, "rule": "exact"}),
    "kfac": (KFAC, {"damping": 0.1}),
    "eva": (Eva, {}),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [True, False])
def test_equals_linear_layers(kind, bias):
    """Every gradient is that of the same model built of linear layers."""
    packed = Packed(bias=bias).double()
    plain = Plain(packed)
    make, how = KINDS[kind]
    optimizers = [wrap(make, model, **how) for model in (packed, plain)]
    batches = [points() for _ in range(4)]
    found, expected = (
        list(train(m, o, batches).values())
        for m, o in zip((packed, plain), optimizers, strict=True)
    )
    names = [n for n, _ in packed.named_parameters()]
    other = [n for n, _ in plain.named_parameters()]
    turned = dict(zip(names, found, strict=True))
    there = dict(zip(other, expected, strict=True))
    pairs = {"attention.in_proj_": "proj.", "attention.out_proj.": "out.", "first.": "first."}
    for mine, theirs in pairs.items():
        for part in ("weight", "bias"):
            if mine + part in turned:
                torch.testing.assert_close(turned[mine + part], there[theirs + part])
    assert all(
        row.preconditioned for row in optimizers[0].coverage() if "last" not in row.parameter
    )


def untouched(model, optimizer, run):
    """Names of the parameters whose gradient a second step leaves as it is."""
    for _ in range(2):
        optimizer.zero_grad()
        run().square().mean().backward()
        raw = {n: p.grad.clone() for n, p in model.named_parameters()}
        optimizer.step()
    return {n for n, p in model.named_parameters() if torch.equal(p.grad, raw[n])}


IN = {"attention.in_proj_weight", "attention.in_proj_bias"}
OUT = {"attention.out_proj.weight", "attention.out_proj.bias"}
LAST = {"last.weight", "last.bias"}


def test_separate_projections():
    """With widths of their own, queries, keys and values have a factor each."""
    model = Packed(kdim=3, vdim=4).double()
    model.attend = lambda h: model.attention(h, h[..., :3], h[..., 4:])[0]
    optimizer = wrap(MKOR, model, **ONE)
    assert untouched(model, optimizer, lambda: model(points())) == LAST | {"attention.in_proj_bias"}
    reasons = {row.parameter: row.reason for row in optimizer.coverage()}
    assert "several matrices" in reasons["attention.in_proj_bias"]


def test_cross_attention_keeps_the_packed_projection_raw():
    """Its one weight multiplies two inputs, which is no Kronecker product."""
    model = Packed().double()
    model.attend = lambda h: model.attention(h, h.flip(1), h.flip(1))[0]
    optimizer = wrap(MKOR, model, **ONE)
    assert untouched(model, optimizer, lambda: model(points())) == LAST | IN


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant):
    """With reentry as without checkpointing; else the projections' raw gradients pass."""
    model = Packed().double()
    optimizer = wrap(MKOR, model, **ONE)

    def run():
        h = model.first(points()).tanh()
        return model.last(checkpoint(model.attend, h, use_reentrant=reentrant))

    assert untouched(model, optimizer, run) == (LAST if reentrant else LAST | IN | OUT)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_passes_raw():
    """Compiled code has no autograd graph to look through."""
    model = Packed()
    optimizer = wrap(MKOR, model, **ONE)
    compiled = torch.compile(model, backend="aot_eager")
    left = untouched(model, optimizer, lambda: compiled(points().float()))
    left = untouched(model, optimizer, lambda: compiled(points().float()))
    assert left == LAST | IN | OUT


def test_autocast():
    """Statistics of products in bfloat16 are sums in float32."""
    model = Packed()
    optimizer = wrap(MKOR, model, **ONE)

    def run():
        with torch.autocast("cpu", torch.bfloat16):
            return model(points().float()).float()

    assert untouched(model, optimizer, run) == LAST


def test_attention_as_the_output_is_left_to_the_base():
    """What reaches the loss through its last projection is found; that projection is the output."""

    class Ending(Packed):
        def forward(self, x):
            return self.attend(self.first(x).tanh())

    model = Ending().double()
    del model.last
    optimizer = wrap(MKOR, model, **ONE)
    assert untouched(model, optimizer, lambda: model(points())) == OUT


def test_memory_is_no_output():
    """A layer that reaches the loss only through keys and values is hidden."""

    class Reading(nn.Module):
        def __init__(self):
            super().__init__()
            self.memory = nn.Linear(5, D)
            self.queries = nn.Linear(5, D)
            self.attention = nn.MultiheadAttention(D, HEADS, batch_first=True)
            self.last = nn.Linear(D, 3)

        def forward(self, x):
            memory = self.memory(x).tanh()
            return self.last(self.attention(self.queries(x).tanh(), memory, memory)[0])

    model = Reading().double()
    optimizer = wrap(MKOR, model, **ONE)
    assert untouched(model, optimizer, lambda: model(points())) == LAST | IN


def test_skip_takes_attention_whole():
    model = Packed().double()
    optimizer = wrap(MKOR, model, skip=[nn.MultiheadAttention], **ONE)
    assert untouched(model, optimizer, lambda: model(points())) == LAST | IN | OUT


def test_frozen_and_evaluated():
    """A frozen projection, and passes that are no training, are no trouble."""
    model = Packed().double()
    model.attention.out_proj.weight.requires_grad_(False)
    optimizer = wrap(MKOR, model, **ONE)
    with torch.no_grad():
        model(points())
    model.eval()
    model(points()).square().mean().backward()
    optimizer.step()
    assert model.attention.in_proj_weight.grad is not None


def test_hooks_come_off_and_copies_are_inert():
    model = Packed().double()
    optimizer = wrap(MKOR, model, **ONE)
    twin = copy.deepcopy(model)
    again = pickle.loads(pickle.dumps(model))
    before = optimizer.state_dict()
    for other in (twin, again):
        other(points()).square().mean().backward()
    optimizer.step()
    assert before["state"] == {}
    assert not any(t[k].any() for t in optimizer.state.values() for k in t if k == "mkor_updates")
    optimizer.close()
    assert hooks(model) == 0
