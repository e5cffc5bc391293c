"""What stands around a model: looked through where it computes the same, refused with what to pass where not."""

from __future__ import annotations

import io
import types
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
from torch import nn

import harness
import prunepass
import toys
import zoo
from prunepass import PrunePlan, Stage
from prunepass.errors import OptionError, PruneError, RefusalError

PLAN = PrunePlan((Stage(1, 0.5),), "norm")
X = zoo.batch([13, 9, 4], seed=1)


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")


def compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


def distributed(model: nn.Module) -> nn.Module:
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        return nn.parallel.DistributedDataParallel(model)
    finally:
        torch.distributed.destroy_process_group()


class PeftModel(nn.Module):
    """What PEFT's class of this name looks like from outside."""

    def __init__(self, base: nn.Module, *, prompt: bool = False) -> None:
        super().__init__()
        self.base_model = base
        kind = types.SimpleNamespace(value="PREFIX_TUNING")
        self.active_peft_config = types.SimpleNamespace(is_prompt_learning=prompt, peft_type=kind)

    def get_base_model(self) -> nn.Module:
        return self.base_model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model(*args, **kwargs)


PeftModel.__module__ = "peft.peft_model"

WRAPPERS: dict[str, Callable[[nn.Module], Any]] = {
    "torch.compile": compiled,
    "Module.compile": compiled_in_place,
    "DataParallel": nn.DataParallel,
    "DistributedDataParallel": distributed,
    "an adapter": PeftModel,
    "two of them": lambda model: compiled(nn.DataParallel(model)),
}


@cache
def pruned_encoder() -> nn.Module:
    return prunepass.prune(toys.encoder(), PLAN, harness.example())


@pytest.mark.parametrize("name", WRAPPERS)
def test_the_model_inside_a_wrapper_is_pruned(name: str) -> None:
    got = prunepass.prune(WRAPPERS[name](toys.encoder()), PLAN, harness.example())
    torch.testing.assert_close(harness.run(got, X), harness.run(pruned_encoder(), X), rtol=0, atol=0)


def test_a_wrapped_model_is_explained_and_exported_with_its_own_config(tmp_path: Path) -> None:
    wrapped = PeftModel(compiled(zoo.tiny("bert", num_hidden_layers=2).float()))
    assert prunepass.explain(wrapped, PLAN, harness.example()).model == "BertModel"
    prunepass.export(wrapped, PLAN, tmp_path / "out", to="pt2")  # example inputs made from the config inside
    assert (tmp_path / "out" / "config.json").is_file()


def test_an_adapter_of_peft_is_traced_with_the_model() -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=["query", "value"], init_lora_weights=False)
    model = peft.get_peft_model(zoo.tiny("bert").float(), config).eval()
    pruned = harness.run(prunepass.prune(model, PLAN, harness.example()), X)
    bare = harness.run(prunepass.prune(zoo.tiny("bert").float(), PLAN, harness.example()), X)
    live = X["attention_mask"].bool()
    assert harness.difference(pruned, bare, live) > 1e-3
    merged = prunepass.prune(model.merge_and_unload(), PLAN, harness.example())
    assert harness.difference(pruned, harness.run(merged, X), live) < 1e-5


def test_learned_prompts_are_refused() -> None:
    with pytest.raises(RefusalError, match=r"PREFIX_TUNING.*which tokens are live"):
        prunepass.prune(PeftModel(toys.encoder(), prompt=True), PLAN, harness.example())


# -- pruned already ----------------------------------------------------------------------------------------------------


@cache
def pruned_program() -> torch.export.ExportedProgram:
    return prunepass.prune(harness.captured("bert").exported, PLAN)


def from_a_file() -> torch.export.ExportedProgram:
    file = io.BytesIO()
    torch.export.save(pruned_program(), file)
    file.seek(0)
    return torch.export.load(file)


PRUNED: dict[str, Callable[[], Any]] = {
    "module": pruned_encoder,
    "module inside another": lambda: nn.Sequential(pruned_encoder()),
    "compiled": lambda: compiled(pruned_encoder()),
    "program": pruned_program,
    "program of a file": from_a_file,
    "program's module": lambda: pruned_program().module(),
    "decomposed program": lambda: pruned_program().run_decompositions({}),
}


@pytest.mark.parametrize("kind", PRUNED)
def test_what_is_pruned_already_is_not_pruned_again(kind: str) -> None:
    with pytest.raises(RefusalError, match=r"pruned already.*original model"):
        prunepass.prune(PRUNED[kind](), PLAN, [X["input_ids"]])


def test_what_is_pruned_already_is_not_explained() -> None:
    with pytest.raises(RefusalError, match="pruned already"):
        prunepass.explain(PRUNED["module"](), PLAN, harness.example())


# -- no models ---------------------------------------------------------------------------------------------------------


def a_pipeline() -> Any:
    class Pipeline:
        model = None

    Pipeline.__module__ = "transformers.pipelines.text_classification"
    return Pipeline()


def a_sentence_transformer() -> nn.Module:
    class SentenceTransformer(nn.Sequential):
        pass

    SentenceTransformer.__module__ = "sentence_transformers.SentenceTransformer"
    return SentenceTransformer(toys.encoder())


@pytest.mark.parametrize(
    ("make", "advice"),
    [
        (lambda: toys.Encoder, r"Encoder is a class.*instance"),
        (lambda: "bert-base-uncased", r"from_pretrained"),
        (lambda: Path("folder"), r"from_pretrained"),
        (a_pipeline, r"pipeline\.model"),
        (a_sentence_transformer, r"sentence_transformer\[0\]\.auto_model"),
        (lambda: object(), r"Module.*not object"),
    ],
)
@pytest.mark.parametrize("verb", ["prune", "explain", "export"])
def test_what_is_no_model_is_sent_back_with_what_to_pass(
    make: Callable[[], Any], advice: str, verb: str, tmp_path: Path
) -> None:
    calls: dict[str, Callable[[Any], Any]] = {
        "prune": lambda model: prunepass.prune(model, PLAN, harness.example()),
        "explain": lambda model: prunepass.explain(model, PLAN, harness.example()),
        "export": lambda model: prunepass.export(model, PLAN, tmp_path / "out", to="pt2"),
    }
    with pytest.raises(OptionError, match=rf"{verb}\(\) takes.*{advice}"):
        calls[verb](make())
    assert not list(tmp_path.iterdir())


class Passing(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def test_torchscript_and_shards_are_refused_by_name() -> None:
    class FullyShardedDataParallel(Passing):
        pass

    script: Any = torch.jit.trace(Passing(), torch.zeros(2, 3))
    for model, cause in (
        (script, "TorchScript"),
        (FullyShardedDataParallel(), "sharded"),
        (nn.Sequential(script), "TorchScript"),
    ):
        with pytest.raises(PruneError, match=cause):
            prunepass.prune(model, PLAN, harness.example())
