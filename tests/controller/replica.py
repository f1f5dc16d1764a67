"""One of two data-parallel replicas, each with its own batches: `python replica.py RANK STORE OUT`."""

import sys

import torch
import torch.distributed as dist
from plant import Plant, chained

from ctrlcompile import run_log
from ctrlcompile.controller import Controller

rank, store, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
plant = Plant([(64, 48), (64, 64)], noise=1.0)
plant.generator.manual_seed(rank)  # the same blocks are useful, the noise is each replica's own
controller = Controller(plant.gates, plant.meter, 0.4, 80)
controller.log = run_log.start(f"{out}.log", controller)
for step in range(80):
    if step == 20 * rank:  # one replica meets a graph that couples its gates, and its batch norm, earlier
        plant.meter.coupled = (chained(list(plant.gates.values())),)
        plant.gates["layer1"].normalised = True
    plant.train_step(rows=1 + rank)
    controller.step()
torch.save({"masks": [gate.mask for gate in plant.gates.values()], "state": controller.state_dict()}, out)
dist.destroy_process_group()
