"""Conversations rendered by a chat template, with who wrote each token."""

from fmxnn.activations.chat.contexts import Conversations
from fmxnn.activations.chat.roles import Role

__all__ = ["Conversations", "Role"]
