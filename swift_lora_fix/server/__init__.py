"""Server mode: ``swift rollout`` takes each policy's adapter, whole or not at all: by NCCL, from files, over HTTP.

In the order of the data, first the trainer, then each server::

    writer.py    one trainer's adapter, staged and numbered; the base where the servers have another one
    remote.py    what a sync, the gate and a rollout ask of an engine, answered by servers: all of them switch, or none
    parcel.py    one policy as it is sent: one buffer, and a PEFT folder where that is asked for (store.py)
    client.py    the calls: deadlines, retries, and errors that name the server; nccl.py: ms-swift's connections
    protocol.py  the routes, and what a policy is; content.py: the digest of its files that both sides compute
    routes.py    in the process of the web server: the routes, who may call them, all workers or none
    guard.py     around ms-swift's own routes; requests.py: what a request has in it
    files.py     the only way in to an adapter's bytes on disk: below the root, no links, limited; a sealed copy
    worker.py    in each ``llm_worker``: checks (checks.py), keeps, switches, and tells what each rollout came from
    receiver.py  in each of vLLM's workers: from NCCL or that copy into the LoRA slots; extension.py: how it gets there

The hooks are in frameworks/swift/server_hooks.py. What vLLM's workers cannot take themselves goes through its loader,
by ``swift_lora_fix.memory``. Importing this package loads neither FastAPI nor vLLM.
"""
