"""The whole configuration as one typed tree.  What stands under a setting is its manual: default, unit, cost.

A setting's key is its path in this tree (``kafka.group_id``).  The same key gives the flag
(``--kafka.group-id``), the environment variable (``INFERSTREAM_KAFKA__GROUP_ID``) and the place in YAML.
``docs/settings.md``, ``--help`` and the JSON Schema are generated from here; nothing is written twice.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PrivateAttr, SecretStr

MIB = 1 << 20
MAX_TOPIC_NAME = 249  # characters; the broker refuses longer ones


@dataclass(frozen=True, slots=True)
class Auto:
    """Marks a setting that the worker finds by itself while it is not set; ``how`` says how, in a few words.

    The text ``auto`` is accepted as its value and takes back what a lower layer has set."""

    how: str


@dataclass(frozen=True, slots=True)
class Pattern:
    """What a text, or each item of a list, must be, for the JSON Schema: a regular expression for the whole of it, in
    what Python, ECMAScript and RE2 have in common."""

    regex: str


_OF_TOPIC = "[a-zA-Z0-9._-]"
TOPIC = Pattern(
    rf"[a-zA-Z0-9_-]{_OF_TOPIC}{{0,248}}|\.[a-zA-Z0-9_-]{_OF_TOPIC}{{0,247}}|\.\.{_OF_TOPIC}{{1,247}}"
)
POINTER = Pattern(r"/([^~]|~[01])*")
PORT = "[1-9][0-9]{0,3}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5]"
SERVER = Pattern(rf"embedded|(\[[0-9a-fA-F:.]+\]|[^\s,:/\[\]]+):({PORT})")
DEVICE = Pattern("auto|cpu|cuda(:[0-9]{1,3})?")


def topic_name(name: str) -> str:
    if not re.fullmatch(r"[a-zA-Z0-9._-]+", name) or name in (".", ".."):
        raise ValueError("must be a topic name: letters, digits, '.', '_' and '-', and not '.' or '..'")
    if len(name) > MAX_TOPIC_NAME:
        raise ValueError(
            f"must have at most {MAX_TOPIC_NAME} characters, as Kafka allows no longer topic name"
        )
    return name


def _topic_or_unset(name: str) -> str:
    return topic_name(name) if name else name


def _distinct(names: list[str]) -> list[str]:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"must not name the same thing twice: {', '.join(twice)}")
    return names


def _pointer(text: str) -> str:
    if not text.startswith("/"):
        raise ValueError(f"must be a JSON Pointer, which begins with '/': did you mean '/{text}'?")
    if re.search(r"~(?![01])", text):
        raise ValueError("must be a JSON Pointer, in which '~' is written '~0' and '/' within a name '~1'")
    return text


def _servers(servers: list[str]) -> list[str]:
    if servers == ["embedded"]:
        return servers
    for server in servers:
        if server == "embedded":
            raise ValueError("must be 'embedded' alone, or HOST:PORT, not both")
        if "://" in server:
            raise ValueError(f"must be HOST:PORT without a scheme, as in localhost:9092 (got {server!r})")
        if not re.fullmatch(SERVER.regex, server):
            raise ValueError(f"must be HOST:PORT, as in localhost:9092 (got {server!r})")
    return servers


def _device(name: str) -> str:
    if not re.fullmatch(DEVICE.regex, name):
        raise ValueError("must be auto, cpu, cuda or cuda:N, as in cuda:1")
    return name


Text = Annotated[str, Field(min_length=1)]
Topic = Annotated[str, AfterValidator(topic_name)]
Pointer = Annotated[str, AfterValidator(_pointer), POINTER]


class Section(BaseModel):
    """What every part of the tree has in common: closed, frozen, documented by the strings in it."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        validate_default=False,
        hide_input_in_errors=True,  # an input may be a password
        protected_namespaces=(),  # a section is called `model`
    )


class Security(Section):
    protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = "PLAINTEXT"
    """How the brokers are spoken to: ``SSL`` encrypts, ``SASL_*`` logs in with a user and a password, and
    ``SASL_SSL`` does both.

    It must be that of the brokers' listener; the wrong one is told at start (exit 3).  Under ``SASL_PLAINTEXT``
    everything but a SCRAM password crosses the network in the clear.  See docs/security.md."""

    mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", "OAUTHBEARER"] | None = None
    """How to log in; required under ``SASL_*``.

    ``PLAIN`` sends the password itself and belongs into ``SASL_SSL``; ``SCRAM-*`` proves that it is known.
    ``OAUTHBEARER`` is refused (exit 2): Kafka's client takes tokens only from code."""

    username: Text | None = None
    """The user to log in as; required under ``SASL_*``.  To the brokers' ACLs it is ``User:<username>``."""

    password: SecretStr | None = None
    """The password to log in with.  A secret: it has no flag and no place in a settings file; it comes from the
    environment, or from ``kafka.security.password_file``, and is never printed."""

    password_file: Path | None = None
    """A file with the password, such as a mounted Secret; a line's end after it is no part of it.

    It is read again for every connection that is made, so a changed password needs no restart."""

    ca_file: Path | None = None
    """A PEM file with the authorities that may sign the brokers' certificates; without one, those that this
    machine trusts.

    The brokers' names are always verified: each must stand in its certificate as it stands in
    ``kafka.bootstrap_servers`` and the brokers' ``advertised.listeners``.  As all files here, it is read again
    when it has changed, for the next connection."""

    cert_file: Path | None = None
    """A PEM file with this client's certificate, and those between it and its authority, for brokers that ask for
    one.  To the brokers' ACLs its subject is the user, as in ``User:CN=search``."""

    key_file: Path | None = None
    """A PEM file with the private key of ``kafka.security.cert_file``."""

    key_password_file: Path | None = None
    """A file with the passphrase of ``kafka.security.key_file``, if that is encrypted."""


class Kafka(Section):
    bootstrap_servers: Annotated[list[str], AfterValidator(_servers), SERVER] = []
    """The first brokers to ask, as HOST:PORT; required.  ``embedded`` starts a broker inside the process,
    which lives no longer than it and forgets its oldest records: for demonstrations.

    Two or three are enough, the rest is learnt from them; one is a single point of failure at start.  The
    brokers answer with their *advertised* listeners, and those must be reachable from here as well: a worker
    that starts and then waits for ever usually has a wrong ``advertised.listeners`` on the broker's side.
    After the start only known brokers are asked again, so the advertised names should be DNS names, not
    addresses that change."""

    group_id: Text = "inferstream"
    """The consumer group.  Workers with the same group share the partitions and the committed offsets.

    A new group starts where ``input.start`` says, so renaming it reads everything again.  A new model wants a
    new group and a new output topic side by side."""

    client_id: Annotated[str, Auto("`inferstream-<host name>`")] = ""
    """The name that the brokers' logs, quotas and metrics show for this worker.

    It identifies nobody: two workers may have the same one."""

    client_rack: Text | None = None
    """The rack or availability zone of this worker, as in the brokers' ``broker.rack``.

    With it, and with a rack-aware ``replica.selector.class`` on the brokers, records are fetched from a
    replica in the same zone, which saves cross-zone traffic and may add a little latency."""

    group_instance_id: Text | None = None
    """Makes this worker a static member of the group: a restart within ``kafka.session_timeout_ms`` moves no
    partition.

    It must be unique to each worker and the same after a restart (a StatefulSet's pod name).  Of two
    live workers with the same one, one ends with exit code 3.  A static member does not leave the group when it
    drains: what is scaled down stalls its partitions for a whole session timeout."""

    transactional_id: Annotated[Text | None, Auto("`<group>-<unique>`")] = None
    """The transactional id under ``delivery.guarantee: exactly-once``; without effect under at-least-once.

    It must be unique to each worker: of two live workers with the same one, one ends with exit code 3.  One that
    is the same after a restart (a StatefulSet's pod name) lets a worker end what its predecessor left open as soon as
    it starts; otherwise that holds readers back until ``delivery.transaction_timeout_ms`` is over.  With ACLs, the
    worker needs WRITE and DESCRIBE on it."""

    session_timeout_ms: Annotated[int, Field(ge=1000, le=1_800_000)] = 45_000
    """How long the group waits for a heartbeat before it gives this worker's partitions to others, in
    milliseconds.

    Lower finds a dead worker sooner; too low takes a worker's partitions away during a pause of the network
    or of the process.  It must lie within the brokers' ``group.min.session.timeout.ms`` (6000) and
    ``group.max.session.timeout.ms`` (1800000), else the group refuses the worker (exit 3)."""

    heartbeat_interval_ms: Annotated[int, Field(ge=100, le=600_000)] = 3_000
    """How often this worker tells the group that it lives, in milliseconds; at most a third of
    ``kafka.session_timeout_ms``.

    It is also how soon a worker learns of a rebalance."""

    rebalance_timeout_ms: Annotated[int, Field(ge=1000, le=3_600_000)] = 60_000
    """How long the group waits, in a rebalance, for each worker to finish what it holds and join again, in
    milliseconds.

    A worker that is later is thrown out and its work done twice, so ``delivery.revoke_timeout_s`` with a
    commit's time on top (a quarter of it) must stay below 0.6 of this."""

    request_timeout_ms: Annotated[int, Field(ge=1000, le=3_600_000)] = 70_000
    """How long to wait for a broker's answer before the request is tried again, in milliseconds.

    It must be greater than ``kafka.rebalance_timeout_ms``: joining a group is one request that is answered
    only when the rebalance ends, and a shorter time here makes it start over again and again."""

    connect_timeout_s: Annotated[float, Field(ge=1, le=86_400)] = 60
    """How long to try to reach Kafka at start before giving up (exit 3), in seconds.

    Once the worker runs, it waits for lost brokers for ever."""

    fetch_max_bytes: Annotated[int, Field(ge=1024, le=1 << 31)] = 16 * MIB
    """The most that one answer of one broker holds, in bytes.

    It counts about three times per broker in memory while an answer is read, outside of ``buffer.max_bytes``.
    A single larger batch of records is still delivered."""

    max_partition_fetch_bytes: Annotated[int, Field(ge=1024, le=1 << 30)] = MIB
    """The most that one answer holds for one partition, in bytes.

    It counts once per partition in memory, outside of ``buffer.max_bytes``.  Larger helps few partitions with
    high throughput, and makes the turns between partitions coarser.  A single larger batch of records is
    still delivered."""

    security: Security = Security()
    """Encryption and authentication."""


class Input(Section):
    topics: Annotated[list[Topic], AfterValidator(_distinct), TOPIC] = []
    """The topics to read documents from; required.

    They must exist.  All are read with the same ``input.*`` settings."""

    format: Literal["json", "text"] = "json"
    """What a record's value is: ``json``, an object read through the ``*_field`` pointers, or ``text``, the
    document itself in UTF-8."""

    start: Literal["earliest", "latest", "error"] = "earliest"
    """Where a group without a committed offset begins.  ``error`` refuses to begin (exit 1), for a group that
    must not lose its place unnoticed.

    It counts once per group: the place is committed before the first record is read, so that a crash under
    ``latest`` skips nothing, and a partition that is added later is read from its beginning."""

    on_lost_range: Literal["stop", "skip"] = "stop"
    """What to do when the committed offset no longer exists, as retention has deleted the records.  ``stop``
    ends the worker (exit 1) and leaves the offset alone; ``skip`` goes on at the oldest record there is, and
    counts what is missing."""

    isolation: Literal["read_committed", "read_uncommitted"] = "read_committed"
    """Whether records of open and aborted transactions are read.

    With ``read_committed`` a producer that leaves a transaction open holds its partition back until the
    broker aborts it."""

    tombstones: Literal["forward", "dead-letter"] = "forward"
    """What becomes of a record with a key and no value.  ``forward`` writes the same to the output topic, so
    that a compacted index deletes the entry.  One without a key is always a dead letter."""

    id_field: Pointer = "/id"
    """JSON Pointer to the document's id, a string or an integer of at most 1 kB.  A document without one is
    called ``topic:partition:offset``."""

    text_field: Pointer = "/text"
    """JSON Pointer to the text.  A document without it is a dead letter (``missing_text``)."""

    text_pair_field: Pointer = "/text_pair"
    """JSON Pointer to the second text, for tasks that compare two.  It may be absent."""

    metadata_field: Pointer = "/metadata"
    """JSON Pointer to what is copied into the result as it is.  It may be absent."""


class Output(Section):
    topic: Annotated[str, AfterValidator(_topic_or_unset), TOPIC] = ""
    """The topic that results go to; required.

    It must exist and be none of ``input.topics``.  With as many partitions as the input topic, a result keeps
    its document's partition number."""

    encoding: Literal["json", "base64-f32", "base64-f16"] = "json"
    """How vectors are written: ``json`` as numbers, ``base64-*`` as little-endian floats, about a quarter
    (f32) or an eighth (f16) of the bytes, and much cheaper to write and to read.

    f16 keeps about three decimal digits."""

    compression: Literal["none", "gzip", "snappy", "lz4", "zstd"] = "zstd"
    """How batches of results and dead letters are compressed.

    zstd and snappy cost little; gzip and lz4 cost about ten times the CPU per record or more and can hold the
    whole worker back."""

    max_message_bytes: Annotated[int | None, Field(ge=1024, le=1 << 31), Auto("the topic's limit")] = None
    """The largest batch that the output topic accepts, in bytes.

    It is read from the topic's ``max.message.bytes``.  Set it only where the worker may not read topic
    configurations.  Above the topic's real limit, batches are refused and split again and again; a result
    that is larger alone is a dead letter (``result_too_large``)."""


class DeadLetter(Section):
    topic: Annotated[str, AfterValidator(_topic_or_unset), TOPIC, Auto("`<output.topic>.dead-letters`")] = ""
    """The topic for documents that get no result, with the reason in the headers.

    It must exist, must not be compacted (it would lose dead letters that share a key), and must accept
    records 64 KiB larger than the input's."""

    oversize: Literal["stop", "strip"] = "stop"
    """What to do when a dead letter is too large for its topic.  ``stop`` ends the worker (exit 7) with
    nothing committed, and names topic, partition and offset; ``strip`` sends it without the value, its size
    in a header."""

    max_message_bytes: Annotated[int | None, Field(ge=1024, le=1 << 31), Auto("the topic's limit")] = None
    """The largest record that the dead-letter topic accepts, in bytes; as ``output.max_message_bytes``."""


class Model(Section):
    id: Text = "sentence-transformers/all-MiniLM-L6-v2"
    """Which model: a folder, a name on the Hugging Face hub, ``package:NAME`` (a model inside an installed
    Python package), or ``builtin:hash`` (a vector computed from the text, without torch: for tests)."""

    revision: Text | None = None
    """The commit, branch or tag of a model from the hub.

    Without one, the newest is taken at each start, so two workers may run different weights: pin a commit in
    production."""

    trust_remote_code: bool = False
    """Whether Python code that comes with the model may run, with all the rights of this process.

    Models whose class is not part of transformers need it, and do not load without (exit 4).  Read the code first
    and pin ``model.revision``; the worker warns at every start.  Weights are loaded from safetensors alone, with
    this or without."""

    task: Literal["embed"] = "embed"
    """What the model is asked for.  ``embed``: one vector per document."""

    device: Annotated[str, AfterValidator(_device), DEVICE, Auto("cuda where there is one, else cpu")] = (
        "auto"
    )
    """Where the model runs: ``auto``, ``cpu``, ``cuda`` (the first GPU) or ``cuda:N``.

    ``auto`` takes the first GPU if there is an NVIDIA driver and torch can use it.  A GPU that is asked for and
    cannot be had is refused at start (exit 2).  One worker uses one GPU: to use several, run a worker for each, with
    ``cuda:N`` or CUDA_VISIBLE_DEVICES.  Only a model whose weights the first GPU cannot hold is spread by ``auto`` over
    all of them, which needs ``inferstream[accelerate]`` and keeps one GPU busy at a time.  See docs/gpu.md."""

    dtype: Literal["auto", "fastest", "float32", "bfloat16", "float16"] = "auto"
    """The numbers that the model computes with.  ``auto`` is float32 on the CPU, and on a GPU bfloat16 where it
    has it in hardware (compute capability 8.0), else float32.  ``fastest`` is the same on a GPU; on a CPU that
    has bfloat16 in hardware it takes that if a measurement at start, which is logged, finds it 1.2 times as fast.

    bfloat16 is about twice as fast where the hardware has it, and refused (exit 2) where it has not; embeddings
    then agree with float32 to a cosine of at least 0.999.  float16 is refused on a CPU.  On a GPU, float32 cannot
    run without padding.  Vectors computed in different types should not share an index."""

    max_length: Annotated[int | None, Field(ge=1, le=1 << 20), Auto("the model's own limit")] = None
    """The most tokens of one model input, special tokens included.

    Longer documents go by ``model.long_documents``.  Lower is faster and reads less of each document; above
    what the model can read the worker does not start (exit 2)."""

    long_documents: Literal["truncate", "chunk", "reject"] = "truncate"
    """What to do with a document of more than ``model.max_length`` tokens: ``truncate`` keeps its beginning
    and says so in the result, ``chunk`` runs all of it in pieces, ``reject`` makes it a dead letter
    (``too_long``)."""

    max_chunks: Annotated[int, Field(ge=1, le=1 << 20)] = 1024
    """Under ``long_documents: chunk``, the most pieces of one document; one with more is a dead letter
    (``too_long``)."""

    compute_threads: Annotated[int | None, Field(ge=1, le=1024), Auto("measured at warm-up")] = None
    """On the CPU, how many forwards run side by side, each on one thread, over the same weights.

    It is found from the CPU time per document that computing and preparing take.  Together with
    ``prepare.threads`` it should not exceed the cores.  No effect on a GPU."""


class Batch(Section):
    max_tokens: Annotated[int | None, Field(ge=1, le=1 << 28), Auto("cpu 2048, cuda 32768, hash 65536")] = (
        None
    )
    """The token budget of one batch, padding included.

    More fills a GPU better up to a point and costs its memory; it also makes every document wait for the
    longer batch.  It is raised to ``model.max_length`` where that is set and larger.  On a GPU it is lowered at
    start to what its memory holds, measured with the model loaded; and the worker lowers it by itself, for
    documents of like length, when the device runs out of memory."""

    linger_ms: Annotated[float, Field(ge=0, le=60_000)] = 5
    """How long a free device waits for a batch to fill, in milliseconds.

    It only matters when there is too little to do: under backlog batches are full at once.  0 sends what is
    there.  Every document may take this much longer; it must stay below half of
    ``delivery.revoke_timeout_s``."""


class Buffer(Section):
    max_documents: Annotated[int | None, Field(ge=1, le=1 << 28), Auto("cpu 2048, cuda 16384, hash 8192")] = (
        None
    )
    """The most documents held between being read and being committed.  At the bound, reading stops until some
    are done."""

    max_tokens: Annotated[int | None, Field(ge=1, le=1 << 32), Auto("16 x batch.max_tokens")] = None
    """The most tokens that are prepared and wait for the device.

    Batches are chosen from this window.  Below about 16 batches there are too few documents of like length in
    it and padding grows; it must hold at least one batch."""

    max_bytes: Annotated[
        int | None, Field(ge=1024, le=1 << 42), Auto("cpu and hash 64 MiB, cuda 256 MiB")
    ] = None
    """The most memory of the documents held between being read and being committed, in bytes.

    Each counts as its largest form: raw, prepared or result.  A heavier one is let in alone.  What Kafka's
    client holds comes on top: see ``kafka.fetch_max_bytes``, ``kafka.max_partition_fetch_bytes`` and, for input
    that compresses well, docs/delivery.md."""

    max_lane_share: Annotated[float, Field(gt=0, le=1)] = 0.5
    """The share of the buffer that one partition may take, so that a partition with a slow document at its
    head leaves room for the others.  1 for a topic with a single partition gains the other half."""


class Prepare(Section):
    threads: Annotated[int | None, Field(ge=1, le=1024), Auto("cpu: half the cores; else cores - 1")] = None
    """How many threads parse, tokenise and serialise.

    Too few starve the device; on the CPU, too many take its cores away."""


class DeviceSection(Section):
    staging_slots: Annotated[int, Field(ge=1, le=16)] = 3
    """On a GPU, how many batches are on their way at once: one computes, one is copied in or waits in the GPU's
    memory, one is copied out.

    1 makes the GPU wait for the host after every batch, 2 can.  Each more takes memory of the host and the GPU for
    one batch, and makes every document wait for one more.  No effect on the CPU."""

    cuda_graphs: Annotated[int, Field(ge=0, le=1024)] = 64
    """On a GPU, how many CUDA graphs are recorded at start, for small and for full batches; 0 for none.

    A graph launches a whole forward at once, which matters where the GPU is faster than the host that feeds it.
    Each takes some of the GPU's memory and time at start.  A model that has to be padded runs without."""

    hang_timeout_s: Annotated[float, Field(ge=1, le=86_400)] = 120
    """How long a batch may be on the device before ``/livez`` fails, in seconds, so that the orchestrator
    restarts the worker.

    It must be longer than the slowest batch; a restart loads the model anew."""


class Delivery(Section):
    guarantee: Literal["at-least-once", "exactly-once"] = "at-least-once"
    """What a reader of the results can rely on after a crash.  ``at-least-once``: every document has its
    result, and at most ``delivery.max_uncommitted_documents`` per worker have it twice.

    ``exactly-once``: a reader with ``isolation.level=read_committed`` sees each result once, whatever was killed.
    Results, dead letters and offsets go into one Kafka transaction every ``delivery.commit_interval_ms``; results
    are visible when it is committed.  It needs Apache Kafka 2.5 or later and ``delivery.order: partition``, and
    readers without read_committed see the records of aborted transactions as well.  See docs/delivery.md."""

    order: Literal["partition", "none"] = "partition"
    """``partition``: results of one input partition appear in its order.  ``none`` writes each as soon as it
    is ready, which is faster for single documents behind slow ones; it cannot be had with
    ``exactly-once``."""

    commit_interval_ms: Annotated[int, Field(ge=10, le=600_000)] = 1_000
    """How often progress is committed, in milliseconds (100 by itself under ``exactly-once``).

    Shorter means fewer repeats after a crash and more load on the group's coordinator."""

    max_uncommitted_documents: Annotated[int, Field(ge=2, le=1 << 28)] = 10_000
    """The most results that may be written and not yet committed, and so the most repeats after a crash.

    A commit happens early at half of it; at all of it writing waits.  Low with a high rate means many
    commits."""

    drain_timeout_s: Annotated[float, Field(ge=0.1, le=86_400)] = 30
    """How long a worker that is told to stop (SIGTERM, Ctrl-C) may take to finish what it holds, in seconds;
    past it, it ends at once (exit 6) and the next owner repeats the rest.

    The orchestrator's own patience must be longer: Kubernetes' terminationGracePeriodSeconds, and Docker's
    stop timeout, which is only 10 s unless set."""

    revoke_timeout_s: Annotated[float, Field(ge=0.1, le=3_600)] = 10
    """How long a worker may take, when its partitions are taken away, to finish what it holds, in seconds;
    the rest is dropped and the next owner does it.

    All workers of the group wait for it.  It must be longer than the slowest batch; see
    ``kafka.rebalance_timeout_ms`` for its upper bound."""

    transaction_timeout_ms: Annotated[int, Field(ge=1000, le=900_000)] = 10_000
    """Under ``exactly-once``, when the broker aborts the transaction of a worker that is gone, in milliseconds;
    without effect under at-least-once.

    Until then such a transaction holds back the readers of the output topic and the next owner of its partitions.
    At most the brokers' ``transaction.max.timeout.ms`` (900000 unless changed).  Lower hands over sooner; a worker that
    pauses for longer than this does its last transaction again."""

    max_crash_attempts: Annotated[int, Field(ge=1, le=1000)] = 3
    """After how many crashes in a row without progress in a partition its next documents are run one by one, to
    find the one that kills the process; it becomes a dead letter with the reason ``process_killed``."""


class Telemetry(Section):
    host: Text = "127.0.0.1"
    """The address that metrics and health are served on.  0.0.0.0 in a container; there is no
    authentication."""

    port: Annotated[int, Field(ge=0, le=65_535)] = 9464
    """The port that metrics and health are served on; 0 for none.  A port in use is refused (exit 2)."""

    log_format: Annotated[Literal["auto", "text", "json"], Auto("text on a terminal, else json")] = "auto"
    """How logs are written to stderr: for people, or one JSON object per line."""

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """The least important messages to log.  No level logs the text of documents."""


class Settings(Section):
    kafka: Kafka = Kafka()
    """The connection and the consumer group."""

    input: Input = Input()
    """What is read, and how a record becomes a document."""

    output: Output = Output()
    """Where results go."""

    dead_letter: DeadLetter = DeadLetter()
    """Where documents go that get no result."""

    model: Model = Model()
    """What is computed, and on what."""

    batch: Batch = Batch()
    """How documents are put together for the device."""

    buffer: Buffer = Buffer()
    """How much is held in memory.  At any of these bounds reading from Kafka waits."""

    prepare: Prepare = Prepare()
    """The threads around the device."""

    device: DeviceSection = DeviceSection()
    """What is in flight on the device, and the watch over it."""

    delivery: Delivery = Delivery()
    """What is promised about results, and how long an orderly end may take."""

    telemetry: Telemetry = Telemetry()
    """Metrics, health and logs."""

    _derived: dict[str, str] = PrivateAttr(default_factory=dict)

    @property
    def derived(self) -> Mapping[str, str]:
        """Key → the sentence that says where its value comes from, for what the worker found by itself."""
        return self._derived
