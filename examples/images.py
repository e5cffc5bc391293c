"""An image encoder on a folder of photographs: time of the unpruned and the pruned model in turns, how far their
vectors agree, and pictures of the patches that are kept.

    python examples/images.py photographs/ --model facebook/dinov2-small --out drawn
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image, ImageOps
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

import prunepass
from prunepass import PrunePlan, Stage
from prunepass.pipeline import kept_tokens

console = Console()

ENDINGS = (".jpeg", ".jpg", ".png", ".webp")
#: of ImageNet's pixels, as DINOv2 and ViT were trained; used where the model has no settings of its own
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
#: stages of a plan that are drawn
DRAWN = 3
_DENSE = PrunePlan(())
#: pooled vectors [N, D], and means over the tokens [N, D]
Vectors = tuple[Tensor, Tensor]


def plans_for(blocks: int) -> dict[str, PrunePlan]:
    """Two plans that need no training, each of about half of the FLOPs where a model makes some hundred patches.

    The first takes away a quarter of the patches at three places. The second merges some in each block but the last,
    after its attention and by its keys, which is ToMe's way: nearer to the unpruned model, with more operators.
    """
    places = [max(1, blocks * part // 12) for part in (1, 4, 7)]
    few = [Stage(place, keep, leave="merge") for place, keep in zip(places, (0.75, 0.5, 0.25), strict=True)]
    steps = blocks - 1
    many = [Stage(i, 1 - 0.9 * (i + 1) / steps, after_attention=True, leave="merge") for i in range(steps)]
    by_keys = {"name": "likeness", "by": "keys", "sets": "two"}
    return {"three stages": PrunePlan(few, "likeness"), "each block": PrunePlan(many, by_keys)}


@dataclass(frozen=True)
class Outcome:
    """What one way came to.

    Attributes:
        milliseconds: median of a batch.
        flops: how many times fewer than those of the unpruned model.
        pooled, mean: mean cosine to the unpruned model's vectors.
        neighbour: share of the photographs whose nearest other one, by pooled vectors, is the same.
    """

    milliseconds: float
    flops: float
    pooled: float
    mean: float
    neighbour: float


def main(
    photographs: Annotated[Path, typer.Argument(help="Folder of photographs.")],
    model: Annotated[str, typer.Option(help="Folder of a model, or its name on the hub.")] = "facebook/dinov2-small",
    plan: Annotated[list[str] | None, typer.Option(help="Folder of a plan; may be given several times.")] = None,
    target: Annotated[str, typer.Option(help="openvino, onnxruntime, inductor or eager.")] = "openvino",
    precision: Annotated[str, typer.Option(help="Of OpenVINO: f32, bf16, or auto for its choice.")] = "f32",
    size: Annotated[int, typer.Option(help="Pixels of a side.")] = 224,
    count: Annotated[int, typer.Option(help="How many photographs, at most.")] = 32,
    batch: Annotated[int, typer.Option(help="Photographs a call.")] = 8,
    repeats: Annotated[int, typer.Option(help="Timed calls of each way.")] = 10,
    draw: Annotated[int, typer.Option(help="How many photographs to draw.")] = 4,
    out: Annotated[Path, typer.Option(help="Folder for the drawings.")] = Path("drawn"),
) -> dict[str, Outcome]:
    """Embed, compare, draw."""
    warnings.filterwarnings("ignore", category=FutureWarning)  # torch's own, from inside its exporter
    encoder = load_encoder(model)
    files = read_folder(photographs, count)
    squares = [square(file, size) for file in files]
    pixels = pixel_values(squares, model)
    if plan:
        plans = {name: PrunePlan.from_pretrained(name) for name in plan}
    else:
        plans = plans_for(encoder.config.num_hidden_layers)
    options: dict[str, Any] = {"target": target}
    if target == "openvino" and precision != "auto":
        options["config"] = {"INFERENCE_PRECISION_HINT": precision}
    ways = {name: compiled(encoder, one, options) for name, one in {"unpruned": _DENSE, **plans}.items()}
    found = {name: vectors(call, pixels, batch) for name, call in ways.items()}
    times = in_turns(ways, pixels[:batch], repeats)
    outcomes = {"unpruned": compare(found["unpruned"], found["unpruned"], times["unpruned"], 1.0)}
    for name, one in plans.items():
        report = prunepass.explain(encoder, one, {"pixel_values": pixels[:2]})
        if report.flops is None or report.picture is None:
            raise SystemExit(str(report))
        flops = report.flops.example_dense / report.flops.example_pruned
        outcomes[name] = compare(found["unpruned"], found[name], times[name], flops)
        grid = report.picture.rows, report.picture.columns
        for file, picture in zip(files, drawings(encoder, one, pixels[:draw], squares[:draw], grid), strict=False):
            save(picture, out / f"{file.stem}-{name.replace(' ', '-')}.jpg")
    show(outcomes, f"{len(files)} photographs of {size} pixels, {target}, {min(batch, len(files))} a call")
    console.print(f"Patches that are kept: {out}", highlight=False)
    return outcomes


def load_encoder(name: str) -> Any:
    """The model that reads images; of a model of images and texts (CLIP, SigLIP) the part that does."""
    from transformers import AutoModel

    model = AutoModel.from_pretrained(name, dtype=torch.float32)
    return getattr(model, "vision_model", model).eval()


def read_folder(folder: Path, count: int) -> list[Path]:
    """Files of photographs in a folder and those below it, at even distances in the order of their names."""
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in ENDINGS)
    if not files:
        raise SystemExit(f"{folder} holds no photographs ({', '.join(ENDINGS)}).")
    return [files[i * len(files) // count] for i in range(count)] if len(files) > count else files


def square(file: Path, size: int) -> Image.Image:
    """The middle square of a photograph."""
    return ImageOps.fit(Image.open(file).convert("RGB"), (size, size), Image.Resampling.BICUBIC)


def pixel_values(squares: Sequence[Image.Image], model: str) -> Tensor:
    """[N, 3, size, size] float32, as the model's own settings say; ImageNet's, where it has none."""
    from transformers import ImageProcessingMixin

    try:
        settings, _ = ImageProcessingMixin.get_image_processor_dict(model)
    except OSError:
        settings = {}
    mean, deviation = settings.get("image_mean", MEAN), settings.get("image_std", DEVIATION)
    values = torch.stack([torch.from_numpy(np.array(one)) for one in squares]).permute(0, 3, 1, 2) / 255
    return (values - torch.tensor(mean).reshape(1, 3, 1, 1)) / torch.tensor(deviation).reshape(1, 3, 1, 1)


def compiled(model: Any, plan: PrunePlan, options: Mapping[str, Any]) -> Callable[[Tensor], Any]:
    """A call of the model; the unpruned one goes the same way, with a plan without stages."""
    call = torch.compile(model, backend="tokprune", options={**options, "plan": plan})
    return lambda pixels: call(pixel_values=pixels)


def vectors(call: Callable[[Tensor], Any], pixels: Tensor, batch: int) -> Vectors:
    """Of all photographs."""
    pooled, mean = [], []
    with torch.no_grad():
        for part in pixels.split(batch):
            output = call(part)
            states = output.last_hidden_state
            pooled.append(states[:, 0] if output.pooler_output is None else output.pooler_output)
            mean.append(states.mean(dim=1))
    return torch.cat(pooled), torch.cat(mean)


def in_turns(ways: Mapping[str, Callable[[Tensor], Any]], pixels: Tensor, repeats: int) -> dict[str, list[float]]:
    """Milliseconds of each call. All ways take turns, and who begins changes, so that a busy machine slows all alike.
    A call that does not count comes right before each that does."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    with torch.no_grad():
        for repeat in range(repeats):
            for name in list(ways)[:: -1 if repeat % 2 else 1]:
                ways[name](pixels)
                started = time.perf_counter()
                ways[name](pixels)
                times[name].append(1000 * (time.perf_counter() - started))
    return times


def compare(dense: Vectors, pruned: Vectors, times: Sequence[float], flops: float) -> Outcome:
    pooled, mean = (float(cosine_similarity(a, b).mean()) for a, b in zip(dense, pruned, strict=True))
    same = nearest(dense[0]) == nearest(pruned[0])
    return Outcome(median(times), flops, pooled, mean, float(same.float().mean()))


def nearest(pooled: Tensor) -> Tensor:
    """[N], of each photograph the number of the other one whose vector is nearest."""
    unit = normalize(pooled, dim=-1)
    return (unit @ unit.T).fill_diagonal_(-2).argmax(dim=-1)


def drawings(
    model: Any, plan: PrunePlan, pixels: Tensor, squares: Sequence[Image.Image], grid: tuple[int, int]
) -> list[Image.Image]:
    """Each photograph as it is, and beside it with the patches shaded that have left by the first, the middle and the
    last stages: bright where they were merged, dark where they were dropped.

    Args:
        grid: rows and columns of patches.
    """
    kept = kept_tokens(model, plan, {"pixel_values": pixels})
    places = dict.fromkeys(max(0, (i + 1) * len(kept) // DRAWN - 1) for i in range(DRAWN))
    stages = [stage for stage in plan.stages if stage.keep < 1]
    patches = grid[0] * grid[1]
    drawn = []
    for row, photograph in enumerate(squares):
        panels = [np.array(photograph)]
        for place in places:
            left = ~kept[place][row, -patches:].reshape(grid).numpy()
            panels.append(shaded(photograph, left, 255 if stages[place].leave == "merge" else 0))
        gap = np.full((photograph.height, 8, 3), 255, dtype=np.uint8)
        drawn.append(Image.fromarray(np.concatenate([x for panel in panels for x in (panel, gap)][:-1], axis=1)))
    return drawn


def shaded(photograph: Image.Image, left: Any, shade: int) -> Any:
    """[height, width, 3] uint8.

    Args:
        left: [rows, columns] bool, patches that are no longer there.
        shade: grey level that is laid over them.
    """
    pixels = np.array(photograph)
    mask = np.array(Image.fromarray(left).resize(photograph.size, Image.Resampling.NEAREST))
    pixels[mask] = (pixels[mask] * 0.25 + shade * 0.75).astype(np.uint8)
    return pixels


def save(picture: Image.Image, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    picture.save(file, quality=85)


def show(outcomes: Mapping[str, Outcome], title: str) -> None:
    table = Table(title=title)
    for column in ("", "ms", "speedup", "FLOPs", "pooled", "mean", "neighbour"):
        table.add_column(column, justify="right" if column else "left")
    base = outcomes["unpruned"].milliseconds
    for name, o in outcomes.items():
        figures = (f"{o.milliseconds:.1f}", f"{base / o.milliseconds:.2f}", f"1 / {o.flops:.2f}")
        table.add_row(name, *figures, f"{o.pooled:.3f}", f"{o.mean:.3f}", f"{o.neighbour:.0%}")
    console.print(table)
    console.print(
        "ms: of a call, the median. pooled, mean: cosines to the unpruned vectors. neighbour: whose nearest other\n"
        "photograph is the same one.",
        highlight=False,
    )


if __name__ == "__main__":
    typer.run(main)
