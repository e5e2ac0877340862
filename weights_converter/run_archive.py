"""Runs a TorchScript file, which the user trusts, in a process of its own.

    python -m weights_converter.run_archive FILE REQUEST.json OUT_DIR

The caller sets a time limit and kills the process. What the file computes comes back as `.npy`
files and one `result.json`, written last.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from input_pipeline.cpus import num_cpus
from input_pipeline.watch import end_with_parent

SEED = 0  # of the clips
ROOTS = ("pos_embedding", "_cls", "_seq")  # the reference's parameters outside any submodule


def seeded_clips(num_clips: int, num_frames: int, side: int) -> np.ndarray:
    """The clips that a file is tried on: float32 [B, T, H, W, 3] in [-1, 1]."""
    shape = (num_clips, num_frames, side, side, 3)
    return np.random.default_rng(SEED).uniform(-1.0, 1.0, shape).astype(np.float32)


def for_torch(video: np.ndarray) -> Tensor:
    """[B, T, H, W, 3] -> [B*T, 3, H, W], clip by clip."""
    return torch.from_numpy(np.ascontiguousarray(video)).permute(0, 1, 4, 2, 3).flatten(0, 1)


def run_whole(module: Any, request: dict[str, Any], out: Path) -> dict[str, Any]:
    """Feeds clips until the file accepts a batch.

    Args:
        module: the loaded file.
        request: `attempts` ([[B, T], ...]), `image_size`, `state` ([L, N, D]).
        out: folder for `logits.npy` and, where the file returns more, `second.npy`.

    Returns:
        `accepted` ([B, T] or None), `refused` ([[B, T, reason], ...]), `dtype` of its weights.
    """
    dtype = next(module.parameters()).dtype
    dtype_name = str(dtype).removeprefix("torch.")
    num_layers, patches, hidden_size = request["state"]
    accepted, refused = None, []
    for batch, frames in request["attempts"]:
        video = for_torch(seeded_clips(batch, frames, request["image_size"])).to(dtype)
        state = torch.zeros(num_layers, batch, patches, hidden_size, dtype=dtype)
        try:
            with torch.no_grad():
                outputs = tensors_of(module(video, state))
        except Exception as error:  # TorchScript raises many kinds
            refused.append([batch, frames, last_line(error)])
            continue
        if not outputs:
            refused.append([batch, frames, "it returned no tensor"])
            continue
        for name, tensor in zip(("logits", "second"), outputs, strict=False):
            np.save(out / f"{name}.npy", tensor.double().numpy())
        accepted = [batch, frames]
        break
    return {"accepted": accepted, "refused": refused, "dtype": dtype_name}


def tensors_of(outputs: Any) -> list[Tensor]:
    """A file's outputs; a list of equal tensors (a state per layer) becomes one."""
    tensors = []
    for output in outputs if isinstance(outputs, tuple) else [outputs]:
        if isinstance(output, Tensor):
            tensors.append(output)
        elif isinstance(output, list | tuple) and len({t.shape for t in output}) == 1:
            tensors.append(torch.stack(list(output)))
    return tensors


def run_parts(
    module: Any, names: dict[str, str], reading: dict[str, Any], video: np.ndarray
) -> dict[str, np.ndarray]:
    """Drives a module's parts by hand over the frames of a clip.

    Args:
        module: TorchScript or `TorchRViT`; its parts are called with and give [B, S, D].
        names: the reference's root parameter names -> the module's.
        reading: `readout`, `state_keeps_positions` and `learned_hidden_token` of `config.model`.
        video: [B, T, H, W, 3].

    Returns:
        By part: `embedding` [T, B, N, D]; for each layer, over the frames, `layers.{l}.state` and
        `layers.{l}.output` [T, B, S, D]; `read-out`, the logits [B, K].
    """
    dtype = next(module.parameters()).dtype
    roots = {ours: getattr(module, names.get(ours, ours)) for ours in ROOTS}
    positions, first = roots["pos_embedding"], roots["_seq"]
    batch, frames = video.shape[:2]
    patches, hidden_size = positions.shape[1] - 1, positions.shape[2]
    blocks = [getattr(layer, "0") for _, layer in sorted_children(module.transformer.layers)]
    parts: dict[str, list[Tensor]] = {"embedding": []}
    with torch.no_grad():
        hidden = [
            torch.cat(
                [token.expand(batch, -1, -1), token.new_zeros(batch, patches, hidden_size)], 1
            )
            for token in (first if reading["learned_hidden_token"] else torch.zeros_like(first))
        ]
        for t in range(frames):
            frame = for_torch(video[:, t : t + 1]).to(dtype)
            embedded = module.embedding(frame).flatten(2).transpose(1, 2)
            parts["embedding"].append(embedded)
            x = torch.cat([roots["_cls"].expand(batch, -1, -1), embedded], 1)
            for index, block in enumerate(blocks):
                x, state = block(x + positions, hidden[index] + positions)
                hidden[index] = state if reading["state_keeps_positions"] else state - positions
                parts.setdefault(f"layers.{index}.state", []).append(hidden[index])
                parts.setdefault(f"layers.{index}.output", []).append(x)
        tokens = [x[:, 0]]
        if reading["readout"] == "class_and_hidden_tokens":
            tokens += [state[:, 0] for state in hidden]
        head = module.fc if hasattr(module, "fc") else module.classifier
        read_out = head(torch.cat(tokens, -1))
    arrays = {name: torch.stack(tensors).double().numpy() for name, tensors in parts.items()}
    return {**arrays, "read-out": read_out.double().numpy()}


def sorted_children(layers: Any) -> list[tuple[int, Any]]:
    """A module list's entries by number."""
    return sorted((int(name), child) for name, child in layers.named_children())


def last_line(error: BaseException) -> str:
    """TorchScript's messages end with what went wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__


def share_cpus() -> None:
    """Gives PyTorch half the CPUs: its threads wait busily, in the way of whatever else runs."""
    torch.set_num_threads(max(1, num_cpus() // 2))


def main(file: str, request_file: str, out: str) -> None:
    """Loads the file, does what the request asks, writes the result."""
    end_with_parent(os.getppid())  # a file that loops for ever must not outlive a killed caller
    share_cpus()
    folder = Path(out)
    request = json.loads(Path(request_file).read_text())
    result: dict[str, Any]
    try:
        module = torch.jit.load(file, map_location="cpu")
        module.eval()
    except Exception as error:
        result = {"failed": f"it cannot be loaded: {last_line(error)}"}
    else:
        if request["what"] == "whole":
            result = run_whole(module, request, folder)
        else:
            batch, frames = request["clips"]
            video = seeded_clips(batch, frames, request["image_size"])
            try:
                parts = run_parts(module, request["names"], request["reading"], video)
            except Exception as error:
                result = {"failed": f"its parts cannot be called one by one: {last_line(error)}"}
            else:
                for index, array in enumerate(parts.values()):
                    np.save(folder / f"part_{index}.npy", array)
                result = {"parts": list(parts)}
    (folder / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
