"""Reports: figures and one HTML page, from a run folder alone."""

from dwf.report.page import write_report

__all__ = ["write_report"]
