"""A folder on any filesystem that pyarrow.fs knows: what has to outlive a machine is kept there."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import parse_qsl, quote, urlsplit

import pyarrow
from pyarrow import fs

from autoprune.models.errors import InputError


def sync_folder(folder: Path) -> None:
    """A new name is durable only once its folder is."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A file beside `path` that takes its place once it is whole, and goes where it does not become so."""
    # The process id keeps two writers of one file from sharing their temporary file.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_atomic(path: Path, data: bytes) -> None:
    """Replace a file by `data`: whoever reads, whenever the power goes, sees the old bytes or the new ones."""
    with _replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(path.parent)


def below(uri: str, name: str) -> str:
    """A folder of this name in that of a URI, whose options behind a question mark stay behind it, or of a path."""
    if "://" not in uri:
        return f"{uri.rstrip('/')}/{name}"
    folder, mark, options = uri.partition("?")
    return f"{folder.rstrip('/')}/{quote(name)}{mark}{options}"


def _with_keys(uri: str, found: fs.S3FileSystem) -> fs.S3FileSystem:
    """With the keys that the environment holds now: by itself it reads them at every request, and evaluators take them
    out of theirs."""
    key, secret = os.environ.get("AWS_ACCESS_KEY_ID"), os.environ.get("AWS_SECRET_ACCESS_KEY")
    if not key or not secret or "@" in urlsplit(uri).netloc:
        return found
    given = dict(parse_qsl(urlsplit(uri).query))
    options = {name: given[name] for name in ("endpoint_override", "scheme") if name in given}
    token = os.environ.get("AWS_SESSION_TOKEN")
    return fs.S3FileSystem(access_key=key, secret_key=secret, session_token=token, region=found.region, **options)


class Storage:
    """Files by name below one folder. uri: a path, or such as s3://bucket/folder or gs://bucket/folder; credentials are
    those that pyarrow.fs finds, and for S3 those of the environment when this is made.

    A file that is written here is there whole or not at all: on a local disk by renaming it, on an object store since
    an upload that was not finished is no object.
    """

    def __init__(self, uri: str) -> None:
        """Raises InputError for what pyarrow.fs does not know."""
        self.uri = uri
        try:
            if "://" in uri:
                self._fs, self._root = fs.FileSystem.from_uri(uri)
                if isinstance(self._fs, fs.S3FileSystem):
                    self._fs = _with_keys(uri, self._fs)
            else:
                self._fs, self._root = fs.LocalFileSystem(), str(Path(uri).resolve())
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise InputError(
                f"{uri} is no folder that pyarrow.fs can open ({error}): expected a path, or such as s3://bucket/folder"
            ) from None
        self._made: set[str] = set()
        self.local = Path(self._root) if isinstance(self._fs, fs.LocalFileSystem) else None

    def read(self, name: str) -> bytes | None:
        """The bytes of a file, or None where there is none."""
        try:
            with self._fs.open_input_file(self._path(name)) as file:
                return file.read()
        except FileNotFoundError:
            return None

    def write(self, name: str, data: bytes) -> None:
        """Replace a file by `data`, with the folders above it."""
        if self.local is None:
            # In one call, which no signal interrupts: a stream that is left half-written is finished as it is.
            with tempfile.NamedTemporaryFile() as file:
                file.write(data)
                file.flush()
                self.take(Path(file.name), name)
            return
        path = Path(self._path(name))
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, data)

    def take(self, file: Path, name: str) -> None:
        """Replace a file by a copy of one of this machine, however large."""
        if self.local is None:
            self._make_folder(name)
            place = {"source_filesystem": fs.LocalFileSystem(), "destination_filesystem": self._fs}
            fs.copy_files(str(file), self._path(name), **place)
            return
        path = Path(self._path(name))
        path.parent.mkdir(parents=True, exist_ok=True)
        with _replacing(path) as temporary:
            shutil.copyfile(file, temporary)

    def names(self, folder: str = "") -> list[str]:
        """Files below a folder, by their names here, in order."""
        root = self._path(folder)
        found = self._fs.get_file_info(fs.FileSelector(root, recursive=True, allow_not_found=True))
        return sorted(
            info.path[len(self._root) :].lstrip("/")
            for info in found
            if info.type == fs.FileType.File and not info.path.endswith(".tmp")
        )

    def delete(self, *names: str) -> None:
        """Files, as far as they are there."""
        for name in names:
            try:
                self._fs.delete_file(self._path(name))
            except FileNotFoundError:
                continue

    @contextmanager
    def reading(self, folder: str) -> Iterator[Path]:
        """A folder of here on this machine's disk: itself, or a copy that goes afterwards."""
        if self.local is not None:
            yield self.local / folder
            return
        with tempfile.TemporaryDirectory() as copy:
            for name in self.names(folder):
                fs.copy_files(
                    self._path(name),
                    str(Path(copy) / Path(name).name),
                    source_filesystem=self._fs,
                    destination_filesystem=fs.LocalFileSystem(),
                )
            yield Path(copy)

    @contextmanager
    def writing(self, folder: str, last: str) -> Iterator[Path]:
        """Where files for a folder of here can be made; they are in it afterwards, `last` after all others."""
        if self.local is not None:
            yield self.local / folder
            return
        with tempfile.TemporaryDirectory() as made:
            yield Path(made)
            files = sorted(Path(made).iterdir(), key=lambda path: (path.name == last, path.name))
            self.delete(f"{folder}/{last}")
            for path in files:
                self.take(path, f"{folder}/{path.name}")

    def _make_folder(self, name: str) -> None:
        """Of a file, once: an object store has no folders, others need them."""
        folder = self._path(name).rpartition("/")[0]
        if folder not in self._made:
            self._fs.create_dir(folder, recursive=True)
            self._made.add(folder)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root
