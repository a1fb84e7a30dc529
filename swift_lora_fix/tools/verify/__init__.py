"""``swift-lora-fix verify``: real runs of the user's own model and adapter, with the framework's sync and with ours.

inputs.py    whether model, adapter and folder are there, before anything is started
runs.py      starts one GRPO run of a few steps each way, and reads what the observer wrote
trl.py       such a run under TRL (ms-swift's is ``swift rlhf``)
observer.py  inside such a run: measures every sync from outside, whoever does it
facts.py     what was measured, and the verdict
chart.py     draws that
view.py      prints that
"""
