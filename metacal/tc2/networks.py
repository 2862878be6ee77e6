"""The self-supervised network f_theta: encoder, projector and, where the objective has one, predictor, as pure functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

from torch import Tensor, nn

from metacal import tree
from metacal._typing import Tree
from metacal.modules import Functional, functional
from metacal.nets import MLP, Prototypes
from metacal.nets.fit import images_fit
from metacal.objectives import SSLObjective


class Network(NamedTuple):
    """f_theta in parts; theta is ``{"encoder": ..., "projector": ..., "predictor" or "prototypes": ...}``.

    Attributes:
        params: theta at the start.
        encode: ``(theta, x [..., C, H, W]) -> h [..., dim]``, what downstream users get.
        project: ``(theta, h) -> z [..., d]``.
        predict: ``(theta, z) -> p``, the head after the projector: a predictor's [..., d], or cosines with prototypes [..., k]; None
            where the objective has neither.
        write: ``write(theta)`` puts trained values into the modules it was made of.
        dim, d: sizes of h and z.
    """

    params: Tree
    encode: Callable[[Tree, Tensor], Tensor]
    project: Callable[[Tree, Tensor], Tensor]
    predict: Callable[[Tree, Tensor], Tensor] | None
    write: Callable[[Tree], None]
    dim: int
    d: int


def network(
    encoder: nn.Module,
    objective: SSLObjective,
    *,
    dim: int,
    d: int = 64,
    hidden: int = 128,
    norm: Literal["layer", "batch"] | None = "batch",
) -> Network:
    """An encoder with the heads that the objective wants: MLPs of one hidden layer, drawn from torch's default generator.

    Args:
        encoder: any module, images [..., C, H, W] or [b, C, H, W] to [.., dim]; BatchNorm in it uses the statistics of the batch.
        dim: size of the encoder's output.
        d, hidden: sizes of the projection and of the heads' hidden layers. Prototypes have no hidden layer.
        norm: of the heads' hidden layers. "batch" normalises over the samples and views of the task at hand.

    Errors:
        ValueError: a head of the objective is none of projector, predictor and prototypes.

    >>> from metacal import nets, objectives
    >>> net = network(nets.ConvEncoder(width=8, dim=16), objectives.SimSiam(), dim=16, d=8)
    >>> sorted(net.params)
    ['encoder', 'predictor', 'projector']
    """
    heads = {
        "projector": lambda: MLP([dim, hidden, d], norm=norm),
        "predictor": lambda: MLP([d, max(d // 2, 1), d], norm=norm),
        "prototypes": lambda: Prototypes(d, objective.num_prototypes),
    }
    first, *after = objective.heads
    if first != "projector" or len(after) > 1 or not heads.keys() >= set(objective.heads):
        raise ValueError(
            f"`objective` should have the heads projector and at most one of predictor and prototypes, got {objective.heads}. Build "
            "the network of another objective by hand (a masked autoencoder: metacal.nets.MaskedAutoencoder)."
        )
    parts: dict[str, Functional] = {"encoder": functional(encoder, batch_norm="batch")}
    for head in objective.heads:
        parts[head] = functional(heads[head](), batch_norm="batch")

    def apply(part: str) -> Callable[[Tree, Tensor], Tensor]:
        return lambda theta, x: parts[part].apply(theta[part], x)

    def encode(theta: Tree, x: Tensor) -> Tensor:
        flat = x.reshape(-1, *x.shape[-3:])  # any encoder of [b, C, H, W]
        with images_fit(x):
            return parts["encoder"].apply(theta["encoder"], flat).reshape(*x.shape[:-3], dim)

    def write(theta: Tree) -> None:
        for name, part in parts.items():
            part.write(theta[name])

    params = {name: tree.clone(part.params) for name, part in parts.items()}
    return Network(params, encode, apply("projector"), apply(after[0]) if after else None, write, dim, d)
