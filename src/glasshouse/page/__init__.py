"""Show runs: a self-contained report built from a run folder's files alone."""

from glasshouse.page.report import build_report, write_report

__all__ = ["build_report", "write_report"]
