"""A short training, for one process or several: writes its losses, stages and the size of its weights as JSON."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from cases import rows, trainer


def main(out: Path, batch: int) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    data = sorted(rows(64), key=lambda row: len(row["input_ids"]))
    backend = {"ddp_backend": "gloo"} if "RANK" in os.environ else {}
    made = trainer(
        out.parent / "unused",
        steps=8,
        search="spread",
        data=data,
        ranking_loss="arp2",  # draws no pairs
        arguments={"per_device_train_batch_size": batch, "data_seed": 0} | backend,
    )
    made.train()
    if not made.is_world_process_zero():
        return
    logged = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
    norm = sum(p.detach().double().square().sum().item() for p in made.student.parameters()) ** 0.5
    stages = [s.to_dict() for s in made.plan.stages] if made.plan else []
    figures = {"loss": logged, "norm": norm, "stages": stages, "processes": made.args.world_size}
    out.write_text(json.dumps(figures), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
