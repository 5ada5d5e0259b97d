"""Pages that show what latents fire on; needs jinja2 and tabulate (`pip install 'fmxnn[dashboard]'`)."""

from fmxnn.dashboard.feature import Feature
from fmxnn.dashboard.features import feature_page
from fmxnn.dashboard.nearest import nearest_latents
from fmxnn.dashboard.page import FeaturePage
from fmxnn.dashboard.table import feature_table

__all__ = ["Feature", "FeaturePage", "feature_page", "feature_table", "nearest_latents"]
