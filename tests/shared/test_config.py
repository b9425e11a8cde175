"""Configuration: sources of values, accepted values, and errors that say how to correct a value."""

from __future__ import annotations

import functools
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from fedqueue.config.client import Client
from fedqueue.config.loading import RENAMED, load_config, parse_config
from fedqueue.config.redis import RedisConfig
from fedqueue.config.schema import Config, SecurityConfig
from fedqueue.config.training import TrainingConfig
from fedqueue.errors import ConfigurationError

MINIMAL: dict[str, Any] = {"task": {"entrypoint": "task.py:T"}, "stop": {"versions": 1}}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "federation.toml"
    path.write_text(
        'name = "file"\n[task]\nentrypoint = "task.py:T"\n[training]\nlocal_epochs = 2\n[stop]\nversions = 1\n'
    )
    return path


def config(**sections: Any) -> Config:
    return parse_config({**MINIMAL, **sections})


def error(**sections: Any) -> ConfigurationError:
    with pytest.raises(ConfigurationError) as caught:
        config(**sections)
    return caught.value


# Sources


def test_file_gives_the_values(path: Path) -> None:
    loaded = load_config(path, environment={})
    assert (loaded.name, loaded.training.local_epochs, loaded.stop.versions) == ("file", 2, 1)


def test_environment_wins_over_the_file_and_set_over_both(path: Path) -> None:
    environment = {"FEDQUEUE_TRAINING__LOCAL_EPOCHS": "3", "FEDQUEUE_NAME": "environment", "OTHER_NAME": "x"}
    assert load_config(path, environment=environment).training.local_epochs == 3
    loaded = load_config(path, ["training.local_epochs=4"], environment)
    assert (loaded.training.local_epochs, loaded.name) == (4, "environment")


def test_process_environment_is_read_by_default(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDQUEUE_STOP__UPDATES", "17")
    assert load_config(path).stop.updates == 17


def test_later_override_wins(path: Path) -> None:
    assert load_config(path, ["name=a", "name=b"], {}).name == "b"


@pytest.mark.parametrize(
    ("override", "section", "expected"),
    [
        ("training.learning_rate=0.5", "training", {"learning_rate": 0.5}),
        ("training.optimizer_options.momentum=0.9", "training", {"optimizer_options": {"momentum": 0.9}}),
        ("training.optimizer_options={nesterov = true}", "training", {"optimizer_options": {"nesterov": True}}),
        ("training.optimizer=adamw", "training", {"optimizer": "adamw"}),
        ('training.optimizer="adamw"', "training", {"optimizer": "adamw"}),
        ("clients.names=['north', 'south']", "clients", {"names": ("north", "south")}),
        ("clients.slowdown.client-0=20", "clients", {"slowdown": {"client-0": 20.0}}),
        ("aggregation.staleness.function=hinge", "aggregation.staleness", {"function": "hinge"}),
        ("stop.target={accuracy = 0.95}", "stop", {"target": {"accuracy": 0.95}}),
        ("redis.url=redis://host:1/0?a=b", "redis", {"url": "redis://host:1/0?a=b"}),
        ("task.options.note=a = b", "task", {"options": {"note": "a = b"}}),
        ("task.options.day=2024-01-01", "task", {"options": {"day": __import__("datetime").date(2024, 1, 1)}}),
    ],
)
def test_override_takes_toml_values_and_bare_words(
    path: Path, override: str, section: str, expected: dict[str, Any]
) -> None:
    node = load_config(path, [override], {})
    for part in section.split("."):
        node = getattr(node, part)
    assert {key: getattr(node, key) for key in expected} == expected


@pytest.mark.parametrize("name", ["2024", "2024-01-01", "true", "1e5", "0"])
def test_numeric_looking_text_stays_text(path: Path, name: str) -> None:
    assert load_config(path, [f"name={name}"], {}).name == name
    assert load_config(path, environment={"FEDQUEUE_NAME": name}).name == name


def test_empty_value_is_empty_text(path: Path) -> None:
    assert load_config(path, ["task.options.note="], {}).task.options == {"note": ""}


@pytest.mark.parametrize("override", ["name", "=5", ""])
def test_override_without_a_key_or_a_value_is_an_error(path: Path, override: str) -> None:
    with pytest.raises(ConfigurationError, match=r"^override = .*: no key or no value; write section\.key=value$"):
        load_config(path, [override], {})


def test_override_below_a_single_value_is_an_error(path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"^name\.first = 'x': name is a single value, not a section"):
        load_config(path, ["name.first=x"], {})
    with pytest.raises(ConfigurationError, match=r"FEDQUEUE_NAME__FIRST = 'x': name is a single value"):
        load_config(path, environment={"FEDQUEUE_NAME__FIRST": "x"})


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"CONFIG = '.*nowhere\.toml': cannot be read: No such file"):
        load_config(tmp_path / "nowhere.toml", environment={})


@pytest.mark.parametrize("content", [b"name = ", b"\xff\xfe"])
def test_invalid_toml_is_an_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigurationError, match=r"bad\.toml': is not TOML"):
        load_config(path, environment={})


@pytest.mark.parametrize("ending", [b"\n", b"\r\n"])
def test_byte_order_mark_of_windows_editors_is_ignored(tmp_path: Path, ending: bytes) -> None:
    path = tmp_path / "federation.toml"
    text = 'name = "size"\n[task]\nentrypoint = "task.py:T"\n[stop]\nversions = 1\n'
    path.write_bytes(b"\xef\xbb\xbf" + text.encode().replace(b"\n", ending))
    assert load_config(path, environment={}).name == "size"


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf_16_of_powershell_is_named(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "federation.toml"
    path.write_bytes(("\ufeff" + 'name = "x"').encode(encoding))
    with pytest.raises(ConfigurationError, match=r"federation\.toml'.*UTF-16.*save it as UTF-8"):
        load_config(path, environment={})


# Words that stand for None

OFF = [
    "training.local_steps", "training.max_grad_norm", "training.schedule.name", "training.local_schedule.name",
    "aggregation.filter.norm_factor", "aggregation.filter.min_cosine",
    "server_optimizer.schedule.name", "dispatch.max_share", "dispatch.round_deadline_seconds", "admission.max_norm",
    "admission.norm_quantile", "security.policy", "security.egress_log", "evaluation.every_versions",
    "evaluation.every_seconds", "checkpoint.every_seconds", "stop.versions", "stop.updates", "stop.seconds",
    "privacy.examples.max_grad_norm", "privacy.examples.noise_multiplier", "privacy.examples.epsilon",
    "privacy.examples.jobs", "privacy.examples.delta", "privacy.clients.clip_norm", "privacy.clients.noise_multiplier",
    "privacy.clients.epsilon", "privacy.clients.max_participations", "privacy.clients.delta",
    "redis.url", "redis.ca_file", "redis.cert_file", "redis.key_file", "redis.password_file",
]  # fmt: skip
WORDS = [
    ("observability.metrics_address", "off"),
    *((key, "off") for key in OFF),
    ("dispatch.concurrency", "auto"),
    ("clients.min_available", "auto"),
    ("compare.strategies", "auto"),
    ("compare.updates", "auto"),
    ("aggregation.robust.keep", "auto"),
    ("aggregation.robust.clip_norm", "median"),
    ("aggregation.cohort_size", "all"),
    ("statistics.file", "off"),
    ("secure.max_examples", "off"),
    ("secure.wait_seconds", "off"),
]
NOT_NONE = {"security.egress_log": "egress", "evaluation.every_versions": 1, "checkpoint.every_seconds": 30.0}
"""The keys whose default is not the word."""


def tree_with(key: str, value: object) -> dict[str, Any]:
    tree: dict[str, Any] = {"task": {"entrypoint": "t.py:T"}, "stop": {"target": {"loss": 0.1}}}
    if key == "evaluation.every_versions":
        tree["evaluation"] = {"every_seconds": 60.0}
    *path, last = key.split(".")
    node = tree
    for part in path:
        node = node.setdefault(part, {})
    node[last] = value
    return tree


def value_of(configuration: Config, key: str) -> typing.Any:
    return functools.reduce(getattr, key.split("."), configuration)


def test_every_key_that_may_be_none_takes_a_word() -> None:
    def keys(section: Any, path: str = "") -> Iterator[str]:
        for name, field in section.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                yield from keys(field.annotation, f"{path}{name}.")
            elif type(None) in typing.get_args(field.annotation):
                yield f"{path}{name}"

    of_the_function = {"aggregation.staleness.a", "aggregation.staleness.b"}  # each function has a default of its own
    assert set(keys(Config)) == {key for key, _ in WORDS} | of_the_function


@pytest.mark.parametrize(("key", "word"), WORDS)
def test_word_and_omitted_key_both_mean_none(path: Path, key: Any, word: Any) -> None:
    assert value_of(parse_config(tree_with(key, word)), key) is None
    assert value_of(parse_config(tree_with("seed", 0)), key) == NOT_NONE.get(key)
    others = ["stop.target={loss = 0.1}"]
    others += ["evaluation.every_seconds=60"] if key == "evaluation.every_versions" else []
    given = load_config(path, [f"{key}={word}", *others], {})
    assert value_of(given, key) is None
    stored = parse_config(tree_with(key, word))  # what belongs to a machine is not stored
    dump = stored.model_dump(mode="json")
    if not key.startswith(("redis.", "security.", "compare.", "observability.")):
        assert functools.reduce(dict.__getitem__, key.split("."), dump) == word
    read = Config.model_validate_json(stored.model_dump_json())
    assert read == stored.model_copy(update={"redis": RedisConfig(), "security": SecurityConfig()})


@pytest.mark.parametrize(("key", "word"), WORDS)
def test_sentinel_value_is_an_error_that_says_what_to_write(key: Any, word: Any) -> None:
    numbers = {"aggregation.filter.min_cosine": -1, "dispatch.max_share": 1}
    text = value_of(parse_config(tree_with("seed", 0)), key) == "egress" or key.startswith(("redis.", "security."))
    value = "" if text or key.endswith("schedule.name") else numbers.get(key, 0)
    with pytest.raises(ConfigurationError) as caught:
        parse_config(tree_with(key, value))
    assert (caught.value.key, caught.value.value) == (key, value)
    assert f"write {word!r}" in caught.value.hint
    assert ("leave the key out" in caught.value.hint) == (key not in NOT_NONE)


# Keys that were renamed


@pytest.mark.parametrize("old", RENAMED)
def test_renamed_key_is_an_error_that_names_the_current_key(path: Path, old: Any) -> None:
    section = old.rpartition(".")[0]
    present = f"{section}.{RENAMED[old]}"
    assert value_of(parse_config(tree_with("seed", 0)), section)
    with pytest.raises(ConfigurationError) as caught:
        parse_config(tree_with(old, {"x": 1}))
    assert (caught.value.key, caught.value.problem) == (old, "the key was renamed")
    assert caught.value.hint == f"write {present}"
    with pytest.raises(ConfigurationError) as caught:
        load_config(path, [f"{old}=1"], {})
    assert str(caught.value) == f"{old} = '1': the key was renamed; write {present}"
    variable, new = (f"FEDQUEUE_{key.upper().replace('.', '__')}" for key in (old, present))
    with pytest.raises(ConfigurationError) as caught:
        load_config(path, environment={variable: "1"})
    assert str(caught.value) == f"{variable} = '1': the key was renamed; write {new}"


def test_only_the_new_names_of_renamed_keys_are_accepted() -> None:
    for old, present in RENAMED.items():
        section = value_of(parse_config(tree_with("seed", 0)), old.rpartition(".")[0])
        assert old.rpartition(".")[2] not in type(section).model_fields
        assert present in type(section).model_fields


def test_key_below_a_renamed_key_is_named_with_its_current_path(path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"write dispatch\.fedcompass\.min_steps$"):
        load_config(path, ["dispatch.compass.min_steps=3"], {})


def test_renamed_key_is_reported_before_other_errors() -> None:
    caught = error(seed=-1, aggregation={"mode": "fedavg"})
    assert str(caught) == "aggregation.mode = 'fedavg': the key was renamed; write aggregation.strategy"


@pytest.mark.parametrize(("old", "present"), [("free", "async"), ("compass", "fedcompass")])
def test_renamed_value_is_an_error_that_names_the_current_value(old: str, present: str) -> None:
    caught = error(dispatch={"schedule": old})
    assert str(caught) == f"dispatch.schedule = {old!r}: the value was renamed; write {present!r}"
    assert config(dispatch={"schedule": present}).dispatch.schedule == present


# Errors


def test_misspelled_value_error_names_the_nearest_one() -> None:
    caught = error(aggregation={"strategy": "fedbuf"})
    assert str(caught) == "aggregation.strategy = 'fedbuf': unknown strategy; did you mean 'fedbuff'?"


SECTIONS: dict[str, Any] = {
    name: field.annotation for name, field in Config.model_fields.items() if name not in ("name", "seed")
}


@pytest.mark.parametrize("section", SECTIONS)
def test_unknown_key_is_an_error_with_a_suggestion(section: Any) -> None:
    known = max(SECTIONS[section].model_fields, key=len)
    misspelt = known[:-1] + ("x" if known[-1] != "x" else "y")
    caught = error(**{section: {**MINIMAL.get(section, {}), misspelt: 1}})
    assert caught.key == f"{section}.{misspelt}"
    assert (caught.problem, caught.hint) == ("unknown key", f"did you mean {known!r}?")


@pytest.mark.parametrize("section", SECTIONS)
def test_error_for_an_unrecognizable_key_lists_the_known_keys(section: Any) -> None:
    caught = error(**{section: {**MINIMAL.get(section, {}), "qqqqqq": 1}})
    assert caught.problem == "unknown key"
    assert caught.hint == f"known keys: {', '.join(SECTIONS[section].model_fields)}"


def test_unknown_section_names_the_nearest_one() -> None:
    assert str(error(trainig={"local_epochs": 1})) == "trainig: unknown key; did you mean 'training'?"


def test_unknown_key_of_a_subsection_is_named_with_its_path() -> None:
    assert str(error(aggregation={"staleness": {"functon": "hinge"}})).startswith(
        "aggregation.staleness.functon = 'hinge': unknown key; did you mean 'function'?"
    )


@pytest.mark.parametrize("missing", ["task", "stop"])
def test_missing_section_is_named(missing: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"^{missing}: missing; add a section \[{missing}\]$"):
        parse_config({key: value for key, value in MINIMAL.items() if key != missing})


def test_missing_entrypoint_is_named() -> None:
    assert str(error(task={})) == "task.entrypoint: missing; add this key"


REFUSED = [
    ("seed", -1, "greater than or equal to 0"),
    ("seed", 2**31, "less than 2147483648"),
    ("name", "no spaces", "1 to 64 letters"),
    ("name", "-dash-first", "1 to 64 letters"),
    ("name", "x" * 65, "1 to 64 letters"),
    ("name", "a:b", "1 to 64 letters"),
    ("redis.retention_hours", -1, "greater than or equal to 0"),
    ("clients.count", 0, "greater than or equal to 1"),
    ("clients.names", ["a", "a"], "names has a name twice; names must differ from each other"),
    ("clients.names", ["a/b"], "1 to 64 letters"),
    ("clients.min_available", 9, "only 8 clients"),
    ("clients.slowdown", {"client-9": 2}, r"slowdown names \['client-9'\], which are not clients; clients: client-0"),
    ("clients.slowdown", {"client-0": 0.5}, "greater than or equal to 1"),
    ("training.learning_rate", 0, "greater than 0"),
    ("training.learning_rate", float("nan"), "finite number"),
    ("training.learning_rate", float("inf"), "finite number"),
    ("training.learning_rate", "fast", "valid number"),
    ("training.batch_size", 0, "greater than or equal to 1"),
    ("training.batch_size", 2.5, "integer"),
    ("training.local_epochs", 0, "greater than or equal to 1"),
    ("training.local_steps", -1, "greater than or equal to 1"),
    ("training.proximal_mu", -0.1, "greater than or equal to 0"),
    ("training.threads", 0, "greater than or equal to 1"),
    ("training.optimizer_options.momentum", {"a": 1}, "write a number, a string, true"),
    (
        "aggregation.strategy",
        "fedprox",
        "unknown strategy; write 'fedasync', 'fedbuff', 'fedavg', 'fadas' or 'ca2fl', or code",
    ),
    ("aggregation.alpha", 0, "greater than 0"),
    ("aggregation.alpha", 1.5, "less than or equal to 1"),
    ("aggregation.mixing", "both", "'model' or 'delta'"),
    ("aggregation.buffer_size", 0, "greater than or equal to 1"),
    ("aggregation.cohort_size", 9, "only 8 clients"),
    ("aggregation.normalize", "sum", "'count' or 'weights'"),
    ("aggregation.max_staleness", -1, "greater than or equal to 0"),
    (
        "aggregation.staleness.function",
        "linear",
        "unknown staleness function; write 'constant', 'polynomial', 'hinge' or 'exponential'",
    ),
    ("aggregation.staleness.a", 0, "greater than 0"),
    ("aggregation.staleness.b", -1, "greater than or equal to 0"),
    ("server_optimizer.learning_rate", 0, "greater than 0"),
    ("dispatch.concurrency", -1, "greater than or equal to 1"),
    ("dispatch.lease_seconds", 0, "greater than 0"),
    ("dispatch.stall_seconds", 0, "greater than 0"),
    ("dispatch.max_client_failures", 0, "greater than or equal to 1"),
    ("dispatch.backoff_seconds", 0, "greater than 0"),
    ("dispatch.leader_lease_seconds", 0, "greater than 0"),
    ("evaluation.every_versions", -1, "greater than or equal to 1"),
    ("evaluation.every_seconds", -1, "greater than 0"),
    ("stop.versions", -1, "greater than or equal to 1"),
    ("stop.target", {"accuracy": "high"}, "not a finite number"),
    ("stop", {}, "no limit is set; set at least one of versions, updates, seconds and target"),
]


@pytest.mark.parametrize(("key", "value", "problem"), REFUSED, ids=[f"{k}={v}" for k, v, _ in REFUSED])
def test_invalid_value_error_names_the_key_and_the_problem(key: str, value: Any, problem: str) -> None:
    tree: dict[str, Any] = {"task": {"entrypoint": "t.py:T"}, "stop": {"versions": 1}}
    node = tree
    *path, last = key.split(".")
    for part in path:
        node = node.setdefault(part, {})
    node[last] = value
    with pytest.raises(ConfigurationError, match=problem) as caught:
        parse_config(tree)
    assert caught.value.key.startswith(path[0] if path else ("aggregation", key)) or caught.value.key == "configuration"
    assert "\n" not in str(caught.value)
    assert "pydantic" not in str(caught.value)


def test_error_shows_the_value_as_it_was_given() -> None:
    assert str(error(training={"local_epochs": "many"})).startswith("training.local_epochs = 'many': ")


# The parsed configuration


def test_defaults_match_the_documentation() -> None:
    c = config()
    assert (c.name, c.seed, c.redis.url, c.redis.retention_hours) == ("run", 0, None, 24.0)
    assert (c.clients.ids[0], len(c.clients.ids), c.concurrency, c.minimum_clients) == ("client-0", 8, 8, 1)
    assert (c.training.optimizer, c.training.learning_rate, c.training.batch_size) == ("sgd", 0.1, 32)
    assert (c.training.local_epochs, c.training.local_steps, c.training.device, c.training.threads) == (
        1,
        None,
        "auto",
        1,
    )
    assert (c.aggregation.strategy, c.buffer_size, c.aggregation.max_staleness) == ("fedbuff", 4, 100)
    assert (c.aggregation.staleness.function, c.aggregation.staleness.a) == ("polynomial", None)
    assert (c.server_optimizer.name, c.server_optimizer.learning_rate) == ("sgd", 1.0)
    assert (c.dispatch.lease_seconds, c.dispatch.leader_lease_seconds, c.evaluation.every_versions) == (10.0, 5.0, 1)
    assert not c.barrier
    assert not c.keeps_bases


@pytest.mark.parametrize("section", [None, *SECTIONS])
def test_configuration_is_frozen(section: Any) -> None:
    c = config()
    node = getattr(c, section) if section else c
    field = next(iter(type(node).model_fields))
    with pytest.raises(ValidationError, match="frozen"):
        setattr(node, field, getattr(node, field))


def test_configuration_round_trips_through_json() -> None:
    c = config(
        clients={"names": ["a", "b"]}, server_optimizer={"name": "adam", "optimizer_options": {"betas": [0.9, 0.99]}}
    )
    assert Config.model_validate_json(c.model_dump_json()) == c


def test_redis_url_is_in_no_dump_of_the_configuration() -> None:
    """The dumped configuration is stored in Redis and in files that other users can read."""
    c = config(redis={"url": "redis://:hunter2@host", "retention_hours": 3})
    assert c.redis.url == "redis://:hunter2@host"
    assert "hunter2" not in c.model_dump_json() + repr(c) + str(c.model_dump())
    assert Config.model_validate_json(c.model_dump_json()).redis.retention_hours == 3


def test_optimizer_options_keep_their_types() -> None:
    options = {"momentum": 1, "nesterov": True, "weight_decay": 0.5}
    assert repr(TrainingConfig(optimizer_options=options).optimizer_options) == repr(options)


def test_configured_client_names_are_used() -> None:
    c = config(clients={"names": ["north", "south"]})
    assert c.clients.ids == ("north", "south")
    assert c.clients.client("south") == Client("south", 1, 2)


def test_client_without_a_partition_has_its_own_data() -> None:
    assert config().clients.client("guest") == Client("guest")


@pytest.mark.parametrize(
    ("strategy", "fields", "buffer", "barrier", "concurrency", "minimum"),
    [
        ("fedasync", {"buffer_size": 3}, 1, False, 8, 1),
        ("fedbuff", {"buffer_size": 3}, 3, False, 8, 1),
        ("fedbuff", {"buffer_size": 3, "barrier": True}, 3, True, 3, 3),
        ("fedbuff", {"buffer_size": 8, "barrier": True}, 8, True, 8, 8),
        ("fedavg", {"buffer_size": 3}, 8, True, 8, 8),
        ("fedavg", {"cohort_size": 5}, 5, True, 5, 5),
    ],
)
def test_strategy_determines_the_updates_per_version(
    strategy: str, fields: dict[str, Any], buffer: int, barrier: bool, concurrency: int, minimum: int
) -> None:
    c = config(aggregation={"strategy": strategy, **fields})
    assert (c.buffer_size, c.barrier, c.concurrency, c.minimum_clients) == (buffer, barrier, concurrency, minimum)


def test_concurrency_and_minimum_can_be_set() -> None:
    c = config(dispatch={"concurrency": 3}, clients={"min_available": 2})
    assert (c.concurrency, c.minimum_clients) == (3, 2)


@pytest.mark.parametrize(
    ("aggregation", "keeps"),
    [
        ({"strategy": "fedasync"}, True),
        ({"strategy": "fedasync", "mixing": "delta"}, False),
        ({"strategy": "fedbuff"}, False),
        ({"strategy": "fedavg"}, False),
    ],
)
def test_only_model_mixing_keeps_base_versions(aggregation: dict[str, Any], keeps: bool) -> None:
    assert config(aggregation=aggregation).keeps_bases is keeps


def test_configuration_errors_have_one_format() -> None:
    caught = error(clients={"count": 0})
    assert re.fullmatch(r"clients\.count = 0: must be greater than or equal to 1", str(caught))
    assert (caught.key, caught.value, caught.hint) == ("clients.count", 0, "")
    assert caught.problem == "must be greater than or equal to 1"
