"""A run for TensorBoard: the report's curves and each layer's density as scalars, masks as images, variants as text."""

from pathlib import Path

from ctrlcompile.inspect.run import Run
from ctrlcompile.pictures import patches

FRAMES = 50  # steps at which masks are images, at most; TensorBoard's slider shows 10 unless told otherwise
CELLS = 128  # blocks of a mask each way, at most; of a larger one, patches of blocks


def write(run: Run, folder: Path) -> None:
    """Writes an event file. Raises ImportError without TensorBoard, OSError where the folder cannot be written."""
    from torch.utils.tensorboard import SummaryWriter

    began = run.processes[0]["started"] if run.processes else 0.0
    curves = {name.replace(" ", "_"): line for name, line in run.curves().items()}
    densities = run.densities()
    curves |= {f"density_of/{name}": line for name, line in densities.items()}
    places = run.frames(FRAMES)
    with SummaryWriter(str(folder)) as writer:
        for name, line in curves.items():
            for made, value in zip(run.decisions, line, strict=True):
                if value is not None:
                    writer.add_scalar(name, value, made.step, began + made.seconds)
        for name in densities:
            for place, mask in zip(places, run.masks(name, places), strict=True):
                made, dark = run.decisions[place], 1 - patches(mask, CELLS, CELLS)
                writer.add_image(f"mask_of/{name}", dark[None], made.step, began + made.seconds)
        for became in run.respecialised:
            text, seconds = str(became.outcome), began + became.seconds
            writer.add_text(f"variant_of/{became.gate} {became.outcome.role}", text, became.step, seconds)
