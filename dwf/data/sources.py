"""Load a data set by its name: a published one, an .npz archive, or a folder of images."""

from __future__ import annotations

import os
from difflib import get_close_matches
from pathlib import Path

from dwf.checks import DataError, check_choice
from dwf.data.dataset import SPLITS, ImageDataset
from dwf.data.folder import folder_splits, load_folder
from dwf.data.named import NAMED_SETS, load_named
from dwf.data.npz import load_npz, npz_splits


def load(
    name: str | os.PathLike[str], root: str | os.PathLike[str] | None = None, split: str = "train"
) -> ImageDataset:
    """Load one split of a data set.

    Args:
        name: "digits", "cifar10", "cifar100", "svhn", the path of an ``.npz`` archive, or the path
            of a folder with ``train/<class>/`` and ``test/<class>/`` image folders.

            An archive holds ``x_train, y_train, x_test, y_test`` or ``images, labels`` (training
            only): uint8 [N, C, H, W], [N, H, W, C] or [N, H, W], and integer labels [N]. Images
            marked False in ``exact_train`` or ``exact_test`` (bool [N]) are left out, and a note
            says how many. Images from folders become RGB and must all have one size.
        root: where the files of a named set lie; default DWF_DATA_ROOT, then ~/.cache/dwf.
        split: "train" or "test". A validation set is cut from "train" by ``split_validation``.

    Raises:
        DataError: naming the file, what was found, what is expected and the command that repairs
            it. No pickle is read from a file whose hash is not the published one.
    """
    check_choice(split, SPLITS, "split")
    text = os.fspath(name)
    if text in NAMED_SETS:
        return load_named(text, root, split)
    path = Path(text).expanduser()
    if path.is_dir():
        return load_folder(path, split)
    if path.suffix == ".npz":
        return load_npz(path, split)
    near = get_close_matches(text, NAMED_SETS, n=1)
    raise DataError(
        f"{text}: unknown data set; expected one of {', '.join(NAMED_SETS)}, an existing folder "
        "with train/ and test/, or an .npz file" + (f"; did you mean {near[0]}?" if near else "")
    )


def available_splits(name: str | os.PathLike[str]) -> tuple[str, ...]:
    """Splits that ``load`` can give: both, or "train" alone if the user's data has no test images.

    Args:
        name: as in ``load``.
    """
    text = os.fspath(name)
    path = Path(text).expanduser()
    if text in NAMED_SETS:
        return SPLITS
    if path.is_dir():
        return folder_splits(path)
    return npz_splits(path)
