"""One installation for the whole session: making it is the slow part."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.world import HUB_NAME, World
from tests.hub_server import HubServer
from tests.make_repo import make_repo


@pytest.fixture(scope="session")
def hub_root(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Repositories of the local hub: SmolLM2 as bf16 SafeTensors in two shards, twice."""
    root = tmp_path_factory.mktemp("hub")
    make_repo(smollm2_gguf, root / HUB_NAME, shards=2)
    copy = root / "someone" / "SmolLM2-copy"
    copy.mkdir(parents=True)
    for path in (root / HUB_NAME).iterdir():
        (copy / path.name).hardlink_to(path)
    return root


@pytest.fixture(scope="session")
def hub(hub_root: Path) -> Iterator[HubServer]:
    with HubServer(hub_root) as server:
        yield server


@pytest.fixture(scope="session")
def world(hub: HubServer, smollm2_gguf: Path) -> Iterator[World]:
    """Both models installed, one from a GGUF file and one from the hub, and a daemon running."""
    with tempfile.TemporaryDirectory(prefix="omg-", ignore_cleanup_errors=True) as folder:
        world = World(Path(folder) / "home", hub.url)
        world.omg("model", "pull", str(smollm2_gguf), "--name", "smollm2-gguf")
        world.start()
        world.omg("model", "pull", HUB_NAME)
        world.omg("model", "pull", f"{HUB_NAME}:q8")
        yield world
        if world.daemon is not None:
            world.stop()
