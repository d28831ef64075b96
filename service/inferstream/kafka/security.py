"""Encryption and authentication: what a connection to a broker is made with, read anew for each.

aiokafka 0.14 takes a password and an ``ssl.SSLContext`` when a client is made and keeps them.  Mounted secrets
change while a worker runs, so a client gets :class:`Credentials` instead, in the place of the context, and every
connection, whichever client opens it, goes through :func:`_create_conn`, which asks them for what is in the files
now.  No client object ever holds the password.
"""

from __future__ import annotations

import functools
import logging
import os
import ssl
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiokafka.client
from aiokafka.conn import AIOKafkaConnection, create_conn
from aiokafka.errors import AuthenticationFailedError, KafkaError

from inferstream.errors import SettingsError
from inferstream.kafka.handshake import refusal_in

if TYPE_CHECKING:
    from inferstream.settings.tree import Security

log = logging.getLogger(__name__)

FILES = ("password_file", "ca_file", "cert_file", "key_file", "key_password_file")
MAX_PASSWORD_BYTES = 64 * 1024  # of a file that is none
HIDDEN = "********"
REFUSAL_GAP_S = 15.0  # refusals further apart than this are not of one cause: nobody needs that connection


@functools.lru_cache(maxsize=8)
def credentials_of(security: Security) -> Credentials:
    """The one :class:`Credentials` of these settings, for all clients of the process."""
    return Credentials(security)


def security_options(security: Security) -> dict[str, Any]:
    """The keyword arguments that a client of aiokafka needs for these settings.

    Raises SettingsError for a file that cannot be read or does not hold what it should.
    """
    if security.protocol == "PLAINTEXT":
        return {}
    credentials = credentials_of(security)
    credentials.check()
    options: dict[str, Any] = {"security_protocol": security.protocol, "ssl_context": credentials}
    if security.mechanism is not None:
        options |= {
            "sasl_mechanism": security.mechanism,
            "sasl_plain_username": security.username,
            "sasl_plain_password": HIDDEN,  # the credentials put the real one in
        }
    return options


@dataclass(frozen=True, slots=True)
class _Refused:
    """Since when, and when last, a host has refused our connections, on the monotonic clock."""

    since: float
    last: float
    error: BaseException


class Credentials:
    """The password and the TLS context of ``kafka.security``, as its files are now."""

    def __init__(self, security: Security) -> None:
        self._security = security
        self._context: ssl.SSLContext | None = None
        self._password: str | None = None
        self._read: dict[str, object] = {}  # setting → what its file was like when it was read
        self._complete = False  # everything has been read once
        self._refused: dict[str, _Refused] = {}

    def __repr__(self) -> str:
        return f"<Credentials {self._security.protocol}>"

    def check(self) -> None:
        """Read all files unless that has been done; raises SettingsError for one that is not as it should be."""
        if not self._complete:
            self._refresh()

    def current(self) -> dict[str, Any]:
        """The options of a connection that is made now.

        Files that have changed and cannot be used, such as a certificate whose key is not yet there, leave what
        was read before.
        """
        try:
            self._refresh()
        except SettingsError as error:
            log.warning("changed secrets are not used yet", extra={"error": str(error)})
        options: dict[str, Any] = {"ssl_context": self._context}
        if self._password is not None:
            options["sasl_plain_password"] = self._password
        return options

    def _refresh(self) -> None:
        security = self._security
        found = {name: _identity(path) for name in FILES if (path := getattr(security, name)) is not None}
        if self._complete and self._read == found:
            return
        password = context = None
        if security.mechanism is not None:
            password = _password(security)
        if security.protocol.endswith("SSL"):
            context = _context(security)
        if self._complete:
            changed = sorted(name for name in found if found[name] != self._read.get(name))
            log.info("secrets have changed and are read again", extra={"settings": changed})
        self._read, self._password, self._context, self._complete = found, password, context, True

    # ---- what the brokers say to them

    def accepted(self, host: str) -> None:
        self._refused.pop(host, None)

    def refused(self, host: str, error: BaseException) -> None:
        now = time.monotonic()
        known = self._refused.get(host)
        since = known.since if known is not None and now - known.last <= REFUSAL_GAP_S else now
        self._refused[host] = _Refused(since, now, error)

    def refused_for(self, seconds: float) -> tuple[str, BaseException] | None:
        """A host that has refused every connection for this long and still does, and its answer; None without."""
        now = time.monotonic()
        for host, entry in self._refused.items():
            if entry.last - entry.since >= seconds and now - entry.last <= REFUSAL_GAP_S:
                return host, entry.error
        return None


async def _create_conn(host: str, port: int, **options: Any) -> AIOKafkaConnection:
    """aiokafka's ``create_conn``, with the credentials of this moment."""
    credentials = options.get("ssl_context")
    if not isinstance(credentials, Credentials):
        return await create_conn(host, port, **options)
    where = f"{host}:{port}"
    try:
        connection = await create_conn(host, port, **options | credentials.current())
    except (KafkaError, OSError) as error:  # OSError first: of TLS, some are ValueErrors as well
        if (refusal := refusal_in(error)) is not None:
            credentials.refused(where, refusal)
        raise
    except (
        ValueError,
        KeyError,
        AssertionError,
    ) as error:  # of SCRAM; it would end aiokafka's background tasks
        raise AuthenticationFailedError(f"the broker's part of the login is wrong: {error!r}") from error
    credentials.accepted(where)
    return connection


aiokafka.client.create_conn = _create_conn


def _identity(path: Path) -> object:
    """Changes when the file does, also when a mounted Secret is swapped by a link; None while it is not there."""
    try:
        stat = os.stat(path)
    except OSError:
        return None
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


def _password(security: Security) -> str:
    if security.password is not None:
        return security.password.get_secret_value()
    assert security.password_file is not None  # settings/checks.py
    return _secret("password_file", security.password_file)


def _secret(name: str, path: Path) -> str:
    """The text of a file without the line's end that editors and ``echo`` add."""
    data = _bytes(name, path)
    if len(data) > MAX_PASSWORD_BYTES:
        raise SettingsError(f"kafka.security.{name}: {path} is no password: it has {len(data)} bytes")
    try:
        text = data.decode().removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError:
        text = None
    if text is None:  # outside of the except: the error would hold the secret
        raise SettingsError(f"kafka.security.{name}: {path} is not UTF-8")
    if not text:
        raise SettingsError(f"kafka.security.{name}: {path} is empty")
    return text


def _bytes(name: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        why = error.strerror or str(error)
        raise SettingsError(f"kafka.security.{name}: {path} cannot be read: {why}") from None


def _context(security: Security) -> ssl.SSLContext:
    """A context that trusts ``ca_file`` alone, or else this machine's authorities, and always verifies names."""
    for name in ("ca_file", "cert_file", "key_file"):
        if (path := getattr(security, name)) is not None:
            _bytes(name, path)
    try:
        context = ssl.create_default_context(cafile=security.ca_file)
    except (ssl.SSLError, ValueError) as error:
        raise SettingsError(
            f"kafka.security.ca_file: {security.ca_file} holds no certificates in PEM: {_reason(error)}"
        ) from None
    if security.cert_file is None:
        return context
    asked = False

    def passphrase() -> str:
        nonlocal asked
        asked = True
        return _secret("key_password_file", security.key_password_file) if security.key_password_file else ""

    where = f"kafka.security.key_file: {security.key_file}"
    try:
        context.load_cert_chain(security.cert_file, security.key_file, passphrase)
    except (ssl.SSLError, ValueError) as error:
        if not asked:
            why = f"is no private key in PEM for the certificate of cert_file {security.cert_file}: {_reason(error)}"
        elif security.key_password_file is None:
            why = "is encrypted: set kafka.security.key_password_file"
        else:
            why = f"is not opened by the passphrase of key_password_file {security.key_password_file}"
        raise SettingsError(f"{where} {why}") from None
    return context


def _reason(error: Exception) -> str:
    """OpenSSL's word for what was wrong, which holds nothing of the file."""
    reason = getattr(error, "reason", None)
    return str(reason).lower().replace("_", " ") if reason else type(error).__name__
