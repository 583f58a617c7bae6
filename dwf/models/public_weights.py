"""Load weights that others published for standard networks, as RobustBench keeps them.

    model = dwf.models.load_public("Rade2021Helper_R18.pt", "resnet18", mean=..., std=...)

The file is a state dict of the network, or a checkpoint that holds one, as torch.save writes it.
Names may begin with "module." or "model.", as wrappers write them; constants of a normalization
("mu", "sigma", "mean", "std") are left out, because the caller gives them, and so is the block that
WideResNets of TRADES hold twice and use once ("sub_block1").
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from dwf.checkpoint import load_weights
from dwf.checks import CheckpointError
from dwf.models.networks import build_network
from dwf.models.wrap import Normalize, PixelModel
from dwf.torch_file import read_state_dict

PREFIXES = ("module.", "model.", "0.", "1.")
CONSTANTS = ("mu", "sigma", "mean", "std", "normalize.mean", "normalize.std")


def load_public(
    path: str | Path,
    network: str | nn.Module,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> nn.Module:
    """A network with published weights, in eval mode: images in [0, 1] to logits.

    Args:
        path: a .pt or .pth file; nothing in it is unpickled.
        network: a name in `dwf.models.NETWORKS`, at its published width of 64; or a module.
        mean, std: of the images that it was trained on, per channel; None if it took [0, 1].
    Raises:
        CheckpointError: no state dict, or one of another network; names the first keys.
        ConfigError: an unknown network.
    """
    path = Path(path)
    weights = without_wrappers(read_state_dict(path))
    if isinstance(network, str):
        network = build_network(
            network, num_classes=_num_classes(path, weights), width=64, in_channels=3, seed=0
        )
    own = network.state_dict()
    unused = [k for k in weights if k in CONSTANTS or k.startswith("sub_block1.")]
    for name in [name for name in unused if name not in own]:
        del weights[name]
    # older versions of torch did not count BatchNorm's batches
    for name, value in own.items():
        if name.endswith("num_batches_tracked"):
            weights.setdefault(name, value)
    load_weights(network, weights, path)
    if mean is None or std is None:
        return network.eval()
    return PixelModel(Normalize(mean, std), network).eval()


def without_wrappers(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by their names inside the network."""
    for _ in range(3):
        names = [name for name in weights if name not in CONSTANTS]
        for prefix in PREFIXES:
            if names and all(name.startswith(prefix) for name in names):
                weights = {name.removeprefix(prefix): value for name, value in weights.items()}
    return weights


def _num_classes(path: Path, weights: dict[str, Tensor]) -> int:
    matrices = [value for value in weights.values() if value.ndim == 2]
    if not matrices:
        raise CheckpointError(f"{path}: no weights of a last layer, [classes, features]")
    return len(matrices[-1])
