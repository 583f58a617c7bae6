"""Models: networks for small images, gates, and the mixture."""

from dwf.models.experts import ExpertModel
from dwf.models.gates import MlpGate
from dwf.models.group import Group
from dwf.models.mixture import Mixture, MixtureOutput
from dwf.models.networks import NETWORKS, ResNet, build_network
from dwf.models.planned import Accelerated, Planned, accelerate
from dwf.models.wrap import Normalize, PixelModel, as_pixel_model

__all__ = [
    "NETWORKS",
    "Accelerated",
    "ExpertModel",
    "Group",
    "Mixture",
    "MixtureOutput",
    "MlpGate",
    "Normalize",
    "PixelModel",
    "Planned",
    "ResNet",
    "accelerate",
    "as_pixel_model",
    "build_network",
]
