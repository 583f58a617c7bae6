"""Published models: what is packed, that it loads to the same logits, and that changes are seen."""

import json
import zipfile

import pytest
import torch
from small_runs import small_config

import dwf
from dwf import cli
from dwf.checks import CheckpointError, ConfigError
from dwf.evaluation import evaluate_into
from dwf.files import read_json
from dwf.published import best_evaluation, card, publish
from dwf.training import train

IMAGES = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A network of two epochs, judged by the paper's grid on ten images."""
    folder = tmp_path_factory.mktemp("published") / "run"
    config = dwf.presets.single(small_config("pretrain.num_epochs=2"), "plain")
    model = train(config, folder, quiet=True)
    settings = dwf.apply_overrides(
        config,
        [
            "evaluation.num_images=10",
            "evaluation.fgsm_epsilon=0.02",
            "evaluation.num_steps=2",
            "evaluation.multi_start_steps=0",
            "evaluation.adaptive_steps=0",
        ],
    ).evaluation
    test_set = dwf.data.load("digits", split="test")
    evaluate_into(folder, model, test_set, settings, suite="paper", title="plain", weights="last")
    return folder


@pytest.fixture(params=["folder", "model.zip"])
def published(request, run, tmp_path):
    return publish(run, tmp_path / request.param)


class TestPublish:
    def test_loads_to_the_same_bits(self, run, published):
        model = dwf.load(published)
        assert not model.training
        assert torch.equal(model(IMAGES), dwf.load(run)(IMAGES))

    def test_chosen_weights(self, run, tmp_path):
        out = publish(run, tmp_path / "x.zip", weights="ema")
        assert torch.equal(dwf.load(out)(IMAGES), dwf.load(run, "ema")(IMAGES))

    def test_the_card_has_the_numbers_and_the_verdict(self, run, tmp_path):
        out = publish(run, tmp_path / "out")
        text = (out / "README.md").read_text()
        evaluation = best_evaluation(run, "last")
        assert f"**{evaluation.verdict}**" in text
        assert f"{100 * evaluation.worst_case.accuracy:.1f} % worst case" in text
        assert "10 images of digits test" in text
        assert read_json(out / "evaluation.json")["environment"] == {}
        assert str(run.parent) not in text + (out / "evaluation.json").read_text()

    def test_weights_that_nobody_judged(self, run):
        assert best_evaluation(run, "ema") is None
        assert "**Not evaluated.**" in card(run, "ema", None)

    def test_command(self, run, tmp_path, capsys):
        out = tmp_path / "model.zip"
        assert cli.main(["publish", str(run), "--out", str(out)]) == 0
        assert f'dwf.load("{out}")' in capsys.readouterr().out

    def test_a_folder_in_use(self, run, tmp_path):
        (tmp_path / "note.txt").write_text("mine")
        with pytest.raises(ConfigError, match="holds something already"):
            publish(run, tmp_path)

    def test_no_run(self, tmp_path):
        with pytest.raises(CheckpointError, match="not a run folder"):
            publish(tmp_path, tmp_path / "out")


class TestLoad:
    @pytest.mark.parametrize("name", ["model.safetensors", "README.md", "evaluation.json"])
    def test_a_changed_file(self, run, tmp_path, name):
        out = publish(run, tmp_path / "out")
        data = bytearray((out / name).read_bytes())
        data[len(data) // 2] ^= 1
        (out / name).write_bytes(data)
        with pytest.raises(CheckpointError, match=f"{name}: damaged or changed"):
            dwf.load(out)

    def test_a_manifest_that_names_something_else(self, run, tmp_path):
        out = publish(run, tmp_path / "out")
        manifest = read_json(out / "manifest.json")
        manifest["sha256"]["../../secret"] = "0"
        (out / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(CheckpointError, match=r"names .*secret"):
            dwf.load(out)

    def test_archives_that_are_none(self, run, tmp_path):
        out = publish(run, tmp_path / "out.zip")
        whole = out.read_bytes()
        out.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(CheckpointError, match="not a readable archive"):
            dwf.load(out)
        with zipfile.ZipFile(out, "w") as archive:
            archive.writestr("../evil.py", "boom")
        with pytest.raises(CheckpointError, match="no such file"):
            dwf.load(out)
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("model.safetensors", bytes(1000))
        with pytest.raises(CheckpointError, match="compressed"):
            dwf.load(out)
        with pytest.raises(CheckpointError, match="not found"):
            dwf.load(tmp_path / "none.zip")

    def test_has_one_set_of_weights(self, published):
        with pytest.raises(ConfigError, match="no other weights"):
            dwf.load(published, "best")
