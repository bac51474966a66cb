"""Checkpoints of other settings, layers, bases and versions, and damaged ones.

Each either continues or is refused with a way out, before anything has changed.
"""

import copy
import io
import itertools

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)

from support.contestants import (
    PREFIX,
    ROWS,
    Net,
    backward,
    base_state,
    factors,
    same,
    seeded,
    train,
    weights,
)

KINDS = ["mkor+adamw", "dense[exact]+adamw", "kfac+sgd-momentum", "eva+adamw"]
COUNTERS = PREFIX + "counters"


@pytest.fixture(params=KINDS, name="row")
def _row(request):
    return ROWS[request.param]


def saved(row, steps=3, make=Net, **options):
    """A trained model and what its optimizer's checkpoint holds."""
    model = seeded(make)
    optimizer = row.make(model, **options)
    train(model, optimizer, steps)
    return model, copy.deepcopy(optimizer.state_dict())


def everything(model, optimizer):
    return weights(model) + factors(optimizer) + base_state(optimizer)


def refused(row, state, *messages, make=Net, **options):
    """Loading it raises, names a way out, and leaves model, base and factors as they are."""
    model = seeded(make)
    optimizer = row.make(model, **options)
    train(model, optimizer, 2, 50)
    before = everything(model, optimizer)
    for message in messages:
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(copy.deepcopy(state))
    assert same(before, everything(model, optimizer))
    assert torch.tensor(train(model, optimizer, 2)).isfinite().all()


def continues(row, state, **options):
    """Loading it works; returns the model and the optimizer, which trains on."""
    model = seeded(seed=1)
    optimizer = row.make(model, **options)
    optimizer.load_state_dict(copy.deepcopy(state))
    kept = [f.float() for f in factors(optimizer)]
    assert torch.tensor(train(model, optimizer, 2)).isfinite().all()
    return kept


# ------------------------------------------------------------------- torch.distributed.checkpoint


@pytest.fixture(name="one_process")
def _one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


LAYOUTS = {
    "nested": StateDictOptions(),
    "flattened": StateDictOptions(flatten_optimizer_state_dict=True),
    "full": StateDictOptions(full_state_dict=True),
    "full on the CPU": StateDictOptions(full_state_dict=True, cpu_offload=True),
}
"""Torch cannot load what is both flattened and full, of its own optimizers neither."""
OTHERS = ["mkor+muon", "mkor+sgd", "mkor-h+adamw", "mkor+adamw-8bit"]
# The other rows take the layouts in turn.
DISTRIBUTED = [*itertools.product(KINDS, LAYOUTS), *zip(OTHERS, LAYOUTS, strict=True)]


def parts(model, optimizer, options):
    model_state, optimizer_state = get_state_dict(model, optimizer, options=options)
    return {"model": model_state, "optimizer": optimizer_state}


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize(("name", "layout"), DISTRIBUTED)
def test_distributed_checkpoint_on_disk(name, layout, tmp_path):
    """Saved to a folder and loaded from it into a new model and optimizer: bitwise on."""
    row, options = ROWS[name], LAYOUTS[layout]
    model, other = seeded(), seeded(seed=1)
    optimizer, resumed = row.make(model), row.make(other)
    train(model, optimizer, 3)
    dcp.save(parts(model, optimizer, options), checkpoint_id=tmp_path)
    expected = train(model, optimizer, 4, 3)
    state = parts(other, resumed, options)
    dcp.load(state, checkpoint_id=tmp_path)
    set_state_dict(
        other,
        resumed,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=options,
    )
    assert train(other, resumed, 4, 3) == expected
    assert same(everything(model, optimizer), everything(other, resumed))


@pytest.mark.usefixtures("one_process")
def test_distributed_checkpoint_of_another_rank(tmp_path):
    """Torch itself compares the sizes, and names the entry."""
    row = ROWS["mkor+adamw"]
    model, other = seeded(), seeded()
    optimizer, resumed = row.make(model), row.make(other, rank=9)
    train(model, optimizer, 3)
    dcp.save(parts(model, optimizer, StateDictOptions()), checkpoint_id=tmp_path)
    state = parts(other, resumed, StateDictOptions())
    with pytest.raises(dcp.CheckpointException, match=f"(?s)Size mismatch.*{PREFIX}"):
        dcp.load(state, checkpoint_id=tmp_path)


# --------------------------------------------------------------------------------- other settings

WAY_OUT = f"begin with {PREFIX}"

FREE = [
    ("mkor+adamw", {"vectors": 3}),
    ("mkor+adamw", {"rows": None}),
    ("mkor+adamw", {"momentum": 0.5}),
    ("mkor+adamw", {"damping": 1.0}),
    ("mkor+adamw", {"update_every": 3}),
    ("mkor+adamw", {"rescale": None}),
    ("mkor+adamw", {"skip_output": False}),
    ("dense[exact]+adamw", {"rule": "paper", "epsilon": None}),
    ("dense[exact]+adamw", {"vectors": 1, "update_every": 2}),
    ("kfac+sgd-momentum", {"damping": 1.0, "inverse_every": 2}),
    ("kfac+sgd-momentum", {"pi_correction": True}),
    ("eva+adamw", {"damping": 1.0, "kl_clip": 0.1}),
]


@pytest.mark.parametrize(("name", "changed"), FREE, ids=str)
def test_settings_that_are_no_part_of_a_checkpoint(name, changed):
    """They are the new optimizer's own; it goes on from the factors that it is given."""
    row = ROWS[name]
    _, state = saved(row)
    kept = continues(row, state, **changed)
    expected = continues(row, state)
    assert same(kept, expected)


HALVES = [
    ("mkor+adamw", torch.bfloat16),
    ("dense[exact]+adamw", torch.bfloat16),
    ("dense[exact]+adamw", torch.float16),
]


@pytest.mark.parametrize(("name", "dtype"), HALVES, ids=str)
def test_other_factor_dtype(name, dtype):
    """Factors are converted, either way."""
    row = ROWS[name]
    wide, narrow = saved(row)[1], saved(row, factor_dtype=dtype)[1]
    expected = [f.to(dtype).float() if f.dim() > 1 else f for f in continues(row, wide)]
    found = continues(row, wide, factor_dtype=dtype)
    for p, q in zip(found, expected, strict=True):
        torch.testing.assert_close(p, q, rtol=0.01, atol=0.01)
    assert same(continues(row, narrow), continues(row, narrow, factor_dtype=dtype))


FIXED = [
    ("mkor+adamw", {"rank": 9}, f"rows of .* shape .*build it with the rank.*{WAY_OUT}"),
    ("mkor+adamw", {"rank": 4}, f"rows of .* shape .*build it with the rank.*{WAY_OUT}"),
    ("mkor+adamw", {"factor_dtype": torch.float16}, f"lacks mkor_left_scale.*{WAY_OUT}"),
    ("mkor+adamw", {"sides": "left"}, f"right_rows besides.*settings .sides.*{WAY_OUT}"),
    ("mkor+adamw", {"skip": ["first"]}, f"for first.weight.*settings .sides, skip.*{WAY_OUT}"),
    ("mkor+adamw", {"hybrid": ROWS["mkor-h+adamw"].defaults["hybrid"]}, "lacks mkor_losses"),
    ("dense[exact]+adamw", {"sides": "right"}, f"left_inverse besides.*{WAY_OUT}"),
    ("kfac+sgd-momentum", {"sides": "left"}, f"right_covariance.*besides.*{WAY_OUT}"),
    ("eva+adamw", {"skip": ["conv"]}, f"for conv.weight.*besides.*{WAY_OUT}"),
]


@pytest.mark.parametrize(("name", "changed", "message"), FIXED, ids=str)
def test_settings_that_give_the_factors_their_shape(name, changed, message):
    """Refused in both directions."""
    row = ROWS[name]
    refused(row, saved(row)[1], message, **changed)
    refused(row, saved(row, **changed)[1], "checkpoint's|the checkpoint has other factors")


@pytest.mark.parametrize(("wrote", "reads"), [(a, b) for a in KINDS for b in KINDS if a != b])
def test_another_kind_of_curvature(wrote, reads):
    first, second = ROWS[wrote], ROWS[reads]
    state = saved(type(first)(first.wrap, second.base, first.defaults))[1]
    refused(second, state, f"lacks .*kind of curvature.*{WAY_OUT}")


def without_factors(state):
    """What the errors advise: the base's part alone."""
    entries = {
        i: {k: v for k, v in entry.items() if not k.startswith(PREFIX)}
        for i, entry in state["state"].items()
    }
    return state | {"state": entries}


def test_the_way_out_works(row):
    """Without the wrapper's entries the base continues, and the factors start anew."""
    _, state = saved(row)
    other = seeded(seed=1)
    optimizer = row.make(other)
    train(other, optimizer, 2)
    optimizer.load_state_dict(without_factors(copy.deepcopy(state)))
    base = row.base(seeded().parameters())
    base.load_state_dict(without_factors(copy.deepcopy(state)))
    assert same(base_state(optimizer), base_state(base))
    assert optimizer.diagnostics()["mkor/updates"] == 0
    assert torch.tensor(train(other, optimizer, 3)).isfinite().all()


# ----------------------------------------------------------------------------------- other layers


class More(Net):
    def __init__(self):
        super().__init__()
        self.more = nn.Linear(8, 8)


class Wider(Net):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3, padding=1)
        self.first = nn.Linear(96, 8)


class Frozen(Net):
    def __init__(self):
        super().__init__()
        self.first.requires_grad_(False)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (More, "parameter groups of .9. parameters, this optimizer of .10|11.*same model"),
        (Wider, f"of conv.weight is of shape.*for the model that wrote it.*{WAY_OUT}"),
        (Frozen, f"for first.weight.*frozen layers.*{WAY_OUT}"),
    ],
)
def test_other_layers(row, make, message):
    refused(row, saved(row)[1], message, make=make)


def test_frozen_after_wrapping(row):
    """The set of layers is that of the construction: freezing later changes no checkpoint."""
    _, state = saved(row)
    other = seeded(seed=1)
    optimizer = row.make(other)
    other.first.requires_grad_(False)
    optimizer.load_state_dict(state)
    assert torch.tensor(train(other, optimizer, 2)).isfinite().all()


# ------------------------------------------------------------------------------------ other bases

BASES = ["sgd", "adamw", "rmsprop", "adagrad", "adafactor", "lamb", "soap", "schedule-free"]
# From one without state to each, and from each to one with state.
PAIRS = [("adamw", "sgd"), *(("sgd", name) for name in BASES[1:])]
PAIRS += [(name, "adamw") for name in BASES[2:]]


@pytest.mark.parametrize(("wrote", "reads"), PAIRS)
def test_another_base(wrote, reads):
    """Torch would load it and fail in the next step; the factors alone can be taken over."""
    row = ROWS[f"mkor+{reads}"]
    state = saved(ROWS[f"mkor+{wrote}"])[1]
    refused(row, state, f"another base.*wrap the base that wrote it.*{WAY_OUT}")
    refused(row, without_factors(state), "another base")
    model = seeded(seed=1)
    optimizer = row.make(model)
    own = {
        i: {k: v for k, v in entry.items() if k.startswith(PREFIX)}
        for i, entry in state["state"].items()
    }
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict(copy.deepcopy({"state": own, "param_groups": groups}))
    assert base_state(optimizer) == []
    assert optimizer.diagnostics()["mkor/updates"] == 3
    assert torch.tensor(train(model, optimizer, 3)).isfinite().all()


def test_base_with_other_options():
    """They are the checkpoint's from then on, as torch has it; a scheduler may have added some."""
    _, state = saved(ROWS["mkor+sgd"])
    other = seeded()
    optimizer = ROWS["mkor+sgd-momentum"].make(other)
    torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, 10)
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["momentum"] == 0
    train(other, optimizer, 2)


def test_older_torch():
    """Versions of torch add options to a base, and schedulers do: neither makes it another base."""
    row = ROWS["mkor+adamw"]
    model, other = seeded(), seeded()
    optimizer, resumed = row.make(model), row.make(other)
    torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, 10)
    train(model, optimizer, 3)
    state = copy.deepcopy(optimizer.state_dict())
    for group in state["param_groups"]:
        del group["decoupled_weight_decay"]
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(state)
    assert train(model, optimizer, 2) == train(other, resumed, 2)


# --------------------------------------------------------------------------------- other versions

FORMAT = {
    "mkor+sgd": {
        "updates": ((), torch.int64),
        "written": ((), torch.int64),
        "weights": ((6,), torch.float32),
        "left_rows": ((6, 8), torch.float32),
        "left_mean_square": ((), torch.float32),
        "right_rows": ((6, 48), torch.float32),
        "right_mean_square": ((), torch.float32),
    },
    "dense[paper]+sgd": {
        "updates": ((), torch.int64),
        "left_inverse": ((8, 8), torch.float32),
        "right_inverse": ((49, 49), torch.float32),
    },
    "kfac+sgd-momentum": {
        "updates": ((), torch.int64),
        "inverted": ((), torch.bool),
        "damping_factor": ((), torch.float32),
        "left_inverse": ((8, 8), torch.float32),
        "left_covariance": ((8, 8), torch.float32),
        "right_inverse": ((49, 49), torch.float32),
        "right_covariance": ((49, 49), torch.float32),
    },
    "eva-h[step]+sgd": {
        "updates": ((), torch.int64),
        "left_vector": ((8,), torch.float32),
        "right_vector": ((49,), torch.float32),
        "losses": ((2,), torch.float32),
        "switch": ((8,), torch.float64),
    },
}
ALWAYS = {
    "counters": ((4,), torch.int64),
    "norms": ((2,), torch.float32),
    "output": ((), torch.int8),
}


@pytest.mark.parametrize("name", FORMAT)
def test_format_of_version_2(name):
    """Whoever changes what is here makes a version 3 that still reads this one, and version 1."""
    _, state = saved(ROWS[name])
    entry = state["state"][2]  # of the layer "first"
    own = {k: (tuple(v.shape), v.dtype) for k, v in entry.items() if k.startswith(PREFIX)}
    assert own == {PREFIX + key: value for key, value in (FORMAT[name] | ALWAYS).items()}
    assert entry[COUNTERS].tolist() == [2, 3, 3, 1]  # version, steps, updates, micro-batches


def with_counters(state, counters):
    state = copy.deepcopy(state)
    for entry in state["state"].values():
        entry[COUNTERS] = copy.deepcopy(counters)
    return state


def test_newer_version(row):
    _, state = saved(row)
    for version in (3, 17):
        newer = with_counters(state, torch.tensor([version, 3, 3, 1]))
        refused(row, newer, f"format {version}, this version of mkor reads up to 2: update mkor")


@pytest.mark.parametrize(
    "counters",
    [torch.tensor([0, 3, 3, 1]), torch.tensor([1, 3, 3]), [1, 3, 3, 1], None],
    ids=["version 0", "too short", "a list", "none"],
)
def test_no_version_that_ever_was(row, counters):
    """Version 1 was the first; anything else is damage."""
    refused(row, with_counters(saved(row)[1], counters), f"lack a valid {COUNTERS}.*{WAY_OUT}")


# --------------------------------------------------------------------------------------- damage


def test_truncated_file(row, tmp_path):
    """Torch's reader refuses it, wherever it was cut, so nothing of it gets here."""
    _, state = saved(row)
    path = tmp_path / "optimizer.pt"
    torch.save(state, path)
    whole = path.read_bytes()
    for share in (0.0, 0.1, 0.5, 0.9, 0.999):
        path.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises((EOFError, OSError, RuntimeError)):
            torch.load(path, weights_only=True)
    path.write_bytes(whole)
    continues(row, torch.load(path, weights_only=True))


@pytest.mark.usefixtures("one_process")
def test_truncated_distributed_checkpoint(row, tmp_path):
    """As above; the optimizer that was to be loaded is sound, and trains on."""
    model = seeded()
    optimizer = row.make(model)
    train(model, optimizer, 3)
    dcp.save(parts(model, optimizer, StateDictOptions()), checkpoint_id=tmp_path)
    (file,) = tmp_path.glob("*.distcp")
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(dcp.CheckpointException):
        dcp.load(parts(model, optimizer, StateDictOptions()), checkpoint_id=tmp_path)
    assert torch.tensor(train(model, optimizer, 2)).isfinite().all()


@pytest.mark.parametrize("cut", ["entry", "factor", "no tensor", "groups", "state", "counters"])
def test_incomplete_state(row, cut):
    """A state dict that lacks something says what, and for which parameter."""
    _, state = saved(row)
    entry = state["state"][2]
    factor = next(k for k in sorted(entry) if "left" in k)
    if cut == "entry":
        del state["state"][2]
        message = f"for first.weight: it lacks {COUNTERS}.*{factor}.*{WAY_OUT}"
    elif cut == "factor":
        del entry[factor]
        message = f"for first.weight: it lacks {factor} and.*{WAY_OUT}"
    elif cut == "no tensor":
        entry[factor] = None
        message = f"{factor} of first.weight is no tensor.*{WAY_OUT}"
    elif cut == "counters":
        del state["state"][0][COUNTERS]
        message = f"lack a valid {COUNTERS}"
    else:
        del state["param_groups" if cut == "groups" else "state"]
        message = r"no optimizer's checkpoint.*pass what optimizer.state_dict\(\) returned"
    refused(row, state, message)


def test_something_else_than_a_state_dict(row):
    """The usual mistakes: the model's, or the whole file with both in it."""
    model, state = saved(row)
    message = r"no optimizer's checkpoint, it holds {}.*pass what optimizer.state_dict"
    refused(row, model.state_dict(), message.format("conv.weight, conv.bias"))
    refused(row, {"model": {}, "optimizer": state}, message.format("model, optimizer"))
    refused(row, {}, "no optimizer's checkpoint")


def test_damaged_factors_pass_raw_gradients(row):
    """Factors that are not finite are loaded as they are: the gradient stays raw, and counts."""
    _, state = saved(row)
    for key, value in state["state"][2].items():
        if key.startswith(PREFIX) and "_norms" not in key and value.is_floating_point():
            value.fill_(float("nan"))
    model = seeded()
    optimizer = row.make(model)
    optimizer.load_state_dict(state)
    backward(model, 3)
    raw = model.first.weight.grad.clone()
    optimizer.step()
    assert torch.equal(raw, model.first.weight.grad)
    assert optimizer.diagnostics()["mkor/raw_gradients"] > 0


def test_every_entry_says_its_version(row):
    """So that any part of a sharded checkpoint can be told."""
    _, state = saved(row)
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    for entry in torch.load(file, weights_only=True)["state"].values():
        assert entry[COUNTERS][0] == 2
