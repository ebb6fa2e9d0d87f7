"""Tools for every part of the package, such as errors, random keys and files of arrays."""
