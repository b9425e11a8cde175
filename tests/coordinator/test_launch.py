"""How a local run is started again."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedqueue.errors import ConfigurationError
from fedqueue_coordinator.operator.launch_record import Launch, read_launch, write_launch

LAUNCH = Launch(Path("/somewhere/federation.toml"), ["training.epochs=2"], 3)


@pytest.mark.parametrize("left", ["redis/appendonly", "checkpoint.safetensors"])
def test_run_that_left_its_server_s_data_or_a_checkpoint_can_go_on_with_further_settings(tmp_path, left):
    write_launch(tmp_path, LAUNCH)
    (tmp_path / left).parent.mkdir(exist_ok=True)
    (tmp_path / left).touch()
    assert read_launch(tmp_path, ["stop.versions=9"]) == Launch(
        LAUNCH.config, ["training.epochs=2", "stop.versions=9"], 3
    )


def test_run_that_has_ended_and_a_folder_that_is_none_cannot_go_on(tmp_path):
    with pytest.raises(ConfigurationError, match=r"holds no launch\.json"):
        read_launch(tmp_path, [])
    write_launch(tmp_path, LAUNCH)
    with pytest.raises(ConfigurationError, match="has ended"):
        read_launch(tmp_path, [])
