"""The configuration: where values come from, what they may be, and errors that say how to put them right."""

from __future__ import annotations

import re

import pytest
from pydantic import ValidationError

from fedqueue.config.loading import Config, load_config, parse_config
from fedqueue.config.training import TrainingConfig
from fedqueue.errors import ConfigurationError
from fedqueue.task import Client

MINIMAL = {"task": {"entrypoint": "task.py:T"}, "stop": {"versions": 1}}


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "federation.toml"
    path.write_text('name = "file"\n[task]\nentrypoint = "task.py:T"\n[training]\nepochs = 2\n[stop]\nversions = 1\n')
    return path


def config(**sections) -> Config:
    return parse_config({**MINIMAL, **sections})


def error(**sections) -> ConfigurationError:
    with pytest.raises(ConfigurationError) as caught:
        config(**sections)
    return caught.value


# Sources


def test_file_gives_the_values(path):
    loaded = load_config(path, environment={})
    assert (loaded.name, loaded.training.epochs, loaded.stop.versions) == ("file", 2, 1)


def test_environment_wins_over_the_file_and_set_over_both(path):
    environment = {"FEDQUEUE_TRAINING__EPOCHS": "3", "FEDQUEUE_NAME": "environment", "OTHER_NAME": "x"}
    assert load_config(path, environment=environment).training.epochs == 3
    loaded = load_config(path, ["training.epochs=4"], environment)
    assert (loaded.training.epochs, loaded.name) == (4, "environment")


def test_process_environment_is_read_by_default(path, monkeypatch):
    monkeypatch.setenv("FEDQUEUE_STOP__UPDATES", "17")
    assert load_config(path).stop.updates == 17


def test_later_override_wins(path):
    assert load_config(path, ["name=a", "name=b"], {}).name == "b"


@pytest.mark.parametrize(
    ("override", "section", "expected"),
    [
        ("training.learning_rate=0.5", "training", {"learning_rate": 0.5}),
        ("training.options.momentum=0.9", "training", {"options": {"momentum": 0.9}}),
        ("training.options={nesterov = true}", "training", {"options": {"nesterov": True}}),
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
def test_override_takes_toml_values_and_bare_words(path, override, section, expected):
    node = load_config(path, [override], {})
    for part in section.split("."):
        node = getattr(node, part)
    assert {key: getattr(node, key) for key in expected} == expected


@pytest.mark.parametrize("name", ["2024", "2024-01-01", "true", "1e5", "0"])
def test_text_that_looks_like_a_number_or_a_date_stays_text_where_text_is_wanted(path, name):
    assert load_config(path, [f"name={name}"], {}).name == name
    assert load_config(path, environment={"FEDQUEUE_NAME": name}).name == name


def test_empty_value_is_empty_text(path):
    assert load_config(path, ["redis.url="], {}).redis.url == ""


@pytest.mark.parametrize("override", ["name", "=5", ""])
def test_override_without_a_key_or_a_value_is_an_error(path, override):
    with pytest.raises(ConfigurationError, match=r"^--set = .*expected section\.key=value"):
        load_config(path, [override], {})


def test_override_below_a_single_value_is_an_error(path):
    with pytest.raises(ConfigurationError, match=r"--set name\.first = 'x': name is a single value, not a section"):
        load_config(path, ["name.first=x"], {})
    with pytest.raises(ConfigurationError, match=r"FEDQUEUE_NAME__FIRST = 'x': name is a single value"):
        load_config(path, environment={"FEDQUEUE_NAME__FIRST": "x"})


def test_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigurationError, match=r"CONFIG = '.*nowhere\.toml': cannot be read: No such file"):
        load_config(tmp_path / "nowhere.toml", environment={})


@pytest.mark.parametrize("content", [b"name = ", b"\xff\xfe"])
def test_file_that_is_no_toml_is_an_error(tmp_path, content):
    path = tmp_path / "bad.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigurationError, match=r"bad\.toml': is not TOML"):
        load_config(path, environment={})


# Errors

SECTIONS = {name: field.annotation for name, field in Config.model_fields.items() if name not in ("name", "seed")}


@pytest.mark.parametrize("section", SECTIONS)
def test_unknown_key_of_every_section_is_an_error_that_names_the_nearest_known_one(section):
    known = max(SECTIONS[section].model_fields, key=len)
    misspelt = known[:-1] + ("x" if known[-1] != "x" else "y")
    caught = error(**{section: {**MINIMAL.get(section, {}), misspelt: 1}})
    assert caught.key == f"{section}.{misspelt}"
    assert caught.accepted == f"unknown key; did you mean {known!r}?"


@pytest.mark.parametrize("section", SECTIONS)
def test_key_that_resembles_nothing_lists_the_known_ones(section):
    caught = error(**{section: {**MINIMAL.get(section, {}), "qqqqqq": 1}})
    assert caught.accepted == f"unknown key; known: {', '.join(SECTIONS[section].model_fields)}"


def test_unknown_section_names_the_nearest_one():
    assert str(error(trainig={"epochs": 1})) == "trainig = '…': unknown key; did you mean 'training'?"


def test_unknown_key_of_a_subsection_is_named_with_its_path():
    assert str(error(aggregation={"staleness": {"functon": "hinge"}})).startswith(
        "aggregation.staleness.functon = 'hinge': unknown key; did you mean 'function'?"
    )


@pytest.mark.parametrize("missing", ["task", "stop"])
def test_missing_section_is_named(missing):
    with pytest.raises(ConfigurationError, match=f"^{missing} = None: is required$"):
        parse_config({key: value for key, value in MINIMAL.items() if key != missing})


def test_missing_entrypoint_is_named():
    assert str(error(task={})) == "task.entrypoint = None: is required"


REFUSED = [
    ("seed", -1, "greater than or equal to 0"),
    ("seed", 2**31, "less than 2147483648"),
    ("name", "no spaces", "1 to 64 letters"),
    ("name", "-dash-first", "1 to 64 letters"),
    ("name", "x" * 65, "1 to 64 letters"),
    ("name", "a:b", "1 to 64 letters"),
    ("redis.retention_hours", -1, "greater than or equal to 0"),
    ("clients.count", 0, "greater than or equal to 1"),
    ("clients.names", ["a", "a"], "names must differ"),
    ("clients.names", ["a/b"], "1 to 64 letters"),
    ("clients.minimum", 9, "only 8 clients"),
    ("clients.slowdown", {"client-9": 2}, r"slowdown names \['client-9'\], which are not clients: client-0"),
    ("clients.slowdown", {"client-0": 0.5}, "greater than or equal to 1"),
    ("training.learning_rate", 0, "greater than 0"),
    ("training.learning_rate", float("nan"), "finite number"),
    ("training.learning_rate", float("inf"), "finite number"),
    ("training.learning_rate", "fast", "valid number"),
    ("training.batch_size", 0, "greater than or equal to 1"),
    ("training.batch_size", 2.5, "integer"),
    ("training.epochs", 0, "greater than or equal to 1"),
    ("training.steps", -1, "greater than or equal to 0"),
    ("training.proximal_mu", -0.1, "greater than or equal to 0"),
    ("training.threads", 0, "greater than or equal to 1"),
    ("training.options", {"momentum": "high"}, "valid"),
    ("aggregation.mode", "fedprox", "'fedasync', 'fedbuff', 'fedavg', 'fadas' or 'ca2fl', or code"),
    ("aggregation.alpha", 0, "greater than 0"),
    ("aggregation.alpha", 1.5, "less than or equal to 1"),
    ("aggregation.mixing", "both", "'model' or 'delta'"),
    ("aggregation.buffer_size", 0, "greater than or equal to 1"),
    ("aggregation.cohort_size", 9, "only 8 clients"),
    ("aggregation.normalize", "sum", "'count' or 'weights'"),
    ("aggregation.max_staleness", -1, "greater than or equal to 0"),
    ("aggregation.staleness.function", "linear", "'constant', 'polynomial', 'hinge' or 'exponential'"),
    ("aggregation.staleness.a", 0, "greater than 0"),
    ("aggregation.staleness.b", -1, "greater than or equal to 0"),
    ("server_optimizer.learning_rate", 0, "greater than 0"),
    ("dispatch.concurrency", -1, "greater than or equal to 0"),
    ("dispatch.lease_seconds", 0, "greater than 0"),
    ("dispatch.stall_seconds", 0, "greater than 0"),
    ("dispatch.max_client_failures", 0, "greater than or equal to 1"),
    ("dispatch.backoff_seconds", 0, "greater than 0"),
    ("dispatch.leader_seconds", 0, "greater than 0"),
    ("evaluation.every", -1, "greater than or equal to 0"),
    ("evaluation.seconds", -1, "greater than or equal to 0"),
    ("stop.versions", -1, "greater than or equal to 0"),
    ("stop.target", {"accuracy": "high"}, "valid number"),
    ("stop", {}, "at least one of versions, updates, seconds and target"),
]


@pytest.mark.parametrize(("key", "value", "accepted"), REFUSED, ids=[f"{k}={v}" for k, v, _ in REFUSED])
def test_value_that_is_not_accepted_is_named_with_its_key_and_what_is(key, value, accepted):
    tree: dict = {"task": {"entrypoint": "t.py:T"}, "stop": {"versions": 1}}
    node = tree
    *path, last = key.split(".")
    for part in path:
        node = node.setdefault(part, {})
    node[last] = value
    with pytest.raises(ConfigurationError, match=accepted) as caught:
        parse_config(tree)
    assert caught.value.key.startswith(path[0] if path else ("aggregation", key)) or caught.value.key == "configuration"
    assert "\n" not in str(caught.value)
    assert "pydantic" not in str(caught.value)


def test_value_is_shown_as_it_was_given():
    assert str(error(training={"epochs": "many"})).startswith("training.epochs = 'many': ")


# What comes out


def test_defaults_are_those_of_the_documents():
    c = config()
    assert (c.name, c.seed, c.redis.url, c.redis.retention_hours) == ("run", 0, "", 24.0)
    assert (c.clients.ids[0], len(c.clients.ids), c.concurrency, c.minimum_clients) == ("client-0", 8, 8, 1)
    assert (c.training.optimizer, c.training.learning_rate, c.training.batch_size) == ("sgd", 0.1, 32)
    assert (c.training.epochs, c.training.steps, c.training.device, c.training.threads) == (1, 0, "auto", 1)
    assert (c.aggregation.mode, c.buffer_size, c.aggregation.max_staleness) == ("fedbuff", 4, 100)
    assert (c.aggregation.staleness.function, c.aggregation.staleness.a) == ("polynomial", None)
    assert (c.server_optimizer.name, c.server_optimizer.learning_rate) == ("sgd", 1.0)
    assert (c.dispatch.lease_seconds, c.dispatch.leader_seconds, c.evaluation.every) == (10.0, 5.0, 1)
    assert not c.barrier
    assert not c.keeps_bases


@pytest.mark.parametrize("section", [None, *SECTIONS])
def test_configuration_is_frozen(section):
    c = config()
    node = getattr(c, section) if section else c
    field = next(iter(type(node).model_fields))
    with pytest.raises(ValidationError, match="frozen"):
        setattr(node, field, getattr(node, field))


def test_configuration_survives_json():
    c = config(clients={"names": ["a", "b"]}, server_optimizer={"name": "adam", "options": {"betas": [0.9, 0.99]}})
    assert Config.model_validate_json(c.model_dump_json()) == c


def test_url_of_the_server_which_may_hold_a_password_is_in_no_dump():
    """The configuration is written into Redis and into files, where others read it."""
    c = config(redis={"url": "redis://:hunter2@host", "retention_hours": 3})
    assert c.redis.url == "redis://:hunter2@host"
    assert "hunter2" not in c.model_dump_json() + repr(c) + str(c.model_dump())
    assert Config.model_validate_json(c.model_dump_json()).redis.retention_hours == 3


def test_optimizer_options_keep_their_types():
    options = {"momentum": 1, "nesterov": True, "weight_decay": 0.5}
    assert repr(TrainingConfig(options=options).options) == repr(options)


def test_clients_have_the_names_that_were_given():
    c = config(clients={"names": ["north", "south"]})
    assert c.clients.ids == ("north", "south")
    assert c.clients.client("south") == Client("south", 1, 2)


def test_client_outside_the_partitions_brings_its_own_data():
    assert config().clients.client("guest") == Client("guest")


@pytest.mark.parametrize(
    ("mode", "fields", "buffer", "barrier", "concurrency", "minimum"),
    [
        ("fedasync", {"buffer_size": 3}, 1, False, 8, 1),
        ("fedbuff", {"buffer_size": 3}, 3, False, 8, 1),
        ("fedbuff", {"buffer_size": 3, "barrier": True}, 3, True, 3, 3),
        ("fedbuff", {"buffer_size": 30, "barrier": True}, 30, True, 30, 8),
        ("fedavg", {"buffer_size": 3}, 8, True, 8, 8),
        ("fedavg", {"cohort_size": 5}, 5, True, 5, 5),
    ],
)
def test_mode_says_how_many_updates_make_a_version(mode, fields, buffer, barrier, concurrency, minimum):
    c = config(aggregation={"mode": mode, **fields})
    assert (c.buffer_size, c.barrier, c.concurrency, c.minimum_clients) == (buffer, barrier, concurrency, minimum)


def test_concurrency_and_minimum_can_be_set():
    c = config(dispatch={"concurrency": 3}, clients={"minimum": 2})
    assert (c.concurrency, c.minimum_clients) == (3, 2)


@pytest.mark.parametrize(
    ("aggregation", "keeps"),
    [
        ({"mode": "fedasync"}, True),
        ({"mode": "fedasync", "mixing": "delta"}, False),
        ({"mode": "fedbuff"}, False),
        ({"mode": "fedavg"}, False),
    ],
)
def test_only_mixing_of_models_keeps_base_versions(aggregation, keeps):
    assert config(aggregation=aggregation).keeps_bases is keeps


def test_errors_have_one_shape():
    caught = error(clients={"count": 0})
    assert re.fullmatch(r"clients\.count = 0: input should be greater than or equal to 1", str(caught))
    assert (caught.key, caught.value) == ("clients.count", 0)
