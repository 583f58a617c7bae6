"""Train a mixture of three experts in a training loop of your own, on clean and attacked images.

`dwf train` does far more (phases, schedules, exact resume); this shows that nothing forces you to.
"""

import torch
import torch.nn.functional as F

import dwf

train, test = dwf.data.load("digits"), dwf.data.load("digits", split="test")
experts = [
    dwf.as_pixel_model(
        dwf.models.build_network("resnet6", num_classes=10, width=4, in_channels=1, seed=seed),
        train.mean,
        train.std,
    )
    for seed in range(3)
]
mixture = dwf.Mixture(experts, gate=dwf.MlpGate((1, 8, 8), num_experts=3))
optimizer = torch.optim.SGD(mixture.parameters(), lr=0.3, momentum=0.9, weight_decay=5e-4)
images, labels = train.images.float() / 255, train.labels

torch.manual_seed(0)
for epoch in range(4):
    total = 0.0
    for rows in torch.randperm(len(images)).split(128):
        x, y = images[rows], labels[rows]
        # the mixture is planned with the weights of this moment; its mode and gradients are kept
        adversarial = dwf.pgd(
            mixture, x, y, epsilon=0.15, step_size=0.05, num_steps=5, random_start=True, seed=epoch
        )
        mixture.train()
        loss = F.cross_entropy(mixture(torch.cat([x, adversarial])), torch.cat([y, y]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item() * len(rows)
    print(f"epoch {epoch}: loss {total / len(images):.3f}")

print(dwf.evaluate(mixture.eval(), test.subset(torch.arange(50)), suite="quick", epsilon=0.15))
