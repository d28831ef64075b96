"""The layers: where a value comes from, which one wins, and what each source may say."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

from inferstream.errors import SettingsError
from inferstream.settings import SETTINGS, Loaded, Settings, load_settings, parse_flags, value_of

REQUIRED = {"kafka.bootstrap_servers": "broker:9092", "input.topics": "in", "output.topic": "out"}
NO_IMAGE_FILE = Path("/nowhere/defaults.yaml")

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(text: str, name: str = "settings.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


def load(
    *files: Path,
    environ: Mapping[str, str] | None = None,
    flags: Mapping[str, object] | None = None,
    image_file: Path = NO_IMAGE_FILE,
) -> Loaded:
    """Load with what a worker requires as flags, and nothing of this process's environment."""
    return load_settings(files, environ or {}, REQUIRED | dict(flags or {}), image_file=image_file)


def problems(
    *files: Path, environ: Mapping[str, str] | None = None, flags: Mapping[str, object] | None = None
) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        load(*files, environ=environ, flags=flags)
    assert caught.value.exit_code == 2
    return str(caught.value).splitlines()


def flag_problems(*arguments: str) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        parse_flags(arguments)
    return str(caught.value).splitlines()


# ---- layers


def test_defaults_when_nothing_is_given_then_every_origin_says_default() -> None:
    loaded = load_settings(environ={}, require=False, image_file=NO_IMAGE_FILE)

    assert set(loaded.origins) == set(SETTINGS)
    assert set(loaded.origins.values()) == {"default"}
    assert loaded.settings.kafka.session_timeout_ms == 45_000
    assert loaded.settings.kafka.fetch_max_bytes == 16 * 1024 * 1024


def test_layers_when_all_give_a_value_then_the_nearest_wins_and_is_named(write: Write) -> None:
    image = write(
        "kafka: {group_id: image, client_id: image, client_rack: image, session_timeout_ms: 10001}", "i.yaml"
    )
    first = write("kafka: {group_id: first, client_id: first, client_rack: first}", "1.yaml")
    second = write("kafka:\n  group_id: second\n  client_id: second", "2.yaml")

    loaded = load(
        first,
        second,
        environ={"INFERSTREAM_KAFKA__GROUP_ID": "env"},
        flags={"output.topic": "flagged"},
        image_file=image,
    )

    kafka = loaded.settings.kafka
    assert (kafka.group_id, kafka.client_id, kafka.client_rack) == ("env", "second", "first")
    assert kafka.session_timeout_ms == 10_001
    assert loaded.settings.output.topic == "flagged"
    assert loaded.origins["kafka.group_id"] == "env INFERSTREAM_KAFKA__GROUP_ID"
    assert loaded.origins["kafka.client_id"] == f"file:{second}:3"
    assert loaded.origins["kafka.client_rack"] == f"file:{first}:1"
    assert loaded.origins["kafka.session_timeout_ms"] == f"file:{image}:1"
    assert loaded.origins["output.topic"] == "flag --output.topic"


def test_flags_when_the_environment_says_otherwise_then_the_flag_wins() -> None:
    loaded = load(environ={"INFERSTREAM_OUTPUT__TOPIC": "env"}, flags={"output.topic": "flag"})

    assert loaded.settings.output.topic == "flag"


@pytest.mark.parametrize("separator", [",", ":", " , "])
def test_config_variable_when_it_names_files_then_they_are_read_in_order(
    write: Write, separator: str
) -> None:
    first, second = (
        write("kafka: {group_id: a, client_id: a}", "1.yaml"),
        write("kafka: {group_id: b}", "2.yaml"),
    )

    loaded = load(environ={"INFERSTREAM_CONFIG": f"{first}{separator}{second}"})

    assert (loaded.settings.kafka.group_id, loaded.settings.kafka.client_id) == ("b", "a")


def test_config_variable_when_files_are_given_then_it_is_not_read(write: Write) -> None:
    given = write("kafka: {group_id: given}")

    loaded = load(given, environ={"INFERSTREAM_CONFIG": "/nowhere.yaml"})

    assert loaded.settings.kafka.group_id == "given"


def test_lists_when_two_layers_give_one_then_the_upper_replaces_the_lower(write: Write) -> None:
    file = write("input: {topics: [a, b]}")

    loaded = load_settings(
        [file], {"INFERSTREAM_INPUT__TOPICS": "c"}, require=False, image_file=NO_IMAGE_FILE
    )

    assert loaded.settings.input.topics == ["c"]


def test_auto_when_a_lower_layer_has_set_a_value_then_it_is_found_again(write: Write) -> None:
    file = write("batch: {max_tokens: 4096}\ndead_letter: {topic: mine}")

    loaded = load(
        file, environ={"INFERSTREAM_BATCH__MAX_TOKENS": "auto", "INFERSTREAM_DEAD_LETTER__TOPIC": "auto"}
    )

    assert loaded.settings.batch.max_tokens is None
    assert loaded.origins["batch.max_tokens"] == "default"
    assert loaded.settings.dead_letter.topic == "out.dead-letters"


def test_required_when_missing_then_each_is_named_with_the_ways_to_set_it() -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings(environ={}, image_file=NO_IMAGE_FILE)

    lines = str(caught.value).splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "kafka.bootstrap_servers",
        "input.topics",
        "output.topic",
    ]
    assert "--input.topics" in lines[1] and "INFERSTREAM_INPUT__TOPICS" in lines[1]


def test_required_when_not_asked_for_then_a_partial_tree_loads() -> None:
    loaded = load_settings(
        environ={}, flags={"kafka.bootstrap_servers": "b:1"}, require=False, image_file=NO_IMAGE_FILE
    )

    assert loaded.settings.kafka.bootstrap_servers == ["b:1"]
    assert loaded.settings.input.topics == []
    assert loaded.settings.output.topic == ""


def test_required_when_given_wrongly_then_it_is_not_called_missing_as_well(write: Write) -> None:
    file = write("input: nonsense\noutput: {topic: [a]}")

    with pytest.raises(SettingsError) as caught:
        load_settings([file], {}, {"kafka.bootstrap_servers": "broker"}, image_file=NO_IMAGE_FILE)

    assert ": required" not in str(caught.value)
    assert len(str(caught.value).splitlines()) == 3


@pytest.mark.parametrize("text", [None, "kafka: [", "- a list"])
def test_required_when_a_file_cannot_be_read_then_nothing_is_called_missing(
    write: Write, tmp_path: Path, text: str | None
) -> None:
    file = tmp_path / "missing.yaml" if text is None else write(text)

    with pytest.raises(SettingsError) as caught:
        load_settings([file], {}, image_file=NO_IMAGE_FILE)

    [line] = str(caught.value).splitlines()
    assert line.startswith(f"file:{file}:")


def test_problems_when_there_are_many_then_all_are_told_at_once_in_a_line_each(write: Write) -> None:
    file = write("kafka: {grup_id: x}\nbatch: {max_tokens: none}\ninput: {start: middle}")

    lines = problems(
        file,
        environ={"INFERSTREAM_TELEMETRY__PORT": "99999", "INFERSTREAM_KAFKA__GROUPID": "x"},
        flags={"kafka.bootstrap_servers": "broker", "delivery.revoke_timeout_s": "50"},
    )

    assert sorted(line.split(":")[0] for line in lines) == [
        "INFERSTREAM_KAFKA__GROUPID",
        "batch.max_tokens",
        "delivery.revoke_timeout_s",
        "input.start",
        "kafka.bootstrap_servers",
        "kafka.grup_id",
        "telemetry.port",
    ]


# ---- YAML


def test_yaml_when_a_text_looks_like_something_else_then_it_stays_as_written(write: Write) -> None:
    file = write(
        "kafka:\n  group_id: 007\n  client_id: no\n  client_rack: 12:30\n  group_instance_id: 1e3\n"
        "  transactional_id: 2026-11-21\ninput: {topics: [on, 010, 'null', yes]}\nmodel: {revision: 0x10}\n"
    )

    settings = load_settings([file], {}, require=False, image_file=NO_IMAGE_FILE).settings

    kafka = settings.kafka
    assert (kafka.group_id, kafka.client_id, kafka.client_rack) == ("007", "no", "12:30")
    assert (kafka.group_instance_id, kafka.transactional_id) == ("1e3", "2026-11-21")
    assert settings.input.topics == ["on", "010", "null", "yes"]
    assert settings.model.revision == "0x10"


def test_yaml_when_a_number_is_meant_then_no_boolean_passes_for_one(write: Write) -> None:
    lines = problems(write("telemetry: {port: off}\nbuffer: {max_lane_share: yes}"))

    assert lines[0].startswith("buffer.max_lane_share: 'yes' must be a number above 0 and at most 1")
    assert lines[1].startswith("telemetry.port: 'off' must be a whole number from 0 to 65535")


def test_yaml_when_a_number_stands_in_quotes_then_it_is_read(write: Write) -> None:
    assert load(write("telemetry: {port: '1234'}")).settings.telemetry.port == 1234


def test_yaml_when_a_value_is_null_then_it_says_nothing(write: Write) -> None:
    lower, upper = (
        write("kafka: {group_id: a}", "1.yaml"),
        write("kafka: {group_id: ~}\nbatch:\nmodel: null", "2.yaml"),
    )

    loaded = load(lower, upper)

    assert loaded.settings.kafka.group_id == "a"
    assert loaded.origins["kafka.group_id"] == f"file:{lower}:1"


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n", "~\n"])
def test_yaml_when_the_file_is_empty_then_it_says_nothing(write: Write, text: str) -> None:
    assert load(write(text)).settings.kafka.group_id == "inferstream"


def test_yaml_when_a_list_is_a_single_text_then_commas_divide_it(write: Write) -> None:
    file = write("input: {topics: 'a, b'}")

    assert load_settings([file], {}, require=False, image_file=NO_IMAGE_FILE).settings.input.topics == [
        "a",
        "b",
    ]


YAML_MISTAKES = [
    (
        "kafka:\n  group_id: a\n  group_id: b\n",
        ":3]",
        "kafka.group_id: stands here twice, the first time on line 2",
    ),
    ("kafka: {}\nmodel: {}\nkafka: {}\n", ":3]", "kafka: stands here twice, the first time on line 1"),
    ("- kafka\n", ":1", "must be a mapping of sections"),
    ("just text\n", ":1", "must be a mapping of sections"),
    ("kafka: [a]\n", ":1]", "kafka: is a section and takes settings below it, not a list"),
    ("kafka: {grup_id: a}\n", ":1]", "kafka.grup_id: no such setting; did you mean kafka.group_id?"),
    ("\nkafak: {group_id: a}\n", ":2]", "kafak: no such setting; did you mean kafka?"),
    ("kafka: {topics: a}\n", ":1]", "did you mean input.topics?"),
    ("kafka: {group-id: a}\n", ":1]", "did you mean kafka.group_id?"),
    ("kafka.group_id: a\n", ":1]", "sections are nested in YAML"),
    ("kafka: {group_id: {a: b}}\n", ":1]", "kafka.group_id: must be a text, not empty, not a mapping"),
    ("kafka: {group_id: [a]}\n", ":1]", "kafka.group_id: takes one value, not a list"),
    ("kafka: {group_id: ''}\n", ":1]", "kafka.group_id: '' must be a text, not empty"),
    ("input: {topics: [[a]]}\n", ":1]", "input.topics: must be a list, its items not empty, not a list"),
    ("input: {topics: [a, ~]}\n", ":1]", "not nothing"),
    ("kafka: {group_id: !env X}\n", ":1]", "not a value with the tag !env"),
    ("kafka: {group_id: !!python/name:os.system x}\n", ":1]", "not a"),
    ("base: &b {group_id: a}\nkafka:\n  <<: *b\n", ":3]", "merge keys are not supported"),
    ("kafka: &k {security: *k}\n", ":1]", "kafka.security.security: no such setting"),
    ("? [a, b]\n: c\n", ":1]", "a name must be a text, not a list"),
    ("kafka: {group_id: a\nmodel: x\n", ":2: column", "is not YAML"),
    ("kafka:\n\tgroup_id: a\n", ":2: column 1", "is not YAML"),
    ("kafka: {group_id: *nobody}\n", ":1: column", "is not YAML: found undefined alias"),
    ("kafka: {}\n---\nkafka: {}\n", ":2: column 1", "is not YAML: but found another document"),
    ("kafka: {group_id: \x07}\n", "", "is not YAML"),
    ("[" * 5000, "", ""),
]


@pytest.mark.parametrize(("text", "where", "what"), YAML_MISTAKES)
def test_yaml_when_it_is_wrong_then_one_line_names_place_and_mistake(
    write: Write, text: str, where: str, what: str
) -> None:
    path = write(text)
    lines = problems(path)

    assert [line for line in lines if f"file:{path}{where}" in line and what in line]
    assert len(lines) == 1 or text.startswith("base:")


def test_yaml_when_it_is_not_there_or_not_text_then_the_file_is_named(write: Write, tmp_path: Path) -> None:
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"kafka: \xff")

    lines = problems(tmp_path / "missing.yaml", tmp_path, binary)

    assert lines == [
        f"file:{tmp_path}/missing.yaml: cannot be read: No such file or directory",
        f"file:{tmp_path}: cannot be read: Is a directory",
        f"file:{binary}: is not UTF-8 (byte 7)",
    ]


# ---- environment


@pytest.mark.parametrize(
    ("text", "topics"),
    [
        ("a", ["a"]),
        ("a,b", ["a", "b"]),
        (" a , b ,", ["a", "b"]),
        ('["a","b"]', ["a", "b"]),
        (' [ "a" ] ', ["a"]),
        ("[1, 2]", ["1", "2"]),
    ],
)
def test_environment_when_a_list_is_meant_then_commas_and_json_are_read(text: str, topics: list[str]) -> None:
    loaded = load_settings(
        environ={"INFERSTREAM_INPUT__TOPICS": text}, require=False, image_file=NO_IMAGE_FILE
    )

    assert loaded.settings.input.topics == topics


@pytest.mark.parametrize("text", ["[a]", '[["a"]]', "[null]", '["a",]'])
def test_environment_when_json_is_broken_then_it_is_refused(text: str) -> None:
    with pytest.raises(SettingsError, match=r"input\.topics: .* must be a JSON list .*INPUT__TOPICS"):
        load_settings(environ={"INFERSTREAM_INPUT__TOPICS": text}, require=False, image_file=NO_IMAGE_FILE)


def test_environment_when_an_address_is_ipv6_then_its_brackets_are_no_json() -> None:
    environ = {"INFERSTREAM_KAFKA__BOOTSTRAP_SERVERS": "[::1]:9092,broker:9093"}

    loaded = load_settings(environ=environ, require=False, image_file=NO_IMAGE_FILE)

    assert loaded.settings.kafka.bootstrap_servers == ["[::1]:9092", "broker:9093"]


def test_environment_when_a_text_holds_commas_or_json_then_it_stays_as_written() -> None:
    loaded = load(environ={"INFERSTREAM_KAFKA__GROUP_ID": '["a",1]', "INFERSTREAM_MODEL__REVISION": "a,b"})

    assert loaded.settings.kafka.group_id == '["a",1]'
    assert loaded.settings.model.revision == "a,b"


@pytest.mark.parametrize("text", ["", "  ", "\n"])
def test_environment_when_a_variable_is_empty_then_it_says_nothing(text: str) -> None:
    loaded = load(environ={"INFERSTREAM_KAFKA__GROUP_ID": text, "INFERSTREAM_BATCH__MAX_TOKENS": text})

    assert loaded.settings.kafka.group_id == "inferstream"
    assert loaded.origins["kafka.group_id"] == "default"


def test_environment_when_kubernetes_adds_its_service_variables_then_they_are_ignored() -> None:
    loaded = load(
        environ={
            "INFERSTREAM_PORT": "tcp://10.0.0.1:9464",
            "INFERSTREAM_SERVICE_HOST": "10.0.0.1",
            "INFERSTREAM_PORT_9464_TCP_ADDR": "10.0.0.1",
            "INFERSTREAM_TELEMETRY_PORT": "tcp://10.0.0.2:9464",
            "INFERSTREAM__METRICS_PORT": "tcp://10.0.0.2:9464",
            "INFERSTREAM": "x",
            "OTHER__THING": "x",
        }
    )

    assert loaded.settings.telemetry.port == 9464
    assert loaded.warnings == ()


def test_environment_when_one_underscore_is_missing_then_a_warning_names_the_right_one() -> None:
    loaded = load(environ={"INFERSTREAM_KAFKA_GROUP_ID": "mine"})

    assert loaded.settings.kafka.group_id == "inferstream"
    assert loaded.warnings == (
        "INFERSTREAM_KAFKA_GROUP_ID is not read; did you mean INFERSTREAM_KAFKA__GROUP_ID?",
    )


@pytest.mark.parametrize(
    ("variable", "hint"),
    [
        ("INFERSTREAM_KAFKA__GRUP_ID", "INFERSTREAM_KAFKA__GROUP_ID"),
        ("INFERSTREAM_kafka__group_id", "INFERSTREAM_KAFKA__GROUP_ID"),
        ("inferstream_kafka__group_id", "INFERSTREAM_KAFKA__GROUP_ID"),
        ("INFERSTREAM__KAFKA__GROUP_ID", "INFERSTREAM_KAFKA__GROUP_ID"),
        ("INFERSTREAM_KAFKA__TOPICS", "INFERSTREAM_INPUT__TOPICS"),
    ],
)
def test_environment_when_a_variable_is_unknown_then_it_is_an_error_with_close_matches(
    variable: str, hint: str
) -> None:
    [line] = problems(environ={variable: "x"})

    assert line.startswith(f"{variable}: no such setting; did you mean {hint}")


def test_environment_when_a_variable_is_a_whole_section_then_a_warning_says_how_to_write_it() -> None:
    loaded = load(environ={"INFERSTREAM_KAFKA": '{"group_id": "x"}'})

    assert loaded.warnings == (
        "INFERSTREAM_KAFKA is not read; a variable is one setting: INFERSTREAM_KAFKA__NAME",
    )


def test_environment_when_a_variable_resembles_nothing_then_no_match_is_invented() -> None:
    assert problems(environ={"INFERSTREAM_ZZZ__QQQ": "x"}) == ["INFERSTREAM_ZZZ__QQQ: no such setting [env]"]


# ---- secrets


def test_secrets_when_the_environment_has_one_then_it_is_mapped_and_never_printed() -> None:
    [line] = problems(environ={"INFERSTREAM_KAFKA__SECURITY__PASSWORD": "hunter2"})

    assert line.startswith("kafka.security.password: is for a protocol with SASL")
    assert "env INFERSTREAM_KAFKA__SECURITY__PASSWORD" in line
    assert "hunter2" not in line


def test_secrets_when_there_are_two_then_neither_is_guessed_to_be_right() -> None:
    environ = {
        "INFERSTREAM_KAFKA__SECURITY__PROTOCOL": "SASL_SSL",
        "INFERSTREAM_KAFKA__SECURITY__MECHANISM": "PLAIN",
        "INFERSTREAM_KAFKA__SECURITY__USERNAME": "alice",
        "INFERSTREAM_KAFKA__SECURITY__PASSWORD": "hunter2",
        "INFERSTREAM_KAFKA__SECURITY__PASSWORD_FILE": "/run/secrets/password",
    }

    [line] = problems(environ=environ)

    assert line.startswith("kafka.security.password: give one of the two")
    assert "kafka.security.password_file" in line
    assert "hunter2" not in line


def test_secrets_when_settings_are_printed_in_any_way_then_they_are_starred() -> None:
    settings = Settings.model_validate({"kafka": {"security": {"password": "hunter2"}}})

    assert "hunter2" not in f"{settings} {settings!r} {settings.model_dump()} {settings.model_dump_json()}"


def test_secrets_when_a_file_has_one_then_it_is_refused_and_not_printed(write: Write) -> None:
    [line] = problems(write("kafka: {security: {password: hunter2}}"))

    assert "does not belong in a settings file" in line
    assert "kafka.security.password_file" in line
    assert "hunter2" not in line


def test_secrets_when_a_broken_line_of_yaml_has_one_then_it_is_not_printed(write: Write) -> None:
    assert "hunter2" not in "".join(problems(write('kafka: {security: {password: "hunter2}}\n')))


@pytest.mark.parametrize(
    "arguments", [["--kafka.security.password=hunter2"], ["--kafka.security.password", "hunter2"]]
)
def test_secrets_when_given_as_a_flag_then_it_is_refused_and_not_printed(arguments: list[str]) -> None:
    [line] = flag_problems(*arguments)

    assert "a secret has no flag" in line
    assert "INFERSTREAM_KAFKA__SECURITY__PASSWORD" in line
    assert "hunter2" not in line


# ---- flags


def test_flags_when_written_in_any_form_then_they_are_read() -> None:
    assert parse_flags(
        [
            "--kafka.group-id=a=b",
            "--kafka.client_id",
            "c",
            "--input.topics",
            "x",
            "--input.topics=y,z",
            "--telemetry.port",
            "-1",
            "--dead-letter.topic=d",
        ]
    ) == {
        "kafka.group_id": "a=b",
        "kafka.client_id": "c",
        "input.topics": ["x", "y", "z"],
        "telemetry.port": "-1",
        "dead_letter.topic": "d",
    }


def test_flags_when_one_is_repeated_then_the_last_counts() -> None:
    assert parse_flags(["--kafka.group-id", "a", "--kafka.group-id", "b"]) == {"kafka.group_id": "b"}


def test_flags_when_generated_for_every_setting_then_every_setting_is_taken() -> None:
    settings = [setting for setting in SETTINGS.values() if not setting.is_secret]

    assert set(parse_flags([f"{setting.flag}=x" for setting in settings])) == {
        setting.key for setting in settings
    }


FLAG_MISTAKES: list[tuple[Sequence[str], str]] = [
    (["--kafka.grup-id", "x"], "--kafka.grup-id: no such flag; did you mean --kafka.group-id?"),
    (["--group-id=x"], "--group-id: no such flag; did you mean --kafka.group-id?"),
    (["--zzz"], "--zzz: no such flag"),
    (["--kafka.group-id"], "--kafka.group-id: needs a value; must be a text, not empty"),
    (["--kafka.group-id="], "--kafka.group-id: the value is empty"),
    (["--kafka.group-id", " "], "--kafka.group-id: the value is empty"),
    (["word"], "'word': unexpected"),
    (["-x"], "'-x': unexpected"),
]


@pytest.mark.parametrize(("arguments", "start"), FLAG_MISTAKES)
def test_flags_when_one_is_wrong_then_the_line_says_what_to_write(
    arguments: Sequence[str], start: str
) -> None:
    [line] = flag_problems(*arguments)

    assert line.startswith(start)


def test_flags_when_a_value_is_forgotten_then_the_next_flag_is_not_taken_for_it() -> None:
    lines = flag_problems("--kafka.group-id", "--input.topics", "a", "--nothing")

    assert [line.split(":")[0] for line in lines] == ["--kafka.group-id", "--nothing"]


def test_flags_when_a_caller_gives_typed_values_then_they_are_read_like_texts() -> None:
    loaded = load(
        flags={
            "telemetry.port": 0,
            "batch.linger_ms": 2.5,
            "input.topics": ("a", "b"),
            "model.id": Path("/m"),
            "model.revision": None,
        }
    )

    settings = loaded.settings
    assert (settings.telemetry.port, settings.batch.linger_ms) == (0, 2.5)
    assert (settings.input.topics, settings.model.id) == (["a", "b"], "/m")


def test_flags_when_a_caller_gives_an_unknown_key_then_it_is_an_error() -> None:
    assert problems(flags={"kafka.grup_id": "x"}) == [
        "kafka.grup_id: no such setting; did you mean kafka.group_id? [flag]"
    ]


# ---- the same for every setting


SAMPLES = {
    "kafka.bootstrap_servers": "h:1",
    "kafka.heartbeat_interval_ms": "1000",
    "model.device": "cuda:1",
}


@pytest.mark.parametrize(
    "key", [key for key, setting in SETTINGS.items() if not key.startswith("kafka.security")]
)
def test_every_setting_when_given_by_variable_or_flag_then_it_arrives_with_its_origin(key: str) -> None:
    setting = SETTINGS[key]
    text = SAMPLES.get(key) or (setting.choices[0] if setting.choices else None) or _sample(key)
    flags = parse_flags([setting.flag, text])

    by_variable = load_settings(environ={setting.variable: text}, require=False, image_file=NO_IMAGE_FILE)
    by_flag = load_settings(environ={}, flags=flags, require=False, image_file=NO_IMAGE_FILE)

    assert value_of(by_variable.settings, key) == value_of(by_flag.settings, key)
    assert by_variable.origins[key] == f"env {setting.variable}"
    assert by_flag.origins[key] == f"flag {setting.flag}"


def _sample(key: str) -> str:
    setting = SETTINGS[key]
    if setting.type is bool:
        return "true"
    if setting.type in (int, float):
        return str(setting.default or setting.bounds[0])
    return "/pointer" if key.endswith("_field") else "text"
