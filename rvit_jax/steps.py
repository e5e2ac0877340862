"""One training step and one evaluation step: pure functions of arrays, compiled by the caller."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx, struct
from jaxtyping import Array

from rvit_jax.augment import Augment
from rvit_jax.layers import in_float32
from rvit_jax.model import RViT

State = nnx.State[Any, Any]  # a model's variables, or a gradient or an average of them
Batch = dict[str, Array]  # video [B,T,H,W,3], label [B], num_frames [B], mask [B]
# (params, fixed, batch, key) -> ((loss, right), gradient), see `make_gradient`
LossAndGradient = tuple[tuple[Array, Array], State]
Gradient = Callable[[State, State, Batch, Array], LossAndGradient]


@struct.dataclass
class TrainState:
    """All that a step changes.

    Attributes:
        step: updates made so far.
        params: what is trained.
        fixed: the model's other variables (unused re-attention parameters).
        opt_state: the optimizer's.
        halted: an update was refused and no other is made; never saved, see `make_train_step`.
        ema: the moving average of `params`; None without one.
    """

    step: Array
    params: State
    fixed: State
    opt_state: optax.OptState
    halted: Array
    ema: State | None = None


def create_train_state(
    model: RViT, optimizer: optax.GradientTransformation, *, ema: bool = False
) -> tuple[nnx.GraphDef[RViT], TrainState]:
    """Splits a model into its structure, in training mode, and the state of step 0.

    With `ema` the state holds a moving average too. It begins as a copy of the parameters, so
    that it needs no correction for a beginning at zero.
    """
    model.train()
    graphdef, params, *(fixed,) = nnx.split(model, nnx.Param, ...)
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        fixed=fixed,
        opt_state=optimizer.init(params),
        halted=jnp.zeros((), bool),
        ema=begin_average(params) if ema else None,
    )
    return graphdef, state


def begin_average(params: State) -> State:
    """The moving average before the first step: a copy, in float32, since its steps are small."""
    return jax.tree.map(lambda x: jnp.copy(in_float32(x)), params)


def make_train_step(
    graphdef: nnx.GraphDef[RViT],
    optimizer: optax.GradientTransformation,
    loss_per_clip: Callable[[Array, Array], Array],
    *,
    seed: int,
    ragged: bool,
    augment: Augment | None = None,
    accumulation_steps: int = 1,
    ema_decay: float = 0.0,
    halt: bool = True,
    spread: Callable[[Gradient], Gradient] = lambda gradient: gradient,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]:
    """The function (state, batch) -> (state, sums over the batch's real clips).

    An update whose loss or gradient is not finite is refused: parameters, optimizer and average
    stay as they were, and `step` goes on. With `halt` all later ones are refused too, so that who
    looks at the sums much later still finds the parameters from before.

    Dropout is a function of `seed` and the step alone, so that a resumed run draws the same; with
    accumulation each part draws with a key of its own, the step's folded with the part's number.

    Args:
        graphdef: from `create_train_state`.
        optimizer: see `rvit_jax.optimizer`.
        loss_per_clip: see `rvit_jax.losses`.
        seed: of the dropout.
        ragged: clips differ in `num_frames`; False spares the masking of each frame.
        augment: changes the batch's clips and labels, see `rvit_jax.augment`. It sees the whole
            batch: partners of mixup and cutmix come from any part.
        accumulation_steps: equal parts that a batch is processed in, see `make_gradient`.
        ema_decay: of the state's average, in [0, 1); 0: the state has none.
        halt: refuse every update after the first one that is refused.
        spread: makes of the gradient's function that of many devices, see `sharding.Layout.spread`.
    """
    gradient = spread(
        make_gradient(graphdef, loss_per_clip, ragged=ragged, accumulation_steps=accumulation_steps)
    )

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        if augment is not None:
            video, label = augment(
                key, batch["video"], batch["label"], batch["mask"], batch["num_frames"]
            )
            batch = {**batch, "video": jnp.asarray(video), "label": jnp.asarray(label)}
        (loss, right), grads = gradient(state.params, state.fixed, batch, key)
        grad_norm = optax.tree.norm(grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        new = dataclasses.replace(state, params=params, opt_state=opt_state)
        if ema_decay:
            ema = optax.incremental_update(params, state.ema, 1.0 - ema_decay)
            new = dataclasses.replace(new, ema=ema)
        applied = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & ~state.halted
        new = jax.tree.map(lambda after, before: jnp.where(applied, after, before), new, state)
        num_clips = batch["mask"].astype(jnp.float32).sum()
        sums = {
            "clips": num_clips,
            "loss": loss * num_clips,
            "right": right,
            "grad_norm": grad_norm,
        }
        halted = ~applied if halt else state.halted
        return dataclasses.replace(new, step=state.step + 1, halted=halted), sums

    return train_step


def make_gradient(
    graphdef: nnx.GraphDef[RViT],
    loss_per_clip: Callable[[Array, Array], Array],
    *,
    ragged: bool,
    accumulation_steps: int = 1,
) -> Gradient:
    """The function (params, fixed, batch, key) -> ((loss, right), gradient).

    Loss and gradient are those of the mean over the real clips of the whole batch, also where
    `accumulation_steps` parts of it are processed one after the other, in the memory of one: each
    part adds its clips' share of the one mean. `right` counts right answers.

    Part p holds the rows p, p + n, p + 2n, ... of n parts: rows that lie together on a device stay
    there, and padding, which is at the batch's end, is spread over the parts.
    """

    def of_part(
        params: State, fixed: State, part: Batch, num_clips: Array, key: Array
    ) -> LossAndGradient:
        mask = part["mask"].astype(jnp.float32)

        def mean_loss(params: State) -> tuple[Array, Array]:
            model = nnx.merge(graphdef, params, fixed)
            num_frames = part["num_frames"] if ragged else None
            logits, _ = model(part["video"], num_frames=num_frames, rngs=key)
            losses = loss_per_clip(logits, part["label"])
            return (losses * mask).sum() / jnp.maximum(num_clips, 1.0), logits

        (loss, logits), grads = jax.value_and_grad(mean_loss, has_aux=True)(params)
        return (loss, (_is_right(logits, part["label"]) * mask).sum()), grads

    def gradient(params: State, fixed: State, batch: Batch, key: Array) -> LossAndGradient:
        # In float32 whatever the parameters' type, so that frames' gradients are summed so.
        params = jax.tree.map(in_float32, params)
        num_clips = batch["mask"].astype(jnp.float32).sum()
        if accumulation_steps == 1:
            return of_part(params, fixed, batch, num_clips, key)

        def split(rows: Array) -> Array:
            return jnp.moveaxis(rows.reshape(-1, accumulation_steps, *rows.shape[1:]), 1, 0)

        def add_part(
            total: LossAndGradient, inputs: tuple[Array, Batch]
        ) -> tuple[LossAndGradient, None]:
            index, part = inputs
            one = of_part(params, fixed, part, num_clips, jax.random.fold_in(key, index))
            return jax.tree.map(jnp.add, total, one), None

        parts = (jnp.arange(accumulation_steps), jax.tree.map(split, batch))
        first = jax.tree.map(lambda x: x[0], parts[1])
        like = jax.eval_shape(of_part, params, fixed, first, num_clips, key)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
        return jax.lax.scan(add_part, zeros, parts)[0]

    return gradient


def _is_right(logits: Array, label: Array) -> Array:
    """Whether the likeliest class is the clip's; of several or mixed ones, the heaviest, [B]."""
    best = logits.argmax(-1)
    if label.ndim == 1:
        return best == label
    weight = jnp.take_along_axis(label, best[:, None], axis=-1)[:, 0]
    return (weight == label.max(-1)) & (weight > 0)


def make_eval_step(
    graphdef: nnx.GraphDef[RViT],
    loss_per_clip: Callable[[Array, Array], Array],
    *,
    ragged: bool,
    multi_label: bool = False,
) -> Callable[[State, State, Batch], tuple[Array, Array]]:
    """The function (params, fixed, batch) -> (logits [B, K], loss [B]), without dropout.

    `graphdef` may be of a model in either mode. With several views of each clip, `video`
    [B, V, T, H, W, 3], the probabilities are averaged, and the logits are those of that.
    """

    def eval_step(params: State, fixed: State, batch: Batch) -> tuple[Array, Array]:
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
    graphdef: nnx.GraphDef[RViT], loss_per_clip: Callable[[Array, Array], Array]
) -> Callable[[State, State, Batch], tuple[Array, Array]]:
    """The function (params, fixed, batch) -> (logits after every frame [B, T, K], loss [B]).

    The loss is that of the answer after each clip's last real frame. Later answers mean nothing.
    """

    def anytime_step(params: State, fixed: State, batch: Batch) -> tuple[Array, Array]:
        model = _merge(graphdef, params, fixed)
        video = batch["video"]

        def read_frame(hidden: Array, frame: Array) -> tuple[Array, Array]:
            logits, hidden = model.step(frame, hidden)
            return hidden, logits

        hidden = model.initial_hidden(video.shape[0])
        _, logits = jax.lax.scan(read_frame, hidden, jnp.moveaxis(video, 1, 0))
        logits = jnp.moveaxis(logits, 0, 1)  # [B, T, K]
        last = jnp.take_along_axis(logits, batch["num_frames"][:, None, None] - 1, axis=1)[:, 0]
        return logits, _loss(loss_per_clip, last, batch)

    return anytime_step


def _merge(graphdef: nnx.GraphDef[RViT], params: State, fixed: State) -> RViT:
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
