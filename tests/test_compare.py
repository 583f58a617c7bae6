"""Comparisons: numbers of the run folders, seeds grouped, and nothing mixed that differs."""

import json
import re
import shutil
import statistics
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch
from small_runs import SETTINGS
from stored_runs import Page, read_csv
from torch.utils.flop_counter import FlopCounterMode

import dwf
from dwf import cli
from dwf.checks import CheckpointError, ConfigError
from dwf.evaluation import wilson_interval
from dwf.report import format_comparison, load_comparison, write_comparison
from dwf.report.compare import Spread
from dwf.report.table import ranked, show
from dwf.report.words import scaled

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = [
    *SETTINGS.split(),
    *"""
    pretrain.num_epochs=2 evaluation.fgsm_epsilon=0.1,0.14,0.18 evaluation.num_steps=2,3
    evaluation.multi_start_steps=2 evaluation.num_restarts=2 evaluation.adaptive_steps=4
    evaluation.num_images=60 evaluation.diagnostic_images=10 evaluation.diagnostic_steps=2
    """.split(),
]
COLUMNS = [
    "clean",
    "FGSM 0.14",
    "PGD-3",
    "multi-start PGD-2 x2",
    "adaptive PGD-4",
    "worst case",
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two seeds of DWF and one plain network, trained and evaluated."""
    parent = tmp_path_factory.mktemp("runs")
    common = [x for x in SMALL if not x.startswith("joint.")]
    commands = {
        "dwf-seed0": ["smoke", *SMALL, "joint.num_epochs=1", "joint.batch_size=16"],
        "dwf-seed1": ["smoke", *SMALL, "joint.num_epochs=1", "joint.batch_size=16", "seed=1"],
        "plain": ["plain_digits", *common, "evaluation.epsilon=0.15"],
    }
    for name, arguments in commands.items():
        folder = str(parent / name)
        # without the report that training ends with
        assert cli.main(["train", *arguments, "--out", folder, "--quiet", "--no-eval"]) == 0
        assert cli.main(["eval", folder, "--suite", "paper", "--quiet"]) == 0
    return [parent / name for name in commands]


@pytest.fixture
def copies(runs, tmp_path):
    """The same, free to be damaged; without weights and the outcomes of single images."""
    without = shutil.ignore_patterns("checkpoints", "tensorboard", "*.npz")
    return [Path(shutil.copytree(run, tmp_path / run.name, ignore=without)) for run in runs]


def evaluation(run):
    return json.loads((run / "evaluations" / "paper.json").read_text())


def edit(run, change):
    """Change an evaluation and store it."""
    table = evaluation(run)
    change(table)
    del table["sha256"]  # as an earlier version wrote it
    (run / "evaluations" / "paper.json").write_text(json.dumps(table))


def accuracy(run, column):
    table = evaluation(run)
    if column == "worst case":
        return table["worst_case"]["accuracy"]
    return next(row["accuracy"] for row in table["attacks"] if row["name"] == column)


def train_seconds(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return sum(row["seconds"] for row in rows if row["kind"] == "train")


class TestNumbers:
    @pytest.fixture(scope="class")
    @staticmethod
    def written(runs, tmp_path_factory):
        out = tmp_path_factory.mktemp("out") / "made" / "here"
        comparison = load_comparison(runs)
        assert write_comparison(comparison, out) == out / "comparison.html"
        return comparison, out

    def test_groups(self, written, runs):
        comparison, _ = written
        assert comparison.columns == COLUMNS
        mixture, plain = comparison.groups
        assert [entry.run for entry in mixture.entries] == runs[:2]
        assert [entry.seed for entry in mixture.entries] == [0, 1]
        assert (mixture.name, mixture.first.network) == ("Divided We Fall", "3 x resnet6 width 2")
        assert (plain.name, plain.first.network) == ("plain", "resnet6 width 2")
        for column in COLUMNS:
            values = [accuracy(run, column) for run in runs]
            spread = mixture.spread(column)
            assert spread.mean == pytest.approx((values[0] + values[1]) / 2)
            assert spread.sd == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
            assert spread.interval is None
            alone = plain.spread(column)
            assert (alone.mean, alone.sd) == (values[2], None)
            expected = wilson_interval(round(60 * values[2]), 60)
            assert alone.interval == pytest.approx(expected, abs=1e-6)
        assert len({accuracy(run, column) for run in runs for column in COLUMNS}) > 4

    def test_cost(self, written, runs):
        comparison, _ = written
        images = dwf.data.load("digits", split="test").images[:60].float() / 255
        for group, run in zip(comparison.groups, (runs[0], runs[2]), strict=True):
            model = dwf.load(run)
            assert group.first.num_parameters == sum(p.numel() for p in model.parameters())
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                model(images)
            assert group.first.flop_per_image == counter.get_total_flops() // 60 > 1000
        mixture, plain = comparison.groups
        assert mixture.train_seconds == pytest.approx(
            statistics.fmean(train_seconds(run) for run in runs[:2])
        )
        assert plain.train_seconds == pytest.approx(train_seconds(runs[2]))
        recorded = json.loads((runs[2] / "environment.json").read_text())["device"]
        assert recorded in plain.train_devices or plain.train_devices == ["CPU"]

    def test_csv(self, written, runs):
        _, out = written
        for row, run in zip(read_csv(out / "runs.csv"), runs, strict=True):
            table = evaluation(run)
            assert row["run"] == str(run)
            assert int(row["num_parameters"]) == table["num_parameters"]
            assert int(row["flop_per_image"]) == table["flop_per_image"]
            for attack in table["attacks"]:
                if attack["name"] not in COLUMNS:
                    continue
                found = [float(row[f"{attack['name']} {key}"]) for key in ("mean", "low", "high")]
                assert found == [attack["accuracy"], *attack["interval"]]
                assert int(row[f"{attack['name']} num_correct"]) == attack["num_correct"]
        mixture, plain = read_csv(out / "comparison.csv")
        assert (mixture["seeds"], plain["seeds"]) == ("0; 1", "0")
        assert float(mixture["PGD-3 sd"]) == statistics.stdev(
            accuracy(run, "PGD-3") for run in runs[:2]
        )
        assert (mixture["PGD-3 low"], plain["PGD-3 sd"]) == ("", "")
        assert float(plain["PGD-3 low"]) <= float(plain["PGD-3 mean"])

    def test_json(self, written, runs):
        comparison, out = written
        found = json.loads((out / "comparison.json").read_text())
        assert found["columns"] == COLUMNS
        assert found["facts"]["data.num_images"] == 60
        assert found["facts"]["epsilon"] == 0.15
        assert [len(group["runs"]) for group in found["groups"]] == [2, 1]
        worst = found["groups"][1]["runs"][0]["accuracy"]["worst case"]
        assert worst["mean"] == accuracy(runs[2], "worst case")
        assert found["groups"][0]["accuracy"]["clean"]["mean"] == pytest.approx(
            comparison.groups[0].spread("clean").mean
        )

    def test_text(self, written, runs):
        comparison, _ = written
        text = format_comparison(comparison)
        narrow = format_comparison(comparison, 60)
        assert all(len(x) <= 60 for x in narrow.splitlines() if x.startswith("|"))
        assert "| defense " in narrow
        assert "| worst case" in narrow
        assert "not shown, for want of room: " in narrow
        assert format_comparison(comparison, 1000) == text
        assert text.startswith("digits test, n = 60, protocol pixels, epsilon 0.15, weights last")
        lines = text.splitlines()
        tables = [line for line in lines if line.startswith("|")]
        heads = [line for line in tables if line.startswith(("| defense", "| run"))]
        assert len(heads) == 2
        assert len(tables) == 2 * 2 + 2 + 3  # two heads with rules, two groups, three runs
        assert {line.count("|") for line in tables[:4]} == {len(COLUMNS) + 6 + 1}
        assert {line.count("|") for line in tables[4:]} == {len(COLUMNS) + 3 + 1}
        values = [100 * accuracy(run, "clean") for run in runs]
        mean, sd = statistics.fmean(values[:2]), statistics.stdev(values[:2])
        (ours,) = (line for line in tables[2:4] if line.startswith("| Divided We Fall "))
        (plain,) = (line for line in tables[2:4] if line.startswith("| plain "))
        assert f"| {mean:.1f} +- {sd:.1f} " in ours
        low, high = (100 * bound for bound in wilson_interval(round(0.6 * values[2]), 60))
        assert f"| {values[2]:.1f} ({low:.1f} to {high:.1f}) " in plain
        # what is read first: the headline, and who withstands most
        assert heads[0].split("|")[2].strip() == heads[1].split("|")[2].strip() == "worst case"
        shown = [float(line.split("|")[2].split()[0]) for line in tables[2:4]]
        assert shown == sorted(shown, reverse=True)
        for run in runs:
            assert any(line.startswith(f"| {run} ") for line in lines)
        assert "+- is the standard deviation over seeds." in text
        assert "Trained on " in text

    def test_page(self, written, runs):
        _, out = written
        html = (out / "comparison.html").read_text()
        page = Page(html)
        page.assert_self_contained(html)
        assert all(tag != "img" for tag, _ in page.tags)
        for column in COLUMNS:
            assert column in page.text
        for run in runs:
            assert str(run) in page.text
            assert f"{100 * accuracy(run, 'worst case'):.1f} (" in page.text
        heads = re.findall(r'<th scope="col">([^<]*)</th>', html)
        assert heads[:2] == ["Defense", "worst case"]
        drawings = [a for _, a in page.tags if a.get("role") == "img"]
        assert len(drawings) == 1
        assert "Divided We Fall: clean" in drawings[0]["aria-label"]

    def test_page_links_to_the_pages_of_runs(self, runs, tmp_path):
        comparison = load_comparison(runs)
        page = runs[0] / "report.html"
        page.write_text("x")
        try:
            html = write_comparison(comparison, tmp_path / "my table").read_text()
        finally:
            page.unlink()
        links = re.findall(r'<th scope="row"><a href="([^"]*)">', html)
        assert len(links) == 2  # of its defense, and of the run itself
        assert (tmp_path / "my table" / unquote(links[0])).resolve() == page.resolve()

    def test_what_is_invalid_comes_last(self, copies):
        finding = {"name": "x", "severity": "invalid", "message": "y"}
        best = ranked(load_comparison(copies))[0]
        for entry in best.entries:
            edit(
                entry.run,
                lambda t: t.update(findings=[*t["findings"], finding], verdict="INVALID"),
            )
        assert ranked(load_comparison(copies))[-1].name == best.name

    def test_figure(self, written):
        comparison, out = written
        assert (out / "figures/clean_and_worst_case.png").read_bytes().startswith(b"\x89PNG")
        for row in read_csv(out / "figures/clean_and_worst_case.csv"):
            group = next(g for g in comparison.groups if g.name == row["defense"])
            spread = group.spread(row["series"])
            assert float(row["mean"]) == spread.mean
            assert (float(row["low"]), float(row["high"])) == spread.bounds

    def test_equal_input_equal_bytes(self, written, runs):
        _, out = written
        before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
        write_comparison(load_comparison(runs), out)
        assert {path: path.read_bytes() for path in before} == before


class TestRefused:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                lambda t: t["data"].update(name="svhn", digest="other"),
                r"data.name is digits in \S+dwf-seed0 and svhn in \S+plain; evaluate all",
            ),
            (lambda t: t["data"].update(digest="other"), "data.digest is .* and other in"),
            (lambda t: t["data"].update(split="train"), "data.split is test in"),
            (lambda t: t["data"].update(num_images=61), "data.num_images is 60 in .* and 61 in"),
            (lambda t: t.update(epsilon=0.1), "epsilon is 0.15 in .* and 0.1 in"),
            (lambda t: t.update(protocol="paper-compat"), "protocol is pixels in .* paper-compat"),
            (lambda t: t.update(clamp="none"), "clamp is pixels in"),
            (lambda t: t.update(weights="ema"), "weights is last in .* and ema in"),
            (
                lambda t: t["attacks"][4].update(step_size=0.5),
                r"attacks is \['PGD-2', 0.15, 0.02, 2, 1, 'clean start'\] in .*0.5",
            ),
            (lambda t: t["attacks"][6].update(num_restarts=1), "attacks is .*'random start'"),
            (
                lambda t: (
                    t["attacks"].pop(),
                    t["worst_case"]["attacks"].pop(),
                    t["worst_case_all"]["attacks"].pop(),
                ),
                "attacks is .*'adaptive PGD-4'.* and missing in",
            ),
        ],
    )
    def test_evaluated_differently(self, change, message, copies):
        edit(copies[2], change)
        with pytest.raises(ConfigError, match=f"cannot stand in one table: {message}"):
            load_comparison(copies)

    def test_all_that_differs_is_named(self, copies):
        edit(copies[1], lambda t: t.update(epsilon=0.1, protocol="paper-compat"))
        with pytest.raises(ConfigError, match=r"protocol is .*seed0.*seed1; epsilon is 0.15"):
            load_comparison(copies)

    def test_not_evaluated(self, copies):
        shutil.rmtree(copies[1] / "evaluations")
        with pytest.raises(CheckpointError, match=rf"run `dwf eval {copies[1]}` first"):
            load_comparison(copies)

    def test_evaluated_otherwise(self, copies):
        table = copies[1] / "evaluations" / "paper.json"
        table.rename(table.with_name("paper-best.json"))
        remedy = f"`dwf eval {copies[1]} --suite paper` to make it"
        with pytest.raises(CheckpointError, match=remedy):
            load_comparison(copies)
        with pytest.raises(CheckpointError, match="no suite 'paper-best'"):
            load_comparison(copies, "paper-best")

    def test_no_run(self, runs, tmp_path):
        with pytest.raises(CheckpointError, match="not a run folder"):
            load_comparison([runs[0], tmp_path / "nothing"])

    def test_a_seed_twice(self, runs):
        with pytest.raises(ConfigError, match="are the same configuration and seed 1"):
            load_comparison([*runs, runs[1]])

    def test_folder_of_a_run(self, copies):
        with pytest.raises(CheckpointError, match="holds a run; choose another folder"):
            write_comparison(load_comparison(copies), copies[0])
        assert not list(copies[0].glob("comparison*"))

    def test_folder_that_cannot_be_made(self, runs, tmp_path):
        (tmp_path / "file").write_text("in the way")
        with pytest.raises(CheckpointError, match="could not be made"):
            write_comparison(load_comparison(runs), tmp_path / "file" / "out")


class TestHonesty:
    def test_runs_from_before_have_blanks(self, copies, tmp_path):
        """Evaluations without FLOP and diagnostics, and a run without metrics."""
        edit(copies[2], lambda t: (t.pop("flop_per_image"), t.pop("diagnostics")))
        (copies[2] / "metrics.jsonl").unlink()
        comparison = load_comparison(copies)
        plain = comparison.groups[1]
        assert (plain.first.flop_per_image, plain.train_seconds) == (None, None)
        write_comparison(comparison, tmp_path / "out")
        row = read_csv(tmp_path / "out" / "comparison.csv")[1]
        assert (row["flop_per_image"], row["train_seconds"]) == ("", "")
        line = next(x for x in format_comparison(comparison).splitlines() if "| plain " in x)
        assert [cell.strip() for cell in line.split("|")[-3:-1]] == ["", ""]
        assert "nan" not in format_comparison(comparison).lower()

    def test_repeated_steps_count_once(self, copies):
        """A killed run writes some rows again."""
        metrics = copies[2] / "metrics.jsonl"
        expected = load_comparison(copies).groups[1].train_seconds
        first = metrics.read_text().splitlines()[0]
        metrics.write_text(metrics.read_text() + first + "\n")
        assert load_comparison(copies).groups[1].train_seconds == expected

    @pytest.mark.parametrize("severity", ["invalid", "suspect"])
    def test_doubt_is_shown(self, severity, copies, tmp_path):
        finding = {"name": "x", "severity": severity, "message": "y"}
        edit(
            copies[1],
            lambda t: t.update(findings=[*t["findings"], finding], verdict=severity.upper()),
        )
        comparison = load_comparison(copies)
        assert [group.doubt for group in comparison.groups] == [severity, ""]
        assert f"{severity}: Divided We Fall; see the findings" in format_comparison(comparison)
        html = write_comparison(comparison, tmp_path / "out").read_text()
        assert f"{severity.capitalize()}: Divided We Fall." in html

    def test_eot_samples_may_differ_and_are_told(self, copies):
        assert "EoT" not in format_comparison(load_comparison(copies))
        edit(copies[2], lambda t: t["attacks"][-1].update(eot_samples=20))
        text = format_comparison(load_comparison(copies))
        assert "EoT samples of the adaptive attack: Divided We Fall 1, plain 20." in text

    def test_devices_are_told(self, copies):
        file = copies[2] / "environment.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"device": "Abacus"}))
        text = format_comparison(load_comparison(copies))
        assert "training times do not compare" in text
        assert "plain: Abacus." in text

    def test_paper_compat_is_loud(self, copies, tmp_path):
        for run in copies:
            edit(run, lambda t: t.update(protocol="paper-compat", clamp="unit"))
        comparison = load_comparison(copies)
        assert "say nothing about pixels" in format_comparison(comparison)
        html = write_comparison(comparison, tmp_path / "out").read_text()
        assert "these numbers are not robustness in pixel space" in html

    def test_other_settings_are_another_group(self, copies):
        """Of one preset, so that its name alone would not tell them apart."""
        file = copies[1] / "config.json"
        config = json.loads(file.read_text())
        config["pretrain"]["learning_rate"] = 0.05
        file.write_text(json.dumps(config))
        names = [group.name for group in load_comparison(copies).groups]
        assert names[0] == f"Divided We Fall (smoke) ({copies[0]})"
        assert names[1] == f"Divided We Fall (smoke) ({copies[1]})"
        assert names[2] == "plain"

    def test_what_changes_no_result_changes_no_group(self, copies):
        file = copies[1] / "config.json"
        config = json.loads(file.read_text())
        config |= {"device": "cuda", "checkpoint_every": 9, "log_every": 9}
        config["data"]["root"] = "elsewhere"
        file.write_text(json.dumps(config))
        assert len(load_comparison(copies).groups) == 2

    @pytest.mark.parametrize(
        ("radii", "expected"),
        [
            ([0.1, 0.15, 0.18], "FGSM b"),
            ([0.16, 0.17, 0.18], "FGSM a"),
            ([0.1, 0.12, 0.14], "FGSM c"),
        ],
    )
    def test_fgsm_column(self, radii, expected, copies):
        """The primary radius, or the largest within it, or the smallest of all."""

        def change(table):
            old = [row["name"] for row in table["attacks"]]
            for row, radius, letter in zip(table["attacks"][1:4], radii, "abc", strict=True):
                row.update(epsilon=radius, name=f"FGSM {letter}")
            new = [row["name"] for row in table["attacks"]]
            names = dict(zip(old, new, strict=True))
            for key in ("worst_case", "worst_case_all"):
                table[key]["attacks"] = [names[x] for x in table[key]["attacks"]]

        for run in copies:
            edit(run, change)
        assert load_comparison(copies).columns[1] == expected

    def test_everything_is_escaped(self, copies, tmp_path):
        edit(copies[2], lambda t: t.update(model="plain, <script>a|b</script>"))
        comparison = load_comparison(copies)
        assert "<script" not in write_comparison(comparison, tmp_path / "out").read_text()
        lines = [x for x in format_comparison(comparison).splitlines() if "| plain " in x]
        assert r"<script>a\|b</script>" in lines[0]


class TestCommand:
    def test_prints_the_table_and_writes_the_rest(self, runs, tmp_path, capsys):
        out = tmp_path / "out"
        assert cli.main(["compare", *map(str, runs), "--out", str(out)]) == 0
        captured = capsys.readouterr()
        assert captured.out == format_comparison(load_comparison(runs)) + "\n"
        assert captured.err == f"page: {out}/comparison.html\n"
        assert sorted(path.name for path in out.iterdir()) == [
            "comparison.csv",
            "comparison.html",
            "comparison.json",
            "figures",
            "runs.csv",
        ]

    def test_default_folder(self, runs, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        assert cli.main(["compare", str(runs[2])]) == 0
        assert (tmp_path / "comparison" / "comparison.html").exists()
        assert "Every run" not in capsys.readouterr().out

    def test_mistakes(self, copies, tmp_path, capsys):
        edit(copies[2], lambda t: t.update(epsilon=0.1))
        out = tmp_path / "out"
        assert cli.main(["compare", *map(str, copies), "--out", str(out)]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("dwf: ConfigError: these runs cannot stand in one table")
        assert captured.err.count("\n") == 1
        assert not out.exists()


def test_numbers_in_print():
    assert [scaled(n) for n in (None, 0, 999, 1000, 1_234_567, 9_613_504, 5_560_000_000)] == [
        "",
        "0",
        "999",
        "1 k",
        "1.23 M",
        "9.61 M",
        "5.56 G",
    ]
    assert show(Spread(0.765, 0.0051, None), 500) == "76.5 +- 0.5"
    assert show(Spread(0.765, None, (0.7257, 0.8002)), 500) == "76.5 (72.6 to 80.0)"
    assert show(Spread(0.76543, 0.00512, None), 10_000) == "76.54 +- 0.51"
