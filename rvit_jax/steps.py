"""One training step and one evaluation step: pure functions of arrays, compiled by the caller."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx, struct
from jaxtyping import Array

from rvit_jax.augment import Augment
from rvit_jax.model import RViT

Batch = dict[str, Array]  # video [B,T,H,W,3], label [B], num_frames [B], mask [B]


@struct.dataclass
class TrainState:
    """All that a step changes.

    Attributes:
        step: updates made so far.
        params: what is trained.
        fixed: the model's other variables (unused re-attention parameters).
        opt_state: the optimizer's.
    """

    step: Array
    params: nnx.State
    fixed: nnx.State
    opt_state: optax.OptState


def create_train_state(
    model: RViT, optimizer: optax.GradientTransformation
) -> tuple[nnx.GraphDef, TrainState]:
    """Splits a model into its structure, in training mode, and the state of step 0."""
    model.train()
    graphdef, params, fixed = nnx.split(model, nnx.Param, ...)
    opt_state = optimizer.init(params)
    return graphdef, TrainState(jnp.zeros((), jnp.int32), params, fixed, opt_state)


def make_train_step(
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    loss_per_clip: Callable[[Array, Array], Array],
    *,
    seed: int,
    ragged: bool,
    augment: Augment | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]:
    """The function (state, batch) -> (state, sums over the batch's real clips).

    Dropout is a function of `seed` and the step alone, so that a resumed run draws the same.

    Args:
        graphdef: from `create_train_state`.
        optimizer: see `rvit_jax.optimizer`.
        loss_per_clip: see `rvit_jax.losses`.
        seed: of the dropout.
        ragged: clips differ in `num_frames`; False spares the masking of each frame.
        augment: changes the batch's clips and labels, see `rvit_jax.augment`.
    """

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        mask = batch["mask"].astype(jnp.float32)
        num_clips = mask.sum()
        video, label = batch["video"], batch["label"]
        if augment is not None:
            video, label = augment(key, video, label, batch["mask"], batch["num_frames"])

        def mean_loss(params: nnx.State) -> tuple[Array, Array]:
            model = nnx.merge(graphdef, params, state.fixed)
            num_frames = batch["num_frames"] if ragged else None
            logits, _ = model(video, num_frames=num_frames, rngs=key)
            losses = loss_per_clip(logits, label)
            return (losses * mask).sum() / jnp.maximum(num_clips, 1.0), logits

        (loss, logits), grads = jax.value_and_grad(mean_loss, has_aux=True)(state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        sums = {
            "clips": num_clips,
            "loss": loss * num_clips,
            "right": (_is_right(logits, label) * mask).sum(),
            "grad_norm": optax.tree.norm(grads),
        }
        return state.replace(step=state.step + 1, params=params, opt_state=opt_state), sums

    return train_step


def _is_right(logits: Array, label: Array) -> Array:
    """Whether the likeliest class is the clip's; of several or mixed ones, the heaviest, [B]."""
    best = logits.argmax(-1)
    if label.ndim == 1:
        return best == label
    weight = jnp.take_along_axis(label, best[:, None], axis=-1)[:, 0]
    return (weight == label.max(-1)) & (weight > 0)


def make_eval_step(
    graphdef: nnx.GraphDef,
    loss_per_clip: Callable[[Array, Array], Array],
    *,
    ragged: bool,
    multi_label: bool = False,
) -> Callable[[nnx.State, nnx.State, Batch], tuple[Array, Array]]:
    """The function (params, fixed, batch) -> (logits [B, K], loss [B]), without dropout.

    `graphdef` may be of a model in either mode. With several views of each clip, `video`
    [B, V, T, H, W, 3], the probabilities are averaged, and the logits are those of that.
    """

    def eval_step(params: nnx.State, fixed: nnx.State, batch: Batch) -> tuple[Array, Array]:
        model = _merge(graphdef, params, fixed)
        video, num_frames = batch["video"], batch["num_frames"]
        views = video.shape[1:-4]  # () or (V,)
        if views:  # each is a clip to the model
            video, num_frames = (x.reshape(-1, *x.shape[2:]) for x in (video, num_frames))
        logits, _ = model(video, num_frames=num_frames if ragged else None)
        if views:
            logits = _average(logits.reshape(-1, *views, logits.shape[-1]), multi_label)
        return logits, _loss(loss_per_clip, logits, batch, multi_label)

    return eval_step


def make_anytime_step(
    graphdef: nnx.GraphDef, loss_per_clip: Callable[[Array, Array], Array]
) -> Callable[[nnx.State, nnx.State, Batch], tuple[Array, Array]]:
    """The function (params, fixed, batch) -> (logits after every frame [B, T, K], loss [B]).

    The loss is that of the answer after each clip's last real frame. Later answers mean nothing.
    """

    def anytime_step(params: nnx.State, fixed: nnx.State, batch: Batch) -> tuple[Array, Array]:
        model = _merge(graphdef, params, fixed)
        video = batch["video"]

        def read_frame(hidden, frame):
            logits, hidden = model.step(frame, hidden)
            return hidden, logits

        hidden = model.initial_hidden(video.shape[0])
        _, logits = jax.lax.scan(read_frame, hidden, jnp.moveaxis(video, 1, 0))
        logits = jnp.moveaxis(logits, 0, 1)  # [B, T, K]
        last = jnp.take_along_axis(logits, batch["num_frames"][:, None, None] - 1, axis=1)[:, 0]
        return logits, _loss(loss_per_clip, last, batch)

    return anytime_step


def _merge(graphdef: nnx.GraphDef, params: nnx.State, fixed: nnx.State) -> RViT:
    model = nnx.merge(graphdef, params, fixed)
    model.eval()
    return model


def _average(logits: Array, multi_label: bool) -> Array:
    """The logits [B, K] of the mean over the views of the probabilities of logits [B, V, K].

    In logarithms throughout: a probability of 1 in float32 would become an infinite logit.
    """
    if multi_label:
        yes, no = (jax.nn.logsumexp(jax.nn.log_sigmoid(s * logits), axis=1) for s in (1, -1))
        return yes - no
    log_probabilities = jax.nn.log_softmax(logits, axis=-1)
    return jax.nn.logsumexp(log_probabilities, axis=1) - math.log(logits.shape[1])


def _loss(
    loss_per_clip: Callable[[Array, Array], Array],
    logits: Array,
    batch: Batch,
    multi_label: bool = False,
) -> Array:
    # A split without labels says -1, for which the loss means nothing and is not read.
    label = jnp.maximum(batch["label"], 0)
    if multi_label and label.ndim == 1:
        label = jnp.zeros_like(logits)
    return loss_per_clip(logits, label)
