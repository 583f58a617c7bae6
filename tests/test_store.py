"""Evaluate into a folder, and the effort of a suite: caps and the estimate of its time."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import tempfile

import pytest
from small_models import FailsAt, Linear, labeled_by

from dwf import files
from dwf.attacks.table import Passes
from dwf.checks import CheckpointError, ConfigError
from dwf.config import EvaluationConfig
from dwf.evaluation import (
    Budget,
    NotStored,
    evaluate,
    evaluate_into,
    results_name,
    sequence,
)
from dwf.evaluation.budget import expected_minutes
from dwf.evaluation.result import Evaluation
from dwf.files import run_lock
from dwf.report.results import load_results

BUDGET = Budget(num_steps=2, num_queries=5)
SETTINGS = EvaluationConfig(epsilon=0.06, step_size=0.02, batch_size=8, diagnostic_images=0)


class TestFolder:
    def test_a_model_from_elsewhere(self, tmp_path):
        model = Linear()
        dataset = labeled_by(model, 12, 2)
        options = {"suite": "quick", "budget": BUDGET, "epsilon": (0.02, 0.06), "seed": 3}
        result = evaluate_into(
            tmp_path / "run",
            model,
            dataset,
            SETTINGS,
            title="linear",
            environment={"argv": ["python"]},
            **options,
        )
        assert Evaluation.read(tmp_path / "run/evaluations/quick-0.02-0.06.json") == result
        assert (result.suite, result.run, result.model) == ("quick-0.02-0.06", "run", "linear")
        config = json.loads((tmp_path / "run/config.json").read_text())
        assert config == {"model": "linear", "data": {"name": dataset.name}}
        assert load_results(tmp_path / "run").evaluation.verdict == result.verdict
        alone = evaluate(model, dataset, SETTINGS, **options)
        assert result.curve == alone.curve
        assert not list(tmp_path.rglob("*partial*"))

    def test_continues_after_a_failure_and_leaves_a_runs_own_files(self, tmp_path):
        dataset = labeled_by(Linear(), 12, 2)
        (tmp_path / "config.json").write_text("{}")
        options = {"suite": "quick", "budget": BUDGET, "name": "mine"}
        with pytest.raises(RuntimeError):
            evaluate_into(tmp_path, FailsAt(Linear(), 30), dataset, SETTINGS, **options)
        (partial,) = (tmp_path / "evaluations").glob(".mine.partial*")
        result = evaluate_into(tmp_path, FailsAt(Linear(), -1), dataset, SETTINGS, **options)
        assert not partial.exists()
        assert result.verdict == evaluate(Linear(), dataset, SETTINGS, suite="quick").verdict
        assert (tmp_path / "config.json").read_text() == "{}"

    @pytest.mark.parametrize("obstacle", ["training", "full disk", "file", "name"])
    def test_is_refused_before_the_model_is_called(self, obstacle, tmp_path, monkeypatch):
        model, options = FailsAt(Linear(), 0), {"suite": "quick"}
        with contextlib.ExitStack() as stack:
            if obstacle == "training":
                stack.enter_context(run_lock(tmp_path))
            if obstacle == "full disk":
                monkeypatch.setattr(files, "free_bytes", lambda folder: 1000)
            if obstacle == "file":
                (tmp_path / "evaluations").touch()
            if obstacle == "name":
                options["name"] = "../../x"
            with pytest.raises((CheckpointError, ConfigError)):
                evaluate_into(tmp_path, model, labeled_by(Linear(), 4, 0), SETTINGS, **options)
        assert not list(tmp_path.rglob("*.json"))

    def test_others_may_evaluate_meanwhile(self, tmp_path):
        dataset, options = labeled_by(Linear(), 12, 2), {"suite": "quick", "budget": BUDGET}
        with run_lock(tmp_path, shared=True):
            evaluate_into(tmp_path, Linear(), dataset, SETTINGS, **options)

    def test_a_disk_that_fills_meanwhile(self, tmp_path, monkeypatch):
        """The attacks go on without their file, and the results go elsewhere."""
        dataset, options = labeled_by(Linear(), 12, 2), {"suite": "quick", "budget": BUDGET}
        write = os.replace

        def full(source, target):
            if str(tmp_path / "run") in str(target) and not str(target).endswith(".probe"):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            write(source, target)

        (tmp_path / "other").mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "other"))
        monkeypatch.setattr(os, "replace", full)
        with pytest.raises(NotStored, match=r"No space left.*so they are in") as caught:
            evaluate_into(tmp_path / "run", Linear(), dataset, SETTINGS, **options)
        assert Evaluation.read(caught.value.path) == caught.value.result
        assert caught.value.path.is_relative_to(tmp_path / "other")
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
        with pytest.raises(NotStored, match="in this error's `result`") as caught:
            evaluate_into(tmp_path / "run", Linear(), dataset, SETTINGS, **options)
        assert (caught.value.path, caught.value.result.suite) == (None, "quick")

    def test_names(self):
        assert results_name("standard") == "standard"
        found = results_name("full", parts=["ema"], norm="l2", epsilon=0.5, num_images=100)
        assert found == "full-ema-l2-0.5-100-images"
        assert results_name("quick", epsilon=[1 / 255, 8 / 255]) == "quick-0.003922-0.03137"


class TestBudget:
    def test_caps_every_attack_and_says_so(self):
        model = Linear()
        result = evaluate(model, labeled_by(model, 8, 0), SETTINGS, budget=BUDGET)
        assert result.suite == "standard"
        steps = {row.kind: row.num_steps for row in result.attacks}
        assert steps["apgd-ce"] == steps["apgd-t"] == steps["fab-t"] == 2
        assert steps["square"] == 5
        assert result.finding("small_budget").severity == "note"

    def test_is_not_for_the_grid(self):
        model = Linear()
        with pytest.raises(ConfigError, match="budget: caps attacks in turn"):
            evaluate(model, labeled_by(model, 4, 0), SETTINGS, suite="paper", budget=BUDGET)

    @pytest.mark.parametrize("name", ["num_steps", "num_queries"])
    def test_bad_values(self, name):
        with pytest.raises(ConfigError, match=f"budget.{name}: 0 is not possible"):
            Budget(**{"num_steps": 1, "num_queries": 1, name: 0})


class TestTime:
    def test_in_words(self):
        passes = Passes(num_forwards=400, num_backwards=100)  # as long as 600 passes
        common = {"passes": passes, "num_images": 1000}
        assert expected_minutes(seconds_per_pass=1e-6, **common) == "less than a minute"
        assert expected_minutes(seconds_per_pass=1e-3, **common) == "at most about 10 minutes"
        assert expected_minutes(seconds_per_pass=0.1, **common) == "at most about 17 hours"

    def test_is_said_while_the_attacks_run(self):
        model, lines = Linear(), []
        evaluate(model, labeled_by(model, 4, 0), SETTINGS, budget=BUDGET, progress=lines.append)
        assert lines[0].endswith("; the suite takes less than a minute")

    def test_a_long_wait_is_announced_to_those_who_see_no_progress(self, monkeypatch, caplog):
        monkeypatch.setattr(
            sequence, "expected_minutes", lambda *_, **__: "at most about 9 minutes"
        )
        model = Linear()
        evaluate(model, labeled_by(model, 4, 0), SETTINGS, suite="quick", budget=BUDGET)
        assert "suite quick on 4 images takes at most about 9 minutes" in caplog.messages
