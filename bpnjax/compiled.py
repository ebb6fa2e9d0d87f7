"""Compiled programs are kept on disk: a second run of the same shapes starts at once."""

import jax

from bpnjax.data.cache import cache_root

LEAST_SECONDS = 0.5  # what compiles faster is not worth a file


def keep(config) -> None:
    """Turns JAX's persistent compilation cache on, unless the user chose otherwise.

    Programs go to ``compiled`` in the cache folder (see `bpnjax.data.cache.cache_root`), which may
    be deleted at any time.

    Args:
      config: a run configuration; `compilation_cache` False leaves everything as it is, and so does
        a cache that was set up before (JAX_COMPILATION_CACHE_DIR).
    """
    if not config.compilation_cache or jax.config.jax_compilation_cache_dir:
        return
    from jax.experimental.compilation_cache import compilation_cache

    folder = cache_root(config.dataset.cache_dir) / "compiled"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", LEAST_SECONDS)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    compilation_cache.reset_cache()  # JAX looks at the setting at its first compilation only
