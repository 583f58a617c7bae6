"""Transfer: by hand from attacks and models, saved images as sources, names, what is refused."""

from __future__ import annotations

import pytest
import torch
from small_models import Linear, Mapped, Noisy, SmallNet, disordered, everything, make_images

import dwf
from dwf.attacks import PGD, load_images, save_images, transfer
from dwf.checks import ConfigError, ImageError, LabelError, ModelError

pytestmark = pytest.mark.usefixtures("one_thread")

N, EPSILON = 12, 0.03
IMAGES = make_images(N)


def right(model, images=IMAGES):
    with torch.no_grad():
        return model(images).argmax(dim=1)


MODELS = {"first": Linear(seed=0), "second": Linear(seed=1), "third": Linear(seed=0).double()}
LABELS = right(MODELS["first"])
SHORT = {"attack": PGD, "epsilon": EPSILON, "num_steps": 4, "step_size": 0.02}


def test_is_the_attacks_and_models_by_hand():
    table = dwf.transfer(MODELS, IMAGES, LABELS, **SHORT)
    assert table.sources == table.judges == ("first", "second", "third")
    for s, source in enumerate(MODELS.values()):
        settings = {name: value for name, value in SHORT.items() if name != "attack"}
        found = PGD(source, **settings)(IMAGES, LABELS, torch.arange(N))
        for t, judge in enumerate(MODELS.values()):
            answers = right(judge, found.to(next(judge.parameters()).dtype))
            assert torch.equal(table.stands[s, t], answers == LABELS), (s, t)
    # the first and the third are one model: what is crafted on one is wrong for the other
    assert table.clean_accuracy.tolist() == [1.0, table.clean_accuracy[1].item(), 1.0]
    assert table.accuracy[0, 0] < 0.5
    assert table.accuracy[0, 2] == table.accuracy[0, 0]
    assert table.accuracy[1, 0] > table.accuracy[0, 0]
    expected = (table.clean & table.stands.all(dim=0)).double().mean(dim=1)
    assert torch.equal(table.worst_case, expected)


def test_batches_change_nothing():
    whole = transfer(MODELS, IMAGES, LABELS, **SHORT)
    cut = transfer(MODELS, IMAGES, LABELS, batch_size=5, **SHORT)
    assert torch.equal(whole.stands, cut.stands)


def test_a_list_in_one_line():
    """Named by their classes; images made before are a source but no judge."""
    table = transfer([Linear(), SmallNet(), Linear(seed=1), IMAGES], IMAGES, LABELS, **SHORT)
    assert table.sources == ("Linear", "SmallNet", "Linear 2", "images")
    assert table.judges == ("Linear", "SmallNet", "Linear 2")
    assert torch.equal(table.stands[3], table.clean)


def test_saved_images_are_a_source(tmp_path):
    path = tmp_path / "crafted.safetensors"
    PGD(MODELS["first"], epsilon=EPSILON).save(path, [(IMAGES, LABELS)])
    judges = [MODELS["first"], MODELS["second"]]
    table = transfer([str(path), path], IMAGES, LABELS, judges=judges)
    assert table.sources == ("crafted", "crafted 2")
    assert table.judges == ("Linear", "Linear 2")
    assert table.attack == "images made before"
    expected = right(judges[0], load_images(path)[0]) == LABELS
    assert torch.equal(table.stands[0, 0], expected)
    assert torch.equal(table.stands[0], table.stands[1])


def test_str_is_a_table():
    judges = {"b": MODELS["first"], "a long name": MODELS["second"]}
    table = transfer({"a": MODELS["first"]}, IMAGES, LABELS, judges=judges, **SHORT)
    title, header, *rows = str(table).splitlines()
    assert title.startswith("PGD(epsilon=0.03, num_steps=4, step_size=0.02), n = 12: accuracy")
    assert header.split(maxsplit=1) == ["b", "a long name"]
    assert [row.split()[0] for row in rows] == ["clean", "a", "worst"]
    assert f"{100 * float(table.accuracy[0, 1]):.2f} %" in rows[1]
    assert len({len(line) for line in (header, *rows)}) == 1
    assert repr(table) == "TransferTable(1 sources, 2 judges)"
    assert table._repr_html_() == f"<pre>{table}</pre>"


def test_models_that_only_decide():
    def decide(images):
        return torch.nn.functional.one_hot(MODELS["first"](images).argmax(dim=1), 5).float()

    table = transfer(
        [decide], IMAGES, LABELS, attack=dwf.HopSkipJump, norm="l2", epsilon=None, num_queries=60
    )
    assert table.accuracy.tolist() == [[0.0]]
    assert table.sources == ("decide",)


def test_a_random_judge_is_asked_as_often_as_wanted():
    calls = []
    model = Noisy(Mapped(Linear(), lambda z: calls.append(len(z)) or z), std=0.01)
    transfer([IMAGES], IMAGES, LABELS, judges=[model], eot_samples=4)
    assert sum(calls) == 2 * 4 * N


def test_nothing_changes():
    model, images = disordered(SmallNet()), IMAGES.clone()
    before = everything(model)
    transfer([model], images, LABELS, **SHORT)
    assert everything(model) == before
    assert torch.equal(images, IMAGES)


class TestRefused:
    def test_what_is_no_list(self):
        with pytest.raises(ConfigError, match="sources: Linear, expected a list or a mapping"):
            transfer(Linear(), IMAGES, LABELS)
        with pytest.raises(ConfigError, match="sources: empty"):
            transfer([], IMAGES, LABELS)
        with pytest.raises(ConfigError, match="sources: int is int, expected a model"):
            transfer([3], IMAGES, LABELS)
        with pytest.raises(ConfigError, match="judges: images is Tensor, expected a model"):
            transfer([IMAGES], IMAGES, LABELS, judges=[IMAGES])
        with pytest.raises(ConfigError, match="judges: none"):
            transfer([IMAGES], IMAGES, LABELS)

    def test_other_images(self, tmp_path):
        judges = [Linear()]
        with pytest.raises(ImageError, match=r"images: images \[5, 3, 8, 8\], expected \[12"):
            transfer([IMAGES[:5]], IMAGES, LABELS, judges=judges)
        save_images(tmp_path / "other.safetensors", IMAGES, (LABELS + 1) % 5)
        with pytest.raises(ConfigError, match="other: labels of the file are not those"):
            transfer([tmp_path / "other.safetensors"], IMAGES, LABELS, judges=judges)
        with pytest.raises(ImageError, match="none"):
            transfer(judges, IMAGES[:0], LABELS[:0])
        with pytest.raises(LabelError):
            transfer(judges, IMAGES, LABELS[:3])

    def test_settings_that_do_not_exist(self):
        with pytest.raises(TypeError, match="epsilom"):
            transfer([Linear()], IMAGES, LABELS, epsilom=0.1)

    def test_a_model_that_fails_is_named(self):
        def broken(images):
            raise RuntimeError("no")

        with pytest.raises(ModelError, match="model broken fails"):
            transfer([Linear()], IMAGES, LABELS, judges=[broken], **SHORT)
