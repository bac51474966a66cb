"""Pure functions, one per equation of the method. Nothing here keeps state.

Shapes, used everywhere in the package; ``B`` layers of one shape form a batch:

* ``W [B, d_out, d_in]``, ``b [B, d_out]``: gradient of weight and bias, together ``M = [W b]``;
* ``V [B, r, d]``: the newest ``r`` statistics vectors of one side, one per row;
* ``U [B, r, d]``: the whitened vectors; ``I - U^T U`` is the side's preconditioner;
* ``u [B, r]``: the column of ``U`` that belongs to the constant input 1 of a bias;
* ``H [B, d, d]``: the explicit inverse of one side, symmetric.
"""

from __future__ import annotations

from mkor.linalg.basics import (
    all_finite,
    all_hold,
    append_ones,
    bias_correction,
    cut,
    held,
    joined,
    momentum_average,
    times,
    where,
)
from mkor.linalg.inverses import (
    bilinear,
    damped_inverse,
    multiply_left,
    multiply_right,
    rank_one_coefficient,
    rank_one_denominator,
    rank_one_term,
)
from mkor.linalg.norms import inner, joint_norm, kl_scale, largest_entry, norm_ratio, row_sum_norm
from mkor.linalg.windows import (
    left_products,
    remove_left,
    remove_right,
    right_products,
    subtract_both,
    subtract_left,
    subtract_right,
    whitening_roots,
)

__all__ = [
    "all_finite",
    "all_hold",
    "append_ones",
    "bias_correction",
    "bilinear",
    "cut",
    "damped_inverse",
    "held",
    "inner",
    "joined",
    "joint_norm",
    "kl_scale",
    "largest_entry",
    "left_products",
    "momentum_average",
    "multiply_left",
    "multiply_right",
    "norm_ratio",
    "rank_one_coefficient",
    "rank_one_denominator",
    "rank_one_term",
    "remove_left",
    "remove_right",
    "right_products",
    "row_sum_norm",
    "subtract_both",
    "subtract_left",
    "subtract_right",
    "times",
    "where",
    "whitening_roots",
]
