"""`m0kit serve`: what it takes from flags, the environment and a file, and what it says of what it does not take."""

import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_type_hints

import click
import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from m0kit.cli.commands import main
from m0kit.cli.serve import serve, settings_of, to_toml
from m0kit.errors import M0kitError
from m0kit.opening import GPU_VARIABLE
from m0kit.server.settings import ModelSettings, Settings

MEBI = 1 << 20
OF_SERVER = [field.name for field in fields(Settings) if field.name != "models"]
OF_MODEL = [field.name for field in fields(ModelSettings)]
OPTIONS = {param.name: param for param in serve.params if isinstance(param, click.Option)}
# field → its option, where that is not the field's own name
CALLED = {
    "names": "served_model_name",
    "allowed_hosts": "allowed_host",
    "image_hosts": "image_host",
    "max_body_bytes": "max_body",
    "max_held_bytes": "max_held",
    "request_timeout_s": "request_timeout",
    "read_timeout_s": "read_timeout",
    "keep_alive_s": "keep_alive",
    "queue_s": "queue_seconds",
    "shutdown_timeout_s": "shutdown_timeout",
}
SIZES = {name for name in (*OF_SERVER, *OF_MODEL) if name.endswith("_bytes")}
# One value of each field but names and index, as a word of the command line, and what that is.
GIVEN: dict[str, tuple[str, Any]] = {
    "revision": ("v2", "v2"),
    "device": ("cuda:1", "cuda:1"),
    "threads": ("3", 3),
    "memory": ("low", "low"),
    "max_pixels": ("5000", 5000),
    "cache_bytes": ("0", 0),
    "kv": ("int8", "int8"),
    "gpu_bytes": ("8G", 8 << 30),
    "pool_bytes": ("500M", 500 * MEBI),
    "host": ("::1", "::1"),
    "port": ("0", 0),
    "uds": ("run/m0kit.sock", Path("run/m0kit.sock")),
    "api_key_file": ("keys.txt", Path("keys.txt")),
    "without_keys": ("", True),
    "allowed_hosts": ("rerank.example", ("rerank.example",)),
    "image_hosts": ("images.example", ("images.example",)),
    "root_path": ("/m0", "/m0"),
    "tls_cert": ("cert.pem", Path("cert.pem")),
    "tls_key": ("key.pem", Path("key.pem")),
    "max_body_bytes": ("1K", 1024),
    "max_documents": ("7", 7),
    "max_images": ("0", 0),
    "max_image_bytes": ("1.5M", 3 * MEBI // 2),
    "max_image_pixels": ("100", 100),
    "max_request_pixels": ("200", 200),
    "max_request_tokens": ("300", 300),
    "request_timeout_s": ("1.5", 1.5),
    "read_timeout_s": ("2", 2.0),
    "keep_alive_s": ("3", 3.0),
    "max_connections": ("4", 4),
    "max_held_bytes": ("5", 5),
    "queue_s": ("6", 6.0),
    "shutdown_timeout_s": ("7", 7.0),
    "workers": ("2", 2),
    "warm": ("", True),
    "page": ("", True),
    "log_format": ("json", "json"),
    "log_level": ("debug", "debug"),
}
# Other values where any text or number will not do.
OTHERS = {
    "memory": ("fast", "low"),
    "kv": ("fp32", "fp16"),
    "log_format": ("text", "json"),
    "log_level": ("error", "warning"),
    "device": ("cuda:5", "cuda:6"),
    "host": ("127.0.0.9", "127.0.0.8"),
}
OPPOSITES = {"without_keys": "--with-keys", "warm": "--no-warm", "page": "--no-page"}
# What has to be said with them, or they are refused.
WITH = {
    "gpu_bytes": ["--device", "cuda"],
    "pool_bytes": ["--device", "cuda"],
    "tls_cert": ["--tls-key", "key.pem"],
    "tls_key": ["--tls-cert", "cert.pem"],
}


def parsed(*args: object) -> Settings:
    """What the command would serve with. Raises click.UsageError."""
    with serve.make_context("serve", [str(arg) for arg in args], auto_envvar_prefix="M0KIT_SERVE") as ctx:
        return settings_of(ctx)


def one(settings: Settings, field: str) -> Any:
    return getattr(settings if field in OF_SERVER else settings.models[0], field)


def flag(field: str) -> str:
    return "--" + CALLED.get(field, field).replace("_", "-")


def refused(*args: object) -> str:
    with pytest.raises(click.UsageError) as error:
        parsed(*args)
    return error.value.format_message()


@pytest.fixture
def config(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        (tmp_path / "m0kit.toml").write_text(text, "utf-8")
        return tmp_path / "m0kit.toml"

    return write


# --- every field ---------------------------------------------------------------------------------------------


def test_every_field_has_an_option_with_help_its_own_default_and_none_is_left_over() -> None:
    wanted = {CALLED.get(name, name) for name in (*OF_SERVER, *OF_MODEL)} - {"artifact"}
    assert set(OPTIONS) == wanted | {"config", "print_config"}
    assert set(GIVEN) == set(OF_SERVER) | set(OF_MODEL) - {"artifact", "names", "index"}
    for option in OPTIONS.values():
        assert len(option.help or "") > 5, option.name
    assert parsed("a") == Settings((ModelSettings("a"),))


@pytest.mark.parametrize("field", GIVEN)
def test_a_flag_wins_over_the_environment_over_the_file_over_the_default(
    field: str, config: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(GPU_VARIABLE, "1G")  # so that several engines may share a GPU
    word, value = GIVEN[field]
    name, kind, extra = flag(field), type(value), WITH.get(field, [])
    given, told = [name, word], value
    if kind is bool:
        in_file, in_variable, given, told = False, True, [OPPOSITES[field]], False
    elif field in OTHERS:
        in_file, in_variable = OTHERS[field]
    else:
        in_file, in_variable = (91, 92) if kind in (int, float) else ("other", "another")
    is_many = kind is tuple
    file = config(f"{name[2:]} = {json.dumps([in_file] if is_many else in_file)}\n")

    def found(*args: object) -> Any:
        result = one(parsed("a", *extra, "--config", file, *args), field)
        assert type(result) is type(value) or kind.__module__.startswith("pathlib")
        return result

    def of(one: Any) -> Any:
        return (one,) if is_many else kind(one)

    assert found() == of(in_file)
    assert found(*given) == told
    monkeypatch.setenv(f"M0KIT_SERVE_{name[2:].replace('-', '_').upper()}", str(in_variable))
    assert found() == of(in_variable)
    assert found(*given) == told


def test_the_artifacts_and_the_file_are_found_in_the_environment_too(
    config: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("M0KIT_SERVE_ARTIFACTS", "a m=b")
    monkeypatch.setenv("M0KIT_SERVE_CONFIG", str(config("port = 1\n")))
    monkeypatch.setenv("M0KIT_SERVE_ALLOWED_HOST", "one.example two.example")
    settings = parsed()
    assert [(model.artifact, model.names) for model in settings.models] == [("a", ()), ("b", ("m",))]
    assert (settings.port, settings.allowed_hosts) == (1, ("one.example", "two.example"))
    assert parsed("c", "--port", 2).models[0].artifact == "c"


# --- printing ------------------------------------------------------------------------------------------------

TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=12)
WORD = st.from_regex(r"[A-Za-z0-9_.-]{1,12}", fullmatch=True)
PATHS = TEXT.map(Path)
NUMBERS = st.integers(1, 2**63 - 1)
OWN: dict[str, st.SearchStrategy[Any]] = {
    "artifact": TEXT.filter(str.strip),
    "names": st.just(()),  # given below, so that they differ
    "device": st.sampled_from(["cpu", "cuda:1", "cuda:0,cuda:1", "SomeExecutionProvider"]),
    "threads": st.none() | st.integers(1, 1024),
    "port": st.integers(0, 65535),
    "workers": st.integers(1, 64),
    "image_hosts": st.sets(
        st.sampled_from(["a.example", "b.example:8443", "c.example=10.1.2.0/24"]).map(str), max_size=3
    ).map(lambda hosts: tuple(sorted(hosts))),
    "revision": st.none() | TEXT,
}


def strategy(name: str, kind: Any) -> st.SearchStrategy[Any]:
    if name in OWN:
        return OWN[name]
    if kind is int:
        return NUMBERS
    if kind is float:
        return st.floats(0.001, 1e6)
    if kind == int | None:
        return st.none() | NUMBERS
    if kind == Path | None:
        return st.none() | PATHS
    if kind is str:
        return TEXT
    if kind == tuple[str, ...]:
        return st.lists(TEXT, max_size=3).map(tuple)
    return st.from_type(kind)


def drawn(draw: st.DrawFn, kind: type[Any]) -> dict[str, Any]:
    hints = get_type_hints(kind)
    return {
        field.name: draw(strategy(field.name, hints[field.name])) for field in fields(kind) if field.name != "models"
    }


@st.composite
def all_settings(draw: st.DrawFn) -> Settings:
    models = []
    for number in range(draw(st.integers(1, 3))):
        found = drawn(draw, ModelSettings)
        if "cuda" not in found["device"]:
            found |= {"gpu_bytes": None, "pool_bytes": None}
        else:
            found["gpu_bytes"] = found["gpu_bytes"] or 1
        names = draw(st.lists(TEXT, max_size=2, unique=True))
        models.append(ModelSettings(**found | {"names": (f"m{number}", *(f"{name}{number}" for name in names))}))
    if len(models) > 1:
        models = [replace(model, revision=None) for model in models]
    found = drawn(draw, Settings)
    found |= {"uds": None} if found["tls_cert"] and found["tls_key"] else {"tls_cert": None, "tls_key": None}
    found["without_keys"] = found["without_keys"] or (found["uds"] is None and found["api_key_file"] is None)
    return Settings(tuple(models), **found)


@given(settings=all_settings())
def test_what_is_printed_gives_the_same_settings_again(
    settings: Settings, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.getbasetemp() / "printed.toml"
    file.write_text("".join(f"{line}\n" for line in to_toml(settings)), "utf-8")
    assert parsed("--config", file) == settings
    done = CliRunner().invoke(serve, ["--config", str(file), "--print-config"])
    assert done.exit_code == 0, done.output
    printed = done.output.encode()
    assert tomllib.loads(printed.decode()) == tomllib.loads(file.read_text("utf-8"))
    file.write_bytes(printed)
    assert parsed("--config", file) == settings


def test_a_name_that_no_file_can_hold_is_said() -> None:
    settings = Settings((ModelSettings(os.fsdecode(b"m\xff")),))
    with pytest.raises(M0kitError, match=r"is not Unicode, so no file of TOML can name it"):
        to_toml(settings)


def test_what_is_printed_is_the_whole_and_every_size_is_readable() -> None:
    printed = tomllib.loads(CliRunner().invoke(serve, ["a", "--print-config", "--max-body", "1023"]).output)
    (model,) = printed.pop("models")
    unset = {"uds", "api_key_file", "allowed_hosts", "image_hosts", "tls_cert", "tls_key"}
    assert set(printed) == {flag(name)[2:] for name in OF_SERVER if name not in unset}
    assert (printed["max-body"], printed["max-held"], model["cache-bytes"]) == (1023, "512M", "1G")


# --- several artifacts ---------------------------------------------------------------------------------------


def test_several_artifacts_by_names_aliases_and_an_index_each(tmp_path: Path) -> None:
    (tmp_path / "a=b").mkdir()
    settings = parsed("pages,p=x", "org/name@v2", tmp_path / "a=b", "--index", "org/name=lib")
    assert [(model.artifact, model.called) for model in settings.models] == [
        ("x", ("pages", "p")), ("org/name@v2", ("org/name",)), (str(tmp_path / "a=b"), ("a=b",)),
    ]  # fmt: skip


def test_indexes_go_to_the_first_or_the_named_artifact() -> None:
    settings = parsed("pages,p=x", "texts=y", "--index", "lib", "--index", "texts=lib2")
    assert [model.index for model in settings.models] == [Path("lib"), Path("lib2")]
    assert [model.index for model in parsed("pages,p=x", "--index", "p=lib").models] == [Path("lib")]
    assert "expected one folder for pages" in refused("pages=x", "--index", "a", "--index", "pages=b")
    message = refused("pages=x", "texts=y", "--index", "page=lib")
    assert message == "--index page=lib: no artifact is called 'page'. There are: pages, texts."


def test_names_that_do_not_fit_are_named() -> None:
    assert "two artifacts are called 'm'" in refused("m=x", "m=y")
    assert "expected ARTIFACT, NAME=ARTIFACT or NAME,ALIAS=ARTIFACT" in refused("m,=x")
    assert "expected ARTIFACT, NAME=ARTIFACT or NAME,ALIAS=ARTIFACT" in refused("m=")
    assert "has a NAME= already" in refused("m=x", "--served-model-name", "n")
    assert parsed("x", "--served-model-name", "m", "--served-model-name", "n").models[0].names == ("m", "n")
    assert "Of several it stands behind each: organisation/name@v2" in refused("a/b", "c/d", "--revision", "v1")
    assert "Give an ARTIFACT, or a --config with [[models]]" in refused()


def test_a_flag_is_of_all_artifacts_and_a_table_of_its_own(config: Callable[[str], Path]) -> None:
    file = config(
        'memory = "low"\n[[models]]\nartifact = "x"\nnames = ["one", "two"]\nindex = "lib"\nthreads = 2\n'
        '[[models]]\nartifact = "y"\nmemory = "fast"\ncache-bytes = "2M"\n'
    )
    first, second = parsed("--config", file).models
    assert first == ModelSettings("x", ("one", "two"), Path("lib"), threads=2, memory="low")
    assert second == ModelSettings("y", cache_bytes=2 * MEBI)
    assert [model.threads for model in parsed("--config", file, "--threads", 5).models] == [5, 5]
    assert [model.artifact for model in parsed("z", "--config", file).models] == ["z"]


# --- what is refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prt = 1", "'prt' is not known (did you mean port?). Keys are called as the options of"),
        ("max_body = 1", "'max_body' is not known (did you mean max-body?)"),
        ("zzzzzz = 1", "'zzzzzz' is not known. Keys"),
        ("model = 1", "'model' is not known (did you mean models?)"),
        ('port = "80"', "port: expected a whole number, got '80'"),
        ("port = true", "port: expected a whole number, got True"),
        ("port = 70000", "port: 70000: expected 0 to 65535"),
        ("workers = 0", "workers: 0: expected 1 to 1024"),
        ("warm = 1", "warm: expected true or false, got 1"),
        ('max-body = "many"', "max-body: 'many' is not a size; write bytes, or 500M, 20G."),
        ("max-body = 1.5", 'max-body: expected bytes as a whole number, or a text like "500M", got 1.5'),
        ("max-body = 0", "max-body: 0: expected 1 or more"),
        ("request-timeout = inf", "request-timeout: inf: expected 0.001 to 1000000"),
        ("request-timeout = nan", "request-timeout: nan: expected 0.001 to 1000000"),
        ('allowed-host = "a"', "allowed-host: expected a list of texts, got 'a'"),
        ('log-level = "loud"', "log-level: 'loud' is not one of"),
        ("models = 1", "models: expected tables, each below a line [[models]]"),
        ("[[models]]\nnames = []", "models[0]: has no artifact, a folder or a hub id"),
        ('[[models]]\nartifact = "x"\nindx = "y"', "models[0]: 'indx' is not known (did you mean index?)"),
        ('[[models]]\nartifact = "x"\nnames = "y"', "models[0].names: expected a list of texts, got 'y'"),
        ('[[models]]\nartifact = "x"\nport = 1', "models[0]: 'port' is not known"),
        ("port = ", "not TOML (Invalid value"),
    ],
)
def test_a_key_that_is_wrong_is_named(text: str, message: str, config: Callable[[str], Path]) -> None:
    told = refused("a", "--config", file := config(text))
    assert told.startswith(f"--config: {file}: ")
    assert message in told


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--port", "-1"], "'--port': -1: expected 0 to 65535"),
        (["--port", "65536"], "'--port': 65536: expected 0 to 65535"),
        (["--port", "http"], "'--port': 'http' is not a valid integer"),
        (["--threads", "0"], "'--threads': 0: expected 1 to 1024"),
        (["--workers", "100000"], "'--workers': 100000: expected 1 to 1024"),
        (["--max-documents", "0"], "'--max-documents': 0: expected 1 or more"),
        (["--max-documents", str(2**64)], f"'--max-documents': {2**64}: expected 1 to {2**63 - 1}"),
        (["--max-body", "-5"], "'--max-body': '-5' is not a size"),
        (["--keep-alive", "0"], "'--keep-alive': 0.0: expected 0.001 to 1000000"),
        (["--keep-alive", "1e300"], "'--keep-alive': 1e+300: expected 0.001 to 1000000"),
        (["--kv", "fp8"], "'--kv': 'fp8' is not one of"),
        (["--portt", "1"], "--portt"),
        (["--host", "0.0.0.0"], "host 0.0.0.0 can be reached from other machines, and there is no --api-key-file"),
        (["--host", "::"], "host :: can be reached from other machines"),
        (["--host", "localhost.example"], "can be reached from other machines"),
        (["--uds", "s", "--port", "1"], "--uds takes the place of --host and --port"),
        (["--uds", "s", "--tls-cert", "c", "--tls-key", "k"], "--uds takes no --tls-cert"),
        (["--tls-cert", "c"], "--tls-cert and --tls-key belong together"),
        (["--gpu-bytes", "1G"], "are limits of a GPU's memory: say --device cuda too"),
        (["--device", "cuda", "--workers", "2"], "2 engines would share a GPU (cuda), each taking all that is free"),
        (["--config", "nowhere.toml"], "--config: nowhere.toml: No such file or directory."),
    ],
)
def test_an_option_that_is_wrong_is_named(args: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(GPU_VARIABLE, raising=False)
    assert message in refused("a", *args)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_only_this_machine_reaches_it_without_keys_unless_that_is_said(host: str) -> None:
    assert parsed("a", "--host", host).is_local
    assert parsed("a", "--uds", "s").is_local
    assert not parsed("a", "--host", "0.0.0.0", "--api-key-file", "k").is_local
    assert not parsed("a", "--host", "0.0.0.0", "--without-keys").is_local


# --- the command ---------------------------------------------------------------------------------------------


def test_what_is_served_is_a_folder_that_is_an_artifact(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And all of it is looked at before any process is started."""
    pytest.importorskip("uvicorn", reason="m0kit[serve] is not installed")
    import m0kit.server.workers

    served: list[tuple[Settings, Any]] = []
    monkeypatch.setattr(m0kit.server.workers, "run", lambda *args: served.append(args) or 143)

    def run(*args: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["m0kit", "serve", *map(str, args)])
        with pytest.raises(SystemExit) as done:
            main()
        return int(done.value.code or 0), capsys.readouterr().err

    monkeypatch.chdir(artifact.parent)
    assert run(f"m,n={artifact.name}", "--index", tmp_path / "library") == (143, "")
    ((settings, told),) = served
    (model,) = settings.models
    assert (model.artifact, model.names) == (str(artifact), ("m", "n"))
    assert told == (f"m, n: fp32 on cpu, index {tmp_path / 'library'}",)
    served.clear()
    code, err = run("missing")
    assert (code, len(err.splitlines())) == (1, 1)
    assert err.startswith("error: missing")
    code, err = run(artifact, "--max-pixels", 1)
    assert code == 2
    assert "--max-pixels: min_pixels (3136) must not exceed" in err
    assert not served


@pytest.mark.parametrize("missing", ["uvicorn", "starlette", "prometheus_client", "h11"])
def test_a_missing_package_is_named_with_the_extra_that_brings_it(missing: str, artifact: Path) -> None:
    for needed in ("uvicorn", "starlette", "prometheus_client", "h11"):
        pytest.importorskip(needed, reason="m0kit[serve] is not installed")
    code = f"import sys; sys.modules[{missing!r}] = None; from m0kit.cli.commands import main; main()"
    # Not in this process: what is imported already would not be missed.
    done = subprocess.run(
        [sys.executable, "-c", code, "serve", str(artifact), "--port", "0"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "pip install 'm0kit[serve]'" in line
    assert f"m0kit serve needs {missing}." in line


def test_settings_are_printed_and_refused_without_any_of_those_packages() -> None:
    names = ["uvicorn", "starlette", "prometheus_client", "h11"]
    code = f"import sys; sys.modules |= dict.fromkeys({names}); from m0kit.cli.commands import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "serve", "a", "--print-config"], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert tomllib.loads(done.stdout)["models"][0]["artifact"] == "a"


def test_help_says_each_option_with_its_default() -> None:
    done: Result = CliRunner().invoke(serve, ["--help"])
    for name in (*OF_SERVER, *OF_MODEL):
        if name != "artifact":
            assert flag(name) in done.output
    assert "[default: 64M]" in done.output
