"""Causal models exported with their cache as OpenVINO's states."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("openvino")

import numpy as np
import openvino
import torch
from torch import Tensor

import prunepass
import zoo
from prunepass import Protect, PrunePlan, ScorerSpec, Stage
from prunepass.errors import ExportError, OptionError, RefusalError
from prunepass.generation.stateful import StatefulProgram, stateful_program
from vocabulary import tiny_tokenizer

PLAN = PrunePlan([Stage(1, 0.6), Stage(2, 0.3)], ScorerSpec("norm"), Protect(first=1, last=1))
#: for what is converted, which takes the longer the more stages there are
ONE = PrunePlan([Stage(1, 0.6)], ScorerSpec("norm"), Protect(first=1, last=1))
STEPS = 5
FULL = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
#: [B, S] ids of a call, [B, P + S] mask, [B, S] positions -> [B, V] logits
Call = Callable[[Tensor, Tensor, Tensor], Tensor]


def decoder(name: str | zoo.Species = "llama", blocks: int = 3, **options: Any) -> Any:
    options.setdefault("dtype", torch.float32)
    layers = {"n_layer" if name == "gpt2" else "num_hidden_layers": blocks}
    return zoo.tiny(name, "causal", **layers, use_cache=True, eos_token_id=None, **options)


def rows() -> tuple[Tensor, Tensor]:
    """Two prompts of 23 and 16 tokens, the shorter one padded on the left."""
    ids = torch.randint(5, 60, (2, 23), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    return ids, mask


def small() -> Any:
    return decoder(blocks=2)


def generated(model: Any, ids: Tensor, mask: Tensor, plan: PrunePlan = PLAN) -> Tensor:
    """[B, STEPS, V] logits of greedy search in PyTorch, pruned by torch.compile."""
    torch._dynamo.reset()
    model.compile(backend="tokprune", options={"plan": plan, "target": "eager"})
    options = {"max_new_tokens": STEPS, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with torch.no_grad():
        found = model.generate(ids, attention_mask=mask, pad_token_id=0, **options)
    return torch.stack(found.logits, dim=1)


def greedy(call: Call, ids: Tensor, mask: Tensor, past: int = 0) -> Tensor:
    """[B, STEPS, V] logits of greedy search by hand, after ``past`` tokens that the caches hold."""
    logits, positions = [], (mask.cumsum(1) - 1).clamp(min=0)[:, past:]
    for _ in range(STEPS):
        logits.append(call(ids, mask, positions))
        positions = mask.sum(1, keepdim=True)
        ids = logits[-1].argmax(-1, keepdim=True)
        mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
    return torch.stack(logits, dim=1)


class Program:
    """A `StatefulProgram` called from step to step."""

    def __init__(self, found: StatefulProgram) -> None:
        self._found, self._module = found, found.program.module(check_guards=False)
        fakes = {n.name: n.meta["val"] for n in found.program.graph.find_nodes(op="placeholder") if "val" in n.meta}
        self._shapes = {name: fakes[name].shape for name in found.states}
        self.states: dict[str, Tensor] = {}

    def __call__(self, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        if not self.states:
            self.states = {n: torch.zeros(len(ids), s[1], 0, s[3]) for n, s in self._shapes.items()}
        past, own = mask[:, : -ids.shape[1]], mask[:, -ids.shape[1] :]
        with torch.no_grad():
            out = self._module(input_ids=ids, attention_mask=own, position_ids=positions, past_mask=past, **self.states)
        self.states = {name: out[after] for name, after in self._found.states.items()}
        return out["logits"][:, -1]


class Compiled:
    """An exported folder, read by the runtime alone."""

    def __init__(self, folder: Path, core: Any = None) -> None:
        self.compiled = (core or openvino.Core()).compile_model(folder / "openvino_model.xml", "CPU", FULL)
        self.request = self.compiled.create_infer_request()
        self.beams: list[int] | None = None

    def __call__(self, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        beams = np.array(self.beams or range(len(ids)), dtype=np.int32)
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions.contiguous()}
        out = self.request.infer({**{k: v.numpy() for k, v in inputs.items()}, "beam_idx": beams})
        return torch.from_numpy(out["logits"][:, -1].copy())

    def cut(self, tokens: int) -> None:
        """Forget the last so many."""
        for state in self.request.query_state() if tokens else ():
            held = state.state.data
            state.state = openvino.Tensor(np.ascontiguousarray(held[:, :, : held.shape[2] - tokens]))

    def lengths(self) -> dict[str, int]:
        """Of each layer's keys, by its number."""
        keys = {s.name.split("_")[1]: s.state.shape[2] for s in self.request.query_state() if "key" in s.name}
        return dict(sorted(keys.items()))


@pytest.fixture(scope="module", name="program")
def _program() -> StatefulProgram:
    return stateful_program(decoder(), PLAN)


@pytest.fixture(scope="module", name="folder")
def _folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prunepass.export(small(), ONE, tmp_path_factory.mktemp("out") / "llama", tokenizer=tiny_tokenizer(20))


@pytest.fixture(scope="module", name="exact")
def _exact() -> Tensor:
    """What the folder's model gives in PyTorch, as `generated` does for `rows`."""
    return generated(small(), *rows(), ONE)


@pytest.fixture(name="run")
def _run(folder: Path) -> Compiled:
    return Compiled(folder)


def test_one_program_serves_the_prompt_and_every_token_after_it(program: StatefulProgram) -> None:
    ids, mask = rows()
    assert (greedy(Program(program), ids, mask) - generated(decoder(), ids, mask)).abs().max() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "qwen3", "gemma"])
def test_so_it_does_in_other_architectures(name: str) -> None:
    ids, mask = rows()
    call = Program(stateful_program(decoder(name), PLAN))
    assert (greedy(call, ids, mask) - generated(decoder(name), ids, mask)).abs().max() < 1e-5


def test_without_stages_it_is_the_model_itself(exact: Tensor) -> None:
    ids, mask = rows()
    model = small()
    with torch.no_grad():
        dense = model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits[:, -1]
    program = stateful_program(model, None)
    logits = greedy(Program(program), ids, mask)
    assert (logits[:, 0] - dense).abs().max() < 1e-5
    assert (logits[:, 0] - exact[:, 0]).abs().max() > 1e-4  # which the plan changes
    turns, positions = Program(program), torch.arange(23).expand(2, -1)  # in two calls as in one
    turns(ids[:, :9], mask[:, :9], positions[:, :9])
    with torch.no_grad():
        whole = model(ids, attention_mask=mask, position_ids=positions).logits[:, -1]
    assert (turns(ids[:, 9:], mask, positions[:, 9:]) - whole).abs().max() < 1e-5


def test_a_scorer_of_attention_reads_the_calls_own_keys() -> None:
    ids, mask = rows()
    plan = PrunePlan(ONE.stages, ScorerSpec("attention"), ONE.protect)
    logits = greedy(Program(stateful_program(small(), plan)), ids, mask)
    assert (logits - generated(small(), ids, mask, plan)).abs().max() < 1e-5


class TestOpenVINO:
    def test_greedy_search_is_that_of_pytorch(self, run: Compiled, exact: Tensor) -> None:
        found = greedy(run, *rows())
        assert (found - exact).abs().max() < 1e-4
        assert torch.equal(found.argmax(-1), exact.argmax(-1))

    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["gpt2", *(pytest.param(n, marks=pytest.mark.slow) for n in ("qwen3", "gemma"))])
    def test_so_it_is_in_other_architectures(self, name: str, tmp_path: Path) -> None:
        ids, mask = rows()
        model = decoder(name, blocks=2)
        found = greedy(Compiled(prunepass.export(model, ONE, tmp_path / name)), ids, mask)
        assert (found - generated(model, ids, mask, ONE)).abs().max() < 1e-4

    def test_caches_are_as_short_as_their_layers(self, run: Compiled) -> None:
        ids, mask = rows()
        greedy(run, ids, mask)
        assert list(run.lengths().values()) == [23 + STEPS - 1, 14 + STEPS - 1]  # six tenths of 23, rounded up

    def test_alone_as_in_a_padded_batch_after_a_reset(self, run: Compiled) -> None:
        ids, mask = rows()
        both = greedy(run, ids, mask)
        run.request.reset_state()
        assert (greedy(run, ids[1:, 7:], mask[1:, 7:]) - both[1:]).abs().max() < 1e-4

    def test_the_same_again_after_a_reset(self, run: Compiled) -> None:
        ids, mask = rows()
        first = greedy(run, ids, mask)
        for _ in range(2):
            run.request.reset_state()
            assert torch.equal(greedy(run, ids, mask), first)

    def test_more_tokens_than_positions_are_refused(self, tmp_path: Path) -> None:
        run = Compiled(prunepass.export(decoder("gpt2", blocks=2, dtype=torch.bfloat16), None, tmp_path / "out"))
        ids = torch.ones(1, zoo.POSITIONS, dtype=torch.int64)
        positions = torch.arange(zoo.POSITIONS)[None]
        assert run(ids, ids, positions).isfinite().all()
        with pytest.raises(RuntimeError):
            run(ids[:, :1], torch.ones(1, zoo.POSITIONS + 1, dtype=torch.int64), positions[:, -1:] + 1)

    def test_rows_go_on_from_the_beam_they_name(self, run: Compiled) -> None:
        ids, mask = rows()
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        token, grown = torch.tensor([[7], [7]]), torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        run(ids, mask, positions)
        straight = run(token, grown, mask.sum(1, keepdim=True))
        run.request.reset_state()
        run(ids, mask, positions)
        run.beams = [1, 0]
        crossed = run(token, grown.flip(0), mask.sum(1, keepdim=True).flip(0))
        assert (crossed.flip(0) - straight).abs().max() < 1e-4
        assert (crossed - straight).abs().max() > 1e-3

    def test_a_further_call_of_several_tokens_prunes_those_it_brings(self, run: Compiled) -> None:
        ids, mask = rows()
        model = Program(stateful_program(small(), ONE))
        for call in (run, model):
            greedy(call, ids, mask)
        turn = torch.arange(20, 30).expand(2, -1)
        grown = torch.cat([mask, torch.ones(2, STEPS - 1 + 10, dtype=torch.int64)], dim=1)
        positions = (grown.cumsum(1) - 1)[:, -10:]
        assert (run(turn, grown, positions) - model(turn, grown, positions)).abs().max() < 1e-4
        assert list(run.lengths().values()) == [n + STEPS - 1 + m for n, m in ((23, 10), (14, 6))]

    def test_attention_holds_each_cache_itself(self, run: Compiled) -> None:
        kinds = {}
        for op in run.compiled.get_runtime_model().get_ops():
            kinds[op.get_friendly_name()] = str(op.get_rt_info()["layerType"].value)
        attentions = [
            [kinds[source.get_node().get_friendly_name()] for source in op.input_values()]
            for op in run.compiled.get_runtime_model().get_ops()
            if kinds[op.get_friendly_name()] == "ScaledDotProductAttention"
        ]
        assert len(attentions) == 2
        assert all(inputs[-2:] == ["MemoryInput", "MemoryInput"] for inputs in attentions)

    def test_a_compiled_folder_is_read_again_from_the_runtimes_cache(
        self, folder: Path, exact: Tensor, tmp_path: Path
    ) -> None:
        loaded = []
        for _ in range(2):
            core = openvino.Core()
            core.set_property({"CACHE_DIR": str(tmp_path)})
            run = Compiled(folder, core)
            loaded.append(run.compiled.get_property("LOADED_FROM_CACHE"))
        assert loaded == [False, True]
        assert (greedy(run, *rows()) - exact).abs().max() < 1e-4

    @pytest.mark.slow
    def test_a_chat_of_openvino_genai_goes_on_from_the_states(self, tmp_path: Path) -> None:
        """Of what it generated, genai cuts off what its history spells otherwise: the end of each layer's states."""
        genai = pytest.importorskip("openvino_genai")
        tokenizer = byte_tokenizer()
        folder = prunepass.export(decoder(blocks=2, vocab_size=258), ONE, tmp_path / "llama", tokenizer=tokenizer)
        config = genai.GenerationConfig(max_new_tokens=STEPS, do_sample=False, ignore_eos=True)
        config.eos_token_id, config.stop_token_ids = 0, {0}
        pipeline = genai.LLMPipeline(str(folder), "CPU", ATTENTION_BACKEND="SDPA", **FULL)
        pipeline.start_chat()
        run, seen, history = Compiled(folder), [], []
        for question in ("who sat on the mat?", "where?"):
            history.append({"role": "user", "content": question})
            ids = tokenizer.apply_chat_template(history, return_dict=True)["input_ids"]
            shared = next((i for i, pair in enumerate(zip(seen, ids, strict=False)) if len(set(pair)) > 1), len(seen))
            run.cut(len(seen) - shared)
            mask = torch.ones(1, len(ids), dtype=torch.int64)
            logits = greedy(run, torch.tensor([ids[shared:]]), mask, shared)
            found = logits.argmax(-1)[0].tolist()
            assert pipeline.generate(question, config) == tokenizer.decode(found)
            history.append({"role": "assistant", "content": tokenizer.decode(found)})
            seen = [*ids, *found[:-1]]
        pipeline.finish_chat()

    def test_openvino_genai_runs_the_folder(self, folder: Path, exact: Tensor) -> None:
        genai = pytest.importorskip("openvino_genai")
        ids, _ = rows()
        config = genai.GenerationConfig(max_new_tokens=STEPS, do_sample=False, ignore_eos=True)
        config.eos_token_id, config.stop_token_ids = 0, {0}
        for backend in ({}, {"ATTENTION_BACKEND": "SDPA"}):
            pipeline = genai.LLMPipeline(str(folder), "CPU", **backend, **FULL)
            found = pipeline.generate(openvino.Tensor(ids[:1].numpy()), config)
            assert found.tokens == exact[:1].argmax(-1).tolist(), backend  # the first row has no padding
        with pytest.raises(RuntimeError):  # paged attention holds as many tokens for each layer
            genai.LLMPipeline(str(folder), "CPU", ATTENTION_BACKEND="PA", **FULL)

    def test_openvino_genai_goes_on_with_a_text(self, folder: Path, run: Compiled) -> None:
        """By the tokenizer in the folder, both ways. It cuts nothing, though the second text is beyond its limit."""
        genai = pytest.importorskip("openvino_genai")
        config = genai.GenerationConfig(max_new_tokens=STEPS, do_sample=False, ignore_eos=True)
        config.eos_token_id, config.stop_token_ids = 0, {0}
        pipeline, tokenizer = genai.LLMPipeline(str(folder), "CPU", **FULL), tiny_tokenizer()
        answers = []
        for text in ("the cat sat on the mat . who sat where ?", "good film , " * 12):
            ids = tokenizer(text, return_tensors="pt")["input_ids"]
            exact = greedy(run, ids, torch.ones_like(ids)).argmax(-1)[0]
            run.request.reset_state()
            pieces = tokenizer.decode(exact, skip_special_tokens=True)  # which this tokenizer does not join
            answers.append(pieces.replace(" ##", "").removeprefix("##"))
            assert pipeline.generate(text, config) == answers[-1]
        assert all(answers)
        assert answers[0] != answers[1]


def test_a_folder_without_the_runtimes_tokenizer_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "openvino_tokenizers", None)
    with caplog.at_level("WARNING", "prunepass"):
        folder = prunepass.export(small(), None, tmp_path / "out", tokenizer=tiny_tokenizer())
    (said,) = (record.getMessage() for record in caplog.records if "tokenizer" in record.getMessage())
    assert said.startswith("openvino_tokenizer.xml and openvino_detokenizer.xml were not written: the package openv")
    assert {file.name for file in folder.glob("openvino_*.xml")} == {"openvino_model.xml"}


def byte_tokenizer() -> Any:
    """A token a byte (the runtime wants a pair and an end, too), nothing around a text; messages stand in lines."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    pieces = ["</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "th"]
    inner = Tokenizer(BPE({piece: i for i, piece in enumerate(pieces)}, [("t", "h")]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}"
    return PreTrainedTokenizerFast(tokenizer_object=inner, chat_template=template, eos_token="</s>")


@pytest.mark.parametrize(
    ("model", "plan", "options", "error", "says"),
    [
        (lambda: decoder(attention="eager"), PLAN, {}, ExportError, "attn_implementation='sdpa'"),
        (decoder, PrunePlan([Stage(0, 0.5)], ScorerSpec("norm"), Protect(last=1)), {}, RefusalError, "stateful=False"),
        (decoder, PrunePlan([Stage(1, 0.5)], protect=Protect(first=1)), {}, RefusalError, "Protect"),
        (decoder, PLAN, {"to": "onnx"}, OptionError, "has no states"),
        (decoder, PLAN, {"length": 16}, OptionError, "leave out length"),
        (decoder, PLAN, {"int8": [{}]}, OptionError, "leave out int8"),
        (decoder, PLAN, {"example_inputs": {"input_ids": torch.ones(2, 9)}}, OptionError, "leave out example_inputs"),
        (lambda: decoder("gpt2", add_cross_attention=True), PLAN, {}, ExportError, "encoder"),
        (lambda: zoo.tiny("bert"), PLAN, {}, OptionError, "does not generate"),
    ],
)
def test_what_cannot_be_done_is_refused_and_nothing_written(
    model: Callable[[], Any],
    plan: PrunePlan,
    options: dict[str, Any],
    error: type[Exception],
    says: str,
    tmp_path: Path,
) -> None:
    with pytest.raises(error, match=says):
        prunepass.export(model(), plan, tmp_path / "out", stateful=True, **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_with_example_inputs_it_has_no_cache(tmp_path: Path) -> None:
    ids, mask = rows()
    inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    folder = prunepass.export(decoder(), PrunePlan([Stage(1, 0.6)]), tmp_path / "out", example_inputs=inputs)
    model = openvino.Core().read_model(folder / "openvino_model.xml")
    assert not model.get_sinks()
    assert {port.get_any_name() for port in model.inputs} == {"input_ids", "attention_mask"}
