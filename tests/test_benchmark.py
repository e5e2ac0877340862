"""The benchmark: its statistics by hand, its order, and each section on a tiny model."""

import json
import subprocess
import sys

import numpy as np
import pytest
from ml_collections import ConfigDict

from scripts import benchmark  # puts its own parts on the path
from tests.small import small_config

import benchmark_contenders as sides  # isort: skip
import benchmark_report as report  # isort: skip
import benchmark_sections as sections  # isort: skip
from benchmark_contenders import EAGER, OURS, Settings  # isort: skip

pytestmark = pytest.mark.usefixtures("one_torch_thread")

TINY = Settings(rounds=2, torch_compile=False, quick=True)


def tiny_config(**model) -> ConfigDict:
    """Without dropout, so that the check of the training step compiles what is measured."""
    config = small_config(num_layers=1, block_dropout_rate=0.0, **model)
    config.dataset.num_frames = 5
    return config


@pytest.fixture(autouse=True, scope="module")
def small_measurements():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sections, "MIN_TURN_S", 0.001)
        patch.setattr(sections, "MATRIX_SIZES", {"cpu": 64})
        patch.setattr(sections, "BATCH_SIZES", (1,))
        yield


# ------------------------------------------------------------------------------------- by hand


def test_spread_by_hand():
    assert report.spread([4.0, 1.0, 2.0, 3.0, 5.0]) == {
        "median_s": 3.0,
        "quartile_1_s": 2.0,
        "quartile_3_s": 4.0,
        "rounds": 5,
    }


def test_speedups_by_hand():
    # Round by round 2, 4 and 1.5 times; the medians alone say 6 / 2.
    rounds = {"rvit_jax": [1.0, 2.0, 4.0], EAGER: [2.0, 8.0, 6.0], "rvit_jax, 2 devices": [2.0] * 3}
    speedups = report.speedups(rounds)
    assert speedups["rvit_jax"] == {
        EAGER: {
            "of_medians": 3.0,
            "paired_median": 2.0,
            "paired_quartile_1": 1.75,
            "paired_quartile_3": 3.0,
        }
    }
    assert speedups["rvit_jax, 2 devices"][EAGER]["of_medians"] == 3.0
    assert speedups["rvit_jax, 2 devices"][EAGER]["paired_median"] == 3.0


def test_a_round_counts_with_the_median_of_its_calls():
    assert report.medians({OURS: [[1.0, 9.0, 2.0], [4.0]]}) == {OURS: [2.0, 4.0]}


def test_fitted_exponent_by_hand():
    assert report.fitted_exponent([1, 4, 16], [3.0, 24.0, 192.0]) == pytest.approx(1.5)


def test_flops_by_hand():
    sizes = {"image_size": 4, "patch_size": 2, "hidden_size": 2, "num_heads": 1, "mlp_dim": 3}
    model = small_config(**sizes).model  # 4 patches, 5 tokens, 2 layers
    # Embedding 2*4*12*2 = 192; a layer's projections 2*5*2*(6+6+2) = 280; a token's MLP 2*2*2*3.
    assert sections.flops_per_frame(model) == {
        "reference": 192 + 2 * (280 + 2 * 2 * 5 * 5 * 2 + 5 * 24),
        "needed": 192 + 2 * (280 + 2 * 2 * 5 * 2 * 2) + (5 + 1) * 24,
    }
    model.attention = "softmax"
    assert sections.flops_per_frame(model)["needed"] == 192 + 2 * (280 + 200) + 6 * 24


# ---------------------------------------------------------------------------------- taking turns


def contender(name: str, calls: list[str]) -> sections.Contender:
    return sections.Contender(name, lambda: calls.append(name), None, 0.0, sections.MIN_TURN_S)


def test_contenders_take_turns_in_a_seeded_order():
    orders = []
    for _ in range(2):
        calls = []
        samples = sections.measure(
            [contender(name, calls) for name in "abc"], Settings(rounds=6), "test", seed=1
        )
        assert [len(turns) for turns in samples.values()] == [6, 6, 6]
        rounds = ["".join(calls[start : start + 3]) for start in range(0, 18, 3)]
        assert all(sorted(order) == ["a", "b", "c"] for order in rounds)
        assert len(set(rounds)) > 1
        orders.append(rounds)
    assert orders[0] == orders[1]


def test_skipped_calls_are_made_but_not_counted():
    calls = []
    samples = sections.measure([contender("a", calls)], TINY, "test", seed=0, calls=5, skip=2)
    assert len(calls) == 10
    assert [len(turn) for turn in samples["a"]] == [3, 3]


def test_time_that_is_up_ends_a_measurement_after_a_whole_round():
    calls = []
    settings = Settings(rounds=100, seconds=0.0)
    sections.measure([contender(name, calls) for name in "ab"], settings, "test", seed=0)
    assert len(calls) == 2 * sections.MIN_ROUNDS


def test_what_fails_to_build_is_left_out_with_its_reason_but_not_ours():
    def fail():
        raise RuntimeError("no\ncompiler")

    built, failed = sections.build_all({EAGER: lambda: lambda: 1, "TorchScript frozen": fail})
    assert [b.name for b in built] == [EAGER]
    assert failed == {"TorchScript frozen": "RuntimeError: no compiler"}
    with pytest.raises(RuntimeError, match="no"):
        sections.build_all({OURS: fail})


@pytest.mark.parametrize("wrong", [1.01, np.nan])
def test_another_function_is_refused(wrong):
    ours = np.array([[1.0, -2.0]], np.float32)
    assert sections.check_logits(ours, {EAGER: ours * 1.0001}, "float32", TINY) == {
        EAGER: pytest.approx(1e-4, rel=1e-2)
    }
    with pytest.raises(ValueError, match=r"PyTorch eager: .* not worth timing"):
        sections.check_logits(ours, {EAGER: ours * wrong}, "float32", TINY)


# ------------------------------------------------------------------------------------- the whole


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The first three sections on a tiny model; the report on disk."""
    folder = tmp_path_factory.mktemp("benchmark")
    config = tiny_config(readout="class_and_hidden_tokens")
    benchmark.run_sections(config, TINY, ("inference", "training", "streaming"), folder)
    return folder


def test_json_has_the_documented_keys(finished):
    written = json.loads((finished / "benchmark.json").read_text())
    assert written["finished"]
    assert written["left_out"] == {}
    assert written["settings"]["dtypes"] == ["float32"]
    assert written["environment"]["versions"].keys() >= {"jax", "jaxlib", "flax", "torch"}
    assert written["environment"].keys() >= {"date", "cpu", "cores", "torch_threads", "gpu"}
    rows = written["sections"]
    inference = rows["inference"]
    assert [(row["batch_size"], row["dtype"]) for row in inference] == [(1, "float32")]
    for row in inference + rows["training"] + rows["streaming"]:
        assert row["num_frames"] == 5
        assert row["failed"] == {}
        ours = {name for name in row["contenders"] if name.startswith(OURS)}
        assert OURS in ours
        assert row["speedups"].keys() == ours
        assert row["speedups"][OURS].keys() == row["contenders"].keys() - ours
        for figures in row["contenders"].values():
            assert figures["rounds"] == 2
            assert 0 < figures["quartile_1_s"] <= figures["median_s"] <= figures["quartile_3_s"]
    both = {OURS, f"{OURS}, layers"}
    assert rows["training"][0]["contenders"].keys() == {*both, EAGER}
    assert inference[0]["contenders"].keys() == {*both, EAGER, "TorchScript frozen"}
    assert all(0 < f["p50_s"] <= f["p95_s"] for f in rows["streaming"][0]["contenders"].values())


def test_contenders_agree(finished):
    rows = json.loads((finished / "benchmark.json").read_text())["sections"]
    for row in rows["inference"] + rows["streaming"]:
        assert all(f["relative_error"] <= 1e-5 for f in row["contenders"].values())
    errors = rows["training"][0]["relative_errors_without_dropout"]
    assert errors.keys() == {"loss", "gradient_norm"}
    assert max(errors.values()) <= 1e-4


def test_xla_counts_about_the_operations_that_are_needed(finished):
    rows = json.loads((finished / "benchmark.json").read_text())["sections"]
    flops = rows["streaming"][0]["flops"]
    assert flops["needed"] <= flops["reference"]
    assert 0.9 * flops["needed"] <= flops["xla_of_step"] <= 3 * flops["needed"]


def test_markdown_shows_every_contender(finished):
    text = (finished / "benchmark.md").read_text()
    for part in ("## inference", "## training", "## streaming", OURS, EAGER, "p95", "MFLOP"):
        assert part in text


def test_plots(finished):
    pytest.importorskip("matplotlib")
    written = json.loads((finished / "benchmark.json").read_text())
    point = {"num_frames": 8, "median_s": 1.0}
    row = {"what": "inference", "over": "num_frames", "points": [point], "exponent": 1.0}
    written["sections"]["scaling"] = [row]
    drawn = report.plot(written, finished)
    assert [file.name for file in drawn] == ["speedups.png", "scaling.png"]


def test_bfloat16_is_compared_with_float32():
    config = tiny_config(readout="class_and_hidden_tokens")
    video = sides.make_video(config, 1)
    runs = sides.jax_inference, sides.torch_inference
    logits = {
        name: sides.to_host(run(config, video, "bfloat16")())
        for name, run in zip("ab", runs, strict=True)
    }
    reference = sides.reference_logits(config, video)
    errors = sections.check_logits(reference, logits, "bfloat16", TINY)
    assert all(1e-4 < error < 0.1 for error in errors.values())


def test_scaling(monkeypatch):
    sizes = {("inference", "num_frames"): (2, 4), ("inference", "num_layers"): (1, 2)}
    monkeypatch.setattr(sections, "SCALING_SIZES", sizes)
    rows = list(sections.measure_scaling(tiny_config(), TINY))
    assert [row["over"] for row in rows] == ["num_frames", "num_layers"]
    assert [point["num_layers"] for point in rows[1]["points"]] == [1, 2]
    assert rows[0]["flops_exponent"] == pytest.approx(1.0)
    assert all(point["median_s"] > 0 for row in rows for point in row["points"])
    assert "fitted exponent" in report.TABLES["scaling"](rows)[1]


def test_levels_of_precision():
    (row,) = sections.measure_precision(tiny_config(), TINY)
    o0, o1, o2 = row["levels"].values()
    assert list(row["levels"]) == ["O0", "O1", "O2"]
    assert o1["parameter_bytes"] == o0["parameter_bytes"] == 2 * o2["parameter_bytes"]
    # AdamW keeps two moments of each parameter, O2 a copy of it in float32 too; counts beside.
    assert o1["optimizer_bytes"] == o0["optimizer_bytes"]
    assert o2["optimizer_bytes"] - o0["optimizer_bytes"] == o0["parameter_bytes"]
    assert 0 < o0["optimizer_bytes"] - 2 * o0["parameter_bytes"] < 100
    assert o0["speedup"]["of_medians"] == 1.0
    (text,) = report.TABLES["precision"]([row])
    assert len(text.splitlines()) == 5


def test_compiling_tells_its_time_and_memory():
    figures, run = sections.compile_one(tiny_config(), "training", 4)
    assert figures["compile_s"] > 0
    assert figures["temporary_bytes"] > 0
    assert figures["argument_bytes"] > 4 * 5 * 16 * 16 * 3  # the frames, and the state
    run()
    run()  # the state goes on from step to step


@pytest.mark.parametrize(("what", "side"), [("inference", OURS), ("training", EAGER)])
def test_peak_memory(what, side, monkeypatch):
    monkeypatch.setattr(sections, "configure", lambda settings: None)  # is for a new process
    figures = sections.peak_memory(tiny_config(), TINY, what, side, 2)
    assert figures["peak_rss_bytes"] > 10e6
    assert figures["rss_before_bytes"] > 10e6
    row = {"what": what, "implementation": side, "batch_size": 2, "num_frames": 5, **figures}
    assert side in report.TABLES["memory"]([row])[0]


# ----------------------------------------------------------------------------- what goes wrong


def test_an_interrupted_run_leaves_what_was_measured(tmp_path, monkeypatch):
    def interrupted(config, settings):
        yield {"num_workers": 0}
        raise KeyboardInterrupt

    monkeypatch.setitem(benchmark.SECTIONS, "loader", interrupted)
    monkeypatch.setattr(benchmark, "table", lambda report: "")
    with pytest.raises(KeyboardInterrupt):
        benchmark.run_sections(tiny_config(), TINY, ("loader",), tmp_path)
    written = json.loads((tmp_path / "benchmark.json").read_text())
    assert written["sections"] == {"loader": [{"num_workers": 0}]}
    assert not written["finished"]


def test_a_section_whose_package_is_missing_is_left_out(tmp_path, monkeypatch):
    def missing(config, settings):
        raise ImportError("No module named 'grain'")
        yield

    monkeypatch.setitem(benchmark.SECTIONS, "loader", missing)
    written = benchmark.run_sections(tiny_config(), TINY, ("loader",), tmp_path)
    assert written["finished"]
    assert written["left_out"] == {"loader": "No module named 'grain'"}


def test_choices():
    assert benchmark.parse_choices(["b", " a", "b"], "abc", "what") == ("b", "a")
    with pytest.raises(ValueError, match="--what is empty; choose from a, b"):
        benchmark.parse_choices([""], "ab", "what")


def test_an_unknown_section_is_one_clear_line():
    command = [sys.executable, "scripts/benchmark.py", "--what=inferense"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == ("error: --what: 'inferense' is unknown; did you mean 'inference'?\n")
