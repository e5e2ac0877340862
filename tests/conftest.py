"""For all tests: shapes in signatures are checked, and each program is compiled once."""

import os
import tempfile
from pathlib import Path

import hypothesis
import pytest

# Many tests build the same small programs. Set before jax is imported; subprocesses inherit it.
_cache = tempfile.TemporaryDirectory(prefix="rvit_jax_tests_")
os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

os.chdir(Path(__file__).resolve().parents[1])  # paths in the tests are the repository's
# A busy machine is no failure.
hypothesis.settings.register_profile("rvit_jax", deadline=None)
hypothesis.settings.load_profile("rvit_jax")

from jaxtyping import install_import_hook  # noqa: E402

install_import_hook("rvit_jax", "beartype.beartype")


@pytest.fixture(scope="module")
def one_torch_thread():
    """PyTorch on one thread: more of them wait busily where cores are shared."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
