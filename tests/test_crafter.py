"""Draws of attack strength: from the set, uniform, the same wherever and whenever."""

import pytest
import torch

import moe_kernels
from dwf.config import PAPER_FGSM_EPSILON, PAPER_PGD_STEPS, AttackConfig, derive_seed
from dwf.defenses import Batch, Crafter

NUM_DRAWS = 450
# 99.99 % of honest draws lie below: chi-square with 8 and with 4 degrees of freedom
CHI_SQUARE = {9: 31.8, 5: 23.5}

NAMES = [("fgsm_epsilon", PAPER_FGSM_EPSILON), ("num_steps", PAPER_PGD_STEPS)]


def crafter(seed=0, **attack):
    return Crafter(AttackConfig(**attack), seed, (0.5,), (0.5,))


def chi_square(counts, expected):
    return sum((count - expected) ** 2 / expected for count in counts)


@pytest.mark.parametrize(("name", "values"), NAMES, ids=["fgsm_epsilon", "num_steps"])
class TestDraw:
    def test_one_for_the_batch_from_the_set_and_uniform(self, name, values):
        index = torch.arange(4)
        drawn = [crafter(seed).draw(name, values, index) for seed in range(NUM_DRAWS)]
        assert set(drawn) == set(values)
        counts = [drawn.count(value) for value in values]
        assert chi_square(counts, NUM_DRAWS / len(values)) < CHI_SQUARE[len(values)]

    def test_one_for_each_image_from_the_set_and_uniform(self, name, values):
        drawn = crafter(draw="image").draw(name, values, torch.arange(NUM_DRAWS))
        assert drawn.shape == (NUM_DRAWS,)
        known = torch.tensor(values)
        assert drawn.dtype == known.dtype
        counts = [int((drawn == value).sum()) for value in known]
        assert sum(counts) == NUM_DRAWS
        assert chi_square(counts, NUM_DRAWS / len(values)) < CHI_SQUARE[len(values)]

    def test_does_not_depend_on_the_rows_at_hand(self, name, values):
        """Every process has other rows of the batch, and draws what all of them draw."""
        for seed in range(20):
            shared = {crafter(seed).draw(name, values, i) for i in torch.arange(12).split(3)}
            assert len(shared) == 1
        whole = crafter(draw="image").draw(name, values, torch.arange(100))
        order = torch.randperm(100, generator=torch.Generator().manual_seed(0))
        parts = [crafter(draw="image").draw(name, values, i) for i in order.split(7)]
        assert torch.equal(torch.cat(parts), whole[order])

    def test_does_not_touch_torchs_generator(self, name, values):
        before = torch.get_rng_state()
        for draw in ("batch", "image"):
            crafter(draw=draw).draw(name, values, torch.arange(3))
        assert torch.equal(torch.get_rng_state(), before)

    def test_largest_noise_is_not_beyond_the_set(self, name, values, monkeypatch):
        below_one = torch.tensor(1.0).nextafter(torch.tensor(0.0))
        monkeypatch.setattr(
            moe_kernels,
            "uniform_noise",
            lambda seed, index, *a, **o: below_one.repeat(len(index), 1),
        )
        assert crafter().draw(name, values, torch.arange(3)) == values[-1]


def test_strengths_of_one_step_are_independent():
    """Epsilon and number of steps have draws of their own: all 45 pairs come up alike."""
    pairs = []
    for seed in range(NUM_DRAWS):
        pairs.append(tuple(crafter(seed).draw(name, v, torch.arange(2)) for name, v in NAMES))
    counts = [pairs.count(pair) for pair in set(pairs)]
    assert len(counts) == 45
    assert chi_square(counts, NUM_DRAWS / 45) < 88.4  # 44 degrees of freedom, 99.99 %


def test_steps_have_seeds_of_their_own():
    seeds = {
        derive_seed(0, phase, step) for phase in ("expert-1-fgsm", "joint") for step in range(50)
    }
    assert len(seeds) == 100


class Quadratic(torch.nn.Module):
    """Logits whose gradients differ in size and sign from pixel to pixel."""

    def forward(self, images):
        flat = images.flatten(1)
        return torch.stack([(flat - 0.3).square().sum(1), (flat - 0.6).pow(3).sum(1)], dim=1)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(6, 1, 4, 4, generator=generator)
    labels = torch.randint(0, 2, (6,), generator=generator)
    return Batch(images, labels, torch.arange(100, 106))


class TestStrengthsReachTheImages:
    def test_one_epsilon(self, batch):
        for seed in range(5):
            made = crafter(seed)
            epsilon = made.draw("fgsm_epsilon", PAPER_FGSM_EPSILON, batch.sample_index)
            moved = (made.fgsm(Quadratic(), batch) - batch.images).abs().amax(dim=(1, 2, 3))
            torch.testing.assert_close(moved, torch.full((6,), epsilon))

    def test_an_epsilon_for_each_image(self, batch):
        made = crafter(draw="image")
        epsilon = made.draw("fgsm_epsilon", PAPER_FGSM_EPSILON, batch.sample_index)
        assert len(epsilon.unique()) > 1
        moved = (made.fgsm(Quadratic(), batch) - batch.images).abs().amax(dim=(1, 2, 3))
        torch.testing.assert_close(moved, epsilon)

    @pytest.mark.parametrize("draw", ["batch", "image"])
    def test_number_of_steps(self, draw, batch):
        """Steps too short to reach the ball are counted by how far an image went."""
        made = crafter(draw=draw, num_steps=(1, 3, 5), epsilon=0.5, step_size=0.001)
        steps = made.draw("num_steps", (1, 3, 5), batch.sample_index)
        moved = (made.pgd(Quadratic(), batch) - batch.images).abs().amax(dim=(1, 2, 3))
        expected = torch.as_tensor(steps).expand(6) * 0.001
        torch.testing.assert_close(moved, expected, rtol=1e-3, atol=0)

    def test_random_start_follows_the_sample_not_the_row(self, batch):
        made = crafter(random_start=True, fgsm_random_start=True, num_steps=(1,))
        flipped = batch.rows(lambda part: part.flip(0))
        for attack in (made.fgsm, made.pgd):
            assert torch.equal(attack(Quadratic(), batch), attack(Quadratic(), flipped).flip(0))

    def test_a_known_gradient_is_not_used_from_a_random_start(self, batch):
        made = crafter(random_start=True, fgsm_random_start=True)
        wrong = torch.full_like(batch.images, torch.nan)
        for attack in (made.fgsm, made.pgd):
            assert torch.equal(attack(Quadratic(), batch, wrong), attack(Quadratic(), batch))
