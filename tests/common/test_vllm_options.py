"""vLLM's options: each means something here or is refused with a reason, in flags, files and the environment."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from penstock.common.config import ServeConfig
from penstock.common.config_loader import load_config, options
from penstock.common.errors import ConfigError
from penstock.common.vllm_options import RENAMED, foreign_flags, foreign_option

FLAGS = (Path(__file__).parent / "vllm-0.22.1-flags.txt").read_text().split()
OURS = {option.flag for option in options(ServeConfig).values()}


def load(*argv: str, environ: dict[str, str] | None = None) -> ServeConfig:
    return load_config(ServeConfig, argv, environ or {}, prog="penstock serve")


@pytest.mark.parametrize("flag", FLAGS)
def test_no_flag_of_vllm_is_unknown(flag: str) -> None:
    assert flag in OURS or flag[2:] in RENAMED or foreign_option(flag[2:]) is not None
    with pytest.raises(ConfigError) as caught:  # whatever it is told: this is no value of any
        load("tiny", f"{flag}=no such value", "--block-size", "none", "--chat-template", "x")
    assert "unknown option" not in str(caught.value)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["-tp", "1", "-pp=1", "--enable-chunked-prefill", "--trust-remote-code"], {}),
        (["--tokenizer_mode", "auto", "--disable-log-requests", "--no-enable-expert-parallel"], {}),
        (["--dtype", "half"], {"dtype": "float16"}),
        (["--dtype=float", "--max-model-len", "8k"], {"dtype": "float32", "max_model_len": 8000}),
        (["--max-model-len", "auto", "--load-format", "safetensors"], {}),
        (["--max-model-len", "-1"], {}),
        (["--served-model-name", "a", "b", "--api-key", "k", "l,m"], {"served": ("a", "b"), "keys": ("k", "l", "m")}),
        (["--scheduling-policy", "priority", "--tokenizer", "folder"], {"tokenizer": "folder"}),
    ],
)
def test_what_asks_for_nothing_new_is_taken(argv: list[str], expected: dict[str, object]) -> None:
    names = {"served": "served_model_name", "keys": "api_key"}
    values = {names.get(name, name): value for name, value in expected.items()}
    assert load("tiny", *argv) == ServeConfig(model="tiny", **values)  # type: ignore[arg-type]
    assert load(*argv, "--port", "9", "--model", "tiny").port == 9


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["-tp", "2"], "-tp 2 is not supported: one worker uses one device"),
        (["--tensor-parallel-size=4"], "--tensor-parallel-size 4 is not supported"),
        (["-q", "awq"], "-q awq is not supported: quantised weights"),
        (["--enable-lora", "--lora-modules", "a=b"], "--enable-lora is not supported: LoRA adapters"),
        (["--no-enable-chunked-prefill"], "--no-enable-chunked-prefill is not supported: the scheduler"),
        (["-O3"], "-O3 is not supported: steps are captured"),
        (["-cc.mode", "3"], "-cc.mode 3 is not supported"),
        (["--speculative-config", '{"method": "ngram"}'], "speculative decoding"),
        (["--kv-transfer-config", "{}"], "give --prefill-workers and --decode-workers"),
        (["--tensor-paralel-size", "1"], "unknown option --tensor-paralel-size"),
    ],
)
def test_what_cannot_be_had_is_said(argv: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load("tiny", *argv)
    assert words in str(caught.value)


def test_files_and_the_environment_are_read_alike(tmp_path: Path) -> None:
    path = tmp_path / "vllm.json"
    path.write_text(json.dumps({"tensor-parallel-size": 1, "enable_chunked_prefill": True, "max-model-len": -1}))
    assert load("tiny", "--config", str(path)) == ServeConfig(model="tiny")
    path.write_text(json.dumps({"tensor-parallel-size": 2}))
    with pytest.raises(ConfigError, match=r"vllm\.json: tensor-parallel-size is not supported: one worker"):
        load("tiny", "--config", str(path))
    with pytest.raises(ConfigError, match="PENSTOCK_QUANTIZATION is not supported"):
        load("tiny", environ={"PENSTOCK_QUANTIZATION": "fp8"})
    assert load("tiny", environ={"PENSTOCK_QUANTIZATION": "none"}) == ServeConfig(model="tiny")


def test_a_key_that_is_meant_for_vllm_protects_this_server_too() -> None:
    environ = {"VLLM_API_KEY": "k", "VLLM_LOGGING_LEVEL": "DEBUG"}
    assert load("tiny", environ=environ) == ServeConfig(model="tiny", api_key=("k",), log_level="debug")
    assert load("tiny", environ={**environ, "PENSTOCK_API_KEY": "ours"}).api_key == ("ours",)
    assert load("tiny", "--api-key", "given", environ=environ).api_key == ("given",)


def test_an_option_that_penstock_has_is_its_own() -> None:
    arguments = ["m", "--tensor-parallel-size", "8", "--port", "1"]
    assert foreign_flags(arguments, ["--tensor-parallel-size"]) == (arguments, "")
    assert foreign_flags(arguments, []) == (
        ["m"],
        "--tensor-parallel-size 8 is " + _reason("tensor-parallel-size", "8"),
    )


def _reason(name: str, value: str) -> str:
    option = foreign_option(name)
    assert option is not None
    return option.refusal(value)
