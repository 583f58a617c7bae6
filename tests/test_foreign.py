"""Models that were trained elsewhere: named, loaded, attacked, judged and reported."""

import json
import sys
import warnings

import pytest
import torch
from small_models import SmallNet
from torch import nn

from dwf import cli
from dwf.attacks import pgd
from dwf.checks import CheckpointError, ConfigError
from dwf.foreign import load_foreign

CODE = """
import torch
from torch import nn

def digits():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

model = digits()

class Zoo:
    linear = model

number = 3
"""


@pytest.fixture
def code(tmp_path, monkeypatch):
    (tmp_path / "their_models.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


class TestPython:
    @pytest.mark.parametrize("where", ["their_models", "their_models.py"])
    @pytest.mark.parametrize("name", ["digits", "model", "Zoo.linear"])
    def test_names(self, code, where, name):
        model = load_foreign(f"{where}:{name}")
        assert isinstance(model, nn.Sequential)
        assert not model.training
        assert torch.equal(model[1].weight, load_foreign("their_models:digits")[1].weight)

    def test_a_file_stands_in_for_no_module(self, code):
        (code / "json.py").write_text(CODE)
        before = sys.modules["json"]
        assert isinstance(load_foreign("json.py:digits"), nn.Sequential)
        assert sys.modules["json"] is before

    @pytest.mark.parametrize(
        ("spec", "message"),
        [
            ("their_models", "expected package.module:name"),
            ("no_such_module:model", "no_such_module"),
            ("no_such_file.py:model", "not found"),
            ("their_models:modle", "there is no 'modle'"),
            ("their_models:number", "found int"),
            ("model.onnx", "expected package.module:name"),
        ],
    )
    def test_mistakes(self, code, spec, message):
        with pytest.raises(ConfigError, match=message):
            load_foreign(spec)


class TestFiles:
    IMAGES, LABELS = torch.rand(5, 3, 8, 8), torch.arange(5)
    BUDGET = {"epsilon": 0.1, "step_size": 0.03, "num_steps": 4, "random_start": False}  # noqa: RUF012

    def check(self, path):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch says that TorchScript is old
            model = load_foreign(str(path))
        original = SmallNet().eval()
        assert torch.equal(model(self.IMAGES), original(self.IMAGES))
        expected = pgd(original, self.IMAGES, self.LABELS, **self.BUDGET)
        found = pgd(model, self.IMAGES, self.LABELS, **self.BUDGET)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)

    def test_torchscript(self, tmp_path):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.jit.trace(SmallNet().eval(), self.IMAGES).save(tmp_path / "model.pt")
        self.check(tmp_path / "model.pt")

    def test_exported_program(self, tmp_path):
        batch = torch.export.Dim("B", min=1)
        shapes = ({0: batch},)
        program = torch.export.export(SmallNet().eval(), (self.IMAGES,), dynamic_shapes=shapes)
        torch.export.save(program, tmp_path / "model.pt2")
        self.check(tmp_path / "model.pt2")

    @pytest.mark.parametrize("name", ["model.pt", "model.pt2"])
    def test_damage(self, tmp_path, name):
        with pytest.raises(CheckpointError, match="not found"):
            load_foreign(str(tmp_path / name))
        (tmp_path / name).write_text("<html>")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(CheckpointError, match="not a"):
                load_foreign(str(tmp_path / name))


class TestCommand:
    @pytest.mark.slow
    def test_evaluates_and_reports(self, code, capsys):
        argv = ["eval", "--model", "their_models:digits", "--data", "digits", "--suite", "quick"]
        argv += ["--epsilon", "1/255,0.02", "--images", "12", "--quiet", "--out", "theirs"]
        assert cli.main(argv) in (0, 3, 4)
        out = capsys.readouterr().out
        assert "their_models:digits on digits test, n = 12" in out
        assert "verdict: " in out
        (path,) = (code / "theirs" / "evaluations").glob("*.json")
        table = json.loads(path.read_text())
        assert [round(worst["epsilon"], 4) for worst in table["curve"]] == [0.0039, 0.02]
        assert cli.main(["report", "theirs"]) == 0
        assert "their_models:digits" in (code / "theirs" / "report.html").read_text()

    @pytest.mark.parametrize(
        ("argv", "message"),
        [
            ([], "name a run folder"),
            (["--model", "their_models:digits"], "--data"),
            (["run", "--model", "their_models:digits", "--data", "digits"], "RUN does not go"),
            (["--model", "their_models:digits", "--data", "digits", "--expert", "1"], "--expert"),
            (["--model", "x:y", "--data", "digits", "--weights", "ema"], "--weights does not go"),
            (["run", "--data", "digits"], "--data goes with --model"),
            (["--model", ":net", "--data", "digits"], "expected package.module:name"),
            (["--model", ".a:net", "--data", "digits"], "expected package.module:name"),
        ],
    )
    def test_mistakes(self, code, argv, message, capsys):
        assert cli.main(["eval", *argv]) == 2
        assert message in capsys.readouterr().err
        assert not (code / "runs").exists()

    @pytest.mark.parametrize("text", ["eight", "1/0", "", "0.1;0.2"])
    def test_radii(self, text, capsys):
        with pytest.raises(SystemExit):
            cli.main(["eval", "run", "--epsilon", text])
        assert "list of numbers" in capsys.readouterr().err
