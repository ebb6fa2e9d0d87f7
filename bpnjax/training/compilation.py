"""Compiler options, and a cache on disk by which a second run starts at once."""

import warnings
from typing import Any

import jax
from ml_collections import ConfigDict

from bpnjax.data.cache import cache_root
from bpnjax.utils.errors import UserError

# Measured on JAX 0.10: in the library that XLA prefers on a CPU products of a batch with layers of
# some hundred units take up to twice as long, and whole steps of a 4 x 128 network a tenth more.
_ON_CPU = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_CONVOLUTION"}
LEAST_SECONDS = 0.5  # what compiles faster is not worth a file


def keep(config: ConfigDict) -> None:
    """Turns on JAX's persistent compilation cache, unless the user chose otherwise.

    Programs go to ``compiled`` in the cache folder (see `bpnjax.data.cache.cache_root`), which may
    be deleted at any time. Without a home folder, or another one that was named, none are kept.

    Args:
      config: a run configuration; `compilation_cache` False leaves everything as it is, and so does
        a cache that was set up before (JAX_COMPILATION_CACHE_DIR).
    """
    if not config.compilation_cache or getattr(jax.config, "jax_compilation_cache_dir", None):
        return
    from jax.experimental.compilation_cache import compilation_cache

    try:
        folder = cache_root(config.dataset.cache_dir) / "compiled"
    except UserError as error:
        warnings.warn(f"{error}; until then compiled programs are not kept", stacklevel=2)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", LEAST_SECONDS)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    compilation_cache.reset_cache()  # JAX looks at the setting at its first compilation only


def compile_lowered(lowered: Any) -> Any:
    """Compiles a lowered program with the options that are fast on this backend.

    Args:
      lowered: what ``jax.jit(...).lower(...)`` or ``jax.pmap(...).lower(...)`` gives.

    Returns:
      The compiled program; without the options where this version of XLA does not know them.

    Raises:
      JaxRuntimeError: what XLA says against the program itself.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from bpnjax.training.compilation import compile_lowered
      >>> compile_lowered(jax.jit(jnp.sum).lower(jnp.ones(3)))(jnp.ones(3)).item()
      3.0
    """
    if jax.default_backend() == "cpu":
        try:
            return lowered.compile(compiler_options=_ON_CPU)
        except jax.errors.JaxRuntimeError as error:
            if not any(name in str(error) for name in _ON_CPU):
                raise
    return lowered.compile()
