"""``generate()`` of encoder-decoders whose encoder is pruned: each step's logits are those of the unpruned model with
the pruned tokens hidden as keys, of the later layers of the encoder and of the decoder's cross-attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.modeling_outputs import BaseModelOutput

import harness
import hooks
import oracle
import prunepass
import senses
import zoo
from prunepass import PrunePlan, Stage
from prunepass.errors import RefusalError

TOLERANCE = 1e-10
STAGES = (Stage(1, 0.7), Stage(2, 0.5), Stage(3, 0.3))
PLAN = PrunePlan(STAGES, "norm", restore="none")
RESTORED = PrunePlan(STAGES, "norm")
FIVE = {"max_new_tokens": 5, "min_new_tokens": 5, "return_dict_in_generate": True, "output_logits": True}
TEXT = ("bart", "t5", "marian", "pegasus", "m2m_100", "mbart", "t5gemma")
SLOW = {"marian", "pegasus", "mbart"}
NAMES = [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in (*TEXT, "whisper")]


@pytest.fixture(autouse=True, scope="module")
def _exact_softmax() -> Iterator[None]:
    with oracle.float64_softmax():
        yield


def model_of(name: str) -> Any:
    """A tiny model of its own, as compiling changes it."""
    if name == "whisper":
        config = transformers.WhisperConfig(**senses._WHISPER | {"decoder_layers": 2})
        torch.manual_seed(0)
        made: nn.Module = transformers.WhisperForConditionalGeneration(config).double().eval()
        zoo.randomize(made, 0)
    elif name == "t5gemma":
        made = _t5gemma()
    else:
        made = zoo.tiny(name, "seq2seq", use_cache=True)
    generation: Any = made.generation_config
    generation.use_cache, generation.eos_token_id, generation.forced_eos_token_id = True, None, None
    return made


def _t5gemma() -> nn.Module:
    part = zoo._LLAMA | {"query_pre_attn_scalar": 8, "sliding_window": 5, "num_hidden_layers": zoo.LAYERS}
    config = transformers.T5GemmaConfig(
        encoder=part, decoder=part | {"num_hidden_layers": 2}, vocab_size=zoo.VOCABULARY, dropout_rate=0.0
    )
    torch.manual_seed(0)
    made = transformers.AutoModelForSeq2SeqLM.from_config(config, attn_implementation="eager").double().eval()
    made.generation_config.update(decoder_start_token_id=2, bos_token_id=2, pad_token_id=zoo.PAD)
    return zoo.randomize(made, 0)


def inputs_of(name: str, side: str = "right") -> dict[str, Tensor]:
    if name == "whisper":
        generator = torch.Generator().manual_seed(0)
        return {"input_features": torch.randn(2, senses.MELS, 60, generator=generator, dtype=torch.float64)}
    return zoo.batch([13, 9, 4], side=side, high=60)


class _HideMemory(TorchFunctionMode):
    """Hides the pruned tokens as keys of cross-attention: of a decoder that takes fewer tokens than the encoder."""

    def __init__(self, alive: Tensor) -> None:
        super().__init__()
        self.alive = alive
        self.calls = 0

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name, length = getattr(func, "__name__", ""), self.alive.shape[1]
        if name == "softmax" and args[0].dim() == 4 and args[0].shape[-1] == length:
            args = (args[0] + self._bias(args[0]), *args[1:])
        if name == "scaled_dot_product_attention" and args[1].shape[-2] == length:
            mask = kwargs.pop("attn_mask", None)
            if mask is not None and mask.dtype == torch.bool:
                mask = torch.zeros(mask.shape, dtype=args[0].dtype).masked_fill(~mask, torch.finfo(args[0].dtype).min)
            bias = self._bias(args[0])
            kwargs |= {"attn_mask": bias if mask is None else bias + mask, "is_causal": False}
        return func(*args, **kwargs)

    def _bias(self, like: Tensor) -> Tensor:
        self.calls += 1
        alive = self.alive.repeat_interleave(like.shape[0] // self.alive.shape[0], dim=0)  # beams
        return torch.zeros(alive.shape, dtype=like.dtype).masked_fill(~alive, -torch.inf)[:, None, None, :]


def reference(name: str, x: dict[str, Tensor], seed: int = 0, **how: Any) -> Any:
    """The unpruned model's ``generate()``, with pruned tokens hidden."""
    model = model_of(name)
    encoder = model.get_encoder()
    live = torch.ones(2, 30, dtype=torch.bool) if name == "whisper" else None
    found = hooks.run_hooked(encoder, hooks.layers_of(encoder, zoo.LAYERS), PLAN, x, live=live)
    states = BaseModelOutput(last_hidden_state=found.output.last_hidden_state)
    given = {k: v for k, v in x.items() if k == "attention_mask"}
    if name == "whisper":
        given = dict(x)
    torch.manual_seed(seed)
    with _HideMemory(found.alive[-1]) as hidden:
        out = model.generate(**given, encoder_outputs=states, **FIVE, **how)
    assert hidden.calls, "no cross-attention was found"
    return out


def worst(one: Any, two: Any) -> float:
    assert torch.equal(one.sequences, two.sequences)
    return max(float((a - b).abs().max()) for a, b in zip(one.logits, two.logits, strict=True))


def compiled(name: str, plan: PrunePlan = PLAN, **options: Any) -> Any:
    torch.compiler.reset()
    model = model_of(name)
    model.get_encoder().compile(backend="tokprune", options={"plan": plan, "target": "eager", **options})
    return model


@pytest.mark.parametrize("name", NAMES)
def test_each_step_is_that_of_the_model_with_pruned_tokens_hidden(name: str) -> None:
    model = compiled(name)
    for side in ("right", "left") if name != "whisper" else ("right",):
        x = inputs_of(name, side)
        found = model.generate(**x, **FIVE, do_sample=False)
        assert worst(found, reference(name, x, do_sample=False)) < TOLERANCE
        plain = model_of(name).generate(**x, **FIVE, do_sample=False)
        assert float((found.logits[0] - plain.logits[0]).abs().max()) > 1e-4


@pytest.mark.parametrize("name", ["bart", "whisper"])
def test_beams_and_sampling(name: str) -> None:
    model, x = compiled(name), inputs_of(name)
    assert worst(model.generate(**x, **FIVE, num_beams=3), reference(name, x, num_beams=3)) < TOLERANCE
    several = {} if name == "whisper" else {"num_return_sequences": 2}  # Whisper repeats its sounds by itself
    torch.manual_seed(7)
    drawn = model.generate(**x, **FIVE, do_sample=True, **several)
    assert worst(drawn, reference(name, x, 7, do_sample=True, **several)) < TOLERANCE


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_a_row_alone_is_as_in_its_batch(name: str) -> None:
    model, x = compiled(name), inputs_of(name)
    together = model.generate(**x, **FIVE, do_sample=False)
    for row, length in enumerate((13, 9, 4)):
        alone = model.generate(**{k: v[row : row + 1, :length] for k, v in x.items()}, **FIVE, do_sample=False)
        assert torch.equal(alone.sequences[0], together.sequences[row])
        assert max(float((a[0] - b[row]).abs().max()) for a, b in zip(alone.logits, together.logits, strict=True)) < (
            TOLERANCE
        )


def test_the_decoder_attends_to_the_tokens_that_are_left() -> None:
    model, x = compiled("bart"), inputs_of("bart")
    found = model.generate(**x, **FIVE, do_sample=False)
    cache = found.past_key_values.cross_attention_cache
    assert [layer.keys.shape[2] for layer in cache.layers] == [4, 4]
    states = model.get_encoder()(**x).last_hidden_state
    assert tuple(states.shape) == (3, 4, zoo.HIDDEN)


@pytest.mark.parametrize("name", ["bart", pytest.param("whisper", marks=pytest.mark.slow)])
def test_a_model_compiled_in_place_prunes_its_encoder(name: str) -> None:
    torch.compiler.reset()
    model, x = model_of(name), inputs_of(name)
    model.compile(backend="tokprune", options={"plan": PLAN, "target": "eager"})
    assert worst(model.generate(**x, **FIVE, do_sample=False), reference(name, x, do_sample=False)) < TOLERANCE
    start = {"decoder_input_ids": torch.tensor([[2, 7, 9]] * len(next(iter(x.values()))))}
    if name == "bart":  # Whisper takes a prompt of its own
        found = model.generate(**x, **FIVE, **start, do_sample=False)
        assert worst(found, reference(name, x, **start, do_sample=False)) < TOLERANCE
    states = BaseModelOutput(last_hidden_state=torch.randn(3, 13, zoo.HIDDEN, dtype=torch.float64))
    with pytest.raises(RefusalError, match="no pruned encoder returned"):
        model.generate(encoder_outputs=states, **FIVE, do_sample=False)


def test_a_restored_encoder_is_read_at_its_full_length() -> None:
    """The default: the decoder attends to pruned tokens, at the state that they left with."""
    torch.compiler.reset()
    model, x = model_of("t5"), inputs_of("t5")
    model.compile(backend="tokprune", options={"plan": RESTORED, "target": "eager"})
    found = model.generate(**x, **FIVE, do_sample=False)
    dense = model_of("t5")
    encoder = dense.get_encoder()
    states = hooks.run_hooked(encoder, hooks.layers_of(encoder, zoo.LAYERS), RESTORED, x).output
    wanted = dense.generate(
        encoder_outputs=BaseModelOutput(last_hidden_state=states.last_hidden_state),
        attention_mask=x["attention_mask"],
        **FIVE,
        do_sample=False,
    )
    assert worst(found, wanted) < TOLERANCE


# -- one forward pass, by prune() ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_pruned_model_is_the_decoder_over_its_pruned_encoder(name: str) -> None:
    model, start = model_of(name), torch.tensor([[2, 7, 9, 5]])
    for module in model.modules():
        if hasattr(module, "config"):
            module.config.use_cache = False
    x = inputs_of(name)
    rows = len(next(iter(x.values())))
    x["decoder_input_ids"] = start.expand(rows, 4)
    pruned, masked = (prunepass.prune(model, PLAN, x, mode=mode) for mode in ("gather", "mask"))
    encoder = prunepass.prune(model.get_encoder(), PLAN, {k: v for k, v in x.items() if k != "decoder_input_ids"})
    x["decoder_input_ids"] = start[:, :2].expand(rows, 2)
    outputs = [harness.run(module, x).logits for module in (pruned, masked)]
    states = harness.run(encoder, {k: v for k, v in x.items() if k != "decoder_input_ids"})
    given = {} if name == "whisper" else {"attention_mask": states.encoder_attention_mask}
    with torch.no_grad():
        wanted = model(encoder_outputs=states, decoder_input_ids=x["decoder_input_ids"], **given).logits
    assert all(float((found - wanted).abs().max()) < TOLERANCE for found in outputs)


def test_a_pruned_encoder_returns_its_mask() -> None:
    encoder, x = model_of("bart").get_encoder(), inputs_of("bart", "left")
    out = harness.run(prunepass.prune(encoder, PLAN, x), x)
    assert isinstance(out, BaseModelOutput)
    assert out.encoder_attention_mask.sum(1).tolist() == [4, 3, 2]
    assert tuple(out.encoder_attention_mask.shape) == tuple(out.last_hidden_state.shape[:2])


# -- what is refused -------------------------------------------------------------------------------------------------


def test_a_mask_of_the_whole_text_beside_short_states() -> None:
    model, x = compiled("bart"), inputs_of("bart")
    states = model.get_encoder()(**x)
    with pytest.raises(RefusalError, match="4 states of an encoder with a mask of 13 tokens"):
        model(encoder_outputs=states, attention_mask=x["attention_mask"], decoder_input_ids=torch.tensor([[2]] * 3))


@pytest.mark.parametrize("option", ["output_hidden_states", "output_attentions"])
def test_outputs_of_inner_layers(option: str) -> None:
    encoder = zoo.tiny("bart", "seq2seq", attention="eager").get_encoder()
    with pytest.raises(RefusalError, match="restore='none'"):
        prunepass.prune(encoder, PLAN, {**inputs_of("bart"), option: True})


def test_a_stage_that_the_encoder_does_not_have() -> None:
    """The decoder's layers are no blocks of the stream that is pruned."""
    x = {**inputs_of("bart"), "decoder_input_ids": torch.tensor([[2, 7]] * 3)}
    with pytest.raises(prunepass.errors.PlanError, match="4 blocks, 0 to 3"):
        prunepass.prune(zoo.tiny("bart", "seq2seq"), PrunePlan([Stage(5, 0.5)], "norm"), x)
    with pytest.raises(prunepass.errors.PlanError, match=r"'model.decoder' holds no stream .* model.encoder \("):
        prunepass.prune(zoo.tiny("bart", "seq2seq"), PrunePlan([Stage(1, 0.5)], "norm", stream="model.decoder"), x)


def test_a_stage_that_merges() -> None:
    with pytest.raises(prunepass.errors.PlanError, match="restore='none' leaves states to a decoder"):
        PrunePlan([Stage(1, 0.5, leave="merge")], "norm", restore="none")


def test_an_encoder_that_cannot_be_found() -> None:
    model = model_of("bart")
    model.get_encoder = lambda *args, **kwargs: None
    with pytest.raises(RefusalError, match=r"get_encoder\(\) gives no encoder"):
        model.compile(backend="tokprune", options={"plan": PLAN, "target": "eager"})
