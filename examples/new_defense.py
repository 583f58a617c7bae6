"""Write a defense: training on images that went half of the way to their FGSM image.

It gets the command line, exact resume, distributed training and the report for nothing. In the
package it is one file in dwf/defenses and one in dwf/presets.
"""

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

import dwf
from dwf.config import Config, Options, apply_overrides
from dwf.defenses import DEFENSES, Defense, Phase
from dwf.defenses.adversarial_training import build
from dwf.defenses.steps import cross_entropy_step


@dataclass(frozen=True)
class HalfwayOptions(Options, defense="halfway"):
    """Settings of the defense; users write options.share=0.3."""

    share: float = 0.5


def phases(model: nn.Module, config: Config) -> list[Phase]:
    """One phase: the loss of a batch is the cross-entropy half of the way to its FGSM images."""

    def step(model, forward, batch, crafter):  # type: ignore[no-untyped-def]
        attacked = crafter.fgsm(model, batch)
        images = batch.images + config.options.share * (attacked - batch.images)
        return cross_entropy_step(forward, images, batch.labels, num_clean=0)

    return [Phase("train", model, config.pretrain, step)]


DEFENSES["halfway"] = Defense("Halfway", build, phases)

if __name__ == "__main__":
    preset = replace(
        dwf.presets.find("fgsm_at_digits"), preset="halfway_digits", defense="halfway", options=None
    )
    config = apply_overrides(preset, ["options.share=0.5", "pretrain.num_epochs=2"])
    with tempfile.TemporaryDirectory() as folder:
        model = dwf.train(config, Path(folder) / "run", quiet=True)
        test = dwf.data.load("digits", split="test").subset(torch.arange(100))
        print(dwf.evaluate(model, test, suite="quick", epsilon=0.15))
