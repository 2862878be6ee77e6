"""Data reweighting for a tiny GPT: which documents help to predict Python's manual?"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.problem import Goal, Problem, Rule, Size
from benchmarks.problems import data
from benchmarks.problems.nets import gpt, token_losses
from benchmarks.problems.scores import accuracy, f1
from metacal._typing import Tree

VOCABULARY, DOCUMENTS = 128, 30  # bytes of ASCII; ten of each kind


class Dimensions(NamedTuple):
    context: int
    dim: int
    depth: int
    heads: int
    batch: int
    num_steps: int


DIMENSIONS: dict[Size, Dimensions] = {
    "tiny": Dimensions(6, 8, 1, 2, 4, 3), "small": Dimensions(32, 32, 2, 4, 8, 8), "full": Dimensions(64, 128, 4, 4, 32, 50),
}  # fmt: skip


def documents() -> Tensor:
    """Thirty documents of 8,000 bytes: of the manual, of sources, and of bytes in random order, ten of each. [30, 8000]."""
    length = 8000
    prose, code = (torch.tensor(list(text[: (DOCUMENTS // 3 + 1) * length])) for text in (data.prose(), data.code()))
    shuffled = prose[torch.randperm(len(prose), generator=torch.Generator().manual_seed(0))]
    return torch.cat([text[: DOCUMENTS // 3 * length].reshape(-1, length) for text in (prose, code, shuffled)])


def reweighting(size: Size) -> Problem:
    """A weight per document; the outer text is of the manual, from behind what is trained on."""
    d = DIMENSIONS[size]
    apply, params = gpt(VOCABULARY, d.context, d.dim, d.depth, d.heads)
    texts, g = documents(), torch.Generator().manual_seed(1)

    def inner(w: Tree, h: Tree, batch: tuple[Tensor, Tensor]) -> Tensor:
        tokens, document = batch
        shares = torch.sigmoid(h["logits"])[document]
        return (shares * token_losses(apply(w, tokens[:, :-1]), tokens).mean(-1)).mean()

    def outer(w: Tree, h: Tree, tokens: Tensor) -> Tensor:
        return token_losses(apply(w, tokens[:, :-1]), tokens).mean()

    def batch() -> tuple[Tensor, Tensor]:
        document = torch.randint(DOCUMENTS, (d.batch,), generator=g)
        start = torch.randint(texts.shape[1] - d.context, (d.batch, 1), generator=g)
        return texts[document[:, None], start + torch.arange(d.context + 1)], document

    def scores(w: Tree, h: Tree, test: tuple[Tensor, Tensor]) -> dict[str, float]:
        tokens, in_random_order = test
        return {"accuracy": accuracy(apply(w, tokens[:, :-1]), tokens[:, 1:]), "f1": f1(h["logits"], in_random_order)}

    unseen, held_out = torch.tensor(list(data.prose()[-8 * d.batch * (d.context + 1) :])).reshape(2, -1, d.context + 1)
    logits = {"logits": torch.zeros(DOCUMENTS)}
    batches = [batch() for _ in range(d.num_steps)]
    return Problem(
        "data reweighting, tiny GPT", inner, outer, params, logits, batches, held_out, Rule("adam", 3e-3), step_size=0.05,
        goal=Goal(scores, (unseen, torch.arange(DOCUMENTS) >= 20), lr=0.3, restarts=False),
    )  # fmt: skip
