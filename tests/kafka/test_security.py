"""TLS, SASL and ACLs against the real listeners of a real Kafka: who gets in, who is told what, and no secret is told.

One broker with a listener for each way in; see :mod:`tests.support.secure_broker`.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import subprocess
import sys
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import orjson
import pytest
from aiokafka import AIOKafkaProducer
from aiokafka.client import AIOKafkaClient

from inferstream.errors import InferstreamError, KafkaRefused, SettingsError
from inferstream.kafka.connection import ask, client_options, connected, start_with_retry
from inferstream.kafka.preflight import check
from inferstream.kafka.rights import TopicsRequest
from inferstream.kafka.security import credentials_of
from inferstream.settings import Settings, load_settings
from tests.kafka.test_killed_in_the_middle import documents, has_results, until
from tests.support.broker import BrokerUnavailable, free_ports
from tests.support.judge import judge
from tests.support.secure_broker import SecureBroker
from tests.support.worker import ROOT, Worker, settings

PASSPHRASE = "passphrase-" + secrets.token_hex(8)
WRONG = "not-the-password"
USERS = ("worker", "publisher", "reader", "creator", "nobody", "changing", "plain")
COUNT = 40


@pytest.fixture(scope="module")
def secure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecureBroker]:
    passwords = {user: f"password-of-{user}-{secrets.token_hex(8)}" for user in USERS}
    try:
        broker = SecureBroker(tmp_path_factory.mktemp("secure"), passwords)
    except BrokerUnavailable as error:
        pytest.fail(str(error), pytrace=False)
    authority, stranger = broker.secrets.authority, broker.secrets.stranger
    broker.client_files(authority.sign("worker", passphrase=PASSPHRASE), "worker")
    broker.client_files(authority.sign("nobody"), "nobody")
    broker.client_files(authority.sign("worker", expired=True), "expired")
    broker.client_files(stranger.sign("worker"), "stranger")
    broker.write("stranger-ca.pem", stranger.certificate)
    broker.write("passphrase", f"{PASSPHRASE}\n")
    yield broker
    broker.broker.remove()


class Access:
    """A way to the broker: the settings of it, and what the environment has to hold."""

    def __init__(self, secure: SecureBroker, listener: str, user: str | None = None, **security: Any) -> None:
        """``ca``, ``cert`` and ``key_password`` are names of the client's files; ``user`` brings its password."""
        files = secure.ca_file.parent
        tree: dict[str, str] = {}
        self.environ: dict[str, str] = {}
        if user is not None:
            tree["username"] = user
            password = security.pop("password", secure.secrets.passwords[user])
            if "password_file" not in security:
                self.environ["INFERSTREAM_KAFKA__SECURITY__PASSWORD"] = password
        if (ca := security.pop("ca", None)) is not None:
            tree["ca_file"] = str(files / ca)
        if (cert := security.pop("cert", None)) is not None:
            tree |= {"cert_file": str(files / f"{cert}.pem"), "key_file": str(files / f"{cert}.key")}
        if (name := security.pop("key_password", None)) is not None:
            tree["key_password_file"] = str(files / name)
        self.security = tree | {name: str(value) for name, value in security.items()}
        self.bootstrap = secure.address[listener]

    def tree(self, source: str, target: str, group: str, **changes: Any) -> dict[str, Any]:
        kafka = {"security": self.security}
        return settings(self.bootstrap, source, target, group, {"kafka": kafka, **changes})

    def settings(self, source: str = "in", target: str = "out", group: str = "group") -> Settings:
        flags = {
            "kafka.bootstrap_servers": self.bootstrap,
            "kafka.group_id": group,
            "input.topics": source,
            "output.topic": target,
            "model.id": "builtin:hash",
            **{f"kafka.security.{name}": value for name, value in self.security.items()},
        }
        return load_settings(environ=self.environ, flags=flags, image_file=Path("/nowhere")).settings


def scram(secure: SecureBroker, user: str, listener: str = "SASL", **security: Any) -> Access:
    return Access(
        secure, listener, user, **{"protocol": "SASL_PLAINTEXT", "mechanism": "SCRAM-SHA-512", **security}
    )


async def make_topics(secure: SecureBroker, name: str) -> tuple[str, str, str]:
    kafka = secure.broker
    source, target = kafka.unique(f"{name}-in"), kafka.unique(f"{name}-out")
    await asyncio.gather(
        kafka.create_topic(source),
        kafka.create_topic(target),
        kafka.create_topic(f"{target}.dead-letters", configs={"max.message.bytes": str(2 << 20)}),
    )
    return source, target, kafka.unique(f"{name}-group")


def rights_of_a_worker(source: str, target: str, group: str) -> list[tuple[str, str, str]]:
    """Those of docs/security.md and no more."""
    topics = [source, target, f"{target}.dead-letters"]
    return [
        ("READ", "topic", source),
        ("WRITE", "topic", target),
        ("WRITE", "topic", f"{target}.dead-letters"),
        ("READ", "group", group),
        *(("DESCRIBE_CONFIGS", "topic", topic) for topic in topics),
    ]


def rendered(port: int) -> str:
    """All that the worker's port tells."""
    paths = ("metrics", "startupz", "livez", "readyz")
    pages = []
    for path in paths:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/{path}", timeout=10) as answer:
            pages.append(answer.read().decode())
    return "\n".join(pages)


def command_lines() -> str:
    """The process list, as anybody on this machine sees it."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(path.read_bytes().decode(errors="replace"))
        except OSError:  # it has ended
            continue
    return "\n".join(found)


def inferstream(
    *arguments: str, environ: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command as a user does."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("INFERSTREAM_")}
    path = os.pathsep.join(filter(None, [str(ROOT / "service"), inherited.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, "-m", "inferstream", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env={**inherited, "PYTHONPATH": path, **(environ or {})},
    )


# ---- who gets in


async def test_documents_when_brokers_ask_who_is_there_then_all_are_answered_and_no_secret_is_told(
    secure: SecureBroker, launch: Callable[..., Worker], tmp_path: Path
) -> None:
    kafka = secure.broker
    password_file = tmp_path / "password"
    password_file.write_text(secure.secrets.passwords["worker"] + "\n")
    tls = {"protocol": "SASL_SSL", "ca": "ca.pem"}
    accesses = {
        "scram-256": scram(secure, "worker", mechanism="SCRAM-SHA-256"),
        "scram-512-tls": scram(secure, "worker", "SASLTLS", password_file=password_file, **tls),
        "plain-tls": scram(secure, "worker", "SASLTLS", mechanism="PLAIN", **tls),
        "certificate": Access(
            secure, "MUTUAL", protocol="SSL", ca="ca.pem", cert="worker", key_password="passphrase"
        ),
    }
    places = dict(
        zip(accesses, await asyncio.gather(*(make_topics(secure, name) for name in accesses)), strict=True)
    )
    ports = dict(zip(accesses, free_ports(len(accesses)), strict=True))
    workers = {}
    for name, access in accesses.items():
        principal = "User:CN=worker" if name == "certificate" else "User:worker"
        await asyncio.to_thread(secure.allow, principal, rights_of_a_worker(*places[name]))
        await kafka.produce(places[name][0], [*documents(COUNT), (b"bad", b"no json")])
        telemetry = {"port": ports[name], "log_level": "debug", "log_format": "json"}
        tree = access.tree(*places[name], telemetry=telemetry)
        workers[name] = launch(tree, environ=access.environ)

    for name, (_, target, _) in places.items():
        await until(lambda t=target: has_results(kafka, t, COUNT), 90, f"the results of {name}")
        await until(
            lambda t=target: has_results(kafka, f"{t}.dead-letters", 1), 30, f"the dead letter of {name}"
        )
    told = command_lines() + "".join([await asyncio.to_thread(rendered, port) for port in ports.values()])
    for worker in workers.values():
        worker.terminate()
    for name, worker in workers.items():
        assert await worker.ended(60) == 0, (name, worker.stderr_text()[-2000:])
        told += worker.stderr_text() + worker.stdout_text() + worker.config.read_text()

    for source, target, _ in places.values():
        results = await kafka.read_all(target)
        dead = await kafka.read_all(f"{target}.dead-letters")
        verdict = judge(results, dead)
        assert (verdict.missing(await kafka.end_offsets(source)), verdict.repeats) == ([], 0)
    assert "inferstream_results_produced_total" in told and "python" in told  # it was looked at
    for secret in (secure.secrets.passwords["worker"], PASSPHRASE):
        assert secret not in told


@pytest.mark.parametrize("mechanism", ["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"])
@pytest.mark.parametrize("listener", ["SASL", "SASLTLS"])
async def test_check_when_login_and_rights_are_right_then_it_finds_the_topics(
    secure: SecureBroker, mechanism: str, listener: str
) -> None:
    places = await make_topics(secure, "check")
    await asyncio.to_thread(secure.allow, "User:worker", rights_of_a_worker(*places))
    security = {"protocol": "SASL_SSL", "ca": "ca.pem"} if listener == "SASLTLS" else {}

    findings = await check(
        scram(secure, "worker", listener, mechanism=mechanism, **security).settings(*places)
    )

    assert f"input.topics {places[0]}: 4 partitions" in findings
    assert any(
        line.startswith(f"dead_letter.topic {places[1]}") and str(2 << 20) in line for line in findings
    )


async def test_check_when_the_brokers_ask_for_no_certificate_then_tls_alone_is_enough(
    secure: SecureBroker,
) -> None:
    places = await make_topics(secure, "tls")

    assert await check(Access(secure, "TLS", protocol="SSL", ca="ca.pem").settings(*places))


# ---- who is told what

SASL_TLS = {"protocol": "SASL_SSL", "ca": "ca.pem"}

REFUSED: dict[str, tuple[Callable[[SecureBroker], Access], tuple[str, ...]]] = {
    "scram-password": (
        lambda s: scram(s, "worker", password=WRONG),
        (
            "username=worker",
            "SCRAM-SHA-512",
            "wrong user or password",
            "INFERSTREAM_KAFKA__SECURITY__PASSWORD",
        ),
    ),
    "plain-password": (
        lambda s: scram(s, "worker", "SASLTLS", mechanism="PLAIN", password=WRONG, **SASL_TLS),
        ("username=worker", "wrong user or password"),
    ),
    "mechanism": (
        lambda s: scram(s, "worker", "SCRAMONLY", mechanism="PLAIN"),
        ("kafka.security.mechanism=PLAIN", "SCRAM-SHA-256 or SCRAM-SHA-512"),
    ),
    "expired": (
        lambda s: Access(s, "EXPIRED", protocol="SSL", ca="ca.pem"),
        ("has expired", "renew"),
    ),
    "authority-of-this-machine": (
        lambda s: Access(s, "TLS", protocol="SSL"),
        ("signed by no authority", "set kafka.security.ca_file"),
    ),
    "other-authority": (
        lambda s: Access(s, "TLS", protocol="SSL", ca="stranger-ca.pem"),
        ("signed by no authority", "stranger-ca.pem"),
    ),
    "name": (
        lambda s: Access(s, "MISNAMED", protocol="SSL", ca="ca.pem"),
        ("certificate is for other names", "advertised.listeners"),
    ),
    "no-client-certificate": (
        lambda s: Access(s, "MUTUAL", protocol="SSL", ca="ca.pem"),
        ("wants a client certificate", "kafka.security.cert_file"),
    ),
    "client-certificate-expired": (
        lambda s: Access(s, "MUTUAL", protocol="SSL", ca="ca.pem", cert="expired"),
        ("does not take the certificate", "expired.pem"),
    ),
    "client-certificate-of-a-stranger": (
        lambda s: Access(s, "MUTUAL", protocol="SSL", ca="ca.pem", cert="stranger"),
        ("does not take the certificate", "stranger.pem"),
    ),
    "plain-to-tls": (lambda s: Access(s, "TLS"), ("protocol=PLAINTEXT", "set it to SSL")),
    "plain-to-sasl": (lambda s: Access(s, "SASL"), ("protocol=PLAINTEXT", "set it to SASL_PLAINTEXT")),
    "plain-to-sasl-tls": (lambda s: Access(s, "SASLTLS"), ("protocol=PLAINTEXT", "set it to SASL_SSL")),
    "tls-to-plain": (
        lambda s: Access(s, "PLAINTEXT", protocol="SSL", ca="ca.pem"),
        ("protocol=SSL", "set it to PLAINTEXT"),
    ),
    "tls-to-sasl-tls": (
        lambda s: Access(s, "SASLTLS", protocol="SSL", ca="ca.pem"),
        ("protocol=SSL", "set it to SASL_SSL"),
    ),
    "sasl-to-plain": (
        lambda s: scram(s, "worker", "PLAINTEXT"),
        ("protocol=SASL_PLAINTEXT", "set it to PLAINTEXT"),
    ),
    "sasl-to-tls": (lambda s: scram(s, "worker", "TLS"), ("protocol=SASL_PLAINTEXT", "set it to SSL")),
    "sasl-tls-to-sasl": (
        lambda s: scram(s, "worker", "SASL", **SASL_TLS),
        ("protocol=SASL_SSL", "set it to SASL_PLAINTEXT"),
    ),
    "no-right": (
        lambda s: scram(s, "nobody"),
        (
            "READ on topic in",
            "WRITE on topic out",
            "WRITE on topic out.dead-letters",
            "READ on group group",
            "to User:nobody",
        ),
    ),
    "no-right-by-certificate": (
        lambda s: Access(s, "MUTUAL", protocol="SSL", ca="ca.pem", cert="nobody"),
        ("READ on topic in", "nobody.pem"),
    ),
}


@pytest.mark.parametrize("case", REFUSED)
async def test_check_when_the_brokers_refuse_us_then_one_line_says_what_to_do(
    secure: SecureBroker, case: str
) -> None:
    access, words = REFUSED[case]
    found = access(secure)

    async with asyncio.timeout(10):  # and not kafka.connect_timeout_s, which is 60
        with pytest.raises(KafkaRefused) as caught:
            await check(found.settings())

    line = str(caught.value)
    assert "\n" not in line and all(word in line for word in words), line
    assert not any(secret in line for secret in [*secure.secrets.passwords.values(), WRONG])


@pytest.mark.parametrize("missing", range(4))
async def test_check_when_one_right_is_missing_then_the_line_names_that_one(
    secure: SecureBroker, missing: int
) -> None:
    places = await make_topics(secure, "one-missing")
    rights = rights_of_a_worker(*places)
    operation, kind, name = rights.pop(missing)
    described = [("DESCRIBE", kind, name)]  # seen, and yet not allowed: what only a try would show otherwise
    await asyncio.to_thread(secure.allow, "User:nobody", [*rights, *described])

    with pytest.raises(KafkaRefused) as caught:
        await check(scram(secure, "nobody").settings(*places))

    assert str(caught.value) == f"not authorized: grant {operation} on {kind} {name} to User:nobody"


async def test_transactional_id_when_it_may_not_be_written_then_the_line_names_it(
    secure: SecureBroker,
) -> None:
    await asyncio.to_thread(
        secure.allow,
        "User:nobody",
        [("DESCRIBE", "transactional id", "seen"), ("WRITE", "transactional id", "own")],
    )
    found = scram(secure, "nobody").settings()

    for name in ("hidden", "seen", "own"):
        kafka = found.kafka.model_copy(update={"transactional_id": name})
        producer = AIOKafkaProducer(**client_options(kafka), transactional_id=name)
        try:
            async with asyncio.timeout(10):
                await start_with_retry(kafka, producer.start, 60)
            said = ""
        except KafkaRefused as error:
            said = str(error)
        finally:
            await producer.stop()
        expected = f"not authorized: grant WRITE on transactional id {name} to User:nobody"
        assert said == ("" if name == "own" else expected)


async def test_worker_when_it_is_refused_then_it_exits_3_in_one_line(
    secure: SecureBroker, launch: Callable[..., Worker]
) -> None:
    starts = {
        "wrong user or password": scram(secure, "worker", password=WRONG),
        "READ on topic in": scram(secure, "nobody"),
        "has expired": Access(secure, "EXPIRED", protocol="SSL", ca="ca.pem"),
    }
    workers = {
        words: launch(access.tree("in", "out", "group"), environ=access.environ)
        for words, access in starts.items()
    }
    for words, worker in workers.items():
        assert await worker.ended(40) == 3, worker.stderr_text()  # less than kafka.connect_timeout_s
        story = worker.stderr_text()
        assert WRONG not in story
        errors = [line for line in story.splitlines() if line.startswith("inferstream: error: ")]
        assert "Traceback" not in story and len(errors) == 1 and words in errors[0], story


# ---- files that are not as they should be


@pytest.mark.parametrize(
    ("security", "words"),
    [
        ({"ca": "nowhere"}, ("ca_file", "nowhere", "cannot be read: No such file")),
        ({"ca": "worker.key"}, ("ca_file", "worker.key", "holds no certificates")),
        (
            {"ca": "ca.pem", "cert": "worker"},
            ("key_file", "worker.key", "set kafka.security.key_password_file"),
        ),
        (
            {"ca": "ca.pem", "cert": "worker", "key_password": "ca.pem"},
            ("key_file", "worker.key", "not opened", "ca.pem"),
        ),
    ],
)
def test_files_when_they_cannot_be_used_then_one_line_names_the_setting_and_the_path(
    secure: SecureBroker, security: dict[str, str], words: tuple[str, ...]
) -> None:
    found = Access(secure, "MUTUAL", protocol="SSL", **security).settings()

    with pytest.raises(SettingsError) as caught:
        client_options(found.kafka)

    line = str(caught.value)
    assert "\n" not in line and all(word in line for word in words), line
    assert PASSPHRASE not in line


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot be read: No such file or directory"),
        (b"", "is empty"),
        (b"\n", "is empty"),
        (b"secret\xff\xfe", "is not UTF-8"),
        (b"x" * 100_000, "is no password: it has 100000 bytes"),
    ],
)
def test_password_file_when_it_holds_no_password_then_one_line_names_it(
    secure: SecureBroker, tmp_path: Path, content: bytes | None, words: str
) -> None:
    path = tmp_path / "password"
    if content is not None:
        path.write_bytes(content)

    with pytest.raises(SettingsError) as caught:
        client_options(scram(secure, "worker", password_file=path).settings().kafka)

    assert str(caught.value) == f"kafka.security.password_file: {path} {words}"


# ---- secrets that change


@pytest.fixture
async def client(
    secure: SecureBroker, tmp_path: Path
) -> AsyncIterator[tuple[AIOKafkaClient, Settings, Path]]:
    """A client that has logged in by a password file, as user ``plain`` by PLAIN."""
    path = tmp_path / "password"
    path.write_text(secure.secrets.passwords["plain"])
    found = scram(secure, "plain", mechanism="PLAIN", password_file=path).settings()
    async with connected(found.kafka) as connection:
        yield connection, found, path


async def answers(client: AIOKafkaClient) -> bool:
    """Whether a new connection of the client is taken."""
    for connection in list(client._conns.values()):
        connection.close()
    try:
        await ask(client, TopicsRequest(["in"]))
    except Exception as error:
        assert type(error).__name__ in ("NodeNotReadyError", "KafkaConnectionError"), error
        return False
    return True


async def test_password_file_when_it_changes_then_the_next_connection_uses_it(
    secure: SecureBroker, client: tuple[AIOKafkaClient, Settings, Path]
) -> None:
    connection, found, path = client
    credentials = credentials_of(found.kafka.security)
    assert await answers(connection)

    path.write_text("another")
    assert not await answers(connection)
    assert not await answers(connection)
    refused = credentials.refused_for(0)
    assert refused is not None and "another" not in str(refused[1])

    path.write_text(secure.secrets.passwords["plain"] + "\r\n")
    assert await answers(connection)
    assert credentials.refused_for(0) is None

    path.unlink()  # a Secret that is being replaced: what was read last is used
    assert await answers(connection)


async def test_certificate_when_it_changes_then_the_next_connection_uses_it(
    secure: SecureBroker, tmp_path: Path
) -> None:
    certificate, key = tmp_path / "tls.crt", tmp_path / "tls.key"

    def put(pair: str, *, only_certificate: bool = False) -> None:
        files = secure.ca_file.parent
        certificate.write_bytes((files / f"{pair}.pem").read_bytes())
        if not only_certificate:
            key.write_bytes((files / f"{pair}.key").read_bytes())

    put("nobody")
    found = Access(
        secure, "MUTUAL", protocol="SSL", ca="ca.pem", cert_file=certificate, key_file=key
    ).settings()
    async with connected(found.kafka) as connection:
        put("stranger", only_certificate=True)  # half of a change: the old pair still counts
        assert await answers(connection)
        put("stranger")
        assert not await answers(connection)
        put("nobody")
        assert await answers(connection)


async def test_worker_when_its_password_is_changed_on_the_broker_then_it_goes_on(
    secure: SecureBroker, launch: Callable[..., Worker], tmp_path: Path
) -> None:
    kafka = secure.broker
    places = source, target, _ = await make_topics(secure, "rotation")
    await asyncio.to_thread(secure.allow, "User:changing", rights_of_a_worker(*places))
    path = tmp_path / "password"
    path.write_text(secure.secrets.passwords["changing"])
    # The broker ends a connection of this listener after two seconds.
    worker = launch(scram(secure, "changing", "ROTATING", password_file=path).tree(*places))
    await kafka.produce(source, documents(COUNT))
    await until(lambda: has_results(kafka, target, COUNT), 60, "the first results")

    changed = "changed-" + secrets.token_hex(8)
    await asyncio.to_thread(secure.set_password, "changing", changed)
    await worker.says("SaslAuthenticationFailed", 30)  # the file still holds the old one
    path.write_text(changed)
    await worker.says("secrets have changed and are read again", 30)
    await kafka.produce(source, documents(COUNT))
    await until(lambda: has_results(kafka, target, 2 * COUNT), 60, "results after the change")
    worker.terminate()

    assert await worker.ended(60) == 0, worker.stderr_text()[-2000:]
    verdict = judge(await kafka.read_all(target))
    assert verdict.missing(await kafka.end_offsets(source)) == []
    assert changed not in worker.stderr_text()
    assert secure.secrets.passwords["changing"] not in worker.stderr_text()


# ---- the commands around a worker


async def test_commands_when_each_user_has_only_its_rights_then_they_work_and_others_are_refused(
    secure: SecureBroker, tmp_path: Path
) -> None:
    source, target = secure.broker.unique("commands-in"), secure.broker.unique("commands-out")
    topics = [source, target, f"{target}.dead-letters"]
    rights = [(operation, "topic", topic) for topic in topics for operation in ("CREATE", "DESCRIBE")]
    await asyncio.to_thread(secure.allow, "User:creator", rights)
    await asyncio.to_thread(secure.allow, "User:publisher", [("WRITE", "topic", source)])
    await asyncio.to_thread(secure.allow, "User:reader", [("READ", "topic", source)])
    lines = tmp_path / "documents.jsonl"
    lines.write_text("".join(f'{{"id": {n}, "text": "document {n}"}}\n' for n in range(5)))

    async def run(user: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        access = scram(secure, user, "SASLTLS", **SASL_TLS)
        folder = tmp_path / user
        folder.mkdir(exist_ok=True)
        config = folder / "service.yaml"
        config.write_text(orjson.dumps(access.tree(source, target, "unused")).decode())  # JSON is YAML
        return await asyncio.to_thread(
            inferstream, *arguments, "--config", str(config), environ=access.environ
        )

    described = [("DESCRIBE", "topic", topic) for topic in topics]
    await asyncio.to_thread(secure.allow, "User:nobody", described)
    not_made = await run("nobody", "topics", "create")
    created = await run("creator", "topics", "create")
    assert created.returncode == 0, created.stderr
    published, not_published, not_created = await asyncio.gather(
        run("publisher", "publish", str(lines)),
        run("reader", "publish", str(lines)),
        run("reader", "topics", "create"),
    )
    assert published.returncode == 0 and "5 accepted" in published.stderr + published.stdout
    consumed, not_consumed = await asyncio.gather(
        run("reader", "consume", "--topic", source, "--from-beginning", "--max", "5"),
        run("publisher", "consume", "--topic", source, "--from-beginning", "--max", "5"),
    )
    assert consumed.returncode == 0 and len(consumed.stdout.splitlines()) == 5, consumed.stderr
    for done, line in (
        (not_published, f"grant WRITE on topic {source} to User:reader"),
        (not_consumed, f"grant READ on topic {source} to User:publisher"),
        (not_made, f"grant CREATE on topic {source} to User:nobody"),
        (not_created, f"grant DESCRIBE on topic {target}"),
    ):
        assert done.returncode == 3 and line in done.stderr, done.stderr
        assert len(done.stderr.splitlines()) == 1, done.stderr
    told = "".join(done.stdout + done.stderr for done in (created, published, consumed, not_published))
    assert not any(password in told for password in secure.secrets.passwords.values())


def test_show_when_a_password_is_set_then_no_format_prints_it(secure: SecureBroker) -> None:
    access = scram(secure, "worker")
    flags = [part for name, value in access.security.items() for part in (f"--kafka.security.{name}", value)]

    for form in ("table", "yaml", "json"):
        done = inferstream("config", "show", "--format", form, *flags, environ=access.environ)
        assert done.returncode == 0 and "********" in done.stdout, done.stderr
        assert secure.secrets.passwords["worker"] not in done.stdout + done.stderr


# ---- what the broker never sees


async def test_login_when_a_broker_proves_nothing_then_it_is_refused_and_the_client_lives(
    secure: SecureBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SCRAM is mutual: a broker that does not know the password cannot sign."""
    from aiokafka.conn import ScramAuthenticator

    def wrong(self: ScramAuthenticator, server_final: str) -> None:
        raise ValueError("Server sent wrong signature!")

    monkeypatch.setattr(ScramAuthenticator, "process_server_final_message", wrong)
    with pytest.raises(InferstreamError, match="wrong signature") as caught:
        await check(scram(secure, "worker").settings())
    assert caught.value.exit_code == 3
