"""Attack a network of your own: three attacks, one line each, and what they cost.

The network is any module or callable from images in [0, 1] to logits. Normalization belongs inside.
"""

import torch
import torch.nn.functional as F

import dwf

train, test = dwf.data.load("digits"), dwf.data.load("digits", split="test")
network = dwf.models.build_network("resnet6", num_classes=10, width=8, in_channels=1, seed=0)
optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
for _ in range(40):  # plain training, without any defense
    loss = F.cross_entropy(network(train.images.float() / 255), train.labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
network.eval()

model = dwf.accelerate(
    network
)  # the same logits, attacked by a plan; leave it out and it is slower
images, labels = test.images[:100].float() / 255, test.labels[:100]
attacks = {
    "FGSM": dwf.FGSM(model, epsilon=0.15),
    "PGD-20": dwf.PGD(model, epsilon=0.15, step_size=0.03, num_steps=20),
    "APGD on DLR": dwf.APGD(model, epsilon=0.15, loss="dlr", num_steps=20),
}
with torch.no_grad():
    print(f"clean: {(model(images).argmax(1) == labels).float().mean():.0%} right")
    for name, attack in attacks.items():
        adversarial = attack(images, labels)
        assert (adversarial - images).abs().max() <= 0.15 + 1e-6
        right = (model(adversarial).argmax(1) == labels).float().mean()
        print(f"{name}: {right:.0%} right; {attack.report()}")
