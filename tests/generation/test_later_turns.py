"""Later turns of a chat, and chunks of a prompt, that are pruned on request: what was cached before stays as it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from test_decode import CUT, Followed, some
from test_generation import PLAN, blocks_of, compiled, decoder, generated, left_padded, prompts
from torch import Tensor

from decoding import Reference
from prunepass.errors import OptionError, RefusalError
from windowed import windowed

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def joined(ids: Tensor, mask: Tensor, new: Tensor, new_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    new_mask = torch.ones_like(new) if new_mask is None else new_mask
    return torch.cat([ids, new], 1), torch.cat([mask, new_mask], 1)


def turns(run: Followed, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """A prompt of padded rows and so many turns, each with some tokens of an answer."""
    ids, mask = run.run(*left_padded([19, 12]), 2)
    for seed, length in enumerate(lengths):
        ids, mask = run.run(*joined(ids, mask, prompts(2, length, seed=seed)), 2, new=length + 1)
    return ids, mask


@pytest.mark.parametrize("name", some(["llama"], CUT))
def test_each_turn_is_pruned_by_itself(name: str) -> None:
    run = Followed(name, later_turns=True)
    turns(run, [9, 7])
    assert run.worst < 1e-10
    assert run.lengths() == run.exact.lengths()
    assert run.lengths()[1] < 0.7 * run.lengths()[0]


@pytest.mark.slow
def test_graphs_of_any_length() -> None:
    run = Followed("llama", later_turns=True, dynamic=True)
    turns(run, [9, 7, 12])
    assert run.worst < 1e-10


@pytest.mark.parametrize("later_turns", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_turns_of_different_lengths(later_turns: bool) -> None:
    """Padded on the left, within the text: empty slots in what pruned layers cache."""
    run = Followed("llama", later_turns=later_turns)
    ids, mask = run.run(*left_padded([19, 12]), 2)
    turn, own = left_padded([5, 9])
    run.run(*joined(ids, mask, turn, own), 4, new=10)
    assert run.worst < 1e-10


@pytest.mark.slow
def test_caches_are_cut_over_turns() -> None:
    run = Followed("llama", 4, 0.6, later_turns=True)
    turns(run, [9, 7])
    assert run.worst < 1e-10
    assert run.lengths() == run.exact.lengths()


@pytest.mark.parametrize("later_turns", [True, False])
def test_a_prompt_in_chunks(later_turns: bool) -> None:
    """Each chunk is pruned by itself; without the option only the first, and the others keep their tokens."""
    ids = prompts(2, 23)
    found = generated(compiled(decoder("llama"), later_turns=later_turns), ids, prefill_chunk_size=8)
    exact = Reference(model := decoder("llama", use_cache=False), list(blocks_of(model)), PLAN)
    wanted = torch.empty(0)
    for start in range(0, 23, 8):
        part = ids[:, : start + 8]
        wanted = exact.call(part, torch.ones_like(part), min(8, 23 - start), prune=later_turns or not start)
    for step, logits in enumerate(found.logits):
        if step:
            rows = found.sequences[:, : 23 + step]
            wanted = exact.call(rows, torch.ones_like(rows), 1)
        assert (logits - wanted[:, -1]).abs().max() < 1e-6  # generate() rounds logits to float32
    lengths = [layer.keys.shape[2] for layer in found.past_key_values.layers]
    assert lengths == exact.lengths()


@pytest.mark.slow
@pytest.mark.parametrize("target", ["inductor", "openvino", "onnxruntime"])
def test_every_target_prunes_turns_alike(target: str) -> None:
    config = {"INFERENCE_PRECISION_HINT": "f32"} if target == "openvino" else {}
    runs: dict[str, dict[str, Any]] = {"eager": {}, target: {"config": config}}
    exact, found = (
        generated(
            compiled(decoder("llama").float(), target=t, later_turns=True, **o), prompts(2, 23), prefill_chunk_size=9
        )
        for t, o in runs.items()
    )
    assert torch.equal(found.sequences, exact.sequences)
    assert (torch.stack(found.logits) - torch.stack(exact.logits)).abs().max() < 1e-4


class TestRefusals:
    """With the prompt already, before a token is produced."""

    def refused(self, model: Any, says: str, kind: type[Exception] = RefusalError, later_turns: Any = True) -> None:
        fast = compiled(model, later_turns=later_turns)
        with pytest.raises(Exception, match=says) as caught:
            generated(fast, prompts(2, 17))
        assert isinstance(getattr(caught.value, "inner_exception", caught.value), kind)

    def test_windows(self) -> None:
        self.refused(windowed("gemma3"), "attend in a window")

    def test_attention_that_is_spelled_out(self) -> None:
        self.refused(decoder("llama", attention="eager"), "spells its attention out")

    def test_another_value(self) -> None:
        self.refused(decoder("llama"), "True or False, not 1", OptionError, later_turns=1)
