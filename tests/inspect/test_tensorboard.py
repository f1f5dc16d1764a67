"""What TensorBoard reads is what the log holds."""

import io
import random

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import IMAGES, SCALARS, TENSORS, EventAccumulator

from ctrlcompile import run_log
from ctrlcompile.controller import Controller
from ctrlcompile.inspect import tensorboard
from ctrlcompile.inspect.run import read
from ctrlcompile.proposals import Outcome

from ..controller.plant import Plant


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scalars_and_images_are_the_curves_the_densities_and_the_masks(tmp_path, seed):
    plant = Plant([(72, 40), (96, 64)], noise=1.0, seed=seed)
    controller = Controller(plant.gates, plant.meter, 0.4, 40)
    controller.log = run_log.start(tmp_path / "run", controller)
    outcome = Outcome("dgrad", 0.5, "block-sparse", "dense", 0.2, 3.0, 0.0, 0.1, True, None)
    for step in range(1, 41):
        plant.train_step()
        controller.step(random.random())
        if step in (20, 30):
            controller.log.respecialized(step, plant.gates["layer1"], outcome)
    run = read(tmp_path / "run")
    tensorboard.write(run, tmp_path / "events")

    events = EventAccumulator(str(tmp_path / "events"), {SCALARS: 0, IMAGES: 0, TENSORS: 0}).Reload()
    wanted = {name.replace(" ", "_"): line for name, line in run.curves().items()}
    wanted |= {f"density_of/{name}": line for name, line in run.densities().items()}
    assert set(events.Tags()["scalars"]) == wanted.keys()
    began = run.processes[0]["started"]
    for name, line in wanted.items():
        known = [(made.step, value) for made, value in zip(run.decisions, line, strict=True) if value is not None]
        found = events.Scalars(name)
        assert [event.step for event in found] == [step for step, _ in known]
        assert [event.value for event in found] == pytest.approx([value for _, value in known], rel=1e-6)
    assert events.Scalars("density")[-1].wall_time == pytest.approx(began + run.decisions[-1].seconds, abs=1e-3)
    places = run.frames(50)
    for name in plant.gates:
        found = events.Images(f"mask_of/{name}")
        assert [event.step for event in found] == [run.decisions[place].step for place in places]
        for event, mask in zip(found, run.masks(name, places), strict=True):
            picture = Image.open(io.BytesIO(event.encoded_image_string)).convert("L")
            assert picture.size == (mask.shape[1], mask.shape[0])
            assert [pixel == 0 for pixel in picture.tobytes()] == mask.flatten().tolist()
    found = events.Tensors("variant_of/layer1 dgrad/text_summary")
    assert [event.step for event in found] == [20, 30]
    assert all(event.tensor_proto.string_val == [str(outcome).encode()] for event in found)
    assert not torch.equal(*(run.masks("layer0", places)[end] for end in (0, -1)))
