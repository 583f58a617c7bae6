"""What the standard suite finds behind hard routing: `python benchmarks/hard_routed.py RUN ...`.

Reads the evaluations by suite `standard` of runs of hard-routed defenses, and appends a row for
each: what attacks on the whole mixture left, what its views left, what Square left, the worst case.
"""

from __future__ import annotations

import sys
from pathlib import Path

import rows
import torch

from dwf.evaluation import Evaluation

ON_THE_WHOLE = ("apgd-ce", "apgd-t", "fab-t")


def main(runs: list[Path]) -> None:
    """Append a row for each evaluation."""
    for run in runs:
        for path in sorted((run / "evaluations").glob("standard*.json")):
            result = Evaluation.read(path)
            left = {row.kind: row.num_correct for row in result.attacks}
            by_view = next(row.broken_by for row in result.attacks if row.kind == "views")
            row = {
                "bench": "hard_routed",
                "case": run.name,
                "model": result.model,
                "suite": result.suite,
                "num_images": result.num_images,
                "epsilon": result.epsilon,
                "clean": left["clean"],
                "on_the_whole": min(left[kind] for kind in ON_THE_WHOLE),
                "views": left["views"],
                "square": left["square"],
                "worst_case": result.worst_case.num_correct,
                "broken_by_views": by_view,
                "verdict": result.verdict,
                "findings": [f.name for f in result.findings if f.severity != "note"],
                "evaluated": {key: result.environment[key] for key in ("commit", "dirty", "date")},
            }
            print(rows.append(row, torch.device("cpu")), row)


if __name__ == "__main__":
    main([Path(name) for name in sys.argv[1:]])
