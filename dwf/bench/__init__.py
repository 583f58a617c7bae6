"""Time one adversarial training step here: eager PyTorch, the best stock PyTorch, this package."""

from dwf.bench.step import Case, Comparison, compare_step

__all__ = ["Case", "Comparison", "compare_step"]
