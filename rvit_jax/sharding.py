"""Where arrays lie on many devices, and how a training step is spread over them.

One mesh of two axes. The rows of a batch are spread over both, `data` and `fsdp`; large tensors of
the training state are cut in `fsdp` parts, all others are whole on every device. Inside the step
each device computes the gradient of its own rows, all frames, alone; then the gradients are summed
once. Left to the compiler, they were summed after every frame, on the way back through time.

With one device there is no mesh, and the step is what it is without this module.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.random import define_prng_impl
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from jaxtyping import Array
from ml_collections import ConfigDict

from rvit_jax import distributed
from rvit_jax.steps import Batch, Gradient, LossAndGradient, State

DATA, FSDP = "data", "fsdp"  # the axes of the mesh
ROWS = PartitionSpec((DATA, FSDP))  # of arrays whose first axis is the batch
# Tensors of fewer elements (16 KiB of float32) stay whole: a message costs more than they do.
MIN_CUT_ELEMENTS = 2**12
DEVICE_KEYS = ("video", "label", "num_frames", "mask")  # of a batch; ids stay on the host


def make_layout(config: ConfigDict, *, min_cut_elements: int = MIN_CUT_ELEMENTS) -> "Layout":
    """The devices that `config.mesh` asks for, in an order that all processes share.

    Args:
        config: the whole config; `mesh.data`, `mesh.fsdp`, `batch_size` and
            `optimizer.accumulation_steps` are read.
        min_cut_elements: tensors of the state with fewer stay whole.

    Raises:
        ValueError: there are not so many devices, or they do not divide the batch.
    """
    data, fsdp = config.mesh.data, config.mesh.fsdp
    # Process by process, as the rows of a batch come.
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    available, processes = len(devices), jax.process_count()
    if data == -1:
        data = max(1, available // fsdp)
    wanted = data * fsdp
    if wanted > available or wanted % processes:
        among = f" in {processes} processes, each of which takes part equally" * (processes > 1)
        raise ValueError(
            f"config.mesh asks for data={data} x fsdp={fsdp} devices, but there are {available}"
            f"{among}: set config.mesh.fsdp to a divisor of {available}, and config.mesh.data=-1 "
            "for all that are left"
        )
    if config.batch_size % wanted:
        raise ValueError(
            f"config.batch_size={config.batch_size} does not divide among {wanted} devices: make "
            f"it a multiple of {wanted}, such as {-(-config.batch_size // wanted) * wanted}"
            + (", or set config.mesh.data to use fewer" if processes == 1 else "")
        )
    each = wanted // processes
    devices = [
        device
        for process in range(processes)
        for device in [d for d in devices if d.process_index == process][:each]
    ]
    if wanted == 1:
        return Layout(None, devices[0], min_cut_elements)
    return Layout(Mesh(np.array(devices).reshape(data, fsdp), (DATA, FSDP)), None, min_cut_elements)


def check_accumulation(config: ConfigDict, layout: "Layout") -> None:
    """Raises ValueError where a device's rows do not divide in the parts of a step."""
    parts, rows = config.optimizer.accumulation_steps, config.batch_size // layout.num_devices
    if rows % parts:
        raise ValueError(
            f"config.optimizer.accumulation_steps={parts} does not divide the {rows} clips that "
            f"each of {layout.num_devices} devices gets of config.batch_size={config.batch_size}: "
            f"make batch_size a multiple of {parts * layout.num_devices}"
        )


@dataclasses.dataclass(frozen=True)
class Layout:
    """Devices, and what lies where on them.

    Attributes:
        mesh: `data` x `fsdp` devices; None with one.
        device: the one device, where there is no mesh.
        min_cut_elements: see `make_layout`.
    """

    mesh: Mesh | None
    device: jax.Device | None
    min_cut_elements: int = MIN_CUT_ELEMENTS

    @property
    def num_devices(self) -> int:
        """Over all processes."""
        return 1 if self.mesh is None else self.mesh.size

    @property
    def fsdp(self) -> int:
        """In how many parts large tensors of the state are cut."""
        return 1 if self.mesh is None else self.mesh.shape[FSDP]

    @property
    def whole(self) -> Sharding:
        """Of what every device holds whole."""
        return self._sharding(PartitionSpec())

    @property
    def rows(self) -> Sharding:
        """Of arrays whose rows, their first axis, are spread over all devices."""
        return self._sharding(ROWS)

    def _sharding(self, spec: PartitionSpec) -> Sharding:
        if self.mesh is None:
            return SingleDeviceSharding(self.device)
        return NamedSharding(self.mesh, spec)

    def spec(self, array: Any) -> PartitionSpec:
        """How a tensor of the state is cut: along its longest axis that `fsdp` divides, if any."""
        shape = np.shape(array)
        axes = [axis for axis, size in enumerate(shape) if size % self.fsdp == 0]
        if self.fsdp == 1 or not axes or np.prod(shape) < self.min_cut_elements:
            return PartitionSpec()
        longest = max(axes, key=lambda axis: shape[axis])
        return PartitionSpec(*[None] * longest, FSDP)

    def place(self, state: Any, *, whole: bool = False) -> Any:
        """A state that every process has, on the devices.

        Args:
            state: a tree of arrays on the host or on one device, equal in all processes.
            whole: every device holds all of it, also what is large.
        """

        def put(array: Any) -> Array:
            sharding = self.whole if whole else self._sharding(self.spec(array))
            if jax.process_count() == 1:
                return jax.device_put(array, sharding)
            host = np.asarray(array)  # device_put would not take what is committed to a device
            return jax.make_array_from_callback(host.shape, sharding, lambda part: host[part])

        return jax.tree.map(put, state)

    def compile_step(self, train_step: Callable[..., tuple[Any, Any]]) -> Callable[..., Any]:
        """A training step, compiled; its state stays where `place` put it, and is taken over."""
        if self.mesh is None:
            return jax.jit(train_step, donate_argnums=0)

        @functools.wraps(train_step)
        def step(state: Any, batch: Any) -> tuple[Any, Any]:
            state, sums = train_step(state, batch)
            return jax.tree.map(
                lambda x: jax.lax.with_sharding_constraint(x, self._sharding(self.spec(x))), state
            ), sums

        return _begin_together(jax.jit(step, donate_argnums=0))

    def compile_whole(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function of arrays on the devices, compiled; what it gives is whole on every one."""
        return _begin_together(jax.jit(function, out_shardings=self.whole))

    def gather(self, params: State) -> State:
        """Parameters whole on every device, as an evaluation reads them batch by batch."""
        if self.fsdp == 1:
            return params
        return jax.jit(lambda tree: tree, out_shardings=self.whole)(params)

    def send(self, batch: dict[str, np.ndarray]) -> dict[str, Array]:
        """The arrays of a batch on the devices, of this process's rows and all the others'."""
        arrays = {key: batch[key] for key in DEVICE_KEYS}
        if jax.process_count() == 1:
            return jax.device_put(arrays, self.rows)
        return {
            key: jax.make_array_from_process_local_data(self.rows, rows)
            for key, rows in arrays.items()
        }

    def total(self, number: int) -> int | Array:
        """The sum of a number over the processes; an array, so that nobody waits for it here."""
        if jax.process_count() == 1:
            return number
        assert self.mesh is not None  # several processes have a device each
        local = len(self.mesh.local_devices)
        parts = np.zeros(local, np.int32)
        parts[0] = number
        return _sum(self.whole)(jax.make_array_from_process_local_data(self.rows, parts))

    def spread(self, gradient: Gradient) -> Gradient:
        """The same gradient, each device computing that of its rows; summed once, at the end.

        Large parameters are gathered before, once a step, since every frame needs every layer, and
        their gradient is summed to where each part lies. Random numbers drawn per row are those
        that one device would draw, see `_OF_PART`.
        """
        if self.mesh is None:
            return gradient

        def of_all(params: State, fixed: State, batch: Batch, key: Array) -> LossAndGradient:
            _check_key(key)
            specs, fixed_specs = (jax.tree.map(self.spec, tree) for tree in (params, fixed))

            def of_part(params: State, fixed: State, batch: Batch, key: Array) -> LossAndGradient:
                key = _key_of_part(key, jax.lax.axis_index((DATA, FSDP)))
                params, fixed = (
                    jax.tree.map(_gather_part, tree, spec)
                    for tree, spec in ((params, specs), (fixed, fixed_specs))
                )
                (loss, right), grads = gradient(params, fixed, batch, key)
                # The loss is a mean over the part's real clips, that of all weighs the parts.
                clips = batch["mask"].astype(jnp.float32).sum()
                loss, right, num_clips = jax.lax.psum((loss * clips, right, clips), (DATA, FSDP))
                num_clips = jnp.maximum(num_clips, 1.0)
                grads = jax.tree.map(
                    lambda g, s: _sum_part(g * (clips / num_clips), s), grads, specs
                )
                return (loss / num_clips, right), grads

            return jax.shard_map(
                of_part,
                mesh=self.mesh,
                in_specs=(specs, fixed_specs, ROWS, PartitionSpec()),
                out_specs=((PartitionSpec(), PartitionSpec()), specs),
                check_vma=False,  # or each frame's use of the parameters is summed on its own
            )(params, fixed, batch, key)

        return of_all


def _begin_together(function: Any) -> Callable[..., Any]:
    """The compiled function; of several processes none runs it before all have compiled it.

    Else those that are done first may give up waiting for the others (on CPUs after 30 s). It is
    compiled anew for batches of another length, which come to all processes at the same step.
    """
    if jax.process_count() == 1:
        return function
    compiled: dict[tuple[tuple[int, ...], ...], Callable[..., Any]] = {}

    def call(*arguments: Any) -> Any:
        shapes = tuple(jnp.shape(leaf) for leaf in jax.tree.leaves(arguments))
        if shapes not in compiled:
            compiled[shapes] = function.lower(*arguments).compile()
            distributed.wait("compiled")
        return compiled[shapes](*arguments)

    return call


@functools.cache
def _sum(sharding: Sharding) -> Callable[[Array], Array]:
    return jax.jit(jnp.sum, out_shardings=sharding)


def _gather_part(array: Array, spec: PartitionSpec) -> Array:
    if FSDP not in spec:
        return array
    return jax.lax.all_gather(array, FSDP, axis=spec.index(FSDP), tiled=True)


def _sum_part(array: Array, spec: PartitionSpec) -> Array:
    if FSDP not in spec:
        return jax.lax.psum(array, (DATA, FSDP))
    part = jax.lax.psum_scatter(array, FSDP, scatter_dimension=spec.index(FSDP), tiled=True)
    return jax.lax.psum(part, DATA)


# ---- random numbers ----
#
# Dropout draws number n of an array from the key and n alone (`layers.random_uint16`). A device
# that holds the rows of part p begins counting at p times what it draws: together they draw what
# one device would, so that dropout does not depend on their number. The key of a part is a Threefry
# key and p; it can be split and folded, and nothing but dropout can draw with it.


def _check_key(key: Array) -> None:
    options: Any = jax.config  # which gets its attributes at run time
    if jax.random.key_impl(key) != "threefry2x32" or not options.jax_threefry_partitionable:
        raise ValueError(
            "several devices draw the same random numbers as one with JAX's own Threefry alone: "
            "leave jax_default_prng_impl and jax_threefry_partitionable as they are"
        )


def _key_of_part(key: Array, part: Array) -> Array:
    data = jnp.append(jax.random.key_data(key), part.astype(jnp.uint32))
    return jax.random.wrap_key_data(data, impl=_OF_PART)


def _plain(data: Array) -> Array:
    return jax.random.wrap_key_data(data[:2], impl="threefry2x32")


def _with_part(keys: Array, data: Array) -> Array:
    keys = jax.random.key_data(keys)
    part = jnp.broadcast_to(data[2], (*keys.shape[:-1], 1))
    return jnp.concatenate([keys, part], axis=-1)


def _split(data: Array, shape: tuple[int, ...]) -> Array:
    return _with_part(jax.random.split(_plain(data), shape), data)


def _fold_in(data: Array, number: Array | int) -> Array:
    return _with_part(jax.random.fold_in(_plain(data), number), data)


def _seed(seed: Array) -> Array:
    raise NotImplementedError("keys of parts are made by `_key_of_part` alone")


def _random_bits(data: Array, bit_width: int, shape: tuple[int, ...]) -> Array:
    raise NotImplementedError("within a step on several devices draw with layers.random_uint16")


_OF_PART = define_prng_impl(
    key_shape=(3,),
    seed=_seed,
    split=_split,
    random_bits=_random_bits,
    fold_in=_fold_in,
    name="threefry_of_part",
    tag="part",
)
