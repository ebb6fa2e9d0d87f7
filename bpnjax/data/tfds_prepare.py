"""Opens a prepared TFDS set or prepares it first. Says in one line if it cannot.

TFDS is imported inside the functions, because it is slow and not every command needs it.
"""

import contextlib
import difflib
import http.client
import io
import os
import queue
import ssl
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from bpnjax.data import builders, sets
from bpnjax.data.archives import Path
from bpnjax.data.tfds_read import (
    data_roots,
    find,
    one_line,
    open_prepared,
    parse_name,
    tfds_class,
    versions_in,
)
from bpnjax.utils.errors import UserError
from bpnjax.utils.paths import expanded

PROBE_SECONDS = 10.0
_PROBED_HOSTS = 4
_NAMED = 8
# Further advice for sets that cannot be downloaded.
_HINTS = {
    # TFDS compares them with its checksums.
    "cars196": " its host has taken the set down, mirrors keep files of these names, which are"
    " verified;"
}


def _tls_context() -> ssl.SSLContext:
    """Trusts the same certificates as requests, which TFDS downloads with."""
    import certifi

    bundle = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE")
    bundle = bundle or certifi.where()
    if os.path.isdir(bundle):
        return ssl.create_default_context(capath=bundle)
    return ssl.create_default_context(cafile=bundle)


def unreachable(urls: Sequence[str], timeout: float = PROBE_SECONDS) -> str:
    """Checks whether one of some addresses answers; uses the proxies of the environment.

    Args:
        urls: The addresses.
        timeout: Seconds in total after which this returns, even if name resolution hangs.

    Returns:
        "" if one answers, else the reason why none does.
    """
    answers: queue.Queue[str] = queue.Queue()

    def ask(url: str) -> None:
        try:
            request = urllib.request.Request(url, headers={"User-Agent": "bpnjax"})
            with urllib.request.urlopen(request, timeout=timeout, context=_tls_context()):
                answers.put("")
        except urllib.error.HTTPError as error:
            # Below 500 the server is there, and the download itself explains best what it refuses.
            answers.put(f"HTTP status {error.code}" if error.code >= 500 else "")
        except (OSError, ValueError, http.client.HTTPException) as error:
            answers.put(one_line(getattr(error, "reason", error)) or type(error).__name__)

    # Daemon threads, because a pool would wait at exit for a name resolution that hangs.
    for url in urls:
        threading.Thread(target=ask, args=(url,), daemon=True).start()
    deadline = time.monotonic() + timeout
    why = f"no answer within {timeout:g} s"
    for _ in urls:
        with contextlib.suppress(queue.Empty):
            why = answers.get(timeout=max(0.0, deadline - time.monotonic()))
        if not why:
            break
    return why


def _one_per_host(urls: Iterable[str]) -> list[str]:
    hosts: dict[str, str] = {}
    for url in urls:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme in ("http", "https", "ftp"):
            hosts.setdefault(parts.netloc, url)
    return list(hosts.values())[:_PROBED_HOSTS]


def _archives(builder: Any) -> dict[str, str | None]:
    """The archives of a set as {address: file name}; the name is None if unknown."""
    named = {url: info.filename for url, info in (builder.url_infos or {}).items()}
    return named | {a.url: a.filename for a in getattr(builder, "archives", ())}


def _remedies(builder: Any, error: Any) -> UserError:
    files = [filename for filename in _archives(builder).values() if filename]
    more = f" and {len(files) - _NAMED} more" if len(files) > _NAMED else ""
    listed = f" ({', '.join(files[:_NAMED])}{more})" if files else ""
    return UserError(
        f"dataset.name={builder.info.full_name!r}: not prepared in {builder.data_dir_root}, and"
        f" cannot be downloaded: {error};{_HINTS.get(builder.name, '')} (1) put the official"
        f" archives{listed} into a folder and pass --config.dataset.manual_dir=DIR, or (2) prepare"
        " the set on a machine with network access, copy it and pass"
        " --config.dataset.data_dir=DIR or set TFDS_DATA_DIR, or (3) check the network and the"
        " proxy and try again"
    )


def _check_sources(builder: Any, root: Any, manual_dir: Path) -> None:
    """Raises UserError if the archives of a set are neither on disk nor reachable."""
    from tensorflow_datasets.core.download import resource

    folder = root / "downloads" / "manual"
    if manual_dir:
        folder = expanded(manual_dir, "dataset.manual_dir")
    cache = root / "downloads" / builder.name
    infos, named = builder.url_infos or {}, _archives(builder)
    absent = {
        url: filename
        for url, filename in named.items()
        if not (filename and (folder / filename).is_file())
    }
    if builder.MANUAL_DOWNLOAD_INSTRUCTIONS and not folder.is_dir():
        raise UserError(
            f"dataset.manual_dir={manual_dir!r}: no such folder, and dataset {builder.name!r} has"
            " to be downloaded by hand; pass --config.dataset.manual_dir=DIR:"
            f" {one_line(builder.MANUAL_DOWNLOAD_INSTRUCTIONS)}"
        )
    if builder.MANUAL_DOWNLOAD_INSTRUCTIONS or (manual_dir and len(absent) < len(named)):
        return  # TFDS takes what is there; other archives may belong to another config
    if manual_dir and absent:
        files = [filename or url for url, filename in absent.items()][:_NAMED]
        raise UserError(
            f"dataset.manual_dir={manual_dir!r}: lacks the archives of dataset {builder.name!r};"
            f" put there {', '.join(files)}"
        )
    urls = [
        url
        for url in absent
        if not (cache / resource.get_dl_fname(url, url in infos and infos[url].checksum)).exists()
    ]
    if (probed := _one_per_host(urls)) and (why := unreachable(probed)):
        raise _remedies(builder, f"{probed[0]} is not reachable ({why})")


def _unknown(name: str, roots: Sequence[Any]) -> UserError:
    import tensorflow_datasets as tfds

    dataset = parse_name(name)[0]
    known = set(tfds.list_builders(with_community_datasets=False)) | {*builders.NAMES, *sets.SETS}
    for root in roots:
        if root.is_dir():
            known.update(path.name for path in root.iterdir() if path.is_dir())
        base = root / dataset
        there = [f"{dataset}:{version}" for version in versions_in(base)]
        there += sorted(f"{dataset}/{p.name}" for p in base.glob("*") if versions_in(p))
        if there:
            return UserError(
                f"dataset.name={name!r}: not prepared, and TFDS does not know the set;"
                f" {root} has {', '.join(there)}"
            )
    close = difflib.get_close_matches(dataset, sorted(known - {"downloads"}))
    looked = ", ".join(os.fspath(root) for root in roots)
    return UserError(
        f"dataset.name={name!r}: unknown dataset, not known to TFDS nor prepared in {looked};"
        f" {'did you mean ' + ' or '.join(close) if close else 'check the name'}, or pass"
        " --config.dataset.data_dir=DIR where it is prepared"
    )


def _builder(name: str, roots: Sequence[Any], manual_dir: Path, verify: bool) -> Any:
    """The builder that can prepare a set."""
    dataset, config, version = parse_name(name)
    if dataset in sets.SETS:
        builder = sets.builder(dataset, config, roots[0], manual_dir, verify)
        if version and not builder.version.match(version):
            raise UserError(
                f"dataset.name={name!r}: no such version; the one there is is {builder.version}"
            )
        return builder
    if dataset in builders.NAMES:
        builder = builders.builder(dataset, roots[0], manual_dir, verify)
        if config or (version and not builder.version.match(version)):
            raise UserError(
                f"dataset.name={name!r}: no such config or version; write {dataset}"
                f" or {dataset}:{builder.version}"
            )
        return builder
    builder_class = tfds_class(dataset)
    if builder_class is None:
        raise _unknown(name, roots)
    configs = list(builder_class.builder_configs)
    if config and config not in configs:
        choice = [f"{dataset}/{config}" for config in configs] or [dataset]
        raise UserError(
            f"dataset.name={name!r}: no config {config!r}; write {' or '.join(choice[:_NAMED])}"
        )
    try:
        return builder_class(data_dir=os.fspath(roots[0]), config=config, version=version)
    except (AssertionError, ValueError) as error:
        raise UserError(
            f"dataset.name={name!r}: {one_line(error).rstrip('.')}; leave the version out"
        ) from error


@contextlib.contextmanager
def _installed_modules(name: str) -> Iterator[None]:
    """Turns a missing module, wherever TFDS notices it, into a UserError."""
    try:
        yield
    except ImportError as error:
        module: str | None = error.name
        cause: BaseException | None = error
        while not module and cause and (cause := cause.__cause__ or cause.__context__):
            module = getattr(cause, "name", None)
        module = module.split(".")[0] if module else one_line(error)
        raise UserError(
            f"dataset.name={name!r}: to prepare (not to read) this set TFDS needs {module},"
            f" which cannot be imported; pip install {module}, or copy a prepared set and pass"
            " --config.dataset.data_dir=DIR"
        ) from error


def _prepare(name: str, roots: Sequence[Any], manual_dir: Path, verify: bool) -> Any:
    """Prepares a set in the first root and returns its folder."""
    import requests
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.download import download_manager, util

    with _installed_modules(name):
        builder = _builder(name, roots, manual_dir, verify)
        _check_sources(builder, roots[0], manual_dir)
        download_config = tfds.download.DownloadConfig(
            manual_dir=manual_dir or None, try_download_gcs=False
        )
        try:
            # TFDS prints text that is not a result of the command; its progress bars go to stderr.
            with contextlib.redirect_stdout(io.StringIO()):
                builder.download_and_prepare(
                    download_config=download_config, file_format="array_record"
                )
        except (
            requests.RequestException,
            util.DownloadError,
            download_manager.NonMatchingChecksumError,
        ) as error:
            raise _remedies(builder, one_line(error)) from error
        except OSError as error:
            if not builder.data_path.exists():  # otherwise another process was faster
                raise UserError(
                    f"dataset.name={name!r}: cannot be prepared in {roots[0]} ({one_line(error)});"
                    " make the folder writable and free space, or pass another"
                    " --config.dataset.data_dir=DIR"
                ) from error
    return builder.data_path


def unprepared(names: Iterable[str], data_dir: Path = "") -> dict[str, list[str]]:
    """Lists the sets that are not prepared yet, without preparing them.

    Args:
        names: Names as in `ensure_prepared`.
        data_dir: As in `ensure_prepared`.

    Returns:
        A dict of name to the file names of its archives, as far as they are known.

    Raises:
        UserError: A name is unknown.
    """
    roots, found = data_roots(data_dir), {}
    for name in names:
        if find(*parse_name(name), roots) is None:
            with _installed_modules(name):
                builder = _builder(name, roots, "", verify=False)
            found[name] = list(dict.fromkeys(filter(None, _archives(builder).values())))
    return found


def ensure_prepared(
    name: str, data_dir: Path = "", manual_dir: Path = "", verify: bool = True
) -> Any:
    """Opens a TFDS set, and prepares it first if necessary.

    A prepared set is read from its folder alone, without network, TensorFlow or a builder in TFDS.
    The sets of `builders.NAMES` and `sets.SETS` are prepared without TensorFlow, all others by the
    builder of TFDS as array_record. An interrupted preparation leaves nothing that could be
    mistaken for a prepared set.

    Args:
        name: A name in TFDS or of a prepared set, optionally with a version or config:
            "cifar10:3.0.2", "cifar10_1/v6".
        data_dir: The folder of prepared sets; "" is the default of TFDS (TFDS_DATA_DIR when TFDS
          was imported, else ~/tensorflow_datasets).
        manual_dir: A folder with the official archives; "" downloads them.
        verify: Whether to verify the archives of these sets in `manual_dir`.

    Returns:
        A read-only `tfds.core.DatasetBuilder`.

    Raises:
        UserError: The name is unknown, the prepared set is damaged, archives are missing, malformed
          or unreachable, a module is missing, or a folder cannot be written.

    Source:
        https://www.tensorflow.org/datasets/api_docs/python/tfds/data_source
    """
    roots = data_roots(data_dir)
    folder = find(*parse_name(name), roots)
    if folder is None:
        folder = _prepare(name, roots, manual_dir, verify)
    return open_prepared(folder)
