"""Batches: counters decide everything, so any batch can be made anywhere."""

import pytest
import torch

from dwf.checks import ConfigError
from dwf.data import Batch, Batches, ImageDataset, evaluation_batches
from dwf.data.batches import crop_and_flip, to_unit_range

BUGS = {  # mistakes somebody will make; the comparison with the slow loop has to see all of them
    "flip before the crop moves the window": lambda x, n, p: crop_and_flip(x.flip(3), n, p, False),
    "rows and columns exchanged": lambda x, n, p: crop_and_flip(x, n[:, [1, 0, 2]], p, True),
    "crop one place short": lambda x, n, p: crop_and_flip(x, n * 2 * p / (2 * p + 1), p, True),
    "one offset for all images": lambda x, n, p: crop_and_flip(x, n[:1].expand_as(n), p, True),
}


def make_dataset(num_images=50, shape=(3, 8, 6), seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (num_images, *shape), dtype=torch.uint8, generator=generator)
    return ImageDataset(
        name="made up",
        images=images,
        labels=torch.arange(num_images) % 10,
        num_classes=10,
        class_names=tuple("0123456789"),
        mean=(0.5,) * shape[0],
        std=(0.25,) * shape[0],
        digest="",
        split="train",
    )


def slow_crop_and_flip(images, noise, padding):
    """One image, one pixel at a time."""
    B, _, H, W = images.shape
    out = torch.zeros_like(images)
    for b in range(B):
        down, right = (int(u * (2 * padding + 1)) - padding for u in noise[b, :2].tolist())
        mirrored = noise[b, 2] < 0.5
        for h in range(H):
            for w in range(W):
                row, column = h + down, (W - 1 - w if mirrored else w) + right
                if 0 <= row < H and 0 <= column < W:
                    out[b, :, h, w] = images[b, :, row, column]
    return out


def make(dataset, batch_size=8, **options):
    return Batches(dataset, batch_size, **{"seed": 0, "crop_padding": 2, "flip": True, **options})


def assert_same(left, right):
    assert left.targets is right.targets is None
    assert all(torch.equal(a, b) for a, b in zip(left[:3], right[:3], strict=True))


class TestOrder:
    def test_an_epoch_visits_each_image_at_most_once(self):
        dataset = make_dataset()
        batches = make(dataset, crop_padding=0, flip=False)
        seen = []
        for images, labels, sample_index, _ in batches.epoch(0):
            assert images.shape == (8, 3, 8, 6)
            assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
            assert torch.equal(images, dataset.images[sample_index].float() / 255)
            assert torch.equal(labels, dataset.labels[sample_index])
            seen += sample_index.tolist()
        assert len(seen) == len(set(seen)) == 48  # 50 images, the last two dropped
        assert batches.steps_per_epoch == 6

    def test_order_is_a_function_of_seed_and_epoch(self):
        dataset = make_dataset()

        def order(seed, epoch):
            batches = make(dataset, seed=seed)
            return torch.cat([batch.sample_index for batch in batches.epoch(epoch)]).tolist()

        assert order(0, 0) == order(0, 0)
        assert len({tuple(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4

    def test_any_batch_directly(self):
        dataset = make_dataset()
        one_after_another = [list(make(dataset).epoch(epoch)) for epoch in range(3)]
        batches = make(dataset)
        for epoch, step in [(2, 3), (0, 5), (2, 0), (1, 1), (0, 0)]:
            assert_same(batches.batch(epoch, step), one_after_another[epoch][step])
        for step, batch in enumerate(batches.epoch(1, start=4), start=4):
            assert_same(batch, one_after_another[1][step])
        assert list(batches.epoch(1, start=6)) == []

    def test_the_callers_random_state_is_left_alone(self):
        state = torch.get_rng_state()
        make(make_dataset()).batch(0, 0)
        assert torch.equal(torch.get_rng_state(), state)

    @pytest.mark.parametrize("world_size", [2, 4])
    def test_ranks_share_the_batch_of_one(self, world_size):
        dataset = make_dataset()
        alone = make(dataset)
        ranks = [make(dataset, rank=r, world_size=world_size) for r in range(world_size)]
        for step in range(alone.steps_per_epoch):
            joined = Batch.joined([rank.batch(1, step) for rank in ranks])
            assert_same(joined, alone.batch(1, step))

    @pytest.mark.parametrize("num_parts", [2, 4])
    def test_parts_are_those_of_the_whole_batch(self, num_parts):
        """What ranks hold of a part is the part that one process would make."""
        dataset = make_dataset()
        alone = make(dataset, batch_size=16).batch(1, 0).split(num_parts)
        ranks = [
            make(dataset, batch_size=16, rank=r, world_size=2, num_parts=num_parts)
            for r in range(2)
        ]
        shares = [rank.batch(1, 0).split(num_parts) for rank in ranks]
        for expected, *parts in zip(alone, *shares, strict=True):
            assert_same(Batch.joined(parts), expected)

    def test_crops_of_nothing_but_padding(self):
        with pytest.raises(ConfigError, match=r"crop_padding: 1000000000 is more than .* 8 pixels"):
            make(make_dataset(), crop_padding=10**9)


class TestAugmentation:
    @pytest.mark.parametrize("padding", [0, 1, 4])
    def test_equals_the_slow_loop(self, padding):
        images = make_dataset(64).images
        noise = torch.rand(64, 3, generator=torch.Generator().manual_seed(1))
        expected = slow_crop_and_flip(images, noise, padding)
        assert torch.equal(crop_and_flip(images, noise, padding, flip=True), expected)

    @pytest.mark.parametrize("bug", BUGS.values(), ids=BUGS)
    def test_the_slow_loop_sees_bugs(self, bug):
        images = make_dataset(64).images
        noise = torch.rand(64, 3, generator=torch.Generator().manual_seed(1))
        assert not torch.equal(bug(images, noise, 2), slow_crop_and_flip(images, noise, 2))

    def test_by_hand(self):
        image = torch.tensor([[[[1, 2], [3, 4]]]], dtype=torch.uint8)
        down_right = torch.tensor([[0.0, 0.99, 0.9]])  # window one up, one to the right
        assert crop_and_flip(image, down_right, 1, True).tolist() == [[[[0, 0], [2, 0]]]]
        mirrored = torch.tensor([[0.5, 0.5, 0.1]])
        assert crop_and_flip(image, mirrored, 1, True).tolist() == [[[[2, 1], [4, 3]]]]
        assert torch.equal(crop_and_flip(image, mirrored, 1, False), image)

    def test_largest_noise_stays_inside(self):
        image = make_dataset(1).images
        noise = torch.full((1, 3), 1 - 2.0**-24)
        for padding in range(1, 40):
            crop_and_flip(image, noise, padding, True)

    def test_every_offset_is_used_alike(self):
        # one white pixel per image tells where it went
        images = torch.zeros(4000, 1, 5, 5, dtype=torch.uint8)
        images[:, :, 2, 2] = 1
        dataset = make_dataset(4000)
        dataset = ImageDataset(**{**vars(dataset), "images": images})
        moved = make(dataset, 4000, crop_padding=2).batch(0, 0).images
        counts = (moved[:, 0] > 0).sum(dim=0)  # [5, 5], 160 expected in each, deviation 12
        assert int(counts.sum()) == 4000
        assert (counts - 160).abs().max() < 62

    def test_depends_on_epoch_and_image_not_on_the_batch(self):
        dataset = make_dataset(48)

        def by_image(batch_size, epoch):
            whole = Batch.joined(list(make(dataset, batch_size).epoch(epoch)))
            return whole.images[whole.sample_index.argsort()]

        assert torch.equal(by_image(8, 3), by_image(16, 3))
        assert not torch.equal(by_image(8, 3), by_image(8, 4))


class TestPixels:
    def test_all_256_levels(self):
        levels = torch.arange(256, dtype=torch.uint8)
        expected = torch.tensor([v / 255 for v in range(256)], dtype=torch.float32)
        assert torch.equal(to_unit_range(levels), expected)

    @pytest.mark.gpu
    def test_same_bits_on_the_device(self):
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        dataset = make_dataset()
        for step in range(6):
            here = make(dataset).batch(1, step)
            there = make(dataset, device="cuda").batch(1, step)
            assert_same(here, Batch(*(None if x is None else x.cpu() for x in there)))


class TestEvaluation:
    def test_all_images_in_order(self):
        dataset = make_dataset(50)
        parts = list(evaluation_batches(dataset, 16))
        assert [len(labels) for _, labels, _ in parts] == [16, 16, 16, 2]
        images, labels, sample_index = (torch.cat(part) for part in zip(*parts, strict=True))
        assert torch.equal(images, dataset.images.float() / 255)
        assert torch.equal(labels, dataset.labels)
        assert torch.equal(sample_index, torch.arange(50))

    def test_batch_size_of_zero(self):
        with pytest.raises(ConfigError, match="batch_size"):
            next(evaluation_batches(make_dataset(), 0))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": 0}, "batch_size: 0"),
        ({"batch_size": 51}, "batch_size: 51 is larger than the 50 images"),
        ({"batch_size": 10, "world_size": 4}, "batch_size: 10 does not divide over world_size 4"),
        ({"rank": 2, "world_size": 2}, "rank: 2"),
        ({"rank": -1, "world_size": 2}, "rank: -1"),
        ({"crop_padding": -1}, "crop_padding: -1"),
        ({"world_size": 0}, "world_size: 0"),
    ],
)
def test_impossible_settings(options, words):
    with pytest.raises(ConfigError, match=words):
        make(make_dataset(), **options)


@pytest.mark.parametrize("step", [-1, 6])
def test_no_such_step(step):
    with pytest.raises(IndexError, match="steps 0 to 5"):
        make(make_dataset()).batch(0, step)
