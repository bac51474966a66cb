"""The optimizers: each picks its parts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.optim import Optimizer

from mkor.curvature.dense import DenseInverse
from mkor.curvature.eva import RankOne
from mkor.curvature.kfac import Covariance
from mkor.curvature.window import Window
from mkor.options import WrapperOptions
from mkor.wrapper import Preconditioned

if TYPE_CHECKING:
    from typing_extensions import Unpack


class MKOR(Preconditioned):
    """Second-order steps from a window of mean vectors, over any base optimizer.

    Each layer's gradient ``M [d_out, d_in]`` becomes ``L^-1 M R^-1`` with factors built from the
    newest ``rank`` mean vectors of its inputs and output gradients. Beside the base's step that
    costs ``8 rank d_out d_in`` operations and ``rank (d_out + d_in)`` numbers per layer.

    Example:
        >>> import torch
        >>> from mkor import MKOR
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        >>> optimizer = MKOR(model, torch.optim.AdamW(model.parameters(), lr=3e-3))
        >>> model(torch.ones(16, 4)).square().mean().backward()
        >>> optimizer.step()
        >>> [row.parameter for row in optimizer.coverage() if row.preconditioned]
        ['0.weight', '0.bias']

    Args:
        model: The model to train.
        optimizer: The base, over the model's parameters.
        rank: Vectors kept per side, ``r``.
        vectors: Vectors per update, ``k``, at most ``rank``.
        rows: Rows (tokens, images, output positions) averaged in a vector, counted over all
            micro-batches and processes; None uses every row.
        momentum: Decay of a vector's weight per update, ``gamma``.
        damping: ``lambda`` relative to the mean square of a row's entries.
        factor_dtype: Of the stored vectors; None for float32, or float64 where the weight is.
        update_every: Steps between updates of the factors.
        rescale: ``"running"``, ``"step"`` or None; see :class:`Preconditioned`.
        kl_clip: Instead of ``rescale``; give ``rescale=None`` with it.
        **wrapper: ``skip``, ``skip_output``, ``sides``, ``nonfinite``, ``hybrid`` and
            ``process_group``, as for :class:`Preconditioned`. Over Muon,
            ``sides="left"`` alone is better.

    Raises:
        TypeError: An argument has the wrong type, or the base needs a closure.
        ValueError: An argument is out of range, or model and base do not fit together.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        rank: int = 64,
        vectors: int = 16,
        rows: int | None = 32,
        momentum: float = 0.98,
        damping: float = 0.02,
        factor_dtype: torch.dtype | None = None,
        update_every: int = 1,
        rescale: str | None = "running",
        kl_clip: float | None = None,
        **wrapper: Unpack[WrapperOptions],
    ) -> None:
        super().__init__(
            model,
            optimizer,
            Window(rank, vectors, rows, momentum, damping, factor_dtype),
            update_every=update_every,
            rescale=rescale,
            kl_clip=kl_clip,
            **wrapper,
        )


class DenseMKOR(Preconditioned):
    """MKOR as the paper has it: explicit inverses, updated by rank-1 terms.

    A layer's gradient ``M [d_out, d_in]`` becomes ``L^-1 M R^-1`` with inverses kept as ``d x d``
    matrices. An update costs ``O(vectors * d^2)``, preconditioning ``2 d_out d_in (d_out + d_in)``
    operations a step. Algorithm 1 of Mozaffari et al., "MKOR", NeurIPS 2023; the window factor of
    :class:`MKOR` is better and cheaper.

    Args:
        model: The model to train.
        optimizer: The base, over the model's parameters.
        rule: ``"paper"``, Algorithm 1 as printed; ``"exact"``, Sherman-Morrison of the average of
            ``v v^T``; ``"release"``, the authors' code. Three different preconditioners.
        vectors: Vectors per update, ``k``.
        rows: Rows averaged in a vector; None uses every row.
        momentum: ``gamma``.
        epsilon: The stabilizer (lines 5-6) acts on a side when the largest entry of its inverse, in
            absolute value, exceeds this; None turns it off.
        zeta: What the stabilizer keeps: ``H <- zeta H + (1-zeta) I``.
        factor_dtype: Of the stored inverses, float16 or bfloat16 too; None for float32, or float64
            where the weight is.
        update_every: Steps between updates of the factors.
        rescale: ``"step"`` as in lines 9-10, ``"running"`` or None.
        kl_clip: Instead of ``rescale``; give ``rescale=None`` with it.
        **wrapper: ``skip``, ``skip_output``, ``sides``, ``nonfinite``, ``hybrid`` and
            ``process_group``, as for :class:`Preconditioned`.

    Raises:
        TypeError: An argument has the wrong type, or the base needs a closure.
        ValueError: An argument is out of range, or model and base do not fit together.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        rule: str = "paper",
        vectors: int = 1,
        rows: int | None = None,
        momentum: float = 0.95,
        epsilon: float | None = 10.0,
        zeta: float = 0.4,
        factor_dtype: torch.dtype | None = None,
        update_every: int = 10,
        rescale: str | None = "step",
        kl_clip: float | None = None,
        **wrapper: Unpack[WrapperOptions],
    ) -> None:
        super().__init__(
            model,
            optimizer,
            DenseInverse(rule, vectors, rows, momentum, epsilon, zeta, factor_dtype),
            update_every=update_every,
            rescale=rescale,
            kl_clip=kl_clip,
            **wrapper,
        )


class KFAC(Preconditioned):
    """The baseline KAISA: Kronecker factors from full covariances.

    ``P = (G + lambda I)^-1 M (A + lambda I)^-1`` with averages of ``a a^T`` and ``g g^T`` over all
    rows (Martens & Grosse 2015; Pauloski et al., "KAISA", SC 2021). A step costs ``2 n d^2`` more
    for ``n`` rows, an inversion ``O(d^3)``, communication ``O(d^2)``.

    Args:
        model: The model to train.
        optimizer: The base, over the model's parameters.
        momentum: Of the averages, ``gamma``.
        damping: ``lambda``, in the units of the covariances, where ``g`` belongs to a single row's
            loss, not divided by the number of rows.
        update_every: Steps between updates of the covariances.
        inverse_every: Steps between inversions, a multiple of ``update_every``; None inverts with
            each update. If a factorisation fails, the old inverse stays in use and the layer's
            damping grows tenfold, to be halved again by each success.
        pi_correction: Share the damping between the sides by their scale (Martens & Grosse,
            section 6.3).
        grad_worker_fraction: Which share of ``W`` processes holds a layer's inverses and
            preconditions its gradient (KAISA). Each inverse is computed once. With 1 all processes
            get it; with ``1 / W`` only one needs its memory, and sends the preconditioned gradient
            to the others in every step; between them there are ``n = fraction * W`` such processes,
            which must divide ``W``.
        kl_clip: See :class:`Preconditioned`; None for none.
        rescale: Instead of ``kl_clip``; give ``kl_clip=None`` with it.
        **wrapper: ``skip``, ``skip_output``, ``sides``, ``nonfinite``, ``hybrid`` and
            ``process_group``, as for :class:`Preconditioned`.

    Raises:
        TypeError: An argument has the wrong type, or the base needs a closure.
        ValueError: An argument is out of range, or model and base do not fit together.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        momentum: float = 0.95,
        damping: float = 0.001,
        update_every: int = 1,
        inverse_every: int | None = None,
        pi_correction: bool = False,
        grad_worker_fraction: float = 1.0,
        kl_clip: float | None = 0.001,
        rescale: str | None = None,
        **wrapper: Unpack[WrapperOptions],
    ) -> None:
        updates = _updates_between(inverse_every, update_every)
        super().__init__(
            model,
            optimizer,
            Covariance(momentum, damping, updates, pi_correction, grad_worker_fraction),
            update_every=update_every,
            kl_clip=kl_clip,
            rescale=rescale,
            **wrapper,
        )


class Eva(Preconditioned):
    """The baseline Eva: one averaged mean vector per side and a closed form for the layer.

    ``P = (M - (g^T M a / (|a|^2 |g|^2 + delta)) g a^T) / delta`` (Zhang, Shi & Li, ICLR 2023). The
    averages weigh the old by ``momentum``, as the paper has it.

    Args:
        model: The model to train.
        optimizer: The base, over the model's parameters.
        momentum: Weight of the old average.
        damping: ``delta``.
        update_every: Steps between updates of the averages.
        kl_clip: See :class:`Preconditioned`; None for none.
        rescale: Instead of ``kl_clip``; give ``kl_clip=None`` with it.
        **wrapper: ``skip``, ``skip_output``, ``nonfinite``, ``hybrid`` and ``process_group``, as
            for :class:`Preconditioned`; the closed form needs both sides.

    Raises:
        TypeError: An argument has the wrong type, or the base needs a closure.
        ValueError: An argument is out of range, or model and base do not fit together.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        momentum: float = 0.95,
        damping: float = 0.03,
        update_every: int = 1,
        kl_clip: float | None = 0.001,
        rescale: str | None = None,
        **wrapper: Unpack[WrapperOptions],
    ) -> None:
        super().__init__(
            model,
            optimizer,
            RankOne(momentum, damping),
            update_every=update_every,
            kl_clip=kl_clip,
            rescale=rescale,
            **wrapper,
        )


def _updates_between(inverse_every: int | None, update_every: int) -> int:
    if inverse_every is None:
        return 1
    whole = all(isinstance(n, int) and n > 0 for n in (inverse_every, update_every))
    if whole and inverse_every % update_every:
        raise ValueError(
            f"inverse_every={inverse_every} must be a multiple of update_every={update_every}: "
            "an inverse is made of fresh covariances"
        )
    return inverse_every // update_every if whole else inverse_every
