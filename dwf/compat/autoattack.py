"""AutoAttack's class over our attacks.

Source: Croce and Hein, arXiv:2003.01690.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dwf.attacks.door import ask, undisturbed
from dwf.attacks.ensemble import Turn, in_turn
from dwf.attacks.losses import Model
from dwf.attacks.outcomes import NOT_ATTACKED, Outcomes, hash_of_weights, seed_of
from dwf.attacks.source import float32_verdicts
from dwf.attacks.table import ATTACKS, VERSIONS
from dwf.attacks.target import AttackTarget, attack_target
from dwf.checks import (
    ConfigError,
    check_choice,
    check_count,
    check_images,
    check_labels,
    check_logits,
    check_seed,
    plain,
)

NORMS = {"Linf": "linf", "L2": "l2"}
# Images whose logits go into a state, to know the model again.
_FEW = 100
_APGD = {"num_steps": "n_iter", "num_restarts": "n_restarts", "eot_samples": "eot_iter"}
_FAB = {"num_steps": "n_iter", "alpha_max": "alpha_max", "eta": "eta", "beta": "beta"}
# The attributes that each attack obeys: whose, and by which of our names.
_ATTRIBUTES = {
    "apgd-ce": ("apgd", _APGD),
    "apgd-dlr": ("apgd", _APGD),
    "fab": ("fab", {**_FAB, "num_restarts": "n_restarts"}),
    "square": (
        "square",
        {"num_queries": "n_queries", "num_restarts": "n_restarts", "p_init": "p_init"},
    ),
    "apgd-t": (
        "apgd_targeted",
        {**_APGD, "num_target_classes": "n_target_classes"},
    ),
    # once for each class, also where the untargeted one has restarts
    "fab-t": ("fab", {**_FAB, "num_target_classes": "n_target_classes"}),
}
_KEYS = list(_ATTRIBUTES)
# Attributes that are there to be read: ours cannot do otherwise.
_FIXED: dict[str, dict[str, Any]] = {
    "apgd": {"rho": 0.75, "use_largereps": False},
    "apgd_targeted": {"rho": 0.75, "use_largereps": False},
    "fab": {},
    "square": {"resc_schedule": False},
}


class Logger:
    """AutoAttack's logger: prints lines, and writes them to a file if it has one."""

    def __init__(self, log_path: str | os.PathLike[str] | None) -> None:
        self.log_path = None if log_path is None else Path(log_path)

    def log(self, line: str) -> None:
        """Print a line, and append it to the file."""
        print(line)
        self.write(line)

    def write(self, line: str) -> None:
        """Append a line to the file, if there is one."""
        if self.log_path is not None:
            with open(self.log_path, "a", encoding="utf-8") as stream:
                stream.write(line + "\n")


class AutoAttack:
    """AutoAttack's class: same arguments, same attributes, same two ways to run.

    ``apgd``, ``apgd_targeted``, ``fab`` and ``square`` hold ``eps``, ``norm``, ``n_iter``,
    ``n_restarts``, ``n_target_classes``, ``n_queries``, ``p_init``, ``eot_iter``, ``alpha_max``,
    ``eta`` and ``beta``, to be changed before a run. Their ``seed``, ``verbose`` and ``loss`` are
    set by each run, as there; ``rho``, ``use_largereps`` and ``resc_schedule`` cannot be changed.

    Differs in what can make a number wrong: images outside [0, 1], labels without a class and
    outputs that are no logits are errors; NaN logits count as broken; the model, its gradients and
    all random states are as before; ``seed=None`` is 0 instead of the clock; an image's result does
    not depend on ``bs``; ``state_path`` keeps the adversarial images too.

    Raises:
        ConfigError: norm "L1", a TensorFlow model, an unknown version or attack.
    """

    def __init__(
        self,
        model: Model,
        norm: str = "Linf",
        eps: float = 0.3,
        seed: int | None = None,
        verbose: bool = True,
        attacks_to_run: Sequence[str] = (),
        version: str = "standard",
        is_tf_model: bool = False,
        device: torch.device | str = "cuda",
        log_path: str | os.PathLike[str] | None = None,
    ) -> None:
        if is_tf_model:
            raise ConfigError("is_tf_model: TensorFlow models are not supported")
        check_choice(norm, list(NORMS), "norm")
        if torch.device(device).type == "cuda" and not torch.cuda.is_available():
            raise ConfigError(f"device: {str(device)!r}, but there is no GPU; pass device='cpu'")
        if attacks_to_run and version in VERSIONS:
            raise ConfigError(
                f"attacks_to_run is for version='custom'; {version!r} names its attacks"
            )
        self.model = model
        self.norm = norm
        self.epsilon = plain(eps)
        self.seed = None if seed is None else check_seed(seed)
        self.verbose = verbose
        self.attacks_to_run = list(attacks_to_run)
        self.version = version
        self.device = torch.device(device)
        self.is_tf_model = False
        self.logger = Logger(log_path)
        ball = {"eps": self.epsilon, "norm": norm, "seed": self.seed, "verbose": False}
        ball["device"] = self.device
        apgd = {**ball, **_FIXED["apgd"], "n_iter": 100, "n_restarts": 1, "eot_iter": 1}
        self.apgd = SimpleNamespace(**apgd, loss="ce")
        self.apgd_targeted = SimpleNamespace(**apgd, loss="dlr-targeted", n_target_classes=9)
        self.fab = SimpleNamespace(
            **ball,
            n_iter=100,
            n_restarts=1,
            n_target_classes=9,
            targeted=False,
            alpha_max=0.1,
            eta=1.05,
            beta=0.9,
        )
        self.square = SimpleNamespace(
            **ball, **_FIXED["square"], n_queries=5000, n_restarts=1, p_init=0.8, loss="margin"
        )
        if version != "custom":
            self.set_version(version)

    def set_version(self, version: str = "standard") -> None:
        """Choose the attacks and their settings: "standard", "plus" or "rand"."""
        check_choice(version, list(VERSIONS), "version")
        self.version = version
        attacks = VERSIONS[version]
        self.attacks_to_run = [attack.key for attack in attacks]
        settings = attacks[0].settings
        self.apgd.n_restarts = self.fab.n_restarts = settings.get("num_restarts", 1)
        self.apgd.eot_iter = settings.get("eot_samples", 1)

    def get_logits(self, x: Tensor) -> Tensor:
        """Logits [B, K] of images [B, C, H, W]."""
        logits: Tensor = ask(self.model, x)
        return logits

    def get_seed(self) -> int:
        """The seed; 0 where there is none."""
        return 0 if self.seed is None else self.seed

    def run_standard_evaluation(
        self,
        x_orig: Tensor,
        y_orig: Tensor,
        bs: int = 250,
        return_labels: bool = False,
        state_path: str | os.PathLike[str] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Run the attacks in turn, each on the images that still stand.

        Args:
            x_orig: [N, C, H, W] float in [0, 1].
            y_orig: [N] integer labels.
            state_path: a file to continue from if it exists, written after every attack.
        Returns:
            Adversarial images [N, C, H, W], and with ``return_labels`` what the model says of them.
        """
        self._check_attacks()
        bs = check_count(bs, "bs")
        with self._undisturbed(x_orig, y_orig, bs) as target:
            few = self._few_logits(x_orig, bs)
            turns = [Turn("clean", None), *map(self._turn, self.attacks_to_run)]
            outcomes = Outcomes(
                None if state_path is None else Path(state_path),
                self._key(x_orig, y_orig),
                few,
                len(turns),
                len(x_orig),
                images=x_orig,
                strict=True,
            )
            done = [n for n, row in enumerate(outcomes.table) if (row != NOT_ATTACKED).any()]
            if done:
                names = ", ".join(turns[n].name for n in done[1:])
                self._log(f"continues after {names}: {_percent(outcomes.standing(len(done)))}")
            started = time.perf_counter()

            def after(number: int) -> None:
                share = _percent(outcomes.standing(number + 1))
                if number == 0 and not done:
                    self._log(f"initial accuracy: {share}")
                elif number not in done:
                    self._log(
                        f"robust accuracy after {turns[number].name.upper()}: {share} "
                        f"(total time {time.perf_counter() - started:.1f} s)"
                    )

            self._run(turns, outcomes, target, x_orig, y_orig, bs, after)
            assert outcomes.images is not None
            self._log_result(x_orig, outcomes.images, outcomes.standing(len(turns)))
            found = outcomes.images
            return (found, self._labels(found, bs)) if return_labels else found

    def run_standard_evaluation_individual(
        self, x_orig: Tensor, y_orig: Tensor, bs: int = 250, return_labels: bool = False
    ) -> dict[str, Any]:
        """Run each attack on all images: {attack: adversarial images}, with labels as a pair."""
        self._check_attacks()
        bs = check_count(bs, "bs")
        results: dict[str, Any] = {}
        with self._undisturbed(x_orig, y_orig, bs) as target:
            for name in self.attacks_to_run:
                turns, size = [self._turn(name)], len(x_orig)
                outcomes = Outcomes(
                    None, "", torch.zeros(0, 0), 1, size, images=x_orig, keep_all=True
                )
                self._run(turns, outcomes, target, x_orig, y_orig, bs)
                self._log(f"robust accuracy by {name.upper()}: {_percent(outcomes.standing(1))}")
                found = outcomes.images
                assert found is not None
                results[name] = (found, self._labels(found, bs)) if return_labels else found
        return results

    def clean_accuracy(self, x_orig: Tensor, y_orig: Tensor, bs: int = 250) -> float:
        """Share of images that the model gets right."""
        bs = check_count(bs, "bs")
        with self._undisturbed(x_orig, y_orig, bs):
            right = self._labels(x_orig, bs) == y_orig.to(x_orig.device)
            accuracy = float(right.double().mean())
        if self.verbose:
            print(f"clean accuracy: {accuracy:.2%}")
        return accuracy

    def _check_attacks(self) -> None:
        if not self.attacks_to_run:
            raise ConfigError("attacks_to_run: empty, so every image would stand")
        for attack in self.attacks_to_run:
            check_choice(attack, _KEYS, "attacks_to_run")
        for owner, fixed in _FIXED.items():
            for name, value in fixed.items():
                found = getattr(getattr(self, owner), name)
                if found != value:
                    raise ConfigError(f"{owner}.{name}: {found!r} is not possible, only {value!r}")

    @contextlib.contextmanager
    def _undisturbed(self, x_orig: Tensor, y_orig: Tensor, bs: int) -> Iterator[AttackTarget]:
        """Everything checked, and the model ready to be attacked, until the block ends."""
        check_images(x_orig, "x_orig")
        with (
            undisturbed(self.model, self.device, seed=self.get_seed()),
            torch.no_grad(),
            float32_verdicts(self.device),
        ):
            few = x_orig[:bs].to(self.device)
            logits = check_logits(self.get_logits(few), len(few))
            check_labels(y_orig, len(x_orig), logits.shape[1], "y_orig")
            yield attack_target(self.model, few)

    def _run(
        self,
        turns: list[Turn],
        outcomes: Outcomes,
        target: AttackTarget,
        x: Tensor,
        y: Tensor,
        bs: int,
        after: Callable[[int], None] | None = None,
    ) -> None:
        """Attack in turn, judged by the model in float32."""

        def fetch(places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            rows = places.to(x.device)
            images, labels = x[rows].to(self.device), y[rows.to(y.device)].to(self.device)
            return images.float(), labels, places.to(self.device)

        def draws(number: int, first: int) -> int | None:
            attack = turns[number].attack
            if attack is None:
                return None
            return seed_of(self.get_seed(), _KEYS.index(attack.key), first)

        in_turn(
            turns,
            outcomes,
            target=target,
            fetch=fetch,
            verdict=lambda images, labels: self.get_logits(images),
            batch_size=bs,
            draws=draws,
            after=after,
        )

    def _turn(self, name: str) -> Turn:
        options = {"seed": self.get_seed(), **self._settings(name)}
        owner = getattr(self, _ATTRIBUTES[name][0])
        check_choice(owner.norm, list(NORMS), f"{_ATTRIBUTES[name][0]}.norm")
        return Turn(name, ATTACKS[name], plain(owner.eps), NORMS[owner.norm], options)

    def _settings(self, name: str) -> dict[str, Any]:
        """The attributes that this attack obeys, under our names."""
        owner, names = _ATTRIBUTES[name]
        return {
            ours: plain(getattr(getattr(self, owner), theirs)) for ours, theirs in names.items()
        }

    def _few_logits(self, x: Tensor, bs: int) -> Tensor:
        """Logits [M, K] float32 of the first images, on the CPU."""
        parts = torch.split(x[:_FEW], bs) or (x[:0],)
        return torch.cat([self.get_logits(part.to(self.device)).float().cpu() for part in parts])

    def _labels(self, x: Tensor, bs: int) -> Tensor:
        """Predicted classes [N] on the images' device; -1 where logits are not finite."""
        answers = []
        for part in torch.split(x, bs):
            logits = self.get_logits(part.to(self.device))
            finite = logits.isfinite().all(dim=1)
            answers.append(logits.argmax(dim=1).masked_fill(~finite, -1).to(x.device))
        return torch.cat(answers) if answers else torch.zeros(0, dtype=torch.int64)

    def _key(self, x_orig: Tensor, y_orig: Tensor) -> str:
        """Hash of the model, images and settings that a state file belongs to."""
        turns = [self._turn(attack) for attack in self.attacks_to_run]
        settings = [(turn.name, turn.epsilon, turn.norm, dict(turn.options)) for turn in turns]
        facts = [self.norm, self.epsilon, self.get_seed(), settings]
        facts.append(hash_of_weights(self.model))
        digest = hashlib.sha256(json.dumps(facts).encode())
        for tensor in (x_orig, y_orig):
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def _log_result(self, x_orig: Tensor, x_adv: Tensor, standing: np.ndarray[Any, Any]) -> None:
        if len(x_orig) == 0:
            return
        delta = (x_adv - x_orig).flatten(1)
        size = delta.abs().amax(dim=1) if self.norm == "Linf" else delta.norm(dim=1)
        self._log(
            f"max {self.norm} perturbation: {float(size.max()):.5f}, "
            f"nan in tensor: {int(x_adv.isnan().sum())}, "
            f"max: {float(x_adv.max()):.5f}, min: {float(x_adv.min()):.5f}"
        )
        self._log(f"robust accuracy: {_percent(standing)}")

    def _log(self, line: str) -> None:
        if self.verbose:
            self.logger.log(line)
        else:
            self.logger.write(line)


def _percent(standing: np.ndarray[Any, Any]) -> str:
    return f"{100 * float(standing.mean()) if len(standing) else 0:.2f}%"
