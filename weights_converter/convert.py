"""PyTorch file -> converted model on disk, and back.

    OUT_DIR/params/      the weights                               (Orbax)
    OUT_DIR/optimizer/   AdamW's state, where the file had one     (Orbax)
    OUT_DIR/model.json   config, class names, preprocessing, and `converted_from`

`rvit_jax.load`, `--checkpoint=` and `to_torch` take the folder as it is.
"""

import dataclasses
import io
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from ml_collections import ConfigDict

from configs import base
from weights_converter import adamw as adamw_state
from weights_converter import archive, mapping
from weights_converter.archive import FileRefused
from weights_converter.recognise import Recognised, baked_frames, recognise

if TYPE_CHECKING:
    from weights_converter.prove import Proof

Say = Callable[[str], None]
TORCH_ENDINGS = (".pth", ".pt", ".bin", ".ckpt")  # of the files that PyTorch's users write
MAX_EPOCH = 1000  # of the reference's training; a larger number in a name is none


@dataclasses.dataclass(frozen=True)
class Converted:
    """What `to_flax` made.

    Attributes:
        path: of the converted model.
        config: its config.
        proof: None where nothing was run.
        why_not_proven: None where it was proven.
    """

    path: Path
    config: ConfigDict
    proof: "Proof | None"
    why_not_proven: str | None


def to_flax(
    file: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    *,
    prove: bool = False,
    attention: str | None = None,
    num_heads: int | None = None,
    epoch: int | None = None,
    class_names: Sequence[str] | None = None,
    num_frames: int | None = None,
    frame_stride: int | None = None,
    timeout: float = 120.0,
    say: Say = print,
) -> Converted:
    """Converts a PyTorch file to a model that rvit_jax loads.

    Args:
        file: see `archive.read`.
        out_dir: made; must not exist, or be empty. Appears only when it is whole.
        prove: run the file, which the user trusts, and keep the reading that computes the same.
        attention: the kind, where the file does not tell.
        num_heads: the number of heads, where the file does not tell.
        epoch: that a training checkpoint was saved after, counted from 0, where neither it nor
            its name `..._EPOCH.pth` tells.
        class_names: in index order; by default Jester's 27 in the reference's order.
        num_frames: T of the clips that it was trained with; by default the reference's, or what
            a traced file holds.
        frame_stride: every how many frames of a video they take; by default 1.
        timeout: of each run of the file, in seconds.
        say: takes each line of the report.

    Raises:
        FileNotFoundError: there is no file.
        ValueError: it is refused, does not tell enough, or proves to compute something else.
        OSError: the folder exists, or cannot be written.
    """
    out_dir = _check_out_dir(Path(out_dir))
    found = recognise(archive.read(file), attention=attention, num_heads=num_heads)
    names = _class_names(found, class_names)
    for line in describe(found):
        say(line)
    if class_names is None:
        say(
            f"classes: {names[0]!r}, {names[1]!r} ... {names[-1]!r} in this order; for other names "
            "see --class_names"
        )
    proof: Proof | None = None
    why_not: str | None = "nothing was run: --prove runs a TorchScript file that you trust"
    if prove:
        proof, why_not = _prove(found, timeout, say)
    config = _config(found, _decide(found, proof, tried=prove), names)
    dataset = config.dataset
    dataset.num_frames = num_frames or dataset.num_frames
    dataset.frame_stride = frame_stride or dataset.frame_stride
    asked = num_frames is not None or frame_stride is not None
    say(
        f"clips: {dataset.num_frames} frames, one in {dataset.frame_stride} of "
        f"{dataset.frame_rate:g} a second"
        + ("" if asked else ", as the reference reads Jester; for others see --num_frames")
    )
    optimizer = _read_optimizer(found, epoch, config, say)
    _write(out_dir, found, config, names, proof, why_not, optimizer)
    say(f"written to {out_dir}: {'proven' if proof else f'NOT PROVEN ({why_not})'}")
    return Converted(out_dir, config, proof, why_not)


def describe(found: Recognised) -> Iterator[str]:
    """What was found in a file, line by line."""
    source, sizes = found.source, found.sizes
    count = sum(array.size for array in found.weights.values())
    yield f"{source.path}: {source.kind}, {len(found.weights)} tensors, {count:,} parameters"
    yield f"sha256 {source.sha256}"
    yield (
        f"{sizes['num_layers']} layers of width {sizes['hidden_size']} (MLP {sizes['mlp_dim']}), "
        f"frames of {sizes['image_size']} x {sizes['image_size']} in patches of "
        f"{sizes['patch_size']}, {sizes['num_classes']} classes, {sizes['head']} head on "
        f"{sizes['readout']}"
    )
    yield f"heads: {found.num_heads}"
    yield f"attention: {found.attention}"
    if found.has_reattention and found.attention.value in ("linear", "softmax"):
        yield "its re-attention parameters are carried along and take no part"
    if source.optimizer is not None:
        yield "it holds an optimizer's state"
    yield from found.notes


def _check_out_dir(out_dir: Path) -> Path:
    """The folder by its real path. Before anything else is done: the work shall not be lost."""
    real = out_dir.resolve()
    if real.is_file():
        raise OSError(f"{out_dir} is a file: name a new folder for the converted model")
    if real.exists() and (not real.is_dir() or any(real.iterdir())):
        raise OSError(f"{out_dir} exists and is not empty: name another folder, or remove it")
    if real == Path.cwd():
        raise OSError(f"{out_dir} is the current folder: name a new one")
    parent = next(p for p in real.parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise OSError(f"{out_dir} cannot be made: {parent} may not be written")
    return real


def _prove(found: Recognised, timeout: float, say: Say) -> tuple["Proof | None", str | None]:
    try:
        from weights_converter import prove
    except ModuleNotFoundError as error:
        raise ValueError(
            f"--prove runs the file in PyTorch, which is not installed ({error}): "
            "pip install torch, or convert without --prove"
        ) from error
    say(f"running {found.source.path} beside every candidate")
    try:
        proof = prove.prove(found, timeout=timeout)
    except prove.NotRun as error:
        say(f"it could not be run here: {error}")
        return None, f"it could not be run here: {error}"
    say(prove.table(proof))
    for note in proof.notes:
        say(note)
    state = "" if proof.state is None else f", the state by {proof.state:.1e}"
    say(
        f"proven on clips [B, T] = {list(proof.clips)}: it is {proof.candidate}; the Flax model's "
        f"logits differ by {proof.logits:.1e} of the largest{state}"
    )
    if proof.dtype != "float32":
        say(f"the file computes in {proof.dtype}, whose rounding alone does {proof.rounding:.1e}")
    for what, finding, value in (
        ("attention", found.attention, proof.candidate.attention),
        ("num_heads", found.num_heads, proof.candidate.num_heads),
    ):
        if finding.certain and finding.value != value:
            raise ValueError(
                f"--{what}={finding.value} was asked for, but {found.source.path} computes {value}"
            )
    return proof, None


def _decide(found: Recognised, proof: "Proof | None", *, tried: bool) -> ConfigDict:
    """`config.model`: the proof's reading, else the evidence's and the reference's state.

    Raises:
        ValueError: neither tells.
    """
    if proof is not None:
        return proof.candidate.model_config(found)
    kind, num_heads = found.attention.value, found.num_heads.value
    missing = []
    if kind is None:
        kinds = "|".join(found.possible_attentions())
        missing.append(f"its kind of attention: say --attention={kinds}")
    if num_heads is None:
        why = "; ".join(found.num_heads.reasons)
        missing.append(
            f"its number of heads{f' ({why})' if why else ''}: say --num_heads=N (the released "
            "demo has 8)"
        )
    if kind is None or num_heads is None:
        run = found.source.code and not tried
        raise ValueError(
            f"{found.source.path} does not tell {', nor '.join(missing)}."
            + (" Or, if you trust it, run it with --prove" if run else "")
        )
    return found.model_config(kind, num_heads)


def _class_names(found: Recognised, asked: Sequence[str] | None) -> tuple[str, ...]:
    from input_pipeline.jester import CLASS_NAMES

    count = int(found.sizes["num_classes"])
    if asked is None:
        return (
            CLASS_NAMES if count == len(CLASS_NAMES) else tuple(f"class {i}" for i in range(count))
        )
    if len(asked) != count or len(set(asked)) != count:
        raise ValueError(
            f"--class_names: {len(asked)} names, {len(set(asked))} of them different; "
            f"{found.source.path} has {count} classes"
        )
    return tuple(asked)


def _config(
    found: Recognised, model_config: ConfigDict, class_names: tuple[str, ...]
) -> ConfigDict:
    """The reference's recipe with this model."""
    from input_pipeline.jester import CLASS_NAMES
    from rvit_jax.config import check_model_config

    config = base.get_config()
    config.model = model_config
    check_model_config(config.model)
    config.dataset.classes = () if class_names == CLASS_NAMES else class_names
    config.dataset.num_frames = baked_frames(found.source) or config.dataset.num_frames
    return config


# --------------------------------------------------------------------------- the optimizer


@dataclasses.dataclass(frozen=True)
class _Training:
    """Where PyTorch's training stood."""

    adamw: adamw_state.AdamW
    epoch: int | None


def _read_optimizer(
    found: Recognised, epoch: int | None, config: ConfigDict, say: Say
) -> _Training | None:
    """Understands the optimizer's state and puts its settings in the config."""
    if found.source.optimizer is None:
        return None
    try:
        adamw = adamw_state.read_adamw(found.source.optimizer, found.weights)
    except FileRefused as error:
        say(f"its optimizer's state is left behind: {error}")
        return None
    epoch = _epoch(found, epoch)
    recipe = config.optimizer
    recipe.betas, recipe.weight_decay = adamw.betas, adamw.weight_decay
    recipe.learning_rate = adamw.learning_rate
    if epoch is None:
        # The rate may stand lower than it began; where it began nobody knows.
        recipe.schedule = "constant"
    else:  # the reference's staircase stands lower by now than it began
        recipe.learning_rate /= recipe.step_factor ** (epoch // recipe.step_epochs)
    if adamw.frozen:
        recipe.frozen = ("patch_embedding/*",)
    say(
        f"its AdamW state comes along: {adamw.step} updates, learning rate "
        f"{adamw.learning_rate:g}, "
        + (
            f"epoch {epoch}, so that the recipe begins with {recipe.learning_rate:g}"
            if epoch is not None
            else "kept constant, for the epoch is unknown (say --epoch=N)"
        )
        + (f", {len(adamw.frozen)} parameters frozen" if adamw.frozen else "")
        + (f", {len(adamw.stateless)} never trained" if adamw.stateless else "")
    )
    return _Training(adamw, epoch)


def _epoch(found: Recognised, asked: int | None) -> int | None:
    """The epoch that a checkpoint was saved after: asked for, in it, or in its name.

    Raises:
        ValueError: the epoch asked for cannot be.
    """
    named = re.search(r"_(\d{1,4})$", found.source.path.stem)
    epochs = (asked, found.source.epoch, int(named.group(1)) if named else None)
    if asked is not None and not 0 <= asked <= MAX_EPOCH:
        raise ValueError(f"--epoch={asked}: expected 0 to {MAX_EPOCH}")
    return next((e for e in epochs if e is not None and 0 <= e <= MAX_EPOCH), None)


def _optimizer_state(adamw: adamw_state.AdamW, config: ConfigDict, params: Any) -> Any:
    """PyTorch's AdamW state as the state of `config.optimizer`'s optax chain."""
    from rvit_jax import optimizer

    chain = optimizer.make_optimizer(config.optimizer, lambda step: 0.0)
    return adamw_state.to_optax(adamw, chain.init(params), config.model)


# --------------------------------------------------------------------------- files


def _write(
    out_dir: Path,
    found: Recognised,
    config: ConfigDict,
    class_names: tuple[str, ...],
    proof: "Proof | None",
    why_not: str | None,
    training: _Training | None,
) -> None:
    import jax.numpy as jnp
    from flax import nnx

    from rvit_jax import RViT
    from rvit_jax.checkpoint import describe_model, write_model

    model = RViT(config.model, rngs=nnx.Rngs(0))
    model.eval()
    mapping.load_into(model, mapping.to_flax(found.weights, config.model))
    description = describe_model(config, class_names)
    description.update(step=0, metrics=None, converted_from=_provenance(found, proof, why_not))
    arrays = {"params": nnx.to_pure_dict(nnx.state(model))}
    if training is not None:
        params = nnx.state(model, nnx.Param)
        state = _optimizer_state(training.adamw, config, params)
        step = jnp.asarray(training.adamw.step, jnp.int32)
        arrays["optimizer"] = {"step": step, "state": state}
        description.update(step=training.adamw.step, epoch=training.epoch)
    write_model(out_dir, arrays, description)


def _provenance(found: Recognised, proof: "Proof | None", why_not: str | None) -> dict[str, Any]:
    """What `model.json` says of the file that it came from."""
    parity: dict[str, Any] = {"proven": proof is not None}
    if proof is None:
        parity["reason"] = why_not
    else:
        parity.update(_as_json(dataclasses.asdict(proof)))
    return {
        "file": found.source.path.name,
        "kind": found.source.kind,
        "sha256": found.source.sha256,
        "names": {ours: theirs for ours, theirs in found.names.items() if ours != theirs},
        "evidence": {"num_heads": str(found.num_heads), "attention": str(found.attention)},
        "notes": list(found.notes),
        "parity": parity,
    }


def _as_json(value: Any) -> Any:
    """Infinite errors, of candidates with other shapes, become null."""
    if isinstance(value, dict):
        return {key: _as_json(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def to_torch(checkpoint: str | os.PathLike[str], out_file: str | os.PathLike[str]) -> Path:
    """Writes a checkpoint's weights as a state dict under the reference's names.

    Args:
        checkpoint: see `rvit_jax.load`.
        out_file: `.safetensors`, or one of `TORCH_ENDINGS`: what `torch.save` writes, which needs
            PyTorch.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: it cannot be read, PyTorch is missing, or the file has another ending.
        OSError: the file exists, or cannot be written.
    """
    out_file = Path(out_file)
    if out_file.exists():
        raise OSError(f"{out_file} exists: name another file, or remove it")
    if out_file.suffix not in (".safetensors", *TORCH_ENDINGS):
        raise ValueError(
            f"{out_file}: expected the ending {', '.join(TORCH_ENDINGS)} or .safetensors; ONNX and "
            "other formats are written by python -m rvit_jax.export"
        )
    encode = _safetensors_bytes if out_file.suffix == ".safetensors" else _torch_encoder()
    import rvit_jax
    from input_pipeline.files import written_aside

    loaded = rvit_jax.load(checkpoint)
    weights = mapping.to_torch(mapping.flatten(loaded.model.module), loaded.config.model)
    out_file.absolute().parent.mkdir(parents=True, exist_ok=True)
    with written_aside(out_file) as aside:
        aside.write_bytes(encode(weights, loaded.config.model))
    return out_file


# Both libraries can write files, but not say by the system's error why they could not.


def _safetensors_bytes(weights: Mapping[str, np.ndarray], config_model: ConfigDict) -> bytes:
    del config_model  # the format has an order of its own
    from safetensors.numpy import save

    return save(dict(weights))


def _torch_encoder() -> Callable[[Mapping[str, np.ndarray], ConfigDict], bytes]:
    try:
        import torch
    except ModuleNotFoundError as error:
        raise ValueError(
            f"a .pth file is written by PyTorch, which is not installed ({error}): pip install "
            "torch, or name a .safetensors file"
        ) from error

    from weights_converter.torch_rvit import TorchRViT

    def encode(weights: Mapping[str, np.ndarray], config_model: ConfigDict) -> bytes:
        # In the module's own order, by which an optimizer numbers the parameters.
        names = TorchRViT(config_model).state_dict()
        file = io.BytesIO()
        torch.save({name: torch.tensor(weights[name]) for name in names}, file)
        return file.getvalue()

    return encode
