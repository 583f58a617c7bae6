"""Data as users have them: folders of any bit depth, tensors, loaders, torchvision data sets."""

import numpy as np
import pytest
import torch
from PIL import Image
from small_models import SHAPE, Linear, SmallNet, make_images, make_labels
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset

import dwf
import dwf.checks
from dwf.checks import (
    DataError,
    ImageError,
    ImageTypeError,
    LabelError,
    PixelRangeError,
)
from dwf.config import EvaluationConfig
from dwf.data import as_dataset, load
from dwf.evaluation import Budget

GRAY16 = (np.arange(64, dtype=np.uint16).reshape(8, 8) * 1040).astype(np.uint16)


def folder(tmp_path, images, split="train"):
    """An image folder of {class/file: PIL image}."""
    for name, image in images.items():
        path = tmp_path / split / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    return tmp_path


class TestFolders:
    @pytest.mark.parametrize("name", ["a/0.png", "a/0.tif", "a/0.pgm"])
    def test_16_bits(self, tmp_path, name):
        """Rounded to 8 bits: neither all white nor cut off."""
        found = load(folder(tmp_path, {name: Image.fromarray(GRAY16)}))
        expected = np.round(GRAY16 / 257).astype(np.uint8)
        assert np.array_equal(found.images[0, 0].numpy(), expected)
        assert torch.equal(found.images[0, 0], found.images[0, 2])

    @pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK", "YCbCr"])
    def test_modes_of_8_bits(self, tmp_path, mode):
        pixels = np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8)
        image = Image.fromarray(pixels).convert(mode)
        suffix = "png" if mode in ("1", "L", "P", "LA", "RGBA") else "tif"
        found = load(folder(tmp_path, {f"a/0.{suffix}": image}))
        expected = np.asarray(image.convert("RGB")).transpose(2, 0, 1)
        assert np.array_equal(found.images[0].numpy(), expected)

    @pytest.mark.parametrize(
        ("pixels", "kind"),
        [(np.full((8, 8), 0.5, np.float32), "floats"), (np.full((8, 8), 9, np.int32), "32-bit")],
    )
    def test_an_unknown_range_is_refused(self, tmp_path, pixels, kind):
        path = folder(tmp_path, {"a/0.tif": Image.fromarray(pixels)})
        with pytest.raises(DataError, match=rf"0.tif: pixels are {kind}.* range is not known"):
            load(path)

    def test_hidden_folders_and_files_are_no_data(self, tmp_path):
        image, other = Image.new("RGB", (8, 8)), Image.new("RGB", (9, 9), "white")
        path = folder(
            tmp_path,
            {
                ".ipynb_checkpoints/0-checkpoint.png": other,
                "__MACOSX/0.png": other,
                "cat/0.png": image,
                "cat/._0.png": other,
                "cat/.ipynb_checkpoints/0.png": other,
                "dog/deep/1.PNG": image,
            },
        )
        (path / "train" / ".DS_Store").write_bytes(b"x")
        found = load(path)
        assert found.class_names == ("cat", "dog")
        assert found.labels.tolist() == [0, 1]

    def test_the_order_is_torchvisions(self, tmp_path):
        from torchvision.datasets import ImageFolder

        names = ["b/2.png", "b/10.png", "a/z.jpg", "a/sub/0.png", "a/Z.png"]
        images = {name: Image.new("RGB", (8, 8), (9 * i, 0, 0)) for i, name in enumerate(names)}
        path = folder(tmp_path, images)
        found, theirs = load(path), ImageFolder(str(path / "train"))
        assert found.labels.tolist() == theirs.targets
        for mine, (image, _) in zip(found.images, theirs, strict=True):
            assert np.array_equal(mine.numpy().transpose(1, 2, 0), np.asarray(image))

    def test_an_empty_class(self, tmp_path):
        path = folder(tmp_path, {"a/0.png": Image.new("RGB", (8, 8))})
        (path / "train" / "b").mkdir()
        with pytest.raises(DataError, match=r"b: no images in it; known are files .jpg"):
            load(path)
        (tmp_path / "none" / "train").mkdir(parents=True)
        with pytest.raises(DataError, match="train: no class folders"):
            load(tmp_path / "none")

    def test_an_image_too_large_to_decode(self, tmp_path, monkeypatch):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30)
        path = folder(tmp_path, {"a/0.png": Image.new("RGB", (8, 8))})
        with pytest.raises(DataError, match=r"0.png: not a readable image, .*64 pixels"):
            load(path)


LABELS = make_labels(6)
EIGHT_BIT = (make_images(6) * 255).round().to(torch.uint8)
UNIT = EIGHT_BIT.float() / 255
BETWEEN = torch.rand(6, *SHAPE, generator=torch.Generator().manual_seed(0))


class Stream(IterableDataset):
    def __iter__(self):
        yield from zip(UNIT, LABELS, strict=True)


class Pictures(torch.utils.data.Dataset):
    classes = ("a", "b", "c", "d", "e", "f")

    def __len__(self):
        return len(LABELS)

    def __getitem__(self, i):
        return Image.fromarray(EIGHT_BIT[i].permute(1, 2, 0).numpy()), int(LABELS[i])


SHORT = {"suite": "quick", "budget": Budget(num_steps=5, num_queries=20)}
KINDS = {
    "uint8 tensors": (EIGHT_BIT, LABELS),
    "float tensors": (UNIT, LABELS.int()),
    "a list": [UNIT.double(), LABELS],
    "arrays, channels last": (EIGHT_BIT.permute(0, 2, 3, 1).numpy(), LABELS.numpy()),
    "loader": DataLoader(TensorDataset(UNIT, LABELS), batch_size=4),
    "data set": TensorDataset(UNIT, LABELS),
    "subset": Subset(TensorDataset(UNIT, LABELS), range(6)),
    "list of batches": [(UNIT[:4], LABELS[:4]), (UNIT[4:], LABELS[4:])],
    "list of images": list(zip(UNIT, LABELS, strict=True)),
    "stream": Stream(),
    "loader of a stream": DataLoader(Stream(), batch_size=4),
    "pictures": Pictures(),
}


@pytest.mark.parametrize("kind", KINDS)
def test_everything_that_gives_images_and_labels(kind):
    found = as_dataset(KINDS[kind])
    assert torch.equal(found.images, EIGHT_BIT)  # to the bit
    assert torch.equal(found.labels, LABELS)
    assert found.labels.dtype is torch.int64
    assert found.split == "test"
    assert as_dataset(KINDS[kind], limit=3).images.shape[0] == 3


def test_class_names_are_the_data_sets():
    assert as_dataset(Pictures()).class_names == Pictures.classes
    assert as_dataset(DataLoader(Subset(Pictures(), [0, 1]), batch_size=None)).num_classes == 6


def test_gray_pictures_keep_one_channel():
    pictures = [(Image.new("L", (8, 8), 7), 0), (Image.new("L", (8, 8), 9), 1)]
    assert as_dataset(pictures).images.shape == (2, 1, 8, 8)


def test_pixels_between_the_255ths_stay_as_they_are():
    found = as_dataset((BETWEEN, LABELS))
    assert torch.equal(found.images, BETWEEN)
    dataset = found.subset(torch.arange(2))
    assert torch.equal(dataset.images, BETWEEN[:2])
    assert found.mean == pytest.approx(BETWEEN.mean(dim=(0, 2, 3)).tolist(), abs=1e-6)


def test_a_loader_that_shuffles_gives_one_order_and_leaves_no_trace():
    loader = DataLoader(TensorDataset(UNIT, LABELS), batch_size=2, shuffle=True)
    state = torch.get_rng_state()
    first, second = as_dataset(loader), as_dataset(loader)
    assert first.digest == second.digest
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (None, DataError, r"found NoneType; expected an ImageDataset, a pair \(images, labels\)"),
        (UNIT, DataError, "found Tensor; expected an ImageDataset"),
        ({"x": UNIT, "y": LABELS}, DataError, "found dict; expected"),
        ([{"x": UNIT[0], "y": 1}], DataError, r"pairs \(images, labels\), found \['x', 'y'\]"),
        ((UNIT, LABELS[:3]), DataError, "6 images, but 3 labels"),
        ((UNIT[:0], LABELS[:0]), DataError, "no images"),
        ([], DataError, "no images"),
        ([(UNIT[0], 1), (UNIT[1, :, :4], 2)], DataError, "images of different shapes"),
        ((UNIT * 2 - 1, LABELS), PixelRangeError, "dwf.as_pixel_model"),
        ((EIGHT_BIT.int(), LABELS), ImageTypeError, "expected uint8 in 0 to 255"),
        ((UNIT, LABELS.float()), LabelError, "expected integers"),
        ((UNIT, torch.eye(6)), LabelError, "expected integers"),
        ((UNIT, LABELS - 3), LabelError, "labels: -"),
        ((UNIT.flatten(1), LABELS), ImageError, "expected shape"),
        ("digit", DataError, "did you mean digits"),
    ],
)
def test_what_is_no_data(data, error, message):
    with pytest.raises(error, match=message):
        as_dataset(data)


class TestEvaluate:
    SETTINGS = EvaluationConfig(diagnostic_images=0)

    def test_of_tensors_as_of_the_data_set(self):
        options = {**SHORT, "epsilon": 0.05}
        expected = dwf.evaluate(SmallNet(), as_dataset(KINDS["pictures"]), self.SETTINGS, **options)
        for kind in ("float tensors", "loader"):
            found = dwf.evaluate(SmallNet(), KINDS[kind], self.SETTINGS, **options)
            assert found.worst_case == expected.worst_case
            assert found.data.digest == expected.data.digest

    def test_of_floats(self):
        found = dwf.evaluate(SmallNet(), (BETWEEN, LABELS), self.SETTINGS, **SHORT)
        right = SmallNet().eval()(BETWEEN).argmax(dim=1) == LABELS
        assert found.clean_accuracy == pytest.approx(float(right.double().mean()))

    def test_of_a_name(self):
        settings = EvaluationConfig(diagnostic_images=0, num_images=4)
        model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
        assert dwf.evaluate(model, "digits", settings, **SHORT).data.name == "digits"

    @pytest.mark.parametrize("epsilon", [1.5, 3.0, [0.5, 1.5]])
    def test_l2_radii_of_the_literature(self, epsilon):
        found = dwf.evaluate(Linear(), (UNIT, LABELS), norm="l2", epsilon=epsilon, **SHORT)
        largest = epsilon[-1] if isinstance(epsilon, list) else epsilon
        assert found.epsilon == found.worst_case.epsilon == largest
        assert found.traces.epsilon == largest
        assert max(row.epsilon for row in found.attacks) == largest

    def test_radii_that_mean_nothing(self):
        linf = {"suite": "quick", "epsilon": 1.5}
        with pytest.raises(dwf.checks.ConfigError, match=r"did you mean 1.5/255"):
            dwf.evaluate(Linear(), (UNIT, LABELS), **linf)
        with pytest.raises(dwf.checks.ConfigError, match="larger than the L2 diameter"):
            dwf.evaluate(Linear(), (UNIT, LABELS), suite="quick", norm="l2", epsilon=128)

    def test_a_curve_begins_at_the_clean_accuracy(self):
        found = dwf.evaluate(
            SmallNet(), (UNIT, LABELS), self.SETTINGS, epsilon=[0, 0.02, 0.05], **SHORT
        )
        assert [part.epsilon for part in found.curve] == [0.0, 0.02, 0.05]
        assert found.curve[0].num_correct == found.clean.num_correct
        assert found.epsilon == 0.05
        with pytest.raises(dwf.checks.ConfigError, match=r"epsilon: 0.* more than zero"):
            dwf.evaluate(SmallNet(), (UNIT, LABELS), self.SETTINGS, suite="quick", epsilon=[0, 0])
