"""Judge the zoo, broken models and honest ones, and append a row for each.

    python benchmarks/zoo.py [NAME ...]

Each row is that of `dwf.evaluation.zoo.trial`: verdict, number, truth, findings and outcome.
"""

from __future__ import annotations

import sys

import rows
import torch

from dwf.evaluation.zoo.trial import as_json, run_zoo


def main(names: list[str]) -> None:
    """Judge all models, or those of these names, one after another."""
    device = torch.device("cpu")
    for row in run_zoo(names=names or None):
        file = rows.append({"bench": "zoo", "case": row.name, **as_json(row)}, device)
        print(f"{row.name}: {row.outcome}, {row.verdict} ({file.name})", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
