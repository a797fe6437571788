"""The training loop that all trained routers share, on Lightning.

What it promises: the best epoch by validation loss is kept (without validation, the last); after
each epoch there is a checkpoint, and a training that was killed goes on from it to the same
numbers; one seed gives one result; nothing is said on the terminal; a loss that is not finite is an
error. What differs between routers comes in as functions: the loss of a batch, the loss of the
validation part, and the groups of weights with their rates.
"""

import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from conf.errors import ConfigError
from conf.routers import Trainer

History = list[dict[str, float | None]]
Progress = Callable[[int, int], None]


class Batches(Protocol):
    """What is trained on: tuples of tensors, the labels last, in an order that `epoch` decides.

    A plain iterable, not a DataLoader: the data are in memory, and each device takes its own share,
    of which `rank` and `ranks` tell. All devices must make the same number of steps.
    """

    epoch: int
    rank: int
    ranks: int

    def __len__(self) -> int:
        """Return the number of steps that each device makes in an epoch."""

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        """Yield this device's batches of the epoch."""


def train(
    network: Any,
    batches: Batches,
    *,
    loss: Callable[[Any], Any],
    validation_loss: Callable[[], float] | None,
    weight_groups: Callable[[], list[dict[str, Any]]],
    settings: Trainer,
    name: str,
    checkpoint: str,
    seed: int,
    directory: Path | None,
    on_progress: Progress | None,
) -> History:
    """Train ``network`` in place and return one dict per epoch.

    loss: a batch's mean loss, with its gradient. validation_loss: as `win_rate` would have it; it
    may switch the network to evaluation, for the modes are put back. weight_groups: AdamW's, with
    lr and weight_decay each; both rates rise linearly and fall linearly. Weights that need no
    gradient are neither copied nor written to the checkpoint.
    name: the router's, for messages. checkpoint: the file's stem in ``directory``; it must name all
    that determines the trained weights, so that no other training is ever continued.
    Raises ConfigError when the loss is not finite.
    """
    import torch

    path = None
    if directory is not None:
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / f"{checkpoint}.ckpt"
    resume = path is not None and _is_usable(path)
    # bf16-true rounds these too, some of which are in no file (rotary frequencies): put back below.
    frozen = dict(_frozen(network)) if settings.precision == "bf16-true" else {}
    deterministic = torch.are_deterministic_algorithms_enabled()
    with _quiet_lightning(), tempfile.TemporaryDirectory() as scratch:
        try:
            trainer = _trainer(settings, scratch)
            module = _module(
                network,
                batches,
                loss=loss,
                validation_loss=validation_loss,
                weight_groups=weight_groups,
                settings=settings,
                name=name,
                checkpoint=path,
                seed=seed,
                on_progress=on_progress,
            )
            trainer.fit(module, batches, ckpt_path=path if resume else None, weights_only=True)
        finally:
            torch.use_deterministic_algorithms(deterministic)
    if module.best is not None:
        network.load_state_dict(module.best, strict=False)
    network.float().cpu().eval()
    for key, tensor in _frozen(network) if frozen else ():
        tensor.copy_(frozen[key])
    if path is not None and trainer.is_global_zero:
        path.unlink(missing_ok=True)
        path.with_suffix(".partial").unlink(missing_ok=True)
    return list(module.history)


def decaying(weights: Any, *, rate: float, weight_decay: float) -> list[dict[str, Any]]:
    """Return AdamW's groups of the trained ``weights``: biases and norms do not decay."""
    trained = [weight for weight in weights if weight.requires_grad]
    matrices = [weight for weight in trained if weight.ndim > 1]
    vectors = [weight for weight in trained if weight.ndim <= 1]
    return [
        {"params": matrices, "lr": rate, "weight_decay": weight_decay},
        {"params": vectors, "lr": rate, "weight_decay": 0.0},
    ]


def _is_usable(checkpoint: Path) -> bool:
    """Tell whether training can go on from a checkpoint; set a damaged one aside, and warn."""
    import torch

    if not checkpoint.exists():
        return False
    try:
        torch.load(checkpoint, map_location="cpu", weights_only=True)
    except Exception as error:  # torch lets through whatever the damage makes it stumble over
        checkpoint.replace(checkpoint.with_suffix(".damaged"))
        warnings.warn(
            f"The checkpoint {checkpoint} is damaged ({error}) and was set aside; training starts "
            "from the beginning.",
            RuntimeWarning,
            stacklevel=4,
        )
        return False
    return True


def _trainer(settings: Trainer, scratch: str) -> Any:
    import lightning.pytorch as pl
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    try:
        return pl.Trainer(
            max_epochs=settings.max_epochs,
            accelerator=settings.accelerator,
            devices=settings.devices,
            num_nodes=settings.nodes,
            strategy=settings.strategy,
            precision=settings.precision,
            gradient_clip_val=1.0,
            deterministic=True,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=scratch,
        )
    except (MisconfigurationException, ValueError) as error:
        raise ConfigError(
            f"Lightning cannot train with accelerator {settings.accelerator!r}, "
            f"{settings.devices} devices, strategy {settings.strategy!r} and precision "
            f"{settings.precision!r}: {error} Expected what this machine has. Correct trainer."
        ) from error


def _module(
    network: Any,
    batches: Batches,
    *,
    loss: Callable[[Any], Any],
    validation_loss: Callable[[], float] | None,
    weight_groups: Callable[[], list[dict[str, Any]]],
    settings: Trainer,
    name: str,
    checkpoint: Path | None,
    seed: int,
    on_progress: Progress | None,
) -> Any:
    """Return the LightningModule; made in a function so that importing this file stays cheap."""
    import lightning.pytorch as pl
    import torch

    class Training(pl.LightningModule):
        """One epoch: shuffle, train, validate, keep the best weights, write the checkpoint."""

        strict_loading = False  # frozen weights are left out

        def __init__(self) -> None:
            super().__init__()
            self.network = network
            self.history: list[dict[str, Any]] = []
            self.best: dict[str, Any] | None = None
            self.losses: list[tuple[Any, int]] = []

        def configure_optimizers(self) -> Any:
            batches.rank, batches.ranks = self.global_rank, self.trainer.world_size
            return _optimizer(weight_groups(), settings, steps=settings.max_epochs * len(batches))

        def on_train_start(self) -> None:
            # The killed run may have got as far as its last epoch.
            self.trainer.should_stop = bool(self.history) and self.patience_is_spent()

        def on_train_epoch_start(self) -> None:
            # Order, dropout and noise depend on seed and epoch only: a resumed run repeats them.
            batches.epoch = self.current_epoch
            torch.manual_seed(seed + 1_000_003 * self.current_epoch + 7_919 * self.global_rank)
            self.losses = []

        def training_step(self, batch: Any, index: int) -> Any:
            value = loss(batch)
            self.losses.append((value.detach(), len(batch[-1])))
            if on_progress is not None:
                done = self.current_epoch * len(batches) + index + 1
                on_progress(done, settings.max_epochs * len(batches))
            return value

        def on_train_epoch_end(self) -> None:
            rows = sum(count for _, count in self.losses)
            entry: dict[str, Any] = {
                "epoch": self.current_epoch,
                "train_loss": sum(float(value) * count for value, count in self.losses) / rows,
                "validation_loss": None,
                "learning_rate": self.trainer.optimizers[0].param_groups[0]["lr"],
            }
            if validation_loss is not None:
                with _modes_put_back(network):
                    entry["validation_loss"] = validation_loss()
            losses = [entry["train_loss"], entry["validation_loss"] or 0.0]
            if not np.isfinite(losses).all():
                raise ConfigError(
                    f"Training of {name!r} diverged: its loss in epoch {self.current_epoch} is "
                    f"{losses[0]}, and {entry['validation_loss']} in validation. Expected finite "
                    "losses. Lower trainer.learning_rate, or choose another trainer.precision."
                )
            self.history.append(entry)
            self.trainer.should_stop = self.patience_is_spent()
            if validation_loss is not None and self.best_epoch() == len(self.history) - 1:
                self.best = _trained_state(network)
            if checkpoint is not None:
                partial = checkpoint.with_suffix(".partial")
                self.trainer.save_checkpoint(partial)
                if self.trainer.is_global_zero:
                    partial.replace(checkpoint)

        def best_epoch(self) -> int:
            return int(np.argmin([entry["validation_loss"] for entry in self.history]))

        def patience_is_spent(self) -> bool:
            if validation_loss is None:
                return False
            return len(self.history) - 1 - self.best_epoch() >= settings.patience

        def on_save_checkpoint(self, state: dict[str, Any]) -> None:
            kept = _trained_state(network)
            state["state_dict"] = {f"network.{key}": value for key, value in kept.items()}
            state["best"], state["history"] = self.best, self.history

        def on_load_checkpoint(self, state: dict[str, Any]) -> None:
            self.best, self.history = state["best"], state["history"]

    return Training()


def _optimizer(groups: list[dict[str, Any]], settings: Trainer, *, steps: int) -> dict[str, Any]:
    import torch

    optimizer = torch.optim.AdamW(groups)
    warmup = max(1, round(settings.warmup_share * steps))

    def share(step: int) -> float:
        return min((step + 1) / warmup, max(0.0, (steps - step) / max(1, steps - warmup)), 1.0)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def _trained_state(network: Any) -> dict[str, Any]:
    return {
        name: weight.detach().clone()
        for name, weight in network.named_parameters()
        if weight.requires_grad
    }


def _frozen(network: Any) -> Iterator[tuple[str, Any]]:
    """Yield buffers and untrained weights by name; converting the network leaves these behind."""
    for name, tensor in chain(network.named_buffers(), network.named_parameters()):
        if not tensor.requires_grad:
            yield name, tensor.detach()


@contextmanager
def _modes_put_back(network: Any) -> Iterator[None]:
    """Leave each module's mode as it was: frozen layers are in evaluation, others in training."""
    modes = [(module, module.training) for module in network.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Keep Lightning's hardware report, tips and advice off the terminal."""
    import lightning.pytorch  # noqa: F401  # sets the level that is changed here

    log = logging.getLogger("lightning.pytorch")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
