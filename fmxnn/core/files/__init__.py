"""Folders that are whole or absent: locks, manifests, and JSON that is checked while it is read."""

from fmxnn.core.files.integrity import verify_folder, write_folder
from fmxnn.core.files.locks import LockedError, locked
from fmxnn.core.files.manifest import IntegrityError

__all__ = ["IntegrityError", "LockedError", "locked", "verify_folder", "write_folder"]
