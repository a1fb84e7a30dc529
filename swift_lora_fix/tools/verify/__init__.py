"""``swift-lora-fix verify``: real runs of the user's own model and adapter, ms-swift's sync and ours beside each other.

inputs.py    whether model, adapter and folder are there, before anything is started
runs.py      starts one GRPO run of a few steps each way, and reads what the observer wrote
observer.py  inside such a run: measures every sync from outside, whichever way it is done
facts.py     what was measured, and the verdict
chart.py     that as a picture
view.py      that in words
"""
