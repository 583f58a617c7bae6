"""Reports: whole, self-contained, equal to the stored numbers, and clear about what is missing."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dwf.checks import CheckpointError
from dwf.report import write_report
from dwf.report.checklist import checklist
from dwf.report.results import load_results
from dwf.report.words import percent, radius

EXPERTS = ["benign", *(f"fgsm-{i}" for i in range(4)), *(f"pgd-{i}" for i in range(4))]
WATCHED = ["clean", "FGSM 0.14", "PGD-50"]
NUM_IMAGES, NUM_CLASSES, EPSILON = 500, 10, 0.15
SECTIONS = [
    "result",
    "findings",
    "checklist",
    "attacks",
    "curves",
    "gate",
    "experts",
    "examples",
    "training",
    "made",
]
Edit = Callable[[dict[str, Any]], None]


def wilson(num_correct: int, n: int) -> list[float]:
    z, p = 1.96, num_correct / n
    center = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    return [max(0.0, center - half), min(1.0, center + half)]


def score(num_correct: int, n: int = NUM_IMAGES) -> dict[str, Any]:
    interval = wilson(num_correct, n)
    accuracy = num_correct / n
    return {
        "num_images": n, "num_correct": num_correct, "accuracy": accuracy, "interval": interval
    }  # fmt: skip


def attack(name: str, kind: str, num_correct: int, **fields: Any) -> dict[str, Any]:
    row = {
        "name": name, "kind": kind, "epsilon": 0.0, "step_size": None, "num_steps": 0,
        "num_restarts": 1, "random_start": False, "eot_samples": 1, **score(num_correct),
        "num_non_finite": 0, "seconds": 1.25, "num_forwards": 500, "num_backwards": 500,
        "same_as": None,
    }  # fmt: skip
    return row | fields


def make_evaluation() -> tuple[dict[str, Any], dict[str, np.ndarray]]:
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
    # nested outcomes, so that the worst case is the weakest row
    correct = np.stack([np.arange(NUM_IMAGES) < row["num_correct"] for row in attacks])
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
        "worst_case_all": {
            "epsilon": 0.18, **score(330), "attacks": [row["name"] for row in attacks]
        },
        "findings": [
            {"name": "small_sample", "severity": "note", "message": "quick: 500 images"},
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
        "correct": correct,
        "sample_index": np.arange(NUM_IMAGES),
        "example_clean": clean,
        "example_adversarial": np.clip(clean + noise, 0, 1).astype(np.float32),
        "example_labels": np.arange(8),
        "example_predictions_clean": np.arange(8),
        "example_predictions_adversarial": np.array([0, 1, 8, 3, 9, 5, 6, 1]),
        "example_attack": np.array("PGD-50"),
    }
    return evaluation, arrays


def make_metrics() -> list[dict[str, Any]]:
    """Nine experts and the joint phase, logged often."""
    rows: list[dict[str, Any]] = []
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
            rows.append(
                base
                | {
                    "kind": "train", "loss": 2.3 * (1.05 - done) ** 2 + 0.1, "clean_accuracy": done,
                    "robust_accuracy": None, "learning_rate": 0.1, "images_per_s": 9000.0,
                    "seconds": 0.1,
                }
            )  # fmt: skip
            if step % 40 == 0:
                robust = None if phase.endswith("benign") else 0.1 + 0.6 * done
                rows.append(
                    base
                    | {
                        "kind": "validation", "clean_accuracy": 0.5 + 0.48 * done,
                        "robust_accuracy": robust, "num_images": 200,
                    }
                )  # fmt: skip
    return rows


def write_run(
    folder: Path,
    evaluation: dict[str, Any],
    arrays: dict[str, np.ndarray] | None,
    metrics: list[dict[str, Any]] | None,
) -> Path:
    (folder / "evaluations").mkdir(parents=True)
    config = {
        "preset": "dwf_digits", "defense": "divided_we_fall", "seed": 0,
        "data": {"name": "digits", "num_validation": 200},
        "attack": {"epsilon": EPSILON, "num_steps": [10, 20, 30, 40, 50]},
    }  # fmt: skip
    environment = {
        "argv": ["dwf", "train", "digits", "--out", "runs/my run"], "commit": "0123456789ab",
        "python": "3.11.2", "versions": {"torch": "2.15.0"}, "gpus": [], "cuda": None,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "environment.json").write_text(json.dumps(environment))
    (folder / "evaluations" / "paper.json").write_text(json.dumps(evaluation))
    if arrays is not None:
        np.savez_compressed(folder / "evaluations" / "paper.npz", **arrays)
    if metrics is not None:
        lines = "".join(json.dumps(row) + "\n" for row in metrics)
        (folder / "metrics.jsonl").write_text(lines)
    return folder


class Page(HTMLParser):
    """What a browser would load or jump to, and the text it would show."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br", "path", "rect", "use", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self.open:
            assert self.open.pop() == tag, f"</{tag}> closes another tag"

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_run(tmp_path_factory.mktemp("runs") / "a", *make_evaluation(), make_metrics())
    write_report(folder)
    return folder


@pytest.fixture(scope="module")
def html(run: Path) -> str:
    return (run / "report.html").read_text()


def read_csv(run: Path, name: str) -> list[dict[str, str]]:
    with open(run / "figures" / f"{name}.csv", newline="") as stream:
        return list(csv.DictReader(stream))


def bare(evaluation: dict[str, Any]) -> None:
    """Leave what is optional out, and one attack."""
    evaluation.update(gate=None, experts=None, findings=[], environment={})
    del evaluation["attacks"][2:]
    names = [row["name"] for row in evaluation["attacks"]]
    for key in ("worst_case", "worst_case_all"):
        evaluation[key].update(score(480), attacks=names)


def bare_run(folder: Path, edit: Edit = lambda evaluation: None) -> Path:
    """A run folder that draws little, changed by ``edit``."""
    evaluation, _ = make_evaluation()
    bare(evaluation)
    edit(evaluation)
    return write_run(folder, evaluation, None, None)


def test_self_contained(html: str) -> None:
    page = Page(html)
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "object", "embed")
        for name in ("src", "href", "xlink:href", "srcset", "data"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:image/png;base64,")), (tag, value)
    assert "@import" not in html
    assert not re.search(r"url\((?!#)", html)
    policy = [a["content"] for t, a in page.tags if a.get("http-equiv")]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]
    assert len(html) < 3_000_000


def test_sections_in_order_and_accessible(html: str) -> None:
    page = Page(html)
    assert [a["id"] for t, a in page.tags if t == "h2"] == SECTIONS
    targets = [a["href"] for t, a in page.tags if t == "a"]
    assert targets[: len(SECTIONS)] == [f"#{name}" for name in SECTIONS]
    assert set(targets) == {f"#{name}" for name in SECTIONS}
    assert all(a.get("alt") for t, a in page.tags if t == "img")
    drawings = [a for _, a in page.tags if a.get("role") == "img"]
    assert len(drawings) == 2 + 3 + 1 + 1 + 1
    assert all(a["aria-label"] for a in drawings)
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    assert page.open == []


def test_headline_and_table(html: str) -> None:
    text = " ".join(Page(html).text.split())
    evaluation, _ = make_evaluation()
    assert "Worst-case robust accuracy at epsilon 0.15 quick 67.2 %" in text
    assert "Quick evaluation: 500 images, fewer than 1,000." in text
    assert "Clean accuracy 97.8 %" in text
    for row in evaluation["attacks"]:
        low, high = (f"{100 * bound:.1f}" for bound in row["interval"])
        assert row["name"] in text
        assert f"{100 * row['accuracy']:.1f} % {low} to {high} % 500 0 1.2" in text
    assert "same computation as PGD-100" in text
    assert "dwf train digits --out 'runs/my run'" in text
    assert "0123456789ab" in text
    assert "ab" * 32 in text
    assert "AutoAttack" in text
    assert "paper-compat" not in text


def test_findings_are_sorted_by_severity(html: str) -> None:
    assert html.index("7 of 500 gradients") < html.index("quick: 500 images")


def test_csv_equals_json(run: Path) -> None:
    evaluation, arrays = make_evaluation()
    rows = {row["name"]: row for row in evaluation["attacks"]}
    found = read_csv(run, "accuracy_over_epsilon")
    assert [row["attack"] for row in found[:-1]] == [n for n in rows if n[:4] in ("clea", "FGSM")]
    for row in found[:-1] + read_csv(run, "accuracy_over_steps"):
        stored = rows[row["attack"]]
        assert float(row["epsilon"]) == stored["epsilon"]
        assert float(row["accuracy"]) == stored["accuracy"]
        interval = [float(row["interval_low"]), float(row["interval_high"])]
        assert interval == stored["interval"]
    assert float(found[-1]["accuracy"]) == evaluation["worst_case"]["accuracy"]
    for i, name in enumerate(WATCHED):
        weights = evaluation["gate"]["mean_weights"][name]
        slug = name.lower().replace(" ", "-").replace(".", "-")
        table = read_csv(run, f"gate_weights_{i}_{slug}")
        assert len(table) == NUM_CLASSES * len(EXPERTS)
        for row in table:
            stored = weights[int(row["class"])][EXPERTS.index(row["expert"])]
            assert float(row["mean_weight"]) == stored
    for row in read_csv(run, "gate_entropy"):
        assert float(row["entropy"]) == evaluation["gate"]["entropy"][row["attack"]]
    for row in read_csv(run, "expert_accuracy"):
        stored = [
            *evaluation["experts"]["accuracy"][row["attack"]],
            rows[row["attack"]]["accuracy"],
        ]
        assert float(row["accuracy"]) == stored[[*EXPERTS, "mixture"].index(row["expert"])]
    metrics = make_metrics()
    curves = read_csv(run, "training_curves")
    assert len(curves) == len(metrics)
    for row, stored in zip(curves, metrics, strict=True):
        for key, value in row.items():
            kept = stored.get(key)
            assert value == ("" if kept is None else str(kept)), key
    examples = read_csv(run, "examples")
    assert [int(row["prediction_adversarial"]) for row in examples] == list(
        arrays["example_predictions_adversarial"]
    )


def test_figures_are_pairs(run: Path) -> None:
    stems = {path.stem for path in (run / "figures").iterdir()}
    assert len(stems) == 9
    for stem in stems:
        png = (run / "figures" / f"{stem}.png").read_bytes()
        assert png.startswith(b"\x89PNG")
        assert (run / "figures" / f"{stem}.csv").stat().st_size > 0
    assert not [path for path in run.rglob("*") if "tmp" in path.name]


def test_equal_input_equal_bytes(run: Path) -> None:
    before = {
        path.name: path.read_bytes() for path in [run / "report.html", *run.glob("figures/*")]
    }
    assert write_report(run, "paper") == run / "report.html"
    for path in [run / "report.html", *run.glob("figures/*")]:
        assert path.read_bytes() == before.pop(path.name), path.name
    assert not before


def test_missing_parts_say_so(tmp_path: Path) -> None:
    text = Page(write_report(bare_run(tmp_path / "a")).read_text()).text
    for title in (
        "Robust accuracy against steps",
        "Gate weights",
        "Gate entropy",
        "Accuracy of each expert",
        "Example images",
        "Training curves",
    ):
        assert f"{title}: not measured." in text
    assert "None: no check of this evaluation saw a sign" in text
    assert "every attack starts once To measure it: dwf eval" in " ".join(text.split())
    assert "VALID: no known sign was seen that robustness is overestimated" in text
    assert [path.name for path in sorted((tmp_path / "a/figures").iterdir())] == [
        "accuracy_over_epsilon.csv",
        "accuracy_over_epsilon.png",
    ]


def test_clean_row_alone(tmp_path: Path) -> None:
    def edit(evaluation: dict[str, Any]) -> None:
        del evaluation["attacks"][1:]
        for key in ("worst_case", "worst_case_all"):
            evaluation[key].update(score(489), attacks=["clean"])

    text = Page(write_report(bare_run(tmp_path / "a", edit)).read_text()).text
    assert "Robust accuracy against epsilon: not measured." in text
    assert "the suite holds no single step beside iterative attacks" in text


def test_paper_compat_is_loud(tmp_path: Path) -> None:
    def edit(evaluation: dict[str, Any]) -> None:
        evaluation.update(protocol="paper-compat", clamp="unit")
        evaluation["attacks"][1].update(epsilon=8 / 255, name="FGSM 0.0314")
        for key in ("worst_case", "worst_case_all"):
            evaluation[key]["attacks"] = ["clean", "FGSM 0.0314"]

    html = write_report(bare_run(tmp_path / "a", edit)).read_text()
    text = Page(html).text
    assert "Protocol paper-compat: these numbers are not robustness in pixel space." in text
    assert text.index("Protocol paper-compat") < text.index("Worst-case robust accuracy")
    assert "8/255" not in text
    assert "units of the normalized image, attacked tensors clamped: unit" in text


def test_large_run_is_not_quick_and_shows_fractions_of_255(tmp_path: Path) -> None:
    def edit(evaluation: dict[str, Any]) -> None:
        evaluation["epsilon"] = 8 / 255
        evaluation["data"]["num_images"] = 10_000
        for part in (*evaluation["attacks"], evaluation["worst_case"]):
            part.update(score(6_543, 10_000), epsilon=8 / 255)

    text = " ".join(Page(write_report(bare_run(tmp_path / "a", edit)).read_text()).text.split())
    assert "Quick" not in text
    assert "Worst-case robust accuracy at epsilon 8/255 = 0.0314 65.43 %" in text


def test_everything_is_escaped(tmp_path: Path) -> None:
    attack_name = '<script>alert("$x^&")</script>'

    def edit(evaluation: dict[str, Any]) -> None:
        evaluation["model"] = evaluation["data"]["name"] = attack_name
        evaluation["data"]["notes"] = evaluation["environment"]["argv"] = [attack_name]
        finding = dict.fromkeys(("name", "message", "remedy"), attack_name)
        evaluation["findings"] = [finding | {"severity": "suspect"}]
        evaluation["attacks"][1]["name"] = attack_name
        evaluation["attacks"][1]["same_as"] = attack_name
        evaluation["gate"] = {
            "attacks": [attack_name],
            "experts": [attack_name, "_hidden"],
            "mean_weights": {attack_name: [[0.5, 0.5]]},
            "entropy": {attack_name: 0.69},
        }
        for key in ("worst_case", "worst_case_all"):
            evaluation[key]["attacks"] = ["clean", attack_name]

    folder = bare_run(tmp_path / "<b>run", edit)
    (folder / "config.json").write_text(json.dumps({"preset": attack_name, attack_name: 1}))
    (folder / "environment.json").write_text(json.dumps({"commit": attack_name, attack_name: "x"}))
    html = write_report(folder).read_text()
    assert "<script" not in html
    assert "<b>run" not in html
    assert attack_name in Page(html).text


def test_choice_of_suite(tmp_path: Path) -> None:
    folder = bare_run(tmp_path / "a")
    paper = folder / "evaluations" / "paper.json"
    other = folder / "evaluations" / "quick.json"
    other.write_text(paper.read_text().replace('"suite": "paper"', '"suite": "quick"'))
    assert "Other evaluationsquick" in Page(write_report(folder).read_text()).text
    assert "Other evaluationspaper" in Page(write_report(folder, "quick").read_text()).text
    paper.unlink()
    assert "Other evaluations" not in Page(write_report(folder).read_text()).text
    with pytest.raises(CheckpointError, match=r"no suite 'paper', expected one of \['quick'\]"):
        write_report(folder, "paper")
    other.unlink()
    with pytest.raises(CheckpointError, match="run `dwf eval"):
        write_report(folder)
    with pytest.raises(CheckpointError, match="expected a run folder"):
        write_report(tmp_path / "b")


def paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every key of nested JSON, of each list the first item."""
    if isinstance(value, dict):
        parts = value.items()
    elif isinstance(value, list):
        parts = list(enumerate(value))[:1]
    else:
        parts = []
    return [p for key, part in parts for p in [(*path, key), *paths(part, (*path, key))]]


def test_every_key_missing_or_mistyped_is_named(tmp_path: Path) -> None:
    """Take each key out, and put an object in its place: it is optional or the error names it."""
    evaluation, arrays = make_evaluation()
    folder = write_run(tmp_path / "a", evaluation, arrays, None)
    file = folder / "evaluations" / "paper.json"
    optional = {
        ("gate",),
        ("experts",),
        *(("experts", "accuracy", name) for name in WATCHED),
        ("worst_case", "epsilon"),
        ("worst_case_all", "epsilon"),
        *(("attacks", 0, key) for key in ("epsilon", "step_size", "same_as")),
        ("num_parameters",),
        ("run",),
    }
    free = {"environment"}  # shown as it is
    cases = [(path, change) for path in paths(evaluation) for change in ("missing", "mistyped")]
    assert len(cases) > 150
    for path, change in cases:
        broken = json.loads(json.dumps(evaluation))
        parent: Any = broken
        for key in path[:-1]:
            parent = parent[key]
        if change == "mistyped":
            parent[path[-1]] = {"not": "this"}
        elif isinstance(parent, dict):
            del parent[path[-1]]
        else:
            continue
        file.write_text(json.dumps(broken))
        if path[0] in free or (change == "missing" and path in optional):
            load_results(folder)
            continue
        name = next(key for key in reversed(path) if isinstance(key, str))
        with pytest.raises(CheckpointError, match=f"^{re.escape(str(file))}: .*{re.escape(name)}"):
            load_results(folder)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda e: e.update(schema=2), "schema: expected 1, which this version reads, found 2"),
        (lambda e: e.update(attacks=[]), "attacks: expected at least one row"),
        (lambda e: e["attacks"][1].update(accuracy=0.99), r"\[1\].accuracy: expected 480/500 ="),
        (lambda e: e["attacks"][1].update(num_correct=501), "num_correct: expected at most 500"),
        (lambda e: e["attacks"][1].update(interval=[0.1, 0.2]), "interval: expected two numbers"),
        (lambda e: e["attacks"][1].update(accuracy=float("nan")), "accuracy: expected a finite"),
        (lambda e: e["attacks"][1].update(seconds=10**400), "seconds: expected a finite"),
        (lambda e: e["worst_case"].update(score(481)), "expected at most the 480 of 'FGSM 0.02'"),
        (lambda e: e["worst_case"].update(attacks=["x"]), r"worst_case.attacks\[0\]: expected one"),
    ],
)  # fmt: skip
def test_contradictions_are_refused(tmp_path: Path, edit: Edit, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        write_report(bare_run(tmp_path / "a", edit))
    assert not (tmp_path / "a" / "report.html").exists()


@pytest.mark.parametrize("name", ["config.json", "environment.json", "evaluations/paper.json"])
@pytest.mark.parametrize("content", [None, "", "<html>", '{"a": ', "[]", "\x00\xff"])
def test_damaged_json_is_named(tmp_path: Path, name: str, content: str | None) -> None:
    folder = bare_run(tmp_path / "a")
    file = folder / name
    file.unlink() if content is None else file.write_bytes(content.encode("latin-1"))
    with pytest.raises(CheckpointError, match=Path(name).parent.name or name):
        write_report(folder)


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    folder = bare_run(tmp_path / "a")
    (folder / "figures").write_text("in the way")
    with pytest.raises(CheckpointError, match="figures: could not be made, File exists"):
        write_report(folder)
    assert not (folder / "report.html").exists()


def drop(name: str) -> Edit:
    return lambda arrays: arrays.pop(name)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda a: a["correct"].__setitem__((0, 0), False), "correct: 488 images for 'clean'"),
        (lambda a: a.update(correct=a["correct"][:, 1:]), "correct: expected bool"),
        (drop("example_labels"), "example_labels: missing"),
        (lambda a: a.update(example_labels=np.zeros(3, int)), "example_labels: expected 8"),
        (lambda a: a["example_clean"].fill(np.nan), "example_clean: expected finite images"),
        (lambda a: a.update(example_attack=np.array({}, object)), "not a readable .npz"),
    ],
)  # fmt: skip
def test_damaged_arrays_are_named(tmp_path: Path, edit: Edit, message: str) -> None:
    evaluation, arrays = make_evaluation()
    edit(arrays)
    folder = write_run(tmp_path / "a", evaluation, arrays, None)
    with pytest.raises(CheckpointError, match=r"paper\.npz: .*" + message):
        write_report(folder)


@pytest.mark.parametrize("content", [b"", b"<html>", b"PK\x03\x04 truncated"])
def test_truncated_arrays_are_named(tmp_path: Path, content: bytes) -> None:
    folder = bare_run(tmp_path / "a")
    (folder / "evaluations" / "paper.npz").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"paper\.npz: not a readable"):
        write_report(folder)


def test_metrics_of_a_killed_and_resumed_run(tmp_path: Path) -> None:
    folder = bare_run(tmp_path / "a")
    rows = make_metrics()[:6]
    again = [rows[4] | {"loss": 0.125}]
    lines = [json.dumps(row) for row in rows + again]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"kind": "tra')
    write_report(folder)
    found = read_csv(folder, "training_curves")
    assert len(found) == len(rows)
    assert found[4]["loss"] == "0.125"
    (folder / "metrics.jsonl").write_text("\n".join([lines[0][:20], *lines]))
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl: line 1: not readable"):
        write_report(folder)
    (folder / "metrics.jsonl").write_text(json.dumps(rows[0] | {"global_step": "x"}) + "\n")
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl: line 1.global_step: expected an"):
        write_report(folder)


def test_large_images_keep_the_page_small(tmp_path: Path) -> None:
    evaluation, arrays = make_evaluation()
    bare(evaluation)
    rng = np.random.default_rng(0)
    images = rng.uniform(0, 1, (3, 3, 224, 224)).astype(np.float32)
    for name in arrays:
        if name.startswith(("example_labels", "example_predictions")):
            arrays[name] = arrays[name][:3]
    arrays.update(example_clean=images, example_adversarial=images, correct=arrays["correct"][:2])
    evaluation["data"]["class_names"] = ["airplane"]
    html = write_report(write_run(tmp_path / "a", evaluation, arrays, None)).read_text()
    assert len(html) < 3_000_000
    assert "of 3 fit on this page" in html
    assert "Clean image of class airplane" in html


def make_in_turn() -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """An evaluation by attacks in turn at two radii, of a mixture trained elsewhere."""
    evaluation, arrays = make_evaluation()
    for name in [name for name in arrays if name.startswith("example")]:
        del arrays[name]
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
    rng = np.random.default_rng(0)
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
    maps = rng.uniform(size=(2, 3, 4, 4)).astype(np.float32)
    arrays = {
        "correct": np.stack([np.arange(NUM_IMAGES) < row["num_correct"] for row in rows]),
        "cam_maps": maps / maps.sum(axis=(2, 3), keepdims=True),
        "cam_images": rng.uniform(size=(3, 1, 8, 8)).astype(np.float32),
        "cam_labels": np.arange(3),
    }
    return evaluation, arrays


def in_turn_run(folder: Path, edit: Edit = lambda evaluation: None) -> Path:
    """The folder that an evaluation of a model from elsewhere leaves."""
    evaluation, arrays = make_in_turn()
    edit(evaluation)
    (folder / "evaluations").mkdir(parents=True)
    config = {"model": "nets.py:make", "data": {"name": "digits", "root": None}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "environment.json").write_text(json.dumps(evaluation["environment"]))
    (folder / "evaluations" / "full.json").write_text(json.dumps(evaluation))
    np.savez_compressed(folder / "evaluations" / "full.npz", **arrays)
    return folder


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = in_turn_run(tmp_path_factory.mktemp("foreign") / "net")
    write_report(folder)
    return folder


def table_rows(html: str, name: str) -> dict[str, list[str]]:
    """Cells of the tables of one class, by their row's head."""
    table = html.split(f'<table class="{name}">')[1].split("</table>")[0]
    rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.S) for row in table.split("<tr>")[2:]]
    texts = [[" ".join(Page(cell).text.split()) for cell in row] for row in rows]
    return {row[0]: row[1:] for row in texts}


def test_attacks_in_turn(foreign: Path) -> None:
    html = (foreign / "report.html").read_text()
    text = " ".join(Page(html).text.split())
    assert text.index("SUSPECT: a measurement gives reason to doubt") < text.index("Worst-case")
    assert "a row's accuracy is what stands after it, not what that attack reaches" in text
    assert "L-infinity, white box, epsilon 8/255 = 0.0314" in text
    assert "views break more measured 3.5, limit 3; 17 images: 3, 5, ... What to do: attack" in text
    rows = table_rows(html, "attacks")
    assert rows["clean no attack"][:3] == ["500", "20", "96.0 %"]
    apgd = rows["APGD-CE 0.03137 epsilon 8/255 = 0.0314, 100 steps"]
    assert apgd == ["373", "100", "54.6 %", "50.2 to 58.9 %", "500", "500", "1.2"]
    assert rows["noise epsilon 8/255 = 0.0314"][4:6] == ["-", "500"]
    worst = rows["Worst case within epsilon 8/255 = 0.0314"]
    assert worst[1:3] == ["235", "53.0 %"]
    assert worst[4:6] == ["4,500", "4,500"]
    assert table_rows(html, "attacks views") == {"gate only": ["4", "4"], "expert 0": ["3", "3"]}


def test_trained_elsewhere(foreign: Path) -> None:
    text = " ".join(Page((foreign / "report.html").read_text()).text.split())
    assert "Training: not recorded here." in text
    assert "parameters not known" in text
    assert "Training command" not in text
    assert "Evaluation command dwf eval runs/a" in text
    assert "Environment of the training" not in text


def test_checklist_is_answered_by_measurement(foreign: Path, html: str) -> None:
    items = table_rows((foreign / "report.html").read_text(), "checklist")
    answers = {question: cells[0] for question, cells in items.items()}
    assert answers["Are attacks adapted to the defense?"] == "no"  # view_wins
    assert answers["Do iterative attacks beat a single step?"] == "yes"
    assert answers["Are there enough images?"] == "no"
    assert answers["Does an undefended network fall to the same attacks?"] == "not measured"
    adapted = items["Are attacks adapted to the defense?"][1]
    assert "images that only these broke: gate only 8, expert 0 6" in adapted
    assert "broke 1 of 266 images" in items["Does doubling the steps change nothing?"][1]
    assert "50.0 %, 25.0 %" in items["Are there several random starts?"][1]
    assert "Square with 100 queries broke 0 of 380" in str(items)
    paper = table_rows(html, "checklist")
    assert paper["Do iterative attacks beat a single step?"][0] == "yes"
    assert "FGSM 0.14 leaves 76.8 %, multi-start PGD-100 x3 67.4 %" in str(paper)
    for question, suite in (
        ("Do attacks without gradients find nothing more?", "standard"),
        ("Does random noise find nothing more?", "quick"),
        ("Does doubling the steps change nothing?", "full"),
    ):
        answer, how = paper[question]
        assert answer == "not measured"
        assert how.endswith(f"--suite {suite}"), how
    assert "7 of 500 gradients" in paper["Does the loss have a gradient everywhere?"][1]


def test_a_finding_turns_the_answer(tmp_path: Path) -> None:
    finding = {"severity": "invalid", "message": "x", "measured": None, "limit": None}
    for name, question in (
        ("single_step_wins", "Do iterative attacks beat a single step?"),
        ("epsilon_helps", "Does a larger epsilon never help the defense?"),
        ("unbounded", "Does accuracy fall to chance when epsilon is unbounded?"),
        ("black_box_wins", "Do attacks without gradients find nothing more?"),
        ("noise_wins", "Does random noise find nothing more?"),
        ("not_converged", "Does doubling the steps change nothing?"),
        ("zero_gradient", "Does the loss have a gradient everywhere?"),
        ("random", "Is randomness averaged over?"),
    ):

        def edit(evaluation: dict[str, Any], name: str = name) -> None:
            evaluation.update(findings=[finding | {"name": name}], verdict="INVALID")

        results = load_results(in_turn_run(tmp_path / name, edit))
        statuses = {item.question: item.answer.status for item in checklist(results)}
        assert statuses[question] == "no", name


def test_figures_of_attacks_in_turn(foreign: Path) -> None:
    found = read_csv(foreign, "accuracy_over_epsilon")
    assert [float(row["epsilon"]) for row in found] == [0.0, 4 / 255, 8 / 255]
    assert [float(row["accuracy"]) for row in found] == [480 / 500, 373 / 500, 265 / 500]
    steps = read_csv(foreign, "accuracy_over_steps")
    assert [float(row["accuracy"]) for row in steps] == [1.0, 0.75, 0.5, 0.5, 0.5, 0.25]
    assert [row["mean"] for row in read_csv(foreign, "loss_over_steps")] == ["0.1", "0.5", ""]
    _, arrays = make_in_turn()
    cams = read_csv(foreign, "grad_cam")
    assert len(cams) == arrays["cam_maps"].size
    first = [float(row["share"]) for row in cams if (row["image"], row["expert"]) == ("1", "b")]
    np.testing.assert_array_equal(np.float32(first), arrays["cam_maps"][1, 1].ravel())
    page = Page((foreign / "report.html").read_text())
    pictures = [a for t, a in page.tags if t == "img" and "Heatmap" in str(a.get("alt"))]
    assert len(pictures) == 2 * 3


def test_leaderboard_file(foreign: Path, run: Path) -> None:
    found = json.loads((foreign / "robustbench.json").read_text())
    assert found == {
        "name": "net", "dataset": "digits", "threat_model": "Linf", "eps": 8 / 255,
        "clean_acc": "96.00", "reported": "53.00", "autoattack_acc": "53.00", "num_images": 500,
        "verdict": "SUSPECT", "unreliable": True,
    }  # fmt: skip
    assert not (run / "robustbench.json").exists()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda e: e.update(verdict="VALID"), "verdict: expected SUSPECT, as its findings say"),
        (lambda e: e.update(norm="l1"), r"norm: expected one of \['linf', 'l2'\]"),
        (lambda e: e["findings"][0].update(severity="x"), "severity: expected one of"),
        (lambda e: e["findings"][0].update(measured="x"), "measured: expected a finite number"),
        (lambda e: e["findings"][0].update(sample_indices=[-1]), r"sample_indices\[0\]: expected"),
        (lambda e: e["attacks"][3].update(broken_by={"a": -1}), "broken_by.a: expected an integer"),
        (lambda e: e["attacks"][3].update(num_attacked=0.5), "num_attacked: expected an integer"),
        (lambda e: e["curve"].reverse(), r"curve\[1\].epsilon: expected a radius above 0.03"),
        (lambda e: e["curve"][1].update(score(100)), "curve: expected the 265 of worst_case"),
        (lambda e: e["curve"][0].update(score(264)), r"curve\[1\].num_correct: expected at most"),
        (lambda e: e["traces"]["accuracy"].pop(), "accuracy: expected 2 rows"),
        (lambda e: e["traces"]["loss"]["low"].pop(), "low: expected 3 values"),
        (lambda e: e["traces"].update(experts=["a"]), r"cam_maps: expected finite maps \[1, 3"),
    ],
)  # fmt: skip
def test_contradictions_in_turn_are_refused(tmp_path: Path, edit: Edit, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        write_report(in_turn_run(tmp_path / "a", edit))


def test_l2_radii_are_no_fractions_of_255(tmp_path: Path) -> None:
    def edit(evaluation: dict[str, Any]) -> None:
        evaluation["norm"] = "l2"

    text = Page(write_report(in_turn_run(tmp_path / "a", edit)).read_text()).text
    assert "L2, white box, epsilon 0.03137" in text
    assert "8/255" not in text


def test_numbers_in_print() -> None:
    assert percent(0.5) == "50.0 %"
    assert percent(0.12345, 10_000) == "12.35 %"
    assert percent(None) == "-"
    assert radius(8 / 255) == "8/255 = 0.0314"
    assert radius(0.02) == "0.02"
    assert radius(8 / 255, of_255=False) == "0.03137"
    assert radius(0.0) == "0"
