"""Launch records: how a local run is started again."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedqueue.errors import ConfigurationError
from fedqueue_coordinator.operator.local_run import Launch, read_launch, write_launch

LAUNCH = Launch(Path("/somewhere/federation.toml"), ["training.local_epochs=2"], 3)


@pytest.mark.parametrize("left", ["redis/appendonly", "checkpoint.safetensors"])
def test_run_with_data_or_checkpoint_can_be_resumed(tmp_path, left):
    write_launch(tmp_path, LAUNCH)
    (tmp_path / left).parent.mkdir(exist_ok=True)
    (tmp_path / left).touch()
    assert read_launch(tmp_path, ["stop.versions=9"]) == Launch(
        LAUNCH.config, ["training.local_epochs=2", "stop.versions=9"], 3
    )


def test_ended_run_and_other_folders_cannot_be_resumed(tmp_path):
    with pytest.raises(ConfigurationError, match=r"holds no launch\.json"):
        read_launch(tmp_path, [])
    write_launch(tmp_path, LAUNCH)
    with pytest.raises(ConfigurationError, match="has ended"):
        read_launch(tmp_path, [])
