"""Server mode: ``swift rollout`` takes each policy's adapter, all of it or nothing: over NCCL, from files, over HTTP.

In the order of the data. In the trainer, trainer/::

    writer.py      stages one trainer's adapter and gives it a version; sends the base where the servers have another
    remote.py      the servers as one engine: what a sync, the gate and a rollout ask; all of them switch, or none
    parcel.py      one policy to send: one buffer, and a PEFT folder when a server needs that (store.py)
    client.py      the calls: deadlines, retries, errors that name the server; nccl.py: ms-swift's connections

On both sides::

    wire.py        the routes, and what a policy is; content.py: the digest of its files

In each server, rollout/::

    installing.py  whether this server takes policies
    routes.py      in the web server's process: the routes, who may call them; all workers do it, or none
    guard.py       around ms-swift's own routes; requests.py: reads requests, with limits
    files.py       the only way to an adapter's bytes on disk: below the root, no links, limited; a sealed copy
    worker.py      in each ``llm_worker``: checks (checks.py), keeps and switches policies, and tags rollouts with them
        receiver.py    in each of vLLM's workers: from NCCL or that copy into the LoRA slots; extension.py: its entry

The hooks are in frameworks/swift/server_hooks.py. What vLLM's workers cannot take themselves goes through vLLM's
loader, by ``swift_lora_fix.memory``. Importing this package loads neither FastAPI nor vLLM.
"""
