"""Hybrid LLM's router: an encoder fine-tuned to tell when the weak LLM will do.

Ding et al., "Hybrid LLM: Cost-Efficient and Quality-Aware Query Routing", arXiv 2404.14618.
The training (from `_train` on) stands here too, so that this one file is the whole router.
"""

import hashlib
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np

from conf.errors import ConfigError
from conf.schema import Hybrid
from router_models.encoders import (
    ENCODER_FOLDER,
    equal_length_batches,
    load_transformer,
    save_transformer,
    token_ids,
    token_limit,
    weights_digest,
)
from router_models.persistence import not_fitted, read_state, settings_json, write_state
from router_models.training_data import Comparisons

Progress = Callable[[int, int], None]

# Queries are sorted by length within pools of so many batches.
POOL_BATCHES = 32


class HybridRouter:
    """Fine-tune a BERT-style encoder on soft labels.

    Idea: mean-pool the encoder's last hidden states, put a linear layer and a sigmoid on top, and
    minimise the binary cross-entropy between its output and the labels. The label decides what the
    router learns: one sampled comparison (deterministic), the share of sample pairs that the
    strong LLM wins (probabilistic), or that share after relaxing the comparison by t*
    (transformed). All three come in as the win rates of `Comparisons`.
    Source: arXiv 2404.14618, equations 1 to 4; the loss there is on Pr[weak suffices], which is
    1 − win rate, and has the same value for both orientations.
    Requirements: an encoder that `transformers.AutoModel` loads. The paper's own run is
    `encoder: microsoft/deberta-v3-large`, 5 epochs, all layers.
    Relations: `knn` uses the same encoder frozen and needs no training; `bert` predicts three
    verdicts instead of a share.

    >>> from router_models.training_data import Comparisons
    >>> HybridRouter(Hybrid(name="example")).config.labels
    'transformed'
    """

    def __init__(self, config: Hybrid) -> None:
        self.config = config
        self.network_: Any = None
        """torch ModuleDict of `encoder` and `head`."""
        self.tokenizer_: Any = None
        self.history_: list[dict[str, float | None]] = []
        """Per epoch: epoch, train_loss, validation_loss, learning_rate."""

    def fit(
        self,
        train: Comparisons,
        validation: Comparisons | None = None,
        *,
        seed: int,
        directory: Path | None = None,
        on_progress: Progress | None = None,
    ) -> Self:
        """Train and keep the epoch with the best validation loss (without validation, the last).

        directory: where a checkpoint is kept after each epoch; a training that was killed goes on
        from it, to the same numbers, when data, settings, encoder and seed are the same.
        on_progress: called with steps done and steps in all.
        Raises DataError when the pair was never compared, ConfigError for unusable settings.
        """
        import torch

        prompts, win_rate = train.labels()
        encoder, tokenizer = load_transformer(self.config.encoder)
        max_length = min(self.config.max_length, token_limit(encoder, tokenizer))
        data = [(token_ids(tokenizer, prompts, max_length=max_length), win_rate)]
        if validation is not None:
            prompts, win_rate = validation.labels()
            data.append((token_ids(tokenizer, prompts, max_length=max_length), win_rate))
        # The caller's random state is none of our business, before and after.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = _network(encoder, dropout=self.config.dropout, mean=data[0][1].mean())
            _freeze(network, trained_layers=self.config.trained_layers)
            self.history_ = _train(
                network,
                data,
                config=self.config,
                padding=tokenizer.pad_token_id or 0,
                seed=seed,
                directory=directory,
                on_progress=on_progress,
            )
        self.network_, self.tokenizer_ = network, tokenizer
        return self

    def win_rate(self, prompts: Sequence[str]) -> np.ndarray:
        """Return the probability that the strong LLM is needed, (n,) float64 in [0, 1].

        A prompt's number does not depend on the others. Raises ArtifactError before `fit`.
        """
        if self.network_ is None:
            raise not_fitted(self.config.name)
        max_length = min(
            self.config.max_length, token_limit(self.network_["encoder"], self.tokenizer_)
        )
        ids = token_ids(self.tokenizer_, prompts, max_length=max_length) if len(prompts) else []
        import torch

        wanted = self.config.trainer.accelerator in ("gpu", "auto") and torch.cuda.is_available()
        self.network_.to("cuda" if wanted else "cpu").eval()
        return _win_rates(self.network_, ids)

    def save(self, directory: Path) -> None:
        """Save the encoder, its tokenizer and the layer on top; nothing else is needed to load."""
        if self.network_ is None:
            raise not_fitted(self.config.name)
        save_transformer(self.network_["encoder"], self.tokenizer_, directory / ENCODER_FOLDER)
        head = self.network_["head"]
        write_state(
            directory,
            router="hybrid",
            config=settings_json(self.config),
            values={"history": self.history_},
            arrays={
                "weight": head.weight.detach().cpu().numpy(),
                "bias": head.bias.detach().cpu().numpy(),
            },
            folders=[ENCODER_FOLDER],
        )

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Return the saved router, without asking any hub.

        Raises ArtifactError for files that are missing, damaged or of another format.
        """
        import torch

        state = read_state(directory, router="hybrid", config=Hybrid, arrays=["weight", "bias"])
        router = cls(state.config)
        encoder, router.tokenizer_ = load_transformer(str(directory / ENCODER_FOLDER))
        router.network_ = _network(encoder, dropout=state.config.dropout, mean=0.5)
        router.network_["head"].load_state_dict(
            {name: torch.from_numpy(array) for name, array in state.arrays.items()}
        )
        router.network_.eval()
        router.history_ = state.values["history"]
        return router


def _network(encoder: Any, *, dropout: float, mean: float) -> Any:
    """Return encoder and head; the head starts at the mean label, whatever the query."""
    import torch

    head = torch.nn.Linear(encoder.config.hidden_size, 1)
    share = float(np.clip(mean, 0.01, 0.99))
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.constant_(head.bias, float(np.log(share / (1 - share))))
    return torch.nn.ModuleDict(
        {"encoder": encoder, "dropout": torch.nn.Dropout(dropout), "head": head}
    )


def _logits(network: Any, ids: Any, mask: Any) -> Any:
    """Return one logit per row, (B,), of (B, length) tokens; mask: (B, length), or None for all."""
    hidden = network["encoder"](input_ids=ids, attention_mask=mask).last_hidden_state
    if mask is None:
        pooled = hidden.mean(dim=1)
    else:
        weight = mask.unsqueeze(-1).to(hidden.dtype)
        pooled = (hidden * weight).sum(dim=1) / weight.sum(dim=1)
    return network["head"](network["dropout"](pooled)).squeeze(-1)


def _win_rates(network: Any, ids: list[list[int]]) -> np.ndarray:
    import torch

    network.eval()
    device = network["head"].weight.device
    win_rate = np.empty(len(ids), dtype=np.float64)
    with torch.inference_mode():
        for rows, batch in equal_length_batches(ids):
            logits = _logits(network, torch.from_numpy(batch).to(device), None)
            win_rate[rows] = torch.sigmoid(logits.double())[: len(rows)].cpu().numpy()
    return win_rate


def _freeze(network: Any, *, trained_layers: int | None) -> None:
    """Leave only the encoder's last layers, and the head, to be trained."""
    import torch

    encoder = network["encoder"]
    network.train()
    if trained_layers is None:
        return
    depth = encoder.config.num_hidden_layers
    stacks = [
        module
        for module in encoder.modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == depth
    ]
    if len(stacks) != 1 or trained_layers > depth:
        raise ConfigError(
            f"trained_layers is {trained_layers}, and the encoder has {depth} layers in "
            f"{len(stacks)} stacks. Expected at most {depth} layers, in one stack. "
            "Correct trained_layers, or leave it out."
        )
    # Frozen layers stay in evaluation mode: their dropout would be noise that nothing learns from.
    encoder.requires_grad_(False).eval()
    for layer in stacks[0][depth - trained_layers :]:
        layer.requires_grad_(True).train()


class _Batches:
    """Batches of padded token numbers, masks and labels; their order follows from seed and epoch.

    Queries of like length share a batch, which saves a third of the time on short questions. A
    plain iterable, not a DataLoader: the data are in memory, and each device takes its own share.
    """

    def __init__(
        self, ids: list[list[int]], labels: np.ndarray, *, size: int, padding: int, seed: int
    ) -> None:
        self.ids, self.labels = ids, labels
        self.size, self.padding, self.seed = size, padding, seed
        self.epoch, self.rank, self.ranks = 0, 0, 1

    def __len__(self) -> int:
        return -(-len(self.ids) // (self.size * self.ranks))

    def __iter__(self) -> Iterator[tuple[Any, Any, Any]]:
        random = np.random.default_rng([self.seed, self.epoch])
        order = random.permutation(len(self.ids))
        # Sorted within pools, not as a whole, so that large data still mix; ties stay shuffled.
        lengths = np.array([len(tokens) for tokens in self.ids])
        pool = np.arange(len(order)) // (POOL_BATCHES * self.size)
        order = order[np.lexsort((lengths[order], pool))]
        batches = np.split(order, np.arange(self.size, len(order), self.size))
        batches = [batches[at] for at in random.permutation(len(batches))]
        # All devices must make the same number of steps: the last ones start from the front again.
        for step in range(len(self)):
            yield self.batch(batches[(step * self.ranks + self.rank) % len(batches)])

    def batch(self, rows: np.ndarray) -> tuple[Any, Any, Any]:
        """Return tokens (B, longest), mask (B, longest) and labels (B,) as tensors."""
        import torch

        longest = max(len(self.ids[row]) for row in rows)
        ids = np.full((len(rows), longest), self.padding, dtype=np.int64)
        mask = np.zeros((len(rows), longest), dtype=np.int64)
        for at, row in enumerate(rows):
            ids[at, : len(self.ids[row])] = self.ids[row]
            mask[at, : len(self.ids[row])] = 1
        labels = self.labels[rows].astype(np.float32)
        return torch.from_numpy(ids), torch.from_numpy(mask), torch.from_numpy(labels)


def _train(
    network: Any,
    data: list[tuple[list[list[int]], np.ndarray]],
    *,
    config: Hybrid,
    padding: int,
    seed: int,
    directory: Path | None,
    on_progress: Progress | None,
) -> list[dict[str, float | None]]:
    """Train ``network`` in place and return one dict per epoch.

    data: (token numbers, win rates) of the training and, if there is one, the validation part.
    """
    import torch

    batches = _Batches(*data[0], size=config.trainer.batch_size, padding=padding, seed=seed)
    checkpoint = None
    if directory is not None:
        directory.mkdir(parents=True, exist_ok=True)
        checkpoint = directory / f"hybrid-{_training_digest(network, data, config, seed)}.ckpt"
    resume = checkpoint is not None and _is_usable(checkpoint)
    deterministic = torch.are_deterministic_algorithms_enabled()
    with _quiet_lightning(), tempfile.TemporaryDirectory() as scratch:
        try:
            trainer = _trainer(config, scratch)
            module = _module(
                network,
                batches,
                data[1:],
                config=config,
                seed=seed,
                checkpoint=checkpoint,
                on_progress=on_progress,
            )
            trainer.fit(
                module, batches, ckpt_path=checkpoint if resume else None, weights_only=True
            )
        finally:
            torch.use_deterministic_algorithms(deterministic)
    if module.best is not None:
        network.load_state_dict(module.best, strict=False)
    network.float().cpu().eval()
    if checkpoint is not None and trainer.is_global_zero:
        checkpoint.unlink(missing_ok=True)
        checkpoint.with_suffix(".partial").unlink(missing_ok=True)
    return list(module.history)


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


def _trainer(config: Hybrid, scratch: str) -> Any:
    import lightning.pytorch as pl

    settings = config.trainer
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


def _module(
    network: Any,
    batches: _Batches,
    validation: list[tuple[list[list[int]], np.ndarray]],
    *,
    config: Hybrid,
    seed: int,
    checkpoint: Path | None,
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
            return _optimizer(network, config, steps=config.trainer.max_epochs * len(batches))

        def on_train_start(self) -> None:
            # The killed run may have got as far as its last epoch.
            self.trainer.should_stop = bool(self.history) and self.patience_is_spent()

        def on_train_epoch_start(self) -> None:
            # Order and dropout depend on seed and epoch only, so a resumed run repeats them.
            batches.epoch = self.current_epoch
            torch.manual_seed(seed + 1_000_003 * self.current_epoch + 7_919 * self.global_rank)
            self.losses = []

        def training_step(self, batch: Any, index: int) -> Any:
            ids, mask, labels = batch
            logits = _logits(network, ids, mask).float()
            loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels)
            self.losses.append((loss.detach(), len(labels)))
            if on_progress is not None:
                done = self.current_epoch * len(batches) + index + 1
                on_progress(done, config.trainer.max_epochs * len(batches))
            return loss

        def on_train_epoch_end(self) -> None:
            rows = sum(count for _, count in self.losses)
            entry: dict[str, Any] = {
                "epoch": self.current_epoch,
                "train_loss": sum(float(loss) * count for loss, count in self.losses) / rows,
                "validation_loss": None,
                "learning_rate": self.trainer.optimizers[0].param_groups[0]["lr"],
            }
            if validation:
                entry["validation_loss"] = _loss(network, *validation[0])
            if not np.isfinite(entry["train_loss"]):
                raise ConfigError(
                    f"Training of {config.name!r} diverged: its loss in epoch {self.current_epoch} "
                    f"is {entry['train_loss']}. Expected a finite loss. Lower "
                    "trainer.learning_rate, or choose another trainer.precision."
                )
            self.history.append(entry)
            self.trainer.should_stop = self.patience_is_spent()
            if validation and self.best_epoch() == len(self.history) - 1:
                self.best = _trained_state(network)
            if checkpoint is not None:
                partial = checkpoint.with_suffix(".partial")
                self.trainer.save_checkpoint(partial)
                if self.trainer.is_global_zero:
                    partial.replace(checkpoint)

        def best_epoch(self) -> int:
            return int(np.argmin([entry["validation_loss"] for entry in self.history]))

        def patience_is_spent(self) -> bool:
            waited = len(self.history) - 1 - self.best_epoch() if validation else 0
            return waited >= config.trainer.patience

        def on_save_checkpoint(self, state: dict[str, Any]) -> None:
            kept = _trained_state(network)
            state["state_dict"] = {f"network.{name}": value for name, value in kept.items()}
            state["best"], state["history"] = self.best, self.history

        def on_load_checkpoint(self, state: dict[str, Any]) -> None:
            self.best, self.history = state["best"], state["history"]

    return Training()


def _optimizer(network: Any, config: Hybrid, *, steps: int) -> dict[str, Any]:
    """AdamW; both rates rise linearly and fall linearly, biases and norms do not decay."""
    import torch

    settings = config.trainer
    groups = []
    for part, rate in (
        ("encoder", settings.learning_rate),
        ("head", settings.head_learning_rate),
    ):
        trained = [weight for weight in network[part].parameters() if weight.requires_grad]
        matrices = [weight for weight in trained if weight.ndim > 1]
        vectors = [weight for weight in trained if weight.ndim <= 1]
        groups += [
            {"params": matrices, "lr": rate, "weight_decay": settings.weight_decay},
            {"params": vectors, "lr": rate, "weight_decay": 0.0},
        ]
    optimizer = torch.optim.AdamW(groups)
    warmup = max(1, round(settings.warmup_share * steps))

    def share(step: int) -> float:
        return min((step + 1) / warmup, max(0.0, (steps - step) / max(1, steps - warmup)), 1.0)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def _loss(network: Any, ids: list[list[int]], labels: np.ndarray) -> float:
    """Return the mean binary cross-entropy as `win_rate` would have it, modes left as they were."""
    modes = [(module, module.training) for module in network.modules()]
    win_rate = np.clip(_win_rates(network, ids), 1e-7, 1 - 1e-7)
    for module, mode in modes:
        module.training = mode
    return float(-np.mean(labels * np.log(win_rate) + (1 - labels) * np.log1p(-win_rate)))


def _trained_state(network: Any) -> dict[str, Any]:
    return {
        name: weight.detach().clone()
        for name, weight in network.named_parameters()
        if weight.requires_grad
    }


def _training_digest(
    network: Any,
    data: list[tuple[list[list[int]], np.ndarray]],
    config: Hybrid,
    seed: int,
) -> str:
    """Hash what determines the trained weights."""
    digest = hashlib.sha256(weights_digest(network).encode())
    digest.update(config.model_dump_json(exclude={"name"}).encode())
    for ids, labels in data:
        digest.update(repr(ids).encode() + labels.tobytes())
    digest.update(str(seed).encode())
    return digest.hexdigest()[:16]


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
