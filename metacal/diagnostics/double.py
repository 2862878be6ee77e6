"""A problem in float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from metacal import tree
from metacal._typing import Tree
from metacal.batches import listed
from metacal.inner import InnerState


def doubled(state: InnerState, hparams: Tree, batches: Sequence[Tree], outer_batch: Tree) -> tuple[InnerState, Tree, list[Tree], Tree]:
    """The same in float64; a batch that is repeated is cast once."""
    read = listed(batches)
    cast = {key: tree.to(batch, torch.float64) for key, batch in {id(batch): batch for batch in read}.items()}
    state, hparams, outer_batch = tree.to((state, hparams, outer_batch), torch.float64)
    return state, hparams, [cast[id(batch)] for batch in read], outer_batch
