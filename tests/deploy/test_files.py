"""Dockerfiles, compose, systemd and Kubernetes: they fit the server's options and each other, and give nothing away."""

import re
import shlex
import shutil
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from m0kit.cli.serve import serve
from m0kit.server.settings import ModelSettings, Settings
from m0kit.server.telling import Telling

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
DOCKERFILES = ("Dockerfile", "Dockerfile.gpu")
DEFAULTS = Settings((ModelSettings("m"),))
PREFIX = "M0KIT_SERVE_"
KILLED_AFTER_S = 5  # beyond the time for finishing: `_MARGIN_S` of m0kit.server.workers


def text_of(name: str) -> str:
    return (DEPLOY / name).read_text("utf-8")


def instructions(name: str) -> list[tuple[str, str]]:
    """Of a Dockerfile, in order, continued lines joined."""
    text = re.sub(r"^#.*\n", "", text_of(name), flags=re.MULTILINE)
    lines = re.sub(r"\\\n", " ", text).splitlines()
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in lines if line.strip())]


def last_stage(name: str) -> list[tuple[str, str]]:
    found = instructions(name)
    return found[max(i for i, (word, _) in enumerate(found) if word == "FROM") :]


def environment(name: str) -> dict[str, str]:
    """What the image sets."""
    words = [word for kind, rest in last_stage(name) if kind == "ENV" for word in shlex.split(rest)]
    return dict(word.split("=", 1) for word in words)


def compose() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(text_of("compose.yaml"))
    return found


def kubernetes() -> dict[tuple[str, str], dict[str, Any]]:
    documents = [each for each in yaml.safe_load_all(text_of("kubernetes.yaml")) if each]
    return {(each["kind"], each["metadata"]["name"]): each for each in documents}


def pod() -> dict[str, Any]:
    found: dict[str, Any] = kubernetes()[("Deployment", "m0kit")]["spec"]["template"]["spec"]
    return found


def pod_environment() -> dict[str, str]:
    (container,) = pod()["containers"]
    return {each["name"]: str(each.get("value", "2")) for each in container["env"]}  # "2": limits.cpu


def unit() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in text_of("m0kit.service").splitlines():
        name, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            found.setdefault(name, []).append(value)
    return found


SETTINGS = {
    "Dockerfile": environment("Dockerfile"),
    "Dockerfile.gpu": environment("Dockerfile.gpu"),
    "compose.yaml": environment("Dockerfile") | compose()["services"]["m0kit"]["environment"],
    "kubernetes.yaml": environment("Dockerfile") | pod_environment(),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_what_is_set_is_an_option_and_makes_settings_that_fit(name: str) -> None:
    own = {key: value for key, value in SETTINGS[name].items() if key.startswith("M0KIT_")}
    known = {f"{PREFIX}{str(param.name).upper()}" for param in serve.params if isinstance(param, click.Option)}
    assert own.keys() <= known | {f"{PREFIX}ARTIFACTS"}
    group = click.Group("m0kit", {"serve": serve})
    done = CliRunner().invoke(group, ["serve", "--print-config"], auto_envvar_prefix="M0KIT", env=own)
    assert done.exit_code == 0, done.output
    assert 'host = "0.0.0.0"' in done.output
    assert "api-key-file = " in done.output
    assert "without-keys = true" not in done.output


def test_the_services_settings_fit() -> None:
    done = CliRunner().invoke(serve, ["--config", str(DEPLOY / "serve.toml"), "--print-config"])
    assert done.exit_code == 0, done.output
    assert f"shutdown-timeout = {DEFAULTS.shutdown_timeout_s}" in done.output
    (command,) = unit()["ExecStart"]
    words = shlex.split(command)
    assert Path(words[0]).name == "m0kit"
    assert words[1] == "serve"
    assert {word for word in words if word.startswith("--")} <= {opt for param in serve.params for opt in param.opts}


# --- images ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DOCKERFILES)
def test_an_image_has_a_pinned_base_and_a_user_that_is_a_number(name: str) -> None:
    found = instructions(name)
    (base,) = [rest.partition("=")[2] for word, rest in found if word == "ARG"]
    assert re.fullmatch(r"python:3\.\d+-slim-[a-z]+", base), "a version, slim, and the name of a release"
    assert {rest.split(" ")[0] for word, rest in found if word == "FROM"} == {"${BASE}"}
    users = [rest for word, rest in last_stage(name) if word == "USER"]
    assert users == ["10001:10001"]
    assert "HEALTHCHECK" in dict(found)
    assert found[-1] == ("ENTRYPOINT", '["m0kit", "serve"]')


@pytest.mark.parametrize("name", DOCKERFILES)
def test_an_image_takes_packages_by_hash_alone_and_no_tool_of_the_system(name: str) -> None:
    found = instructions(name)
    which = "gpu" if name.endswith("gpu") else "cpu"
    first, second = [rest for word, rest in found if word == "ENV" and "PIP_" in rest]
    assert {"PIP_REQUIRE_HASHES=1", "PIP_ONLY_BINARY=:all:"} <= set(first.split())
    assert set(second.split()) == {"PIP_REQUIRE_HASHES=0", "PIP_NO_INDEX=1"}
    position = {rest: i for i, (_, rest) in enumerate(found)}
    (install,) = [rest for word, rest in found if word == "RUN" and f"-r requirements-{which}.txt" in rest]
    assert "-r requirements-build.txt" in install
    (wheel,) = [rest for word, rest in found if word == "RUN" and "pip wheel" in rest]
    assert position[first] < position[install] < position[second] < position[wheel]
    assert not re.search(r"\b(apt|apt-get|curl|wget|torch|ADD|sudo)\b", " ".join(map(" ".join, found)))
    assert not [word for word, _ in last_stage(name) if word == "RUN"]
    copied = [rest for word, rest in last_stage(name) if word == "COPY"]
    assert copied == ["--from=build /opt/m0kit /opt/m0kit"]


def test_what_an_image_copies_is_what_the_wheel_is_built_of_and_docker_is_given_it() -> None:
    given = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for name in DOCKERFILES:
        copied = {
            word for kind, rest in instructions(name) if kind == "COPY" and "--from" not in rest
            for word in rest.split()[:-1]
        }  # fmt: skip
        assert all((ROOT / word).exists() for word in copied)
        assert {word if "requirements" not in word else "deploy/requirements-*.txt" for word in copied} == given
    packages = set(re.findall(r'^  "(\w+)/', (ROOT / "pyproject.toml").read_text("utf-8"), re.MULTILINE))
    assert packages <= given


def test_both_images_differ_in_what_a_gpu_needs_alone() -> None:
    cpu, gpu = (environment(name) for name in DOCKERFILES)
    assert cpu.items() <= gpu.items()
    assert gpu.keys() - cpu.keys() == {
        "NVIDIA_VISIBLE_DEVICES", "NVIDIA_DRIVER_CAPABILITIES", "CUDA_CACHE_PATH", "M0KIT_SERVE_DEVICE",
    }  # fmt: skip


class _Ready(BaseHTTPRequestHandler):
    status = 200

    def do_GET(self) -> None:
        self.send_response(self.status if self.path == "/ready" else 404)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def health_commands() -> dict[str, list[str]]:
    commands = {}
    for name in DOCKERFILES:
        (rest,) = [rest for word, rest in instructions(name) if word == "HEALTHCHECK"]
        commands[name] = yaml.safe_load(rest.partition(" CMD ")[2])
    kind, *words = compose()["services"]["m0kit"]["healthcheck"]["test"]
    assert kind == "CMD"
    return commands | {"compose.yaml": words}


@pytest.mark.parametrize("name", health_commands())
@pytest.mark.parametrize(("status", "code"), [(200, 0), (503, 1)])
def test_a_health_check_asks_whether_it_is_ready(name: str, status: int, code: int) -> None:
    program, option, source = health_commands()[name]
    assert (program, option) == ("python", "-c")
    assert "'127.0.0.1', 8080" in source
    server = HTTPServer(("127.0.0.1", 0), type("Handler", (_Ready,), {"status": status}))
    thread = threading.Thread(target=server.handle_request, daemon=True)
    thread.start()
    with pytest.raises(SystemExit) as ended:
        exec(compile(source.replace("8080", str(server.server_address[1])), name, "exec"), {})
    thread.join()
    server.server_close()
    assert int(ended.value.code or 0) == code


# --- compose -----------------------------------------------------------------------------------------------


def test_compose_gives_a_container_no_more_than_it_needs() -> None:
    service = compose()["services"]["m0kit"]
    assert (service["read_only"], service["cap_drop"], service["user"]) == (True, ["ALL"], "10001:10001")
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not {"privileged", "cap_add", "network_mode", "pid", "ipc", "devices"} & service.keys()
    assert {"mem_limit", "memswap_limit", "pids_limit", "cpus"} <= service.keys()
    assert service["mem_limit"] == service["memswap_limit"]
    (volume,) = service["volumes"]
    assert (volume["target"], volume["read_only"]) == ("/models", True)
    assert not any("docker.sock" in str(value) for value in service.values())
    assert all(re.match(r"127\.0\.0\.1:\d+:8080$", port) for port in service["ports"])
    assert float(service["environment"]["M0KIT_SERVE_THREADS"]) == service["cpus"]


def test_compose_and_the_image_mean_the_same_places() -> None:
    found, image = compose(), environment("Dockerfile")
    (secret,) = found["services"]["m0kit"]["secrets"]
    assert image["M0KIT_SERVE_API_KEY_FILE"] == f"/run/secrets/{secret}"
    assert list(found["secrets"]) == [secret]
    assert image["M0KIT_SERVE_ARTIFACTS"].startswith("/models/")
    assert image["XDG_CACHE_HOME"] == "/tmp"
    assert found["services"]["m0kit"]["tmpfs"][0].startswith("/tmp:")
    build = found["services"]["m0kit"]["build"]
    assert (DEPLOY / build["context"] / build["dockerfile"]).resolve() == DEPLOY / "Dockerfile"


def test_what_stops_a_server_waits_until_it_has_finished() -> None:
    least = DEFAULTS.shutdown_timeout_s + KILLED_AFTER_S
    service = compose()["services"]["m0kit"]
    assert float(service["environment"]["M0KIT_SERVE_SHUTDOWN_TIMEOUT"]) == DEFAULTS.shutdown_timeout_s
    assert int(service["stop_grace_period"].removesuffix("s")) > least
    assert int(unit()["TimeoutStopSec"][0]) > least
    assert float(pod_environment()["M0KIT_SERVE_SHUTDOWN_TIMEOUT"]) == DEFAULTS.shutdown_timeout_s
    command = pod()["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][-1]
    (before,) = re.findall(r"sleep\((\d+)\)", command)
    assert pod()["terminationGracePeriodSeconds"] >= int(before) + least


def test_the_time_until_workers_are_killed_is_that_of_the_code() -> None:
    source = (ROOT / "runtime" / "m0kit" / "server" / "workers.py").read_text("utf-8")
    assert f"_MARGIN_S: Final = {KILLED_AFTER_S:.1f}" in source


# --- Kubernetes --------------------------------------------------------------------------------------------


def test_a_pod_may_do_nothing_but_serve() -> None:
    spec, (container,) = pod(), pod()["containers"]
    assert spec["automountServiceAccountToken"] is False
    assert spec["enableServiceLinks"] is False, "a Service called m0kit-serve would set M0KIT_SERVE_PORT=tcp://…"
    own = spec["securityContext"]
    assert (own["runAsNonRoot"], own["runAsUser"], own["seccompProfile"]["type"]) == (True, 10001, "RuntimeDefault")
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert {"cpu", "memory"} == container["resources"]["limits"].keys() == container["resources"]["requests"].keys()
    writable = [mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")]
    assert writable == ["/tmp"]
    policy = kubernetes()[("NetworkPolicy", "m0kit")]["spec"]
    assert policy["egress"] == []
    assert set(policy["policyTypes"]) == {"Ingress", "Egress"}
    assert policy["ingress"][0]["ports"] == [{"protocol": "TCP", "port": 8080}]


def test_probes_ask_paths_that_the_server_has_at_its_port() -> None:
    (container,) = pod()["containers"]
    port = int(environment("Dockerfile")["M0KIT_SERVE_PORT"])
    assert container["ports"] == [{"name": "http", "containerPort": port}]
    probes = {name: container[f"{name}Probe"]["httpGet"] for name in ("startup", "readiness", "liveness")}
    assert {probe["port"] for probe in probes.values()} == {"http"}
    assert {name: probe["path"] for name, probe in probes.items()} == {
        "startup": "/ready",
        "readiness": "/ready",
        "liveness": "/live",  # a server that is busy or stopping is alive
    }
    routes = {route.path for route in Telling(None).routes()}  # type: ignore[arg-type]
    assert {probe["path"] for probe in probes.values()} <= routes


def test_everything_selects_the_pods_of_the_deployment() -> None:
    found = kubernetes()
    labels = found[("Deployment", "m0kit")]["spec"]["template"]["metadata"]["labels"]
    assert found[("Deployment", "m0kit")]["spec"]["selector"]["matchLabels"] == labels
    assert found[("Service", "m0kit")]["spec"]["selector"] == labels
    assert found[("Service", "m0kit-each")]["spec"]["selector"] == labels
    assert found[("PodDisruptionBudget", "m0kit")]["spec"]["selector"]["matchLabels"] == labels
    assert found[("NetworkPolicy", "m0kit")]["spec"]["podSelector"]["matchLabels"] == labels
    assert len(found) == 5


def test_places_of_the_pod_are_those_of_its_volumes() -> None:
    (container,) = pod()["containers"]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts.keys() == {volume["name"] for volume in pod()["volumes"]}
    assert pod_environment()["M0KIT_SERVE_API_KEY_FILE"] == f"{mounts['keys']}/keys"
    assert environment("Dockerfile")["M0KIT_SERVE_ARTIFACTS"].startswith(f"{mounts['models']}/")
    assert mounts["tmp"] == environment("Dockerfile")["XDG_CACHE_HOME"]


def test_kubernetes_schemas_take_it() -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate, from PyPI, is not installed")
    for document in kubernetes().values():
        validate.validate(document, validate.latest_version(), strict=True)


# --- systemd -----------------------------------------------------------------------------------------------


def test_the_unit_is_told_when_it_is_ready_and_starts_again_when_it_fails() -> None:
    found = unit()
    assert found["Type"] == ["notify"]
    assert found["ExecReload"] == ["/bin/kill -HUP $MAINPID"]
    assert found["Restart"] == ["on-failure"]
    assert found["RestartPreventExitStatus"] == [str(click.UsageError.exit_code)]
    assert found["SuccessExitStatus"] == ["143"]


def test_the_unit_gives_a_service_no_more_than_it_needs() -> None:
    found = unit()
    for name in (
        "DynamicUser", "ProtectHome", "PrivateTmp", "PrivateDevices", "NoNewPrivileges", "LockPersonality",
        "MemoryDenyWriteExecute", "ProtectKernelModules", "ProtectKernelTunables", "RestrictNamespaces",
        "RestrictSUIDSGID",
    ):  # fmt: skip
        assert found[name] == ["yes"], name
    assert (found["ProtectSystem"], found["CapabilityBoundingSet"]) == (["strict"], [""])
    assert found["SystemCallFilter"][0] == "@system-service"
    assert {"MemoryMax", "TasksMax", "LimitNOFILE"} <= found.keys()


def _systemd(folder: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("systemd is not installed")
    file = folder / "m0kit.service"
    file.write_text(text_of("m0kit.service").replace("/opt/m0kit/bin/m0kit", "/bin/true"), "utf-8")
    return subprocess.run([analyze, *words, str(file)], capture_output=True, text=True, check=False)


def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    done = _systemd(tmp_path, "verify", "--man=no")
    assert (done.returncode, done.stderr) == (0, "")


def test_systemd_finds_little_that_the_unit_exposes(tmp_path: Path) -> None:
    done = _systemd(tmp_path, "security", "--offline=yes", "--threshold=20", "--no-pager")  # 2.0 of 10; 9.6 without
    assert done.returncode == 0, done.stdout + done.stderr
