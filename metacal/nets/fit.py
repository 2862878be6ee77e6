"""What is said where images do not fit a network."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor


@contextmanager
def images_fit(images: Tensor) -> Iterator[None]:
    """Says in the images' words what torch says of a layer whose input has the wrong channels or size."""
    try:
        yield
    except RuntimeError as error:
        if not re.search(r"expected input.*channels|shapes cannot be multiplied", str(error)):
            raise
        raise ValueError(
            f"`images` [{', '.join(map(str, images.shape))}] have other channels or another size than the encoder takes. Bring them to its "
            f"input first: metacal.data.resize(images, size, channels) turns 1 <-> 3 channels. (torch: {error})"
        ) from error
