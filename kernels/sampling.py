"""Choosing tokens: the same row, seed and position give the same token, whatever the batch, device or split.

Two things make that so. The only randomness is one number per token, hashed from (seed, position). And everything a
token depends on is computed element by element or in integers: float sums depend on how many threads and rows take
part, integer sums do not. So probabilities become 40-bit weights before they are summed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.ma  # else np.unique imports it on its first call: 25 ms in the middle of a step
import numpy.typing as npt
import torch

from flexpipe_serve.pipeline.messages import LogprobResult, SampleSpec

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]

INVALID_TOKEN = -1
MIN_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON has not."""

_GREEDY_BELOW = 1e-5
_WEIGHT_BITS = 40
"""The likeliest token weighs 2^40; one 2^40 times less likely is never drawn."""
_INDEX_BITS = 22
_INDEX_MASK = 2**_INDEX_BITS - 1
"""Rank keys hold (weight or logit, -index): all different, so any sort and any selection gives the same order."""
_HOST_ROWS, _DEVICE_ROWS = 4, 64
"""Rows worked on at once. Large temporaries are memory that malloc returns to the system each time, which can take
the host twice as long; a device pays for each piece with launches."""
_MASK64 = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15


@dataclass(frozen=True, kw_only=True)
class SampleOutput:
    """The next tokens of a step."""

    tokens: Int32
    """[n]. ``INVALID_TOKEN`` where the row has a NaN, plus infinity, or no finite logit at all."""
    logprobs: tuple[LogprobResult | None, ...]
    """One a row (None: not asked for, or no valid token); empty where no row asked."""


def sample(logits: torch.Tensor, specs: Sequence[SampleSpec], histories: Int32) -> SampleOutput:
    """Choose the next token of every row.

    In this order: logit_bias, penalties (repetition over the whole history, presence and frequency over what was
    generated), temperature, min_p, top_k, top_p. Equally likely tokens rank by their index. Log probabilities are
    those of the model, before all of this. A vocabulary may have up to 4 million tokens.

    Args:
        logits: [n, vocab], float32, row i belongs to ``specs[i]``; not changed.
        specs: how to choose. Token ids in ``logit_bias`` must be below vocab.
        histories: the histories of all specs, ``num_history`` tokens each, one after the other.
    """
    edited = _edit(logits, specs, histories)
    greedy = [i for i, spec in enumerate(specs) if spec.temperature < _GREEDY_BELOW]
    drawn = [i for i, spec in enumerate(specs) if spec.temperature >= _GREEDY_BELOW]
    if drawn:
        tokens = torch.empty(len(specs), dtype=torch.int64, device=logits.device)
        if greedy:
            tokens[greedy] = _argmax(edited[greedy])
    else:
        tokens = _argmax(edited)
    for rows in _pieces(len(drawn), logits.device):
        tokens[drawn[rows]] = _draw(edited[drawn[rows]], [specs[i] for i in drawn[rows]])
    chosen: list[int] = tokens.tolist()
    return SampleOutput(tokens=np.array(chosen, np.int32), logprobs=_sample_logprobs(logits, specs, chosen))


def prompt_logprobs(logits: torch.Tensor, targets: Int32, num_logprobs: int) -> tuple[LogprobResult, ...]:
    """Log probability of ``targets[i]`` under row i, and the ``num_logprobs`` most likely tokens there.

    A row with a NaN or plus infinity gives NaN.

    Args:
        logits: [m, vocab], float32.
        targets: [m], int32.
    """
    return tuple(_logprobs(logits, targets.tolist(), [num_logprobs] * len(targets)))


def token_uniform(*, seed: int, position: int) -> float:
    """The random number in [0, 1) of the token at ``position``: element ``position`` of seed's splitmix64 stream."""
    return (_mix64(_mix64(seed + _GOLDEN) + (position + 1) * _GOLDEN) >> 11) / 2**53


def _mix64(value: int) -> int:
    value &= _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)


def _edit(logits: torch.Tensor, specs: Sequence[SampleSpec], histories: Int32) -> torch.Tensor:
    """The logits with bias and penalties; the same tensor where no row has any."""
    edited = logits
    start = 0
    for row, spec in enumerate(specs):
        history = histories[start : start + spec.num_history]
        start += spec.num_history
        if spec.logit_bias or spec.num_history:
            if edited is logits:
                edited = logits.clone()
            _edit_row(edited[row], spec, history)
    assert start == len(histories), f"histories has {len(histories)} tokens, the specs name {start}"
    return edited


def _edit_row(row: torch.Tensor, spec: SampleSpec, history: Int32) -> None:
    if spec.logit_bias:
        biased, biases = zip(*spec.logit_bias, strict=True)
        row[list(biased)] += torch.tensor(biases, dtype=row.dtype, device=row.device)
    if spec.repetition_penalty != 1.0:
        seen = torch.from_numpy(np.unique(history).astype(np.int64)).to(row.device)
        scores = row[seen]
        row[seen] = torch.where(scores > 0, scores / spec.repetition_penalty, scores * spec.repetition_penalty)
    if spec.frequency_penalty != 0.0 or spec.presence_penalty != 0.0:
        ids, counts = np.unique(history[spec.num_prompt :], return_counts=True)
        penalties = (spec.frequency_penalty * counts + spec.presence_penalty).astype(np.float32)
        row[torch.from_numpy(ids.astype(np.int64)).to(row.device)] -= torch.from_numpy(penalties).to(row.device)


def _pieces(num_rows: int, device: torch.device) -> Iterator[slice]:
    size = _HOST_ROWS if device.type == "cpu" else _DEVICE_ROWS
    return (slice(start, start + size) for start in range(0, num_rows, size))


def _argmax(logits: torch.Tensor) -> torch.Tensor:
    """The lowest index of each row's largest logit, [n]; INVALID_TOKEN for a row without a valid one."""
    # NumPy's argmax takes the host a tenth of the time of torch's. Both take the first NaN for the largest.
    tokens = torch.from_numpy(logits.numpy().argmax(-1)) if logits.device.type == "cpu" else logits.argmax(-1)
    return tokens.where(logits.gather(-1, tokens[:, None])[:, 0].isfinite(), INVALID_TOKEN)


def _draw(logits: torch.Tensor, specs: Sequence[SampleSpec]) -> torch.Tensor:
    """One random token for each row of ``logits`` [n, vocab], INVALID_TOKEN as above; overwrites them."""
    device = logits.device
    peaks = logits.amax(-1, keepdim=True)
    valid = peaks.isfinite()
    scores = logits.sub_(peaks)
    if not valid.all():  # turned into integers, a NaN would be anything
        scores.masked_fill_(~valid, 0.0)
    temperatures = torch.tensor([[spec.temperature] for spec in specs], dtype=torch.float32, device=device)
    ratios = scores.div_(temperatures).exp_()
    if any(spec.min_p > 0.0 for spec in specs):
        floors = torch.tensor([[spec.min_p] for spec in specs], dtype=torch.float32, device=device)
        ratios.masked_fill_(ratios < floors, 0.0)
    weights = ratios.mul_(2.0**_WEIGHT_BITS).long()
    cut_rows = [i for i, spec in enumerate(specs) if 0 < spec.top_k < weights.shape[1] or spec.top_p < 1.0]
    if device.type == "cpu":
        for i in cut_rows:
            _cut_row(weights[i].numpy(), top_k=specs[i].top_k, top_p=specs[i].top_p)
    elif cut_rows:
        weights[cut_rows] = _cut_rows_by_sorting(weights[cut_rows], [specs[i] for i in cut_rows])
    # The sum runs in the order of the vocabulary, not of probability: noise in the logits (another batch size, another
    # matrix kernel) then cannot make two tokens change places.
    sums = weights.cumsum(-1)
    uniforms = [[token_uniform(seed=spec.seed, position=spec.position)] for spec in specs]
    # No number exceeds 1 - 2^-53, so even the rounded product stays below the total.
    points = (torch.tensor(uniforms, dtype=torch.float64, device=device) * sums[:, -1:]).long()
    return torch.searchsorted(sums, points, right=True).where(valid, INVALID_TOKEN)[:, 0]


def _cut_row(weights: Int64, *, top_k: int, top_p: float) -> None:
    """Set the weights [vocab] of the tokens outside top_k and top_p to 0, in place, on the host.

    top_k keeps the k likeliest tokens; top_p, the fewest of these that hold at least ``top_p`` of their weight.
    Sorts only tokens that can matter.
    """
    limited = 0 < top_k < len(weights)
    # Tokens that weigh less than (1 - top_p) / vocab of all hold less than 1 - top_p together: top_p keeps none.
    share = (1.0 - top_p) / len(weights)
    floor = int(np.partition(weights, -top_k)[-top_k] if limited else share * int(weights.sum()))
    candidates = np.flatnonzero(weights >= max(1, floor))
    keys = (weights[candidates] << _INDEX_BITS) - candidates
    if limited and top_k < len(keys):  # some weigh the same
        keys = np.partition(keys, len(keys) - top_k)[-top_k:]
    if top_p < 1.0:
        keys = np.sort(keys)[::-1]
        ranked = (keys + _INDEX_MASK) >> _INDEX_BITS
        sums = np.cumsum(ranked)
        considered = int(sums[-1] if limited else weights.sum())
        keys = keys[: np.count_nonzero(sums - ranked < top_p * considered)]
    kept = -keys & _INDEX_MASK
    kept_weights = weights[kept]
    weights[:] = 0
    weights[kept] = kept_weights


def _cut_rows_by_sorting(weights: torch.Tensor, specs: Sequence[SampleSpec]) -> torch.Tensor:
    """What :func:`_cut_row` does, to all rows of ``weights`` [n, vocab] at once and without waiting for the device."""
    device, vocab = weights.device, weights.shape[1]
    limits = torch.tensor([[spec.top_k if 0 < spec.top_k < vocab else vocab] for spec in specs], device=device)
    shares = torch.tensor([[spec.top_p] for spec in specs], dtype=torch.float64, device=device)
    keys = (weights << _INDEX_BITS) - torch.arange(vocab, device=device)
    ranked_keys = keys.sort(dim=-1, descending=True).values
    ranked = (ranked_keys + _INDEX_MASK) >> _INDEX_BITS
    sums = ranked.cumsum(-1)
    considered = sums.gather(-1, limits - 1)
    num_kept = (sums - ranked < shares * considered).sum(-1, keepdim=True).minimum(limits)
    return weights.masked_fill(keys < ranked_keys.gather(-1, num_kept - 1), 0)


def _sample_logprobs(
    logits: torch.Tensor, specs: Sequence[SampleSpec], tokens: Sequence[int]
) -> tuple[LogprobResult | None, ...]:
    if all(spec.num_logprobs < 0 for spec in specs):
        return ()
    rows = [i for i, spec in enumerate(specs) if spec.num_logprobs >= 0 and tokens[i] != INVALID_TOKEN]
    results: list[LogprobResult | None] = [None] * len(specs)
    found = _logprobs(logits[rows], [tokens[i] for i in rows], [specs[i].num_logprobs for i in rows])
    for row, result in zip(rows, found, strict=True):
        results[row] = result
    return tuple(results)


def _logprobs(logits: torch.Tensor, tokens: Sequence[int], counts: Sequence[int]) -> list[LogprobResult]:
    """For each row, the log probability of ``tokens[i]`` and the ``counts[i]`` most likely tokens."""
    results = []
    for rows in _pieces(len(tokens), logits.device):
        logprobs = logits[rows].log_softmax(-1)
        index = torch.tensor(tokens[rows], device=logits.device)[:, None]
        num_top = min(max(counts[rows]), logits.shape[1])
        top_ids = _likeliest(logits[rows], num_top) if num_top else index[:, :0]
        values = logprobs.gather(-1, torch.cat((index, top_ids), dim=-1)).clamp(min=MIN_LOGPROB)
        for count, ids, (own, *top) in zip(counts[rows], top_ids.tolist(), values.tolist(), strict=True):
            results.append(LogprobResult(own, tuple(zip(ids[:count], top[:count], strict=True))))
    return results


def _likeliest(logits: torch.Tensor, num_top: int) -> torch.Tensor:
    """Indices [n, num_top] of the largest logits, falling, equal ones by their index."""
    bits = (logits + 0.0).view(torch.int32)  # + 0.0 turns -0.0 into 0.0
    bits ^= (bits >> 31).bitwise_and_(0x7FFFFFFF)  # integers in the order of the floats
    keys = bits.long()
    keys <<= _INDEX_BITS
    keys -= torch.arange(logits.shape[1], device=logits.device)
    return keys.topk(num_top, dim=-1).values.neg_().bitwise_and_(_INDEX_MASK)
