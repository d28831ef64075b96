"""Docker or Podman, by their commands."""

from __future__ import annotations

import json
import subprocess
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

DEADLINE_S = 300.0

# As the chart runs it: nothing of the image can be written, no capabilities, and a user that no /etc/passwd knows.
AS_IN_A_CLUSTER = (
    "--user=12345:0",
    "--read-only",
    "--tmpfs=/tmp",
    "--cap-drop=ALL",
    "--security-opt=no-new-privileges",
    "--network=none",
)


class Engine:
    """``program`` is docker or podman; the containers it started are known, and removed at the end."""

    def __init__(self, program: str) -> None:
        self._program = program
        self._containers: list[str] = []

    def run(
        self, image: str, *command: str, options: Sequence[str] = AS_IN_A_CLUSTER
    ) -> subprocess.CompletedProcess[str]:
        """A container from its start to its end; it is gone afterwards."""
        # Nobody asks for its health; without systemd, Podman would complain that it cannot either.
        options = ("--rm", "--no-healthcheck", f"--name={self._name()}", *options)
        return self._call("run", *options, image, *command)

    def start(self, image: str, *command: str, options: Sequence[str] = AS_IN_A_CLUSTER) -> str:
        """A container in the background; its name."""
        name = self._name()
        done = self._call("run", "--detach", f"--name={name}", *options, image, *command)
        assert done.returncode == 0, done.stderr
        return name

    def execute(self, container: str, *command: str) -> subprocess.CompletedProcess[str]:
        return self._call("exec", container, *command)

    def healthy(self, container: str) -> None:
        """Wait until the image's own health check succeeds in the container."""
        [check] = [
            shell.removeprefix("CMD-SHELL ").split() if kind == "CMD-SHELL" else [shell, *rest]
            for kind, shell, *rest in [self.inspect(container)["Config"]["Healthcheck"]["Test"]]
        ]
        deadline = time.monotonic() + DEADLINE_S
        while (done := self.execute(container, *check)).returncode:
            assert time.monotonic() < deadline, done.stderr + self.logs(container)
            assert self.inspect(container)["State"]["Running"], self.logs(container)
            time.sleep(0.5)

    def stop(self, container: str, timeout_s: int = 60) -> int:
        """SIGTERM, and SIGKILL after the timeout; the exit code."""
        self._call("stop", f"--time={timeout_s}", container)
        return int(self.inspect(container)["State"]["ExitCode"])

    def logs(self, container: str) -> str:
        done = self._call("logs", container)
        return done.stdout + done.stderr

    def inspect(self, name: str, *, kind: str = "container") -> dict[str, Any]:
        done = self._call("inspect", f"--type={kind}", name)
        assert done.returncode == 0, done.stderr
        return dict(json.loads(done.stdout)[0])

    def build(self, folder: Path, tag: str, **arguments: str) -> None:
        options = [f"--build-arg={name}={value}" for name, value in arguments.items()]
        done = self._call("build", *options, "--tag", tag, str(folder))
        assert done.returncode == 0, done.stdout + done.stderr

    def remove_image(self, tag: str) -> None:
        self._call("rmi", "--force", tag)

    def remove_containers(self) -> None:
        for name in self._containers:
            self._call("rm", "--force", name)

    def _name(self) -> str:
        name = f"inferstream-test-{uuid.uuid4().hex[:10]}"
        self._containers.append(name)
        return name

    def _call(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([self._program, *arguments], capture_output=True, text=True, timeout=DEADLINE_S)
