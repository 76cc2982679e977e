"""Two processes, as Lightning starts them, of which the first fails and the other waits.

Run by ``test_distributed.py`` as ``two_failing.py FOLDER DATA``. While the other waits,
it writes FOLDER/waiting.
"""

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from run_folders_torchvision import options

from kd_detectron.errors import NonFiniteLossError
from kd_detectron.torchvision.training import DetectionModule, train


def wait_or_fail(module, batch, batch_idx):
    waiting = Path(sys.argv[1]) / "waiting"
    if module.global_rank == 1:
        for _ in range(600):  # On a GPU it would wait in an exchange of gradients.
            waiting.touch()
            time.sleep(0.1)
    while not waiting.is_file():
        time.sleep(0.1)
    raise NonFiniteLossError("loss_cls is not finite")


def main(folder, data):
    os.cpu_count = lambda: 2  # As many processes are allowed.
    DetectionModule.training_step = wait_or_fail
    train(options(Path(data), Path(folder) / "run", devices="2"))


if __name__ == "__main__":
    main(*sys.argv[1:])
