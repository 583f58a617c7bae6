"""Views of a mixture that is a part of another model: behind a normalization, in a wrapper.

The view of the part takes the part's place, everything around it stays. Rows of a row-aligned view
belong to what the part is given for the clean images, which a hook looks at.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from dwf.models.experts import ExpertModel
from dwf.models.planned import AroundNetworks
from dwf.models.replaced import with_replaced
from dwf.models.views import View, attack_views


def mixture_inside(model: object) -> str | None:
    """The name of the outermost mixture inside a module that is none itself; None without."""
    if not isinstance(model, nn.Module) or isinstance(model, ExpertModel):
        return None
    inside = (name for name, part in model.named_modules() if isinstance(part, ExpertModel))
    return next(inside, None)


def views_of(model: object) -> list[View]:
    """The views of a mixture, or of the mixture inside a model; none of other models."""
    if isinstance(model, ExpertModel):
        return attack_views(model)
    name = mixture_inside(model)
    if name is None:
        return []
    assert isinstance(model, nn.Module)
    part = model.get_submodule(name)
    assert isinstance(part, ExpertModel)
    return [
        view._replace(name=f"{name}: {view.name}", make=partial(_made, model, name, view))
        for view in attack_views(part)
    ]


def _made(model: nn.Module, name: str, view: View, images: Tensor) -> nn.Module:
    seen: list[Tensor] = []

    def look(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0].detach())

    handle = model.get_submodule(name).register_forward_pre_hook(look)
    try:
        with torch.no_grad():
            model(images)
    finally:
        handle.remove()
    inner = view.make(seen[-1])
    # a view may be an attack target; around it the modules stay those of the model
    inner = inner if isinstance(inner, nn.Module) else _Called(inner)
    whole = with_replaced(model, name, inner)
    return inner.around(whole) if isinstance(inner, AroundNetworks) else whole


class _Called(nn.Module):
    """A function as a module."""

    def __init__(self, function: object) -> None:
        super().__init__()
        self._function = function

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self._function(images)  # type: ignore[operator]
        return logits
