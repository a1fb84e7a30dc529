"""Does the engine serve what the trainer holds? It asks and judges; it changes nothing.

audit.py       what lies in the engine's memory against what was staged from the trainer, by checksum
probe.py       fixed prompts that the engine answers and the trainer scores
noise.py       what the trainer's own numerics may change
gate.py        asks and scores until verdict.py decides
verdict.py     which policy the answers are of, from numbers alone: agrees, disagrees and why, or what to ask next
hypotheses.py  the robust arithmetic of that
causes.py      what is wrong, in words: cause, evidence, what to do
"""
