"""Reports: whole, self-contained, equal to the stored numbers, and clear about what is missing."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stored_runs import (
    EXPERTS,
    NUM_CLASSES,
    WATCHED,
    Edit,
    Page,
    bare,
    bare_run,
    in_turn_run,
    make_diagnostics,
    make_evaluation,
    make_in_turn,
    make_metrics,
    read_csv,
    score,
    write_run,
)

from dwf.checks import CheckpointError
from dwf.report import write_report
from dwf.report.checklist import checklist
from dwf.report.figures.canvas import Figure, draw_figure
from dwf.report.figures.pictures import amplification
from dwf.report.results import Examples, load_results
from dwf.report.words import percent, radius

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


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    evaluation, arrays = make_evaluation()
    evaluation["diagnostics"] = make_diagnostics()
    folder = write_run(tmp_path_factory.mktemp("runs") / "a", evaluation, arrays, make_metrics())
    write_report(folder)
    return folder


@pytest.fixture(scope="module")
def html(run: Path) -> str:
    return (run / "report.html").read_text()


@pytest.fixture(scope="module")
def text(html: str) -> str:
    return Page(html).text


def figure_csv(run: Path, name: str) -> list[dict[str, str]]:
    return read_csv(run / "figures" / f"{name}.csv")


def test_self_contained(html: str) -> None:
    Page(html).assert_self_contained(html)
    assert len(html) < 3_000_000


def test_sections_in_order_and_accessible(html: str) -> None:
    page = Page(html)
    assert [a["id"] for t, a in page.tags if t == "h2"] == SECTIONS
    targets = [a["href"] for t, a in page.tags if t == "a"]
    assert targets[: len(SECTIONS)] == [f"#{name}" for name in SECTIONS]
    assert set(targets) == {f"#{name}" for name in SECTIONS}
    assert all(a.get("alt") for t, a in page.tags if t == "img")
    drawings = [a for _, a in page.tags if a.get("role") == "img"]
    curves, gate, experts, training = 2, 3 + 1, 1 + 4, 1
    assert len(drawings) == curves + gate + experts + training
    assert all(a["aria-label"] for a in drawings)
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))


def test_headline_and_table(text: str) -> None:
    evaluation, _ = make_evaluation()
    assert "Worst-case robust accuracy at epsilon 0.15 few images 67.2 %" in text
    assert "Few images: 500, fewer than 1,000." in text
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
    assert html.index("7 of 500 gradients") < html.index("few images: 500")


def test_csv_equals_json(run: Path) -> None:
    evaluation, arrays = make_evaluation()
    rows = {row["name"]: row for row in evaluation["attacks"]}
    found = figure_csv(run, "accuracy_over_epsilon")
    assert [row["attack"] for row in found[:-1]] == [n for n in rows if n[:4] in ("clea", "FGSM")]
    for row in found[:-1] + figure_csv(run, "accuracy_over_steps"):
        stored = rows[row["attack"]]
        assert float(row["epsilon"]) == stored["epsilon"]
        assert float(row["accuracy"]) == stored["accuracy"]
        interval = [float(row["interval_low"]), float(row["interval_high"])]
        assert interval == stored["interval"]
    assert float(found[-1]["accuracy"]) == evaluation["worst_case"]["accuracy"]
    for i, name in enumerate(WATCHED):
        weights = evaluation["gate"]["mean_weights"][name]
        slug = name.lower().replace(" ", "-").replace(".", "-")
        table = figure_csv(run, f"gate_weights_{i}_{slug}")
        assert len(table) == NUM_CLASSES * len(EXPERTS)
        for row in table:
            stored = weights[int(row["class"])][EXPERTS.index(row["expert"])]
            assert float(row["mean_weight"]) == stored
    for row in figure_csv(run, "gate_entropy"):
        assert float(row["entropy"]) == evaluation["gate"]["entropy"][row["attack"]]
    for row in figure_csv(run, "expert_accuracy"):
        stored = [
            *evaluation["experts"]["accuracy"][row["attack"]],
            rows[row["attack"]]["accuracy"],
        ]
        assert float(row["accuracy"]) == stored[[*EXPERTS, "mixture"].index(row["expert"])]
    metrics = make_metrics()
    curves = figure_csv(run, "training_curves")
    assert len(curves) == len(metrics)
    for row, stored in zip(curves, metrics, strict=True):
        for key, value in row.items():
            kept = stored.get(key)
            assert value == ("" if kept is None else str(kept)), key
    examples = figure_csv(run, "examples")
    assert [int(row["prediction_adversarial"]) for row in examples] == list(
        arrays["example_predictions_adversarial"]
    )


def test_diagnostics_equal_the_stored_numbers(run: Path, text: str) -> None:
    table = make_diagnostics()
    names = table["names"]
    for row in figure_csv(run, "transfer"):
        i, j = names.index(row["crafted on"]), names.index(row["judged by"])
        assert float(row["accuracy"]) == table["transfer"][i][j]
    kinds = {"clean": "clean", "via mixture": "mixture_attacked", "via itself": "self_attacked"}
    for row in figure_csv(run, "experts_under_attack"):
        stored = table["accuracy"][kinds[row["attack"]]]
        assert float(row["accuracy"]) == stored[names.index(row["expert"])]
    for row in figure_csv(run, "gate_load"):
        key, when = row["load"].split(", ")
        key = {"weight": "mean_weight", "preferred": "top_share"}[key]
        assert float(row["share"]) == table["gate"][when][key][names.index(row["expert"])]
    for row in figure_csv(run, "gradient_cosine"):
        i, j = names.index(row["expert"]), names.index(row["other expert"])
        stored = table["gradient_cosine"][i][j]
        assert row["cosine"] == ("" if stored is None else str(stored))
    assert "10 images, PGD-2 within epsilon 0.15, step size 0.02" in text
    assert "changes the preferred expert for 30.0 % of the images" in text
    assert "Mixture, worst case25.0 % of the images stay right" in text
    assert "Dead expertsnone" in text  # one died only under attack


def test_figures_are_pairs(run: Path) -> None:
    stems = {path.stem for path in (run / "figures").iterdir()}
    assert len(stems) == 13
    for stem in stems:
        png = (run / "figures" / f"{stem}.png").read_bytes()
        assert png.startswith(b"\x89PNG")
        assert (run / "figures" / f"{stem}.csv").stat().st_size > 0
    assert not [path for path in run.rglob("*") if "tmp" in path.name]


@pytest.mark.slow
def test_equal_input_equal_bytes(run: Path) -> None:
    """Also in another process, whose MPLBACKEND names no backend, as that of a notebook may."""
    files = [run / "report.html", *run.glob("figures/*")]
    before = {file: file.read_bytes() for file in files}
    code = "import pathlib, sys, dwf.report; dwf.report.write_report(pathlib.Path(sys.argv[1]))"
    environment = os.environ | {"MPLBACKEND": "no_such_backend"}
    subprocess.run([sys.executable, "-c", code, str(run)], env=environment, check=True)
    for file in files:
        assert file.read_bytes() == before[file], file.name
    assert len(files) == len([run / "report.html", *run.glob("figures/*")])


def test_missing_parts_say_so(tmp_path: Path) -> None:
    text = Page(write_report(bare_run(tmp_path / "a")).read_text()).text
    for title in (
        "Robust accuracy against steps",
        "Gate weights",
        "Gate entropy",
        "Accuracy of each expert",
        "Example images",
        "Training curves",
        "Each expert under attack",
    ):
        assert f"{title}: not measured." in text
    assert "no other network to craft images on" in text
    assert "None: no check of this evaluation saw a sign" in text
    assert "every attack starts once To measure it: dwf eval" in text
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

    text = Page(write_report(bare_run(tmp_path / "a", edit)).read_text()).text
    assert "Few images" not in text
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
    os.utime(other, ns=(1, 1))  # older, but the grid has no doubts about itself
    assert "Other evaluationspaper" in Page(write_report(folder).read_text()).text
    newest = folder / "evaluations" / "standard.json"
    newest.write_text(other.read_text().replace('"suite": "quick"', '"suite": "standard"'))
    assert "Other evaluationspaper, quick" in Page(write_report(folder).read_text()).text
    newest.unlink()
    assert "Other evaluationsquick" in Page(write_report(folder, "paper").read_text()).text
    paper.unlink()
    assert "Other evaluations" not in Page(write_report(folder).read_text()).text
    with pytest.raises(
        CheckpointError, match=r"no suite 'paper', expected one of \['quick'\]; run"
    ):
        write_report(folder, "paper")
    other.unlink()
    with pytest.raises(CheckpointError, match="run `dwf eval"):
        write_report(folder)
    with pytest.raises(CheckpointError, match="not a run folder"):
        write_report(tmp_path / "b")


def test_a_contradiction_leaves_no_page(tmp_path: Path) -> None:
    """tests/test_record.py has all of them."""
    folder = bare_run(tmp_path / "a", lambda table: table["attacks"][1].update(num_correct=501))
    with pytest.raises(CheckpointError, match=r"paper\.json: attacks\[1\]\.num_correct: expected"):
        write_report(folder)
    assert not (folder / "report.html").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *itertools.product(["environment.json", "evaluations/paper.json"], [None, "<html>", "[]"]),
        *(("config.json", x) for x in (None, "", "<html>", '{"a": ', "[]", "\x00\xff")),
    ],
)
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
    found = figure_csv(folder, "training_curves")
    assert len(found) == len(rows)
    assert found[4]["loss"] == "0.125"


@pytest.mark.parametrize(
    "damage", [b'{"kind": "tra', b'{"global_step": "x"}', b"\xff\xfe", b"[" * 10_000, b"null"]
)
def test_one_damaged_line_of_metrics(
    damage: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Lost is that line alone, and it is said."""
    folder = bare_run(tmp_path / "a")
    lines = [json.dumps(row).encode() for row in make_metrics()[:6]]
    (folder / "metrics.jsonl").write_bytes(b"\n".join([*lines[:2], damage, *lines[2:]]) + b"\n")
    write_report(folder)
    assert len(figure_csv(folder, "training_curves")) == len(lines)
    assert "1 damaged lines are left out, first line 3: " in caplog.text


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


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = in_turn_run(tmp_path_factory.mktemp("foreign") / "net")
    write_report(folder)
    return folder


def table_rows(html: str, name: str) -> dict[str, list[str]]:
    """Cells of the tables of one class, by their row's head."""
    table = html.split(f'<table class="{name}">')[1].split("</table>")[0]
    rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.S) for row in table.split("<tr>")[2:]]
    texts = [[Page(cell).text for cell in row] for row in rows]
    return {row[0]: row[1:] for row in texts}


def test_attacks_in_turn(foreign: Path) -> None:
    html = (foreign / "report.html").read_text()
    text = Page(html).text
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
    text = Page((foreign / "report.html").read_text()).text
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


def test_bounds_stand_beside_the_worst_case(tmp_path: Path) -> None:
    of_model = {"method": "interval bounds", "epsilon": 8 / 255, "of": "model", **score(250)}
    smoothed = {**of_model, **score(120), "method": "smoothing", "of": "smoothed model"}

    def edit(evaluation: dict[str, Any]) -> None:
        evaluation["certified"] = [of_model, {**smoothed, "clean": 0.75}]

    page = write_report(in_turn_run(tmp_path / "net", edit))
    text = Page(page.read_text()).text
    result = text[: text.index("Protocol")]
    assert "Certified at epsilon 8/255 = 0.0314 50.0 % 95 % interval" in result
    assert "n = 500, by interval bounds. No attack can break these images, by proof" in result
    assert result.index("Worst-case") < result.index("Clean accuracy") < result.index("Certified")
    assert "Certified, of the smoothed model at epsilon 8/255 = 0.0314 24.0 %" in result
    assert "Another classifier than the model, right on 75.0 % without an attack." in result


def test_figures_of_attacks_in_turn(foreign: Path) -> None:
    found = figure_csv(foreign, "accuracy_over_epsilon")
    assert [float(row["epsilon"]) for row in found] == [0.0, 4 / 255, 8 / 255]
    assert [float(row["accuracy"]) for row in found] == [480 / 500, 373 / 500, 265 / 500]
    steps = figure_csv(foreign, "accuracy_over_steps")
    assert [float(row["accuracy"]) for row in steps] == [1.0, 0.75, 0.5, 0.5, 0.5, 0.25]
    assert [row["mean"] for row in figure_csv(foreign, "loss_over_steps")] == ["0.1", "0.5", ""]
    _, arrays = make_in_turn()
    cams = figure_csv(foreign, "grad_cam")
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


def test_heatmaps_of_other_experts_are_refused(tmp_path: Path) -> None:
    folder = in_turn_run(tmp_path / "a", lambda table: table["traces"].update(experts=["a"]))
    with pytest.raises(CheckpointError, match=r"full\.npz: cam_maps: expected finite maps \[1, 3"):
        load_results(folder)


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


def test_names_in_every_script_draw_without_a_warning() -> None:
    """The drawing of the page keeps the name; the picture, whose font lacks it, says "?"."""

    def drawn(name: str) -> Figure:
        def draw(canvas: Any) -> None:
            axes = canvas.subplots()
            axes.set_title(f"class {name}")
            axes.set_xticks([0, 1], [name, "b"])

        return draw_figure("x", "x", draw, alt="", caption="", columns=["a"], rows=[[name]])

    for name in ("\u732b\u72ac", "\U0001f600", "\u0639\u0631\u0628\u064a", "\u00fc\u00df"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            figure = drawn(name)
        assert figure.svg is not None
        assert name in figure.svg
        assert figure.rows == [[name]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert drawn("\u732b").png == drawn("?").png
        assert drawn("\u00fc").png != drawn("?").png


@pytest.mark.parametrize(("largest", "times"), [(0.0, 50), (8 / 255, 10), (0.15, 2), (0.6, 1)])
def test_differences_are_amplified_as_far_as_nothing_clips(largest: float, times: int) -> None:
    clean = np.full((1, 3, 4, 4), 0.2, dtype=np.float32)
    examples = Examples("PGD", clean, clean + np.float32(largest), [0], [0], [1])
    assert amplification(examples) == times
