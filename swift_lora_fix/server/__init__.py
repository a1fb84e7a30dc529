"""The ``reload`` transport of server mode: ``swift rollout`` takes each policy's adapter from a folder, or over HTTP.

In the order of the data, first the trainer, then each server::

    remote.py    what a sync, the gate and a rollout ask of an engine, answered by servers: all of them switch, or none
    store.py     each policy as a PEFT folder below the root
    client.py    the calls: deadlines, retries, and errors that name the server
    protocol.py  the routes, what a policy is, and the digest that both sides compute
    routes.py    in the process of the web server: the routes, who may call them, all workers or none
    files.py     the only way in to the adapter's bytes: below the root, no links, limited
    worker.py    in each ``llm_worker``: reads, checks, keeps, switches, and tells what each rollout came from

The hooks are in patches/server.py; the adapter goes into vLLM by ``swift_lora_fix.memory``. Importing this package
loads neither FastAPI nor vLLM.
"""
