"""W&B goes away half-way through a run that logs online: the run goes on, says so once, and ends in bounded time."""

from __future__ import annotations

import http.server
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

wandb = pytest.importorskip("wandb")


class Answers(http.server.BaseHTTPRequestHandler):
    """As much of W&B's interface as starting a run takes."""

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        """Anything."""
        self._reply({})

    def do_POST(self) -> None:
        """A run that was made, or history that was taken."""
        self.rfile.read(int(self.headers.get("content-length", 0)))
        project = {"id": "p", "name": "p", "entity": {"id": "e", "name": "e"}}
        bucket = {"id": "b", "name": "one", "displayName": "one", "config": "{}", "project": project}
        viewer = {"id": "u", "entity": "e", "username": "u", "flags": "{}", "teams": {"edges": []}}
        versions = {"cliVersionInfo": {"min_cli_version": "0.1", "max_cli_version": "99"}, "features": []}
        made = {"viewer": viewer, "serverInfo": versions, "upsertBucket": {"bucket": bucket, "inserted": True}}
        self._reply({"data": made} if self.path == "/graphql" else {"limits": {}, "exitcode": None})

    def _reply(self, content: Any) -> None:
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def server() -> Iterator[http.server.ThreadingHTTPServer]:
    """A W&B server on this machine's loopback address."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers) as started:
        thread = threading.Thread(target=started.serve_forever)
        thread.start()
        yield started
        started.shutdown()
        thread.join()


RUN = """
import sys
from pathlib import Path
from tmpq_exp.config import LoggerConfig
from tmpq_exp.tracking import Job, Results, open_tracker, wandb_run
wandb_run.INIT_TIMEOUT_SECONDS = 90  # a machine under load is no server that is gone
wandb_run.FINISH_TIMEOUT_SECONDS = 3
record = {"phase": "search", "bitops": 1, "macs": 1, "weight_bytes": 1, "metrics": {"fd": 1.0}, "key": "k"}
tracker = open_tracker(LoggerConfig(mode="online"), Job(Path("."), "run", {}))
tracker.log_trial({"index": 0, **record})
print("started", tracker.notice, flush=True)
sys.stdin.readline()
for index in range(1, 30):
    tracker.log_trial({"index": index, **record})
tracker.log_results(Results({"a": 1}))
tracker.finish()
print("went on", flush=True)
"""


@pytest.mark.slow
def test_a_server_that_goes_away_is_said_once(tmp_path: Path, server: http.server.ThreadingHTTPServer) -> None:
    environment = {
        **os.environ, "WANDB_BASE_URL": f"http://127.0.0.1:{server.server_port}", "WANDB_API_KEY": "a" * 40,
        "WANDB_SILENT": "true", "WANDB_MODE": "", "PYTHONPATH": str(Path(__file__).parents[2]),
    }  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-c", RUN], cwd=tmp_path, env=environment, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    started = process.stdout.readline()
    if not started.startswith("started wandb   http://127.0.0.1:"):
        process.kill()
        pytest.fail(started + process.communicate()[1])
    server.shutdown()
    server.server_close()
    start = time.monotonic()
    out, err = process.communicate("\n", timeout=120)
    assert time.monotonic() - start < 60
    assert (process.returncode, out) == (0, "went on\n"), err
    ours = [line for line in err.splitlines() if "tracking with W&B stopped" in line]
    assert len(ours) == 1, err
    assert "later: wandb sync" in ours[0]
    (file,) = tmp_path.glob("wandb/run-*/*.wandb")
    assert file.stat().st_size > 1000, "what could not be uploaded is on disk"


@pytest.mark.slow
def test_a_server_that_is_not_there_at_all_is_said_once(tmp_path: Path) -> None:
    environment = {
        **os.environ, "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "a" * 40, "WANDB_SILENT": "true",
        "WANDB_MODE": "", "PYTHONPATH": str(Path(__file__).parents[2]),
    }  # fmt: skip
    shorter = RUN.replace("wandb_run.FINISH", "wandb_run.INIT_TIMEOUT_SECONDS = 3; wandb_run.FINISH")
    done = subprocess.run(
        [sys.executable, "-c", shorter], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120,
        input="\n",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == "started None\nwent on\n"
    assert done.stderr.count("tracking with W&B stopped") == 1
