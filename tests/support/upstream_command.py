"""What upstream's command `transcriptformer` runs, as a module. It needs upstream's environment."""

import torch
from transcriptformer.cli import main

if __name__ == "__main__":
    # Beside other tests, a second thread costs more than it brings: each waits for the other at every operation.
    torch.set_num_threads(1)
    main()
