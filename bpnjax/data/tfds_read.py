"""Finds the folder of a prepared TFDS set, opens it and checks it, without network.

TFDS is imported inside the functions, because it is slow and not every command needs it.
"""

import contextlib
import os
from collections.abc import Iterable, Iterator
from typing import Any

from bpnjax.data.archives import Path
from bpnjax.utils.errors import UserError


def one_line(text: Any) -> str:
    """Replaces every run of white space in a text by one space.

    Args:
        text: Anything that `str` takes, such as an exception.

    Returns:
        A text without line feeds.
    """
    return " ".join(str(text).split())


def parse_name(name: str) -> tuple[str, str | None, str | None]:
    """Splits a TFDS name.

    Args:
        name: NAME, NAME/CONFIG, NAME:VERSION or NAME/CONFIG:VERSION.

    Returns:
        The dataset, config and version; None for a part that is not given.

    Raises:
        UserError: The name has another form.
    """
    from tensorflow_datasets.core import naming

    try:
        dataset, parts = naming.parse_builder_name_kwargs(name)
    except (TypeError, ValueError):
        dataset, parts = None, {}
    if dataset is None or dataset.namespace or set(parts) - {"config", "version"}:
        raise UserError(
            f"dataset.name={name!r}: not a TFDS name; write NAME, NAME/CONFIG, NAME:VERSION"
            " or NAME/CONFIG:VERSION"
        )
    return dataset.name, parts.get("config"), parts.get("version")


def data_roots(data_dir: Path) -> list[Any]:
    """Lists the folders that may hold prepared sets.

    Args:
        data_dir: The only folder; "" is the default of TFDS and those of `tfds.core.add_data_dir`.

    Returns:
        A list of `epath.Path`. New sets are prepared in the first one.
    """
    from etils import epath
    from tensorflow_datasets.core import constants
    from tensorflow_datasets.core.utils import file_utils

    if data_dir:
        return [epath.Path(data_dir).expanduser()]
    # TFDS reads TFDS_DATA_DIR only when it is imported.
    default = epath.Path(constants.DATA_DIR).expanduser()
    return [default] + [root for root in file_utils.list_data_dirs() if root != default]


def tfds_class(dataset: str) -> Any:
    """The builder class of TFDS.

    Args:
        dataset: The name of a set, without config and version.

    Returns:
        The class, or None if TFDS does not know the set.
    """
    import tensorflow_datasets as tfds

    try:
        return tfds.builder_cls(dataset)
    except tfds.core.registered.DatasetNotFoundError:
        return None


def _default_config(base: Any, dataset: str) -> str | None:
    from tensorflow_datasets.core import dataset_builder

    with contextlib.suppress(ValueError):  # unreadable metadata; the class may still know
        if config := dataset_builder.load_default_config_name(base):
            return config
    with contextlib.suppress(ImportError):  # a class that cannot be imported is ignored
        builder_class = tfds_class(dataset)
        if builder_class and builder_class.BUILDER_CONFIGS:
            return builder_class.default_builder_config.name
    return None


def versions_in(folder: Any, version: str | None = None) -> list[Any]:
    """Lists the versions of a set in its folder, in ascending order.

    Args:
        folder: The folder of the set, or of its config.
        version: "x.y.z" with * as wildcard; None for all.

    Returns:
        A list of `tfds.core.Version`.
    """
    from tensorflow_datasets.core.utils import version as version_lib

    found = version_lib.list_all_versions(folder)
    return [v for v in found if not version or v.match(version)]


def find(dataset: str, config: str | None, version: str | None, roots: Iterable[Any]) -> Any:
    """Finds the folder of the highest prepared version.

    Args:
        dataset: The name of the set, known to TFDS or not.
        config: Its config; None for the default config, if the set has configs.
        version: "x.y.z" with * as wildcard; None for any.
        roots: The folders of prepared sets.

    Returns:
        The folder in the first root that has one, or None.
    """
    for root in roots:
        base = root / dataset
        folder = base / config if config else base
        versions = versions_in(folder, version)
        if not versions and not config and base.is_dir():
            folder = base / (_default_config(base, dataset) or "")
            versions = versions_in(folder, version)
        if versions:
            return folder / str(versions[-1])
    return None


def _lost_shards(builder: Any) -> Iterator[str]:
    """Yields what is wrong with the files of a prepared set."""
    for split in builder.info.splits.values():
        for path, length in zip(split.filepaths, split.shard_lengths, strict=True):
            if not path.exists():
                yield f"{path.name} is missing"
            elif path.suffix.startswith(".array_record"):
                from array_record.python import array_record_module

                # The reader of a truncated file opens without error, but holds no record.
                reader = array_record_module.ArrayRecordReader(os.fspath(path))
                if reader.num_records() != length:
                    yield f"{path.name} is damaged (it holds {reader.num_records()} of {length})"
                reader.close()


def open_prepared(folder: Any) -> Any:
    """Opens a prepared folder and checks that its files are complete.

    Args:
        folder: The folder of one version.

    Returns:
        A read-only `tfds.core.DatasetBuilder`, whose `as_data_source` needs no TensorFlow.

    Raises:
        UserError: The folder is damaged, or in a format that needs TensorFlow.
    """
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import file_adapters

    remedy = "delete the folder to prepare the set again, or copy a whole one there"
    try:
        builder = tfds.builder_from_directory(folder)
        formats = builder.info.available_file_formats()
        wrong = "" if builder.info.splits else "it has no splits"
        if formats.intersection(file_adapters.FileFormat.with_random_access()):
            wrong = wrong or next(_lost_shards(builder), "")
    except ImportError:  # does not concern the files
        raise
    except Exception as error:  # TFDS may raise anything for a damaged set
        raise UserError(f"{folder}: damaged prepared set: {one_line(error)}; {remedy}") from error
    if wrong:
        raise UserError(f"{folder}: damaged prepared set: {wrong}; {remedy}")
    if not formats.intersection(file_adapters.FileFormat.with_random_access()):
        raise UserError(
            f"{folder}: the set is prepared as {', '.join(f.value for f in formats)}, which only"
            " TensorFlow reads; prepare it as array_record in another --config.dataset.data_dir=DIR"
        )
    return builder
