"""Judge two models that were trained elsewhere, and read the verdict.

The second one hides its gradient behind rounded logits: its number looks better and is worthless.
"""

import torch
import torch.nn.functional as F
from torch import nn

import dwf


class Rounded(nn.Module):
    """A network whose logits are rounded, so that autograd finds zero gradients."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.network(images).round()


train, test = dwf.data.load("digits"), dwf.data.load("digits", split="test")
torch.manual_seed(0)
network = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
for _ in range(100):
    loss = F.cross_entropy(network(train.images.float() / 255), train.labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

few = test.subset(torch.arange(50))
for name, model in (("as it is", network), ("with rounded logits", Rounded(network))):
    result = dwf.evaluate(model, few, suite="quick", epsilon=0.1)
    print(f"\n{name}: {result.robust_accuracy:.0%} robust, {result.verdict}")
    for finding in result.findings:
        print(f"  {finding}")
