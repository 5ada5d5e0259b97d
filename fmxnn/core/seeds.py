"""Seeds that are pure functions of what they are for."""

import hashlib


def seed_of(*parts: int | str) -> int:
    """A seed of 63 bits that depends on `parts` alone, such as `seed_of(seed, "mask", step)`.

    No random state has to be saved.
    """
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
