"""What the libraries behind URLs raise: errors of their own, of no kind that Python knows."""

from __future__ import annotations

import sys

_OWN = {
    "aiohttp": ("ClientError",),
    "botocore.exceptions": ("BotoCoreError", "ClientError"),
    "gcsfs.retry": ("HttpError",),
    "google.auth.exceptions": ("GoogleAuthError",),
}
_NO_CREDENTIALS = {
    "NoCredentialsError",
    "PartialCredentialsError",
    "CredentialRetrievalError",
    "TokenRetrievalError",
    "ProfileNotFound",
    "DefaultCredentialsError",
    "RefreshError",
}
_NO_CONNECTION = {  # these, and what is derived from them
    *("ClientConnectionError", "ClientPayloadError"),  # of aiohttp
    *("HTTPClientError", "ConnectionError", "IncompleteReadError"),  # of botocore
    "TransportError",  # of Google
}
_UNAUTHORIZED, _FORBIDDEN, _BUSY, _BROKEN = 401, 403, (408, 429), 500


def of_clouds() -> tuple[type[Exception], ...]:
    """The exceptions of those libraries that are loaded."""
    loaded = ((sys.modules.get(name), own) for name, own in _OWN.items())
    return tuple(getattr(module, name) for module, own in loaded if module for name in own)


def refusals() -> tuple[type[Exception], ...]:
    """The exceptions by which a store, of whatever kind, refuses what it is asked for; also for
    good, as one that is only read."""
    return (OSError, NotImplementedError, *of_clouds())


def lacks_credentials(error: BaseException) -> bool:
    """Whether there were no credentials, or the server takes them for nobody's."""
    return type(error).__name__ in _NO_CREDENTIALS or _status(error) == _UNAUTHORIZED


def is_forbidden(error: BaseException) -> bool:
    """Whether these credentials do not allow it."""
    return isinstance(error, PermissionError) or _status(error) == _FORBIDDEN


def is_unreachable(error: BaseException) -> bool:
    """Whether nobody answered, or not to the end."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return isinstance(error, ConnectionError | TimeoutError) or not names.isdisjoint(_NO_CONNECTION)


def is_overloaded(error: BaseException) -> bool:
    """Whether a server answered that it cannot now."""
    status = _status(error)
    return status is not None and (status in _BUSY or status >= _BROKEN)


def _status(error: BaseException) -> int | None:
    """What a server answered, as HTTP numbers it."""
    response = getattr(error, "response", None)
    told = response.get("ResponseMetadata", {}) if isinstance(response, dict) else {}
    own = getattr(error, "status", getattr(error, "code", None))
    found = str(told.get("HTTPStatusCode", own))
    return int(found) if found.isdecimal() else None
