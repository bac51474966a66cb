"""Kernels for what is small and often in a step, on a CPU and in float32.

Between the products of a step an operator on a few numbers takes up to 114 microseconds
(``benchmarks/processor.py``), since its code and its tensors are gone from the processor's caches:
a dozen of them take longer than what they compute. Each function here is one call of C in their
place; products of matrices stay with torch. The kernels are compiled when the package is installed.
Where that was not possible, and for other devices and dtypes, torch's operators compute the same;
the environment variable ``MKOR_NATIVE=0`` says so for everything. Long loops are compiled for
several kinds of processors, and the best that can run does; ``MKOR_NATIVE=plain``, ``avx2`` or
``avx512`` asks for one of them.
"""

from mkor.native.layers import check, count, finite, gather, joint_norms, ratio, scatter, usable
from mkor.native.loading import addresses, in_use, pays, serves, version
from mkor.native.sums import Images, Parts, Plan, add_call, side_sums
from mkor.native.windows import Side, remove_bias, remove_rows, root, update_window

__all__ = [
    "Images",
    "Parts",
    "Plan",
    "Side",
    "add_call",
    "addresses",
    "check",
    "count",
    "finite",
    "gather",
    "in_use",
    "joint_norms",
    "pays",
    "ratio",
    "remove_bias",
    "remove_rows",
    "root",
    "scatter",
    "serves",
    "side_sums",
    "update_window",
    "usable",
    "version",
]
