"""``scripts/demo --model smollm2``, or ``python -m demo.trained``: what a user feels, on a model that is trained.

SmolLM2-135M-Instruct learns a small task by GRPO (``task.py``), is killed, and is resumed without and with the plugin
(``runs.py``). ``report.py`` makes one chart and one record of it.
"""
