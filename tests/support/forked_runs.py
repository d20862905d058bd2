"""Lets a code server fork its runs from a process that has imported what they need, which takes seconds.

Outside of tests, Dagster starts a Python for each. Definitions that import this module fork.
"""

import multiprocessing

import dagster._grpc.server as dagster_server

from tests.support.fork_server import OF_RUNS

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload([*OF_RUNS])
_start_run = dagster_server.DagsterApiServer.StartRun


def _fork_run(self: dagster_server.DagsterApiServer, request: object, context: object) -> object:
    self._mp_ctx = _context  # type: ignore[assignment]
    return _start_run(self, request, context)


dagster_server.DagsterApiServer.StartRun = _fork_run  # type: ignore[method-assign, assignment]
