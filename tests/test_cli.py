"""The command line: what it prints where, what it leaves, and its exit codes."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from small_runs import SETTINGS, assert_same_run, before_steps, rows, small_config

import dwf
from dwf import cli, data, distributed
from dwf.config import apply_overrides, from_dict
from dwf.files import read_json
from dwf.progress import LiveLine
from dwf.training import loop

# the table of a small run, small
TABLE = """
    evaluation.fgsm_epsilon=0.1 evaluation.num_steps=2,4 evaluation.multi_start_steps=3
    evaluation.num_restarts=2 evaluation.adaptive_steps=5 evaluation.num_images=20
    evaluation.diagnostic_images=10 evaluation.diagnostic_steps=5
"""
OVERRIDES = [*SETTINGS.split(), *TABLE.split()]


@pytest.fixture(scope="module")
def run(tmp_path_factory, brief_suites):
    """A trained, evaluated and reported run; tests only add evaluations to it."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    assert cli.main(["train", "smoke", *OVERRIDES, "--out", str(folder), "--quiet"]) == 0
    return folder


@pytest.fixture
def dwf_command(capsys):
    """Run a command in this process; return its exit code, standard output and error."""

    def command(*argv):
        code = cli.main([str(part) for part in argv])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return command


def one_line(code, out, err):
    """What every mistake of the user's ends with: nothing but a line that says it, and a 2."""
    assert (code, out) == (2, "")
    err = "".join(x for x in err.splitlines(True) if not x.startswith("run folder: "))
    assert err.startswith("dwf: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    return err


class TestTrain:
    @pytest.mark.slow
    def test_the_real_thing(self, tmp_path):
        """As a user types it: one command in an empty folder."""
        command = [sys.executable, "-m", "dwf", "train", "smoke"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
        assert done.returncode == 0, done.stderr
        folder = tmp_path / "runs" / "smoke-seed0"
        assert re.search(r"clean +[89]\d\.\d\d %", done.stdout)
        assert f"report: {folder.relative_to(tmp_path)}/report.html" in done.stdout
        assert "joint epoch 4/4: validation clean" in done.stderr
        assert "\x1b" not in done.stderr  # no terminal, no live line
        table = read_json(folder / "evaluations" / "paper.json")
        assert table["environment"]["argv"][:3] == ["dwf", "train", "smoke"]
        assert table["worst_case"]["num_images"] == 100
        assert "<html" in (folder / "report.html").read_text()
        with open(folder / "metrics.csv", newline="") as stream:
            assert len(list(csv.DictReader(stream))) == len(rows(folder)) > 15

    def test_leaves_table_and_report(self, run):
        table = read_json(run / "evaluations" / "paper.json")
        assert (table["suite"], table["weights"], table["run"]) == ("paper", "last", "run")
        assert table["protocol"] == "pixels"
        assert table["model"] == "Divided We Fall, 3 x resnet6 width 2"
        assert table["num_parameters"] == sum(p.numel() for p in dwf.load(run).parameters())
        names = [row["name"] for row in table["attacks"]]
        assert names[:-1] == [
            "clean",
            "FGSM 0.1",
            "PGD-2",
            "PGD-4",
            "multi-start PGD-3 x2",
            "adaptive PGD-5",
        ]
        assert names[-1].endswith(" on experts")
        assert (run / "report.html").exists()

    def test_leaves_a_verdict_by_attacks_in_turn(self, run):
        table = read_json(run / "evaluations" / "quick.json")
        assert (table["suite"], table["weights"], table["run"]) == ("quick", "last", "run")
        names = [row["name"] for row in table["attacks"]]
        assert names[:5] == ["clean", "APGD-CE", "APGD-T", "views", "Square"]
        assert table["verdict"] in ("UNPROVEN", "SUSPECT")  # of few images
        assert "APGD-T" in (run / "report.html").read_text()  # the newest is shown

    def test_only_the_grid_attacks_normalized_images(self, tmp_path, dwf_command, monkeypatch):
        suites = []

        def evaluated(subject, suite, argv, live, shared=False):
            suites.append((suite, subject.settings.num_images))
            return 0

        monkeypatch.setattr(cli.train, "train", lambda *arguments, **options: None)
        monkeypatch.setattr(cli.train, "evaluate_and_print", evaluated)
        monkeypatch.setattr(cli.train, "write_report", lambda folder: folder)
        for preset in ("dwf_svhn", "dwf_svhn_paper_compat"):
            assert dwf_command("train", preset, "--out", tmp_path)[0] == 0
        assert suites == [("quick", 100), ("paper", None), ("paper", None)]

    @pytest.mark.parametrize(("codes", "expected"), [((3, 0), 3), ((0, 3), 0), ((4, 4), 0)])
    def test_exit_code_says_invalid_if_the_quick_suite_does(
        self, codes, expected, tmp_path, dwf_command, monkeypatch
    ):
        left = list(codes)
        monkeypatch.setattr(cli.train, "train", lambda *arguments, **options: None)
        monkeypatch.setattr(cli.train, "evaluate_and_print", lambda *a, **o: left.pop(0))
        monkeypatch.setattr(cli.train, "write_report", lambda folder: folder)
        assert dwf_command("train", "smoke", "--out", tmp_path)[0] == expected

    def test_records_the_command(self, run):
        expected = ["dwf", "train", "smoke", *OVERRIDES, "--out", str(run), "--quiet"]
        assert read_json(run / "environment.json")["argv"] == expected
        assert read_json(run / "evaluations" / "paper.json")["environment"]["argv"] == expected

    def test_again_trains_nothing_and_says_the_same(self, run, dwf_command, monkeypatch):
        monkeypatch.setattr(cli.train, "write_report", lambda folder: folder / "report.html")
        monkeypatch.setattr(cli.train, "evaluate_and_print", lambda *a, **options: 0)
        before = (run / "metrics.jsonl").read_bytes()
        code, out, err = dwf_command("train", "smoke", *OVERRIDES, "--out", run)
        assert code == 0
        assert "resuming from step-00000060" in err
        assert "report: " in out
        assert (run / "metrics.jsonl").read_bytes() == before

    def test_settings_may_follow_options(self, tmp_path, dwf_command):
        out = tmp_path / "run"
        code, text, _ = dwf_command(
            "train",
            "--quiet",
            "smoke",
            "seed=3",
            "--out",
            out,
            "joint.num_epochs=7",
            "--print-config",
        )
        assert code == 0
        config = from_dict(json.loads(text))
        assert (config.seed, config.joint.num_epochs) == (3, 7)

    def test_without_evaluation(self, tmp_path, dwf_command):
        folder = tmp_path / "run"
        config = tmp_path / "config.json"
        config.write_text(json.dumps(small_config("joint.num_epochs=1").to_dict()))
        code, out, _ = dwf_command("train", "--config", config, "--out", folder, "--no-eval")
        assert (code, out) == (0, "")
        assert not (folder / "evaluations").exists()

    @pytest.mark.parametrize(
        "number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.slow)]
    )
    def test_signal(self, number, run, tmp_path, dwf_command):
        """75, a line that says how to go on, and the same bits once it went on."""
        argv = ["train", "smoke", *OVERRIDES, "--out", tmp_path / "run", "--no-eval", "--quiet"]
        with before_steps(lambda run: os.kill(os.getpid(), number), 25):
            code, out, err = dwf_command(*argv)
        assert (code, out) == (75, "")
        assert err == "dwf: stopped at step 26, saved; run the same command to continue\n"
        assert dwf_command(*argv)[0] == 0
        assert_same_run(tmp_path / "run", run)

    @pytest.mark.slow
    def test_signal_from_outside(self, tmp_path):
        argv = ["train", "smoke", "pretrain.num_epochs=1000", "--out", "run", "--quiet"]
        command = [sys.executable, "-m", "dwf", *argv]
        with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
            metrics = tmp_path / "run" / "metrics.jsonl"
            deadline = time.monotonic() + 120
            while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
                time.sleep(0.05)
            sent = time.monotonic()
            process.send_signal(signal.SIGTERM)
            _, err = process.communicate(timeout=60)
            assert process.returncode == 75, err
        assert time.monotonic() - sent < 10
        assert re.fullmatch(r"dwf: stopped at step \d+, saved; run the same .*\n", err)
        dwf.load(tmp_path / "run")

    def test_interrupt_from_the_keyboard(self, tmp_path, dwf_command, monkeypatch):
        def interrupt(*arguments):
            raise KeyboardInterrupt

        monkeypatch.setattr(loop, "train_step", interrupt)
        code, _, err = dwf_command("train", "smoke", *OVERRIDES, "--out", tmp_path / "run")
        assert code == 130
        assert "the same command continues from the last checkpoint" in err


class TestConfig:
    def test_round_trip(self, tmp_path, dwf_command):
        """What --print-config prints, --config reads, and prints again."""
        code, printed, _ = dwf_command(
            "train", "cifar10", "seed=7", "attack.epsilon=4/255", "--print-config"
        )
        assert code == 0
        (tmp_path / "c.json").write_text(printed)
        code, again, _ = dwf_command("train", "--config", tmp_path / "c.json", "--print-config")
        assert (code, again) == (0, printed)
        expected = apply_overrides(dwf.presets.dwf_cifar10(), ["seed=7", "attack.epsilon=4/255"])
        assert from_dict(json.loads(again)) == expected

    @pytest.mark.parametrize(
        "preset", ["smoke", "cifar10-small", "pgd_at_svhn", "dwf_svhn_paper_compat"]
    )
    def test_round_trip_of_presets(self, preset, dwf_command):
        _, printed, _ = dwf_command("train", preset, "--print-config")
        assert from_dict(json.loads(printed)) == dwf.presets.find(preset)

    def test_overrides_of_a_file(self, tmp_path, dwf_command):
        (tmp_path / "c.json").write_text(json.dumps(small_config().to_dict()))
        _, printed, _ = dwf_command(
            "train", "--config", tmp_path / "c.json", "seed=9", "--print-config"
        )
        assert from_dict(json.loads(printed)) == small_config("seed=9")

    @pytest.mark.parametrize(
        ("argv", "message"),
        [
            (["cifar11"], "did you mean"),
            (["smoke", "joint.num_epoch=3"], "did you mean joint.num_epochs?"),
            (["smoke", "joint.num_epochs=three"], "'three' is not a int"),
            (["smoke", "attack.epsilon=8"], "did you mean 8/255"),
            (["smoke", "pretrain.batch_size=100000"], "larger than"),
            (["smoke", "device=tpu"], "device"),
            (["smoke", "data.name=cifar10", "data.root=nowhere"], "dwf data get cifar10"),
            (["plain_digits", "joint.num_epochs=3"], "no such phase"),
            ([], "name a preset"),
            (["--config", "missing.json"], "missing.json: not found"),
        ],
    )
    def test_mistakes(self, argv, message, tmp_path, dwf_command, monkeypatch):
        monkeypatch.chdir(tmp_path)
        started = time.process_time()
        assert message in one_line(*dwf_command("train", *argv))
        assert time.process_time() - started < 1
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        "text", ["<html>", '{"preset": "smoke", "sead": 1}', '{"preset": 3}', "[]"]
    )
    def test_file_that_is_no_configuration(self, text, tmp_path, dwf_command):
        (tmp_path / "c.json").write_text(text)
        one_line(*dwf_command("train", "--config", tmp_path / "c.json"))

    def test_folder_of_another_run(self, run, dwf_command):
        code, out, err = dwf_command("train", "smoke", *OVERRIDES, "seed=1", "--out", run)
        assert "seed was 0, is 1" in one_line(code, out, err)

    def test_loss_that_is_not_finite(self, tmp_path, dwf_command):
        argv = ["smoke", *OVERRIDES, "pretrain.learning_rate=1e30", "--out", tmp_path / "run"]
        code, out, err = dwf_command("train", *argv)
        assert "lower the learning rate" in one_line(code, out, err)


class TestArguments:
    @pytest.mark.parametrize(
        "argv",
        [
            [],
            ["trian"],
            ["train", "smoke", "--outt", "x"],
            ["train", "smoke", "seed=1", "--out", "x", "word"],
            ["presets", "seed=1"],
            ["eval", "x", "--weights", "newest"],
            ["data", "lst"],
        ],
    )
    def test_unknown(self, argv, capsys):
        with pytest.raises(SystemExit) as caught:
            cli.main(argv)
        assert caught.value.code == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("usage: dwf")

    @pytest.mark.parametrize(
        ("argv", "usage", "advice"),
        [
            ([], "usage: dwf [-h]", "train a preset, evaluate it"),
            (["eval", "x", "--outt", "y"], "usage: dwf eval", "unrecognized arguments: --outt y"),
            (["train", "smoke", "--epsilon", "8"], "usage: dwf train", "settings are key=value"),
        ],
    )
    def test_advice(self, argv, usage, advice, capsys):
        """By the usage of the verb in question."""
        with pytest.raises(SystemExit):
            cli.main(argv)
        err = capsys.readouterr().err
        assert err.startswith(usage)
        assert advice in err

    def test_help(self, capsys):
        with pytest.raises(SystemExit) as caught:
            cli.main(["--help"])
        assert caught.value.code == 0
        out = capsys.readouterr().out
        assert all(
            f"\n    {verb} " in out for verb in ("train", "eval", "report", "data", "presets")
        )


class TestEval:
    def table(self, run, suite):
        return read_json(run / "evaluations" / f"{suite}.json")

    def test_same_table_as_training(self, run, dwf_command):
        before = self.table(run, "paper")
        code, out, _ = dwf_command("eval", run, "--suite", "paper", "--quiet")
        assert code == 0
        after = self.table(run, "paper")
        key = [(row["name"], row["num_correct"]) for row in before["attacks"]]
        assert [(row["name"], row["num_correct"]) for row in after["attacks"]] == key
        assert after["environment"]["argv"][:3] == ["dwf", "eval", str(run)]
        for row in after["attacks"]:
            assert re.search(rf"{re.escape(row['name'])} .*{100 * row['accuracy']:.2f} %", out)

    @pytest.mark.slow
    def test_attacks_in_turn_by_default(self, run, dwf_command):
        code, out, err = dwf_command("eval", run, "--images", 3)
        assert code in (0, 4)
        table = self.table(run, "standard-3-images")
        names = [row["name"] for row in table["attacks"]]
        assert names[:6] == ["clean", "APGD-CE", "APGD-T", "FAB-T", "views", "Square"]
        assert f"verdict: {table['verdict']}" in out
        assert "the suite takes " in err.splitlines()[0]

    @pytest.mark.parametrize("which", ["best", "ema", "pretrained"])
    def test_weights(self, which, run, dwf_command):
        assert dwf_command("eval", run, "--suite", "paper", "--weights", which)[0] == 0
        table = self.table(run, f"paper-{which}")
        assert table["weights"] == which
        clean = table["attacks"][0]
        images, labels, _ = next(
            data.evaluation_batches(dwf.data.load("digits", split="test"), clean["num_images"])
        )
        with torch.no_grad():
            predicted = dwf.load(run, which)(images).argmax(dim=1)
        assert clean["num_correct"] == int((predicted == labels).sum())

    def test_one_expert(self, run, dwf_command):
        assert dwf_command("eval", run, "--suite", "paper", "--expert", 1)[0] == 0
        table = self.table(run, "paper-expert-1")
        assert table["model"] == "Divided We Fall, expert 1 alone, resnet6 width 2"
        expert = dwf.load(run).expert(1)
        assert table["num_parameters"] == sum(p.numel() for p in expert.parameters())

    @pytest.mark.parametrize("number", [-1, 3])
    def test_expert_that_is_not_there(self, number, run, dwf_command):
        assert "this model has 3 experts" in one_line(
            *dwf_command("eval", run, f"--expert={number}")
        )

    def test_fewer_images_leave_the_whole_table_alone(self, run, dwf_command):
        before = self.table(run, "paper")
        code, out, _ = dwf_command("eval", run, "--suite", "paper", "--images", 7)
        assert code == 0
        assert "n = 7" in out
        assert self.table(run, "paper-7-images")["data"]["num_images"] == 7
        assert self.table(run, "paper") == before

    def test_paper_compat_is_suspect(self, run, dwf_command):
        code, out, _ = dwf_command("eval", run, "--protocol", "paper-compat", "--images", 7)
        assert code == 4
        assert "suspect: " in out
        assert self.table(run, "paper-paper-compat-7-images")["protocol"] == "paper-compat"

    def test_invalid(self, run, dwf_command, monkeypatch):
        load = cli.subject.load

        def broken(*arguments):
            model = load(*arguments)
            model.gate.layers[-1].bias.data.fill_(torch.nan)
            return model

        monkeypatch.setattr(cli.subject, "load", broken)
        code, out, _ = dwf_command("eval", run, "--suite", "paper", "--images", 5)
        assert code == 3
        assert "invalid: 5 clean images give NaN" in out
        assert re.search(r"clean +0\.00 %", out)

    @pytest.mark.parametrize("argv", [["--images", "0"], ["--device", "tpu"]])
    def test_mistakes(self, argv, run, dwf_command):
        one_line(*dwf_command("eval", run, *argv))

    def test_no_run(self, tmp_path, dwf_command):
        assert "not a run folder" in one_line(*dwf_command("eval", tmp_path))
        assert list(tmp_path.iterdir()) == []


class TestReport:
    @pytest.mark.slow
    def test_of_a_suite(self, run, dwf_command):
        dwf_command("eval", run, "--suite", "paper", "--weights", "ema", "--images", 5)
        code, out, _ = dwf_command("report", run, "--suite", "paper-ema-5-images")
        assert (code, out.strip()) == (0, str(run / "report.html"))
        assert "paper-ema-5-images" in (run / "report.html").read_text()

    def test_of_nothing(self, tmp_path, dwf_command):
        code, out, err = dwf_command("report", tmp_path)
        one_line(code, out, err)


class TestData:
    def test_list(self, tmp_path, dwf_command):
        code, out, err = dwf_command("data", "list", "--root", tmp_path)
        assert (code, err) == (0, "")
        for name in ("digits", "cifar10", "cifar100", "svhn"):
            assert name in out

    def test_check(self, dwf_command):
        code, out, _ = dwf_command("data", "check", "digits")
        assert code == 0
        assert "test: 500 images [1, 8, 8] uint8" in out

    def test_check_of_what_is_not_there(self, tmp_path, dwf_command):
        err = one_line(*dwf_command("data", "check", "cifar10", "--root", tmp_path))
        assert "dwf data get cifar10" in err

    @pytest.mark.parametrize("action", ["get", "check"])
    def test_no_name(self, action, dwf_command):
        assert "name a data set" in one_line(*dwf_command("data", action))

    def test_get_shows_its_progress(self, dwf_command, monkeypatch):
        shown = []

        def get(name, root, progress):
            progress("cifar-10-python.tar.gz", 1_500_000, 170_498_071)
            progress("train_32x32.mat", 1_500_000, None)
            return ["done"]

        monkeypatch.setattr(data, "get", get)
        monkeypatch.setattr(LiveLine, "show", lambda self, text: shown.append(text))
        assert dwf_command("data", "get", "cifar10") == (0, "done\n", "")
        assert shown == ["cifar-10-python.tar.gz: 1.5 of 170.5 MB", "train_32x32.mat: 1.5 MB"]


def test_presets(dwf_command):
    """By data with how long they take, every one once, Divided We Fall first."""
    code, out, _ = dwf_command("presets")
    assert code == 0
    lines = out.splitlines()
    names = [line.split()[0] for line in lines if line.startswith("  ")]
    assert sorted(names) == sorted(dwf.presets.table())
    assert lines[0] == "digits: minutes on two CPU cores; nothing to download"
    assert names[:2] == ["smoke", "dwf_digits"]
    assert all(len(line) <= 80 for line in lines)
    code, out, _ = dwf_command("presets", "svhn")
    assert [line.split()[0] for line in out.splitlines()[:3]] == [
        "svhn:",
        "dwf_svhn",
        "fgsm_at_svhn",
    ]


def test_train_takes_the_flags_of_the_other_commands(dwf_command):
    code, out, _ = dwf_command(
        "train", "smoke", "--seed", 3, "--device", "cpu", "--root", "somewhere", "--print-config"
    )
    config = json.loads(out)
    assert code == 0
    assert (config["seed"], config["device"], config["data"]["root"]) == (3, "cpu", "somewhere")


def test_version(dwf_command, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--version"])
    assert stopped.value.code == 0
    line = capsys.readouterr().out
    assert line.startswith(f"dwf {dwf.__version__} (")
    for part in ("installed", "; from ", "; commit ", "; kernels: "):
        assert part in line


def test_processes_share_the_suite_and_the_first_runs_the_grid(run, dwf_command, monkeypatch):
    suites = []

    def evaluated(subject, suite, argv, live, shared=False):
        suites.append((suite, shared))
        return 0

    monkeypatch.setattr(distributed, "rank", lambda: 1)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(cli.train, "train", lambda *arguments, **options: None)
    monkeypatch.setattr(cli.train, "evaluate_and_print", evaluated)
    assert dwf_command("train", "smoke", *OVERRIDES, "--out", run) == (0, "", "")
    assert suites == [("quick", True)]
