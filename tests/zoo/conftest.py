"""A hub on 127.0.0.1, and machines that know no other: interpreters started with its address."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location(
    "hub_server", Path(__file__).with_name("hub_server.py")
)
hub_server = importlib.util.module_from_spec(spec)
sys.modules["hub_server"] = hub_server  # where its dataclasses look for their module
spec.loader.exec_module(hub_server)

#: Runs what it is sent, a line each, and answers with what that printed.
INTERPRETER = """
import contextlib, io, json, sys, traceback
answers, sys.stdout = sys.stdout, sys.stderr
for line in sys.stdin:
    printed, failed = io.StringIO(), ""
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            exec(compile(json.loads(line), "<test>", "exec"), {})
        except BaseException:
            failed = traceback.format_exc()
    print(json.dumps([printed.getvalue(), failed]), file=answers, flush=True)
"""


class Machine:
    """A machine with a cache of its own, and a token of the owner."""

    def __init__(
        self, home: Path, endpoint: str, *, offline: bool = False, token: str = ""
    ) -> None:
        self.home = home
        drop = ("HF_", "HUGGINGFACE_", "XDG_", "TRANSFORMERS_")
        env = {k: v for k, v in os.environ.items() if not k.startswith(drop)}
        env |= {"HF_HOME": str(home), "HF_ENDPOINT": endpoint, "HF_HUB_ETAG_TIMEOUT": "3"}
        env |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "1" if offline else "0"}
        env |= {"NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_XET": "1", "NO_COLOR": "1"}
        env |= {"HF_TOKEN": token} if token else {}
        self.process = subprocess.Popen(
            [sys.executable, "-c", INTERPRETER],
            env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            text=True,
        )  # fmt: skip

    def begin(self, code: str) -> None:
        """Run some code, and do not wait for it."""
        self.process.stdin.write(json.dumps(code) + "\n")
        self.process.stdin.flush()

    def run(self, code: str) -> str:
        """Run some code; return what it printed."""
        self.begin(code)
        printed, failed = json.loads(self.process.stdout.readline())
        assert not failed, printed + failed
        return printed

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()

    def command(self, *arguments: str) -> tuple[int, str]:
        """Run ``phenoseq`` with some arguments; return its exit status and what it printed."""
        code = f"from phenoseq.cli import main\nprint('EXIT', main({list(arguments)!r}))"
        printed, _, status = self.run(code).rpartition("EXIT ")
        return int(status), printed

    def load(self, model: str, **options) -> str:
        """Load a model; return its folder, or how it was refused."""
        return (
            self.run(
                "import phenoseq\n"
                "try:\n"
                f"    print(phenoseq.load_model({model!r}, **{options!r}).folder)\n"
                "except phenoseq.ModelError as error:\n"
                "    print('REFUSED', error)\n"
            )
            .strip()
            .splitlines()[-1]
        )

    def forget(self) -> None:
        """Empty the cache."""
        shutil.rmtree(self.home, ignore_errors=True)

    def cached(self, pattern: str) -> list[Path]:
        return sorted(self.home.glob(pattern))


@pytest.fixture(scope="session")
def one_hub(tmp_path_factory):
    with hub_server.serve(tmp_path_factory.mktemp("hub"), {}) as server:
        yield server


@pytest.fixture
def hub(one_hub):
    """An empty hub that works."""
    one_hub.repos.clear()
    one_hub.asked.clear()
    one_hub.ranges.clear()
    one_hub.trouble = hub_server.Trouble()
    return one_hub


def started(home: Path, hub, **how):
    machine = Machine(home, hub.url, **how)
    yield machine
    machine.kill()


@pytest.fixture(scope="session")
def machines_home(tmp_path_factory):
    return tmp_path_factory.mktemp("machine") / "home"


@pytest.fixture(scope="session")
def one_machine(machines_home, one_hub):
    yield from started(machines_home, one_hub, token=hub_server.TOKEN)


@pytest.fixture(scope="session")
def one_offline_machine(machines_home, one_hub):
    yield from started(machines_home, one_hub, offline=True)


@pytest.fixture(scope="session")
def one_stranger(tmp_path_factory, one_hub):
    yield from started(tmp_path_factory.mktemp("stranger") / "home", one_hub)


@pytest.fixture
def machine(one_machine):
    """A machine of the owner, with an empty cache."""
    one_machine.forget()
    return one_machine


@pytest.fixture
def to_kill(machine, hub):
    """The same machine, and the same cache, in a process that a test may kill."""
    yield from started(machine.home, hub, token=hub_server.TOKEN)


@pytest.fixture
def offline(machine, one_offline_machine):
    """The same machine, and the same cache, without network."""
    return one_offline_machine


@pytest.fixture
def stranger(one_stranger):
    """A machine without a token, with an empty cache."""
    one_stranger.forget()
    return one_stranger
