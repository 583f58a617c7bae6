"""Write an attack: greedy search over the corners of the ball, like the functions of dwf.attacks.

`Setup.opened` checks the arguments, copies the batch, puts the model into eval mode with frozen
weights, and restores everything afterwards. `source` gives gradients (by a plan where there is
one), logits, and float32 verdicts.
"""

import torch
from torch import Tensor, nn

import dwf
from dwf.attacks.setup import Setup


def greedy_corners(
    model: nn.Module, images: Tensor, labels: Tensor, *, epsilon: float, num_steps: int = 5
) -> Tensor:
    """Move the pixels with the steepest gradients to the corners of the ball, more at each step.

    Returns adversarial images [B, C, H, W] float32, within epsilon of ``images`` and in [0, 1].
    """
    setup = Setup(model=model, images=images, labels=labels, epsilon=epsilon)
    with setup.opened() as (batch, source):
        adversarial = batch.images.clone()
        radius = batch.epsilon.view(-1, 1, 1, 1)
        for step in range(1, num_steps + 1):
            gradient = source(adversarial, batch.labels)
            flat = gradient.abs().flatten(1)
            cut = flat.quantile(1 - step / num_steps, dim=1).view(-1, 1, 1, 1)
            corner = batch.images + radius * gradient.sign()
            moved = torch.where(gradient.abs() >= cut, corner, adversarial)
            adversarial = moved.clamp(batch.low, batch.high)
        return adversarial


if __name__ == "__main__":
    test = dwf.data.load("digits", split="test")
    images, labels = test.images[:50].float() / 255, test.labels[:50]
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    ours = greedy_corners(network, images, labels, epsilon=0.1)
    fgsm = dwf.fgsm(network, images, labels, epsilon=0.1)
    assert (ours - images).abs().max() <= 0.1 + 1e-6
    with torch.no_grad():
        for name, adversarial in (("clean", images), ("FGSM", fgsm), ("greedy corners", ours)):
            loss = torch.nn.functional.cross_entropy(network(adversarial), labels)
            print(f"{name}: loss {loss:.3f}")
