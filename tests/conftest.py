"""For all tests: shapes in signatures are checked, and each program is compiled once."""

import os
import tempfile

# Many tests build the same small programs. Set before jax is imported; subprocesses inherit it.
_cache = tempfile.TemporaryDirectory(prefix="rvit_jax_tests_")
os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

from jaxtyping import install_import_hook  # noqa: E402

install_import_hook("rvit_jax", "beartype.beartype")
