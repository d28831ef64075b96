"""A real Apache Kafka that asks who is there: TLS, SASL and ACLs, a listener for each way in.

What a listener is for is its name; ``PLAINTEXT``, the broker's own address, lets the test do everything.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from confluent_kafka.admin import (
    AclBinding,
    AclBindingFilter,
    AclOperation,
    AclPermissionType,
    AdminClient,
    ResourcePatternType,
    ResourceType,
    ScramCredentialInfo,
    ScramMechanism,
    UserScramCredentialUpsertion,
)

from tests.support.broker import Broker, Listener, create_broker, free_ports
from tests.support.certificates import Authority, Pair

MECHANISMS = ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512")
REAUTHENTICATE_MS = 2000  # the listener ROTATING ends a connection that is older
ITERATIONS = 4096

_PROTOCOLS = {
    "SASL": "SASL_PLAINTEXT",
    "ROTATING": "SASL_PLAINTEXT",
    "SCRAMONLY": "SASL_PLAINTEXT",
    "SASLTLS": "SASL_SSL",
    "TLS": "SSL",
    "MUTUAL": "SSL",
    "EXPIRED": "SSL",
    "MISNAMED": "SSL",
}


@dataclass(frozen=True, slots=True)
class Secrets:
    """Who may sign, and the passwords of the broker's users."""

    authority: Authority
    stranger: Authority
    passwords: dict[str, str]


class SecureBroker:
    """``broker`` and the address of each of its listeners; ``files`` holds the certificates that clients need."""

    def __init__(self, folder: Path, passwords: dict[str, str]) -> None:
        """``passwords`` are those of the users, by every mechanism."""
        self.secrets = Secrets(Authority("tests"), Authority("strangers"), passwords)
        ports = free_ports(len(_PROTOCOLS))
        listeners = [
            Listener(name, protocol, port)
            for (name, protocol), port in zip(_PROTOCOLS.items(), ports, strict=True)
        ]
        scram = [
            option
            for user, password in passwords.items()
            for mechanism in MECHANISMS[1:]
            for option in ("--add-scram", f"{mechanism}=[name={user},password={password}]")
        ]
        self.broker: Broker = create_broker(folder, self._overrides(), listeners, scram)
        host = self.broker.bootstrap.rsplit(":", 1)[0]
        self.address = {"PLAINTEXT": self.broker.bootstrap} | {
            entry.name: f"{host}:{entry.port}" for entry in listeners
        }
        self._files = folder / "client"
        self._files.mkdir()
        self.ca_file = self.write("ca.pem", self.secrets.authority.certificate)

    def write(self, name: str, text: str) -> Path:
        """A file for a client."""
        path = self._files / name
        path.write_text(text)
        return path

    def client_files(self, pair: Pair, name: str) -> tuple[Path, Path]:
        """The files of a client's certificate and key."""
        return self.write(f"{name}.pem", pair.certificate), self.write(f"{name}.key", pair.key)

    def _overrides(self) -> dict[str, str]:
        authority = self.secrets.authority
        hosts = ["localhost", "127.0.0.1", "host.docker.internal"]
        good = authority.sign("broker", hosts)
        certificates = {
            "SASLTLS": good,
            "TLS": good,
            "MUTUAL": good,
            "EXPIRED": authority.sign("broker", hosts, expired=True),
            "MISNAMED": authority.sign("broker", ["kafka.example"]),
        }
        users = " ".join(f'user_{user}="{word}"' for user, word in self.secrets.passwords.items())
        overrides = {
            "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
            "super.users": "User:ANONYMOUS",
            "connection.failed.authentication.delay.ms": "50",
            "listener.name.rotating.connections.max.reauth.ms": str(REAUTHENTICATE_MS),
            "listener.name.mutual.ssl.client.auth": "required",
        }
        for name, protocol in _PROTOCOLS.items():
            prefix = f"listener.name.{name.lower()}"
            if protocol.startswith("SASL"):
                mechanisms = [entry for entry in MECHANISMS if name != "SCRAMONLY" or entry != "PLAIN"]
                overrides[f"{prefix}.sasl.enabled.mechanisms"] = ",".join(mechanisms)
                package = "org.apache.kafka.common.security"
                for mechanism in mechanisms:
                    module = (
                        f"{package}.plain.PlainLoginModule required {users};"
                        if mechanism == "PLAIN"
                        else f"{package}.scram.ScramLoginModule required;"
                    )
                    overrides[f"{prefix}.{mechanism.lower()}.sasl.jaas.config"] = module
            if protocol.endswith("SSL"):
                pair = certificates[name]
                overrides |= {
                    f"{prefix}.ssl.keystore.type": "PEM",
                    f"{prefix}.ssl.keystore.certificate.chain": _line(pair.certificate),
                    f"{prefix}.ssl.keystore.key": _line(pair.key),
                    f"{prefix}.ssl.truststore.type": "PEM",
                    f"{prefix}.ssl.truststore.certificates": _line(authority.certificate),
                }
        return overrides

    # ---- what an administrator does

    def allow(self, principal: str, rights: Iterable[tuple[str, str, str]]) -> None:
        """Grant (operation, resource type, name) each, as in ``("READ", "topic", "documents")``."""
        bindings = [
            AclBinding(
                _RESOURCES[kind],
                name,
                ResourcePatternType.LITERAL,
                principal,
                "*",
                AclOperation[operation],
                AclPermissionType.ALLOW,
            )
            for operation, kind, name in rights
        ]
        admin = self._admin()  # held until it is done: dropped, it ends what is under way
        for made in admin.create_acls(bindings, request_timeout=20).values():
            made.result()
        ours = AclBindingFilter(
            ResourceType.ANY,
            None,
            ResourcePatternType.ANY,
            principal,
            None,
            AclOperation.ANY,
            AclPermissionType.ANY,
        )
        deadline = time.monotonic() + 20
        while not set(bindings) <= set(admin.describe_acls(ours, request_timeout=20).result()):
            assert time.monotonic() < deadline, "the broker does not apply the ACLs"
            time.sleep(0.02)

    def set_password(self, user: str, password: str) -> None:
        """Change the password by SCRAM; those who are connected stay so."""
        admin = self._admin()
        for mechanism in (ScramMechanism.SCRAM_SHA_256, ScramMechanism.SCRAM_SHA_512):
            change = UserScramCredentialUpsertion(
                user, ScramCredentialInfo(mechanism, ITERATIONS), password.encode(), b"salt of the tests"
            )
            for done in admin.alter_user_scram_credentials([change], request_timeout=20).values():
                done.result()

    def _admin(self) -> AdminClient:
        return AdminClient({"bootstrap.servers": self.broker.bootstrap, "log_level": 0})


_RESOURCES = {
    "topic": ResourceType.TOPIC,
    "group": ResourceType.GROUP,
    "cluster": ResourceType.BROKER,
    "transactional id": ResourceType.TRANSACTIONAL_ID,
}


def _line(pem: str) -> str:
    """PEM as a value of a properties file."""
    return pem.strip().replace("\n", "\\n")
