"""What a latent fires on: its top tokens, each in context."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TopToken:
    """A distinct token that a latent fires on: its text, its largest activation, and contexts with the token in << >>."""

    token: str
    activation: float
    contexts: tuple[str, ...]
