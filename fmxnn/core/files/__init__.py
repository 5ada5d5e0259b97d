"""Folders that are whole or absent: locks, manifests, and JSON that is checked while it is read."""

from fmxnn.core.errors import IntegrityError, LockedError
from fmxnn.core.files.integrity import verify_folder, write_folder
from fmxnn.core.files.locks import locked

__all__ = ["IntegrityError", "LockedError", "locked", "verify_folder", "write_folder"]
