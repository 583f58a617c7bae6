"""Searches that give up: whom they leave, what that saves, and that it costs no broken image."""

import pytest
import torch
from small_models import NUM_CLASSES, SHAPE, Curved, Linear, make_images

from dwf.attacks import AttackReport, apgd, fab, square
from dwf.attacks.prospect import is_hopeless
from dwf.attacks.table import ATTACKS, VERSIONS

pytestmark = pytest.mark.usefixtures("one_thread")
EPSILON = 0.015
SEARCHES = {
    "apgd-t": (apgd, {"loss": "dlr-targeted", "num_target_classes": 3, "num_steps": 50}),
    "fab-t": (fab, {"num_target_classes": 3, "num_steps": 50}),
    "square": (square, {"num_queries": 1000}),
}


@pytest.mark.parametrize(
    ("at_first", "now", "leaves"),
    [
        (4.0, 3.0, True),  # gained 1, missing 3
        (4.0, 1.0, False),  # gained 3, missing 1
        (4.0, 1.5, True),  # gained 2.5, missing 1.5: more than half of it
        (4.0, -0.1, False),  # there
        (4.0, 4.0, False),  # no progress to judge by: a masked gradient
        (4.0, 3.99, False),
        (float("inf"), 3.0, False),
        (float("nan"), 3.0, False),
    ],
)
def test_who_is_hopeless(at_first, now, leaves):
    assert is_hopeless(torch.tensor([at_first]), torch.tensor([now])).tolist() == [leaves]


@pytest.mark.parametrize("name", SEARCHES)
def test_the_same_images_broken_for_fewer_passes(name):
    search, settings = SEARCHES[name]
    model = Curved().eval()
    images = make_images(40, SHAPE)
    with torch.no_grad():
        labels = model(images).argmax(dim=1)
    broken, passes = [], []
    for gives_up in (False, True):
        report = AttackReport()
        found = search(
            model,
            images,
            labels,
            epsilon=EPSILON,
            gives_up=gives_up,
            report=report,
            **settings,
        )
        assert float((found - images).abs().amax()) <= EPSILON + 1e-6
        with torch.no_grad():
            broken.append(model(found).argmax(dim=1) != labels)
        passes.append(report.num_forwards)
    assert 0 < int(broken[0].sum()) < len(images)
    torch.testing.assert_close(broken[0], broken[1])
    assert passes[1] < 0.8 * passes[0]


def test_an_image_does_not_know_who_left():
    model, images = Linear(SHAPE, NUM_CLASSES), make_images(6, SHAPE)
    labels = model(images).argmax(dim=1)
    for search, settings in SEARCHES.values():
        options = {"epsilon": 0.02, "gives_up": True, **settings}
        together = search(model, images, labels, sample_index=torch.arange(6), **options)
        for i in range(6):
            index = torch.tensor([i])
            alone = search(
                model, images[i : i + 1], labels[i : i + 1], sample_index=index, **options
            )
            assert torch.equal(alone[0], together[i])


def test_autoattack_never_gives_up():
    for entry in (*ATTACKS.values(), *(x for version in VERSIONS.values() for x in version)):
        assert not entry.settings.get("gives_up", False)
