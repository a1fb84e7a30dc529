"""Each detector on small pieces of code: it finds the defect, and it does not where the code is right."""

from __future__ import annotations

import ast
import textwrap
from dataclasses import dataclass, replace

import pytest

from swift_lora_fix.install import releases

from . import detectors
from .walk import Call, calls_of

# A sync with every defect cured: the unmerged base and the adapter first, then the adapter.
GOOD_ROLLOUT = """
from .utils import TensorLoRARequest

class RolloutTrainerMixin:
    def prepare_rollout(self):
        self._prepare_vllm()
        self.groups = self.split_batches()

    def split_batches(self):
        ...

    def _load_state_dict_to_vllm(self, state_dict):
        self.engine.inner_model.load_weights(state_dict.items())

    def _prepare_vllm(self):
        self.rollout_enable_lora = False
        self.engine = self._prepare_vllm_engine()

    def _prepare_vllm_engine(self):
        if self.args.vllm_enable_lora:
            self.rollout_enable_lora = True
        return GRPOVllmEngine(load_format='dummy')

    def _fast_infer(self, samples):
        self._move_model_to_vllm()

    def _engine_infer(self, infer_requests, request_config=None, *, use_tqdm=False):
        ...

    def _move_model_to_vllm(self, skip_async_check=False):
        args = self.args
        full = args.tuner_type == 'full' or not self.rollout_enable_lora
        if full or not self.base_sync_done or args.sleep_level == 2:
            self._move_full_model_to_vllm()
        else:
            self._move_adapter_to_vllm()
        if not self.engine.engine.reset_prefix_cache():
            raise RuntimeError
        self.engine.engine.reset_encoder_cache()

    def _load(self, state):
        self.engine.inner_model.load_weights(state)

    def _move_full_model_to_vllm(self):
        is_peft = is_peft_model(self.model)
        should_merge = is_peft and not self.rollout_enable_lora
        if should_merge:
            with patch_lora_merge(self.model):
                self.model.merge_adapter()
        self._load(self.model.state_dict())
        if is_peft and self.rollout_enable_lora:
            self._move_adapter_to_vllm()

    def _move_adapter_to_vllm(self):
        with patch_lora_merge(self.model):
            tensors = get_peft_model_state_dict(self.model)
        self.engine.engine.add_lora(TensorLoRARequest(lora_int_id=VLLM_LORA_INT_ID, lora_tensors=tensors))
"""
GOOD_UTILS = """
VLLM_LORA_INT_ID = 111

def patch_lora_merge(model, parameter_group=None):
    def merge(self, safe_merge=False, adapter_names=None):
        for adapter in adapter_names:
            self.lora_A[adapter].weight.data = self.lora_A[adapter].weight.data.to(self.base_layer.weight.device)
        return self.merge_origin(safe_merge, adapter_names)
    yield model
"""
GOOD_ENGINE = """
class GRPOVllmEngine:
    def infer(self, infer_requests, adapter_request=None):
        adapter_request = self._adapter(adapter_request)
        return super().infer(infer_requests, adapter_request=adapter_request)

    def _adapter(self, adapter_request):
        if not adapter_request and self.enable_lora:
            if VLLM_LORA_INT_ID not in self.engine.list_loras():
                raise RuntimeError('the adapter is not in the engine')
            adapter_request = LoRARequest(VLLM_LORA_INT_ID)
        return adapter_request
"""
GOOD_SERVER = """
def llm_worker(args, connection):
    while True:
        command = connection.recv()
        try:
            result = getattr(engine, command['method'])()
        except Exception as error:
            result = None
            connection.send({'status': 'error', 'error': str(error)})
"""


@dataclass(frozen=True)
class Snippets:
    rollout_source: str = GOOD_ROLLOUT
    utils_source: str = GOOD_UTILS
    engine_source: str = GOOD_ENGINE
    server_source: str = GOOD_SERVER

    @property
    def rollout(self) -> ast.Module:
        return ast.parse(self.rollout_source)

    @property
    def utils(self) -> ast.Module:
        return ast.parse(self.utils_source)

    @property
    def engine(self) -> ast.Module:
        return ast.parse(self.engine_source)

    @property
    def server(self) -> ast.Module:
        return ast.parse(self.server_source)

    def edited(self, part: str, *edits: tuple[str, str]) -> Snippets:
        source: str = getattr(self, part)
        for old, new in edits:
            assert source.count(old) == 1, old
            source = source.replace(old, new)
        ast.parse(source)
        return replace(self, **{part: source})


GOOD = Snippets()

SHOULD_MERGE = "should_merge = is_peft and not self.rollout_enable_lora"
SEND_WITH_FIRST = "if is_peft and self.rollout_enable_lora:\n            self._move_adapter_to_vllm()"
READ = "            tensors = get_peft_model_state_dict(self.model)\n"
MERGE_AND_READ = "            self.model.merge_adapter()\n" + READ + "            self.model.unmerge_adapter()\n"
CHECKED_RESET = "if not self.engine.engine.reset_prefix_cache():\n            raise RuntimeError"
MOVE_AND_CAST = "self._move_adapter_to_device_of_base_layer(adapter)"
MOVE = "self.lora_A[adapter].weight.data = self.lora_A[adapter].weight.data.to(self.base_layer.weight.device)"
NO_FIRST_ADAPTER = (SEND_WITH_FIRST, "")
NO_SLEEP = (" or args.sleep_level == 2", "")
MERGING_MOVE = GOOD.edited("rollout_source", (READ, MERGE_AND_READ))

# What each defect looks like when it is put into the good code, and what else comes with it.
BROKEN = {
    "first-batch-base": (GOOD.edited("rollout_source", NO_FIRST_ADAPTER), {"sleep-2-plain-base"}),
    "sleep-2-plain-base": (GOOD.edited("rollout_source", NO_FIRST_ADAPTER), {"first-batch-base"}),
    "double-count": (GOOD.edited("rollout_source", (SHOULD_MERGE, "should_merge = is_peft")), set()),
    "double-count-on-resume": (
        GOOD.edited("rollout_source", (SHOULD_MERGE, "should_merge = is_peft and self.args.resume_from_checkpoint")),
        set(),
    ),
    "sleep-2-loses-base": (GOOD.edited("rollout_source", NO_SLEEP), set()),
    "base-drift": (MERGING_MOVE, set()),
    "lora-downcast": (MERGING_MOVE.edited("utils_source", (MOVE, MOVE_AND_CAST)), {"base-drift"}),
    "fails-open": (
        GOOD.edited("engine_source", ("raise RuntimeError('the adapter is not in the engine')", "return None")),
        set(),
    ),
    "stale-encoder-cache": (GOOD.edited("rollout_source", ("self.engine.engine.reset_encoder_cache()", "")), set()),
    "unchecked-cache-reset": (
        GOOD.edited(
            "rollout_source",
            (CHECKED_RESET, "self.engine.engine.reset_prefix_cache()"),
        ),
        set(),
    ),
    "batched-move-incomplete": (
        GOOD.edited(
            "rollout_source",
            ("        self.groups = self.split_batches()\n", ""),
            (
                "        self.engine = self._prepare_vllm_engine()\n",
                "        self.groups = self.split_batches()\n        self.engine = self._prepare_vllm_engine()\n",
            ),
        ),
        set(),
    ),
    "server-swallows-errors": (
        GOOD.edited("server_source", ("connection.send({'status': 'error', 'error': str(error)})", "log(error)")),
        set(),
    ),
}


def test_there_is_a_detector_for_each_defect_of_the_table() -> None:
    in_table = {defect.key for family in releases.FAMILIES for defect in family.defects}
    assert set(detectors.DETECTORS) == in_table == set(BROKEN)


def test_nothing_is_found_in_code_that_is_right() -> None:
    assert detectors.defects_in(GOOD) == set()
    assert detectors.broken_targets(GOOD.rollout, releases.HOOKS + releases.CALLS) == []


@pytest.mark.parametrize("key", BROKEN)
def test_a_defect_put_into_the_code_is_found(key: str) -> None:
    source, others = BROKEN[key]
    assert detectors.defects_in(source) == {key, *others}


def test_the_count_of_the_lora() -> None:
    assert detectors.times_counted(GOOD) == [1, 1, 1]
    assert detectors.times_counted(GOOD, sleep_level=2) == [1, 1, 1]
    assert detectors.times_counted(BROKEN["double-count"][0]) == [2, 2, 2]  # merged and sent with the first sync
    upstream = BROKEN["double-count"][0].edited("rollout_source", NO_FIRST_ADAPTER)
    assert detectors.times_counted(upstream) == [1, 2, 2]
    assert detectors.times_counted(upstream, sleep_level=2) == [1, 1, 1]
    assert detectors.times_counted(BROKEN["sleep-2-loses-base"][0], sleep_level=2) == [1, None, None]


def test_a_merge_in_a_generator_counts() -> None:
    """How 4.5 and later push the model."""
    source = GOOD.edited("rollout_source", NO_FIRST_ADAPTER, (SHOULD_MERGE, "should_merge = is_peft")).edited(
        "rollout_source",
        (
            textwrap.indent(
                "if should_merge:\n"
                "    with patch_lora_merge(self.model):\n"
                "        self.model.merge_adapter()\n"
                "self._load(self.model.state_dict())\n",
                " " * 8,
            ),
            textwrap.indent(
                "def states():\n"
                "    if should_merge:\n"
                "        self.model.merge_adapter()\n"
                "    yield self.model.state_dict()\n"
                "for state in states():\n"
                "    self._load(state)\n",
                " " * 8,
            ),
        ),
    )
    assert detectors.times_counted(source) == [1, 2, 2]


@pytest.mark.parametrize("guard", ["if self.keeps_dtype:", "with keep_dtype(self):"])
def test_a_guarded_cast_is_no_downcast(guard: str) -> None:
    guarded = f"{guard}\n                {MOVE_AND_CAST}"
    assert detectors.defects_in(MERGING_MOVE.edited("utils_source", (MOVE, guarded))) == {"base-drift"}


def test_a_cast_that_no_sync_reaches_is_no_downcast() -> None:
    assert detectors.defects_in(GOOD.edited("utils_source", (MOVE, MOVE_AND_CAST))) == set()


def test_an_engine_that_picks_the_first_adapter_fails_open() -> None:
    source = replace(
        GOOD,
        engine_source="""
class GRPOVllmEngine:
    def infer(self, infer_requests, adapter_request=None):
        if not adapter_request and self.enable_lora:
            ids = list(self.engine.list_loras())
            if ids:
                adapter_request = LoRARequest(ids[0])
        return super().infer(infer_requests, adapter_request=adapter_request)
""",
    )
    assert detectors.defects_in(source) == {"fails-open"}


def test_adapter_ids() -> None:
    assert detectors.adapter_id(GOOD) == "fixed"
    random = GOOD.edited("rollout_source", ("lora_int_id=VLLM_LORA_INT_ID", "lora_int_id=time.time_ns() % 7"))
    assert detectors.adapter_id(random) == "random"
    with pytest.raises(AssertionError):
        detectors.adapter_id(GOOD.edited("utils_source", ("VLLM_LORA_INT_ID = 111", "VLLM_LORA_INT_ID = 112")))


@pytest.mark.parametrize(
    "edit, problem",
    [
        (("_fast_infer(self, samples)", "_fast_infer(self)"), "_fast_infer"),
        (("_fast_infer(self, samples)", "_fast_infer(self, samples, config)"), "_fast_infer"),
        (("_move_model_to_vllm(self, skip_async_check=False)", "_move_model_to_vllm(self)"), "_move_model_to_vllm"),
        (("infer_requests, request_config=None", "requests, config=None"), "_engine_infer"),
        (("def prepare_rollout(self)", "def prepare(self)"), "prepare_rollout: not there"),
        (("def _move_adapter_to_vllm(self)", "def _move_adapter_to_vllm(self, adapter)"), "_move_adapter_to_vllm"),
        (("from .utils import TensorLoRARequest", "from .utils import LoRARequest"), "TensorLoRARequest: not there"),
        (("class RolloutTrainerMixin", "class RolloutMixin"), "not there"),
    ],
)
def test_a_broken_contract_is_named(edit: tuple[str, str], problem: str) -> None:
    problems = detectors.broken_targets(GOOD.edited("rollout_source", edit).rollout, releases.HOOKS + releases.CALLS)
    assert any(problem in found for found in problems), problems


def test_a_renamed_parameter_that_goes_by_position_is_fine() -> None:
    source = GOOD.edited("rollout_source", ("_fast_infer(self, samples)", "_fast_infer(self, inputs, *, more=None)"))
    assert detectors.broken_targets(source.rollout, releases.HOOKS) == []


# ---- the walk ------------------------------------------------------------------------------------------------------


def names_of(body: str, **facts: object) -> list[str]:
    source = "class C:\n    def run(self):\n" + textwrap.indent(textwrap.dedent(body), " " * 8)
    return [call.name for call in calls_of(ast.parse(source), "C", "run", facts)]


def test_a_known_condition_is_followed_one_way_an_unknown_one_both() -> None:
    body = "if flag:\n    yes()\nelse:\n    no()"
    assert names_of(body, flag=True) == ["yes"]
    assert names_of(body, flag=False) == ["no"]
    assert names_of(body) == ["yes", "no"]


def test_a_return_or_raise_ends_the_walk_only_where_it_is_certain() -> None:
    assert names_of("if flag:\n    raise E\nafter()", flag=True) == []
    assert names_of("if flag:\n    raise E\nafter()") == ["after"]
    assert names_of("try:\n    return\nfinally:\n    clean()\nafter()") == ["clean"]
    assert names_of("for x in y:\n    break\n    never()\nafter()") == ["after"]


def test_unknown_is_not_false() -> None:
    assert names_of("if flag and other:\n    yes()", flag=True) == ["yes"]
    assert names_of("if flag and other:\n    yes()", flag=False) == []
    assert names_of("if not other:\n    yes()\nelse:\n    no()") == ["yes", "no"]
    assert names_of("x = None\nx = make()\nif x is None:\n    yes()") == ["make", "yes"]


def test_helpers_properties_and_recursion_are_followed() -> None:
    source = """
class C:
    @property
    def wanted(self):
        return not self.off
    def run(self):
        if self.wanted:
            self.helper()
    def helper(self):
        self.run()
        done = self.engine.finish()
"""
    facts = {"self.off": False}
    assert calls_of(ast.parse(source), "C", "run", facts) == [
        Call("helper", ("run",), dropped=True),
        Call("run", ("run", "helper"), dropped=True),
        Call("finish", ("run", "helper"), dropped=False),
    ]
    assert calls_of(ast.parse(source), "C", "run", {"self.off": True}) == []
