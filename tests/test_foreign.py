"""Models that were trained elsewhere: named, loaded, attacked, judged and reported."""

import json
import sys
import warnings

import pytest
import torch
from safetensors.torch import save_file
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

    def project(self, folder, number):
        """As people have it: a script beside a package, which imports once more when it is run."""
        (folder / "models").mkdir(parents=True)
        (folder / "models" / "__init__.py").write_text("from .tiny import Tiny\n")
        (folder / "models" / "tiny.py").write_text(
            "from torch import nn\n"
            f"class Tiny(nn.Sequential):\n"
            f"    number = {number}\n"
            "    def __init__(self): super().__init__(nn.Flatten(), nn.Linear(64, 10))\n"
        )
        (folder / "late.py").write_text(f"number = {number}\n")
        (folder / "my.py").write_text(
            "from models import Tiny\n"
            "class Late(Tiny):\n"
            "    def forward(self, x):\n"
            "        import late\n"
            "        return super().forward(x) * 0 + late.number\n"
        )
        return str(folder / "my.py")

    def test_a_file_imports_its_neighbours(self, tmp_path, monkeypatch):
        before = list(sys.path)
        file = self.project(tmp_path / "project", 1)
        model = load_foreign(f"{file}:Late")
        assert model.number == 1
        assert bool((model(torch.rand(2, 1, 8, 8)) == 1).all())
        assert sys.path[: len(before)] == before  # nothing of theirs stands in for what we need
        monkeypatch.chdir(tmp_path / "project")
        assert load_foreign("my.py:Late").number == 1

    def test_two_projects_do_not_mix(self, tmp_path):
        files = [self.project(tmp_path / str(number), number) for number in (1, 2)]
        assert [load_foreign(f"{file}:Late").number for file in files] == [1, 2]

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("Deep", r"Deep\(\) fails, TypeError: .*'depth'; name a module, or a function without"),
            ("broken", r"broken\(\) fails, ZeroDivisionError: division by zero"),
            ("leaves", r"leaves\(\) fails, SystemExit: 3"),
            ("lam", "expected a torch.nn.Module .* found function"),
            ("nothing", "found NoneType"),
            ("Deeq", "there is no 'Deeq'; did you mean 'Deep'"),
        ],
    )
    def test_what_a_builder_may_do(self, tmp_path, name, message):
        (tmp_path / "net.py").write_text(
            "import sys\n"
            "from torch import nn\n"
            "class Deep(nn.Module):\n"
            "    def __init__(self, depth): super().__init__()\n"
            "def broken(): return 1 / 0\n"
            "def leaves(): sys.exit(3)\n"
            "def lam(): return lambda x: x\n"
            "nothing = None\n"
        )
        with pytest.raises(ConfigError, match=message) as error:
            load_foreign(f"{tmp_path}/net.py:{name}")
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize(
        ("code_of_file", "message"),
        [
            ("1 / 0", "importing it fails, ZeroDivisionError: division by zero"),
            ("def f(:", "importing it fails, SyntaxError"),
            ("import sys; sys.exit('usage')", "importing it fails, SystemExit: usage"),
            ("from .models import Net", "relative import.*; name it as a part of its package"),
            ("import no_such_package", "No module named 'no_such_package'"),
        ],
    )
    def test_a_file_that_cannot_be_imported(self, tmp_path, code_of_file, message):
        (tmp_path / "net.py").write_text(code_of_file)
        with pytest.raises(ConfigError, match=message):
            load_foreign(f"{tmp_path}/net.py:net")

    @pytest.mark.parametrize(
        ("spec", "message"),
        [
            ("their_models.py", "name what to take from the file, as in their_models.py:net"),
            ("resnet18", "did you mean torchvision.models:resnet18"),
            (".", "is a folder; expected"),
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


def state_dict():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).state_dict()


class TestWeights:
    """What people have instead of a model: the message says what it is, and nothing is run."""

    FILES = {  # noqa: RUF012
        "state.pt": lambda path: torch.save(state_dict(), path),
        "of numpy.pt": lambda path: torch.save({"w": torch.ones(2).numpy()}, path),
        "checkpoint.pth": lambda path: torch.save({"epoch": 3, "state_dict": state_dict()}, path),
        "checkpoint.pth.tar": lambda path: torch.save(
            {"epoch": 3, "state_dict": state_dict(), "optimizer": {"lr": 0.1}}, path
        ),
        "whole.pt": lambda path: torch.save(nn.Sequential(nn.Linear(2, 2)), path),
        "old.pt": lambda path: torch.save(state_dict(), path, _use_new_zipfile_serialization=False),
        "state.safetensors": lambda path: save_file(state_dict(), path),
        "page.pt": lambda path: path.write_text("\n<!DOCTYPE html><html>404</html>"),
        "pointer.pth": lambda path: path.write_text("version https://git-lfs.github.com/spec/v1"),
        "empty.pt": lambda path: path.write_bytes(b""),
        "graph.onnx": lambda path: path.write_bytes(b"\x08\x07"),
        "keras.h5": lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n"),
        "noise.bin": lambda path: path.write_bytes(bytes(range(1, 99))),
    }
    SAYS = {  # noqa: RUF012
        "state.pt": "a state dict, weights without a network",
        "of numpy.pt": "a state dict",
        "checkpoint.pth": "a checkpoint with the entries epoch, state_dict",
        "checkpoint.pth.tar": "a checkpoint with the entries epoch, state_dict, optimizer",
        "whole.pt": "a pickled object of class torch.nn.modules.container.Sequential",
        "old.pt": "a pickle, or weights in torch's format before 1.6",
        "state.safetensors": "weights alone",
        "page.pt": "a web page in place of the file",
        "pointer.pth": "a pointer of Git LFS",
        "empty.pt": "nothing: the file is empty",
        "graph.onnx": "an ONNX graph",
        "keras.h5": "an HDF5 file",
        "noise.bin": "no model that is known here",
    }

    @pytest.mark.parametrize("name", FILES)
    def test_files(self, tmp_path, name):
        self.FILES[name](tmp_path / name)
        with pytest.raises((CheckpointError, ConfigError), match=self.SAYS[name]) as error:
            load_foreign(str(tmp_path / name))
        assert "give file.py:function" in str(error.value)
        assert "\n" not in str(error.value)

    def test_an_exported_program_under_another_name(self, tmp_path):
        program = torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),))
        torch.export.save(program, tmp_path / "x.pt2")
        (tmp_path / "x.pt2").rename(tmp_path / "x.pt")
        with pytest.raises(CheckpointError, match=r"an exported program: name the file \*.pt2"):
            load_foreign(str(tmp_path / "x.pt"))

    def test_a_run_folder(self, tmp_path):
        (tmp_path / "config.json").write_text("{}")
        with pytest.raises(ConfigError, match="is a run folder; give it without --model"):
            load_foreign(str(tmp_path))

    def test_nothing_is_unpickled(self, tmp_path):
        class Trap:
            def __reduce__(self):
                return (tmp_path / "sprung").write_text, ("x",)

        torch.save({"state_dict": Trap()}, tmp_path / "trap.pt")
        with pytest.raises(CheckpointError, match="it holds"):
            load_foreign(str(tmp_path / "trap.pt"))
        assert not (tmp_path / "sprung").exists()


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
