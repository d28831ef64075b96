"""The command line as a user has it: a process, its output and its exit code."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from inferstream.tools.embedded import EmbeddedBroker
from tests.support.client import Kafka

ROOT = Path(__file__).resolve().parents[1]
ENVIRON = {
    **{name: value for name, value in os.environ.items() if not name.startswith("INFERSTREAM_")},
    "PYTHONPATH": str(ROOT / "service"),
    "COLUMNS": "120",
}
LIST = ["dead-letters", "list", "--bootstrap", "localhost:1", "--topic", "a"]
REPLAY = ["dead-letters", "replay", "--bootstrap", "localhost:1", "--topic", "a"]
COMMANDS = [
    "run",
    "demo",
    "broker",
    "publish",
    "consume",
    "dead-letters",
    "topics",
    "config",
    "bench",
    "health",
]


def inferstream(
    *arguments: str, stdin: str | bytes = b"", environ: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    given = stdin if isinstance(stdin, bytes) else stdin.encode()
    done = subprocess.run(
        [sys.executable, "-m", "inferstream", *arguments],
        input=given,
        capture_output=True,
        env={**ENVIRON, **(environ or {})},
        timeout=110,
        check=False,
    )
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


@pytest.fixture(scope="module")
def broker() -> Iterator[EmbeddedBroker]:
    with EmbeddedBroker() as running:
        yield running


# ---- the whole


def test_help_when_asked_for_then_every_command_is_listed_with_examples() -> None:
    done = inferstream("--help")
    assert done.returncode == 0
    assert [name for name in COMMANDS if f"\n  {name} " not in done.stdout] == []
    assert "inferstream publish --config service.yaml documents.jsonl" in done.stdout


def test_help_when_asked_for_then_nothing_heavy_is_imported() -> None:
    code = (
        "import sys; sys.argv[1:] = ['--help']\n"
        "from inferstream.cli.main import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'aiokafka', 'pydantic', 'numpy', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=ENVIRON, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    "command", ["run", "broker", "publish", "consume", "dead-letters", "topics", "config"]
)
def test_help_of_a_command_when_asked_for_then_it_shows_an_example(command: str) -> None:
    done = inferstream(command, "--help")
    assert done.returncode == 0, done.stderr
    assert f"inferstream {command} " in done.stdout


def test_help_of_run_when_asked_for_then_it_lists_the_settings() -> None:
    assert "--kafka.group-id" in inferstream("run", "--help").stdout


def test_version_when_asked_for_then_it_is_on_stdout() -> None:
    assert inferstream("--version").stdout.startswith("inferstream ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "nonsense"),
        (["publish", "--no-such-flag"], "--no-such-flag"),
        (["consume", "--topic", "a"], "kafka.bootstrap_servers"),
        (["consume", "--topic", "a", "--bootstrap", "embedded"], "inferstream broker"),
        (["consume", "--bootstrap", "localhost:1"], "--topic"),
        (["publish", "--bootstrap", "localhost:1", "--topic", "a", "/no/such/file"], "no such file"),
        (["publish", "--bootstrap", "localhost:1", "--topic", "a", "--format", "xml"], "xml"),
        (["broker", "--topic", "a:none"], "NAME:PARTITIONS"),
        (["run", "--kafka.grup-id", "x"], "--kafka.group-id"),
        (["run"], "kafka.bootstrap_servers"),
        (["config", "check", "--no-such.flag", "1"], "no such flag"),
        (["consume", "--max", "0"], "--max"),
        (["demo", "--ask", " "], "--ask"),
        (["config", "show", "--format", "xml"], "'xml' is not one of"),
        (["topics", "create", "--replication", "40000", "a"], "--replication"),
        (["topics", "create", "--bootstrap", "localhost:1", "a b"], "'a b' must be a topic name"),
        (["publish", "--bootstrap", "localhost:1", "--topic", "a b"], "'a b' must be a topic name"),
        (["consume", "--bootstrap", "localhost:1", "--topic", ""], "'' must be a topic name"),
        (["broker", "--topic", "a:1:2"], "'a:1' must be a topic name"),
        (["broker", "--topic", "a:99999999"], "at most 10,000"),
        (["broker", "--topic", "a:2", "--topic", "a:3"], "2 and with 3"),
        (["publish", "--bootstrap", "localhost:1", "--topic", "a", ""], "a name is empty"),
        (["dead-letters", "list", "--bootstrap", "localhost:1"], "--topic: not given"),
        ([*LIST, "--reason", "to_long"], "invalid_utf8, invalid_json, "),
        ([*LIST, "--since", "yesterday"], "--since: 'yesterday' is no time"),
        ([*LIST, "--since", "1h", "--until", "2h"], "--until 2h is not after --since 1h"),
        ([*LIST, "--source", "a:b"], "--source: 'a:b'"),
        (["dead-letters", "show", "--bootstrap", "localhost:1", "--topic", "a", "7"], "PARTITION:OFFSET"),
        ([*REPLAY, "--to", "a"], "is the dead-letter topic itself"),
        ([*REPLAY, "--dismiss", "--to", "b"], "--dismiss sends nothing"),
        ([*REPLAY, "--max", "0"], "--max"),
        ([*REPLAY, "--rate", "0"], "--rate"),
        (["bench", "--texts", "/no/such/file"], "/no/such/file: cannot be read: No such file"),
    ],
)
def test_command_when_used_wrongly_then_it_says_so_in_a_line_and_exits_2(
    arguments: list[str], message: str
) -> None:
    done = inferstream(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert all(line.startswith("inferstream: error: ") for line in done.stderr.splitlines())


@pytest.mark.parametrize(
    "command", ["", "run", "demo", "config", "config show", "bench", "topics create", "dead-letters replay"]
)
def test_help_when_asked_for_with_one_letter_then_it_is_the_same(command: str) -> None:
    short = inferstream(*command.split(), "-h")
    assert short.returncode == 0
    assert short.stdout == inferstream(*command.split(), "--help").stdout


def test_help_when_it_lists_commands_then_no_summary_is_cut_off() -> None:
    for command in ("", "config", "topics", "dead-letters"):
        listed = inferstream(*command.split(), "--help", environ={"COLUMNS": "80"}).stdout
        assert [line for line in listed.partition("Commands:")[2].splitlines() if line.endswith("...")] == []


@pytest.mark.parametrize("command", ["--help", "run --help", "config show --help", "config show"])
def test_output_when_nobody_reads_it_then_it_ends_quietly(command: str) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as nobody:
        done = subprocess.run(
            [sys.executable, "-m", "inferstream", *command.split()],
            env=ENVIRON,
            stdout=nobody,
            stderr=subprocess.PIPE,
            timeout=110,
            check=False,
        )
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full here")
def test_output_when_the_disk_is_full_then_one_line_says_so_and_it_exits_1() -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "inferstream", "config", "show"],
            env=ENVIRON,
            stdout=full,
            stderr=subprocess.PIPE,
            timeout=110,
            check=False,
        )
    said = b"inferstream: error: the output cannot be written: No space left on device\n"
    assert (done.returncode, done.stderr) == (1, said)


@pytest.mark.parametrize("command", ["config show", "consume --topic a", "topics create a"])
def test_command_when_a_variable_is_not_read_then_it_warns(command: str) -> None:
    environ = {"INFERSTREAM_KAFKA_GROUP_ID": "x", "INFERSTREAM_KAFKA": "{}"}
    done = inferstream(*command.split(), environ=environ)
    for line in (
        "inferstream: warning: INFERSTREAM_KAFKA is not read; a variable is one setting: INFERSTREAM_KAFKA__NAME",
        "inferstream: warning: INFERSTREAM_KAFKA_GROUP_ID is not read; did you mean INFERSTREAM_KAFKA__GROUP_ID?",
    ):
        assert line in done.stderr.splitlines()


@pytest.mark.parametrize("command", ["publish", "consume", "topics"])
def test_command_when_no_broker_answers_then_one_line_names_the_hosts_and_it_exits_3(command: str) -> None:
    arguments = {
        "publish": ["publish", "--topic", "a"],
        "consume": ["consume", "--topic", "a"],
        "topics": ["topics", "create", "a"],
    }[command]
    environ = {"INFERSTREAM_KAFKA__CONNECT_TIMEOUT_S": "1"}
    done = inferstream(*arguments, "--bootstrap", "127.0.0.1:1,no.such.host.invalid:9", environ=environ)
    assert done.returncode == 3
    errors = [line for line in done.stderr.splitlines() if "inferstream: error:" in line]
    assert len(errors) == 1
    assert "127.0.0.1:1 (connection refused)" in errors[0]
    assert "no.such.host.invalid:9 (host name not found)" in errors[0]
    assert "Traceback" not in done.stderr


def test_command_when_it_meets_a_bug_then_the_traceback_is_shown_and_it_exits_1() -> None:
    code = (
        "import sys; sys.argv[1:] = ['broker']\n"
        "import inferstream.tools.embedded as embedded\n"
        "def fail(*_): raise ZeroDivisionError('a bug')\n"
        "embedded.EmbeddedBroker = fail\n"
        "from inferstream.cli.main import main\n"
        "main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=ENVIRON, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "ZeroDivisionError: a bug" in done.stderr


# ---- broker


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGINT])
def test_broker_when_told_to_stop_then_it_exits_0(end: signal.Signals) -> None:
    command = [sys.executable, "-m", "inferstream", "broker", "--topic", "documents:3"]
    with subprocess.Popen(command, env=ENVIRON, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        first = process.stdout.readline().decode()
        process.send_signal(end)
        code = process.wait(60)
        errors = process.stderr.read()
    assert first.startswith("bootstrap=127.0.0.1:")
    assert (code, errors) == (0, b"")


# ---- publish and consume


def test_publish_and_consume_when_all_is_well_then_the_same_documents_come_out(
    broker: EmbeddedBroker,
) -> None:
    broker.create_topic("round-trip", 4)
    there = ["--bootstrap", broker.bootstrap, "--topic", "round-trip"]
    lines = [json.dumps({"id": n, "text": f"text {n}"}) for n in range(100)]
    done = inferstream("publish", *there, stdin="\n".join(lines))
    assert (done.returncode, done.stdout) == (0, "")
    assert "100 accepted by round-trip, 0 failed" in done.stderr
    back = inferstream("consume", *there, "--from-beginning", "--max", "100", "--timeout", "20")
    assert back.returncode == 0, back.stderr
    assert sorted(back.stdout.splitlines()) == sorted(lines)
    assert back.stderr == ""


def test_publish_when_a_document_is_refused_then_it_is_named_and_the_exit_code_is_9(
    broker: EmbeddedBroker,
) -> None:
    broker.create_topic("refusals", 1)
    done = inferstream(
        "publish", "--bootstrap", broker.bootstrap, "--topic", "refusals", stdin='{"text":"good"}\n{"id":1}\n'
    )
    assert done.returncode == 9
    assert "not accepted: stdin:2: missing_text: " in done.stderr
    assert "1 accepted by refusals, 1 failed (missing_text 1)" in done.stderr


def test_publish_when_there_is_no_document_then_it_says_so(broker: EmbeddedBroker) -> None:
    broker.create_topic("nothing", 1)
    done = inferstream("publish", "--bootstrap", broker.bootstrap, "--topic", "nothing", stdin="\n")
    assert done.returncode == 0
    assert "0 accepted by nothing, 0 failed" in done.stderr


def test_publish_when_documents_have_no_key_field_then_it_says_how_many(broker: EmbeddedBroker) -> None:
    broker.create_topic("keyless", 1)
    there = ["--bootstrap", broker.bootstrap, "--topic", "keyless"]
    done = inferstream(
        "publish", *there, "--key-field", "key", stdin='{"text":"a","key":"k"}\n{"text":"b"}\n'
    )
    assert done.returncode == 0
    assert "without a key: 1 documents have no key (--key-field)" in done.stderr
    assert "without a key" not in inferstream("publish", *there, stdin='{"text":"b"}\n').stderr


def test_publish_when_interrupted_at_a_silent_stdin_then_it_ends_with_130(broker: EmbeddedBroker) -> None:
    broker.create_topic("silent", 1)
    command = [sys.executable, "-m", "inferstream", "publish"]
    command += ["--bootstrap", broker.bootstrap, "--topic", "silent"]
    with subprocess.Popen(command, env=ENVIRON, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stderr is not None
        process.stdin.write(b"a document\n")
        process.stdin.flush()
        while not process.stderr.readline().startswith(b"1 accepted"):
            assert process.poll() is None
        process.send_signal(signal.SIGINT)  # it waits for more
        errors = process.stderr.read().decode()
        code = process.wait(60)
    assert code == 130
    assert "1 accepted by silent" in errors
    assert "Traceback" not in errors


def test_consume_when_the_maximum_does_not_come_then_the_exit_code_is_9(broker: EmbeddedBroker) -> None:
    broker.create_topic("empty", 1)
    done = inferstream(
        "consume", "--bootstrap", broker.bootstrap, "--topic", "empty", "--max", "1", "--timeout", "0.5"
    )
    assert done.returncode == 9
    assert "inferstream: error: 0 of 1 records came within 0.5 s" in done.stderr


def test_consume_when_the_pipe_is_closed_then_it_ends_quietly(broker: EmbeddedBroker) -> None:
    broker.create_topic("closed-pipe", 1)
    there = ["--bootstrap", broker.bootstrap, "--topic", "closed-pipe"]
    text = "word " * 1000
    inferstream("publish", *there, stdin="".join(f"{n} {text}\n" for n in range(400)))
    command = [sys.executable, "-m", "inferstream", "consume", *there, "--from-beginning"]
    with subprocess.Popen(command, env=ENVIRON, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline().startswith(b"{")
        process.stdout.close()
        errors = process.stderr.read()
        assert process.wait(60) == 0
    assert errors == b""


def test_consume_when_the_pipe_is_closed_and_nothing_more_comes_then_it_ends(broker: EmbeddedBroker) -> None:
    broker.create_topic("idle-pipe", 1)
    there = ["--bootstrap", broker.bootstrap, "--topic", "idle-pipe"]
    inferstream("publish", *there, stdin="one\n")
    command = [sys.executable, "-m", "inferstream", "consume", *there, "--from-beginning"]
    with subprocess.Popen(command, env=ENVIRON, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline().startswith(b"{")
        process.stdout.close()
        try:
            code = process.wait(60)
        finally:
            process.kill()
        assert (code, process.stderr.read()) == (0, b"")


# ---- topics


def test_topics_create_when_a_topic_exists_and_differs_then_it_is_left_alone_and_reported(
    broker: EmbeddedBroker,
) -> None:
    broker.create_topic("existing", 3)
    done = inferstream("topics", "create", "--bootstrap", broker.bootstrap, "--partitions", "5", "existing")
    assert done.returncode == 0
    assert done.stdout == "existing: exists and differs, left alone: 3 partitions instead of 5\n"


def test_topics_create_when_the_broker_is_the_embedded_one_then_it_says_what_to_do(
    broker: EmbeddedBroker,
) -> None:
    done = inferstream("topics", "create", "--bootstrap", broker.bootstrap, "another")
    assert done.returncode == 3
    assert "inferstream broker --topic another:8" in done.stderr


def test_topics_create_when_one_is_refused_then_what_was_created_before_it_is_named(kafka: Kafka) -> None:
    good, known = kafka.unique("good"), kafka.unique("a.b")
    refused = known.replace(".", "_")  # Kafka refuses names that its metrics could not tell apart
    assert inferstream("topics", "create", "--bootstrap", kafka.bootstrap, known).returncode == 0
    done = inferstream("topics", "create", "--bootstrap", kafka.bootstrap, good, refused)
    assert done.returncode == 3
    assert done.stderr.count("\n") == 1
    assert f"topic {refused}: not created" in done.stderr
    assert f"(created before it: {good})" in done.stderr
