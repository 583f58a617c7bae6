"""What the doctor says, its exit codes, and that it notices a canary that nobody caught."""

from __future__ import annotations

import importlib.abc
import json
import sys

import pytest
import torch
from torch import nn

from dwf import cli, data, doctor
from dwf.checks import DataError
from dwf.evaluation import canaries
from dwf.evaluation.honest import Honest, build_small_network
from dwf.models import Mixture, MlpGate
from dwf.typed_json import to_json


@pytest.fixture(scope="module")
def facts():
    return doctor.examination()


@pytest.fixture(scope="module")
def untrained():
    """Stands in for the honest models where contracts alone catch the canary."""
    network = build_small_network(0, width=4).eval()
    return Honest(network, Mixture([network, network], MlpGate((1, 8, 8), 2)), network)


class TestFacts:
    def test_environment_disk_and_data(self, facts):
        assert facts["kernels"]["versions"]["torch"] == torch.__version__
        assert {row["role"] for row in facts["folders"]} == {"runs", "data"}
        assert facts["data"][0].startswith("digits")
        assert facts["canaries"] is None
        json.dumps(facts, allow_nan=False)

    def test_text(self, facts):
        text = doctor.render(facts)
        for part in ("torch", "What each op uses:", "GB free", "digits", "Findings:"):
            assert part in text
        for finding in facts["findings"]:
            assert finding["remedy"] in text

    def test_what_is_slow_is_no_failure(self, facts):
        assert {f["severity"] for f in facts["findings"]} <= {"note"}
        assert doctor.exit_code(facts) == 0


class TestFindings:
    def test_disk(self, facts, monkeypatch, tmp_path):
        monkeypatch.setattr(doctor, "ENOUGH_DISK_GB", 1e9)
        found = doctor._findings({**facts, "canaries": None})
        assert [f.name for f in found].count("disk") == 2

    def test_a_folder_that_does_not_exist_yet(self, monkeypatch, tmp_path):
        monkeypatch.setenv("DWF_DATA_ROOT", str(tmp_path / "not" / "yet"))
        row = doctor._disk("data", doctor._folders()["data"])
        assert row["free_gb"] > 0
        assert row["writable"]

    def test_a_wrong_kernel(self, facts):
        proof = {
            "op": "linf_step_",
            "device": "cpu",
            "dtype": "float32",
            "implementation": "native",
            "fault": "off by one",
        }
        kernels = {**facts["kernels"], "selftest": [proof, {**proof, "fault": None}]}
        found = doctor._findings({**facts, "kernels": kernels})
        wrong = [f for f in found if f.name == "wrong_kernel"]
        assert len(wrong) == 1
        assert wrong[0].severity == "invalid"
        assert "linf_step_ on cpu in float32, native: off by one" in wrong[0].message

    def test_a_selftest_of_nothing_fails(self, facts):
        judged = {**facts, "kernels": {**facts["kernels"], "selftest": []}}
        found = doctor._findings(judged)
        (nothing,) = [f for f in found if f.name == "nothing_tested"]
        assert "nothing was tested" in nothing.message
        assert doctor.exit_code({**judged, "findings": to_json(found)}) == 1

    def test_a_source_tree_that_hides_a_build(self, facts):
        hidden = "/lib/site-packages/moe_kernels/_native.so"
        native = {**facts["kernels"]["native"], "cpu": False, "hidden_build": hidden}
        found = doctor._findings({**facts, "kernels": {**facts["kernels"], "native": native}})
        (finding,) = [f for f in found if f.name == "hidden_build"]
        assert hidden in finding.message
        assert "pip install -e ." in finding.remedy
        assert "no_compiled_kernels" not in [f.name for f in found]

    def test_kernels_that_this_gpu_cannot_run(self, facts):
        gpu = {"device": "cuda:0", "capability": "7.5", "compiled_kernels": False}
        native = {**facts["kernels"]["native"], "cuda": True, "cpu": False, "missing": "why"}
        kernels = {**facts["kernels"], "gpus": [gpu], "native": native}
        found = {f.name: f for f in doctor._findings({**facts, "kernels": kernels})}
        assert "7.5" in found["gpu_not_compiled_for"].message
        assert "why" in found["no_compiled_kernels"].message
        assert "no_gpu" not in found


class TestCanaries:
    def test_rows(self, untrained):
        lines = []
        rows = doctor.run_canaries(
            untrained, names=["nan_logits", "softmax_output"], num_images=20, progress=lines.append
        )
        assert [row["name"] for row in rows][2:] == ["nan_logits", "softmax_output"]
        assert [row["broken"] for row in rows] == [False, False, True, True]
        assert all(row["right"] for row in rows[2:])
        assert lines[-1] == "judging softmax_output"

    def test_one_that_is_missed_fails(self, facts, untrained, monkeypatch):
        """A canary that is nothing but the honest network."""
        sound = canaries.Canary("not broken", frozenset({"random"}), lambda network: network)
        monkeypatch.setitem(canaries.CANARIES, "sound", sound)
        rows = doctor.run_canaries(untrained, names=["sound"], num_images=10)
        assert not rows[-1]["right"]
        judged = {**facts, "canaries": rows}
        judged["findings"] = to_json(doctor._findings(judged))
        assert doctor.exit_code(judged) == 1
        text = doctor.render(judged)
        assert "0 of 1 broken models caught" in text
        assert "invalid: canary_missed: sound" in text

    def test_an_honest_model_that_is_condemned_fails(self, facts, untrained):
        broken = Honest(nn.Sequential(untrained.network, nn.Softmax(dim=1)), *_rest(untrained))
        rows = doctor.run_canaries(broken, names=[], num_images=10)
        judged = {**facts, "canaries": rows}
        assert "false_alarm" in [f.name for f in doctor._findings(judged)]


def _rest(honest: Honest):
    return honest.mixture, honest.control


class TestCommand:
    def test_json(self, capsys):
        assert cli.main(["doctor", "--json"]) == 0
        assert set(json.loads(capsys.readouterr().out)) >= {"kernels", "data", "findings"}

    def test_options_reach_the_doctor(self, facts, monkeypatch, capsys):
        asked = {}

        def examination(**options):
            asked.update(options)
            return facts

        monkeypatch.setattr(doctor, "examination", examination)
        assert cli.main(["doctor", "--selftest", "--canaries"]) == 0
        assert asked["selftest"]
        assert asked["canaries"]
        assert "Findings:" in capsys.readouterr().out


def test_a_torchvision_that_does_not_load(monkeypatch, caplog):
    """Built for another torch, it raises RuntimeError; the doctor says so and goes on."""

    class Broken(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path, target=None):
            if name == "torchvision":
                raise RuntimeError("operator torchvision::nms does not exist\nand more")

    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    facts = doctor.examination()
    assert any(line.startswith("digits") for line in facts["data"])
    assert (
        "torchvision cannot be imported (operator torchvision::nms does not exist)" in caplog.text
    )
    with pytest.raises(DataError, match=r"digits, folders and .npz files need none"):
        data.load("cifar10", split="test")
