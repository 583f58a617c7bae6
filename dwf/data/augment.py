"""Vary batches of images on their device: AutoAugment, IDBH-like, TrivialAugment, and CutMix.

All work on floats [B, C, H, W] in [0, 1] and draw from noise that the caller gives, so an image's
variation is a function of a seed and its place in the data set, on every device and after a resume.

    autoaugment   one of 25 pairs of operations, each with its probability and strength
    trivial       one of 14 operations, at a strength drawn uniformly
    idbh          a shift of a random side and length over zeros; one operation on color or shape;
                  then with probability 1/2 a rectangle of 2 to 33 % of the image, erased to noise

| point                    | the papers or their code               | here                         |
|--------------------------|----------------------------------------|------------------------------|
| pixels between places    | nearest neighbor                       | as there                     |
| places outside           | gray in AutoAugment's code, black in   | black                        |
|                          | torchvision's                          |                              |
| idbh: color and shape    | strengths found by a search            | TrivialAugment's, at half of |
|                          |                                        | their largest strength       |
| operations on bytes      | posterize, solarize and equalize on    | on floats; equalize by 256   |
|                          | uint8                                  | bins                         |
| gray images              | saturation does nothing                | as there                     |

Sources: AutoAugment, Cubuk et al., arXiv:1805.09501, its policy for CIFAR-10; TrivialAugment,
Mueller and Hutter, arXiv:2103.10158; IDBH, Li and Spratling, arXiv:2301.09879; CutMix, Yun et al.,
arXiv:1905.04899; random erasing, Zhong et al., arXiv:1708.04896.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# ``operation(images, strength)``: images [B, C, H, W] and one signed number each, [B].
Operation = Callable[[Tensor, Tensor], Tensor]

NUM_DRAWS = 8  # numbers in [0, 1) that one image's variation takes


def _each(value: Tensor) -> Tensor:
    return value.view(-1, 1, 1, 1)


def _blend(images: Tensor, other: Tensor, strength: Tensor) -> Tensor:
    """``other`` at strength -1, the images at 0, and as far beyond at 1."""
    return (other + (1 + _each(strength)) * (images - other)).clamp(0, 1)


def gray(images: Tensor) -> Tensor:
    """Luma [B, 1, H, W] of color images; of others the images themselves."""
    if images.shape[1] != 3:
        return images
    weights = torch.tensor([0.299, 0.587, 0.114], device=images.device).view(1, 3, 1, 1)
    return (images * weights).sum(dim=1, keepdim=True)


def brightness(images: Tensor, strength: Tensor) -> Tensor:
    """Toward black, or away from it."""
    return _blend(images, torch.zeros_like(images), strength)


def color(images: Tensor, strength: Tensor) -> Tensor:
    """Toward gray, or away from it."""
    return _blend(images, gray(images).expand_as(images), strength)


def contrast(images: Tensor, strength: Tensor) -> Tensor:
    """Toward the image's mean luma, or away from it."""
    mean = gray(images).mean(dim=(1, 2, 3), keepdim=True)
    return _blend(images, mean.expand_as(images), strength)


def sharpness(images: Tensor, strength: Tensor) -> Tensor:
    """Toward a smoothed image, or away from it; the border stays."""
    C = images.shape[1]
    kernel = torch.ones(3, 3, device=images.device)
    kernel[1, 1] = 5
    kernel = (kernel / 13).expand(C, 1, 3, 3)
    smooth = images.clone()
    if min(images.shape[2:]) > 2:
        smooth[:, :, 1:-1, 1:-1] = F.conv2d(images, kernel, groups=C)
    return _blend(images, smooth, strength)


def autocontrast(images: Tensor, strength: Tensor) -> Tensor:
    """Each channel stretched to [0, 1], whatever the strength; channels of one value stay."""
    low, high = images.amin(dim=(2, 3), keepdim=True), images.amax(dim=(2, 3), keepdim=True)
    spread = high - low
    return torch.where(spread > 0, (images - low) / spread.clamp_min(1e-6), images)


def equalize(images: Tensor, strength: Tensor) -> Tensor:
    """Each channel's histogram of 256 bins made flat, whatever the strength."""
    B, C, H, W = images.shape
    levels = (images * 255).round().long().view(B * C, H * W)
    counts = torch.zeros(B * C, 256, device=images.device)
    counts.scatter_add_(1, levels, torch.ones_like(levels, dtype=torch.float32))
    # the count of the highest level is left out, so that the lowest maps to 0 and the highest to 1
    last = counts.gather(1, levels.amax(dim=1, keepdim=True))
    step = torch.div(H * W - last, 255, rounding_mode="floor")
    below = counts.cumsum(dim=1) - counts
    table = torch.div(below + torch.div(step, 2, rounding_mode="floor"), step.clamp_min(1))
    table = table.floor().clamp(0, 255) / 255
    flat = table.gather(1, levels).view_as(images)
    return torch.where((step > 0).view(B, C, 1, 1), flat, images)


def posterize(images: Tensor, strength: Tensor) -> Tensor:
    """Keep 8 - 4 |strength| bits of each pixel."""
    step = 2.0 ** _each((4 * strength.abs()).round())
    return ((images * 255).round() / step).floor() * step / 255


def solarize(images: Tensor, strength: Tensor) -> Tensor:
    """Invert pixels of at least 1 - |strength|."""
    return torch.where(images >= 1 - _each(strength.abs()), 1 - images, images)


def invert(images: Tensor, strength: Tensor) -> Tensor:
    """The negative, whatever the strength."""
    return 1 - images


def identity(images: Tensor, strength: Tensor) -> Tensor:
    """The images as they are."""
    return images


def affine(images: Tensor, matrix: Tensor) -> Tensor:
    """Pixels from the places matrix @ (x, y, 1) [B, 2, 3], counted from the center; else black."""
    H, W = images.shape[2:]
    y, x = torch.meshgrid(
        torch.arange(H, device=images.device) - (H - 1) / 2,
        torch.arange(W, device=images.device) - (W - 1) / 2,
        indexing="ij",
    )
    places = torch.stack([x, y, torch.ones_like(x)]).view(3, H * W)
    found = (matrix @ places).view(-1, 2, H, W)
    sizes = torch.tensor([W, H], device=images.device).view(1, 2, 1, 1)
    grid = (2 * found / sizes).permute(0, 2, 3, 1)
    return F.grid_sample(images, grid, mode="nearest", align_corners=False)


def _matrix(strength: Tensor, **entries: Tensor) -> Tensor:
    """The identity [B, 2, 3], with entries such as a01 in place of its own."""
    matrix = torch.zeros(len(strength), 2, 3, device=strength.device)
    matrix[:, 0, 0] = matrix[:, 1, 1] = 1
    for name, value in entries.items():
        matrix[:, int(name[1]), int(name[2])] = value
    return matrix


def rotate(images: Tensor, strength: Tensor) -> Tensor:
    """By 135 degrees times the strength, counterclockwise where it is positive."""
    angle = strength * (135 * torch.pi / 180)
    cos, sin = angle.cos(), angle.sin()
    return affine(images, _matrix(strength, a00=cos, a01=-sin, a10=sin, a11=cos))


def shear_x(images: Tensor, strength: Tensor) -> Tensor:
    """Rows shifted by 0.99 strength times their distance from the middle row."""
    return affine(images, _matrix(strength, a01=0.99 * strength))


def shear_y(images: Tensor, strength: Tensor) -> Tensor:
    """Columns shifted likewise."""
    return affine(images, _matrix(strength, a10=0.99 * strength))


def translate_x(images: Tensor, strength: Tensor) -> Tensor:
    """To the side, by the width times the strength."""
    return affine(images, _matrix(strength, a02=-(strength * images.shape[3]).round()))


def translate_y(images: Tensor, strength: Tensor) -> Tensor:
    """Down, by the height times the strength."""
    return affine(images, _matrix(strength, a12=-(strength * images.shape[2]).round()))


OPERATIONS: dict[str, Operation] = {
    "identity": identity,
    "shear_x": shear_x,
    "shear_y": shear_y,
    "translate_x": translate_x,
    "translate_y": translate_y,
    "rotate": rotate,
    "brightness": brightness,
    "color": color,
    "contrast": contrast,
    "sharpness": sharpness,
    "posterize": posterize,
    "solarize": solarize,
    "autocontrast": autocontrast,
    "equalize": equalize,
    "invert": invert,
}
TRIVIAL = [name for name in OPERATIONS if name != "invert"]
# AutoAugment's pairs for CIFAR-10: operation, probability, and strength from 0 to 9
POLICY = [
    (("invert", 0.1, 7), ("contrast", 0.2, 6)),
    (("rotate", 0.7, 2), ("translate_x", 0.3, 9)),
    (("sharpness", 0.8, 1), ("sharpness", 0.9, 3)),
    (("shear_y", 0.5, 8), ("translate_y", 0.7, 9)),
    (("autocontrast", 0.5, 8), ("equalize", 0.9, 2)),
    (("shear_y", 0.2, 7), ("posterize", 0.3, 7)),
    (("color", 0.4, 3), ("brightness", 0.6, 7)),
    (("sharpness", 0.3, 9), ("brightness", 0.7, 9)),
    (("equalize", 0.6, 5), ("equalize", 0.5, 1)),
    (("contrast", 0.6, 7), ("sharpness", 0.6, 5)),
    (("color", 0.7, 7), ("translate_x", 0.5, 8)),
    (("equalize", 0.3, 7), ("autocontrast", 0.4, 8)),
    (("translate_y", 0.4, 3), ("sharpness", 0.2, 6)),
    (("brightness", 0.9, 6), ("color", 0.2, 8)),
    (("solarize", 0.5, 2), ("invert", 0.0, 3)),
    (("equalize", 0.2, 0), ("autocontrast", 0.6, 0)),
    (("equalize", 0.2, 8), ("equalize", 0.6, 4)),
    (("color", 0.9, 9), ("equalize", 0.6, 6)),
    (("autocontrast", 0.8, 4), ("solarize", 0.2, 8)),
    (("brightness", 0.1, 3), ("color", 0.7, 0)),
    (("solarize", 0.4, 5), ("autocontrast", 0.9, 3)),
    (("translate_y", 0.9, 9), ("translate_y", 0.7, 9)),
    (("autocontrast", 0.9, 2), ("solarize", 0.8, 3)),
    (("equalize", 0.8, 8), ("invert", 0.1, 3)),
    (("translate_y", 0.7, 9), ("autocontrast", 0.9, 1)),
]
# the strength that AutoAugment's 9 is, where OPERATIONS go further
LARGEST = {
    "shear_x": 0.3 / 0.99,
    "shear_y": 0.3 / 0.99,
    "translate_x": 150 / 331,
    "translate_y": 150 / 331,
    "rotate": 30 / 135,
    "brightness": 0.9,
    "color": 0.9,
    "contrast": 0.9,
    "sharpness": 0.9,
}


def autoaugment(images: Tensor, noise: Tensor) -> Tensor:
    """One of AutoAugment's pairs for each image; noise [B, NUM_DRAWS] in [0, 1)."""
    pair = _choice(noise[:, 0], len(POLICY))
    for place in (0, 1):
        names = [pair_[place][0] for pair_ in POLICY]
        chance = torch.tensor([pair_[place][1] for pair_ in POLICY], device=images.device)
        sizes = [s / 9 * LARGEST.get(name, 1.0) for (name, _, s) in (p[place] for p in POLICY)]
        sign = torch.where(noise[:, 3 + place] < 0.5, -1.0, 1.0)
        strength = torch.tensor(sizes, device=images.device)[pair] * sign
        skipped = noise[:, 1 + place] >= chance[pair]
        index = torch.tensor([_place(name) for name in names], device=images.device)[pair]
        index = torch.where(skipped, _place("identity"), index)
        images = _applied(images, index, strength)
    return images


def trivial(images: Tensor, noise: Tensor, largest: float = 1.0) -> Tensor:
    """One operation for each image, at a strength up to ``largest``; noise as above."""
    choice = _choice(noise[:, 0], len(TRIVIAL))
    index = torch.tensor([_place(name) for name in TRIVIAL], device=images.device)[choice]
    return _applied(images, index, largest * (2 * noise[:, 1] - 1))


def idbh(images: Tensor, noise: Tensor) -> Tensor:
    """Shift, one operation of color or shape, and erasing; noise as above."""
    shift = 0.3 * (2 * noise[:, 2:4] - 1)
    images = translate_y(translate_x(images, shift[:, 0]), shift[:, 1])
    images = trivial(images, noise, largest=0.5)
    erased = rectangle(images, 0.02 + 0.31 * noise[:, 4], noise[:, 5], noise[:, 6])
    erased &= _each(noise[:, 7] < 0.5)
    # the noise of a pixel is a function of the image's own draws
    H, W = images.shape[2:]
    place = torch.arange(H * W, device=images.device).view(1, 1, H, W)
    pixels = (_each(noise[:, 4]) * 9973 + place * 0.618034).frac()
    return torch.where(erased, pixels.expand_as(images), images)


VARIATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "autoaugment": autoaugment,
    "idbh": idbh,
    "trivial": trivial,
}


def rectangle(images: Tensor, share: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """Masks [B, 1, H, W] of rectangles of the image's shape, cut off at its border.

    Args:
        share: [B], of the area before it is cut off.
        row, column: [B] in [0, 1), of the center.
    """
    masks = []
    for size, center in zip(images.shape[2:], (row, column), strict=True):
        half = size * share.sqrt() / 2
        middle = center * size
        low, high = (middle - half).round(), (middle + half).round()
        at = torch.arange(size, device=images.device)
        masks.append((at >= low[:, None]) & (at < high[:, None]))
    return (masks[0][:, :, None] & masks[1][:, None, :]).unsqueeze(1)


def cutmix(images: Tensor, partners: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """A rectangle of another image in each image.

    Args:
        images, partners: [B, C, H, W]; row b is mixed with row b.
        noise: [B, 3] in [0, 1): the rectangle's share of the area, and its center.
    Returns:
        The mixed images, and the share of its own pixels that each kept, [B].
    """
    inside = rectangle(images, noise[:, 0], noise[:, 1], noise[:, 2])
    kept = 1 - inside.float().mean(dim=(1, 2, 3))
    return torch.where(inside, partners, images), kept


def _choice(noise: Tensor, count: int) -> Tensor:
    return (noise * count).long().clamp(max=count - 1)


def _place(name: str) -> int:
    return list(OPERATIONS).index(name)


def _applied(images: Tensor, index: Tensor, strength: Tensor) -> Tensor:
    """Each image after its operation, of which ``index`` [B] is the place in OPERATIONS."""
    result = images.clone()
    for i, operation in enumerate(OPERATIONS.values()):
        rows = torch.nonzero(index == i)[:, 0]
        if len(rows):
            result[rows] = operation(images[rows], strength[rows])
    return result
