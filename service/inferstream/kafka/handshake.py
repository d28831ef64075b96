"""Why a broker does not take our connection: told from one that is away, and what to do about it in one line.

A broker that hears the wrong protocol closes the connection and says nothing.  So what cannot be told from the
error is found out by asking the port again in each of the protocols.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aiokafka.conn import AIOKafkaConnection
from aiokafka.errors import (
    AuthenticationFailedError,
    AuthenticationMethodNotSupported,
    ClusterAuthorizationFailedError,
    GroupAuthorizationFailedError,
    IllegalSaslStateError,
    IncompatibleBrokerVersion,
    KafkaConnectionError,
    KafkaError,
    SaslAuthenticationFailed,
    TopicAuthorizationFailedError,
    TransactionalIdAuthorizationFailed,
    UnsupportedSaslMechanismError,
    UnsupportedVersionError,
)
from aiokafka.protocol.admin import SaslHandShakeRequest

from inferstream.kafka.rights import Right, refused_line
from inferstream.settings.keys import one_of

if TYPE_CHECKING:
    from inferstream.settings.tree import Kafka, Security

PROBE_S = 2.0  # for each of the two questions

_LOGIN_REFUSED = (AuthenticationFailedError, AuthenticationMethodNotSupported, SaslAuthenticationFailed)

# Waiting does not help: the broker has answered, and the answer is no.
REFUSALS = (
    *_LOGIN_REFUSED,
    ClusterAuthorizationFailedError,
    GroupAuthorizationFailedError,
    IllegalSaslStateError,
    IncompatibleBrokerVersion,
    TopicAuthorizationFailedError,
    TransactionalIdAuthorizationFailed,
    UnsupportedSaslMechanismError,
    UnsupportedVersionError,
    ssl.SSLCertVerificationError,
)

# OpenSSL's X509_V_ERR_*
_NOT_YET_VALID, _EXPIRED = 9, 10
_UNKNOWN_AUTHORITY = (2, 18, 19, 20, 21)
_WRONG_NAME = (62, 64)


@dataclass(frozen=True, slots=True)
class Spoken:
    """What a port speaks: a value of ``kafka.security.protocol``, and the SASL mechanisms it takes.

    ``wants_certificate``: without one of ours it says no more than that it speaks TLS.
    """

    protocol: str
    mechanisms: tuple[str, ...] = ()
    wants_certificate: bool = False


def refusal_in(error: BaseException) -> BaseException | None:
    """The error itself, or the one behind it, that says that the broker will not have us; else None."""
    return next((cause for cause in _chain(error) if isinstance(cause, REFUSALS) or _is_alert(cause)), None)


def may_speak_otherwise(error: BaseException) -> bool:
    """Whether the port may speak another protocol than ours: it closed the connection, or did not know our SASL."""
    if isinstance(error, UnsupportedSaslMechanismError | IllegalSaslStateError):
        return True
    return refusal_in(error) is None and any(
        isinstance(cause, ConnectionResetError | BrokenPipeError | EOFError | ssl.SSLError)
        or type(cause) is KafkaConnectionError
        for cause in _chain(error)
    )


def refused_login(kafka: Kafka, host: str, error: BaseException) -> str:
    """The line for what :func:`refusal_in` has found; ``host`` may be empty."""
    security = kafka.security
    where = host or ",".join(kafka.bootstrap_servers)
    match error:
        case TopicAuthorizationFailedError():
            return f"not authorized for a topic: {_text(error)}"
        case GroupAuthorizationFailedError():
            return refused_line(kafka, [Right("READ", "group", kafka.group_id)])
        case TransactionalIdAuthorizationFailed():
            name = kafka.transactional_id or "*"
            return refused_line(kafka, [Right("WRITE", "transactional id", name)])
        case ClusterAuthorizationFailedError():
            return refused_line(kafka, [Right("IDEMPOTENT_WRITE", "cluster", "kafka-cluster")])
        case UnsupportedSaslMechanismError():
            return f"Kafka at {where} does not take kafka.security.mechanism={security.mechanism}"
        case IllegalSaslStateError():
            return (
                f"Kafka at {where} wants no SASL there: set kafka.security.protocol to "
                f"{security.protocol.removeprefix('SASL_')} and leave "
                "kafka.security.mechanism out, or use the port of its SASL listener"
            )
        case ssl.SSLCertVerificationError():
            return f"Kafka at {where} is not trusted: {_certificate(security, error)}"
        case ssl.SSLError():
            said = _reason(error).lower().replace("_", " ")
            return f"Kafka at {where} refused TLS: {_certificate_of_ours(security)} ({said})"
    if isinstance(error, _LOGIN_REFUSED):
        said = error.args[0] if error.args else type(error).__name__
        return (
            f"Kafka at {where} refused to log in kafka.security.username={security.username} by "
            f"{security.mechanism}: wrong user or password ({_source(security)}): {said}"
        )
    return f"Kafka at {where} refused: {_text(error)}"


def wrong_protocol(kafka: Kafka, host: str, spoken: Spoken) -> str | None:
    """The line for a port that speaks another protocol than ours, or None when that is not the trouble."""
    security = kafka.security
    if spoken.wants_certificate and security.protocol.endswith("SSL"):
        return f"Kafka at {host} refused TLS: {_certificate_of_ours(security)}"
    if spoken.protocol != security.protocol:
        takes = f" and kafka.security.mechanism ({one_of(spoken.mechanisms)})" if spoken.mechanisms else ""
        return (
            f"Kafka at {host} does not speak kafka.security.protocol={security.protocol}: use the port of a "
            f"listener that does, or set it to {spoken.protocol}{takes}"
        )
    if security.mechanism is not None and spoken.mechanisms and security.mechanism not in spoken.mechanisms:
        return (
            f"Kafka at {host} does not take kafka.security.mechanism={security.mechanism}: "
            f"set it to {one_of(spoken.mechanisms)}"
        )
    return None


async def spoken_at(host: str, port: int, security: Security) -> Spoken | None:
    """Ask a port what it speaks, at most 2 × PROBE_S; None if it does not say.  No secret is sent to it."""
    for tls in (False, True):
        with contextlib.suppress(KafkaError, OSError, EOFError, TimeoutError):
            async with asyncio.timeout(PROBE_S):
                return await _ask(host, port, security, tls=tls)
    return None


async def _ask(host: str, port: int, security: Security, *, tls: bool) -> Spoken:
    context = ssl.create_default_context()
    context.check_hostname = False  # it is only asked what it speaks, and told nothing
    context.verify_mode = ssl.CERT_NONE
    connection = AIOKafkaConnection(
        host,
        port,
        security_protocol="SSL" if tls else "PLAINTEXT",
        ssl_context=context,
        request_timeout_ms=int(PROBE_S * 1000),
    )
    try:
        await connection.connect()
        answer = await connection.send(SaslHandShakeRequest(security.mechanism or "PLAIN"))
    except (KafkaError, OSError, EOFError):
        if not tls or not await _shakes_hands(host, port, context):
            raise
        return Spoken("SSL", wants_certificate=True)
    finally:
        connection.close()
    sasl = bool(answer.enabled_mechanisms)
    return Spoken(
        f"SASL_{'SSL' if tls else 'PLAINTEXT'}" if sasl else "SSL" if tls else "PLAINTEXT",
        tuple(sorted(answer.enabled_mechanisms)),
    )


async def _shakes_hands(host: str, port: int, context: ssl.SSLContext) -> bool:
    try:
        _, writer = await asyncio.open_connection(host, port, ssl=context)
    except (OSError, EOFError):
        return False
    writer.close()
    return True


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _is_alert(error: BaseException) -> bool:
    """Whether the other side of TLS has said why it will not have us, and not that something is wrong with it."""
    reason = _reason(error)
    return "ALERT" in reason and "INTERNAL_ERROR" not in reason and "USER_CANCELLED" not in reason


def _reason(error: BaseException) -> str:
    return str(getattr(error, "reason", "") or "") if isinstance(error, ssl.SSLError) else ""


def _certificate(security: Security, error: ssl.SSLCertVerificationError) -> str:
    code = error.verify_code
    if code == _EXPIRED:
        return "its certificate, or that of its authority, has expired: renew it"
    if code == _NOT_YET_VALID:
        return "its certificate is not valid yet: compare the clocks"
    if code in _UNKNOWN_AUTHORITY:
        if security.ca_file is None:
            return (
                "its certificate is signed by no authority that this machine trusts: set kafka.security.ca_file "
                "to a PEM file with the one that signed it"
            )
        return f"its certificate is signed by no authority of kafka.security.ca_file={security.ca_file}"
    if code in _WRONG_NAME:
        return (
            f"its certificate is for other names ({error.verify_message}): use one of those in "
            "kafka.bootstrap_servers and the brokers' advertised.listeners, or add this one to the certificate"
        )
    return error.verify_message


def _certificate_of_ours(security: Security) -> str:
    if security.cert_file is None:
        return "it wants a client certificate: set kafka.security.cert_file and kafka.security.key_file"
    return (
        f"it does not take the certificate of kafka.security.cert_file={security.cert_file}: expired, revoked, "
        "or signed by an authority that it does not trust"
    )


def _source(security: Security) -> str:
    if security.password_file is not None:
        return f"kafka.security.password_file={security.password_file}"
    return "INFERSTREAM_KAFKA__SECURITY__PASSWORD"


def _text(error: BaseException) -> str:
    name, text = type(error).__name__, " ".join(str(error).split())
    return name if not text else text if text.startswith(name) else f"{name}: {text}"
