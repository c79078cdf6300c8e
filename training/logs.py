"""Loss and learning rate to TensorBoard or wandb, where they are installed and asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from .options import OptionError, Options

Log = Callable[[int, dict[str, float]], None]


@contextmanager
def logs(options: Options) -> Iterator[Log]:
    """log(step, {name: value}); OptionError where the chosen library is missing."""
    if options.log_with == "none":
        yield lambda step, values: None
        return
    folder = Path(options.output_dir) / "logs" / options.output_name
    try:
        log, close = (_tensorboard if options.log_with == "tensorboard" else _wandb)(folder, options)
    except ImportError as error:
        raise OptionError(
            f"log_with {options.log_with}: {error}: install it, or choose none.", code="option.log-with"
        ) from error
    try:
        yield log
    finally:
        close()


def _tensorboard(folder: Path, options: Options) -> tuple[Log, Callable[[], None]]:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder))

    def log(step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    return log, writer.close


def _wandb(folder: Path, options: Options) -> tuple[Log, Callable[[], None]]:
    import wandb

    folder.mkdir(parents=True, exist_ok=True)
    run = wandb.init(project="modular-lora", name=options.output_name, dir=str(folder), config=asdict(options))
    return (lambda step, values: run.log(values, step=step)), run.finish
