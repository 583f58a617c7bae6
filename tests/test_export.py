"""Exported files: each computes what the model does, or is not there."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from small_models import (
    SHAPE,
    Linear,
    Mapped,
    Noisy,
    SmallNet,
    disordered,
    everything,
    make_images,
)
from small_runs import small_config
from torch import nn

import dwf
from dwf import cli
from dwf import export as exporting
from dwf.checks import CheckpointError, ConfigError, DwfError, ImageError, PixelRangeError
from dwf.export import SUFFIXES, ExportError, export, export_run, load_exported
from dwf.models import build_network
from dwf.models.sparse_network import SparseModel, make_sparse
from dwf.training import train

pytestmark = pytest.mark.usefixtures("one_thread")

IMAGES = make_images(4)
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
ALL = pytest.mark.parametrize("format", SUFFIXES)


def mixture():
    """Two experts whose gate decides by the image; BatchNorm with statistics of its own."""
    gate = dwf.MlpGate(SHAPE, 2, hidden=4)
    nn.init.normal_(gate.layers[-1].weight, generator=torch.Generator().manual_seed(0))
    return dwf.Mixture([SmallNet(seed=e) for e in range(2)], gate, dwf.Normalize(MEAN, STD))


def require(format):
    if format == "onnx":
        pytest.importorskip("onnx")
        pytest.importorskip("onnxscript")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The file of a mixture in a format, made once."""
    folder, made = tmp_path_factory.mktemp("exported"), {}

    def file(format):
        require(format)
        if format not in made:
            path = folder / f"model{SUFFIXES[format]}"
            made[format] = export(mixture(), path, format=format, images=IMAGES)
        return made[format]

    return file


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "small"
    train(small_config("pretrain.num_epochs=1", "joint.num_epochs=2"), folder, quiet=True)
    return folder


class TestFiles:
    @pytest.mark.slow
    @ALL
    def test_what_is_reported(self, exported, format):
        made = exported(format)
        assert made.num_bytes == made.path.stat().st_size
        assert made.largest_difference <= 1e-5
        assert f"{made.path}: {format}" in str(made)
        assert [p.name for p in made.path.parent.iterdir() if p.name.startswith(".")] == []

    @pytest.mark.parametrize("num_images", [1, 2, 4, 11])
    def test_torch_program_for_any_batch_size(self, exported, num_images):
        images = make_images(num_images, seed=7)
        program = torch.export.load(exported("torch-export").path).module()
        expected = mixture().eval()(images)
        torch.testing.assert_close(program(images), expected, rtol=0, atol=1e-5)

    @pytest.mark.slow
    @pytest.mark.parametrize("format", ["torch-export", "onnx"])
    @pytest.mark.parametrize("top_k", [1, 2])
    def test_sparse_network_that_routes_each_image(self, tmp_path, format, top_k):
        """A graph computes all experts; the model only those that an image chose."""
        require(format)
        network = build_network("resnet6", num_classes=5, width=4, in_channels=3, seed=0)
        subpath = make_sparse(network, "block", num_experts=3, top_k=top_k)
        model = SparseModel(dwf.Normalize(MEAN, STD), network, subpath).eval()
        images = make_images(32)
        gate, seen = model.layer(subpath).gate, []
        with gate.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])):
            model(images)
        with torch.no_grad():  # around the mean, so that images choose differently
            gate.linear.weight.mul_(100)
            gate.linear.bias.copy_(-gate.linear.weight @ seen[0].mean(dim=(0, 2, 3)))
        assert len(set(model.gate_weights(images).argmax(dim=1).tolist())) > 1
        path = tmp_path / f"model{SUFFIXES[format]}"
        # through gate_logits of a hundred, which have few digits after the point
        assert export(model, path, format=format, images=images).largest_difference <= 1e-4

    @pytest.mark.slow
    def test_torch_program_is_plain_torch(self, exported, tmp_path):
        """In a process where our packages cannot be imported; it knows nothing of this machine."""
        path = exported("torch-export").path
        names = {
            str(node.target)
            for node in torch.export.load(path).graph.nodes
            if node.op == "call_function"
        }
        assert names
        assert not [name for name in names if not name.startswith(("aten.", "<built-in"))]
        torch.save(make_images(3, seed=7), tmp_path / "images.pt")
        script = f"""
import sys
sys.modules["moe_kernels"] = sys.modules["dwf"] = None
import torch
images = torch.load({str(tmp_path / "images.pt")!r}, weights_only=True)
logits = torch.export.load({str(path)!r}).module()(images)
torch.save(logits.detach(), {str(tmp_path / "logits.pt")!r})
"""
        subprocess.run([sys.executable, "-c", script], check=True, timeout=120, cwd=tmp_path)
        logits = torch.load(tmp_path / "logits.pt", weights_only=True)
        expected = mixture().eval()(make_images(3, seed=7))
        torch.testing.assert_close(logits, expected.detach(), rtol=0, atol=1e-5)

    @pytest.mark.parametrize("num_images", [1, 4, 11])
    def test_onnx_for_any_batch_size(self, exported, num_images):
        path, images = exported("onnx").path, make_images(num_images, seed=7)
        import onnx.reference

        model = onnx.load(path)
        onnx.checker.check_model(model)
        evaluator = onnx.reference.ReferenceEvaluator(model)
        (logits,) = evaluator.run(None, {"images": images.numpy()})
        expected = mixture().eval()(images)
        torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=0, atol=1e-5)
        assert [value.name for value in model.graph.output] == ["logits"]
        assert {use.domain for use in model.opset_import} <= {"", "ai.onnx"}

    @pytest.mark.parametrize("format", ["torch-export", "onnx"])
    def test_nothing_of_this_machine(self, exported, format):
        """No source line, no path."""
        data = exported(format).path.read_bytes()
        assert str(cli.__file__).rsplit("/", 2)[0].encode() not in data
        assert b"site-packages" not in data

    def test_safetensors(self, exported):
        with safe_open(exported("safetensors").path, framework="pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}
            metadata = file.metadata()
        assert metadata["model"] == "Mixture"
        assert metadata["dwf"] == dwf.__version__
        expected = mixture().state_dict()
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[name], expected[name]) for name in expected)
        assert "normalize.mean" in weights

    def test_weights_without_a_run_are_not_rebuilt(self, exported, tmp_path):
        with pytest.raises(CheckpointError, match="without the config of a run"):
            load_exported(exported("safetensors").path)
        page = tmp_path / "page.safetensors"
        page.write_text("<html>404</html>")
        with pytest.raises(CheckpointError, match="not a safetensors file"):
            load_exported(page)
        with pytest.raises(CheckpointError, match="not found"):
            load_exported(tmp_path / "none.safetensors")

    def test_tied_weights(self, tmp_path):
        model = Linear()
        model.again = model.weight
        for format in ("safetensors", "torch-export"):
            path = tmp_path / f"tied{SUFFIXES[format]}"
            assert export(model, path, format=format, images=IMAGES).largest_difference <= 1e-5

    def test_one_image_and_a_model_that_counts_them(self, tmp_path):
        """``len(images)`` is a number to the first way of tracing; there is a second."""

        class Counts(Linear):
            def forward(self, images):
                return super().forward(images).reshape(len(images), -1)

        path = tmp_path / "counts.pt2"
        export(Counts(), path, format="torch-export", images=IMAGES[:1])
        found = torch.export.load(path).module()(make_images(5))
        torch.testing.assert_close(found, Counts()(make_images(5)), rtol=0, atol=1e-5)


class TestRefusals:
    @ALL
    def test_another_result_leaves_no_file(self, tmp_path, monkeypatch, format):
        """Whatever the reason: here the writer is off by 2e-4 in one logit of one image."""
        off = torch.zeros(4, 5)
        off[3, 2] = 2e-4
        writer = lambda model, images, metadata: (b"...", lambda x: model(x) + off[: len(x)])  # noqa: E731
        monkeypatch.setitem(exporting._WRITERS, format, writer)
        monkeypatch.setattr(exporting, "_require", lambda *packages: None)
        path = tmp_path / f"model{SUFFIXES[format]}"
        path.write_text("the old one")
        with pytest.raises(
            ExportError, match=r"differ from the model's by 0\.0002, more than 0\.0001"
        ):
            export(SmallNet(), path, format=format, images=IMAGES)
        assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [(path.name, "the old one")]
        off[0, 0], off[3, 2] = 0.0, torch.nan  # not in the first image
        with pytest.raises(ExportError, match="by nan"):
            export(SmallNet(), path, format=format, images=IMAGES)
        off.fill_(0.9e-4)
        assert export(SmallNet(), path, format=format, images=IMAGES).num_bytes == 3

    @ALL
    @pytest.mark.parametrize(
        ("model", "message"),
        [
            (Noisy(Linear()), "Noisy: random, two passes differ by"),
            (Mapped(Linear(), lambda z: z * torch.nan), "Mapped: logits that are not finite"),
            (Mapped(Linear(), lambda z: z.softmax(dim=1)), "these are probabilities"),
            (Mapped(Linear(), lambda z: (z, z)), "expected a tensor of logits"),
        ],
        ids=["random", "nan", "probabilities", "tuple"],
    )
    def test_a_model_that_no_file_can_be(self, tmp_path, format, model, message):
        require(format)
        with pytest.raises(DwfError, match=message):
            export(model, tmp_path / f"x{SUFFIXES[format]}", format=format, images=IMAGES)
        assert list(tmp_path.iterdir()) == []

    def test_a_model_that_cannot_be_traced(self, tmp_path):
        def by_content(logits):
            return logits if float(logits.sum()) > 0 else 2 * logits

        with pytest.raises(ExportError, match=r"Mapped: torch\.export cannot trace it"):
            export(
                Mapped(Linear(), by_content),
                tmp_path / "x.pt2",
                format="torch-export",
                images=IMAGES,
            )
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"format": "onxx"}, ConfigError, "did you mean 'onnx'"),
            ({"model": lambda x: x}, ConfigError, "expected a torch.nn.Module, found function"),
            ({"images": make_images(0)}, ImageError, "at least one"),
            ({"images": IMAGES * 255}, PixelRangeError, "expected \\[0, 1\\]"),
            ({"path": "none/model.pt2"}, ConfigError, "none is not a folder"),
            ({"path": "model.pt"}, ConfigError, "is called \\*.pt2"),
        ],
        ids=["format", "model", "empty", "range", "folder", "suffix"],
    )
    def test_bad_input(self, tmp_path, change, error, message):
        never = Mapped(Linear(), lambda z: pytest.fail("the model was asked"))
        settings = {"model": never, "path": "model.pt2", "format": "torch-export", "images": IMAGES}
        settings |= change
        model, path = settings.pop("model"), tmp_path / settings.pop("path")
        with pytest.raises(error, match=message):
            export(model, path, **settings)
        assert list(tmp_path.iterdir()) == []

    def test_missing_packages(self, tmp_path, monkeypatch):
        find = exporting.importlib.util.find_spec
        monkeypatch.setattr(
            exporting.importlib.util,
            "find_spec",
            lambda name: None if name in ("onnx", "onnxscript") else find(name),
        )
        with pytest.raises(ExportError, match=r"onnx, onnxscript not installed: .*extra .export"):
            export(Linear(), tmp_path / "x.onnx", format="onnx", images=IMAGES)

    def test_onnx_without_a_runtime(self, exported, monkeypatch):
        data = exported("onnx").path.read_bytes()
        find = exporting.importlib.util.find_spec
        monkeypatch.setattr(
            exporting.importlib.util,
            "find_spec",
            lambda name: None if name == "onnxruntime" else find(name),
        )
        found = exporting._onnx_function(data)(IMAGES)
        torch.testing.assert_close(found, mixture().eval()(IMAGES), rtol=0, atol=1e-5)

    @pytest.mark.parametrize("format", ["safetensors", "torch-export"])
    def test_no_trace(self, tmp_path, format):
        model = disordered(SmallNet())
        before = everything(model)
        export(model, tmp_path / f"x{SUFFIXES[format]}", format=format, images=IMAGES)
        assert everything(model) == before


class TestRuns:
    @pytest.mark.parametrize("which", ["last", "best", "ema"])
    def test_rebuilt_to_the_bit(self, run, tmp_path, which):
        if which == "ema" and not list((run / "checkpoints").glob("step-*/ema.safetensors")):
            pytest.skip("this run keeps no average")
        path = tmp_path / "model.safetensors"
        export_run(run, path, format="safetensors", weights=which)
        images = make_images(9, (1, 8, 8))
        model = load_exported(path)
        assert not model.training
        assert torch.equal(model(images), dwf.load(run, which)(images))
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        assert metadata["weights"] == which
        assert json.loads(metadata["config"]) == json.loads((run / "config.json").read_text())

    def test_command(self, run, tmp_path, capsys):
        path = tmp_path / "model.safetensors"
        argv = ["export", str(run), "--to", "safetensors", "--out", str(path), "--weights", "best"]
        assert cli.main(argv) == 0
        assert capsys.readouterr().out.startswith(f"{path}: safetensors, ")
        images = make_images(9, (1, 8, 8))
        assert torch.equal(load_exported(path)(images), dwf.load(run, "best")(images))

    def test_mistakes_on_the_command_line(self, run, tmp_path, capsys):
        out = ["--out", str(tmp_path / "x.onnx")]
        assert cli.main(["export", str(tmp_path), "--to", "safetensors", *out]) == 2
        assert "not a run folder" in capsys.readouterr().err
        assert cli.main(["export", str(run), "--to", "safetensors", *out]) == 2
        assert "a safetensors file is called *.safetensors" in capsys.readouterr().err
        with pytest.raises(SystemExit):
            cli.main(["export", str(run), "--to", "pickle", *out])
        assert list(tmp_path.iterdir()) == []


class Quantized(torch.nn.Module):
    """Weights of 8 bits with a scale, as parameters: they have no gradient."""

    def __init__(self):
        super().__init__()
        weight = torch.linspace(-127, 127, 5 * 192).round().view(5, 192).to(torch.int8)
        self.weight = torch.nn.Parameter(weight, requires_grad=False)
        self.scale = torch.nn.Parameter(torch.tensor(0.01))

    def forward(self, images):
        return images.flatten(1) @ (self.weight.float() * self.scale).T


@pytest.mark.parametrize("format", ["safetensors", "torch-export"])
def test_parameters_that_are_integers(tmp_path, format):
    path = tmp_path / f"model{SUFFIXES[format]}"
    written = export(Quantized(), path, format=format, images=torch.rand(3, 3, 8, 8))
    assert written.largest_difference < 1e-4
