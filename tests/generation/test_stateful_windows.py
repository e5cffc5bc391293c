"""Causal models with layers that attend in a window, exported with their cache as states."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("openvino")

import numpy as np
import openvino
import torch
from test_stateful import FULL, ONE, PLAN, Compiled, Program, decoder
from torch import Tensor

import hooks
import oracle
import prunepass
from prunepass import PrunePlan
from prunepass.backends import _openvino_windows
from prunepass.errors import ExportError
from prunepass.generation.stateful import stateful_program
from vocabulary import tiny_tokenizer
from windowed import WINDOW, WINDOWED

#: so many that the window has moved on from the prompt
STEPS = WINDOW + 3
_LAST_FULL = ["sliding_attention"] * 3 + ["full_attention"]
MODELS: dict[str, dict[str, Any]] = {
    "mistral": {},
    "gemma3": {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2},
    "qwen2": {"layer_types": _LAST_FULL},
    "olmo3": {"layer_types": _LAST_FULL},
    "cohere2": {"layer_types": _LAST_FULL},
}
NAMES = ["gemma3", *(pytest.param(n, marks=pytest.mark.slow) for n in MODELS if n != "gemma3")]


def windowed(name: str, blocks: int = 3, **options: Any) -> Any:
    own = {k: v[:blocks] for k, v in MODELS[name].items()}
    return decoder(WINDOWED[name], blocks, **own, **options)


def rows(lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Ids and mask, [B, the longest], padded on the left."""
    width = max(lengths)
    ids = torch.randint(5, 60, (len(lengths), width), generator=torch.Generator().manual_seed(3))
    return ids, torch.stack([(torch.arange(width) >= width - n).long() for n in lengths])


def followed(call: Any, model: Any, plan: PrunePlan, ids: Tensor, mask: Tensor) -> tuple[float, Tensor]:
    """Greedy search of the whole unpruned model, which hides what was pruned: the largest difference of logits from
    it, and its tokens [B, STEPS]."""
    prompt, new, worst, blocks = ids.shape[1], ids, 0.0, model.config.num_hidden_layers
    for _ in range(STEPS):
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = call(new, mask, positions[:, -new.shape[1] :])
        given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        exact = hooks.run_hooked(model, hooks.layers_of(model, blocks), plan, given, prompt).output.logits[:, -1]
        worst = max(worst, float((logits - exact).abs().max()))
        new = exact.argmax(-1, keepdim=True)
        ids, mask = torch.cat([ids, new], 1), torch.cat([mask, torch.ones_like(new)], 1)
    return worst, ids[:, prompt:]


def of_oracle(name: str, **options: Any) -> Any:
    model = windowed(name, **options)
    model.config.use_cache = False
    return model


@pytest.mark.parametrize("name", NAMES)
def test_each_step_sees_what_is_kept_and_in_the_window(name: str) -> None:
    """Prompts longer than the window, at its edge and shorter; alone, and padded beside longer ones."""
    with oracle.float64_softmax():
        program = Program(stateful_program(windowed(name, dtype=torch.float64), PLAN))
        model = of_oracle(name, dtype=torch.float64)
        for lengths in ([23, 16, 4], [WINDOW], [5]):
            program.states = {}
            assert followed(program, model, PLAN, *rows(lengths))[0] < 1e-10


def test_without_stages_it_is_the_model_itself() -> None:
    ids, mask = rows([23, 11])
    model = windowed("gemma3")
    program = Program(stateful_program(model, None))
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        exact = model(ids, attention_mask=mask, position_ids=positions).logits
    for start, end in ((0, 9), (9, 20), (20, 21), (21, 23)):  # in four calls as in one
        found = program(ids[:, start:end], mask[:, :end], positions[:, start:end])
        assert (found - exact[:, end - 1]).abs().max() < 1e-5


def test_positions_go_on_past_256() -> None:
    """Where one digit would not do: the text in one call, and in four."""
    ids, mask = rows([300])
    model = windowed("mistral", blocks=2, max_position_embeddings=400)
    positions = torch.arange(300)[None]
    with torch.no_grad():
        exact = model(ids, attention_mask=mask, position_ids=positions).logits
    program = Program(stateful_program(model, None))
    for start, end in ((0, 250), (250, 259), (259, 260), (260, 300)):
        found = program(ids[:, start:end], mask[:, :end], positions[:, start:end])
        assert (found - exact[:, end - 1]).abs().max() < 1e-5


def test_chunks_of_the_text_are_refused() -> None:
    model = windowed("mistral")
    model.config.layer_types = ["chunked_attention"] * 3
    model.config.attention_chunk_size = 5
    with pytest.raises(ExportError, match="chunked_attention"):
        stateful_program(model, PLAN)


def attentions(folder: Path) -> int:
    model = openvino.Core().read_model(folder / "openvino_model.xml")
    return sum(op.get_type_name() == "ScaledDotProductAttention" for op in model.get_ops())


@pytest.mark.parametrize("length", [4, pytest.param(WINDOW, marks=pytest.mark.slow)])
def test_blocks_of_queries_see_their_window(length: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks as long as the window, and shorter; prompts of more than two windows, of less, and later ones."""
    monkeypatch.setattr(_openvino_windows, "LENGTH", length)
    monkeypatch.setattr(_openvino_windows, "SPARE", 0)
    folder = prunepass.export(windowed("gemma3"), ONE, tmp_path / "pruned", to="openvino", stateful=True)
    assert attentions(folder) == 3 + 2  # of three layers two have a window
    run, model = Compiled(folder), of_oracle("gemma3")
    for lengths in ([37, 20, 4], [WINDOW + 1]):
        assert followed(run, model, ONE, *rows(lengths))[0] < 1e-4
        run.request.reset_state()
    whole = Program(stateful_program(windowed("gemma3"), ONE))  # whose caches hold all
    ids, mask = rows([70])
    positions = torch.arange(70)[None]
    for start, end in ((0, 40), (40, 41), (41, 49), (49, 69), (69, 70)):  # turns of a chat
        given = ids[:, start:end], mask[:, :end], positions[:, start:end]
        assert (run(*given) - whole(*given)).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_half_precision_and_the_model_cache(dtype: torch.dtype, tmp_path: Path) -> None:
    """A folder that OpenVINO compiles, and reads again from its cache."""
    ids, mask = rows([37])
    exact = of_oracle("gemma3", blocks=2)(ids).logits[:, -1].detach()
    model = windowed("gemma3", 2, dtype=dtype)
    folder = prunepass.export(model, None, tmp_path / "whole", to="openvino", stateful=True)
    settings = {**FULL, "CACHE_DIR": str(tmp_path / "cache")}
    given = {"input_ids": ids.numpy(), "attention_mask": mask.numpy(), "position_ids": np.arange(37)[None]}
    for _ in range(2):
        compiled = openvino.Core().compile_model(folder / "openvino_model.xml", "CPU", settings)
        found = compiled({**given, "beam_idx": np.zeros(1, np.int32)})["logits"][:, -1]
        assert np.abs(found - exact.numpy()).max() < (0.02 if dtype == torch.float16 else 0.1)
    assert any((tmp_path / "cache").iterdir())


@pytest.mark.parametrize("name", [pytest.param("mistral", marks=pytest.mark.slow), "gemma3"])
def test_openvino_gives_the_same(name: str, tmp_path: Path) -> None:
    """The folder alone, and in openvino-genai."""
    folder = prunepass.export(windowed(name, 2), ONE, tmp_path / name, tokenizer=tiny_tokenizer())
    run = Compiled(folder)
    for lengths in ([23, 16, 5], [23]):
        ids, mask = rows(lengths)
        worst, exact = followed(run, of_oracle(name, blocks=2), ONE, ids, mask)
        assert worst < 1e-4
        run.request.reset_state()
    genai = pytest.importorskip("openvino_genai")
    config = genai.GenerationConfig(max_new_tokens=STEPS, do_sample=False, ignore_eos=True)
    config.eos_token_id, config.stop_token_ids = 0, {0}
    pipeline = genai.LLMPipeline(str(folder), "CPU", **FULL)
    assert pipeline.generate(openvino.Tensor(ids.numpy()), config).tokens == exact.tolist()
