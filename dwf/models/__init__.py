"""Models: networks for small images, gates, and the mixture."""

from dwf.models.averaged import AveragedExperts
from dwf.models.experts import ExpertModel
from dwf.models.gates import MlpGate
from dwf.models.group import Group
from dwf.models.mixed import MixedModel, Stretch, share_gate
from dwf.models.mixture import Mixture, MixtureOutput
from dwf.models.networks import NETWORKS, RESNETS, ResNet, SmallNetwork, build_network
from dwf.models.pathways import PathwayMixture, PathwayResNet, build_router
from dwf.models.planned import Accelerated, Planned, accelerate, planned
from dwf.models.pre_activation import PreActResNet, WideResNet
from dwf.models.public_weights import load_public
from dwf.models.random_gate import LinearGate, RandomSwitch, SwitchedMixture
from dwf.models.routed import DualMixture, ForcedExperts, RoutedMixture
from dwf.models.soe import SoeOutput, SynergyOfExperts
from dwf.models.sparse_network import SparseModel, SparseOutput
from dwf.models.views import View, attack_views
from dwf.models.wrap import Normalize, PixelModel, as_pixel_model

__all__ = [
    "NETWORKS",
    "RESNETS",
    "Accelerated",
    "AveragedExperts",
    "DualMixture",
    "ExpertModel",
    "ForcedExperts",
    "Group",
    "LinearGate",
    "MixedModel",
    "Mixture",
    "MixtureOutput",
    "MlpGate",
    "Normalize",
    "PathwayMixture",
    "PathwayResNet",
    "PixelModel",
    "Planned",
    "PreActResNet",
    "RandomSwitch",
    "ResNet",
    "RoutedMixture",
    "SmallNetwork",
    "SoeOutput",
    "SparseModel",
    "SparseOutput",
    "Stretch",
    "SwitchedMixture",
    "SynergyOfExperts",
    "View",
    "WideResNet",
    "accelerate",
    "as_pixel_model",
    "attack_views",
    "build_network",
    "build_router",
    "load_public",
    "planned",
    "share_gate",
]
