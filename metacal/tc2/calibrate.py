"""Calibration: from a representation z to z~ = w V^T, which keeps only what its weights over shared factors keep.

    V = f_v(S)     [d, n_f]   generative factors, shared by all tasks; S = [mu, Sigma] of the batch's representations [S]
    w = f_w(z)     [n_f]      one sparse weight vector per sample [S]
    z~ = w V^T     [d]        the calibrated representation [S]

A calibrator is a frozen value with pure methods; what is trained is the tree ``phi`` they are handed. All methods are
differentiable in every argument. TC² computes V once per iteration and detaches it in its second stage, so that the
encoder's gradient flows through the z in w alone: whoever calls ``factors`` detaches.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from metacal import _checks
from metacal._safe import wide
from metacal._typing import Tree
from metacal.tc2.factors import check_num_factors, cosine_basis, orthonormalised, statistics


class Sparsity(ABC):
    """``w [..., n_f] -> w [..., n_f]`` with zeros: :class:`SoftThreshold`, :class:`TopK`, or a class of one's own."""

    @abstractmethod
    def __call__(self, w: Tensor) -> Tensor:
        """The weights, some of them zero."""


class Calibrator(ABC):
    """What TC² needs of a calibrator; the methods hold no state and draw no random numbers after ``init``."""

    @abstractmethod
    def init(
        self,
        d: int,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tree:
        """The trainable parameters ``phi`` for d-dimensional representations; ``{}`` for closed forms."""

    @abstractmethod
    def factors(self, phi: Tree, Z: Tensor) -> Tensor:
        """The factors V [d, n_f] of all the batch's representations Z [..., d]."""

    @abstractmethod
    def weights(self, phi: Tree, z: Tensor, V: Tensor) -> Tensor:
        """The weights w [..., n_f] of representations z [..., d]."""

    def synthesis(self, w: Tensor, V: Tensor) -> Tensor:
        """w V^T [..., d]: the representation that weights w [..., n_f] stand for."""
        return torch.matmul(w, V.mT)

    def calibrate(self, phi: Tree, z: Tensor, V: Tensor) -> Tensor:
        """The calibrated representations z~ [..., d]."""
        return self.synthesis(self.weights(phi, z, V), V)


@dataclass(frozen=True)
class Networks(Calibrator):
    """Factor and weight extraction networks [S], near the identity at the start [O].

        V = qr(V_0 + f_v(S)) or V_0 + f_v(S)         f_v: R^{d+1} -> R^{n_f}, applied to each of the d rows of S = [mu, Sigma]
        w = sparsity(z V + f_w(z))                   f_w: R^d -> R^{n_f}

    Both networks have one hidden layer and a zero-initialised last one, and V_0 is a constant orthonormal matrix (the
    first n_f columns of the cosine transform, which mix all coordinates and need no random numbers). So without
    ``sparsity`` the start is z~ = z at n_f = d, and the projection z V_0 V_0^T below: switching calibration on does not
    disturb an encoder. All of this, and GELU (smooth: second-order products go through it), is ours [O].

    Args:
        n_f: number of factors, at most d; None takes n_f = d, which the summary reports as best [S].
        hidden: width of both networks.
        orthogonal: ``"qr"`` makes V's columns orthonormal, by a QR factorisation whose R has a positive diagonal (so that V
            is a smooth function of phi); ``"penalty"`` leaves that to the loss's orthogonality term, as in [S].
        sparsity: applied to the weights; None leaves sparsity to the loss, whose L1 term makes weights small but, moved
            by gradients, hardly any exactly zero.

    Cost: O(R d^2) for Sigma, O(d^2 hidden + d n_f^2) for V, once per iteration; a small MLP per sample.

    Errors:
        ValueError: a field is out of its range; n_f > d in ``init``; Z's dimension is not the one of ``init``.

    >>> calibrator = Networks(n_f=4, hidden=16)
    >>> phi = calibrator.init(8, torch.Generator().manual_seed(0))
    >>> Z = torch.randn(32, 8)
    >>> V = calibrator.factors(phi, Z)
    >>> V.shape, calibrator.weights(phi, Z, V).shape, calibrator.calibrate(phi, Z, V).shape
    (torch.Size([8, 4]), torch.Size([32, 4]), torch.Size([32, 8]))
    """

    n_f: int | None = None
    hidden: int = 256
    orthogonal: Literal["qr", "penalty"] = "qr"
    sparsity: Sparsity | None = None

    def __post_init__(self) -> None:
        _checks.whole("n_f", 1 if self.n_f is None else self.n_f)
        _checks.whole("hidden", self.hidden)
        if self.orthogonal not in ("qr", "penalty"):
            raise ValueError(f"`orthogonal` should be 'qr' or 'penalty', got {self.orthogonal!r}.")

    def init(
        self,
        d: int,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tree:
        """``{"factor": f_v's parameters, "weight": f_w's}``; drawn on the generator's device, so equal on every ``device``."""
        n_f = d if self.n_f is None else self.n_f
        check_num_factors(n_f, d, sparse=True)  # the loss may hold the sparsity: whoever knows it warns
        options: dict[str, Any] = {"dtype": dtype, "device": device, "generator": generator}
        return {"factor": _init_mlp(d + 1, self.hidden, n_f, **options), "weight": _init_mlp(d, self.hidden, n_f, **options)}

    def factors(self, phi: Tree, Z: Tensor) -> Tensor:
        """V [d, n_f] from the mean and the biased (1/R) covariance of the R representations in Z [..., d]."""
        n_f, d = phi["factor"]["output"]["weight"].shape[0], phi["factor"]["hidden"]["weight"].shape[1] - 1
        if Z.shape[-1] != d:
            raise ValueError(f"`Z` should have the last dimension d = {d} that `phi` was initialised for, got {tuple(Z.shape)}.")
        V = cosine_basis(d, n_f, phi["factor"]["output"]["weight"]) + _mlp(phi["factor"], statistics(Z))
        return orthonormalised(V) if self.orthogonal == "qr" else V

    def weights(self, phi: Tree, z: Tensor, V: Tensor) -> Tensor:
        """w [..., n_f]."""
        w: Tensor = z @ V + _mlp(phi["weight"], z)
        return w if self.sparsity is None else self.sparsity(w)


@dataclass(frozen=True)
class PCA(Calibrator):
    """The closed form that the calibration losses alone aim at: principal components and soft-thresholded weights [O].

        V = the top n_f right singular vectors of Z (uncentred, as the reconstruction term has them)
        w = softthreshold(z V, lambda_1 d / (2 n_f))

    V minimises the orthogonality and reconstruction terms, and w the per-sample terms of the stable loss given V: so this is
    what TC² would be without the SSL objectives' gradients, a control without networks. ``phi`` is ``{}``, and V is a
    constant to differentiation.

    Args:
        n_f: number of factors, at most d. (At n_f = d and lambda_1 = 0 it is the identity.)
        lambda_1: strength of the sparsity term, as in :func:`metacal.tc2.stable`.

    Cost: O(R d^2 + d^3) for V.

    Errors:
        ValueError: a field is out of its range, or n_f > d.

    >>> Z = torch.randn(32, 8)
    >>> pca = PCA(n_f=4, lambda_1=0.0)
    >>> bool((Z - pca.calibrate({}, Z, pca.factors({}, Z))).norm() < Z.norm())
    True
    """

    n_f: int
    lambda_1: float = 0.1

    def __post_init__(self) -> None:
        _checks.whole("n_f", self.n_f)
        _non_negative("lambda_1", self.lambda_1)

    def init(
        self,
        d: int,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tree:
        """``{}``: there is nothing to train."""
        check_num_factors(self.n_f, d, sparse=True)
        return {}

    def factors(self, phi: Tree, Z: Tensor) -> Tensor:
        """V [d, n_f], detached."""
        check_num_factors(self.n_f, Z.shape[-1], sparse=True)
        Z = wide(Z.detach()).flatten(end_dim=-2)  # [R, d]
        # eigh of the Gram matrix and not svd of Z: it has d eigenvectors however few samples there are, in ascending order.
        V: Tensor = torch.linalg.eigh(Z.mT @ Z).eigenvectors[:, -self.n_f :].flip(-1)
        return V

    def weights(self, phi: Tree, z: Tensor, V: Tensor) -> Tensor:
        """w [..., n_f], the minimiser of the stable loss's per-sample terms for orthonormal V."""
        d, n_f = V.shape
        return soft_threshold(z @ V, self.lambda_1 * d / (2 * n_f))


@dataclass(frozen=True)
class Identity(Calibrator):
    """No calibration: z~ is z itself, bit for bit; the controls without TC² use it.

    >>> z = torch.randn(5, 3)
    >>> Identity().calibrate({}, z, Identity().factors({}, z)) is z
    True
    """

    def init(
        self,
        d: int,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tree:
        """``{}``: there is nothing to train."""
        return {}

    def factors(self, phi: Tree, Z: Tensor) -> Tensor:
        """The identity matrix [d, d]."""
        return torch.eye(Z.shape[-1], dtype=Z.dtype, device=Z.device)

    def weights(self, phi: Tree, z: Tensor, V: Tensor) -> Tensor:
        """z itself."""
        return z

    def synthesis(self, w: Tensor, V: Tensor) -> Tensor:
        """w itself: V is the identity, and w I could round (in TF32)."""
        return w


@dataclass(frozen=True)
class SoftThreshold(Sparsity):
    """Shrinks weights towards zero: sign(w) max(|w| - threshold, 0), in the units of w.

    >>> SoftThreshold(1.0)(torch.tensor([-3.0, 0.5, 2.0]))
    tensor([-2.,  0.,  1.])
    """

    threshold: float

    def __post_init__(self) -> None:
        _non_negative("threshold", self.threshold)

    def __call__(self, w: Tensor) -> Tensor:
        return soft_threshold(w, self.threshold)


@dataclass(frozen=True)
class TopK(Sparsity):
    """Keeps each sample's k weights of largest magnitude and zeroes the others, which then get no gradient.

    Errors:
        ValueError: k < 1, or k exceeds the number of weights.

    >>> TopK(1)(torch.tensor([[-3.0, 0.5, 2.0]]))
    tensor([[-3.,  0.,  0.]])
    """

    k: int

    def __post_init__(self) -> None:
        _checks.whole("k", self.k)

    def __call__(self, w: Tensor) -> Tensor:
        if self.k > w.shape[-1]:
            raise ValueError(f"`k` should be at most n_f = {w.shape[-1]}, the number of weights, got {self.k}. Lower k or raise n_f.")
        kept = torch.zeros_like(w).scatter(-1, w.detach().abs().topk(self.k, dim=-1).indices, 1.0)
        return torch.where(kept > 0, w, torch.zeros_like(w))  # and not w * kept: 0 * inf is NaN


def soft_threshold(x: Tensor, threshold: float) -> Tensor:
    """sign(x) max(|x| - threshold, 0), the proximal operator of threshold ||x||_1."""
    return x - x.clamp(-threshold, threshold)


def _init_mlp(
    inputs: int,
    hidden: int,
    outputs: int,
    *,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
    generator: torch.Generator | None,
) -> Tree:
    """A hidden layer drawn as torch.nn.Linear draws, and an output layer of zeros."""

    def draw(*shape: int) -> Tensor:
        where = "cpu" if generator is None else generator.device
        return ((2 * torch.rand(*shape, generator=generator, dtype=dtype, device=where) - 1) / math.sqrt(inputs)).to(device)

    return {
        "hidden": {"weight": draw(hidden, inputs), "bias": draw(hidden)},
        "output": {
            "weight": torch.zeros(outputs, hidden, dtype=dtype, device=device),
            "bias": torch.zeros(outputs, dtype=dtype, device=device),
        },
    }


def _mlp(params: Tree, x: Tensor) -> Tensor:
    return F.linear(F.gelu(F.linear(x, **params["hidden"])), **params["output"])


def _non_negative(name: str, value: float) -> None:
    if not value >= 0:
        raise ValueError(f"`{name}` should be non-negative, got {value}.")
