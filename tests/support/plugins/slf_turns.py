"""``slf_turns``: a scheduler of two turns, whatever the model says. What it plays with goes to ``$SLF_TURNS_FILE``."""

import os

try:
    from swift.rollout.multi_turn import MultiTurnScheduler, multi_turns
except ImportError:
    from swift.plugin.multi_turn import MultiTurnScheduler, multi_turns

TURNS = 2


class Turns(MultiTurnScheduler):
    def step(self, infer_request, response_choice, current_turn):
        if os.environ.get("SLF_TURNS_FILE"):
            with open(os.environ["SLF_TURNS_FILE"], "a") as file:
                file.write(f"{infer_request.messages[0]['content']}\n")
        infer_request.messages.append({"role": "user", "content": "And then?"})
        return {"infer_request": infer_request}

    def check_finished(self, infer_request, response_choice, current_turn):
        return current_turn >= TURNS


multi_turns["slf_turns"] = Turns
