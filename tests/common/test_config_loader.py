"""The configuration loader: where values come from, what is understood, and what each mistake says."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from penstock.common.config import MAX_WORKER_ID, RouterConfig, ServeConfig, WorkerConfig
from penstock.common.config_loader import explicit_values, load_config, options, parse_size, redact_url, redacted
from penstock.common.errors import ConfigError
from penstock.common.peers import wire_identity


def load(*argv: str, environ: dict[str, str] | None = None, fixed: dict[str, object] | None = None) -> ServeConfig:
    return load_config(ServeConfig, argv, environ or {}, prog="penstock serve", fixed=fixed)


def mistake(*argv: str, environ: dict[str, str] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load(*argv, environ=environ)
    message = str(caught.value)
    assert "\n" not in message
    return message


def file_with(tmp_path: Path, content: object, name: str = "fleet.yaml") -> str:
    path = tmp_path / name
    path.write_text(json.dumps(content) if name.endswith(".json") else yaml.safe_dump(content))
    return str(path)


def test_defaults_are_those_of_the_dataclass() -> None:
    assert load() == ServeConfig()


@pytest.mark.parametrize(
    "argv",
    [
        ("tiny", "--port", "1", "--no-enable-prefix-caching"),
        ("--port", "1", "tiny", "--no-enable-prefix-caching"),
        ("--no-enable-prefix-caching", "--port=1", "tiny"),
        ("--model", "tiny", "--port", "1", "--no_enable_prefix_caching"),
    ],
)
def test_model_may_stand_anywhere(argv: tuple[str, ...]) -> None:
    assert load(*argv) == ServeConfig(model="tiny", port=1, enable_prefix_caching=False)


def test_flags_beat_environment_beats_file(tmp_path: Path) -> None:
    path = file_with(tmp_path, {"port": 1, "host": "file", "max-num-seqs": 3})
    config = load("--config", path, "--port", "3", environ={"PENSTOCK_PORT": "2", "PENSTOCK_HOST": "environment"})
    assert (config.port, config.host, config.max_num_seqs) == (3, "environment", 3)


def test_file_can_be_named_by_the_environment(tmp_path: Path) -> None:
    assert load(environ={"PENSTOCK_CONFIG": file_with(tmp_path, {"port": 7})}).port == 7


@pytest.mark.parametrize("name", ["fleet.yaml", "fleet.yml", "fleet.json"])
def test_file_types(tmp_path: Path, name: str) -> None:
    content = {
        "model": "tiny",
        "max_model_len": "32K",
        "kv_cache_memory_bytes": 1024,
        "lease_s": 5,
        "prefill_workers": 2,
        "prefill_devices": [0, 1],
        "decode_devices": 2,
        "served_model_name": "a, b",
        "enable_prefix_caching": False,
    }
    config = load("--config", file_with(tmp_path, content, name))
    assert config.max_model_len == 32768
    assert config.kv_cache_memory_bytes == 1024
    assert config.lease_s == 5.0
    assert isinstance(config.lease_s, float)
    assert config.prefill_devices == ("0", "1")
    assert config.decode_devices == ("2",)
    assert config.served_model_name == ("a", "b")
    assert config.enable_prefix_caching is False


def test_json_on_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO('{"port": 9, "max_model_len": null}'))
    assert load("--config", "-") == ServeConfig(port=9)


def test_lists_repeat_or_use_commas() -> None:
    assert load("--api-key", "a", "--api-key", "b,c").api_key == ("a", "b", "c")
    assert load(environ={"PENSTOCK_API_KEY": "a,b"}).api_key == ("a", "b")


def test_an_option_may_have_vllms_name(tmp_path: Path) -> None:
    for flag in (("--router-procs", "3"), ("--api-server-count=3",), ("--api_server_count", "3"), ("-asc", "3")):
        assert load("m", *flag).router_procs == 3
    assert load("m", environ={"PENSTOCK_API_SERVER_COUNT": "3"}).router_procs == 3
    assert load("m", "--config", file_with(tmp_path, {"api-server-count": 3})).router_procs == 3


@pytest.mark.parametrize("word, value", [("1", True), ("no", False), ("TRUE", True), ("off", False)])
def test_switches_in_the_environment(word: str, value: bool) -> None:
    assert load(environ={"PENSTOCK_ENABLE_PREFIX_CACHING": word}).enable_prefix_caching is value


def test_empty_variables_are_unset() -> None:
    assert load(environ={"PENSTOCK_API_KEY": "", "PENSTOCK_PORT": ""}) == ServeConfig()


def test_variables_of_a_kubernetes_service_are_passed_over() -> None:
    environ = {
        "PENSTOCK_PORT": "tcp://10.0.0.1:8000",
        "PENSTOCK_SERVICE_HOST": "10.0.0.1",
        "PENSTOCK_SERVICE_PORT_HTTP": "8000",
        "PENSTOCK_PORT_8000_TCP_ADDR": "10.0.0.1",
        "PENSTOCK_ROUTER_SERVICE_PORT": "8000",
        "PENSTOCK_ROUTER_PORT": "tcp://10.0.0.2:8000",
    }
    assert load(environ=environ) == ServeConfig()


def test_variables_of_the_compose_files_are_passed_over() -> None:
    texts = [path.read_text() for path in (Path(__file__).parents[2] / "compose").glob("*.yaml")]
    names = set(re.findall(r"\$\{(PENSTOCK_\w+)", "".join(texts)))
    assert len(names) > 5
    load(environ=dict.fromkeys(names - {"PENSTOCK_LOG_LEVEL"}, "127.0.0.1:80"))


@pytest.mark.parametrize("empty", ["", ",", " , "])
def test_a_list_that_is_given_is_not_empty(tmp_path: Path, empty: str) -> None:
    """A key that a shell or a template has lost must not open a server to all."""
    assert mistake("--api-key", empty) == "--api-key: it is empty: leave it out if there is none"
    assert "it is empty" in mistake("--config", file_with(tmp_path, {"api_key": empty}))
    assert "it is empty" in mistake("--config", file_with(tmp_path, {"api_key": ["", " "]}))
    if empty:
        assert "it is empty" in mistake(environ={"PENSTOCK_API_KEY": empty})
    assert load("--config", file_with(tmp_path, {"api_key": []})).api_key == ()
    assert load("--api-key", empty, "a").api_key == ("a",)


@pytest.mark.parametrize(
    "text, size",
    [
        ("7", 7),
        ("1k", 1000),
        ("1K", 1024),
        ("25.6k", 25600),
        ("1.5K", 1536),
        ("4GiB", 4 * 1024**3),
        ("512MB", 512 * 10**6),
        ("2G", 2 * 1024**3),
        ("1 TiB", 1024**4),
        ("10B", 10),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size
    assert load("--kv-cache-memory-bytes", text).kv_cache_memory_bytes == size


@pytest.mark.parametrize("text", ["", "k", "1.5", "1.0001k", "-1k", "4Gb", "1e3", "4 GiBs"])
def test_what_is_not_a_size(text: str) -> None:
    with pytest.raises(ValueError):
        parse_size(text)


@given(st.integers(0, 10**15))
def test_plain_digits_are_themselves(size: int) -> None:
    assert parse_size(str(size)) == size


def test_unknown_things_are_named_with_the_nearest_known(tmp_path: Path) -> None:
    assert mistake("--prot", "1") == "unknown option --prot; did you mean --port?"
    environ = {"PENSTOCK_MAX_MODEL_LENGTH": "1"}
    assert mistake("--bogus", "1") == "unknown option --bogus", "two dashes make nothing alike"
    assert "PENSTOCK_MAX_MODEL_LENGTH; did you mean PENSTOCK_MAX_MODEL_LEN?" in mistake(environ=environ)
    assert "fleet.yaml: unknown option max_seqs" in mistake("--config", file_with(tmp_path, {"max_seqs": 1}))
    assert "unexpected argument 'two'" in mistake("one", "two")
    assert "--port" in mistake("tiny", "--port")


def test_what_other_processes_know_is_passed_over(tmp_path: Path) -> None:
    path = file_with(tmp_path, {"block_size": 4, "port": 9})
    config = load_config(RouterConfig, ["--config", path], {"PENSTOCK_PREFILL_WORKERS": "2"}, prog="penstock router")
    assert config == RouterConfig(port=9)


@pytest.mark.parametrize(
    "argv, words",
    [
        (("--port", "x"), "--port: expected a whole number, got 'x'"),
        (("--lease-s", "soon"), "--lease-s: expected a number"),
        (("--dtype", "int3"), "--dtype: must be one of auto, float32"),
        (("--max-model-len", "1.5"), "or a size such as 4GiB"),
        (("--block-size", "0"), "block_size must be at least 1"),
        (("--port", "65536"), "port must be from 0 to 65535, got 65536"),
        (("--lease-s", "-1"), "lease_s must be at least 0.1, got -1"),
        (("--lease-s", "1e-9"), "lease_s must be at least 0.1, got 1e-09"),
        (("--lease-s", "inf"), "lease_s must be from 0.1 to 1e+09, got inf"),
        (("--response-ttl-s", "inf"), "response_ttl_s must be from 0 to 1e+09, got inf"),
        (("--drain-s", "nan"), "drain_s must be at least 0, got nan"),
        (("--slo-ttft", "nan"), "slo_ttft must be from 0 to 1e+12, got nan"),
        (("--max-model-len", "1"), "max_model_len must be at least 2, got 1"),
        (("--max-num-seqs", str(2**63)), "max_num_seqs must be from 1 to 9.22337e+18, got 9223372036854775808"),
        (("--kv-cache-memory-bytes", "900T"), "kv_cache_memory_bytes must be from 0 to 1.40737e+14, got "),
        (("--cpu-threads", "1000000"), "cpu_threads must be from 0 to 1024, got 1000000"),
        (("--device", "cpu:1"), "device must be auto, cpu, cuda or cuda:N, got 'cpu:1'"),
        (("--admin-port", "65535", "--router-procs", "2"), "admin_port 65535 leaves no 2 ports up to 65535"),
        (("--redis-url", "http://:secret@x"), "redis_url must be redis://HOST:PORT"),
        (("--redis-url", "redis://:secret@x:port"), "redis_url must be redis://HOST:PORT"),
        (("--redis-url", "redis://x/0?socket_timeout=abc"), "redis_url has options that cannot be: Invalid value for"),
        (("--redis-url", "redis://:secret@x?colour=red"), "got an unexpected keyword argument 'colour'"),
        (("--redis-url", "rediss://:secret@x?ssl_cert_reqs=perhaps"), "Invalid SSL Certificate Requirements Flag"),
        (("--prefill-devices", "0"), "prefill_devices names 1 devices for prefill_workers=0"),
        (("--gpu-memory-utilization", "0.5", "--kv-cache-memory-bytes", "1G"), "exclude each other"),
    ],
)
def test_wrong_flags(argv: tuple[str, ...], words: str) -> None:
    assert words in mistake(*argv)


@pytest.mark.parametrize(
    "content, words",
    [
        ({"port": "8000"}, "fleet.yaml: port: expected a whole number, got '8000'"),
        ({"port": True}, "expected a whole number"),
        ({"enable_prefix_caching": "yes"}, "expected true or false"),
        ({"host": 1}, "expected text"),
        ({"served_model_name": [1.5]}, "expected a list of texts"),
        ({"port": None}, "expected a whole number"),
        ({"dtype": "int3"}, "must be one of"),
        (["port"], "name: value"),
    ],
)
def test_wrong_values_in_a_file(tmp_path: Path, content: object, words: str) -> None:
    assert words in mistake("--config", file_with(tmp_path, content))


def test_unreadable_files(tmp_path: Path) -> None:
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1\nb: 2")
    assert "not valid YAML" in mistake("--config", str(broken))
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    assert "not valid JSON" in mistake("--config", str(broken))
    assert "cannot read" in mistake("--config", str(tmp_path / "absent.yaml"))
    assert "cannot read" in mistake("--config", "a\0b.yaml")
    broken = tmp_path / "fleet.ini"
    broken.write_text("")
    assert "ends in .yaml, .yml or .json" in mistake("--config", str(broken))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("deep.json", "[" * 100_000),
        ("deep.yaml", "[" * 5_000),
        ("date.yaml", "a: 2024-99-99"),
        ("tag.yaml", "a: !!int x"),
        ("tag.yaml", "a: !!int ''"),
        ("tag.yaml", "a: !!bool x"),
        ("tag.yaml", "a: !!timestamp x"),
        ("key.yaml", "? [a]\n: b"),
        ("long.json", '{"lease_s": 1' + "0" * 5_000 + "}"),
        ("large.json", '{"lease_s": 1' + "0" * 400 + "}"),
    ],
)
def test_files_whose_values_cannot_be(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    assert f"{name} is not valid " in (told := mistake("--config", str(tmp_path / name))) or "beyond all bounds" in told


def test_standard_input_may_be_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    assert "- is not valid JSON" in mistake("--config", "-")


def test_wrong_environment() -> None:
    assert "PENSTOCK_PORT: expected a whole number" in mistake(environ={"PENSTOCK_PORT": "x"})
    assert "expected true or false" in mistake(environ={"PENSTOCK_ENABLE_PREFIX_CACHING": "maybe"})


def test_what_is_explicit_survives_the_way_to_a_child(monkeypatch: pytest.MonkeyPatch) -> None:
    config = WorkerConfig(role="prefill", model="tiny", served_model_name=("a", "b"), kv_cache_memory_bytes=1 << 30)
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(explicit_values(config))))
    loaded = load_config(WorkerConfig, ["--config", "-"], {}, prog="penstock prefill", fixed={"role": "prefill"})
    assert loaded == config


SECRETS = ServeConfig(
    api_key=("sk-first", "sk-second"), cluster_key="ck-secret", redis_url="redis://me:pw-secret@db:6379/0"
)


def test_secrets_are_not_shown() -> None:
    for shown in (repr(SECRETS), str(redacted(SECRETS))):
        assert not any(secret in shown for secret in ("sk-first", "sk-second", "ck-secret", "pw-secret"))
    assert redacted(SECRETS)["api_key"] == ("***", "***")
    assert redacted(SECRETS)["redis_url"] == "redis://me:***@db:6379/0"
    assert redacted(ServeConfig())["cluster_key"] == ""


def test_mistakes_do_not_show_secrets(tmp_path: Path) -> None:
    assert "7.25" not in mistake("--config", file_with(tmp_path, {"api_key": 7.25}))


@pytest.mark.parametrize(
    "url, shown",
    [
        ("redis://localhost:6379", "redis://localhost:6379"),
        ("rediss://:pw@[::1]:6379/2?x=1", "rediss://:***@[::1]:6379/2?x=1"),
        ("unix://:p%40w@/run/redis.sock", "unix://:***@/run/redis.sock"),
    ],
)
def test_redact_url(url: str, shown: str) -> None:
    assert redact_url(url) == shown


def test_help_lists_every_option_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        load("--help")
    assert caught.value.code == 0
    text = capsys.readouterr().out
    flags = [option.flag for option in options(ServeConfig).values() if not option.field.metadata.get("positional")]
    assert all(flag in text for flag in flags)
    assert "MODEL" in text
    assert "--no-enable-prefix-caching" in text
    assert "(default: 8000)" in text
    assert "SUPPRESS" not in text


def test_import_is_cheap() -> None:
    program = "import sys, penstock.common.config_loader; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "yaml", "redis", "zmq", "starlette", "tqdm", "asyncio"} & set(loaded)


def test_the_tokenizer_reaches_the_workers_whose_grammars_need_it() -> None:
    config = load("tiny", "--tokenizer", "elsewhere")
    workers = [config.worker(role, "w", "cpu", 1.0, 1) for role in ("prefill", "decode")]
    assert [one.tokenizer for one in (config.router(), *workers)] == ["elsewhere"] * 3


def test_the_name_of_a_worker_fits_into_an_identity() -> None:
    name = "w" * MAX_WORKER_ID
    identity = wire_identity(f"{name}-{'0' * 12}", 1 << 40)
    assert WorkerConfig(model="m", worker_id=name).worker_id == name and len(identity) < 256
    with pytest.raises(ConfigError, match="worker_id may have 200 bytes at most"):
        WorkerConfig(model="m", worker_id="ü" * 101)
