"""Which residual stream is read: of text and image side by side, and what is refused of models without one."""

from __future__ import annotations

import copy
import dataclasses
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import harness
import prunepass
from prunepass import Protect, PrunePlan, Stage
from prunepass.errors import OptionError, PlanError, RefusalError
from prunepass.graph.capture import Captured, capture_module, ensure_aten
from prunepass.graph.streams import find_inputs, streams_of

transformers = pytest.importorskip("transformers")
import senses
import toys

PLAN = PrunePlan((Stage(1, "1/2"),), "norm")


# -- toys ---------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.mlp = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (t[:, None] for t in self.qkv(self.norm(x)).chunk(3, dim=-1))
        x = x + nn.functional.scaled_dot_product_attention(q, k, v, mask)[:, 0]
        return x + self.mlp(x).tanh()


class Toy(nn.Module):
    """Patches with a class token in front, and registers between the two, as DINOv2 has them."""

    def __init__(self, registers: int = 0) -> None:
        super().__init__()
        self.conv, self.blocks = nn.Conv2d(3, 8, 4, 4), nn.ModuleList([Block(), Block()])
        self.first, self.table = nn.Parameter(torch.randn(1, 1, 8)), nn.Parameter(torch.randn(1, 17, 8))
        self.registers = nn.Parameter(torch.randn(1, registers, 8)) if registers else None

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.conv(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.first.expand(len(x), -1, -1), x], dim=1) + self.table
        if self.registers is not None:
            x = torch.cat([x[:, :1], self.registers.expand(len(x), -1, -1), x[:, 1:]], dim=1)
        for block in self.blocks:
            x = block(x)
        return x


class Frames(nn.Module):
    """Frames of a sound; the model says which are live, or only which are not."""

    def __init__(self, inverted: bool = False) -> None:
        super().__init__()
        self.conv, self.blocks, self.inverted = nn.Conv1d(1, 8, 4, 4), nn.ModuleList([Block(), Block()]), inverted

    def forward(self, input_values: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.conv(input_values[:, None]).transpose(1, 2)
        dead = attention_mask[:, 3::4] == 0
        bias = torch.where(~dead, 0.0, -1e9)
        if self.inverted:
            places = torch.arange(x.shape[1])[None, :]
            bias = -1e9 * (places >= attention_mask.sum(1, keepdim=True) // 4)
        bias = bias[:, None, None, :]
        for block in self.blocks:
            x = block(x, bias.to(x.dtype))
        return x


@pytest.mark.parametrize("registers", [0, 3])
def test_class_and_register_tokens_are_found_by_data_flow(registers: int) -> None:
    pixels = torch.randn(2, 3, 16, 16)
    gm = capture_module(Toy(registers).eval(), (pixels,)).graph_module
    inputs = find_inputs(gm)
    assert inputs.prefix == 1 + registers
    assert inputs.fixed_length == 17 + registers
    assert inputs.made_from is not None
    assert prunepass.prune(Toy(registers).eval(), PLAN, (pixels,)).plan.protect.first == 1 + registers


def test_few_tokens() -> None:
    """Fewer than the lengths that other models are replayed at."""
    model = Toy().eval()
    model.table = nn.Parameter(torch.randn(1, 5, 8))
    pixels = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        wanted = model(pixels)
        assert torch.allclose(prunepass.prune(model, PrunePlan([Stage(1, 1.0)], "norm"), (pixels,))(pixels), wanted)
    pruned = prunepass.prune(model, PLAN, (pixels,))
    assert pruned.plan.stages[0].keep == 0.5
    with pytest.raises(PlanError, match="one stream of tokens only, from pixels: leave stream out"):
        prunepass.prune(model, dataclasses.replace(PLAN, stream="nowhere"), (pixels,))


class Bytes(Toy):
    def forward(self, pixels: Tensor) -> Tensor:
        return super().forward(pixels.to(torch.float32) / 255)


def test_pixels_may_be_bytes() -> None:
    pixels = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    model = Bytes().eval()
    pruned, floating = prunepass.prune(model, PLAN, (pixels,)), prunepass.prune(Toy().eval(), PLAN, (pixels / 255,))
    floating.load_state_dict(pruned.state_dict())
    with torch.no_grad():
        assert torch.equal(pruned(pixels), floating(pixels / 255))


def test_which_frames_are_live_is_what_the_model_makes_of_its_mask() -> None:
    mask = torch.ones(2, 40, dtype=torch.int64)
    mask[1, 24:] = 0
    x = {"input_values": torch.randn(2, 40), "attention_mask": mask}
    inputs = find_inputs(capture_module(Frames().eval(), x).graph_module)
    assert inputs.attention_mask is not None
    assert inputs.attention_mask.op == "call_function"
    model = Frames().eval()
    pruned = prunepass.prune(model, PLAN, x)
    alone = {"input_values": x["input_values"][1:, :24], "attention_mask": mask[1:, :24]}
    with torch.no_grad():
        torch.testing.assert_close(pruned(**x)[1:, :6], pruned(**alone))


def test_frames_that_are_told_in_no_readable_way_are_refused() -> None:
    x = {"input_values": torch.randn(2, 40), "attention_mask": torch.ones(2, 40, dtype=torch.int64)}
    with pytest.raises(RefusalError, match=r"computes no value of shape \[2, 10\]"):
        prunepass.prune(Frames(inverted=True).eval(), PLAN, x)


# -- several streams ----------------------------------------------------------------------------------------------


@cache
def clip() -> Any:
    vision = {k: v for k, v in senses.IMAGES["clip"].options.items() if "dropout" not in k}
    text = {k: vision[k] for k in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")}
    text |= {"vocab_size": 99, "max_position_embeddings": 20, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    torch.manual_seed(0)
    return senses.zoo.randomize(transformers.CLIPModel(config).double().eval())


@cache
def traced() -> Captured:
    return capture_module(clip(), both())


def both() -> dict[str, Tensor]:
    ids = torch.arange(18).reshape(2, 9) + 5
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **senses.example("clip")}


def test_of_two_streams_the_plan_names_one() -> None:
    with pytest.raises(PlanError, match=r"text_model\.encoder \(from input_ids\), vision_model\.encoder \(from pix"):
        prunepass.prune(clip(), PLAN, both())
    with pytest.raises(PlanError, match="'decoder' holds no stream of tokens of this model"):
        prunepass.prune(clip(), PrunePlan(PLAN.stages, "norm", stream="decoder"), both())


@pytest.mark.parametrize("stream", ["vision_model", pytest.param("text_model", marks=pytest.mark.slow)])
def test_the_named_stream_alone_is_pruned(stream: str) -> None:
    plan = PrunePlan(PLAN.stages, "norm", stream=stream)
    assert PrunePlan.from_json(plan.to_json()) == plan
    x = both()
    one, two = (harness.pruned(traced(), plan, mode).graph_module for mode in ("gather", "mask"))
    with torch.no_grad():
        found, masked, dense = (m(**x) for m in (one, two, clip()))
    assert float((found.logits_per_image - masked.logits_per_image).abs().max()) < 1e-10
    same, other = ("text_embeds", "image_embeds") if stream == "vision_model" else ("image_embeds", "text_embeds")
    torch.testing.assert_close(found[same], dense[same])
    assert float((found[other] - dense[other]).abs().max()) > 1e-3
    report = prunepass.explain(clip(), plan, x)
    assert any("pruned here" in line and stream in line for line in report.streams)
    assert len(report.streams) == 2


def test_streams_are_listed_with_the_inputs_that_they_come_from() -> None:
    found = streams_of(traced().graph_module)
    assert [str(s) for s in found] == [
        "text_model.encoder (from input_ids)",
        "vision_model.encoder (from pixel_values)",
    ]


# -- a plan for each ----------------------------------------------------------------------------------------------

EACH = {"text_model": PLAN, "vision_model": PrunePlan((Stage(1, "2/5"), Stage(3, "1/5")), "attention")}


@cache
def pruned_in_each() -> Any:
    return prunepass.prune(clip(), EACH, both())


def padded() -> dict[str, Tensor]:
    x = both()
    x["attention_mask"][1, 6:] = 0
    return x


def test_each_stream_has_its_own_plan() -> None:
    found = pruned_in_each()
    masked = prunepass.prune(clip(), EACH, both(), mode="mask")
    alone = {
        name: harness.pruned(traced(), dataclasses.replace(plan, stream=name), "gather").graph_module
        for name, plan in EACH.items()
    }
    for x in (both(), padded()):
        with torch.no_grad():
            one, two, text, image = (m(**x) for m in (found, masked, alone["text_model"], alone["vision_model"]))
        assert float((one.logits_per_image - two.logits_per_image).abs().max()) < 1e-10
        assert float((one.text_embeds - text.text_embeds).abs().max()) < 1e-12
        assert float((one.image_embeds - image.image_embeds).abs().max()) < 1e-12
    assert {name: plan.stages for name, plan in found.streams.items()} == {n: p.stages for n, p in EACH.items()}
    assert "stream='text_model'" in repr(found)
    with pytest.raises(RefusalError, match="pruned already"):
        prunepass.prune(found, EACH, both())


def test_what_keeps_all_is_left_out() -> None:
    assert prunepass.prune(clip(), {"text_model": PrunePlan([Stage(1, 1)])}, both()) is clip()


def test_a_report_on_each_stream() -> None:
    report = prunepass.explain(clip(), EACH, both())
    text, image = report.parts
    assert [(s.place, s.count) for s in text.stages] == [("before block 1", 5)]
    assert [s.place for s in image.stages] == ["before block 1", "before block 3"]
    assert image.picture is not None
    whole = report.whole
    assert whole is not None
    for total, model in ((whole.dense, clip()), (whole.pruned, pruned_in_each())):
        counter = FlopCounterMode(display=False)
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
            model(**both())
        assert total == counter.get_total_flops()
    assert [part.part for part in whole.parts][:2] == ["blocks of text_model", "blocks of vision_model"]
    assert "text_model (CLIPModel)" in str(report)


class _Led(torch.nn.Module):
    """Two streams, of which the first one's mean is added to the second one's tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = toys.Encoder(layers=2), toys.Encoder(layers=2)

    def forward(self, input_ids: Tensor, other_ids: Tensor) -> Tensor:
        x = self.second.words(other_ids) + self.first(input_ids).mean(1, keepdim=True)
        for block in self.second.blocks:
            x = block(x, None)
        return x


def test_streams_of_which_one_leads_into_the_other_are_refused() -> None:
    ids = {"input_ids": torch.randint(1, 9, (2, 7)), "other_ids": torch.randint(1, 9, (2, 5))}
    with pytest.raises(RefusalError, match=r"tokens of first.* lead into those of second.* Give one plan"):
        prunepass.prune(_Led().double().eval(), {"second": PLAN, "first": PLAN}, ids)


@pytest.mark.slow
def test_a_file_of_both_streams(tmp_path: Path) -> None:
    folder = prunepass.export(clip(), EACH, tmp_path / "out", to="pt2", example_inputs=both())
    with torch.no_grad():
        found = torch.export.load(folder / "model.pt2").module()(**padded())
        wanted = pruned_in_each()(**padded())
    assert float((found["logits_per_image"] - wanted.logits_per_image).abs().max()) < 1e-10
    assert PrunePlan.from_pretrained(folder / "streams" / "text_model") == dataclasses.replace(
        PLAN, stream="text_model"
    )
    assert not (folder / "prunepass.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("to", ["openvino", "onnx"])
def test_a_runtimes_file_of_both_streams(to: Any, tmp_path: Path) -> None:
    model, x = (
        copy.deepcopy(clip()).float(),
        {k: v.float() if v.is_floating_point() else v for k, v in padded().items()},
    )
    folder = prunepass.export(model, EACH, tmp_path / "out", to=to, example_inputs=x)
    with torch.no_grad():
        wanted = prunepass.prune(model, EACH, x)(**x).logits_per_image
    given = {name: value.numpy() for name, value in x.items()}
    if to == "onnx":
        runtime = pytest.importorskip("onnxruntime")
        session = runtime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
        (found,) = session.run(["logits_per_image"], given)
    else:
        runtime = pytest.importorskip("openvino")
        options = {"INFERENCE_PRECISION_HINT": "f32"}
        found = runtime.Core().compile_model(folder / "openvino_model.xml", "CPU", options)(given)["logits_per_image"]
    assert float((torch.from_numpy(found) - wanted).abs().max()) < 1e-4


@pytest.mark.parametrize(
    ("plans", "error", "said"),
    [
        ({"decoder": PLAN}, PlanError, "'decoder' holds no stream of tokens of this model. Its streams: text_model"),
        ({"text_model": PLAN, "text_model.encoder": PLAN}, PlanError, "are of one stream"),
        ({"text_model": [PLAN, PLAN]}, OptionError, "several plans for 'text_model'"),
    ],
)
def test_plans_that_fit_no_streams(plans: Any, error: Any, said: str) -> None:
    with pytest.raises(error, match=said):
        prunepass.prune(clip(), plans, both())


# -- refusals -----------------------------------------------------------------------------------------------------

_FOUR: dict[str, Any] = {"hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1]}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "swin": (
        {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 2], "image_size": 32, "patch_size": 2, "window_size": 4},
        "256 tokens are laid out as an image there .* cut into windows",
    ),
    "poolformer": (_FOUR, "no attention was found between pixel_values and the output"),
    "segformer": (_FOUR | {"num_attention_heads": [1, 2, 2, 2]}, "laid out as an image there .* a convolution"),
    "pvt": (
        {"image_size": 64, "hidden_sizes": [16, 16, 32, 32], "num_attention_heads": [1, 1, 2, 2]},
        "laid out as an image there .* a convolution",
    ),
    "mobilevit": (
        {"hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 16, 16, 24, 32, 32], "image_size": 64},
        "a grid of rows and columns",
    ),
    "hiera": (
        {
            "embed_dim": 16,
            "depths": [1, 1, 2],
            "num_heads": [1, 1, 2],
            "image_size": [64, 64],
            "num_query_pool": 1,
            "masked_unit_size": [8, 8],
        },
        "256 tokens",
    ),
    "convnext": (_FOUR, "no attention was found between pixel_values and the output"),
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in ("swin", "poolformer") else pytest.mark.slow) for n in REFUSED]
)
def test_windows_and_pools_are_refused_by_their_reason(name: str) -> None:
    options, reason = REFUSED[name]
    model = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(name, **options)).eval()
    size = options.get("image_size", 64)
    x = {"pixel_values": torch.randn(2, 3, *(size if isinstance(size, list) else (size, size)))}
    with pytest.raises(RefusalError, match=f"(?s){reason}"):
        prunepass.prune(model, PLAN, x)


def test_plans_for_texts_and_images_of_another_size_are_errors() -> None:
    model, x = senses.tiny("vit"), senses.example("vit")
    for protect in (Protect(token_ids=(3,)), Protect(segment="first")):
        with pytest.raises(PlanError, match="makes its tokens of pixel_values, which has none"):
            prunepass.prune(model, PrunePlan(PLAN.stages, "norm", protect=protect), x)
    pruned = prunepass.prune(model, PLAN, x)
    with pytest.raises(OptionError, match=r"axis 2 must be 24.* For another size prune the model again"):
        pruned(pixel_values=torch.zeros(2, 3, 28, 28, dtype=torch.float64))


class OneStep(nn.Module):
    """A step of generation whose attention is spelled out: a token, and the values of those before it."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.norm, self.out = nn.Embedding(20, 16), nn.LayerNorm(16), nn.Linear(16, 16)

    def forward(self, input_ids: Tensor, past_key_values_keys: Tensor, past_key_values_values: Tensor) -> Tensor:
        x = self.words(input_ids)
        new = self.norm(x).unflatten(-1, (2, 8)).transpose(1, 2)
        keys, values = (torch.cat([old, new], -2) for old in (past_key_values_keys, past_key_values_values))
        read = torch.softmax(new @ keys.transpose(-1, -2), -1) @ values
        x = x + self.out(read.transpose(1, 2).flatten(2))
        again = torch.softmax(x @ x.transpose(-1, -2), -1) @ x
        return x + again


def test_values_of_a_cache_are_no_image() -> None:
    """Both are [B, n, n, n] and floating. What attention gives for a cache was taken for tokens made of it."""
    cached = torch.zeros(2, 2, 7, 8)
    given = {"input_ids": torch.ones(2, 1, dtype=torch.int64), "past_key_values_keys": cached}
    program = torch.export.export(OneStep(), (), {**given, "past_key_values_values": cached})
    graph = ensure_aten(program.module())
    assert [stream.given.name for stream in streams_of(graph)] == ["input_ids"]


def test_images_of_one_channel() -> None:
    """Of an example of few tokens there are made more; channels are no tokens."""
    size = {"image_size": 24, "patch_size": 4, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    config = transformers.ViTConfig(num_channels=1, num_hidden_layers=2, **size)
    model = transformers.ViTModel(config, add_pooling_layer=False).double().eval()
    images = torch.randn(3, 1, 24, 24, dtype=torch.float64)
    pruned = prunepass.prune(model, PLAN, {"pixel_values": images[:1]})
    assert harness.run(pruned, {"pixel_values": images}).last_hidden_state.shape == (3, 37, 16)
