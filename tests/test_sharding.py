"""FSDP2's shards: where each process' block is in the whole, and sums over all of them."""

import pytest
import torch

from launches import launches_of
from sharded import ALL, BLOCKS, CASES, PARALLEL, STEPS, SUMS, TURNED

ONLY_ON_THREE = {"hybrid, three copies", "sum, two of three"}
ON_THREE = {"rows", "placed", "sum", *ONLY_ON_THREE}
ON_THREE |= {name for name in ALL if name.startswith(("window", "eva"))}


def run(place, name):
    return CASES[name](place)


_launches = launches_of(run)


def pairs(names):
    both = [(2, name) for name in names if name not in ONLY_ON_THREE]
    return both + [(3, name) for name in names if name in ON_THREE]


# ---------------------------------------------------------------------------------------- blocks


@pytest.mark.parametrize(("world", "name"), pairs(BLOCKS))
def test_blocks(launches, world, name):
    """Each is where the shard says it is, and together they are the whole, each entry once."""
    values = launches(world)[name]
    copies = {"hybrid, two copies": 2, "hybrid, three copies": 3}.get(name, 1)
    for layer, first in values[0].items():
        d_out, d_in = first["shape"]
        assert [d_out, d_in] == list(first["whole"].shape)
        seen, seen_b = torch.zeros(d_out, d_in), torch.zeros(d_out)
        for value in values:
            one = value[layer]
            rows, columns, bias = (slice(*one[key]) for key in ("rows", "columns", "bias"))
            assert torch.equal(one["here"], one["whole"][rows, columns])
            assert one["cut"] == first["cut"]
            assert one["sharing"] == ([world // copies] if world > copies else [])
            seen[rows, columns] += 1
            if "b" in one:
                assert torch.equal(one["b"], one["whole b"][bias])
                seen_b[bias] += 1
            else:
                assert one["bias"] == [0, 0]
        assert (seen == copies).all()
        assert "b" not in first or (seen_b == copies).all()
        turned = (layer in TURNED) is not ("placed" in name)
        assert first["cut"] == ("columns" if turned else "rows")


@pytest.mark.parametrize(
    ("world", "name", "expected"),
    [
        (2, "rows", {"wide": [[0, 9], [9, 17]], "narrow": [[0, 1], [1, 1]]}),
        (3, "rows", {"wide": [[0, 6], [6, 12], [12, 17]], "narrow": [[0, 1], [1, 1], [1, 1]]}),
        (3, "rows", {"conv": [[0, 2], [2, 4], [4, 5]]}),
    ],
)
def test_uneven_rows(launches, world, name, expected):
    values = launches(world)[name]
    for layer, places in expected.items():
        assert [value[layer]["rows"] for value in values] == places
        assert [value[layer]["bias"] for value in values] == places
        assert all(value[layer]["columns"] == [0, value[layer]["shape"][1]] for value in values)


@pytest.mark.parametrize(("world", "name"), [(2, "rows"), (3, "rows")])
def test_bias_of_a_transposed_weight_is_cut_elsewhere(launches, world, name):
    values = launches(world)[name]
    columns = {2: [[0, 3], [3, 6]], 3: [[0, 2], [2, 4], [4, 6]]}[world]
    bias = {2: [[0, 7], [7, 13]], 3: [[0, 5], [5, 10], [10, 13]]}[world]
    assert [value["turned.0"]["columns"] for value in values] == columns
    assert [value["turned.0"]["bias"] for value in values] == bias
    assert all(value["turned.0"]["rows"] == [0, 13] for value in values)


@pytest.mark.parametrize(("world", "name"), [(2, "mixed precision")])
def test_mixed_precision_keeps_gradients_in_the_weights_dtype(launches, world, name):
    for value in launches(world)[name]:
        assert {layer["here"].dtype for layer in value.values()} == {torch.float32}


@pytest.mark.parametrize(("world", "name"), [(2, "keys")])
def test_equal_shards(launches, world, name):
    """The third is cut otherwise, the fourth has no bias; the last has a mesh of its own."""
    kinds = [0, 0, 1, 2, 0]
    assert launches(world)[name] == [[[a == b for a in kinds] for b in kinds]] * world


@pytest.mark.parametrize(("world", "name"), pairs(SUMS))
def test_sums_are_taken_over_one_copy(launches, world, name):
    values = launches(world)[name]
    sharing = {"sum, two copies": [[0], [1]], "sum, two of three": [[0, 1], [2]]}
    for ranks in sharing.get(name, [range(world)]):
        expected = [float(len(ranks)), sum(10.0**rank for rank in ranks)]
        assert [values[rank].tolist() for rank in ranks] == [expected] * len(ranks)


@pytest.mark.parametrize(("world", "name"), pairs(ALL))
def test_preconditioned_blocks_are_those_of_the_whole(launches, world, name):
    for value in launches(world)[name]:
        for layer in value.values():
            for key in ("", " b"):
                found, expected = layer[f"found{key}"], layer[f"expected{key}"]
                if expected is not None:
                    assert (found - expected).norm() <= 1e-12 * expected.norm()


@pytest.mark.parametrize(("world", "name"), pairs(STEPS))
def test_the_base_steps_on_what_is_written(launches, world, name):
    for value in launches(world)[name]:
        torch.testing.assert_close(value, torch.full_like(value, 0.5))


# -------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(("world", "name"), pairs(PARALLEL))
def test_tensor_parallel_models_are_refused(launches, world, name):
    layer = "0" if "colwise" in name else "1"
    for value in launches(world)[name]:
        assert value["model"].startswith(f"{layer}.weight is tensor-parallel")
        if "sharded" in name:
            assert value["layer"].startswith("the layer is tensor-parallel, or cut more than once")
        assert all("fully_shard (FSDP2) alone" in message for message in value.values())


@pytest.mark.parametrize(("world", "name"), [(2, "odd")])
def test_other_shards_are_refused(launches, world, name):
    expected = {
        "by hand": "weight is tensor-parallel",
        "copied bias": "copied bias has a bias that is sharded otherwise than its weight",
        "plain bias": "plain bias has a weight that is sharded, but a bias that is not",
        "sharded bias": "sharded bias has a bias that is sharded, but a weight that is not",
        "rows and bias": "rows and bias has a bias that is cut at other places than its weight",
        "kernel": "kernel is cut along dimension 2 of its weight",
    }
    for value in launches(world)[name]:
        assert value.keys() == expected.keys()
        for key, message in expected.items():
            assert value[key].startswith(message), key


@pytest.mark.parametrize(("world", "name"), [(2, "accepted")])
def test_everything_else_is_accepted(launches, world, name):
    assert launches(world)[name] == [[0, 3]] * world


@pytest.mark.parametrize(("world", "name"), [(2, "looked at")])
def test_a_forward_pass_alone_leaves_whole_weights_until_resharded(launches, world, name):
    expected = [[True, True], [False, True], [True, True], [True, True]]
    assert launches(world)[name] == [expected] * world
