"""Shapes in signatures are checked in every test: `jaxtyping` by `beartype`."""

from jaxtyping import install_import_hook

install_import_hook("rvit_jax", "beartype.beartype")
