"""Does the engine serve what the trainer holds? Asked at run time, before rollouts: audits of bits, a gate on logprobs.

audit.py     what lies in the engine's memory against what was staged from the trainer, by checksum
gate.py      what the engine answers against what the trainer computes, in logprobs
verdict.py   which policy those answers are of, from numbers alone: agrees, disagrees and why, or what to ask next
hypotheses.py  the robust arithmetic of that
findings.py  what is wrong, in words: cause, evidence, what to do
guard.py     when which of them runs, and what follows: raise, repair or warn
"""
