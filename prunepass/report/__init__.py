"""What a plan does to a model: `explain`, and its report as data, text and HTML."""

from prunepass.report.build import explain
from prunepass.report.report import Report

__all__ = ["Report", "explain"]
