"""Tensors that are spread over several processes."""

from torch import distributed


def is_sharded(tensor: object) -> bool:
    """Whether it is a DTensor, as FSDP2 leaves parameters and their gradients; each process holds a part of one."""
    return hasattr(tensor, "full_tensor")


def has_processes() -> bool:
    """Whether a process group was initialised; without one nothing is sharded."""
    return distributed.is_available() and distributed.is_initialized()
