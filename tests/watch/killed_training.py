"""A training that is killed at random moments, again and again: run by test_killed.py, apart from the tests' process.

Torch is imported once; every training is a fork of this process, killed by it with SIGKILL.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from torch import nn

import batchnorm as bn


def train(folder, steps, taken):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 30), nn.BatchNorm1d(30), nn.ReLU(), nn.Linear(30, 5), nn.BatchNorm1d(5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with bn.watch(model, folder, optimizer=optimizer) as w:
        for k in range(steps):
            optimizer.zero_grad()
            loss = model(torch.randn(8, 4, generator=torch.Generator().manual_seed(k))).square().mean()
            loss.backward()
            optimizer.step()
            w.log(loss=loss.item())
            if k % 7 == 0:
                w.probe([torch.ones(3, 4), torch.zeros(3, 4)])
            taken.write_text(f"{k} {time.monotonic()}\n")


def main(root, kills):
    torch.set_num_threads(1)
    train(root / "whole", 400, root / "whole.taken")  # all is imported and warm when the forks begin
    moments = random.Random(0)
    for k in range(kills):
        child = os.fork()
        if child == 0:
            train(root / f"killed-{k}", 400, root / f"killed-{k}.taken")
            os._exit(0)
        time.sleep(moments.uniform(0.0, 0.3))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        (root / f"killed-{k}.at").write_text(str(time.monotonic()))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
