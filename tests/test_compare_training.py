"""The paired comparison: its statistics by hand, and what it refuses. No training here."""

import pytest

from configs import base
from scripts import compare_training
from scripts.compare_training import Run


def run(seed: int, framework: str, right: list[int]) -> Run:
    return Run(seed, framework, [2.0, 1.0], list("abcd"), [bool(r) for r in right], 0.5)


def test_summary_by_hand():
    runs = [
        {"jax": run(0, "jax", [1, 1, 1, 0]), "torch": run(0, "torch", [1, 1, 0, 0])},
        {"jax": run(1, "jax", [1, 0, 0, 0]), "torch": run(1, "torch", [1, 1, 0, 1])},
    ]
    summary = compare_training.summarise(runs)
    assert [s["top1"]["jax"] for s in summary["seeds"]] == [0.75, 0.25]
    assert summary["baseline"] == "torch"
    difference = summary["differences"]["jax"]
    assert difference["per_seed"] == [0.25, -0.5]
    assert difference["mean"] == -0.125
    # Over seeds: deviations of 0.375 from the mean, so 0.375 * sqrt(2) / sqrt(2).
    assert difference["standard_error_over_seeds"] == pytest.approx(0.375)
    # Over clips: means 0, -0.5, 0.5, -0.5 around -0.125; squares sum to 0.6875.
    assert difference["standard_error_over_clips"] == pytest.approx((0.6875 / 3) ** 0.5 / 2)


def test_other_clips_are_refused():
    other = Run(0, "torch", [1.0], list("abce"), [True] * 4, 0.5)
    with pytest.raises(ValueError, match="different clips"):
        compare_training.summarise([{"jax": run(0, "jax", [1, 1, 1, 0]), "torch": other}])


def test_a_workdir_of_another_config_is_refused(tmp_path):
    config = base.get_config()
    compare_training.claim_workdir(config, tmp_path)
    config.dataset.num_workers = 4  # changes how fast data come, not which
    compare_training.claim_workdir(config, tmp_path)
    config.batch_size = 7
    with pytest.raises(ValueError, match="choose another --workdir"):
        compare_training.claim_workdir(config, tmp_path)


def test_what_pytorchs_side_lacks_is_refused():
    config = base.get_config()
    config.optimizer.name = "sgd"
    with pytest.raises(ValueError, match="'adamw'"):
        compare_training.check_comparable(config, ("jax", "torch"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("loss.name", "binary_cross_entropy"),
        ("dataset.augment.horizontal_flip", 0.5),
        ("optimizer.accumulation_steps", 2),
        ("optimizer.frozen", ("head/*",)),
        ("ema_decay", 0.9),
    ],
)
def test_what_the_recipe_has_no_part_for_is_refused(key, value):
    config = base.get_config()
    config.update_from_flattened_dict({key: value})
    with pytest.raises(ValueError, match=rf"config\.{key}="):
        compare_training.check_comparable(config, ("O1", "O0"))


@pytest.mark.parametrize("names", [("jax",), ("O1", "O1"), ("O1", "pytorch")])
def test_contenders_that_make_no_comparison_are_refused(names):
    with pytest.raises(ValueError, match="--contenders"):
        compare_training.check_comparable(base.get_config(), names)
