"""Reports: figures and HTML pages, from run folders alone."""

from dwf.report.compare import load_comparison
from dwf.report.page import write_report
from dwf.report.table import format_comparison, write_comparison

__all__ = ["format_comparison", "load_comparison", "write_comparison", "write_report"]
