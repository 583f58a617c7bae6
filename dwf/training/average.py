"""Average the weights of the last phase: EMA over steps, or SWA over the ends of epochs.

    EMA     a <- d a + (1 - d) w,   d = min(decay, (1 + t) / (10 + t)) at update t = 1, 2, ...
    SWA     a <- a + (w - a) / t

The growing d keeps short runs from being held back by their first weights. Statistics of BatchNorm
are averaged as the weights are. Until averaging begins, a is w.

| point                  | the papers or their code                  | here                        |
|------------------------|-------------------------------------------|-----------------------------|
| BatchNorm's statistics | SWA: one more pass over the training data | averaged with the weights:  |
|                        |                                           | the pass would need attacks |
| SWA's learning rate    | constant or cyclic                        | that of the schedule        |

Sources: SWA, Izmailov et al., arXiv:1803.05407; for adversarial training, Chen et al., "Robust
overfitting may be mitigated by properly learned smoothening" (ICLR 2021), and Gowal et al.,
arXiv:2010.03593, who use EMA.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import Tensor, nn

from dwf.checkpoint import Tensors, load_weights
from dwf.config import Config


class WeightAverage:
    """The average of a model's weights, as a configuration asks for it.

    Attributes:
        model: a copy with the averaged weights, in eval mode.
        num_updates: t of the formulas, over all steps or epochs that were averaged.
    """

    def __init__(self, model: nn.Module, config: Config) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self._config = config
        self.num_updates = 0

    def update(self, model: nn.Module, step: int, num_steps: int, steps_per_epoch: int) -> None:
        """Take over the weights after ``step`` of the ``num_steps`` steps of the phase."""
        config = self._config
        if step <= config.average_from * num_steps:
            self._move(model, 1.0)
        elif config.average == "ema":
            self.num_updates += 1
            t = self.num_updates
            self._move(model, 1 - min(config.ema_decay, (1 + t) / (10 + t)))
        elif step % steps_per_epoch == 0:
            self.num_updates += 1
            self._move(model, 1 / self.num_updates)

    @torch.no_grad()
    def _move(self, model: nn.Module, weight: float) -> None:
        """a <- a + weight (w - a); whole numbers, as BatchNorm's counters, are taken over."""
        averages = [*self.model.parameters(), *self.model.buffers()]
        values = [*model.parameters(), *model.buffers()]
        pairs: list[tuple[Tensor, Tensor]] = list(zip(averages, values, strict=True))
        floats = [pair for pair in pairs if pair[0].is_floating_point()]
        torch._foreach_lerp_([mine for mine, _ in floats], [theirs for _, theirs in floats], weight)
        for mine, theirs in pairs:
            if not mine.is_floating_point():
                mine.copy_(theirs)

    def state(self) -> dict[str, Tensor]:
        """The averaged model's tensors by name."""
        return dict(self.model.state_dict())

    def load(self, weights: Tensors, num_updates: int, source: Path) -> None:
        """Take over a state of so many updates; ``source`` is the file that an error names."""
        load_weights(self.model, weights, source)
        self.num_updates = num_updates
