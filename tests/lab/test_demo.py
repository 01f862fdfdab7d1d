"""The demo: what it prints is true, and its result says if it is not."""

import json
from pathlib import Path

import pytest
from torch import Tensor

from kvlab.cli import main
from kvlab.course import exercises
from kvlab.errors import ConfigError, KVLabError
from kvlab.lab import demo
from kvlab.model import load_model
from kvlab.testbed.server import RedisServer

SHORT = (64, 128)
LINES = ("All tests completed!", "Cached KV tensors: True", "Retrieved from cache: True", "Cache hit rate: 100%")


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two short prefixes are enough to see that it works."""
    monkeypatch.setattr(demo.run, "__defaults__", (*demo.run.__defaults__[:2], SHORT))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("KVLAB_STORE", raising=False)


def test_the_lines_of_the_source_document(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert all(line in printed for line in LINES)


def test_json_is_one_object_with_the_agreed_fields(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    agreed = {"tokens_equal", "hit_rate_full_blocks", "rows", "precision", "threads", "machine", "versions", "noisy"}
    assert agreed <= result.keys()
    assert result["tokens_equal"] is True and result["hit_rate_full_blocks"] == 1.0
    assert [row["prefix_tokens"] for row in result["rows"]] == [64, 128]
    assert {"prefix_tokens", "cold_ms", "warm_ms", "speedup", "bytes"} <= result["rows"][0].keys()
    assert result["rows"][1]["bytes"] == 2 * (128 + 64 * 6144)


@pytest.mark.redis
def test_over_a_real_redis_where_all_that_is_left_expires(redis_server: RedisServer) -> None:
    said: list[str] = []
    assert demo.run(redis_server.url, say=said.append).ok
    assert "All tests completed!" in said and f"store:   {redis_server.url}: answers" in said
    client = redis_server.client()
    assert 0 < max(map(client.ttl, client.keys())) <= demo.TTL_S
    assert min(map(client.ttl, client.keys())) > 0


def test_a_store_that_cannot_be_used() -> None:
    with pytest.raises(KVLabError, match=r"^the store cannot be used \(redis://127\.0\.0\.1:9: conn.*KVLAB_STORE\)$"):
        demo.run("redis://127.0.0.1:9", say=lambda _: None)
    with pytest.raises(ConfigError, match="expected a store URL"):
        demo.run("http://x", say=lambda _: None)


def test_a_wrong_attention_makes_the_demo_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    def mask_restarts(q: Tensor, k: Tensor, v: Tensor, start: int) -> Tensor:
        return exercises.CAUSAL_ATTENTION.reference(q, k, v, 0)

    model = load_model()
    model.attend = mask_restarts
    monkeypatch.setattr(demo, "load_model", lambda: model)
    said: list[str] = []
    result = demo.run(say=said.append)
    assert not result.ok and not result.tokens_equal
    assert {"Same tokens cold and warm: False", "FAILED: see the lines above"} <= set(said)
    assert "All tests completed!" not in said


@pytest.mark.parametrize(
    ("prompt", "cached", "rate"), [(1040, 1024, 1.0), (1040, 512, 0.5), (100, 64, 1.0), (40, 0, 0)]
)
def test_the_hit_rate_is_over_full_blocks(prompt: int, cached: int, rate: float) -> None:
    assert demo.hit_rate(prompt, cached, 64) == rate == exercises.HIT_RATE.reference([(prompt, cached)], 64)
