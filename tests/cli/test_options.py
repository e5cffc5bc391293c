"""The options of the commands, and of training and search in Python: names and defaults as in users' scripts."""

from __future__ import annotations

import ast
import dataclasses
import inspect
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("typer")

import typer.main
from typer.testing import CliRunner

from prunepass import cli
from prunepass.cli.app import app
from prunepass.cli.options import PlanOptions, PlansOptions, scorer_of
from prunepass.errors import OptionError
from prunepass.training import data
from prunepass.training.data.options import EvalOptions, Goal, SearchOptions, Source, TrainOptions
from prunepass.training.data.tuning import TuneOptions

#: of each command: flags, or the name of an argument, and the default
COMMANDS = {
    "bench": """
        --batch-size = 1
        --config = None, several
        --dtype = float32
        --file = None
        --html = None
        --json = False
        --keep = None
        --layers = None
        --max-length = None
        --plan = None, several
        --repeats = 10
        --restore = None
        --leave = None
        --scorer = None
        --target = inductor
        --text = None, several
        --texts = 16
        MODEL = required
    """,
    "explain": """
        --dtype = float32
        --file = None
        --html = None
        --json = False
        --keep = None
        --layers = None
        --max-length = None
        --plan = None, several
        --restore = None
        --leave = None
        --scorer = None
        --target = None
        --text = None, several
        MODEL = required
    """,
    "export": """
        --batch = None
        --dtype = float32
        --file = None
        --int8 = False
        --keep = None
        --layers = None
        --length = None
        --normalize/--no-normalize = None
        --plan = None, several
        --pooled = False
        --pooling = None
        --restore = None
        --leave = None
        --scorer = None
        --stateful/--no-stateful = None
        --text = None, several
        --to = openvino
        MODEL = required
        OUT = required
    """,
    "eval": """
        --batch-size = 32
        --config = None, several
        --deployed = False
        --encoding = utf-8-sig
        --int8 = False
        --json = False
        --label = None
        --max-length = None
        --pair = None
        --picture = None
        --plan = None, several
        --quoting/--no-quoting = None
        --repeats = 5
        --rows = None
        --seed = 0
        --split = None
        --target = inductor
        --text = None
        --timed = 32
        DATA = required
        MODEL = required
    """,
    "search": """
        --batch-size = 32
        --budget = None
        --encoding = utf-8-sig
        --json = False
        --latency-ms = None
        --leave = None
        --max-evaluations = 80
        --max-length = None
        --out/-o = required
        --overwrite = False
        --pair = None
        --plan = None
        --protect-segment = None
        --protect-token-ids = None
        --quoting/--no-quoting = None
        --rows = 256
        --scorer = None
        --seed = 0
        --split = None
        --target = flops
        --text = None
        DATA = required
        MODEL = required
    """,
    "tune": """
        --batch-size = 32
        --budgets = None
        --encoding = utf-8-sig
        --epochs = 2.0
        --json = False
        --label = None
        --loss = 1.0
        --max-evaluations = 40
        --max-length = None
        --out/-o = required
        --overwrite = False
        --pair = None
        --quoting/--no-quoting = None
        --repeats = 5
        --resume = False
        --rows = None
        --scorers = None
        --seed = 0
        --split = None
        --target = None, several
        --text = None
        --timed = 24
        --train = False
        DATA = required
        MODEL = required
    """,
    "train": """
        --batch-size = 32
        --bf16 = False
        --budget = None
        --calibration-rows = 768
        --encoding = utf-8-sig
        --epochs = 2.0
        --eval = None
        --eval-split = None
        --freeze-model/--train-model = False
        --json = False
        --label = None
        --latency-ms = None
        --leave = None
        --logging = none
        --lr = 5e-05
        --max-length = None
        --max-seconds = None
        --method = both
        --out/-o = required
        --overwrite = False
        --pair = None
        --predictor-lr = 0.002
        --predictor-positions = False
        --protect-segment = None
        --protect-token-ids = None
        --quoting/--no-quoting = None
        --resume = False
        --save-steps = None
        --scorer = None
        --seed = 0
        --split = None
        --target = flops
        --teacher = None
        --validation = None
        --validation-split = None
        --text = None
        DATA = required
        MODEL = required
    """,
}
#: of each class, in the order in which arguments may be given without names
CLASSES: dict[type, str] = {
    Goal: "share=None latency_ms=None target='flops'",
    Source: "name text=None pair=None label=None split=None quoting=None encoding='utf-8-sig'",
    TrainOptions: """
        model data out goal eval_data=None validation=None method='both' teacher=None scorer=None epochs=2.0
        learning_rate=5e-05 predictor_learning_rate=0.002 predictor_positions=False batch_size=32 max_length=None
        freeze_model=False seed=0 bf16=False calibration_rows=768 save_steps=None resume=False logging='none'
        protect_token_ids=() overwrite=False protect_segment=None leave=None max_seconds=None
    """,
    EvalOptions: """
        model data plan=None target='inductor' config=None deployed=False rows=None timed=32 repeats=5 batch_size=32
        max_length=None seed=0 int8=False
    """,
    TuneOptions: """
        model data out loss=1.0 target=None budgets=(0.7, 0.55, 0.4, 0.3) scorers=('norm', 'attention', 'likeness')
        train=False
        epochs=2.0 rows=None timed=24 repeats=5 max_evaluations=40 batch_size=32 max_length=None seed=0 resume=False
        overwrite=False
    """,
    SearchOptions: """
        model data out goal scorer=None plan=None rows=256 max_evaluations=80 batch_size=32 max_length=None seed=0
        protect_token_ids=() overwrite=False
        protect_segment=None leave=None
    """,
}


def parameters(command: str) -> list[Any]:
    root: Any = typer.main.get_command(app)
    return list(root.commands[command].params)


def described(parameter: Any) -> str:
    name = "/".join([*parameter.opts, *parameter.secondary_opts])
    if parameter.param_type_name == "argument":
        name = parameter.metavar or parameter.name
    default = "required" if parameter.required else f"{parameter.default}"
    return f"{name} = {default}" + (", several" if getattr(parameter, "multiple", False) else "")


@pytest.mark.parametrize("command", COMMANDS)
def test_flags_and_defaults_of_a_command(command: str) -> None:
    expected = [line.strip() for line in COMMANDS[command].strip().splitlines()]
    assert sorted(map(described, parameters(command))) == sorted(expected)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_says_what_it_is_for(command: str) -> None:
    assert not [described(p) for p in parameters(command) if len(p.help or "") < 12]


@pytest.mark.parametrize("kind", CLASSES)
def test_arguments_and_defaults_in_python(kind: type) -> None:
    assert dataclasses.is_dataclass(kind)
    found = [str(p).split(": ")[0] + _default(p) for p in inspect.signature(kind).parameters.values()]
    assert " ".join(found) == " ".join(CLASSES[kind].split())


def _default(parameter: inspect.Parameter) -> str:
    return "" if parameter.default is inspect.Parameter.empty else f"={parameter.default!r}"


def test_no_two_options_are_declared_in_the_same_words() -> None:
    """What several commands have is one declaration; a command may say in words of its own what it is for."""
    found: Counter[str] = Counter()
    files = [*Path(cli.__path__[0]).glob("*.py"), *Path(data.__path__[0]).glob("*.py")]
    for node in (node for file in files for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))):
        if not isinstance(node, ast.Call) or ast.unparse(node.func) not in ("Declared", "typer.Option"):
            continue
        named = {keyword.arg: keyword.value for keyword in node.keywords}
        given = named.get("help") or (node.args[0] if node.args else None)
        if "metavar" not in named and isinstance(given, ast.Constant):  # an argument is no option
            found[given.value] += 1
    assert len(found) > 60
    assert not [text for text, count in found.items() if count > 1]


def test_a_command_says_in_its_own_words_what_an_option_is_for() -> None:
    own, shared = ({p.name: p.help for p in parameters(name)} for name in ("export", "explain"))
    assert all("calibrate on" in own[name] for name in ("text", "file"))
    assert "level" in own["plan"]
    assert not any("calibrate" in shared[name] for name in ("text", "file"))
    assert "level" not in shared["plan"]
    assert own["keep"] == shared["keep"]


def test_a_pooling_that_is_not_known_is_named_with_those_that_are() -> None:
    result = CliRunner().invoke(app, ["export", "model", "out", "--pooled", "--pooling", "median"])
    assert result.exit_code == 2
    assert "There is no pooling 'median'; choose one of mean, cls, last." in result.output


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("norm", "norm"),
        ("attention:rows=64", {"name": "attention", "rows": 64}),
        ("mine:a=x, b=[1, 2]", None),
        ("mine:a=x,b=true", {"name": "mine", "a": "x", "b": True}),
        ('{"name": "random", "seed": 7}', {"name": "random", "seed": 7}),
        ("{name}", None),
        ("attention:64", None),
        (":rows=64", None),
        ("attention:rows=64,rows=8", None),
    ],
)
def test_a_scorer_takes_options(text: str, wanted: Any) -> None:
    if wanted is None:
        with pytest.raises(OptionError, match="scorer"):
            scorer_of(text)
    else:
        assert scorer_of(text) == wanted


def test_what_looks_at_one_plan_takes_no_second() -> None:
    assert PlanOptions(["one"]).given == "one"
    with pytest.raises(OptionError, match="plan once; this command looks at one plan"):
        PlanOptions(["one", "two"]).read()


def test_export_takes_one_plan_or_several() -> None:
    assert PlansOptions().given is PlansOptions([]).given is None
    assert PlansOptions(["one"]).given == "one"
    assert PlansOptions(["one", "two"]).given == ["one", "two"]
    with pytest.raises(OptionError, match="There are both a plan and keep"):
        PlansOptions(["one", "two"], keep="0.5", layers="1").read()
