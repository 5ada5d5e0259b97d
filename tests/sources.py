"""A source of random activations, made here without a language model."""

import torch

from fmxnn.activations import ActivationPairs, Activations, Contexts, Shuffle


class RandomSource:
    """The activation of a token depends on where it stands alone; each `read` is noted."""

    name, layers, device = "random", (0, 2), torch.device("cpu")

    def __init__(self, count=13, context=7, d_model=5, draw=0, *, pairs=False, roles=False, dtype=torch.float32):
        drawn = torch.Generator().manual_seed(draw)
        ids = torch.randint(0, 50, (count, context), generator=drawn, dtype=torch.int32)
        keep = torch.rand(count, context, generator=drawn) < 0.7
        keep[:, 0] = False
        keep[0, 1] = True
        given = torch.randint(0, 4, (count, context), generator=drawn).to(torch.int8) if roles else None
        self.contexts, self.d_model, self.reads = Contexts(ids, keep, given), d_model, []
        self.x = torch.randn(count, context, 2, d_model, generator=drawn).to(dtype)
        self.y = torch.randn(count, context, 3, d_model + 1, generator=drawn).to(dtype) if pairs else None

    def read(self, start, stop):
        self.reads.append((start, stop))
        keep = self.contexts.keep[start:stop]
        return tuple(side[start:stop][keep] for side in (self.x, self.y) if side is not None)

    def identity(self):
        return {"text": self.contexts.digest, "layers": list(self.layers)}


def random_stream(batch=6, block=3, seed=0, epochs=1, **given):
    source = RandomSource(**given)
    kind = Activations if source.y is None else ActivationPairs
    return kind(source, Shuffle(batch, block, seed=seed, epochs=epochs))


def as_sides(batch):
    return batch if isinstance(batch, tuple) else (batch,)
