"""Read the traced graph of a module into the layers of a plan.

Understood are convolutions (dense, grouped, depthwise; not dilated), BatchNorm, activations, sums,
products and concatenations of maps, max and mean pooling, dropout (eval mode: nothing), flattening
and linear layers, with a per-channel normalization of the image in front: ResNets before and after
activation, wide ones, VGGs, DenseNets, ResNeXts, MobileNets and EfficientNets as kuangliu,
torchvision and timm write them. Everything else is declined with a reason that names the module;
verify.py compares what was understood with the module itself.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx, nn

from moe_kernels.plan.draft import Draft
from moe_kernels.plan.functions import function_meaning
from moe_kernels.plan.graph import CannotPlan
from moe_kernels.plan.layers import Traced
from moe_kernels.plan.vocabulary import module_meaning


def trace(
    network: nn.Module, graph: fx.Graph, image_shape: tuple[int, int, int], *, maps: bool = False
) -> Traced:
    """The layers of a network for images [C, H, W]; ``maps``: it may read or return feature maps.

    Raises:
        CannotPlan: naming the first module that a plan cannot hold.
    """
    draft = Draft(network, image_shape, maps=maps)
    for node in graph.nodes:
        _read(draft, node)
    return draft.finish()


def image_affine(
    network: nn.Module, graph: fx.Graph, image_shape: tuple[int, int, int]
) -> tuple[Tensor, Tensor]:
    """The scale and shift [C] of `trace` as they are now, without reading the layers again."""
    draft = Draft(network, image_shape)
    for node in graph.nodes:
        _read(draft, node)
        if draft.layers:
            break
    return draft.scale_and_shift()


def affine_versions(network: nn.Module, graph: fx.Graph) -> list[tuple[int, int]]:
    """Of every tensor that `image_affine` reads, the address and how often it was changed.

    Equal lists mean equal affines, which is known without waiting for a GPU.
    """
    found: list[Tensor] = []
    for node in graph.nodes:
        if node.op == "call_module":
            module = network.get_submodule(str(node.target))
            if not hasattr(module, "channel_affine"):
                break  # the first layer
            found += [*module.parameters(), *module.buffers()]
        elif node.op == "get_attr":
            found.append(_attribute(network, node))
    return [(x.data_ptr(), x._version) for x in found if isinstance(x, Tensor)]


def _read(draft: Draft, node: fx.Node) -> None:
    if node.op == "placeholder":
        _read_argument(draft, node)
    elif node.op == "output":
        if not isinstance(node.args[0], fx.Node):
            raise CannotPlan("it returns something other than one tensor")
        draft.end(node.args[0])
    elif node.op == "get_attr":
        draft.meaning[node] = _attribute(draft.network, node)
    elif node.op == "call_module":
        draft.meaning[node] = module_meaning(draft, node)
    else:
        draft.meaning[node] = function_meaning(draft, node)


def _read_argument(draft: Draft, node: fx.Node) -> None:
    if draft.image is None:
        draft.start(node)
    elif node.users:
        raise CannotPlan(f"its forward takes a second input, {node.target}")


def _attribute(network: nn.Module, node: fx.Node) -> Any:
    if "constant" in node.meta:
        return node.meta["constant"]
    path, _, last = str(node.target).rpartition(".")
    return getattr(network.get_submodule(path), last)
