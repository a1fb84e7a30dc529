"""The trainer's side: servers that restart, and rollouts of what they then serve."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from swift_lora_fix import errors
from swift_lora_fix.server.wire import POLICY_HEADER
from tests.support.scripted_servers import (
    FIRST,
    Scripted,
    change,
    send,
    writer_for,
)


def test_a_restarted_server_gets_the_policy_again_and_is_asked_once_more(model: Any, scripts: list[Scripted]) -> None:
    _, writer = writer_for(model, scripts)
    digest = send(writer)
    engine = writer.engine
    by = {"server_boot": "first", "server_epoch": 0}
    answers = [SimpleNamespace(rollout_infos={"policy_digest": digest, "policy_step": 0, **by})]
    tries: list[int] = []

    def infer() -> Any:
        tries.append(1)
        if len(tries) == 1:
            scripts[1].restart()
            raise RuntimeError("Multiple errors: [ConnectionError()]")
        return answers

    assert engine.generate(infer) is answers and len(tries) == 2
    assert scripts[1].policy == scripts[0].policy and scripts[1].routes() == [*FIRST, "base", *FIRST]
    assert scripts[0].routes() == scripts[1].routes(), "all of them get it again"
    with pytest.raises(RuntimeError, match="out of memory"):  # nobody lost anything: it is not ours to repeat
        engine.generate(lambda: exec("raise RuntimeError('out of memory')"))


def test_a_server_that_restarted_between_two_steps_is_looked_after(model: Any, scripts: list[Scripted]) -> None:
    """ms-swift syncs first: nobody asked for a rollout in between."""
    _, writer = writer_for(model, scripts)
    writer.send_base()
    send(writer)
    scripts[1].restart()
    scripts[1].calls.clear()
    change(model)
    send(writer)
    assert scripts[1].routes() == ["stage", "base", *FIRST], "the base is compared with this one's"
    assert scripts[0].policy == scripts[1].policy
    assert writer.engine.make_ready() and not writer.engine.make_ready(), "and the gate is due, once"
    scripts[1].restart(changed=1)
    with pytest.raises(errors.BaseMismatchError):
        send(writer)


@pytest.mark.parametrize("route", ["stage", "receive", "commit"])
def test_a_server_that_restarts_within_a_switch_is_not_served_without_its_base(
    model: Any, scripts: list[Scripted], route: str
) -> None:
    """It is back before the retry, and has another base than the one that was compared."""
    _, writer = writer_for(model, scripts)
    writer.send_base()
    send(writer)
    change(model)

    def restart() -> Any:
        scripts[1].restart(changed=1)
        return 503, {"detail": "starting"}, {}

    scripts[1].faults[route] = [restart]
    with pytest.raises(errors.BaseMismatchError, match=scripts[1].url):
        send(writer)
    assert scripts[1].policy is None


def test_a_rollout_of_another_policy_is_refused(model: Any, scripts: list[Scripted]) -> None:
    _, writer = writer_for(model, scripts)
    digest = send(writer)
    by = {"server_boot": "first", "server_epoch": 0}
    good = SimpleNamespace(rollout_infos={"policy_digest": digest, **by})
    for infos in ({}, {"policy_digest": "other", "policy_step": 3, **by}):
        with pytest.raises(errors.PolicyMismatchError, match=f"policy {infos.get('policy_digest')}.*asked for was"):
            writer.engine.generate(lambda infos=infos: [good, SimpleNamespace(rollout_infos=infos)])
    for wrong in ({"server_boot": "second"}, {"server_epoch": 1}):
        infos = {**good.rollout_infos, **wrong}
        with pytest.raises(errors.PolicyMismatchError, match="that nobody proved"):
            writer.engine.generate(lambda infos=infos: [good, SimpleNamespace(rollout_infos=infos)])


def test_a_server_that_cannot_be_given_the_policy_again_stays_lost(model: Any, scripts: list[Scripted]) -> None:
    _, writer = kept = writer_for(model, scripts)
    send(writer)
    scripts[1].restart()
    scripts[1].faults["stage"] = [(422, {"message": "no memory"}, {})]
    with pytest.raises(errors.RolloutServerError, match="no memory"):
        writer.engine.make_ready()
    assert not writer.is_current() and writer.engine.make_ready() and writer.is_current()
    assert not writer.engine.make_ready() and kept


def test_a_server_that_comes_back_with_another_base_is_refused(model: Any, scripts: list[Scripted]) -> None:
    _, writer = kept = writer_for(model, scripts)
    writer.send_base()
    send(writer)
    scripts[1].restart(changed=1)
    with pytest.raises(errors.BaseMismatchError, match=scripts[1].url):
        writer.engine.make_ready()
    assert scripts[1].policy is None and kept


def test_nothing_is_generated_while_servers_may_differ(model: Any, scripts: list[Scripted]) -> None:
    _, writer = kept = writer_for(model, scripts)
    with pytest.raises(errors.EngineStateError, match="may serve different policies"):
        writer.engine.generate(list)
    assert kept


def test_the_plain_base_is_asked_for_and_given_back(model: Any, scripts: list[Scripted]) -> None:
    trainer, writer = writer_for(model, scripts)
    send(writer)
    with pytest.raises(ZeroDivisionError), writer.engine.plain():
        assert all(script.plain for script in scripts)
        assert POLICY_HEADER not in trainer.vllm_client.sessions[0].headers
        by = {"server_boot": "first", "server_epoch": 0}
        plain = [SimpleNamespace(rollout_infos={"policy_plain": True, **by})]
        assert writer.engine.generate(lambda: plain) is plain
        with pytest.raises(errors.PolicyMismatchError, match="while the base was asked for"):
            writer.engine.generate(lambda: [SimpleNamespace(rollout_infos={"policy_digest": "x"})])
        raise ZeroDivisionError
    assert not any(script.plain for script in scripts) and writer.is_current()
    scripts[0].faults["serve"] = [None, (500, {"message": "worker 0 ended"}, {})]
    with pytest.raises(errors.RolloutServerError, match="worker 0 ended"), writer.engine.plain():
        pass
    assert POLICY_HEADER in trainer.vllm_client.sessions[0].headers, "the server refuses what it was not asked for"
