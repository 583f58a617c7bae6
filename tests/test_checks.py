"""Checks: what is accepted, what is refused, and that the message says all a caller needs."""

import pytest
import torch
from small_models import SmallNet, make_images
from torch import nn

from dwf import checks
from dwf.checks import (
    CheckpointError,
    ConfigError,
    DataError,
    DwfError,
    ImageError,
    ImageTypeError,
    LabelError,
    ModelOutputError,
    PixelRangeError,
)


@pytest.mark.parametrize(
    ("error", "base"),
    [
        (ConfigError, ValueError),
        (ImageTypeError, TypeError),
        (ImageError, ValueError),
        (PixelRangeError, ValueError),
        (LabelError, ValueError),
        (ModelOutputError, ValueError),
        (DataError, OSError),
        (CheckpointError, OSError),
    ],
)
def test_errors_derive_from_dwf_error_and_a_builtin(error, base):
    assert issubclass(error, DwfError)
    assert issubclass(error, base)


class TestImages:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
    def test_floats_in_range_come_back_themselves(self, dtype):
        images = make_images(3).to(dtype)
        images[0, 0, 0, :2] = torch.tensor([0.0, 1.0])
        assert checks.check_images(images) is images

    @pytest.mark.parametrize("layout", ["channels_last", "strided", "empty", "requires_grad"])
    def test_any_layout(self, layout):
        images = {
            "channels_last": make_images(2).to(memory_format=torch.channels_last),
            "strided": make_images(4)[::2, :, ::2, ::2],
            "empty": make_images(0),
            "requires_grad": make_images(2).requires_grad_(),
        }[layout]
        assert checks.check_images(images) is images

    @pytest.mark.parametrize(
        ("value", "shown"),
        [(float("nan"), "nan"), (float("inf"), "inf"), (-0.25, "-0.25"), (1.5, "1.5")],
    )
    def test_bad_pixel_is_named_with_its_index(self, value, shown):
        images = make_images(3)
        images[1, 2, 3, 4] = images[2, 0, 0, 0] = value
        with pytest.raises(PixelRangeError) as error:
            checks.check_images(images)
        message = str(error.value)
        assert message.startswith(f"images: {shown} at [1, 2, 3, 4], expected [0, 1]")
        assert f"2 of {images.numel()} values are outside" in message

    def test_eight_bit_pixels_are_recognized(self):
        images = make_images(3) * 255
        with pytest.raises(PixelRangeError, match=r"max 255\); divide 8-bit pixels by 255"):
            checks.check_images(images)

    @pytest.mark.parametrize("value", [-3e-8, 1 + 1e-6])
    def test_rounding_is_told_how_to_go_away(self, value):
        images = make_images(1).double()
        images[0, 0, 0, 0] = value
        with pytest.raises(PixelRangeError, match=r"no more than rounding: pass images.clamp"):
            checks.check_images(images)
        images[0, 0, 0, 0] = 1.1
        with pytest.raises(PixelRangeError) as error:
            checks.check_images(images)
        assert "clamp" not in str(error.value)

    def test_smallest_excess_is_seen(self):
        for value in (torch.nextafter(torch.tensor(1.0), torch.tensor(2.0)), torch.tensor(-1e-30)):
            images = make_images(1)
            images[0, 0, 0, 0] = value
            with pytest.raises(PixelRangeError):
                checks.check_images(images)

    def test_integers_are_told_how_to_become_floats(self):
        with pytest.raises(ImageTypeError, match=r"found torch.uint8; pass images.float\(\) / 255"):
            checks.check_images(make_images(1).to(torch.uint8))

    def test_other_types_and_ranks(self):
        with pytest.raises(ImageTypeError, match=r"expected a torch.Tensor, found ndarray"):
            checks.check_images(make_images(1).numpy())
        with pytest.raises(ImageError, match=r"expected shape \[B, C, H, W\], found \[3, 8, 8\]"):
            checks.check_images(make_images(1)[0])


class TestLabels:
    @pytest.mark.parametrize(
        "dtype",
        [
            torch.int64,
            torch.int32,
            torch.int16,
            torch.int8,
            torch.uint8,
            torch.uint16,
            torch.uint32,
        ],
    )
    def test_any_integer_becomes_int64(self, dtype):
        labels = torch.tensor([0, 4, 2]).to(dtype)
        found = checks.check_labels(labels, 3, 5)
        assert found.dtype is torch.int64
        assert found.tolist() == [0, 4, 2]

    @pytest.mark.parametrize(("labels", "at"), [([0, 5, 9], "5 at [1]"), ([-1, 0, 0], "-1 at [0]")])
    def test_out_of_range_is_named(self, labels, at):
        with pytest.raises(LabelError) as error:
            checks.check_labels(torch.tensor(labels), 3, 5)
        assert f"labels: {at}, expected 0 to 4" in str(error.value)

    @pytest.mark.parametrize(
        ("labels", "message"),
        [
            (torch.zeros(3), "expected integers, found torch.float32"),
            (torch.zeros(3, dtype=torch.bool), "expected integers, found torch.bool"),
            (
                torch.zeros(2, dtype=torch.int64),
                r"expected shape \[3\], one per image, found \[2\]",
            ),
            (torch.zeros(3, 1, dtype=torch.int64), r"found \[3, 1\]"),
            ([0, 1, 2], "expected a torch.Tensor, found list"),
        ],
    )
    def test_wrong_kind(self, labels, message):
        with pytest.raises(LabelError, match=message):
            checks.check_labels(labels, 3, 5)

    def test_empty(self):
        assert len(checks.check_labels(torch.zeros(0, dtype=torch.int32), 0, 5)) == 0


class TestLogits:
    def test_logits_pass(self):
        for logits in (torch.randn(4, 3), torch.zeros(4, 3), torch.full((4, 3), torch.nan)):
            assert checks.check_logits(logits, 4) is logits

    def test_one_row_that_is_no_distribution_makes_logits(self):
        rows = torch.rand(4, 3).softmax(dim=1)
        rows[2] *= 1.01
        assert checks.check_logits(rows, 4) is rows

    def test_probabilities_need_consent(self):
        rows = torch.randn(4, 3).softmax(dim=1)
        with pytest.raises(ModelOutputError, match=r"probabilities.*allow_probabilities=True"):
            checks.check_logits(rows, 4)
        assert checks.check_logits(rows, 4, allow_probabilities=True) is rows

    @pytest.mark.parametrize(
        ("output", "found"),
        [
            ((torch.randn(4, 3),), "found tuple"),
            (torch.randn(4), r"expected logits \[4, K\], found \[4\]"),
            (torch.randn(3, 3), r"expected logits \[4, K\], found \[3, 3\]"),
            (torch.randn(4, 3, 1, 1), r"found \[4, 3, 1, 1\]"),
            (torch.zeros(4, 3, dtype=torch.int64), "expected float logits, found torch.int64"),
        ],
    )
    def test_what_is_not_logits(self, output, found):
        with pytest.raises(ModelOutputError, match=found):
            checks.check_logits(output, 4)


def test_devices_are_all_named():
    images, labels = make_images(2), torch.zeros(2, dtype=torch.int64)
    checks.check_same_device(images, labels, SmallNet())
    checks.check_same_device(
        images, labels, nn.Identity()
    )  # no parameters: wherever the images are
    checks.check_same_device(images, labels, lambda images: images)
    expected = "images on cpu, labels on meta, model on cpu"
    with pytest.raises(ImageError, match=expected):
        checks.check_same_device(images, labels.to("meta"), SmallNet())
    with pytest.raises(ImageError, match="model on meta; move all three to one device"):
        checks.check_same_device(images, labels, SmallNet().to("meta"))


class TestNumbers:
    @pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf"), torch.tensor([0.1, -1.0])])
    def test_impossible(self, value):
        with pytest.raises(ConfigError, match=r"width: .* is not possible"):
            checks.check_positive(value, "width")

    def test_zero(self):
        checks.check_positive(0.0, "width", zero_allowed=True)
        with pytest.raises(ConfigError, match="more than zero"):
            checks.check_positive(0.0, "width")

    @pytest.mark.parametrize("value", ["8/255", None, [0.1, "x"]])
    def test_what_is_no_number(self, value):
        with pytest.raises(ConfigError, match="is not a number"):
            checks.check_positive(value, "width")

    def test_epsilon_in_255ths(self):
        checks.check_epsilon(1.0)
        checks.check_epsilon(torch.zeros(0))
        with pytest.raises(ConfigError, match=r"did you mean 8/255 = 0.03137\?"):
            checks.check_epsilon(8)
        with pytest.raises(ConfigError, match="16/255"):
            checks.check_epsilon(torch.tensor([0.1, 16.0]))

    @pytest.mark.parametrize("value", [0, -3, 1.0, True, "2", None])
    def test_counts(self, value):
        with pytest.raises(ConfigError, match=r"num_steps: .* expected an integer >= 1"):
            checks.check_count(value, "num_steps")
        checks.check_count(0, "num_steps", minimum=0)

    def test_choices(self):
        checks.check_choice("eval", ["eval", "train"], "bn_mode")
        with pytest.raises(ConfigError, match="did you mean 'train'"):
            checks.check_choice("trian", ["eval", "train"], "bn_mode")


def test_first_index_is_row_major():
    mask = torch.zeros(3, 4, 5, dtype=torch.bool)
    mask[1, 3, 2] = mask[2, 0, 0] = mask[1, 3, 4] = True
    assert checks.first_index(mask) == [1, 3, 2]
