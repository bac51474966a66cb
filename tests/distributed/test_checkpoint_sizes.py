"""Saved on 2 processes, continued on 1, 2 and 3: equal to a run that never stopped."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

import mkor
from distributed.test_ddp import SWITCH
from distributed.test_ddp import distributed as ddp
from distributed.test_fsdp import LAYERS, SWAPPED, sharded
from distributed.test_kaisa import OWN
from distributed.test_kaisa import distributed as kaisa
from support.alike import assert_factors_equal, assert_in_step
from support.launches import Launches, Results
from support.nets import ConvNet, Tokens
from support.parallel import DENSE, EVERY, F32, WHOLE, Case, alone, reference, train

HALF = 3
"""Steps before the checkpoint, of 6; with an update every other step, one is under way."""
KFAC = {"wrap": mkor.KFAC, "options": EVERY | {"damping": 0.1}}

DDP = {
    "DDP, float32": Case(dtype=F32),
    "DDP": Case(every="uneven"),
    "DDP, every other step": Case(options=WHOLE | {"update_every": 2}),
    "DDP, dense": Case(wrap=mkor.DenseMKOR, options=DENSE | {"update_every": 2}),
    "DDP, Eva": Case(wrap=mkor.Eva, options=EVERY | {"damping": 3e-3}),
    "DDP, KFAC": Case(**KFAC),
    "DDP, hybrid": Case(options=WHOLE | {"hybrid": SWITCH}, steps=12),
}
KAISA = {
    "KAISA, least": Case(**KFAC, setup={"fraction": "least"}),
    "KAISA, most": Case(**KFAC, setup={"fraction": "most"}),
    "KAISA, old inverses": Case(
        wrap=mkor.KFAC,
        options=EVERY | {"damping": 0.1, "inverse_every": 2},
        setup={"fraction": "least"},
    ),
}
FSDP = {
    "FSDP2, float32": Case(dtype=F32, setup=LAYERS),
    "FSDP2": Case(every="uneven"),
    "FSDP2, over AdamW": Case(ConvNet, base="adamw"),
    "FSDP2, transposed": Case(Tokens, base="adamw"),
    "FSDP2, swapped": Case(setup=SWAPPED),
    "FSDP2, a 2-D mesh": Case(setup={"mesh": "replicas"}),
    "FSDP2, every other step": Case(options=WHOLE | {"update_every": 2}),
    "FSDP2, dense": Case(wrap=mkor.DenseMKOR, options=DENSE | {"update_every": 2}),
    "FSDP2, Eva": Case(wrap=mkor.Eva, options=EVERY | {"damping": 3e-3}),
    "FSDP2, KFAC": Case(**KFAC),
    "FSDP2, hybrid": Case(options=WHOLE | {"hybrid": SWITCH}, steps=12),
}
PLAIN = {"FSDP2, then not sharded": Case(every="uneven")}
FULL = {"FSDP2, whole": Case(base="adamw", every="uneven")}
CASES = DDP | KAISA | FSDP | PLAIN | FULL
STOPS = {name: 9 if "hybrid" in name else HALF for name in CASES}
WHOLES = StateDictOptions(full_state_dict=True, cpu_offload=True)


def setup_of(name):
    return kaisa if name in KAISA else ddp if name in DDP else sharded


def save(place, name):
    """The first half, on two processes, and its checkpoint."""
    path = str(place.folder.parent / name)

    def write(model, optimizer):
        if name in DDP | KAISA:
            state = {"model": model.module.state_dict(), "optimizer": optimizer.state_dict()}
            if place.rank == 0:
                torch.save(state, path)
        elif name in FULL:
            state = get_state_dict(model, optimizer, options=WHOLES)
            if place.rank == 0:
                torch.save(state, path)
        else:
            parts = get_state_dict(model, optimizer)
            dcp.save(dict(zip(("model", "optimizer"), parts, strict=True)), checkpoint_id=path)

    case = dataclasses.replace(CASES[name], steps=STOPS[name])
    return train(case, setup_of(name), place.rank, place.world, save=write)


def resume(place, name):
    """The second half, on any number of processes, from another start."""
    path = str(place.folder.parent / name)

    def read(model, optimizer):
        with torch.no_grad():
            for p in model.parameters():
                p.zero_()
        if name in DDP | KAISA:
            state = torch.load(path, weights_only=True)
            model.module.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
        elif name in FULL:
            parts = torch.load(path, weights_only=True) if place.rank == 0 else ({}, {})
            how = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
            set_model_state_dict(model, parts[0], options=how)
            set_optimizer_state_dict(model, optimizer, parts[1], options=how)
        else:
            parts = get_state_dict(model, optimizer)
            state = dict(zip(("model", "optimizer"), parts, strict=True))
            dcp.load(state, checkpoint_id=path)
            set_state_dict(
                model,
                optimizer,
                model_state_dict=state["model"],
                optim_state_dict=state["optimizer"],
            )

    setup = alone if name in PLAIN else setup_of(name)
    return train(CASES[name], setup, place.rank, place.world, start=STOPS[name], load=read)


@pytest.fixture(scope="module", name="launches")
def _launches(request, tmp_path_factory):
    launches = Launches(resume, request, tmp_path_factory.mktemp("sizes"))
    launches.saved = Results(save, 2, launches.folder / "saved", launches.names)
    return launches


MAIN = {"DDP, float32", "DDP", "DDP, hybrid", "KAISA, least"}
MAIN |= {"FSDP2, float32", "FSDP2", "FSDP2, hybrid"}
"""What goes on with every number of processes; the rest with another one than it was saved on."""
ON_ONE = {"FSDP2, over AdamW", "FSDP2, transposed", "FSDP2, Eva", "FSDP2, KFAC", *PLAIN}
ON_ONE |= {"DDP, dense", "DDP, Eva", "DDP, KFAC"}
"""Of this rest, what goes on with one process; the others with three."""


def pairs():
    worlds = {
        name: (1, 2, 3) if name in MAIN else (1,) if name in ON_ONE else (3,) for name in CASES
    }
    return [(world, name) for world in (1, 2, 3) for name in CASES if world in worlds[name]]


@pytest.mark.parametrize(("world", "name"), pairs())
def test_continues_as_if_it_had_never_stopped(launches, world, name):
    """Weights after every further step, factors and decisions are those of the whole run."""
    before, expected, case = launches.saved[name], reference(CASES, name), CASES[name]
    own = OWN if name in KAISA else "\0"
    assert len(before[0]["weights"]) == STOPS[name] + 1
    values = launches(world)[name]
    assert_in_step(values, own=own)
    assert len(values[0]["weights"]) == case.steps - STOPS[name] + 1
    assert_factors_equal(values[0], expected, case.dtype, own=own)


@pytest.mark.parametrize("name", ["DDP, hybrid", "FSDP2, hybrid"])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_switch_stays_made(launches, world, name):
    """It happened before the checkpoint was written."""
    switched = reference(CASES, name)["switched at"]
    assert 0 < switched <= STOPS[name]
    assert all(value["switched at"] == switched for value in launches(world)[name])
