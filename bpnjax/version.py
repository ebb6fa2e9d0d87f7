"""The version, in its own module so that packaging can read it without importing JAX."""

__version__ = "0.2.0"
