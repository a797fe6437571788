"""Run a causal model over (source, target) pairs so that nothing shared is computed twice.

Prompts and targets are laid into a tree, in which texts that begin alike share nodes: a prompt with
all its targets, prompts of one template, targets that open with the same words. The model reads a
whole tree in one pass. A token attends to its ancestors only and has its depth as its position, so
each path sees what it would see alone; there is no padding at all.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from conf.errors import ConfigError
from metrics.bartscore.checkpoint import longest_path
from metrics.bartscore.seq2seq import Group, Scored, TokenGroup, log_probabilities

if TYPE_CHECKING:
    import torch


def causal_batches(
    model: Any,
    tokenizer: Any,
    groups: list[Group],
    *,
    max_length: int,
    template: str,
    budget: int,
) -> Iterator[Scored]:
    """Score under a causal model, about ``budget`` tokens in a pass (a path is never cut).

    Yields lists of (pair number, mean log-likelihood per token), one for each forward pass.
    """
    encoded: list[TokenGroup] = []
    for source, targets in groups:
        texts = [target for _, target in targets]
        ids = tokenizer(
            texts, add_special_tokens=False, truncation=True, max_length=max_length
        ).input_ids
        paths = [
            (number, path or [tokenizer.eos_token_id])
            for (number, _), path in zip(targets, ids, strict=True)
        ]
        prompt = _prompt(tokenizer, template, source, max_length)
        encoded.append((prompt, sorted(paths, key=lambda path: path[1])))
        _check_length(model, len(prompt) + max(len(path) for _, path in paths))
    encoded.sort(key=lambda group: group[0])  # like beginnings come to lie in one tree
    for tree in _trees(encoded, budget):
        yield _scored_tree(model, tree)


def _prompt(tokenizer: Any, template: str, source: str, max_length: int) -> list[int]:
    ids = tokenizer(source, add_special_tokens=False, verbose=False).input_ids
    if len(ids) > max_length:
        source = tokenizer.decode(ids[:max_length])
    text = template.replace("{source}", source)
    plain = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    ids = tokenizer(text, verbose=False).input_ids
    end = [tokenizer.eos_token_id]
    if ids[-1:] == end != plain[-1:]:  # some tokenizers close every text; the target goes on here
        ids = ids[:-1]
    return ids or end


def _check_length(model: Any, length: int) -> None:
    limit = longest_path(model.config)
    if length > limit:
        raise ConfigError(
            f"A prompt and its target have {length} tokens together. Expected at most the {limit} "
            "that the scoring model reads. Lower max_length, which bounds source and target each."
        )


class _Tree:
    """Token sequences that share beginnings: each distinct beginning is one node."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self.depths: list[int] = []
        self.targets: list[tuple[int, list[int], list[int]]] = []  # number, rows, tokens
        self._nodes: dict[tuple[int, int], int] = {}

    def __len__(self) -> int:
        return len(self.tokens)

    def growth(self, path: list[int]) -> int:
        """Return how many nodes a path would add."""
        node = -1
        for depth, token in enumerate(path):
            node = self._nodes.get((node, token), -2)
            if node == -2:
                return len(path) - depth
        return 0

    def add(self, number: int, prompt: list[int], target: list[int]) -> None:
        """Add a target; token t of it is predicted by the node before it, so its last adds none."""
        node, rows = -1, []
        for depth, token in enumerate(prompt + target[:-1]):
            step = (node, token)
            if step not in self._nodes:
                self._nodes[step] = len(self.tokens)
                self.tokens.append(token)
                self.parents.append(node)
                self.depths.append(depth)
            node = self._nodes[step]
            if depth >= len(prompt) - 1:
                rows.append(node)
        self.targets.append((number, rows, target))

    def visible(self) -> np.ndarray:
        """Return which node (column) each node (row) sees: its ancestors and itself."""
        seen = np.zeros((len(self), len(self)), dtype=bool)
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                seen[node] = seen[parent]
            seen[node, node] = True
        return seen


def _trees(groups: list[TokenGroup], budget: int) -> Iterator[_Tree]:
    """Fill trees of about ``budget`` nodes, keeping a source's targets together where they fit."""
    tree = _Tree()
    for prompt, targets in groups:
        alone = _Tree()
        for number, target in targets:
            alone.add(number, prompt, target)
        if len(tree) and len(tree) + len(alone) > budget:
            yield tree
            tree = _Tree()
        for number, target in targets:
            if len(tree) and len(tree) + tree.growth(prompt + target[:-1]) > budget:
                yield tree
                tree = _Tree()
            tree.add(number, prompt, target)
    if len(tree):
        yield tree


def _scored_tree(model: Any, tree: _Tree) -> Scored:
    import torch

    rows = torch.tensor([row for _, rows, _ in tree.targets for row in rows])
    tokens = torch.tensor([token for _, _, target in tree.targets for token in target])
    kept, order = rows.unique(return_inverse=True)
    logits = tree_logits(model, tree.tokens, tree.depths, tree.visible(), kept)
    device = logits.device
    values = log_probabilities(logits, order.to(device), tokens.to(device)).cpu().numpy()
    lengths = [len(target) for _, _, target in tree.targets]
    ends = np.cumsum(lengths)
    return [
        (number, float(values[end - length : end].mean()))
        for (number, _, _), length, end in zip(tree.targets, lengths, ends, strict=True)
    ]


def tree_logits(
    model: Any, tokens: list[int], depths: list[int], visible: np.ndarray, kept: "torch.Tensor"
) -> "torch.Tensor":
    """Return next-token logits, shape (kept, vocabulary), of some nodes of one tree."""
    import torch

    hidden = torch.from_numpy(~visible).to(model.device)
    mask = torch.zeros(hidden.shape, dtype=model.dtype, device=model.device)
    mask.masked_fill_(hidden, torch.finfo(model.dtype).min)
    with torch.inference_mode():
        return model(
            input_ids=torch.tensor([tokens], device=model.device),
            position_ids=torch.tensor([depths], device=model.device),
            attention_mask=mask[None, None],
            logits_to_keep=kept.to(model.device),
            use_cache=False,
        ).logits[0]


def check_tree_attention(model: Any, name: str) -> None:
    """Raise ConfigError unless the model reads a branch of a tree as it would read it alone.

    Models with recurrent layers need not heed attention masks, and would score wrongly in silence.
    """
    import torch

    try:
        error = _branch_error(model)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError) as refused:
        raise _not_attention_only(model, name, str(refused)) from refused
    if not error < 0.25:  # bfloat16 reaches 0.06; a branch that sees another moves it by about 3
        raise _not_attention_only(model, name, f"relative error {error:.2g}")


def _branch_error(model: Any) -> float:
    import torch

    tree = _Tree()
    tree.add(0, [3, 5], [7, 4, 6, 9])
    tree.add(1, [3, 5], [8, 4, 9])
    rows = torch.tensor(tree.targets[1][1])
    found = tree_logits(model, tree.tokens, tree.depths, tree.visible(), rows).float()
    with torch.inference_mode():
        alone = model(torch.tensor([[3, 5, 8, 4]], device=model.device), use_cache=False).logits
    expected = alone[0, 1:].float()
    return float((found - expected).abs().max() / expected.std())


def _not_attention_only(model: Any, name: str, reason: str) -> ConfigError:
    return ConfigError(
        f"Model {name!r} ({model.config.model_type}) cannot keep texts apart that are read in one "
        f"pass: {reason}. Expected an attention-only causal language model. Name another "
        "checkpoint."
    )
