"""Reports: figures and HTML pages, from run folders alone."""

from dwf.report.compare import format_comparison, load_comparison, write_comparison
from dwf.report.page import write_report

__all__ = ["format_comparison", "load_comparison", "write_comparison", "write_report"]
