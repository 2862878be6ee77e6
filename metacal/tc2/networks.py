"""The self-supervised network f_theta: encoder, projector and, where the objective has one, predictor, as pure functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

from torch import Tensor, nn

from metacal import tree
from metacal._typing import Tree
from metacal.modules import Functional, functional
from metacal.nets import MLP, MaskedDecoder, Prototypes, ViT
from metacal.nets.autoencoder import num_visible, with_mask, without_mask
from metacal.nets.fit import images_fit
from metacal.nets.vit import patches, pick
from metacal.objectives import SSLObjective


class Network(NamedTuple):
    """f_theta in parts; theta is ``{"encoder": ..., "projector": ..., "predictor" or "prototypes": ...}``.

    A masked autoencoder's is ``{"encoder": ..., "decoder": ...}``. Of images with a mask its ``encode`` makes the tokens of the visible
    patches, [..., visible, dim], and these are h and z; of images without one it makes what downstream users get.

    Attributes:
        params: theta at the start.
        encode: ``(theta, x [..., C, H, W]) -> h [..., dim]``, what downstream users get.
        project: ``(theta, h) -> z [..., d]``.
        predict: ``(theta, z) -> p``, the head after the projector: a predictor's [..., d], or cosines with prototypes [..., k]; None
            where the objective has neither.
        write: ``write(theta)`` puts trained values into the modules it was made of.
        dim, d: sizes of h and z.
        mask: ``x -> [..., C + 1, H, W]``, draws a mask as one more channel; None where there is no decoder.
        decode: ``(theta, z, x with its mask) -> (p, target)``, predicted and true pixels [..., masked, P]; None likewise.
    """

    params: Tree
    encode: Callable[[Tree, Tensor], Tensor]
    project: Callable[[Tree, Tensor], Tensor]
    predict: Callable[[Tree, Tensor], Tensor] | None
    write: Callable[[Tree], None]
    dim: int
    d: int
    mask: Callable[[Tensor], Tensor] | None = None
    decode: Callable[[Tree, Tensor, Tensor], tuple[Tensor, Tensor]] | None = None


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
        d, hidden: sizes of the projection and of the heads' hidden layers. Prototypes have no hidden layer. A masked autoencoder has
            no projection, and a decoder of width ``hidden``, a multiple of 4, with 2 blocks.
        norm: of the heads' hidden layers. "batch" normalises over the samples and views of the task at hand.

    Errors:
        ValueError: a head of the objective is none of projector, predictor and prototypes, nor a decoder alone; a decoder for
            another encoder than a :class:`metacal.nets.ViT` of ``dim``, or of a width that will not do.

    >>> from metacal import nets, objectives
    >>> net = network(nets.ConvEncoder(width=8, dim=16), objectives.SimSiam(), dim=16, d=8)
    >>> sorted(net.params)
    ['encoder', 'predictor', 'projector']
    """
    if objective.heads == ("decoder",) and not objective.ema_target:
        return _autoencoder(encoder, objective.visible, dim, hidden)
    heads = {
        "projector": lambda: MLP([dim, hidden, d], norm=norm),
        "predictor": lambda: MLP([d, max(d // 2, 1), d], norm=norm),
        "prototypes": lambda: Prototypes(d, objective.num_prototypes),
    }
    first, *after = objective.heads
    if first != "projector" or len(after) > 1 or not heads.keys() >= set(objective.heads):
        raise ValueError(
            "`objective` should have the heads projector and at most one of predictor and prototypes, or a decoder alone and no EMA "
            f"target, got {objective.heads}, ema_target={objective.ema_target}. Build the network of another objective by hand, as a "
            "metacal.tc2.Network."
        )
    parts: dict[str, Functional] = {"encoder": functional(encoder, batch_norm="batch")}
    for head in objective.heads:
        parts[head] = functional(heads[head](), batch_norm="batch")

    def apply(part: str) -> Callable[[Tree, Tensor], Tensor]:
        return lambda theta, x: parts[part].apply(theta[part], x)

    def encode(theta: Tree, x: Tensor) -> Tensor:
        flat = x.reshape(-1, *x.shape[-3:])  # any encoder of [b, C, H, W]
        with images_fit(x):
            h: Tensor = parts["encoder"].apply(theta["encoder"], flat)
        if h.shape != (len(flat), dim):
            raise ValueError(
                f"`encoder` should map [b, C, H, W] to [b, {dim}], as `dim` = {dim} says; it maps {tuple(flat.shape)} to {tuple(h.shape)}."
            )
        return h.reshape(*x.shape[:-3], dim)

    return Network(_params(parts), encode, apply("projector"), apply(after[0]) if after else None, _write(parts), dim, d)


def _autoencoder(vit: nn.Module, visible: float, dim: int, hidden: int) -> Network:
    if not isinstance(vit, ViT) or vit.dim != dim:
        got = f"{type(vit).__name__} of dim = {getattr(vit, 'dim', None)}"
        raise ValueError(f"`encoder` should be a metacal.nets.ViT of dim = {dim} where the objective has a decoder, got {got}.")
    if hidden % 4:
        raise ValueError(f"`hidden` should be a multiple of 4, as the width of a decoder with 4 heads, got {hidden}.")
    decoder = MaskedDecoder(dim, vit.in_channels * vit.patch**2, hidden, heads=4)
    parts = {"encoder": functional(vit), "decoder": functional(decoder)}

    def encode(theta: Tree, x: Tensor) -> Tensor:
        shown = None
        if x.shape[-3] == vit.in_channels + 1:
            x, order = without_mask(x, vit.patch)
            shown = order[..., : num_visible(visible, order.shape[-1])]
        with images_fit(x):
            encoded: Tensor = parts["encoder"].apply(theta["encoder"], x, shown)
        return encoded

    def decode(theta: Tree, z: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        x, order = without_mask(x, vit.patch)
        grid = (x.shape[-2] // vit.patch, x.shape[-1] // vit.patch)
        return parts["decoder"].apply(theta["decoder"], z, order, grid), pick(patches(x, vit.patch), order[..., z.shape[-2] :])

    def mask(x: Tensor) -> Tensor:
        return with_mask(x, vit.patch, visible)

    return Network(_params(parts), encode, lambda theta, h: h, None, _write(parts), dim, dim, mask, decode)


def _params(parts: dict[str, Functional]) -> Tree:
    return {name: tree.clone(part.params) for name, part in parts.items()}


def _write(parts: dict[str, Functional]) -> Callable[[Tree], None]:
    def write(theta: Tree) -> None:
        for name, part in parts.items():
            part.write(theta[name])

    return write
