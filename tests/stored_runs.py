"""Run folders made of invented numbers: the paper's grid, attacks in turn, and what lies beside."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np

from dwf.evaluation import wilson_interval

EXPERTS = ["benign", *(f"fgsm-{i}" for i in range(4)), *(f"pgd-{i}" for i in range(4))]
WATCHED = ["clean", "FGSM 0.14", "PGD-50"]
NUM_IMAGES, NUM_CLASSES, EPSILON = 500, 10, 0.15

Table = dict[str, Any]
Arrays = dict[str, np.ndarray]
Edit = Callable[[dict[str, Any]], Any]


def unchanged(table: Table) -> None:
    """Edit nothing."""


def score(num_correct: int, n: int = NUM_IMAGES) -> Table:
    interval = list(wilson_interval(num_correct, n))
    accuracy = num_correct / n
    return {
        "num_images": n, "num_correct": num_correct, "accuracy": accuracy, "interval": interval
    }  # fmt: skip


def attack(name: str, kind: str, num_correct: int, **fields: Any) -> Table:
    row = {
        "name": name, "kind": kind, "epsilon": 0.0, "step_size": None, "num_steps": 0,
        "num_restarts": 1, "random_start": False, "eot_samples": 1, **score(num_correct),
        "num_non_finite": 0, "seconds": 1.25, "num_forwards": 500, "num_backwards": 500,
        "same_as": None,
    }  # fmt: skip
    return row | fields


def make_evaluation() -> tuple[Table, Arrays]:
    """An evaluation like those of the digits preset, and its arrays; the same at each call."""
    rng = np.random.default_rng(0)
    attacks = [attack("clean", "clean", 489, num_backwards=0)]
    for i in range(9):
        epsilon = 0.02 * (i + 1)
        attacks.append(
            attack(f"FGSM {epsilon:.2f}", "fgsm", 480 - 16 * i, epsilon=epsilon, num_steps=1)
        )
    budget = {"epsilon": EPSILON, "step_size": 0.03}
    for steps, num_correct in zip((10, 20, 30, 40, 50), (352, 344, 342, 341, 341), strict=True):
        attacks.append(attack(f"PGD-{steps}", "pgd", num_correct, num_steps=steps, **budget))
    more = {"num_steps": 100, "num_restarts": 3, "random_start": True, "num_forwards": 150_000}
    attacks.append(attack("multi-start PGD-100 x3", "multi_start", 337, **budget, **more))
    attacks.append(
        attack("adaptive PGD-100", "adaptive", 341, **budget, num_steps=100, same_as="PGD-100")
    )
    names = [row["name"] for row in attacks]
    within = [row["name"] for row in attacks if row["epsilon"] <= EPSILON]

    def weights(sharpness: float) -> list[list[float]]:
        table = np.exp(sharpness * rng.normal(size=(NUM_CLASSES, len(EXPERTS))))
        return (table / table.sum(axis=1, keepdims=True)).tolist()

    evaluation = {
        "schema": 1,
        "suite": "paper",
        "protocol": "pixels",
        "run": "runs/a",
        "weights": "last",
        "model": "DWF mixture of 9 cnn8 width 16",
        "num_parameters": 1_234_567,
        "data": {
            "name": "digits", "split": "test", "num_images": NUM_IMAGES, "digest": "ab" * 32,
            "notes": ["8x8 gray images, values 0 to 16 scaled to [0, 1]"],
        },
        "seed": 0,
        "bn_mode": "eval",
        "precision": "float32",
        "epsilon": EPSILON,
        "attacks": attacks,
        "worst_case": {"epsilon": EPSILON, **score(336), "attacks": within},
        "worst_case_all": {"epsilon": 0.18, **score(330), "attacks": names},
        "findings": [
            {"name": "small_sample", "severity": "note", "message": "few images: 500"},
            {"name": "zero_gradient", "severity": "suspect", "message": "7 of 500 gradients are 0"},
        ],
        "gate": {
            "attacks": WATCHED,
            "experts": EXPERTS,
            "mean_weights": {name: weights(0.7 + 0.4 * i) for i, name in enumerate(WATCHED)},
            "entropy": {"clean": 1.93, "FGSM 0.14": 1.72, "PGD-50": 1.55},
        },
        "experts": {
            "names": EXPERTS,
            "accuracy": {name: rng.uniform(0.2, 1, len(EXPERTS)).tolist() for name in WATCHED},
        },
        "environment": {"argv": ["dwf", "eval", "runs/a"], "python": "3.11.2"},
        "seconds": 171.5,
    }  # fmt: skip
    clean = rng.uniform(0, 1, (8, 1, 8, 8)).astype(np.float32)
    noise = EPSILON * np.sign(rng.normal(size=clean.shape))
    arrays = {
        "correct": _nested_outcomes(attacks),
        "sample_index": np.arange(NUM_IMAGES),
        "example_clean": clean,
        "example_adversarial": np.clip(clean + noise, 0, 1).astype(np.float32),
        "example_labels": np.arange(8),
        "example_predictions_clean": np.arange(8),
        "example_predictions_adversarial": np.array([0, 1, 8, 3, 9, 5, 6, 1]),
        "example_attack": np.array("PGD-50"),
    }
    return evaluation, arrays


def make_in_turn() -> tuple[Table, Arrays]:
    """An evaluation by attacks in turn at two radii, of a mixture trained elsewhere."""
    evaluation, _ = make_evaluation()
    rows = [attack("clean", "clean", 480, num_attacked=500, num_backwards=0)]
    standing = 480
    for epsilon, at in ((4 / 255, " 0.01569"), (8 / 255, " 0.03137")):
        for name, kind, broke in (
            ("APGD-CE", "apgd-ce", 100), ("Square", "square", 0), ("views", "views", 7),
        ):  # fmt: skip
            found = {"gate only": 4, "expert 0": 3} if kind == "views" else {}
            rows.append(
                attack(
                    name + at, kind, standing - broke, epsilon=epsilon, num_steps=100,
                    num_attacked=standing, broken_by=found, norm="linf", stream=0,
                )
            )  # fmt: skip
            standing -= broke
    last = {"epsilon": 8 / 255, "num_steps": 200}
    rows.append(attack("APGD-CE doubled", "apgd-ce", 265, num_attacked=266, stream=1, **last))
    rows.append(attack("single step", "single-step", 265, num_attacked=500, **last))
    rows.append(attack("noise", "noise", 265, num_attacked=500, num_forwards=0, **last))
    names = [row["name"] for row in rows]
    headline = {"epsilon": 8 / 255, **score(265), "attacks": names}
    evaluation.update(
        suite="full", attacks=rows, worst_case=headline, worst_case_all=headline, norm="linf",
        curve=[{"epsilon": 4 / 255, **score(373), "attacks": names[:4]}, dict(headline)],
        verdict="SUSPECT", epsilon=8 / 255, num_parameters=None, weights="as given",
        model="nets.py:make", gate=None, experts=None,
        findings=[
            {
                "name": "view_wins", "severity": "suspect", "message": "views break more",
                "remedy": "attack views", "measured": 3.5, "limit": 3.0, "num_images": 17,
                "sample_indices": [3, 5],
            }
        ],
        traces={
            "num_images": 4, "epsilon": 8 / 255, "norm": "linf", "step_size": 0.003,
            "num_steps": 2, "num_restarts": 2, "eot_samples": 1, "seed": 0, "experts": ["a", "b"],
            "loss": {"mean": [0.1, 0.5, None], "low": [0.0, 0.2, None], "high": [0.2, 1.0, None]},
            "accuracy": [[1.0, 0.75, 0.5], [0.5, 0.5, 0.25]], "seconds": 1.0,
        },
    )  # fmt: skip
    rng = np.random.default_rng(0)
    maps = rng.uniform(size=(2, 3, 4, 4)).astype(np.float32)
    arrays = {
        "correct": _nested_outcomes(rows),
        "cam_maps": maps / maps.sum(axis=(2, 3), keepdims=True),
        "cam_images": rng.uniform(size=(3, 1, 8, 8)).astype(np.float32),
        "cam_labels": np.arange(3),
    }
    return evaluation, arrays


def make_diagnostics() -> Table:
    """What an attack through each of three experts and through their mixture found."""
    rng = np.random.default_rng(0)

    def shares(*shape: int) -> Any:
        return rng.uniform(size=shape).tolist()

    def load() -> Table:
        return {"entropy": 1.0, "mean_weight": shares(3), "top_share": shares(3), "dead": []}

    kinds = ("clean", "mixture_attacked", "self_attacked")
    return {
        "num_images": 10, "epsilon": EPSILON, "step_size": 0.02, "num_steps": 2,
        "names": ["0 benign", "1 fgsm", "2 pgd", "mixture"],
        "accuracy": {kind: shares(4) for kind in kinds},
        "transfer": shares(4, 4),
        "worst_case": 0.25,
        "gate": {"clean": load(), "attacked": load() | {"dead": ["2 pgd"]}},
        "routing_flips": {"attacked": 0.3, "again": 0.0},
        "gradient_cosine": [[1.0, 0.5, None], [0.5, 1.0, -0.25], [None, -0.25, 1.0]],
    }  # fmt: skip


def make_metrics() -> list[Table]:
    """Nine experts and the joint phase, logged often."""
    rows: list[Table] = []
    global_step = 0
    phases = [*(f"expert-{i}-{name.split('-')[0]}" for i, name in enumerate(EXPERTS)), "joint"]
    for index, phase in enumerate(phases):
        num_steps = 400 if phase == "joint" else 120
        for step in range(10, num_steps + 1, 10):
            global_step += 10
            done = step / num_steps
            base = {
                "phase": phase, "phase_index": index, "epoch": step // 40, "step": step,
                "global_step": global_step,
            }  # fmt: skip
            train = {
                "kind": "train", "loss": 2.3 * (1.05 - done) ** 2 + 0.1, "clean_accuracy": done,
                "robust_accuracy": None, "learning_rate": 0.1, "images_per_s": 9000.0,
                "seconds": 0.1,
            }  # fmt: skip
            validation = {
                "kind": "validation", "clean_accuracy": 0.5 + 0.48 * done, "num_images": 200,
                "robust_accuracy": None if phase.endswith("benign") else 0.1 + 0.6 * done,
            }  # fmt: skip
            rows.append(base | train)
            if step % 40 == 0:
                rows.append(base | validation)
    return rows


def write_run(
    folder: Path, evaluation: Table, arrays: Arrays | None, metrics: list[Table] | None
) -> Path:
    """The folder of a training run."""
    config = {
        "preset": "dwf_digits", "defense": "divided_we_fall", "seed": 0,
        "data": {"name": "digits", "num_validation": 200},
        "attack": {"epsilon": EPSILON, "num_steps": [10, 20, 30, 40, 50]},
    }  # fmt: skip
    environment = {
        "argv": ["dwf", "train", "digits", "--out", "runs/my run"], "commit": "0123456789ab",
        "python": "3.11.2", "versions": {"torch": "2.15.0"}, "gpus": [], "cuda": None,
    }  # fmt: skip
    _write(folder, config, environment, evaluation, arrays)
    if metrics is not None:
        lines = "".join(json.dumps(row) + "\n" for row in metrics)
        (folder / "metrics.jsonl").write_text(lines)
    return folder


def bare(evaluation: Table) -> None:
    """Leave what is optional out, and one attack."""
    evaluation.update(gate=None, experts=None, findings=[], environment={})
    del evaluation["attacks"][2:]
    names = [row["name"] for row in evaluation["attacks"]]
    for key in ("worst_case", "worst_case_all"):
        evaluation[key].update(score(480), attacks=names)


def bare_run(folder: Path, edit: Edit = unchanged) -> Path:
    """A run folder that draws little, changed by ``edit``."""
    evaluation, _ = make_evaluation()
    bare(evaluation)
    edit(evaluation)
    return write_run(folder, evaluation, None, None)


def in_turn_run(folder: Path, edit: Edit = unchanged) -> Path:
    """The folder that an evaluation of a model from elsewhere leaves."""
    evaluation, arrays = make_in_turn()
    edit(evaluation)
    config = {"model": "nets.py:make", "data": {"name": "digits", "root": None}}
    _write(folder, config, evaluation["environment"], evaluation, arrays)
    return folder


def _write(
    folder: Path, config: Table, environment: Table, evaluation: Table, arrays: Arrays | None
) -> None:
    tables = folder / "evaluations"
    tables.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "environment.json").write_text(json.dumps(environment))
    (tables / f"{evaluation['suite']}.json").write_text(json.dumps(evaluation))
    if arrays is not None:
        np.savez_compressed(tables / f"{evaluation['suite']}.npz", **arrays)


def _nested_outcomes(attacks: list[Table]) -> np.ndarray:
    """Outcomes in which each row leaves the first images, so the worst case is the weakest row."""
    return np.stack([np.arange(NUM_IMAGES) < row["num_correct"] for row in attacks])


def paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every key of nested JSON, of each list the first item."""
    if isinstance(value, dict):
        parts = value.items()
    elif isinstance(value, list):
        parts = list(enumerate(value))[:1]
    else:
        parts = []
    return [p for key, part in parts for p in [(*path, key), *paths(part, (*path, key))]]


def read_csv(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as stream:
        return list(csv.DictReader(stream))


class Page(HTMLParser):
    """What a browser would load or jump to, and the text it would show."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self._shown = ""
        self.feed(html)

    @classmethod
    def of(cls, file: Path) -> Page:
        return cls(file.read_text())

    @property
    def text(self) -> str:
        """What is shown, with single spaces."""
        return " ".join(self._shown.split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br", "path", "rect", "use", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self.open:
            assert self.open.pop() == tag, f"</{tag}> closes another tag"

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self._shown += data

    def assert_self_contained(self, html: str) -> None:
        """No script, nothing that a browser would load, and a policy that forbids both."""
        assert self.open == []
        for tag, attributes in self.tags:
            assert tag not in ("script", "link", "iframe", "object", "embed")
            for name in ("src", "href", "xlink:href", "srcset", "data"):
                value = attributes.get(name)
                assert value is None or value.startswith(("#", "data:image/png;base64,")), value
        assert "@import" not in html
        assert "url(" not in html.replace("url(#", "")
        policy = [a["content"] for _, a in self.tags if a.get("http-equiv")]
        assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]
