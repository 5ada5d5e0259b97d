"""Pages that show what latents fire on; needs jinja2 and tabulate (`pip install 'fmxnn[dashboard]'`)."""

from fmxnn.reports.pages.feature import Feature
from fmxnn.reports.pages.features import feature_page
from fmxnn.reports.pages.intervals import Interval
from fmxnn.reports.pages.nearest import nearest_latents
from fmxnn.reports.pages.page import FeaturePage
from fmxnn.reports.pages.table import feature_table

__all__ = ["Feature", "FeaturePage", "Interval", "feature_page", "feature_table", "nearest_latents"]
