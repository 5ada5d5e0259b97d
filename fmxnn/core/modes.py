"""Measuring without training: modules in eval mode for a while."""

from collections.abc import Generator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(*modules: nn.Module) -> Generator[None]:
    """While open, the modules are in eval mode; each is put back after, whatever happens."""
    modes = [module.training for module in modules]
    try:
        for module in modules:
            module.eval()
        yield
    finally:
        for module, training in zip(modules, modes, strict=True):
            module.train(training)
