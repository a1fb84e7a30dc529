"""``swift-lora-fix verify``: real runs of the user's own model and adapter, ms-swift's sync and ours beside each other.

runs.py      starts one GRPO run of a few steps each way, and reads what the observer wrote
observer.py  inside such a run: measures every sync from outside, whichever way it is done
results.py   what was measured -> verdict, table, chart
"""
