"""Places in stores that are reached by URLs: named, looked at, written whole, never with secrets.

Credentials are those of the environment, or of the files that a cloud's own tools keep. A URL that
holds some is refused; what is shown of any text has none.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

from znni_dask.errors import InputError, OutputError

_URL = re.compile(r"(?P<scheme>\w[\w+.-]*)://(?P<rest>[^\s'\"<>]*)")
_PASSWORD = re.compile(r":(?!\d*$)")  # what follows is no port
_ALIASES = {"s3a": "s3", "gcs": "gs", "abfss": "abfs"}
_IN_BUCKETS = ("s3", "gs", "abfs", "az")  # nothing is made there that is not in one
_LOCAL = ("file://", "local://")
_READ_ONLY = ("http", "https")
_PATTERNS = re.compile(r"[*?\[\]]")  # fsspec takes what holds these for many files


def without_secrets(text: str) -> str:
    """A text with all URLs in it, but for users, passwords and queries.

    >>> without_secrets("cannot read https://me:word@host:80/a.zarr?key=1: it is not there")
    'cannot read https://host:80/a.zarr it is not there'
    """
    return _URL.sub(lambda found: f"{found['scheme']}://{_public(found['rest'])}", text)


def _public(rest: str) -> str:
    """What follows ``://``, but for secrets; a password may hold what ends a host's name."""
    host = rest.partition("/")[0]
    if "@" in host or _PASSWORD.search(host):
        rest = rest.rpartition("@")[2] if "@" in rest else "…"
    return re.split(r"[?#]", rest, maxsplit=1)[0]


def is_url(place: str | Path) -> bool:
    """Whether this is a URL of something that is not on this machine."""
    return "://" in str(place) and not str(place).startswith(_LOCAL)


def local_path(place: str | Path) -> Path:
    """A path, also where it is given as a URL."""
    text = str(place)
    return Path(unquote(urlsplit(text).path) if text.startswith(_LOCAL) else text)


def check_secrets(place: str, refusal: type[InputError]) -> None:
    """Raise a ``refusal`` where a URL holds secrets."""
    if without_secrets(place) != place:
        scheme = place.partition("://")[0]
        raise refusal(
            f"the URL {scheme}://… holds a user, a password or a query: credentials are taken from "
            "the environment, or the files that the cloud's own tools keep, alone (AWS_PROFILE, "
            "~/.aws/credentials, GOOGLE_APPLICATION_CREDENTIALS, …); leave them out of the URL"
        )


@dataclass(frozen=True)
class Url:
    """A place in a store, called as a `Path` is as far as outputs need it."""

    text: str

    @classmethod
    def of(cls, place: str) -> Url:
        """Where an output can be; raises `OutputError` where none can."""
        check_secrets(place, OutputError)
        scheme, _, rest = place.partition("://")
        scheme = _ALIASES.get(scheme.lower(), scheme.lower())
        if scheme in _READ_ONLY:
            raise OutputError(
                f"{place} can be read, not written: outputs are made in folders and in object "
                "stores (s3://, gs://, …)"
            )
        bucket, _, name = rest.rstrip("/").partition("/")
        if "::" in place or _PATTERNS.search(rest) or not bucket or not name.strip("/"):
            raise OutputError(
                f"an output at {place} cannot be made: name one place within a bucket, like "
                "s3://bucket/out.zarr, without any of * ? [ ]"
            )
        found = cls(f"{scheme}://{bucket}/{name}")
        try:
            found._reached()
        except (ImportError, ValueError) as error:  # a package, or a kind of store, that is unknown
            raise OutputError(
                f"the output {place} cannot be made: {error}; stores at URLs need "
                "pip install 'znni_dask[cloud]'"
            ) from None
        return found

    def __str__(self) -> str:
        return self.text

    def __truediv__(self, name: str) -> Url:
        return Url(f"{self.text}/{name}")

    def resolve(self) -> Url:
        """Itself: it means the same everywhere."""
        return self

    @property
    def name(self) -> str:
        """Its last part."""
        return self.text.rpartition("/")[2]

    @property
    def stem(self) -> str:
        """Its last part, but for the suffix."""
        return PurePosixPath(self.name).stem

    @property
    def parents(self) -> tuple[Url, ...]:
        """What it lies in, the nearest first."""
        scheme, _, rest = self.text.partition("://")
        parts = rest.split("/")
        whole = range(len(parts) - 1, 0, -1)
        return tuple(Url(f"{scheme}://{'/'.join(parts[:count])}") for count in whole)

    def with_name(self, name: str) -> Url:
        """What is called so beside it."""
        return Url(f"{self.text.rpartition('/')[0]}/{name}")

    def exists(self) -> bool:
        """Whether there is an object, or any below it."""
        store, path = self._reached()
        try:
            store.info(path)
        except FileNotFoundError:
            return False
        return True

    def has_bucket(self) -> bool:
        """Whether the bucket is there, if it must be; also where this may not be asked."""
        scheme, _, rest = self.text.partition("://")
        if scheme not in _IN_BUCKETS:
            return True
        store, _ = self._reached()
        try:
            store.info(rest.partition("/")[0])
        except FileNotFoundError:
            return False
        except PermissionError:  # to ask for the bucket takes more than to use it
            return True
        return True

    def read(self) -> bytes | None:
        """The object; None where there is none."""
        store, path = self._reached()
        try:
            return bytes(store.cat_file(path))
        except FileNotFoundError:
            return None

    def write(self, data: bytes) -> None:
        """Make the object, or replace it, as a whole."""
        store, path = self._reached()
        store.pipe_file(path, data)

    def below(self) -> list[str]:
        """The names of all objects below it, as `read_all` and `remove` take them."""
        store, path = self._reached()
        start = path.rstrip("/") + "/"
        try:
            found = store.find(path)
        except FileNotFoundError:
            return []
        return [name.removeprefix(start) for name in found if name.startswith(start)]

    def read_all(self, names: Sequence[str]) -> Iterator[bytes]:
        """Objects below it."""
        store, path = self._reached()
        if names:
            yield from store.cat([f"{path}/{name}" for name in names]).values()

    def remove(self, names: Sequence[str]) -> None:
        """Take objects below it away."""
        store, path = self._reached()
        if names:
            store.rm([f"{path}/{name}" for name in names])

    def _reached(self) -> tuple[Any, str]:
        """The file system of fsspec, and the path in it."""
        store = _store(self.text[: self.text.index("/", self.text.index("://") + 3) + 1])
        return store, str(store._strip_protocol(self.text))


@cache
def _store(bucket: str) -> Any:
    """The file system of fsspec for all places in a bucket, for all threads; it remembers no
    listing, as others may write there."""
    from fsspec.core import url_to_fs

    return url_to_fs(bucket, use_listings_cache=False)[0]


Location = Path | Url


def location(place: str | Location) -> Location:
    """Where an output lies, or is to lie; raises `OutputError` where none can."""
    if isinstance(place, Url):
        return place
    return Url.of(str(place)) if is_url(place) else local_path(place)
