"""Latents that were asked for, by their numbers."""

from collections.abc import Sequence

from fmxnn.coders.crosscoder import Crosscoder
from fmxnn.core.sizes import places_of


def asked_latents(crosscoder: Crosscoder, latents: Sequence[int]) -> list[int]:
    """The latents asked for, each once. Raises ValueError where there are none, or one that the crosscoder lacks."""
    return check_latents(crosscoder.encoder.weight.latents, latents)


def check_latents(count: int, latents: Sequence[int]) -> list[int]:
    """Some of the latents 0 to `count` - 1, each once. Raises ValueError where there are none, or one is not there.

    Raises TypeError for anything but whole numbers.
    """
    chosen = list(dict.fromkeys(whole_latents(latents)))
    missing = [latent for latent in chosen if not 0 <= latent < count]
    if missing or not chosen:
        raise ValueError(
            f"the crosscoder has the latents 0 to {count - 1}, got {', '.join(map(str, missing)) or 'none'}"
        )
    return chosen


def whole_latents(latents: Sequence[int]) -> tuple[int, ...]:
    """Latents by their numbers. Raises TypeError for anything but several whole numbers."""
    numbers = places_of(latents)
    if numbers is None:
        raise TypeError(f"latents are whole numbers in a list, got {latents!r:.200}; write latents=[3, 17]")
    return numbers
