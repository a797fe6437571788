"""Run an encoder-decoder over (source, target) pairs so that nothing shared is computed twice.

Sources of like length are encoded together; one decoder step on the start token fills the
cross-attention cache, which then serves every target of the source. Targets are decoded in order of
length, and only their own tokens are looked up in the vocabulary, so padding costs little.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

# A source with its targets, each with the number of its pair: as text, then as tokens.
Group = tuple[str, list[tuple[int, str]]]
TokenGroup = tuple[list[int], list[tuple[int, list[int]]]]
Row = tuple[int, int, list[int]]  # source's place in the block, pair number, target tokens
Scored = list[tuple[int, float]]

HEAD_ROWS = 64  # rows of vocabulary-wide log-probabilities held at once; 64 fit a CPU's cache


def seq2seq_batches(
    model: Any, tokenizer: Any, groups: list[Group], *, max_length: int, budget: int
) -> Iterator[Scored]:
    """Score under an encoder-decoder, at most about ``budget`` padded tokens in a pass.

    Yields lists of (pair number, mean log-likelihood per token), one for each forward pass.
    """

    def tokens(texts: list[str]) -> list[list[int]]:
        found = tokenizer(texts, truncation=True, max_length=max_length).input_ids
        return [ids or [tokenizer.eos_token_id] for ids in found]

    numbers = iter([number for _, targets in groups for number, _ in targets])
    flat = iter(tokens([target for _, targets in groups for _, target in targets]))
    encoded: list[TokenGroup] = [
        (ids, [(next(numbers), next(flat)) for _ in targets])
        for ids, (_, targets) in zip(tokens([text for text, _ in groups]), groups, strict=True)
    ]
    encoded.sort(key=lambda group: len(group[0]))
    block: list[TokenGroup] = []
    for group in encoded:
        if block and len(group[0]) * (len(block) + 1) > budget:
            yield from _decoded(model, block, budget)
            block = []
        block.append(group)
    yield from _decoded(model, block, budget)


def _decoded(model: Any, block: list[TokenGroup], budget: int) -> Iterator[Scored]:
    import torch
    from transformers.modeling_outputs import BaseModelOutput

    with torch.inference_mode():
        sources, mask = _padded([ids for ids, _ in block], model)
        states = model.get_encoder()(input_ids=sources, attention_mask=mask).last_hidden_state
        start = torch.full_like(sources[:, :1], model.config.decoder_start_token_id)
        first = model(
            encoder_outputs=BaseModelOutput(last_hidden_state=states),
            attention_mask=mask,
            decoder_input_ids=start,
            use_cache=True,
        )
    rows = [(place, *target) for place, (_, targets) in enumerate(block) for target in targets]
    rows.sort(key=lambda row: len(row[2]))
    batch: list[Row] = []
    for row in rows:
        if batch and (len(batch) + 1) * (sources.shape[1] + len(row[2])) > budget:
            yield _scored_rows(model, batch, states, mask, first)
            batch = []
        batch.append(row)
    yield _scored_rows(model, batch, states, mask, first)


def _scored_rows(
    model: Any, rows: list[Row], states: "torch.Tensor", mask: "torch.Tensor", first: Any
) -> Scored:
    """Score targets whose sources are encoded, whose start token has been decoded (``first``).

    The published code averages over all of a target's tokens but leaves out the likelihood of any
    that is the padding token, which a text can spell out; so does this.
    """
    import torch
    from transformers.modeling_outputs import BaseModelOutput

    device = states.device
    places = torch.tensor([place for place, _, _ in rows], device=device)
    lengths = [len(ids) for _, _, ids in rows]
    tokens, known = _padded([ids for _, _, ids in rows], model)
    values = torch.zeros(tokens.shape, dtype=torch.float64, device=device)
    values[:, 0] = log_probabilities(first.logits[:, 0], places, tokens[:, 0])
    with torch.inference_mode():
        if max(lengths) > 1:
            logits = model(
                encoder_outputs=BaseModelOutput(last_hidden_state=states[places]),
                attention_mask=mask[places],
                decoder_input_ids=tokens[:, :-1],
                past_key_values=_cache_rows(first.past_key_values, places),
                use_cache=True,
            ).logits
            real = known[:, 1:].flatten().nonzero().squeeze(1)  # no softmax over padding
            found = log_probabilities(logits.flatten(0, 1), real, tokens[:, 1:].flatten()[real])
            values[:, 1:][known[:, 1:].bool()] = found
    values[tokens == model.config.pad_token_id] = 0
    means = values.sum(1).cpu().numpy() / np.array(lengths)
    return [(number, float(mean)) for (_, number, _), mean in zip(rows, means, strict=True)]


def _padded(sequences: list[list[int]], model: Any) -> tuple["torch.Tensor", "torch.Tensor"]:
    import torch

    width = max(map(len, sequences))
    pad = model.config.pad_token_id
    tokens = torch.tensor([ids + [pad] * (width - len(ids)) for ids in sequences])
    mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in sequences])
    return tokens.to(model.device), mask.to(model.device)


def _cache_rows(cache: Any, places: "torch.Tensor") -> Any:
    """Copy the cached keys and values of some sources, one row for each of ``places``."""
    from transformers import DynamicCache, EncoderDecoderCache

    copy = EncoderDecoderCache(DynamicCache(), DynamicCache())
    for old, new in (
        (cache.self_attention_cache, copy.self_attention_cache),
        (cache.cross_attention_cache, copy.cross_attention_cache),
    ):
        for number, layer in enumerate(old.layers):
            new.update(layer.keys[places], layer.values[places], number)
            copy.is_updated[number] = True  # the decoder then leaves the source's states alone
    return copy


def log_probabilities(
    logits: "torch.Tensor", rows: "torch.Tensor", tokens: "torch.Tensor"
) -> "torch.Tensor":
    """Return log softmax(logits[row])[token] for each (row, token), shape (k,), float64.

    Only the rows asked for are normalised, each once, ``HEAD_ROWS`` at a time.
    """
    import torch

    kept, order = rows.unique(return_inverse=True)
    found = torch.empty(len(rows), dtype=torch.float64, device=logits.device)
    for start in range(0, len(kept), HEAD_ROWS):
        table = torch.log_softmax(logits[kept[start : start + HEAD_ROWS]].float(), dim=-1)
        here = (order >= start) & (order < start + HEAD_ROWS)
        found[here] = table[order[here] - start, tokens[here]].double()
    return found
