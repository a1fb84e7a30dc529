"""Does the engine serve what the trainer holds? This package asks and judges; it changes nothing.

audit.py       the engine's memory against what was staged from the trainer, by checksum
probe.py       fixed prompts that the engine answers and the trainer scores
noise.py       what the trainer's own numerics may change
gate.py        asks and scores until verdict.py decides
verdict.py     from logprobs alone: which policy made the answers (agrees, disagrees and why), or what to ask next
hypotheses.py  the robust statistics behind it
batch.py       the logprobs of the run's own rollouts, as metrics
causes.py      what is wrong, in words: cause, evidence, what to do
"""
