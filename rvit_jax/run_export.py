"""Runs an exported model with NumPy and one library; nothing of rvit_jax is needed or imported.

    python -I rvit_jax/run_export.py FOLDER FORMAT CASES.npz

`rvit_jax.export` starts this in a process of its own, to compare what it wrote with the model.
`load` is also the shortest example of how to use an export elsewhere.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Run = Callable[..., tuple[np.ndarray, np.ndarray]]


def load(folder: Path, form: str) -> dict[str, Run]:
    """The programs of an export, by name: functions of arrays that return (logits, hidden).

    Args:
        folder: that `rvit_jax.export` wrote.
        form: "stablehlo" (needs JAX), "savedmodel" (TensorFlow) or "onnx" (onnxruntime).
    """
    description = json.loads((folder / "export.json").read_text())
    loaders = {"stablehlo": _stablehlo, "savedmodel": _savedmodel, "onnx": _onnx}
    return {
        name: loaders[form](folder / program["files"][form], name, program)
        for name, program in description["programs"].items()
    }


def _stablehlo(file: Path, _name: str, _program: dict[str, Any]) -> Run:
    import jax
    from jax import export

    exported = export.deserialize(bytearray(file.read_bytes()))
    # Compiled once per shape; `exported.call` alone is taken apart anew at each call.
    return jax.jit(exported.call)


def _savedmodel(folder: Path, name: str, program: dict[str, Any]) -> Run:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # or it logs what it finds in the machine
    # TensorFlow looks for it; a SavedModel runs without. None stops an import.
    sys.modules.setdefault("jax", None)  # type: ignore[arg-type]
    import tensorflow as tf

    module = tf.saved_model.load(str(folder))
    names = [argument["name"] for argument in program["inputs"]]
    outputs = [argument["name"] for argument in program["outputs"]]

    def run(*arrays: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        feeds = dict(zip(names, map(tf.constant, arrays), strict=True))
        answers = module.signatures[name](**feeds)
        return tuple(answers[output].numpy() for output in outputs)

    return run


def _onnx(file: Path, _name: str, program: dict[str, Any]) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors; the converter leaves constants that nothing uses
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    names = [argument["name"] for argument in program["inputs"]]
    outputs = [argument["name"] for argument in program["outputs"]]
    return lambda *arrays: session.run(outputs, dict(zip(names, arrays, strict=True)))


def largest_errors(folder: Path, form: str, cases: dict[str, np.ndarray]) -> dict[str, float]:
    """Program -> its largest max |difference| / max |expected|, over the cases.

    Args:
        folder: the export.
        form: see `load`.
        cases: for case i `video_i` [B, T, H, W, 3] and what the model answers: `logits_i` [B, K]
            and `hidden_i` [L, B, S, D] in one call, `step_logits_i` [T, B, K] and `step_hidden_i`
            [L, B, S, D] frame by frame.
    """
    programs = load(folder, form)
    first_hidden = np.load(folder / "initial_hidden.npy")
    errors: dict[str, list[float]] = {name: [] for name in programs}
    for index in range(sum(name.startswith("video_") for name in cases)):
        video, logits, hidden, step_logits, step_hidden = (
            cases[f"{name}_{index}"]
            for name in ("video", "logits", "hidden", "step_logits", "step_hidden")
        )
        if "clip" in programs:
            answer = programs["clip"](video)
            errors["clip"] += [_error(answer[0], logits), _error(answer[1], hidden)]
        if "step" in programs:
            state, answers = np.repeat(first_hidden, len(video), axis=1), []
            for frame in np.moveaxis(video, 1, 0):
                frame_logits, state = programs["step"](frame, state)
                answers.append(np.asarray(frame_logits))
            errors["step"] += [
                _error(np.stack(answers), step_logits),
                _error(state, step_hidden),
                _error(answers[-1], logits),  # T steps are one call
            ]
    # NumPy's max, unlike Python's, keeps a NaN.
    return {name: float(np.max(values)) for name, values in errors.items()}


def _error(ours: np.ndarray, expected: np.ndarray) -> float:
    if np.shape(ours) != expected.shape:
        raise ValueError(f"the answer's shape is {np.shape(ours)}, expected {expected.shape}")
    largest = max(float(np.abs(expected).max()), float(np.finfo(np.float32).tiny))
    return float(np.abs(np.asarray(ours) - expected).max()) / largest


if __name__ == "__main__":
    if len(sys.argv) != 4 or sys.argv[2] not in ("stablehlo", "savedmodel", "onnx"):
        print(
            "error: say python -I rvit_jax/run_export.py FOLDER FORMAT CASES.npz, FORMAT one of "
            "stablehlo, savedmodel, onnx",
            file=sys.stderr,
        )
        sys.exit(2)
    folder, form, cases = sys.argv[1:]
    errors = largest_errors(Path(folder), form, dict(np.load(cases)))
    assert "rvit_jax" not in sys.modules
    print(json.dumps(errors))
