"""What every test shares: no network, one thread, a fixed seed."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# OpenVINO reports its use through this module, from forks of the process. A fork of a worker of many threads can hang,
# and then holds the worker's memory for as long as the tests run.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # none: its import fails

import pytest
import torch

with contextlib.suppress(ImportError):
    import openvino

    _cores: list[openvino.Core] = []

    class _LastingCore(openvino.Core):  # type: ignore[misc]  # a compiled class
        """One that lives as long as the process, for the reason that `prunepass.backends._openvino_core` has. A data
        loader of an earlier test leaves a handler of signals behind, so cores that come and go would end the worker."""

        def __init__(self, *args: object) -> None:
            super().__init__(*args)
            _cores.append(self)

    openvino.Core = _LastingCore  # type: ignore[misc]  # a class is no variable


def pytest_configure(config: pytest.Config) -> None:
    # Tiny models run fastest on one thread, and so do parallel workers.
    torch.set_num_threads(1)


#: cases of ten seconds and more that repeat, on another runtime or with other numbers, what a quicker case of the same
#: file holds: slow ones, so that the default tests stay under twenty minutes on two cores
LONG = (
    "test_arguments.py::test_what_works_works[evaluation]",
    "test_cache.py::test_damaged_entries_are_written_anew[openvino-entry]",
    "test_cache.py::test_two_processes_at_once_and_one_after_them",
    "test_choice.py::TestFolder::test_the_default_plan_on_request",
    "test_cli.py::test_export_in_int8_calibrates_on_a_file",
    "test_cli_plans.py::TestPlanBesideTheModel::test_bench",
    "test_compress.py::test_all_kept_changes_nothing",
    "test_dynamo.py::TestRefusal::test_dense_on_request[openvino]",
    "test_dynamo.py::TestValues::test_a_stage_that_keeps_one_token_at_first[openvino]",
    "test_dynamo.py::TestValues::test_one_session_serves_all_sizes[openvino]",
    "test_dynamo.py::TestValues::test_predictors_that_look_at_places[openvino]",
    "test_dynamo.py::TestValues::test_targets_agree_with_eager[onnxruntime-automatic]",
    "test_dynamo.py::TestValues::test_targets_agree_with_eager[openvino-automatic]",
    "test_embedder.py::test_scores_of_pairs",
    "test_embedder.py::test_vectors_of_onnx_runtime",
    "test_eval.py::test_scores_of_the_target_itself",
    "test_eval.py::test_the_table_says_whether_it_is_worth_it",
    "test_experts.py::test_exported_experts_run_without_us[onnx]",
    "test_experts.py::test_exported_experts_run_without_us[openvino]",
    "test_experts.py::test_exported_experts_run_without_us[pt2]",
    "test_export.py::TestNothingIsWritten::test_a_disk_that_takes_small_files_only[onnx]",
    "test_export.py::TestNothingIsWritten::test_a_writer_that_fails",
    "test_export.py::test_an_exported_program_and_a_pruned_module",
    "test_export.py::test_any_batch_and_length[onnx]",
    "test_export.py::test_any_batch_and_length[openvino]",
    "test_export.py::test_fixed_batch_and_length[openvino]",
    "test_export.py::test_lengths_at_which_a_stage_keeps_one_token_and_others[pt2]",
    "test_export.py::test_the_runtime_alone_runs_the_files[onnx]",
    "test_export.py::test_the_runtime_alone_runs_the_files[openvino]",
    "test_export.py::test_the_runtime_alone_runs_the_files[pt2]",
    "test_files.py::test_labels_and_long_texts_cut",
    "test_fuzz.py::test_nothing_is_wrong_or_raw[5]",
    "test_fuzz.py::test_nothing_is_wrong_or_raw_on_a_target[export onnx]",
    "test_fuzz.py::test_nothing_is_wrong_or_raw_on_a_target[onnxruntime]",
    "test_generation.py::test_chats_go_on_from_their_cache[padded]",
    "test_generation.py::test_every_target_generates_alike[onnxruntime]",
    "test_generation.py::test_in_float64_to_the_last_digit[pruned-mixtral]",
    "test_half.py::test_models_in_other_types_run_in_pytorch[dtype1]",
    "test_half.py::test_stateful_folders_of_half_models_speak_float32[dtype1]",
    "test_int8.py::TestNothingIsWritten::test_a_quantiser_that_fails",
    "test_int8.py::test_near_the_float_model_with_mostly_the_same_tokens[onnx]",
    "test_int8.py::test_onnx_computes_layers_in_int8_and_scores_in_float",
    "test_latency.py::test_a_table_has_the_times_of_its_parts",
    "test_latency_cells.py::test_a_corpus_holds_every_pruned_way_against_every_dense_one",
    "test_latency_cells.py::test_a_group_holds_what_the_page_reads",
    "test_latency_cells.py::test_figures_follow_from_the_times",
    "test_latency_cells.py::test_plans_meet_their_budgets_in_flops",
    "test_lens.py::test_costs_count_the_lens",
    "test_pooled.py::test_genai_reranks_by_the_same_scores",
    "test_pooled.py::test_onnx_vectors_keep_what_the_plan_restores",
    "test_pooled.py::test_programs_pool_as_outside[modernbert-mean-mean-None]",
    "test_registry.py::test_fusions_of_a_dense_encoder[relu-inductor]",
    "test_registry.py::test_fusions_of_a_dense_encoder[relu-openvino]",
    "test_registry.py::test_pruning_loses_no_fusion[onnxruntime]",
    "test_registry.py::test_pruning_loses_no_fusion[openvino]",
    "test_restore_mean.py::TestTargets::test_they_agree[onnxruntime]",
    "test_restore_mean.py::TestTargets::test_they_agree[openvino]",
    "test_segments.py::test_targets[inductor]",
    "test_segments.py::test_targets[openvino]",
    "test_selection.py::test_every_runtime_keeps_the_tokens_of_the_reference[eager-all kinds]",
    "test_selection.py::test_every_runtime_keeps_the_tokens_of_the_reference[eager-fine]",
    "test_selection.py::test_every_runtime_keeps_the_tokens_of_the_reference[eager-half]",
    "test_selection.py::test_every_runtime_keeps_the_tokens_of_the_reference[onnxruntime-fine]",
    "test_selection.py::test_every_runtime_keeps_the_tokens_of_the_reference[onnxruntime-half]",
    "test_stateful.py::test_one_program_serves_the_prompt_and_every_token_after_it",
    "test_sweep.py::test_a_type_is_pruned_right_or_refused[granitemoe]",
    "test_targets.py::TestOffline::test_inference_mode[openvino]",
    "test_targets.py::TestOffline::test_threads_share_one_compiled_model[openvino]",
    "test_targets.py::TestOffline::test_two_models_of_one_class_do_not_mix[openvino]",
    "test_trainer.py::test_a_beginning_that_a_search_protects_is_the_plans_own",
    "test_trainer.py::test_every_method_ends_with_a_plan_within_the_budget_that_deploys_as_trained[both-gates]",
    "test_trainer.py::test_layers_are_searched_for_on_calibration_rows",
    "test_trainer.py::test_other_architectures[llama]",
    "test_trainer.py::test_predictors_learn_places",
    "test_tune.py::test_the_fastest_that_loses_little_is_written",
)


@pytest.hookimpl(tryfirst=True)  # before the expression of -m is applied
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.nodeid.endswith(LONG):
            item.add_marker(pytest.mark.slow)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


#: files whose graphs are checked by runs as well (PRUNEPASS_VERIFY=1): every architecture, every kind of plan. That
#: takes as long as the pruning itself, so the others have the checks that every user has.
VERIFIED = ("test_zoo_oracle", "test_hooks_oracle", "test_contracts", "test_fuzz")


@pytest.fixture(autouse=True)
def _contracts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.path.stem in VERIFIED and "PRUNEPASS_VERIFY" not in os.environ:
        monkeypatch.setenv("PRUNEPASS_VERIFY", "1")


class _SignalStack(ctypes.Structure):
    _fields_ = (("start", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


_stack = ctypes.create_string_buffer(1 << 18)


@pytest.fixture(autouse=True)
def _stack_for_signals() -> None:
    """Handlers of signals run on a stack that is there. Cores of OpenVINO change it, those inside openvino-genai and
    nncf as well, and may leave one that is gone, where the end of a child process would end the worker without a word.
    """
    if sys.platform == "linux":
        ours = _SignalStack(ctypes.addressof(_stack), 0, len(_stack))
        assert ctypes.CDLL(None).sigaltstack(ctypes.byref(ours), None) == 0


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def _own_compilations() -> Iterator[None]:
    """Dynamo remembers the lengths it saw, by function: what one file compiles is not to change another's graphs."""
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """Nothing is compiled yet, and warnings that are given once were not given."""
    torch._dynamo.reset()
    if "prunepass.dynamo.backend" in sys.modules:
        sys.modules["prunepass.dynamo.backend"].tokprune.reset()
    yield
    torch._dynamo.reset()
