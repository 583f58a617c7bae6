"""Settings: overridden by name, checked when made, the same after a trip through JSON."""

import dataclasses
import itertools
import json
from dataclasses import dataclass
from typing import Literal

import pytest

from dwf.checks import ConfigError
from dwf.config import (
    AttackConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    Options,
    PhaseConfig,
    apply_overrides,
    derive_seed,
    from_dict,
)

CONFIG = Config("test", "dwf", joint=PhaseConfig())


def changed(*overrides):
    return apply_overrides(CONFIG, overrides)


class TestOverrides:
    @pytest.mark.parametrize(
        ("override", "expected"),
        [
            ("seed=3", 3),
            ("ema_decay=0.5", 0.5),
            ("precision=bf16", "bf16"),
            ("pretrain_together=never", "never"),
            ("data.flip=true", True),
            ("data.flip=0", False),
            ("data.root=/data/my sets", "/data/my sets"),
            ("data.num_train=500", 500),
            ("data.num_train=none", None),
            ("attack.epsilon=8/255", 8 / 255),
            ("attack.epsilon=2e-2", 0.02),
            ("attack.fgsm_epsilon=1/100,0.02", (0.01, 0.02)),
            ("attack.num_steps=10, 20 ,30", (10, 20, 30)),
            ("attack.num_steps=7", (7,)),
            ("joint.num_epochs=30", 30),
            ("joint=none", None),
            ("evaluation.num_steps=", ()),
            (" seed = 4 ", 4),
        ],
    )
    def test_values_are_read_by_type(self, override, expected):
        config = changed(override)
        for name in override.partition("=")[0].strip().split("."):
            config = getattr(config, name)
        assert config == expected
        assert type(config) is type(expected)

    def test_only_the_named_setting_changes(self):
        config = changed("joint.num_epochs=30", "seed=1")
        expected = dataclasses.replace(CONFIG, seed=1, joint=PhaseConfig(num_epochs=30))
        assert config == expected
        assert CONFIG.seed == 0
        assert CONFIG.joint == PhaseConfig()

    def test_the_last_of_two_wins(self):
        assert changed("seed=1", "seed=2").seed == 2

    @pytest.mark.parametrize(
        ("override", "message"),
        [
            ("sed=1", "sed: unknown key; did you mean seed?"),
            ("epsilon=8/255", "did you mean attack.epsilon or evaluation.epsilon?"),
            ("width=8", "did you mean model.width?"),
            ("joint.num_epoch=30", "joint.num_epoch: unknown key; did you mean joint.num_epochs?"),
            ("atack.epsilon=0.1", "unknown key; did you mean attack.epsilon?"),
            ("model.zzz=1", "model.zzz: unknown key, expected one of ['network', 'width'"),
            ("seed", "'seed': expected key=value, for example seed=1"),
            ("seed=1.5", "seed: '1.5' is not a int"),
            ("attack.epsilon=lots", "attack.epsilon: 'lots' is not a float"),
            ("attack.epsilon=1/0", "attack.epsilon: '1/0' is not a float"),
            ("attack.epsilon=none", "attack.epsilon: 'none' is not a float"),
            ("data.flip=yes", "data.flip: 'yes' is not a bool"),
            ("attack.draw=img", "attack.draw: 'img' is unknown, expected one of"),
            ("attack.bn_mode=trian", "did you mean 'train'?"),
            ("pretrain_together=alway", "did you mean 'always'?"),
            ("attack.num_steps=10,x", "attack.num_steps: 'x' is not a int"),
            ("attack=3", "attack: names a group of settings; name one of them"),
            ("seed.x=3", "seed.x: seed has no parts"),
            ("=3", "unknown key"),
        ],
    )
    def test_errors_name_the_key(self, override, message):
        with pytest.raises(ConfigError) as error:
            changed(override)
        assert message in str(error.value)

    def test_missing_phase(self):
        config = dataclasses.replace(CONFIG, joint=None)
        with pytest.raises(ConfigError, match=r"joint.num_epochs: this preset has no such phase"):
            apply_overrides(config, ["joint.num_epochs=3"])

    def test_phase_that_another_override_takes_away(self):
        with pytest.raises(ConfigError, match=r"joint.num_epochs: this preset has no such phase"):
            changed("joint=none", "joint.num_epochs=3")
        assert changed("joint.num_epochs=3", "joint=none").joint is None

    def test_settings_that_need_each_other_come_in_any_order(self):
        texts = ["joint.schedule=steps", "joint.at=1/2,3/4", "joint.factors=0.1,0.01"]
        for order in itertools.permutations(texts):
            joint = changed(*order).joint
            assert joint == dataclasses.replace(
                CONFIG.joint, schedule="steps", at=(0.5, 0.75), factors=(0.1, 0.01)
            )
        with pytest.raises(ConfigError, match=r"expected one factor for each value of at"):
            changed(*texts[:2])


class TestValues:
    @pytest.mark.parametrize(
        ("override", "message"),
        [
            ("seed=-1", "expected an integer >= 0"),
            ("ema_decay=1", "not in [0, 1)"),
            ("ema_decay=nan", "not in [0, 1)"),
            ("checkpoint_every=0", "checkpoint_every: 0"),
            ("validate_every=-1", "validate_every: -1"),
            ("data.crop_padding=-1", "data.crop_padding: -1"),
            ("data.num_validation=0", "data.num_validation: 0"),
            ("data.num_train=0", "data.num_train: 0"),
            ("model.width=0", "model.width: 0"),
            ("model.num_pgd=-1", "model.num_pgd: -1"),
            ("attack.epsilon=8", "did you mean 8/255"),
            ("attack.epsilon=-0.1", "attack.epsilon: -0.1"),
            ("attack.epsilon=nan", "attack.epsilon: nan"),
            ("attack.fgsm_epsilon=0.1,8", "did you mean 8/255"),
            ("attack.fgsm_epsilon=", "at least one value each"),
            ("attack.step_size=0", "attack.step_size: 0.0"),
            ("attack.num_steps=10,0", "attack.num_steps: 0"),
            ("pretrain.num_epochs=0", "num_epochs: 0"),
            ("pretrain.learning_rate=0", "learning_rate: 0"),
            ("pretrain.momentum=1", "expected less than 1"),
            ("pretrain.weight_decay=-1", "weight_decay: -1"),
            ("evaluation.epsilon=4", "did you mean 4/255"),
            ("evaluation.num_restarts=0", "evaluation.num_restarts: 0"),
            ("evaluation.num_images=0", "evaluation.num_images: 0"),
            ("evaluation.eot_samples=0", "evaluation.eot_samples: 0"),
        ],
    )
    def test_impossible(self, override, message):
        with pytest.raises(ConfigError) as error:
            changed(override)
        assert message in str(error.value)

    def test_contradictions(self):
        with pytest.raises(ConfigError, match="batch_size 128 does not divide into accumulation 3"):
            changed("joint.accumulation=3")
        with pytest.raises(ConfigError, match="nothing to train"):
            changed("pretrain=none", "joint=none")
        with pytest.raises(ConfigError, match="expected an expert"):
            changed("model.num_benign=0", "model.num_fgsm=0", "model.num_pgd=0")

    def test_checked_however_made(self):
        for make in (
            lambda: AttackConfig(draw="sample"),
            lambda: AttackConfig(bn_mode="both"),
            lambda: AttackConfig(protocol="paper"),
            lambda: AttackConfig(clamp="yes"),
            lambda: AttackConfig(epsilon="8/255"),
            lambda: EvaluationConfig(epsilon=8),
            lambda: ModelConfig(width=1.5),
            lambda: DataConfig(crop_padding=True),
            lambda: PhaseConfig(batch_size=-1),
            lambda: Config("test", "dwf", precision="fp16"),
            lambda: Config("test", "dwf", seed=1.0),
            lambda: dataclasses.replace(CONFIG, pretrain=None, joint=None),
        ):
            with pytest.raises(ConfigError):
                make()

    def test_frozen(self):
        with pytest.raises(dataclasses.FrozenInstanceError):
            CONFIG.seed = 1

    def test_zero_epsilon_is_a_point_on_the_curve(self):
        assert changed("evaluation.fgsm_epsilon=0,0.1").evaluation.fgsm_epsilon == (0.0, 0.1)


class TestJson:
    def test_round_trip(self):
        config = changed("joint.num_epochs=7", "data.num_train=none", "attack.num_steps=3,5")
        assert from_dict(config.to_dict()) == config
        assert from_dict(json.loads(json.dumps(config.to_dict(), allow_nan=False))) == config

    def test_integers_are_floats_where_floats_are_meant(self):
        values = CONFIG.to_dict()
        values["attack"]["epsilon"] = 1
        assert type(from_dict(values).attack.epsilon) is float

    @pytest.mark.parametrize(
        ("path", "value", "message"),
        [
            ("sed", 1, "sed: unknown key; did you mean seed?"),
            ("data.flp", True, "data.flp: unknown key; did you mean flip?"),
            ("seed", "1", "seed: expected int, found '1'"),
            ("seed", True, "seed: expected int, found True"),
            ("data.flip", 1, "data.flip: expected bool, found 1"),
            ("data", 3, "data.: expected a group of settings, found 3"),
            ("attack.num_steps", 10, "attack.num_steps: expected tuple[int, ...], found 10"),
            ("attack.num_steps", [10, "x"], "attack.num_steps: expected int, found 'x'"),
            ("attack.draw", "img", "attack.draw: 'img' is unknown"),
            ("attack.epsilon", 8.0, "did you mean 8/255"),
            ("joint", [1], "joint.: expected a group of settings, found [1]"),
        ],
    )
    def test_errors_name_the_key(self, path, value, message):
        values = CONFIG.to_dict()
        *groups, last = path.split(".")
        place = values
        for name in groups:
            place = place[name]
        place[last] = value
        with pytest.raises(ConfigError) as error:
            from_dict(values)
        assert message in str(error.value)

    def test_missing_and_absent(self):
        with pytest.raises(ConfigError, match=r"config: \['defense'\] missing"):
            from_dict({"preset": "test"})
        assert from_dict({"preset": "test", "defense": "dwf"}) == Config("test", "dwf")
        with pytest.raises(ConfigError, match="expected a group"):
            from_dict([])


@dataclass(frozen=True)
class TasteOptions(Options, defense="taste"):
    salt: float = 0.5
    kind: Literal["sea", "rock"] = "sea"


class TestOptions:
    CONFIG = Config("test", "taste", options=TasteOptions(salt=2.0))

    def test_defaults_of_the_defense(self):
        assert Config("test", "taste").options == TasteOptions()
        assert Config("test", "plain").options is None

    def test_round_trip(self):
        assert from_dict(json.loads(json.dumps(self.CONFIG.to_dict()))) == self.CONFIG

    def test_override(self):
        changed = apply_overrides(self.CONFIG, ["options.salt=1/4", "options.kind=rock"])
        assert changed.options == TasteOptions(0.25, "rock")

    @pytest.mark.parametrize(
        ("override", "message"),
        [
            ("options.sal=1", "did you mean options.salt?"),
            ("options.kind=mine", "options.kind"),
            ("options.salt=much", "is not a float"),
        ],
    )
    def test_bad_overrides(self, override, message):
        with pytest.raises(ConfigError) as error:
            apply_overrides(self.CONFIG, [override])
        assert message in str(error.value)

    def test_of_another_defense(self):
        with pytest.raises(ConfigError, match="defense 'plain' takes none, found TasteOptions"):
            Config("test", "plain", options=TasteOptions())
        with pytest.raises(ConfigError, match=r"options.pepper: unknown key"):
            from_dict({"preset": "test", "defense": "taste", "options": {"pepper": 1}})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"schedule": "steps"}, "one factor for each value of at"),
        ({"at": (0.5,), "factors": (0.1,)}, "no at and no factors"),
        ({"schedule": "steps", "at": (0.9, 0.1), "factors": (1, 1)}, "ascending shares"),
        ({"schedule": "linear", "at": (0, 2), "factors": (1, 1)}, "ascending shares"),
        ({"schedule": "linear", "at": (0, 1), "factors": (1, -1)}, "factors"),
        ({"schedule": "cosinus"}, "did you mean"),
        ({"optimizer": "adamw"}, "optimizer"),
    ],
)
def test_bad_schedules(settings, message):
    with pytest.raises(ConfigError) as error:
        PhaseConfig(**settings)
    assert message in str(error.value)


def test_seeds_are_far_apart_and_fixed():
    names = [(seed, name, i) for seed in range(10) for name in "abc" for i in range(10)]
    seeds = {derive_seed(*name) for name in names}
    assert len(seeds) == len(names)
    assert all(0 <= seed < 2**63 for seed in seeds)
    # another number here would break the resume of every run out there
    assert derive_seed(0, "data", "joint") == 413462541481961739


class TestNothingBeyondReason:
    """What a damaged or hostile config.json may hold: a ConfigError, before any work."""

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("preset", "../../x"),
            ("preset", "/etc/x"),
            ("preset", ".."),
            ("preset", "a/b"),
            ("preset", ""),
            ("preset", "x\0"),
            ("preset", "x" * 300),
            ("defense", []),
            ("defense", {}),
            ("seed", 10**400),
            ("seed", -1),
            ("ema_decay", 10**400),
            ("checkpoint_every", 10**400),
            ("data", {"crop_padding": 10**9}),
            ("model", {"width": 10**9}),
            ("model", {"num_pgd": 10**9}),
            ("model", {"gate_hidden": 10**9}),
            ("attack", {"epsilon": 10**400}),
            ("attack", {"num_steps": [10**400]}),
            ("evaluation", {"num_images": 10**400}),
            ("joint", {"num_epochs": 10**400}),
        ],
    )
    def test_in_a_file(self, key, value):
        values = {"preset": "x", "defense": "dwf", key: value}
        with pytest.raises(ConfigError, match="num_epochs" if key == "joint" else key):
            from_dict(values)
