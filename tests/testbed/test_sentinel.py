"""The watched group is real: a replica becomes the master when it dies, and all agree who it is."""

from __future__ import annotations

import pytest

from kvlab.errors import KVLabError
from kvlab.testbed.sentinel import RedisSentinel


@pytest.mark.cluster
@pytest.mark.slow
def test_another_master_takes_over_and_all_end_with_the_block() -> None:
    with RedisSentinel() as group:
        first = group.master
        assert first is group.nodes[0]
        first.client().set("kv:a", b"value")
        assert first.client().wait(2, 5000) == 2
        first.kill()
        group.wait_until_ok()
        assert group.master is not first
        assert group.master.client().get("kv:a") == b"value"
    assert not [server for server in (*group.nodes, *group.sentinels) if server.running]
    with pytest.raises(KVLabError, match="no sentinel is up"):
        _ = group.master


def test_it_says_how_to_install_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(KVLabError, match="apt-get install redis-server"), RedisSentinel():
        pass
