"""Trains a small model for some steps, as one of any number of processes, and notes everything.

    python -m tests.many_processes DATA_DIR OUTPUT.npz --coordinator_address=localhost:12321 ...

The number of devices of each process is XLA's: --xla_force_host_platform_device_count=N.
"""

import argparse

import jax
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

import input_pipeline
from configs import base
from rvit_jax import distributed, losses, optimizer, sharding, steps
from rvit_jax.augment import make_augment
from rvit_jax.model import RViT

CLASSES = ("Swiping Left", "Swiping Right")
NUM_CLIPS = {"train": 152, "validation": 20, "test": 6}


def get_config(data_dir: str) -> ConfigDict:
    """Two drawn gestures, 16 a step; some tensors are large enough for `mesh.fsdp`."""
    config = base.get_config()
    config.model.update(
        image_size=16, patch_size=8, hidden_size=64, num_heads=4, mlp_dim=128, num_classes=2
    )
    config.dataset.update(
        name="gestures", data_dir=data_dir, classes=CLASSES, num_frames=4, frame_stride=8
    )
    config.dataset.generate.update(NUM_CLIPS)
    config.optimizer.schedule = "constant"
    config.batch_size = 16
    config.num_epochs = 2
    return config


def changed_at_random(config: ConfigDict) -> ConfigDict:
    """With every kind of change that is drawn for each clip alone."""
    augment = config.dataset.augment
    augment.update(horizontal_flip=0.5, mirror_classes="jester", scale_jitter=(0.8, 1.2))
    augment.random_erasing.probability = 0.5
    augment.colour_jitter.brightness = 0.4
    return config


def run(config: ConfigDict, num_steps: int) -> dict[str, np.ndarray]:
    """What came of it: ids [steps, B], losses [steps], the first gradient, the last parameters."""
    layout = sharding.make_layout(config)
    data = input_pipeline.get_dataset(config, "train", **distributed.part_of_batches())
    schedule = optimizer.learning_rate_schedule(config.optimizer, data.steps_per_epoch, 2)
    transformation = optimizer.make_optimizer(config.optimizer, schedule)
    model = RViT(config.model, rngs=nnx.Rngs(config.seed))
    graphdef, state = steps.create_train_state(model, transformation)
    state = layout.place(state)
    loss = losses.make_loss(config.loss)
    step = layout.compile_step(
        steps.make_train_step(
            graphdef,
            transformation,
            loss,
            seed=config.seed,
            ragged=False,
            augment=make_augment(config, data.class_names),
            accumulation_steps=config.optimizer.accumulation_steps,
            spread=layout.spread,
        )
    )
    gradient = layout.compile_whole(
        layout.spread(steps.make_gradient(graphdef, loss, ragged=False))
    )
    noted = {"id": [], "loss": []}
    gradients = None
    for _ in range(num_steps):
        batch = next(data)
        sent = layout.send(batch)
        if gradients is None:
            _, gradients = gradient(state.params, state.fixed, sent, jax.random.key(0))
            gradients = _on_host(gradients, "gradient")
        state, sums = step(state, sent)
        noted["loss"].append(float(sums["loss"] / sums["clips"]))
        noted["id"].append(distributed.gather_rows({"id": batch["id"]})["id"])
    params = _on_host(layout.gather(state.params), "params")
    return {**{key: np.array(value) for key, value in noted.items()}, **gradients, **params}


def _on_host(tree: nnx.State, name: str) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {f"{name}/{optimizer.path_string(path)}": np.asarray(leaf) for path, leaf in leaves}


def main() -> None:
    """Joins the other processes, if any; the first one writes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("data_dir")
    parser.add_argument("output")
    parser.add_argument("--coordinator_address")
    parser.add_argument("--num_processes", type=int, default=1)
    parser.add_argument("--process_id", type=int, default=0)
    parser.add_argument("--fsdp", type=int, default=1)
    parser.add_argument("--optimizer", default="sgd")
    parser.add_argument("--learning_rate", type=float, default=1e-2)
    parser.add_argument("--accumulation_steps", type=int, default=1)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    config = changed_at_random(get_config(options.data_dir))
    config.mesh.fsdp = options.fsdp
    config.optimizer.update(
        name=options.optimizer,
        learning_rate=options.learning_rate,
        accumulation_steps=options.accumulation_steps,
    )
    if options.num_processes > 1:
        rendezvous = distributed.Rendezvous(
            options.coordinator_address, options.num_processes, options.process_id
        )
        distributed.start(rendezvous, 300.0)
    noted = run(config, options.steps)
    if distributed.is_first():
        np.savez(options.output, **noted)
    distributed.finish()


if __name__ == "__main__":
    main()
