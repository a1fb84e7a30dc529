"""The ``reload`` transport of server mode: ``swift rollout`` takes each policy's adapter from a folder, or over HTTP.

On the server, in the order of the data::

    protocol.py  the routes, what a policy is, and the digest that both sides compute
    routes.py    in the process of the web server: the routes, who may call them, all workers or none
    files.py     the only way in to the adapter's bytes: below the root, no links, limited
    worker.py    in each ``llm_worker``: reads, checks, keeps, switches, and tells what each rollout came from

The hooks are in patches/server.py; the adapter goes into vLLM by ``swift_lora_fix.memory``. Importing this package
loads neither FastAPI nor vLLM.
"""
