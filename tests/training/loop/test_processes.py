"""Several processes: what is refused, and what only the main one does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cases import trainer
from transformers import Trainer, TrainingArguments

from prunepass.errors import OptionError
from prunepass.training.loop.trainer import _check_processes


def test_sharded_training_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However it was asked for: launchers say it by the environment."""
    init = Trainer.__init__

    def sharded(self: Trainer, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        self.is_fsdp_enabled = True

    monkeypatch.setattr(Trainer, "__init__", sharded)
    with pytest.raises(OptionError, match="FSDP and DeepSpeed"):
        trainer(tmp_path)


def test_processes_that_would_each_train_alone_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = TrainingArguments(str(tmp_path), report_to="none")
    _check_processes(arguments)
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(OptionError, match="use_cpu=True"):
        _check_processes(arguments)


@pytest.mark.slow
def test_other_processes_get_what_the_main_one_made_and_learn_of_its_errors(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import pathlib\n"
        "from accelerate import PartialState\n"
        "from prunepass.errors import MissingExtraError, PruneError\n"
        "from prunepass.training.loop.processes import from_main, is_main, leave\n"
        "own = PartialState(cpu=True).process_index\n"
        "assert is_main() == (own == 0)\n"
        "assert from_main(lambda: ('made by', own)) == ('made by', 0)\n"
        "def fails():\n"
        "    raise MissingExtraError('openvino', 'openvino', 'It')\n"
        "try:\n"
        "    from_main(fails)\n"
        "except PruneError as e:\n"
        "    pathlib.Path(__file__).with_name(f'{own}.txt').write_text(str(e))\n"
        "leave()\n"
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*launch, str(script)], capture_output=True, text=True, env=environment, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    own, others = ((tmp_path / f"{i}.txt").read_text() for i in (0, 1))
    assert others == f"The main process failed: MissingExtraError: {own}"
