"""What the service always refuses of its settings, the chart refuses before anything is applied."""

from __future__ import annotations

import ast
import inspect
import json
import re
from collections.abc import Mapping
from typing import Any

import jsonschema_rs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import AfterValidator, ValidationError

from inferstream.settings import SETTINGS, Settings, checks
from inferstream.settings.derive import derive_names
from tests.helm.chart import CHART, MINIMAL, refusal, render, with_values

Tree = Mapping[str, Any]

LOGIN = {"protocol": "SASL_SSL", "mechanism": "PLAIN", "username": "a", "password_file": "/x"}
PASSWORD = {
    "name": "INFERSTREAM_KAFKA__SECURITY__PASSWORD",
    "valueFrom": {"secretKeyRef": {"name": "a", "key": "b"}},
}


def security(**settings: str | None) -> Tree:
    return {"kafka": {"security": settings}}


def exactly_once(**settings: Any) -> Tree:
    return {"delivery": {"guarantee": "exactly-once", **settings}}


# What is wrong → the settings, and what the chart must say of them.
CASES: dict[str, tuple[Tree, str]] = {
    "revoke": ({"delivery": {"revoke_timeout_s": 28.8}}, "config.delivery.revoke_timeout_s 28.8"),
    "request": ({"kafka": {"request_timeout_ms": 60_000}}, "config.kafka.request_timeout_ms 60000"),
    "heartbeat": ({"kafka": {"heartbeat_interval_ms": 15_001}}, "config.kafka.heartbeat_interval_ms 15001"),
    "session": ({"kafka": {"session_timeout_ms": 8_999}}, "config.kafka.session_timeout_ms 8999"),
    "linger": ({"batch": {"linger_ms": 5000}}, "config.batch.linger_ms 5000"),
    "output to input": ({"output": {"topic": "documents"}}, "config.output.topic documents"),
    "letters to input": ({"dead_letter": {"topic": "documents"}}, "config.dead_letter.topic documents"),
    "letters by their default to input": (
        {"output": {"topic": "a"}, "input": {"topics": "b, a.dead-letters"}},
        "config.dead_letter.topic a.dead-letters",
    ),
    "letters to output": (
        {"dead_letter": {"topic": "embeddings"}},
        "config.dead_letter.topic and config.output.topic",
    ),
    "commit": (exactly_once(commit_interval_ms=3334), "config.delivery.commit_interval_ms 3334"),
    "transaction": (
        exactly_once(commit_interval_ms=500, transaction_timeout_ms=1499),
        "config.delivery.transaction_timeout_ms 1499",
    ),
    "order": (exactly_once(order="none"), "config.delivery.order none"),
    "embedded exactly-once": (
        {**exactly_once(), "kafka": {"bootstrap_servers": ["embedded"]}},
        "config.kafka.bootstrap_servers embedded",
    ),
    "embedded with TLS": (
        {"kafka": {"bootstrap_servers": ["embedded"], "security": {"protocol": "SSL"}}},
        "config.kafka.bootstrap_servers embedded",
    ),
    "OAuth": (security(**{**LOGIN, "mechanism": "OAUTHBEARER"}), "at '/config/kafka/security/mechanism'"),
    "two passwords": (security(**LOGIN, password="a"), "config.kafka.security.password is a secret"),
    **{
        f"{name} without login": (security(**{name: value}), f"config.kafka.security.{name} ")
        for name, value in {**LOGIN, "password": "a"}.items()
        if name != "protocol"
    },
    **{
        f"login without {name}": (security(**{**LOGIN, name: None}), said)
        for name, said in (
            ("mechanism", "config.kafka.security.mechanism is required"),
            ("username", "config.kafka.security.username is required"),
            ("password_file", "secrets.kafka.sasl.existingSecret is required"),
        )
    },
    **{
        f"{name} without TLS": (security(**{name: "/x"}), f"config.kafka.security.{name} has no use")
        for name in ("ca_file", "cert_file", "key_file", "key_password_file")
    },
    **{
        f"{name} alone": (
            security(protocol="SSL", **{name: "/x"}),
            f"config.kafka.security.{name} needs config.kafka.security.{other}",
        )
        for name, other in (
            ("cert_file", "key_file"),
            ("key_file", "cert_file"),
            ("key_password_file", "key_file"),
        )
    },
}


def refused_at(tree: Tree) -> list[int]:
    """The lines of checks.py that have something against the least settings with these over them."""
    config = with_values(tree, base=MINIMAL["config"])
    if isinstance(config["input"]["topics"], str):
        config["input"]["topics"] = re.findall(r"[a-z.-]+", config["input"]["topics"])
    found = checks.conflicts(derive_names(Settings.model_validate(without_nulls(config))))
    return [found.gi_yieldfrom.gi_frame.f_lineno for _ in found]  # type: ignore[attr-defined]


def without_nulls(tree: Tree) -> dict[str, Any]:
    return {
        name: without_nulls(value) if isinstance(value, Mapping) else value
        for name, value in tree.items()
        if value is not None
    }


def lines_that_refuse() -> set[int]:
    source = ast.parse(inspect.getsource(checks))
    functions = {thing.name: thing for thing in source.body if isinstance(thing, ast.FunctionDef)}
    parts = [
        node.value.func.id
        for node in ast.walk(functions["conflicts"])
        if isinstance(node, ast.YieldFrom)
        and isinstance(node.value, ast.Call)
        and isinstance(node.value.func, ast.Name)
    ]
    return {
        node.lineno for part in parts for node in ast.walk(functions[part]) if isinstance(node, ast.Yield)
    }


@pytest.mark.parametrize("name", CASES)
def test_settings_when_the_service_refuses_them_then_the_chart_does(name: str) -> None:
    tree, said = CASES[name]

    message = refusal({"config": tree})

    assert refused_at(tree)
    assert said in message, message
    assert "error calling" not in message


def test_checks_of_the_service_when_listed_then_the_chart_is_tried_with_each() -> None:
    tried = {line for tree, _ in CASES.values() for line in refused_at(tree)}

    assert lines_that_refuse() == tried


def test_settings_when_they_are_just_right_for_the_service_then_the_chart_takes_them() -> None:
    least: Tree = {
        "kafka": {"heartbeat_interval_ms": 15_000, "request_timeout_ms": 60_001},
        "input": {"topics": " one,two, "},
        "batch": {"linger_ms": 4_999.5},
        **exactly_once(commit_interval_ms=3_333),
    }
    most: Tree = {
        "kafka": {"session_timeout_ms": 9_000, "rebalance_timeout_ms": 69_999},
        "input": {"topics": '["one", "two"]'},
        "delivery": {"revoke_timeout_s": 33.5},
    }

    for tree in (least, most, exactly_once(transaction_timeout_ms=1000), {"batch": {"linger_ms": 0}}):
        assert refused_at(tree) == []
        assert render({"config": tree}).config


def test_defaults_when_the_chart_compares_with_them_then_they_are_the_services_own() -> None:
    text = 'apiVersion: v1\nkind: List\nmetadata:\n  {{- include "inferstream.defaults" . | nindent 2 }}'

    defaults = render({"extraObjects": [text]}).one("List")["metadata"]

    assert defaults == {key: SETTINGS[key].default for key in defaults}
    assert len(defaults) > 5


def test_settings_when_extra_env_gives_one_of_two_then_the_chart_leaves_them_to_the_service() -> None:
    elsewhere = [
        {"name": "INFERSTREAM_KAFKA__SESSION_TIMEOUT_MS", "value": "90000"},
        {"name": "INFERSTREAM_KAFKA__SECURITY__PROTOCOL", "value": "SASL_SSL"},
        {"name": "INFERSTREAM_OUTPUT__TOPIC", "value": "results"},
        {"name": "INFERSTREAM_MODEL__ID", "value": "/opt/model"},
    ]

    render(
        {
            "config": {
                "kafka": {
                    "heartbeat_interval_ms": 30_000,
                    "security": {"mechanism": "PLAIN", "username": "a"},
                }
            }
        },
        {"config": {"output": {"topic": "documents"}}, "model": {"offline": True}, "extraEnv": elsewhere},
        {"secrets": {"kafka": {"sasl": {"existingSecret": "a"}, "ca": {"existingSecret": "b"}}}},
    )


def schema_of(key: str) -> Any:
    schema = json.loads((CHART / "values.schema.json").read_text())["properties"]["config"]
    for name in key.split("."):
        schema = schema["properties"][name]
    return schema


def is_taken(key: str, value: Any) -> bool:
    section, name = key.split(".")
    try:
        Settings.model_validate({section: {name: value}})
    except ValidationError:
        return False
    return True


def texts() -> st.SearchStrategy[str]:
    parts = [
        "a",
        "Z",
        ".",
        "_",
        "-",
        "/",
        "~",
        "~0",
        " ",
        "é",
        ":",
        "0",
        "9",
        "cuda",
        "cpu",
        "embedded",
        "[",
        "]",
        "\n",
    ]
    return st.lists(st.sampled_from([*parts, "65535", "65536", "a:"]), min_size=1, max_size=6).map("".join)


@pytest.mark.parametrize(
    "key", ["output.topic", "dead_letter.topic", "input.text_field", "input.id_field", "model.device"]
)
@given(text=texts())
def test_text_when_the_schema_has_a_pattern_for_it_then_the_service_takes_what_matches(
    key: str, text: str
) -> None:
    assert jsonschema_rs.is_valid(schema_of(key), text) == is_taken(key, text)


@pytest.mark.parametrize("key", ["kafka.bootstrap_servers", "input.topics"])
@given(text=texts())
def test_item_when_the_schema_has_a_pattern_for_it_then_the_service_takes_what_matches(
    key: str, text: str
) -> None:
    assert jsonschema_rs.is_valid(schema_of(key), [text]) == is_taken(key, [text])


@pytest.mark.parametrize("length", [248, 249, 250])
@pytest.mark.parametrize("start", ["a", ".a", "..", "..."])
def test_topic_when_it_is_long_then_schema_and_service_agree(start: str, length: int) -> None:
    name = start.ljust(length, "x")

    assert jsonschema_rs.is_valid(schema_of("output.topic"), name) == (length <= 249)
    assert is_taken("output.topic", name) == (length <= 249)


def test_settings_when_they_have_a_rule_of_their_own_then_the_schema_has_it_too() -> None:
    """A pattern is lost on the schema where a type has only a function to check it."""
    ruled = {key for key, setting in SETTINGS.items() if setting.pattern}

    assert {key for key in SETTINGS if is_checked_by_function(key)} == ruled


def is_checked_by_function(key: str) -> bool:
    section: Any = Settings
    *sections, name = key.split(".")
    for part in sections:
        section = section.model_fields[part].annotation
    return any(isinstance(thing, AfterValidator) for thing in section.model_fields[name].metadata)
