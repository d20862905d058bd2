"""Runs one shard in its own process and prints what it does, so that a test can kill it at any moment.

    python -m tests.support.shard_driver PROJECT_FOLDER SET SHARD [SECONDS_BETWEEN_COMMITS]

Prints `computed` when a megabatch left the device, `committed` when it is written, `done` at the end.
"""

import sys
import time
from pathlib import Path

from census_tf_dagster.inference.devices import Device, Embedded
from census_tf_dagster.pipeline.embed_shard import embed_shard
from tests.support.project import Project


def main() -> None:
    folder, name, shard = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    pause = float(sys.argv[4]) if len(sys.argv) > 4 else 0.0
    receive = Device.receive

    def receive_and_say(self: Device) -> Embedded:
        answer = receive(self)
        print("computed", flush=True)
        time.sleep(pause)
        return answer

    Device.receive = receive_and_say  # type: ignore[method-assign]
    with Project(folder).context(name) as context:
        print("started", flush=True)
        embed_shard(context, shard, report=lambda _: print("committed", flush=True))
    print("done", flush=True)


if __name__ == "__main__":
    main()
