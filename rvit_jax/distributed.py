"""Several processes, on one machine or many, that train one model together.

Each has some of the devices and reads its rows of every batch. The first one speaks and writes;
checkpoints are written by all. One that fails leaves at once, without waiting for the others: they
find their connection to it closed, and leave too.
"""

import contextlib
import dataclasses
import io
import json
import os
import socket
import sys
import threading
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn, TypedDict

import numpy as np

# After so long without a sign of life a process counts as dead. Most deaths are known at once, by
# their closed connections; a machine that lost its network or its power says nothing.
HEARTBEAT_S = 60
_SHUTDOWN_S = 60
# What JAX's and Orbax's errors say when another process has gone.
_LOST = (
    "Gloo",
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Socket closed",
    "heartbeat timeout",
    "UNAVAILABLE",
    "DEADLINE_EXCEEDED",
    "ABORTED",
)
_LOOPBACK = ("localhost", "127.0.0.1", "::1", "[::1]")


@dataclasses.dataclass(frozen=True)
class Rendezvous:
    """Where the processes of a run meet. What is None, JAX asks the cluster.

    Attributes:
        coordinator_address: HOST:PORT of process 0.
        num_processes: of the run.
        process_id: of this one, from 0.
        bind_address: HOST:PORT where process 0 listens; by default `coordinator_address`.
    """

    coordinator_address: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    bind_address: str | None = None


def find_rendezvous(
    *,
    coordinator_address: str | None,
    num_processes: int | None,
    process_id: int | None,
    detect: bool | None,
    environ: Mapping[str, str] = os.environ,
) -> Rendezvous | None:
    """What the command line, the environment or a launcher says; None for a run of one process.

    Several tasks under `srun` or `mpirun` are one run, unless `detect` is False: as so many runs
    they would write over each other. Elsewhere (Kubernetes, TPU pods) JAX's detection asks a
    server, and is used with `detect=True` alone.

    Raises:
        ValueError: some of the three are given and some are not, or one cannot be.
    """
    names = ("coordinator_address", "num_processes", "process_id")
    given = dict(zip(names, (coordinator_address, num_processes, process_id), strict=True))
    if detect is False:
        if any(value is not None for value in given.values()):
            raise ValueError("--nodistributed contradicts the flags of a run of several processes")
        return None
    for name in names:
        if given[name] is None:
            given[name] = environ.get(f"JAX_{name.upper()}") or None
    missing = [name for name in names if given[name] is None]
    if len(missing) == 3 and not detect and _tasks(environ) == 1:
        return None
    if missing and not detect and _tasks(environ) == 1:
        raise ValueError(
            f"--{missing[0]} is missing: a run of several processes needs --coordinator_address="
            "HOST:PORT, --num_processes=N and --process_id=I together (or JAX_COORDINATOR_ADDRESS, "
            "JAX_NUM_PROCESSES and JAX_PROCESS_ID in the environment)"
        )
    address, total, index = _checked(given)
    if total == 1:
        return None
    return Rendezvous(address, total, index, environ.get("JAX_COORDINATOR_BIND_ADDRESS"))


def _tasks(environ: Mapping[str, str]) -> int:
    """Tasks that `srun` or `mpirun` started together with this one.

    SLURM_NTASKS will not do: it stands in a batch script too, which runs once.
    """
    for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"):
        if environ.get(name, "").isdecimal():
            return int(environ[name])
    return 1


def _checked(given: dict[str, Any]) -> tuple[str | None, int | None, int | None]:
    """The three, in their types; what is None the cluster tells."""
    numbers: dict[str, int | None] = {}
    for name in ("num_processes", "process_id"):
        try:
            numbers[name] = None if given[name] is None else int(given[name])
        except ValueError:
            raise ValueError(f"{name} is {given[name]!r}: expected a whole number") from None
    total, index = numbers["num_processes"], numbers["process_id"]
    if total is not None and (total < 1 or (index is not None and not 0 <= index < total)):
        raise ValueError(
            f"--process_id={index} of --num_processes={total}: they are counted from 0 to "
            f"{max(total - 1, 0)}"
        )
    address = given["coordinator_address"]
    if address is not None and total != 1:
        host, _, port = address.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise ValueError(
                f"--coordinator_address={address}: expected HOST:PORT of process 0, such as "
                "10.0.0.1:12321"
            )
    return address, total, index


def start(rendezvous: Rendezvous, timeout_s: float) -> None:
    """Joins the other processes; before anything else asks JAX for its devices.

    Args:
        rendezvous: see `find_rendezvous`.
        timeout_s: how long to wait for the others; then the process ends with status 1.

    Raises:
        ValueError: JAX does not know the cluster.
        OSError: the coordinator's port is in use, or its address is another machine's.
    """
    import jax

    bind = rendezvous.bind_address
    known = (rendezvous.coordinator_address, rendezvous.num_processes, rendezvous.process_id)
    if rendezvous.process_id == 0 and rendezvous.coordinator_address:
        # On a port that is in use JAX would end in a segmentation fault. Where no address to listen
        # at is given it takes all of the machine's; ours is the one that the others are told.
        bind = bind or rendezvous.coordinator_address
        _check_port(bind, "JAX_COORDINATOR_BIND_ADDRESS" if rendezvous.bind_address else "")
    # JAX's own time-out ends in SIGABRT and pages of stack.
    watch = threading.Timer(timeout_s, _give_up, (rendezvous, timeout_s))
    watch.daemon = True
    watch.start()
    try:
        jax.distributed.initialize(
            coordinator_address=rendezvous.coordinator_address,
            num_processes=rendezvous.num_processes,
            process_id=rendezvous.process_id,
            cluster_detection_method=None if None in known else "deactivate",
            initialization_timeout=int(timeout_s) + 60,
            heartbeat_timeout_seconds=HEARTBEAT_S,
            shutdown_timeout_seconds=_SHUTDOWN_S,
            coordinator_bind_address=bind,
        )
    except ValueError as error:
        raise ValueError(
            f"--distributed: JAX does not know this cluster ({error}): give "
            "--coordinator_address=HOST:PORT --num_processes=N --process_id=I"
        ) from error
    except RuntimeError as error:  # half joined: nothing may ask JAX for its devices now
        _leave(
            f"{_name(rendezvous)}the processes cannot come together: {' '.join(str(error).split())}"
        )
    finally:
        watch.cancel()


def _check_port(address: str, variable: str) -> None:
    host, _, port = address.rpartition(":")
    name = f"{variable}={address}" if variable else f"--coordinator_address={address}"
    try:
        family, kind, _, _, where = socket.getaddrinfo(
            host.strip("[]"), int(port), type=socket.SOCK_STREAM
        )[0]
    except OSError as error:
        raise OSError(f"{name}: the host {host} is unknown here: {error.strerror}") from error
    if not variable and host not in _LOOPBACK and str(where[0]).startswith("127."):
        raise OSError(
            f"{name}: here {host} means {where[0]}, which no other machine can reach: give an "
            "address of process 0's network, or localhost where all processes are on one machine"
        )
    with socket.socket(family, kind) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(where)
            probe.listen()
        except OSError as error:
            raise OSError(
                f"{name}: process 0 cannot listen there ({error.strerror}): take another port, and "
                "an address of the machine that process 0 runs on"
            ) from error


def _give_up(rendezvous: Rendezvous, timeout_s: float) -> None:
    where = f" at {rendezvous.coordinator_address}" if rendezvous.coordinator_address else ""
    total = f"the {rendezvous.num_processes}" if rendezvous.num_processes else "all"
    _leave(
        f"{_name(rendezvous)}not {total} processes came together{where} within {timeout_s:g} s: "
        "start each with the same --coordinator_address and --num_processes and its own "
        "--process_id, and see that process 0 can be reached there; --start_timeout says how long "
        "to wait"
    )


def _name(rendezvous: Rendezvous) -> str:
    return "" if rendezvous.process_id is None else f"process {rendezvous.process_id}: "


def _leave(why: str) -> NoReturn:
    os.write(2, f"error: {why}\n".encode())
    os._exit(1)


def is_started() -> bool:
    """Whether this process is one of several; imports nothing."""
    return "jax" in sys.modules and sys.modules["jax"].distributed.is_initialized()


def who() -> str:
    """Which of several processes this is, before what it has to say; nothing of a single one."""
    return f"process {process_index()}: " if is_started() else ""


def explain(error: Exception) -> Exception:
    """What an error means that comes of another process's end; else the error itself."""
    if not is_started():
        return error
    words = " ".join(str(error).split())
    if not any(sign in words for sign in _LOST):
        return error
    return ConnectionError(
        f"the connection to another process of the run is lost ({words[:160]}): what it said last "
        "tells why; start all processes again, and they go on from the last checkpoint"
    )


def finish() -> None:
    """Ends a run that all processes end here, however long the first still writes."""
    import jax

    if is_started():
        wait("the end")
        jax.distributed.shutdown()


def wait(where: str) -> None:
    """Returns when all processes are here, however long that takes."""
    if is_started():
        from orbax.checkpoint import multihost

        multihost.get_barrier_sync_fn()(key=where, timeout_ms=7 * 24 * 3600 * 1000)


def process_index() -> int:
    """Which of the processes this is; 0 where there is one."""
    import jax

    return jax.process_index()


def is_first() -> bool:
    """Whether this process is the one that speaks and writes."""
    return process_index() == 0


@contextlib.contextmanager
def only_first_speaks() -> Iterator[None]:
    """All but the first process keep their stdout to themselves; warnings and errors they say."""
    with contextlib.ExitStack() as stack:
        if not is_first():
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
        yield


class Part(TypedDict, total=False):
    """Which of the processes this is, and how many there are; empty where there is one."""

    process_index: int
    process_count: int


def part_of_batches() -> Part:
    """What `input_pipeline.get_dataset` has to know of the processes; nothing of a single one."""
    import jax

    if jax.process_count() == 1:
        return {}
    return {"process_index": jax.process_index(), "process_count": jax.process_count()}


def gather(content: bytes) -> list[bytes]:
    """What each process gives, in their order, on all of them; all must call it."""
    import jax
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return [content]
    wait("gather")  # as long as it takes; what follows gives up soon
    sizes = multihost_utils.process_allgather(np.array([len(content)], np.int32))[:, 0]
    # Powers of two: few lengths, each of which is compiled once.
    padded = np.zeros(1 << int(max(sizes.max(), 1) - 1).bit_length(), np.uint8)
    padded[: len(content)] = np.frombuffer(content, np.uint8)
    gathered = multihost_utils.process_allgather(padded)
    return [row[:size].tobytes() for row, size in zip(gathered, sizes, strict=True)]


def from_first(content: Any) -> Any:
    """What the first process gives, as JSON can hold it, on all of them."""
    return json.loads(gather(json.dumps(content).encode() if is_first() else b"")[0])


def agree(problem: str | None) -> str | None:
    """What one of the processes found wrong, on all of them; None where none did."""
    for index, theirs in enumerate(gather(json.dumps(problem).encode())):
        if (found := json.loads(theirs)) is not None:
            return found if problem is not None else f"process {index}: {found}"
    return None


def gather_arrays(arrays: Mapping[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    """Each process's arrays, in the processes' order, on all of them."""
    import jax

    if jax.process_count() == 1:
        return [dict(arrays)]
    file = io.BytesIO()
    # Names are ours: none is that of NumPy's other argument.
    np.savez(file, **arrays)  # type: ignore[arg-type]
    gathered = []
    for content in gather(file.getvalue()):
        with np.load(io.BytesIO(content), allow_pickle=False) as loaded:
            gathered.append({key: loaded[key] for key in loaded.files})
    return gathered


def gather_rows(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The rows of all processes one below the other: those of a batch in its order."""
    parts = gather_arrays(arrays)
    return {key: np.concatenate([part[key] for part in parts]) for key in arrays}


def check_same(what: str, content: Any) -> None:
    """Raises ValueError where the processes do not all have the same, as JSON can hold it."""
    mine = json.dumps(content, sort_keys=True).encode()
    others = gather(mine)
    for index, other in enumerate(others):
        if other != others[0]:
            raise ValueError(
                f"process {index} runs with another {what} than process 0: start all with the same "
                "command but for --process_id"
            )
