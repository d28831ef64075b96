"""The tree: its defaults, what its values and pairs of values may be, and what is derived for a machine."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from pydantic import ValidationError

from inferstream.errors import SettingsError
from inferstream.settings import SETTINGS, Settings, cores, device_kind, load_settings, origins_of, resolve
from inferstream.settings import machine as machine_module
from inferstream.settings.machine import cpu_quota, memory_limit

MIB = 1 << 20
NO_IMAGE_FILE = Path("/nowhere/defaults.yaml")


def load(**flags: object) -> Settings:
    """Settings of a worker; ``batch__max_tokens=1`` sets ``batch.max_tokens``."""
    required = {"kafka.bootstrap_servers": "broker:9092", "input.topics": "in", "output.topic": "out"}
    given = {key.replace("__", "."): value for key, value in flags.items()}
    return load_settings(environ={}, flags=required | given, image_file=NO_IMAGE_FILE).settings


def problems(**flags: object) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        load(**flags)
    return str(caught.value).splitlines()


# ---- the tree


def test_tree_when_loaded_then_it_is_frozen_and_closed() -> None:
    settings = load()

    with pytest.raises(ValidationError):
        settings.kafka.group_id = "other"  # type: ignore[misc]  # the point of the test
    with pytest.raises(ValidationError):
        Settings.model_validate({"kafka": {"nothing": 1}})


def test_tree_when_read_as_a_manual_then_every_setting_has_one() -> None:
    for setting in SETTINGS.values():
        assert len(setting.doc) > 20, setting.key
        assert setting.line and "\n" not in setting.line, setting.key


def test_tree_when_no_value_is_given_then_every_default_is_itself_allowed() -> None:
    dumped = Settings().model_dump()

    assert Settings.model_validate(dumped).model_dump() == dumped


def test_defaults_when_compared_with_the_documented_ones_then_they_are_the_same() -> None:
    settings = load()

    assert settings.kafka.group_id == "inferstream"
    assert settings.kafka.heartbeat_interval_ms == 3000
    assert settings.kafka.rebalance_timeout_ms == 60_000
    assert settings.kafka.request_timeout_ms == 70_000
    assert settings.kafka.connect_timeout_s == 60
    assert settings.kafka.max_partition_fetch_bytes == MIB
    assert settings.kafka.security.protocol == "PLAINTEXT"
    assert settings.input.start == "earliest"
    assert settings.input.on_lost_range == "stop"
    assert settings.input.isolation == "read_committed"
    assert settings.input.tombstones == "forward"
    assert settings.input.text_pair_field == "/text_pair"
    assert (settings.output.encoding, settings.output.compression) == ("json", "zstd")
    assert settings.dead_letter.oversize == "stop"
    assert settings.model.id == "sentence-transformers/all-MiniLM-L6-v2"
    assert (settings.model.long_documents, settings.model.max_chunks) == ("truncate", 1024)
    assert settings.batch.linger_ms == 5
    assert settings.buffer.max_lane_share == 0.5
    assert settings.device.hang_timeout_s == 120
    assert (settings.delivery.guarantee, settings.delivery.order) == ("at-least-once", "partition")
    assert settings.delivery.max_uncommitted_documents == 10_000
    assert (settings.delivery.drain_timeout_s, settings.delivery.revoke_timeout_s) == (30, 10)
    assert (settings.telemetry.host, settings.telemetry.port) == ("127.0.0.1", 9464)


VALUE_MISTAKES = [
    ("kafka__session_timeout_ms", "ten", "'ten' must be a whole number from 1000 to 1800000 (milliseconds)"),
    ("kafka__session_timeout_ms", "45s", "'45s' must be a whole number"),
    ("kafka__session_timeout_ms", "1e4", "'1e4' must be a whole number"),
    ("kafka__session_timeout_ms", "-1", "'-1' must be a whole number"),
    ("kafka__connect_timeout_s", "nan", "must be a number from 1 to 86400 (seconds)"),
    ("kafka__connect_timeout_s", "inf", "must be a number from 1 to 86400 (seconds)"),
    ("buffer__max_lane_share", "0", "must be a number above 0 and at most 1"),
    ("buffer__max_bytes", "1", "(bytes) or auto"),
    ("output__compression", "ZSTD", "'ZSTD' must be none, gzip, snappy, lz4 or zstd"),
    ("telemetry__port", "65536", "must be a whole number from 0 to 65535"),
    ("model__task", "classify", "'classify' must be embed"),
    ("kafka__bootstrap_servers", "broker", "must be HOST:PORT"),
    ("kafka__bootstrap_servers", "broker:0", "must be HOST:PORT"),
    ("kafka__bootstrap_servers", "a:1,b:99999", "(got 'b:99999')"),
    ("kafka__bootstrap_servers", "kafka://broker:9092", "without a scheme"),
    ("kafka__bootstrap_servers", "embedded,a:1", "'embedded' alone"),
    ("input__topics", "a b", "must be a topic name"),
    ("input__topics", "ok,..", "'..' must be a topic name"),
    ("input__topics", "ä", "must be a topic name"),
    ("input__topics", "x" * 250, "at most 249 characters"),
    ("input__topics", "a,b,a", "must not name the same thing twice: a"),
    ("output__topic", "a/b", "must be a topic name"),
    ("dead_letter__topic", ".", "must be a topic name"),
    ("input__text_field", "text", "did you mean '/text'?"),
    ("input__id_field", "/a~2b", "'~' is written '~0'"),
    ("input__metadata_field", "/a~", "'~' is written '~0'"),
]


@pytest.mark.parametrize(("name", "value", "what"), VALUE_MISTAKES)
def test_value_when_it_is_not_allowed_then_one_line_says_what_is(name: str, value: str, what: str) -> None:
    [line] = problems(**{name: value})

    key = name.replace("__", ".")
    assert line.startswith(f"{key}: ")
    assert what in line
    assert line.endswith(f"[flag {SETTINGS[key].flag}]")


def test_value_when_it_is_long_or_has_several_lines_then_the_message_has_one() -> None:
    [line] = problems(telemetry__log_level="a\nb" * 100)

    assert len(line) < 200


@pytest.mark.parametrize("pointer", ["/a/b", "/a~1b", "/~0", "/", "/ä"])
def test_pointer_when_it_is_valid_then_it_is_taken(pointer: str) -> None:
    assert load(input__text_field=pointer).input.text_field == pointer


@pytest.mark.parametrize(
    "server", ["embedded", "a:1", "[2001:db8::1]:9092", "10.0.0.1:9092", "b-1.kafka.example:9098"]
)
def test_server_when_it_is_valid_then_it_is_taken(server: str) -> None:
    assert load(kafka__bootstrap_servers=server).kafka.bootstrap_servers == [server]


# ---- two settings together


def test_timeouts_when_a_revoke_leaves_no_time_in_the_rebalance_then_it_is_refused() -> None:
    assert load(delivery__revoke_timeout_s=28.7).delivery.revoke_timeout_s == 28.7

    [line] = problems(delivery__revoke_timeout_s=28.8)

    assert line.startswith("delivery.revoke_timeout_s: ")
    assert "delivery.revoke_timeout_s must be below 28.8, or kafka.rebalance_timeout_ms above 60000" in line
    assert "delivery.revoke_timeout_s = 28.8, flag --delivery.revoke-timeout-s" in line
    assert "kafka.rebalance_timeout_ms = 60000, default" in line


def test_timeouts_when_a_request_ends_before_the_rebalance_then_it_is_refused() -> None:
    assert load(kafka__request_timeout_ms=60_001)

    [line] = problems(kafka__request_timeout_ms=60_000)

    assert "must be above kafka.rebalance_timeout_ms (60000)" in line


def test_timeouts_when_two_heartbeats_end_the_session_then_it_is_refused() -> None:
    assert load(kafka__session_timeout_ms=6000, kafka__heartbeat_interval_ms=2000)

    [line] = problems(kafka__session_timeout_ms=6000, kafka__heartbeat_interval_ms=2001)

    assert "at most a third of kafka.session_timeout_ms (2000)" in line


def test_timeouts_when_linger_takes_the_time_of_a_revoke_then_it_is_refused() -> None:
    assert load(batch__linger_ms=4999)

    [line] = problems(batch__linger_ms=5000)

    assert "below half of delivery.revoke_timeout_s (5000 ms)" in line


@pytest.mark.parametrize(
    ("flags", "key"),
    [
        ({"output__topic": "in"}, "output.topic"),
        ({"input__topics": "a,out"}, "output.topic"),
        ({"dead_letter__topic": "in"}, "dead_letter.topic"),
        ({"dead_letter__topic": "out"}, "dead_letter.topic"),
        ({"input__topics": "out.dead-letters"}, "dead_letter.topic"),
    ],
)
def test_topics_when_one_has_two_roles_then_it_is_refused(flags: dict[str, str], key: str) -> None:
    [line] = problems(**flags)

    assert line.startswith(f"{key}: ")


def test_topics_when_the_derived_one_collides_then_its_origin_is_the_derivation() -> None:
    [line] = problems(input__topics="out.dead-letters")

    assert "dead_letter.topic = out.dead-letters, derived: output.topic with .dead-letters" in line


def test_topics_when_the_derived_one_would_be_too_long_then_it_is_refused() -> None:
    [line] = problems(output__topic="x" * 240)

    assert line.startswith("dead_letter.topic: ")
    assert "set dead_letter.topic" in line


def test_guarantee_when_exactly_once_then_the_interval_and_the_transactional_id_are_derived() -> None:
    one = load(delivery__guarantee="exactly-once", kafka__group_id="g")
    other = load(delivery__guarantee="exactly-once", kafka__group_id="g")

    assert one.delivery.commit_interval_ms == 100
    assert one.kafka.transactional_id is not None and one.kafka.transactional_id.startswith("g-")
    assert one.kafka.transactional_id != other.kafka.transactional_id
    assert {"delivery.commit_interval_ms", "kafka.transactional_id"} <= one.derived.keys()


def test_guarantee_when_exactly_once_has_no_order_or_no_broker_for_it_then_all_is_told() -> None:
    lines = problems(
        delivery__guarantee="exactly-once", delivery__order="none", kafka__bootstrap_servers="embedded"
    )

    assert [line.split(":")[0] for line in lines] == ["delivery.order", "kafka.bootstrap_servers"]


def test_commit_interval_when_a_transaction_would_time_out_before_its_end_then_it_is_refused() -> None:
    [line] = problems(delivery__guarantee="exactly-once", delivery__commit_interval_ms=4000)

    assert line.startswith("delivery.commit_interval_ms") and "a third" in line and "(3333)" in line
    assert load(delivery__commit_interval_ms=4000).delivery.commit_interval_ms == 4000


def secured(**security: object) -> dict[str, object]:
    return {f"kafka__security__{name}": value for name, value in security.items()}


LOGIN = {"mechanism": "SCRAM-SHA-512", "username": "alice", "password_file": "/run/secrets/password"}


@pytest.mark.parametrize(
    "security",
    [
        {"protocol": "SSL"},
        {"protocol": "SSL", "ca_file": "/ca"},
        {"protocol": "SSL", "cert_file": "/c", "key_file": "/k", "key_password_file": "/p"},
        {"protocol": "SASL_PLAINTEXT", **LOGIN},
        {"protocol": "SASL_SSL", "ca_file": "/ca", "cert_file": "/c", "key_file": "/k", **LOGIN},
    ],
)
def test_security_when_its_parts_fit_then_they_are_taken(security: dict[str, object]) -> None:
    assert load(**secured(**security)).kafka.security.protocol == security["protocol"]


@pytest.mark.parametrize(
    ("security", "keys"),
    [
        ({"mechanism": "PLAIN"}, "mechanism protocol"),
        ({"username": "me"}, "username protocol"),
        ({"protocol": "SSL", "password_file": "/p"}, "password_file protocol"),
        ({"ca_file": "/ca"}, "ca_file protocol"),
        ({"protocol": "SASL_PLAINTEXT", **LOGIN, "ca_file": "/ca"}, "ca_file protocol"),
        ({"protocol": "SSL", "cert_file": "/c"}, "cert_file key_file"),
        ({"protocol": "SSL", "key_file": "/k"}, "key_file cert_file"),
        ({"protocol": "SSL", "key_password_file": "/p"}, "key_password_file key_file"),
        ({"protocol": "SASL_SSL", **LOGIN, "mechanism": None}, "protocol mechanism"),
        ({"protocol": "SASL_SSL", **LOGIN, "username": None}, "protocol username"),
        ({"protocol": "SASL_SSL", **LOGIN, "password_file": None}, "protocol password_file"),
        ({"protocol": "SASL_SSL", **LOGIN, "mechanism": "OAUTHBEARER"}, "mechanism"),
    ],
)
def test_security_when_its_parts_do_not_fit_then_one_line_names_them(
    security: dict[str, object], keys: str
) -> None:
    [line] = problems(**secured(**security))

    first, *others = keys.split()
    assert line.startswith(f"kafka.security.{first}: ")
    assert all(f"kafka.security.{other}" in line for other in others)


def test_security_when_the_broker_is_embedded_then_it_is_refused() -> None:
    [line] = problems(kafka__bootstrap_servers="embedded", **secured(protocol="SSL"))

    assert "embedded broker speaks PLAINTEXT alone" in line


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x", "cuda:-1", "CUDA", "mps"])
def test_device_when_it_is_none_that_there_is_then_the_choices_are_named(device: str) -> None:
    [line] = problems(model__device=device)

    assert (
        line
        == f"model.device: '{device}' must be auto, cpu, cuda or cuda:N, as in cuda:1 [flag --model.device]"
    )


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:0", "cuda:15"])
def test_device_when_it_may_be_on_another_machine_then_it_is_taken(device: str) -> None:
    assert load(model__device=device).model.device == device


def test_float16_when_the_model_runs_on_the_cpu_then_it_is_refused_before_the_model_is_loaded() -> None:
    settings = load(model__dtype="float16")

    with pytest.raises(SettingsError, match=r"^model\.dtype: float16 is not for CPUs: use float32"):
        resolve(settings, "cpu", 2)
    assert resolve(settings, "cuda", 2).model.dtype == "float16"


# ---- derivation


def test_names_when_not_set_then_they_follow_from_topic_and_host() -> None:
    settings = load()

    assert settings.dead_letter.topic == "out.dead-letters"
    assert settings.kafka.client_id == f"inferstream-{socket.gethostname()}"
    assert set(settings.derived) == {"dead_letter.topic", "kafka.client_id"}


@pytest.mark.parametrize(
    ("device", "batch", "tokens", "documents", "size"),
    [
        ("cpu", 2048, 32_768, 2048, 64 * MIB),
        ("cuda", 32_768, 524_288, 16_384, 256 * MIB),
        ("hash", 65_536, 1_048_576, 8192, 64 * MIB),
    ],
)
def test_resolve_when_nothing_is_set_then_the_device_decides(
    device: str, batch: int, tokens: int, documents: int, size: int
) -> None:
    settings = resolve(load(), device, 8)

    assert settings.batch.max_tokens == batch
    assert (settings.buffer.max_tokens, settings.buffer.max_documents) == (tokens, documents)
    assert settings.buffer.max_bytes == size
    assert settings.model.device == ("cuda" if device == "cuda" else "cpu")


@pytest.mark.parametrize(
    ("device", "available", "threads"),
    [
        ("cpu", 1, 1),
        ("cpu", 2, 1),
        ("cpu", 8, 4),
        ("cuda", 1, 1),
        ("cuda", 16, 15),
        ("cuda", 128, 32),
        ("hash", 2, 1),
    ],
)
def test_resolve_when_threads_are_not_set_then_the_cores_decide(
    device: str, available: int, threads: int
) -> None:
    assert resolve(load(), device, available).prepare.threads == threads


def test_resolve_when_all_is_set_then_nothing_is_changed() -> None:
    settings = load(
        batch__max_tokens=100,
        buffer__max_tokens=200,
        buffer__max_documents=3,
        buffer__max_bytes=4096,
        prepare__threads=7,
        model__device="cpu",
        kafka__client_id="me",
        dead_letter__topic="d",
    )

    assert resolve(settings, "cpu", 2) == settings
    assert settings.derived == {}


def test_resolve_when_run_twice_then_the_second_changes_nothing() -> None:
    once = resolve(load(), "cpu", 4)

    assert resolve(once, "cuda", 64) == once


def test_resolve_when_it_derives_then_each_value_has_its_sentence_as_origin() -> None:
    loaded = load_settings(
        environ={}, flags={"batch.max_tokens": 100}, require=False, image_file=NO_IMAGE_FILE
    )

    origins = origins_of(resolve(loaded.settings, "cpu", 2), loaded.origins)

    assert origins["batch.max_tokens"] == "flag --batch.max-tokens"
    assert origins["buffer.max_tokens"].startswith("derived: 16 x batch.max_tokens (100)")
    assert origins["prepare.threads"].startswith("derived: half of 2 cores")
    assert origins["telemetry.port"] == "default"


def test_resolve_when_documents_may_be_longer_than_a_batch_then_the_batch_grows() -> None:
    settings = resolve(load(model__max_length=8192), "cpu", 2)

    assert settings.batch.max_tokens == 8192
    assert settings.buffer.max_tokens == 16 * 8192


def test_resolve_when_the_set_batch_is_too_small_for_a_document_then_it_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"batch\.max_tokens: 100 is below model\.max_length \(512\)"):
        resolve(load(batch__max_tokens=100, model__max_length=512), "cpu", 2)


def test_resolve_when_the_window_is_smaller_than_a_batch_then_it_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"buffer\.max_tokens: 100 is below batch\.max_tokens \(2048\)"):
        resolve(load(buffer__max_tokens=100), "cpu", 2)


# ---- the machine


def _tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({}, None),
        ({"proc/self/cgroup": "0::/\n"}, None),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "250000 100000\n"}, 2.5),
        (  # the tightest group above counts
            {
                "proc/self/cgroup": "0::/pod/box\n",
                "sys/fs/cgroup/pod/cpu.max": "100000 100000\n",
                "sys/fs/cgroup/pod/box/cpu.max": "300000 100000\n",
            },
            1.0,
        ),
        (  # the host's path in a container, where only the group itself is mounted
            {"proc/self/cgroup": "0::/../../pod\n", "sys/fs/cgroup/cpu.max": "400000 100000\n"},
            4.0,
        ),
        (
            {
                "proc/self/cgroup": "4:memory:/x\n3:cpu,cpuacct:/docker/1\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "150000\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            },
            1.5,
        ),
        (
            {
                "proc/self/cgroup": "3:cpu:/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            None,
        ),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "nonsense\n"}, None),
    ],
)
def test_quota_when_the_control_group_has_one_then_it_is_read(
    tmp_path: Path, files: dict[str, str], quota: float | None
) -> None:
    assert cpu_quota(_tree(tmp_path, files)) == quota


MEMORY = {"proc/self/cgroup": "0::/\n", "proc/meminfo": "MemTotal:        8000 kB\nMemFree: 1 kB\n"}


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({}, None),
        ({"proc/meminfo": "nonsense\n"}, None),
        (MEMORY, 8000 * 1024),
        (MEMORY | {"sys/fs/cgroup/memory.max": "max\n"}, 8000 * 1024),
        (MEMORY | {"sys/fs/cgroup/memory.max": "4096000\n"}, 4096000),
        (  # the tightest group above counts
            MEMORY
            | {
                "proc/self/cgroup": "0::/pod/box\n",
                "sys/fs/cgroup/pod/memory.max": "1000\n",
                "sys/fs/cgroup/pod/box/memory.max": "3000\n",
            },
            1000,
        ),
        (
            MEMORY
            | {
                "proc/self/cgroup": "4:memory:/docker/1\n3:cpu,cpuacct:/x\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "5000\n",
            },
            5000,
        ),
        (  # version 1 has a number for no limit
            MEMORY
            | {
                "proc/self/cgroup": "4:memory:/\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            },
            8000 * 1024,
        ),
    ],
)
def test_memory_when_it_is_limited_then_the_smallest_limit_counts(
    tmp_path: Path, files: dict[str, str], limit: int | None
) -> None:
    assert memory_limit(_tree(tmp_path, files)) == limit


@pytest.mark.parametrize(("limit", "expected"), [("50000", 1), ("250000", 2), ("99900000", 4), ("max", 4)])
def test_cores_when_a_quota_is_set_then_the_smaller_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, expected: int
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1, 2, 3})
    root = _tree(tmp_path, {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": f"{limit} 100000\n"})

    assert cores(root) == expected


def test_device_when_the_model_is_the_hash_then_it_is_hash() -> None:
    assert device_kind(load(model__id="builtin:hash")) == "hash"


@pytest.mark.parametrize(
    ("file", "usable", "kind"),
    [
        (None, True, "cpu"),
        ("dev/nvidia0", True, "cuda"),
        ("dev/nvidiactl", True, "cuda"),  # a container that was given the fourth GPU has no dev/nvidia0
        ("proc/driver/nvidia/version", True, "cuda"),
        ("dev/nvidia0", False, "cpu"),
    ],
)
def test_device_when_auto_then_a_gpu_is_taken_if_there_is_one_that_torch_can_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str | None, usable: bool, kind: str
) -> None:
    monkeypatch.setattr(machine_module, "_torch_has_gpu", lambda: usable)
    root = _tree(tmp_path, {file: ""} if file else {})

    assert device_kind(load(), root) == kind


def test_device_when_it_is_set_then_nothing_is_looked_for(tmp_path: Path) -> None:
    assert device_kind(load(model__device="cpu"), _tree(tmp_path, {"dev/nvidia0": ""})) == "cpu"
    assert device_kind(load(model__device="cuda:1"), _tree(tmp_path, {})) == "cuda"
