"""Files, ours and other libraries': folders, the Hub, and what a folder holds."""

from fmxnn.saving.formats import FormatError
from fmxnn.saving.hub import from_pretrained, push_to_hub, save_pretrained

__all__ = ["FormatError", "from_pretrained", "push_to_hub", "save_pretrained"]
