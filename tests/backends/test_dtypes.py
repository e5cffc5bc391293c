"""Targets under `torch.autocast` and with models in other dtypes: eager's answer, or a refusal that says what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from runtimes import CONFIG, bert, lowered, text
from torch import Tensor, nn

import prunepass
from prunepass import Protect, PrunePlan, Stage
from prunepass.backends import cache
from prunepass.errors import PruneError

#: scores of whole numbers: the choice is one in every dtype
PLAN = PrunePlan([Stage(1, "1/2")], "random", Protect(first=1, token_ids=(5,)))  # type: ignore[arg-type]
BFLOAT16 = torch.bfloat16


def states(model: nn.Module, inputs: dict[str, Tensor], *, autocast: bool) -> Tensor:
    with torch.no_grad(), torch.autocast("cpu", dtype=BFLOAT16, enabled=autocast):
        found: Tensor = model(**inputs).last_hidden_state
    return found


def compiled(model: nn.Module, target: str) -> Any:
    torch._dynamo.reset()
    options = {"plan": PLAN, "target": target, "config": CONFIG.get(target)}
    return torch.compile(model, backend="tokprune", options=options)


@pytest.mark.parametrize(
    ("target", "dtype", "autocast"),
    [
        ("openvino", torch.float32, True),
        pytest.param("openvino", torch.float16, False, marks=pytest.mark.slow),
        pytest.param("openvino", BFLOAT16, False, marks=pytest.mark.slow),
        ("eager", torch.float32, True),
        pytest.param("inductor", torch.float32, True, marks=pytest.mark.slow),
        pytest.param("inductor", torch.float64, False, marks=pytest.mark.slow),
    ],
)
def test_answers_are_those_of_eager(target: str, dtype: torch.dtype, autocast: bool) -> None:
    inputs = text(3, 20)
    wanted = states(prunepass.prune(bert(num_layers=2).to(dtype), PLAN, inputs), inputs, autocast=autocast)
    found = states(compiled(bert(num_layers=2).to(dtype), target), inputs, autocast=autocast)
    assert found.dtype == wanted.dtype
    within = 1e-10 if dtype == torch.float64 else 6e-2
    assert (found.double() - wanted.double()).abs().max() < within


@pytest.mark.parametrize(
    ("target", "dtype", "autocast", "says"),
    [
        ("onnxruntime", torch.float32, True, r"is bfloat16 and ONNX Runtime.*leave its block"),
        ("onnxruntime", torch.float64, False, r"no kernel.*float64.*model\.float\(\)"),
        ("openvino", torch.float64, False, r"is float64 and OpenVINO.*model\.float\(\)"),
    ],
)
def test_refusals_say_what_to_do(target: str, dtype: torch.dtype, autocast: bool, says: str) -> None:
    run = compiled(bert(num_layers=2).to(dtype), target)
    with pytest.raises(Exception, match=says) as caught:
        states(run, text(3, 20), autocast=autocast)
    assert isinstance(getattr(caught.value, "inner_exception", caught.value), PruneError)


def test_sessions_on_disk_are_kept_apart_from_those_of_autocast(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    torch.manual_seed(0)
    layer, x = nn.Linear(256, 64).eval(), torch.randn(3, 256)
    answers = []
    for autocast in (True, False):
        torch._dynamo.reset()
        with cache.using(tmp_path), torch.no_grad(), torch.autocast("cpu", dtype=BFLOAT16, enabled=autocast):
            answers.append((lowered(layer, "openvino")(x), layer(x)))
    (half, wanted_half), (found, wanted) = answers
    assert half.dtype == wanted_half.dtype == BFLOAT16
    assert found.dtype == torch.float32
    assert (found - wanted).abs().max() < 1e-5


@pytest.fixture(scope="module", name="folder")
def _folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in float32 that was exported under autocast."""
    pytest.importorskip("openvino")
    with torch.autocast("cpu", dtype=BFLOAT16):
        return prunepass.export(
            bert(num_layers=2), PLAN, tmp_path_factory.mktemp("half") / "out", example_inputs=text(2, 9)
        )


@pytest.fixture(scope="module", name="pruned")
def _pruned() -> nn.Module:
    return prunepass.prune(bert(num_layers=2), PLAN, text(3, 20))


def test_files_hold_the_models_own_dtype(folder: Path, pruned: nn.Module) -> None:
    import openvino

    inputs = text(3, 20)
    wanted = states(pruned, inputs, autocast=False)
    run = openvino.Core().compile_model(folder / "openvino_model.xml", "CPU", CONFIG["openvino"])
    found = run({k: v.numpy() for k, v in inputs.items()})["last_hidden_state"]
    assert (torch.from_numpy(found.copy()) - wanted).abs().max() < 1e-4


def test_openvino_files_take_a_mask_of_one_row_for_all(folder: Path, pruned: nn.Module) -> None:
    import openvino

    ids, row = text(3, 20)["input_ids"], text(1, 20)["attention_mask"]
    inputs = {"input_ids": ids, "attention_mask": row.expand(3, -1).contiguous()}
    wanted = states(pruned, inputs, autocast=False)
    run = openvino.Core().compile_model(folder / "openvino_model.xml", "CPU", CONFIG["openvino"])
    for mask in (row, inputs["attention_mask"]):
        found = run({"input_ids": ids.numpy(), "attention_mask": mask.numpy()})["last_hidden_state"]
        assert (torch.from_numpy(found.copy()) - wanted).abs().max() < 1e-4
    with pytest.raises(RuntimeError):
        run({"input_ids": ids.numpy(), "attention_mask": inputs["attention_mask"][:2].numpy()})
