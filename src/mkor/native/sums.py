"""Sums over rows and patches: ``calls.h``, ``rows.h`` and ``images.h``."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from mkor.native.loading import kernels

__all__ = ["NO_IMAGES", "Images", "Parts", "Plan", "add_call", "side_sums"]


class Parts(NamedTuple):
    """Parts of neighbouring samples: the first ``extra`` have one sample more than the others.

    Attributes:
        vectors: Number of parts, ``k``.
        size: Samples of a part.
        stride: Distance of the starts of neighbouring parts, beside the extra samples before.
        offset: Where the first part starts.
        extra: Parts with one sample more.
        unit: Rows of a sample.
    """

    vectors: int
    size: int
    stride: int
    offset: int = 0
    extra: int = 0
    unit: int = 1


class Images(NamedTuple):
    """Images that hold patches, and which of them are used.

    Attributes:
        sizes: Channels, height and width.
        kernel, stride, dilation: Of the convolution, by axis.
        before: Padding with zeros, by axis.
        lines: Of the output: the first and how many.
        across: Columns of the output.
    """

    sizes: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    before: tuple[int, ...]
    lines: tuple[int, ...]
    across: int

    @property
    def row(self) -> int:
        """Entries of a patch."""
        return math.prod((self.sizes[0], *self.kernel))

    @property
    def numbers(self) -> list[int]:
        """All of them in order."""
        groups = (self.sizes, self.kernel, self.stride, self.dilation, self.before, self.lines)
        return [n for group in groups for n in group] + [self.across]


NONE = (0, 0)
NO_IMAGES = Images((0, 0, 0), NONE, NONE, NONE, NONE, NONE, 0)
"""Stands where there are plain rows."""


class Plan:
    """How calls of one shape are summed in an update.

    Args:
        parts: Of the samples.
        rows: Patches of a sample that are used; 1 for plain rows.
        total: Rows of a call, used or not.
        widths: Entries of a row of inputs and of output gradients.
        images: Where these are images.

    Raises:
        ValueError: Patches are not as wide as rows are.

    Attributes:
        counts: Rows in each part.
        total: As above.
        reads: About how many entries are read for the wider side.
        widths: As above.
        address: Of all these numbers, for the kernels.
    """

    __slots__ = ("_numbers", "address", "counts", "reads", "total", "widths")

    def __init__(
        self,
        parts: Parts,
        rows: int,
        total: int,
        widths: tuple[int, int],
        images: tuple[Images, Images] = (NO_IMAGES, NO_IMAGES),
    ) -> None:
        numbers = [*parts, rows, total]
        for width, of_images in zip(widths, images, strict=True):
            # Kernels write as much as the images say, into places as wide as the rows are said to.
            if of_images.row not in (0, width):
                raise ValueError(f"patches have {of_images.row} entries, but rows {width}")
            numbers += [width, *of_images.numbers]
        self._numbers = array("q", numbers)
        self.address = self._numbers.buffer_info()[0]
        each = parts.unit * rows
        self.counts = [(parts.size + (j < parts.extra)) * each for j in range(parts.vectors)]
        self.total, self.widths = total, widths
        channels = [im.sizes[0] or d for im, d in zip(images, widths, strict=True)]
        self.reads = sum(self.counts) * max(channels)


def side_sums(plan: Plan, side: int, xs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Sums of the rows of each part, and of the squares of all their entries.

    Args:
        plan: For calls like these.
        side: 0 for inputs, 1 for output gradients.
        xs: ``n`` tensors that are alike.

    Returns:
        ``[n, k, d]`` and ``[n]``.
    """
    k, d = len(plan.counts), plan.widths[side]
    sums, squares = xs[0].new_empty(len(xs), k, d), xs[0].new_empty(len(xs))
    into, square = sums.data_ptr(), squares.data_ptr()
    for i, x in enumerate(xs):
        kernels().side_sums(plan.address, side, x.data_ptr(), into + 4 * i * k * d, square + 4 * i)
    return sums, squares


def add_call(plan: Plan, a: Tensor, g: Tensor, into: Sequence[int]) -> None:
    """Add the sums of a call's inputs and output gradients to their places.

    Args:
        plan: For calls like this.
        a: Its inputs.
        g: Its output gradients.
        into: Addresses of the places of both, ``[k, d]``, 0 for one that is left out, and of the
            counts, see :class:`mkor.capture.site.Site`.
    """
    kernels().add_call(plan.address, a.data_ptr(), g.data_ptr(), *into)
