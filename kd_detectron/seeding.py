"""Random states of an image's augmentation: a function of the run's seed and of its place."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def seeded(seed: int, position: int) -> Iterator[None]:
    """Seeds Python's, numpy's and torch's random states inside the block.

    Args:
        seed: of the run.
        position: of the image in the run's stream of images.
    """
    words = np.random.SeedSequence([seed, position]).generate_state(3).tolist()
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(words[0])
    np.random.seed(words[1])
    # Not torch.manual_seed, which would also reseed the GPUs that the model draws from.
    torch.default_generator.manual_seed(words[2])
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
