"""A secret in a URL is refused where it is given, and stands nowhere else: not in errors, logs, records or pages.

A URL is a line of tests/secret_urls.yaml.
"""

import base64
import json
import logging
from pathlib import Path

import fsspec.config
import pytest
import yaml

from megadistill import logs
from megadistill.cli.main import run_command
from megadistill.config.load import load_recipe, validate_recipe
from megadistill.data import Manifest
from megadistill.data.storage.remote import RemoteFolder
from megadistill.errors import UserError
from megadistill.events import EventLog
from megadistill.redaction import (
    command_line,
    printable_line,
    redact,
    redact_url,
    redacted,
    url_secret,
    without_secrets,
)
from tests.paths import RECIPES, ROOT
from tests.unit.data.servers import Handler, serving

URLS = yaml.safe_load((ROOT / "tests/secret_urls.yaml").read_text(encoding="utf-8"))


@pytest.mark.parametrize(("url", "secret"), URLS["secret"])
def test_a_secret_is_recognised_and_hidden(url: str, secret: str) -> None:
    assert url_secret(url) is not None
    for hidden in (
        without_secrets(f"no '{url}' here"),
        redact_url(url),
        redact(f"403 for {url}, message"),
        printable_line(f"--data {url}: no such file"),
        " ".join(command_line(["megadistill", "evaluate", "--data", url, "--set", f"data.manifest={url}"])),
        json.dumps(redacted({"a": [{"b": url}], "c": 1})),
    ):
        assert secret not in hidden, hidden


@pytest.mark.parametrize("url", URLS["plain"])
def test_what_has_no_secret_stays(url: str) -> None:
    assert url_secret(url) is None
    recipe = load_recipe(RECIPES / "smoke.yaml", [f"data.manifest={url}"])
    assert recipe.snapshot()["data"]["manifest"] == recipe.data.manifest == url
    if "sk-" not in url:  # which has the form of a key, and stays in records alone
        assert without_secrets(url) == url
        assert redact_url(url) == url.partition("?")[0]


@pytest.mark.parametrize(("url", "secret"), URLS["secret"])
@pytest.mark.parametrize("key", ["data.manifest", "teacher.path", "run.folder", "data.sources", "student.config"])
def test_a_recipe_with_a_secret_is_refused(
    url: str, secret: str, key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = {"data.sources": f"{{a: '{url}'}}", "student.config": f"{{model_type: llama, name: '{url}'}}"}
    (tmp_path / "x.yaml").write_text(f"extends: {RECIPES / 'smoke.yaml'}\n{_nested(key, values.get(key, repr(url)))}")
    assert run_command(["train", str(tmp_path / "x.yaml")]) == 2
    error = capsys.readouterr().err
    assert secret not in error, error
    assert "has a" in error
    assert "to fsspec" in error
    assert "line 2" in error


def _nested(key: str, value: str) -> str:
    section, _, name = key.partition(".")
    return f"{section}: {{{name}: {value}}}\n"


@pytest.mark.parametrize(("url", "secret"), URLS["secret"])
def test_a_location_with_a_secret_is_refused(url: str, secret: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError) as caught:
        Manifest.load(url)
    assert secret not in str(caught.value)
    assert "the secret to fsspec" in str(caught.value)
    assert run_command(["shards", "info", url]) == 2
    assert secret not in capsys.readouterr().err


@pytest.mark.parametrize(("url", "secret"), URLS["secret"])
def test_records_of_an_older_run_are_read_and_redacted(url: str, secret: str, tmp_path: Path) -> None:
    """recipe.json of a run that began when such URLs were taken: its checkpoints can still be exported."""
    values = load_recipe(RECIPES / "smoke.yaml").snapshot()
    values["data"]["manifest"] = url
    recipe = validate_recipe(values, source="recipe.json")
    assert recipe.data.manifest == url, "what the run reads"
    assert secret not in json.dumps(recipe.snapshot()), "what is recorded"
    assert recipe.snapshot() == validate_recipe(recipe.snapshot(), source="again").snapshot()
    log = EventLog(tmp_path, 1, writes=True)
    log.write("recipe_changed", step=1, changes={"data.manifest": [url, "b"]})
    written = (tmp_path / "events.jsonl").read_text()
    assert "data.manifest" in written
    assert secret not in written


def test_errors_and_logs_of_libraries_have_no_secret(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(options: object) -> None:
        logging.getLogger("fsspec.http").warning("GET %s", "https://me:pa55word@host/x?sig=5igned")
        raise RuntimeError("403, message='Forbidden', url='https://me:pa55word@host/x?sig=5igned'")

    monkeypatch.setattr("megadistill.cli.plan._config_keys", fail)
    caught: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: caught.append(record.getMessage())  # type: ignore[method-assign]
    former, factory = logs.PACKAGE.handlers[:], logging.getLogRecordFactory()
    logging.getLogger("fsspec").addHandler(handler)
    try:
        assert run_command(["config-keys"]) == 4
    finally:
        logging.getLogger("fsspec").removeHandler(handler)
        logs.PACKAGE.handlers[:] = former
        logging.setLogRecordFactory(factory)
    printed = capsys.readouterr()
    everything = printed.out + printed.err + "".join(caught)
    assert "Forbidden" in everything
    assert "GET https://***@host/x?***" in everything
    assert "pa55word" not in everything
    assert "5igned" not in everything


def test_the_way_out_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The example of docs/data.md: a password in fsspec's environment, not in the URL."""
    (tmp_path / "manifest.json").write_text("{}")
    password = f"Basic {base64.b64encode(b'me:pa55word').decode()}"
    conf: dict[str, dict[str, object]] = {}
    fsspec.config.set_conf_env(conf, {"FSSPEC_HTTP": json.dumps({"headers": {"Authorization": password}})})
    monkeypatch.setitem(fsspec.config.conf, "http", conf["http"])

    def refuses(handler: Handler, data: bytes) -> bool:
        if handler.headers.get("Authorization") == password:
            return False
        handler.send_error(401)
        return True

    with serving(tmp_path) as server:
        server.always = refuses
        assert RemoteFolder(server.url).read_whole("manifest.json", max_bytes=10) == b"{}"
        monkeypatch.delitem(fsspec.config.conf, "http")
        with pytest.raises(OSError, match="401"):
            RemoteFolder(f"{server.url}/").open("manifest.json")
