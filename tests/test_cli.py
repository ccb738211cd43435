"""The dspark command: options read as meant, errors that name the option, the value, the remedy."""

from __future__ import annotations

import json

import pytest
import typer
from typer.testing import CliRunner

from dspark_compile.cli import _write, app, parse_options
from dspark_compile.diagnostics import CompileReport


def run(*args: str):
    return CliRunner().invoke(app, args, env={"COLUMNS": "400", "NO_COLOR": "1"})


def test_options_are_read():
    items = ["kv_cache=int8", "verify=True", "merge_linears=false", "disable=['a', 'b']", "x=a=b"]
    assert parse_options(items) == {
        "kv_cache": "int8",
        "verify": True,
        "merge_linears": False,
        "disable": ["a", "b"],
        "x": "a=b",
    }


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (["kv_cache"], "'kv_cache' is not name=value"),
        (["=int8"], "'=int8' is not name=value"),
        (["a=1", "a=2"], "'a' is given twice"),
    ],
)
def test_malformed_options(items, message):
    with pytest.raises(typer.BadParameter, match=message):
        parse_options(items)


def test_unknown_option_lists_the_legal_ones():
    result = run("explain", ".", "--options", "kv_cash=int8")
    assert result.exit_code == 2
    assert "unknown option 'kv_cash'" in result.output
    assert "kv_cache" in result.output


@pytest.mark.parametrize("what", ["is not a folder", "has no config.json"])
def test_a_path_without_a_model(tmp_path, what):
    path = tmp_path / "nope" if what == "is not a folder" else tmp_path
    result = run("explain", str(path))
    assert result.exit_code == 2
    assert what in result.output
    assert "Hugging Face format" in result.output


def test_env_prints_json():
    result = run("env")
    assert result.exit_code == 0
    assert json.loads(result.output)["dspark"]


def test_env_calibrates_and_keeps_it(tmp_path, monkeypatch):
    from dspark_compile.codegen import calibrate, machine

    monkeypatch.setenv("DSPARK_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(calibrate, "calibrate", lambda m, progress: {"memory": 1.25})
    monkeypatch.setattr(machine, "busy", lambda: True)
    result = run("env", "--calibrate")
    assert result.exit_code == 0 and "calibrate again" in result.stderr
    assert json.loads(result.stdout)["machine"]["factors"] == {"memory": 1.25}
    again = run("env")
    assert json.loads(again.stdout)["machine"]["factors"] == {"memory": 1.25}

    def broken(m, progress):
        raise RuntimeError("no compiler: install g++")

    monkeypatch.setattr(calibrate, "calibrate", broken)
    assert run("env", "--calibrate").exit_code == 2
    machine._known.cache_clear()


def test_a_report_that_cannot_be_written(tmp_path):
    with pytest.raises(typer.BadParameter, match=r"cannot write .*give a path in a folder"):
        _write(CompileReport().to_json, tmp_path / "nope" / "r.json", "--json")
    _write(CompileReport().to_json, None, "--json")
