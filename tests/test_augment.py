"""Operations on images by hand and beside torchvision's, CutMix, and extra images in batches."""

import numpy as np
import pytest
import torch
from small_runs import assert_same_run, small_config, train_interrupted

import dwf
from dwf.checks import ConfigError
from dwf.data import Batches, ImageDataset
from dwf.data import augment as ops
from dwf.training import train


def images_of(count=4, channels=3, side=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    levels = torch.randint(0, 256, (count, channels, side, side), generator=generator)
    return levels.float() / 255


def strength(*values):
    return torch.tensor(values)


class TestOperations:
    def test_nothing_at_strength_zero(self):
        images = images_of()
        for name, operation in ops.OPERATIONS.items():
            if name not in ("autocontrast", "equalize", "invert", "solarize"):
                found = operation(images, torch.zeros(4))
                torch.testing.assert_close(found, images, msg=name)

    def test_brightness_and_contrast(self):
        image = torch.tensor([0.2, 0.6]).view(1, 1, 1, 2)
        found = ops.brightness(image, strength(0.5))
        torch.testing.assert_close(found.flatten(), torch.tensor([0.3, 0.9]))
        found = ops.contrast(image, strength(-0.5))  # half way to the mean 0.4
        torch.testing.assert_close(found.flatten(), torch.tensor([0.3, 0.5]))

    def test_autocontrast(self):
        image = torch.tensor([0.2, 0.4, 0.6, 0.6]).view(1, 1, 2, 2)
        found = ops.autocontrast(image, strength(0.0)).flatten()
        torch.testing.assert_close(found, torch.tensor([0.0, 0.5, 1.0, 1.0]))
        flat = torch.full((1, 1, 2, 2), 0.3)
        assert torch.equal(ops.autocontrast(flat, strength(0.0)), flat)

    def test_posterize_and_solarize(self):
        image = torch.tensor([17.0, 255.0]).view(1, 1, 1, 2) / 255
        found = ops.posterize(image, strength(1.0)) * 255  # four bits: multiples of 16
        torch.testing.assert_close(found.flatten(), torch.tensor([16.0, 240.0]))
        found = ops.solarize(image, strength(0.5)) * 255
        torch.testing.assert_close(found.flatten(), torch.tensor([17.0, 0.0]))

    def test_translations_leave_black_behind(self):
        images = images_of(1, side=8)
        found = ops.translate_x(images, strength(0.25))
        assert torch.equal(found[..., 2:], images[..., :-2])
        assert not found[..., :2].any()
        found = ops.translate_y(images, strength(-0.125))
        assert torch.equal(found[:, :, :-1], images[:, :, 1:])

    def test_a_quarter_turn(self):
        images = images_of(1)
        found = ops.rotate(images, strength(90 / 135))
        assert torch.equal(found, torch.rot90(images, 1, (2, 3)))

    def test_each_image_has_its_own_strength(self):
        images = images_of(2)
        found = ops.translate_x(images, strength(0.125, 0.0))
        assert torch.equal(found[1], images[1])
        assert torch.equal(found[0, :, :, 1:], images[0, :, :, :-1])

    @pytest.mark.parametrize(
        ("name", "of_bytes", "value"),
        [
            ("equalize", "equalize", None),
            ("autocontrast", "autocontrast", None),
            ("contrast", "adjust_contrast", 0.4),
            ("color", "adjust_saturation", -0.6),
            ("sharpness", "adjust_sharpness", 0.7),
        ],
    )
    def test_beside_torchvision(self, name, of_bytes, value):
        functional = pytest.importorskip("torchvision.transforms.functional")
        levels = (images_of(4, side=16) * 160 + 40).round().to(torch.uint8)
        arguments = () if value is None else (1 + value,)
        expected = getattr(functional, of_bytes)(levels, *arguments)
        found = ops.OPERATIONS[name](levels.float() / 255, torch.full((4,), value or 0.0)) * 255
        assert (found - expected.float()).abs().max() < 1.5  # torchvision rounds down, twice


class TestVariations:
    @pytest.mark.parametrize("name", ["autoaugment", "idbh", "trivial"])
    def test_are_images_that_depend_on_their_own_noise_only(self, name):
        images = images_of(64)
        noise = torch.rand(64, ops.NUM_DRAWS, generator=torch.Generator().manual_seed(1))
        found = ops.VARIATIONS[name](images, noise)
        assert found.shape == images.shape
        assert found.min() >= 0
        assert found.max() <= 1
        assert (found - images).abs().flatten(1).amax(dim=1).gt(0.01).float().mean() > 0.6
        alone = ops.VARIATIONS[name](images[5:6], noise[5:6])
        torch.testing.assert_close(found[5:6], alone)

    def test_autoaugment_draws_a_pair_with_its_probabilities(self):
        """Pair 0: invert with .1, then contrast with .2; neither, then invert alone."""
        images = images_of(2)
        noise = torch.tensor([[0.0, 0.1, 0.2] + [0.9] * 5, [0.0, 0.0, 0.9] + [0.9] * 5])
        found = ops.autoaugment(images, noise)
        assert torch.equal(found[0], images[0])
        torch.testing.assert_close(found[1], 1 - images[1])


class TestCutMix:
    def test_rectangle(self):
        """A quarter of 8 x 8 around the middle: rows and columns 2 to 5."""
        noise = torch.tensor([[0.25, 0.5, 0.5], [0.25, 0.0, 0.5]])
        mixed, kept = ops.cutmix(torch.zeros(2, 1, 8, 8), torch.ones(2, 1, 8, 8), noise)
        expected = torch.zeros(8, 8)
        expected[2:6, 2:6] = 1
        assert torch.equal(mixed[0, 0], expected)
        # cut off at the upper border: rows 0 and 1
        assert kept.tolist() == [1 - 16 / 64, 1 - 8 / 64]


def dataset_of(count, value, name="set", classes=4):
    images = torch.full((count, 1, 4, 4), value, dtype=torch.uint8)
    labels = torch.arange(count) % classes
    return ImageDataset(name, images, labels, classes, ("",) * classes, (0.5,), (0.5,), "", "train")


class TestBatches:
    def test_smoothed_labels(self):
        batch = Batches(dataset_of(8, 100), 4, seed=0, label_smoothing=0.2).batch(0, 0)
        expected = torch.full((4, 4), 0.05)
        expected[torch.arange(4), batch.labels] = 0.85
        torch.testing.assert_close(batch.targets, expected)
        assert Batches(dataset_of(8, 100), 4, seed=0).batch(0, 0).targets is None

    def test_shares_of_mixed_images_are_those_of_their_pixels(self):
        """Image i is i everywhere, so that the share of its pixels can be counted."""
        data = dataset_of(8, 0, classes=8)
        data.images[:] = torch.arange(8, dtype=torch.uint8).view(8, 1, 1, 1)
        batch = Batches(data, 8, seed=3, cutmix=1.0).batch(0, 0)
        pixels = (batch.images * 255).round().long().flatten(1)
        counted = torch.nn.functional.one_hot(pixels, 8).float().mean(dim=1)
        torch.testing.assert_close(batch.targets, counted)
        assert torch.equal(batch.labels, batch.targets.argmax(dim=1))
        assert (counted.max(dim=1).values < 1).any()

    @pytest.mark.parametrize("world", [2, 4])
    def test_mixing_does_not_depend_on_the_number_of_processes(self, world):
        data = dataset_of(16, 0, classes=4)
        data.images[:] = torch.arange(16, dtype=torch.uint8).view(16, 1, 1, 1)
        whole = Batches(data, 8, seed=3, cutmix=0.7, augment="idbh").batch(1, 0)
        parts = [
            Batches(data, 8, seed=3, cutmix=0.7, augment="idbh", rank=r, world_size=world)
            for r in range(world)
        ]
        joined = dwf.data.Batch.joined([part.batch(1, 0) for part in parts])
        assert torch.equal(joined.images, whole.images)
        assert torch.equal(joined.targets, whole.targets)

    def test_extra_images_have_their_share_of_each_batch(self):
        data, extra = dataset_of(12, 10), dataset_of(7, 200)
        batches = Batches(data, 4, seed=0, extra=extra, extra_fraction=0.75)
        assert batches.steps_per_epoch == 3
        seen = []
        for batch in batches.epoch(0):
            is_extra = batch.sample_index >= 12
            assert int(is_extra.sum()) == 3
            assert torch.equal(batch.images[:, 0, 0, 0] * 255 > 100, is_extra)
            assert torch.equal(batch.labels[is_extra], (batch.sample_index[is_extra] - 12) % 4)
            assert [int(part.sum()) for part in is_extra.chunk(2)] in ([1, 2], [2, 1])
            seen += batch.sample_index[is_extra].tolist()
        # nine of seven: a permutation, and the beginning of another
        assert sorted(seen[:7]) == list(range(12, 19))

    @pytest.mark.parametrize(
        ("extra", "fraction", "message"),
        [
            (dataset_of(8, 0, classes=5), 0.5, "5 classes"),
            (dataset_of(8, 0), 0.01, "0 of 4 images"),
        ],
    )
    def test_extra_images_that_do_not_fit(self, extra, fraction, message):
        with pytest.raises(ConfigError, match=message):
            Batches(dataset_of(8, 0), 4, seed=0, extra=extra, extra_fraction=fraction)


@pytest.mark.slow
def test_all_at_once_in_an_interrupted_run(tmp_path):
    """Extra images, CutMix, AutoAugment, smoothing, SWA and Muon: the same bits after a resume."""
    generator = np.random.default_rng(0)
    np.savez(
        tmp_path / "more.npz",
        images=generator.integers(0, 255, (40, 1, 8, 8), dtype=np.uint8),
        labels=np.arange(40) % 10,
    )
    config = dwf.apply_overrides(
        dwf.presets.single(small_config(), "trades"),
        [
            f"data.extra={tmp_path / 'more.npz'}",
            "data.extra_fraction=0.5",
            "data.cutmix=0.5",
            "data.augment=autoaugment",
            "pretrain.label_smoothing=0.1",
            "pretrain.optimizer=muon",
            "pretrain.learning_rate=0.01",
            "pretrain.warm_up=0.2",
            "pretrain.schedule=one-cycle",
            "pretrain.max_gradient=1",
            "pretrain.decay_vectors=false",
            "pretrain.num_epochs=2",
            "average=swa",
            "weights=ema",
        ],
    )
    train(config, tmp_path / "whole", quiet=True)
    train_interrupted(config, tmp_path / "parts", 3, 6)
    assert_same_run(tmp_path / "parts", tmp_path / "whole")
