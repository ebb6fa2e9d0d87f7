"""TFDS builders, without TensorFlow, of sets of images that TFDS lacks.

A set is a module with an `ImageSet`: its archives, and a function that reads from their small files
which images there are, with class and split. A prepared set is read from its folder alone, as any
other. TFDS does not know its name.
"""

from typing import Any

from bpnjax.data import archives
from bpnjax.data.archives import Archive, Path
from bpnjax.data.sets.chars74k_letters import CHARS74K_LETTERS
from bpnjax.data.sets.fgvc_aircraft import FGVC_AIRCRAFT
from bpnjax.data.sets.imageset import examples
from bpnjax.data.sets.mit_indoor67 import MIT_INDOOR67
from bpnjax.data.sets.voc2012_actions import VOC2012_ACTIONS
from bpnjax.utils.errors import UserError

SETS = {
    "mit_indoor67": MIT_INDOOR67,
    "fgvc_aircraft": FGVC_AIRCRAFT,
    "voc2012_actions": VOC2012_ACTIONS,
    "chars74k_letters": CHARS74K_LETTERS,
}

__all__ = ["SETS", "builder"]


def builder(
    name: str, config: str | None, data_dir: Path, manual_dir: Path = "", verify: bool = True
) -> Any:
    """Makes the builder of one of `SETS`, which writes array_record.

    Args:
        name: One of `SETS`.
        config: One of its configs; None is the first.
        data_dir: The folder of prepared sets; "" is the TFDS default.
        manual_dir: A folder that holds the official archives; "" downloads them.
        verify: Whether to compare archives with their checksums, if known.

    Returns:
        A `tfds.core.DatasetBuilder`. Its ``archives`` are those of the config.

    Raises:
        UserError: The name or config is unknown, or archives in `manual_dir` are missing or not
          official. Preparing raises it for an archive with another layout.
    """
    if name not in SETS:
        raise UserError(f"dataset.name={name!r}: no builder here; use one of {', '.join(SETS)}")
    image_set = SETS[name]
    config = next(iter(image_set.configs)) if config is None else config
    if config not in image_set.configs:
        choice = " or ".join(f"{name}/{c}" if c else name for c in image_set.configs)
        raise UserError(f"dataset.name='{name}/{config}': no config {config!r}; write {choice}")
    of_config = image_set.configs[config]
    paths = archives.find(name, of_config.archives, manual_dir, verify) if manual_dir else None

    import tensorflow_datasets as tfds  # here, because its import is slow

    def info(self: Any) -> Any:
        features = tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(shape=(None, None, 3)),
                "label": tfds.features.ClassLabel(num_classes=of_config.classes),
                "file_name": tfds.features.Text(),
            }
        )
        return tfds.core.DatasetInfo(
            builder=self,
            description=f"{image_set.about} {of_config.about}",
            features=features,
            supervised_keys=("image", "label"),
            homepage=image_set.homepage,
            citation=image_set.citation,
            license=image_set.licence,
        )

    def split_generators(self: Any, dl_manager: Any) -> dict[str, Any]:
        files = paths or _download(name, of_config.archives, dl_manager, verify)
        reading = image_set.read(files, config)
        self.info.features["label"].names = reading.class_names
        return {split: examples(reading, split) for split in reading.splits}

    body = {
        "__module__": __name__,
        "name": name,
        "VERSION": tfds.core.Version(image_set.version),
        "BUILDER_CONFIGS": [
            tfds.core.BuilderConfig(name=c, description=about.about)
            for c, about in image_set.configs.items()
            if c
        ],
        "archives": of_config.archives,
        "url_infos": _url_infos(of_config.archives),
        "_info": info,
        "_split_generators": split_generators,
        "_generate_examples": None,  # abstract in TFDS; here the splits hold their generators
    }
    with tfds.core.registered.skip_registration():
        builder_class = type(name, (tfds.core.GeneratorBasedBuilder,), body)
    where = data_dir or None
    return builder_class(data_dir=where, config=config or None, file_format="array_record")


def _url_infos(needed: tuple[Archive, ...]) -> dict[str, Any]:
    """The facts that TFDS verifies after a download, for archives with known size and sha256."""
    from tensorflow_datasets.core.download.checksums import UrlInfo

    return {a.url: UrlInfo(a.size, a.sha256, a.filename) for a in needed if a.size and a.sha256}


def _download(name: str, needed: tuple[Archive, ...], dl_manager: Any, verify: bool) -> Any:
    files = dl_manager.download({archive.filename: archive.url for archive in needed})
    for archive in needed if verify else ():
        archives.check(name, archive, files[archive.filename])
    return files
